"""The families of vision-language models: how their pixels and their image tokens lie. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from accelplug.catalog import Catalog, EntryPoints
from accelplug.errors import AccelplugError


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
    by_image : whether the image encoder returns features image by image; where it does not, each run of image tokens is one.
    turns : the tokens that open a turn of the released models, by who speaks: 1 the user, -1 the model, 0 the system.
    """

    name: str
    classes: tuple[str, ...]
    pixels: Literal["images", "tiles", "patches"] = "images"
    grid: Literal["square", "thw", "tiles", "anyres"] = "square"
    by_image: bool = True
    turns: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


VICUNA = {1: (3148, 1001, 29901), -1: (319, 1799, 9047, 13566, 29901)}
"""``USER:`` and ``ASSISTANT:`` of Llama's tokenizer."""
CHATML = {1: (151644, 872), -1: (151644, 77091), 0: (151644, 8948)}
"""``<|im_start|>user`` and so on of Qwen's tokenizer."""
GEMMA = {1: (105, 2364), -1: (105, 4368)}
"""``<start_of_turn>user`` and ``model`` of Gemma 3's tokenizer."""

KNOWN_VLMS = (
    Vlm("llava", ("LlavaForConditionalGeneration",), turns=VICUNA),
    Vlm("llava-next", ("LlavaNextForConditionalGeneration",), "tiles", "anyres", turns=VICUNA),
    Vlm("llava-onevision", ("LlavaOnevisionForConditionalGeneration",), "tiles", "anyres", turns=CHATML),
    Vlm("qwen2-vl", ("Qwen2VLForConditionalGeneration",), "patches", "thw", turns=CHATML),
    Vlm("qwen2.5-vl", ("Qwen2_5_VLForConditionalGeneration",), "patches", "thw", turns=CHATML),
    Vlm("qwen3-vl", ("Qwen3VLForConditionalGeneration",), "patches", "thw", turns=CHATML),
    Vlm("internvl", ("InternVLForConditionalGeneration",), "images", "tiles", turns=CHATML),
    Vlm("gemma3", ("Gemma3ForConditionalGeneration",), turns=GEMMA),
    Vlm(
        "smolvlm", ("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"), "tiles", "tiles", by_image=False
    ),
)


def vlm_of(model: Any) -> Vlm | None:
    """Return the family of a model by the names of its class and the classes that it derives from, or None."""
    return VLM_CATALOG.of(model)


def list_vlms() -> tuple[Vlm, ...]:
    """Return all known families: ours, then those of others."""
    return VLM_CATALOG.all()


def register_vlm(family: Vlm) -> Vlm:
    """Have models of a family's classes known as vision-language models: head patches go on, and the recipes of `vlm` fit.

    Parameters
    ----------
    family : its classes, and how its pixels and its image tokens lie. What is registered already may come again.

    Raises
    ------
    AccelplugError
        If it is not a `Vlm`, names no class, or another family has one of its classes.
    """
    if not isinstance(family, Vlm) or not family.classes or isinstance(family.classes, str):
        raise AccelplugError(
            f"register_vlm: expected a Vlm that names model classes, got {family!r}. Give it classes=(...)."
        )
    VLM_CATALOG.add(family.classes, family)
    return family


VLM_CATALOG: Catalog[Vlm] = Catalog(
    "vision-language model",
    {cls: family for family in KNOWN_VLMS for cls in family.classes},
    EntryPoints("accelplug.vlms", register_vlm),
)


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
