"""The families of geometry transformers: which blocks attend over all frames, and how the tokens of a frame lie. Imports no torch.

No library has these models: users load them from their authors' repositories. So a family is known by the attributes of its modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alternation:
    """Data about one family.

    Attributes
    ----------
    name : of the family.
    blocks : attribute that holds the blocks of which some, or all, attend over all frames; each has its attention as ``attn``.
    beside : further attributes that the module has, by which it is known.
    special : attribute that says how many tokens of its own a frame has, ahead of its patches.
    eye : attribute that holds what is given the pictures of all frames, (B * S, 3, H, W).
    is_global : (module, number of a block) -> whether that block attends over all tokens of all frames.
    reference : whether poses are told in the coordinates of the first frame.
    """

    name: str
    blocks: str
    beside: tuple[str, ...]
    special: str
    eye: str
    is_global: Callable[[Any, int], bool]
    reference: bool = True

    def fits(self, module: Any) -> bool:
        """Whether a module is of this family."""
        return all(hasattr(module, name) for name in (self.blocks, *self.beside, self.special, self.eye, "patch_size"))

    def global_blocks(self, module: Any) -> list[int]:
        """Return the numbers of the blocks that attend over all frames."""
        return [number for number in range(len(getattr(module, self.blocks))) if self.is_global(module, number)]


KNOWN_ALTERNATIONS = (
    Alternation("vggt", "global_blocks", ("frame_blocks",), "patch_start_idx", "patch_embed", lambda module, number: True),
    Alternation(
        "vggt-omega",
        "inter_frame_blocks",
        ("frame_blocks", "inter_frame_attention_types"),
        "patch_token_start",
        "patch_embed",
        lambda module, number: module.inter_frame_attention_types[number] == "global",  # others read special tokens alone
    ),
    Alternation(
        "pi3",
        "decoder",
        ("register_token", "position_getter"),
        "patch_start_idx",
        "encoder",
        lambda module, number: number % 2 == 1,
        reference=False,
    ),
    Alternation(
        "depth-anything-3",
        "blocks",
        ("alt_start", "camera_token"),
        "patch_start_idx",
        "patch_embed",
        lambda module, number: number >= module.alt_start >= 0 and number % 2 == 1,
    ),
)


def alternation_of(module: Any) -> Alternation | None:
    """Return the family of a module, or None."""
    return next((family for family in KNOWN_ALTERNATIONS if family.fits(module)), None)
