"""The families of vision-language models: how their pixels and their image tokens lie. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Vlm:
    """Data about one family.

    Attributes
    ----------
    name : short name.
    classes : names of the model classes.
    pixels : how ``pixel_values`` lie: ``images`` (N, 3, H, W), one a picture; ``tiles`` (N, T, 3, H, W) or several a picture;
        ``patches`` (sum of T*H*W, C * T_p * P * P) with ``image_grid_thw``.
    grid : how an image's tokens lie: ``square``, row by row; ``thw``, by ``image_grid_thw`` over the merge size; ``tiles``, square
        tiles one after the other; ``anyres``, a square base, then rows of tiles with a newline each.
    told_apart : whether the image encoder returns features image by image; where it does not, each run of image tokens is one.
    """

    name: str
    classes: tuple[str, ...]
    pixels: Literal["images", "tiles", "patches"] = "images"
    grid: Literal["square", "thw", "tiles", "anyres"] = "square"
    told_apart: bool = True


VLMS: tuple[Vlm, ...] = (
    Vlm("llava", ("LlavaForConditionalGeneration",)),
    Vlm("llava-next", ("LlavaNextForConditionalGeneration",), "tiles", "anyres"),
    Vlm("llava-onevision", ("LlavaOnevisionForConditionalGeneration",), "tiles", "anyres"),
    Vlm("qwen2-vl", ("Qwen2VLForConditionalGeneration",), "patches", "thw"),
    Vlm("qwen2.5-vl", ("Qwen2_5_VLForConditionalGeneration",), "patches", "thw"),
    Vlm("qwen3-vl", ("Qwen3VLForConditionalGeneration",), "patches", "thw"),
    Vlm("internvl", ("InternVLForConditionalGeneration",), "images", "tiles"),
    Vlm("gemma3", ("Gemma3ForConditionalGeneration",)),
    Vlm("smolvlm", ("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"), "tiles", "tiles", False),
)

_BY_CLASS = {name: family for family in VLMS for name in family.classes}


def find(model: Any) -> Vlm | None:
    """Return the family of a model by the names of its class and the classes that it derives from, or None."""
    return next((_BY_CLASS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _BY_CLASS), None)


def token_grid(family: Vlm, tokens: int, grid_thw: Sequence[int] | None = None, merge: int = 1) -> tuple[int, int] | None:
    """Return rows and columns of an image's tokens on one picture, None where they lie on no single grid.

    Parameters
    ----------
    tokens : image tokens of the picture.
    grid_thw, merge : frames, patch rows, patch columns, and how many patches a side make a token (``thw`` families).
    """
    if family.grid == "thw":
        return None if grid_thw is None or grid_thw[0] != 1 else (grid_thw[1] // merge, grid_thw[2] // merge)
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens and family.grid in ("square", "tiles") else None
