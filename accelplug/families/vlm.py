"""Finds the family of a vision-language model, and takes those of others. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

from accelplug import compat
from accelplug.catalog import Catalog, EntryPoints
from accelplug.compat.contracts import contract, expect
from accelplug.errors import AccelplugError
from accelplug.families.unsupported import UNSUPPORTED_VLMS
from accelplug.families.vlms import KNOWN_VLMS, Vlm


def vlm_of(model: Any) -> Vlm | None:
    """Return the family of a model by the names of its class and the classes that it derives from, or None."""
    return VLM_CATALOG.of(model)


def why_no_vlm(model: Any) -> str | None:
    """Return why a model without a family can have none, by its class and those that it derives from; None if that is not known."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return None if vlm_of(model) else next((UNSUPPORTED_VLMS[name] for name in names if name in UNSUPPORTED_VLMS), None)


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


def token_grid(family: Vlm, tokens: int, grid_thw: Sequence[int] | None = None) -> tuple[int, int] | None:
    """Return rows and columns of an image's tokens on one picture, None where they lie on no single grid.

    Parameters
    ----------
    tokens : image tokens of the picture.
    grid_thw : frames, patch rows, patch columns (families of kind ``thw`` and ``own``); as many patches a side make a token as fit.
    """
    if family.grid in ("thw", "own"):
        if grid_thw is None or grid_thw[0] != 1 or not tokens:
            return None
        merge = max(1, isqrt(grid_thw[1] * grid_thw[2] // tokens))
        grid = (grid_thw[1] // merge, grid_thw[2] // merge)
        return grid if grid[0] * grid[1] == tokens else None
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens and family.grid in ("square", "tiles") else None


@contract("transformers: every class that answers to images and text has a family, or a reason why it has none")
def _every_class_is_placed() -> None:
    classes = compat.transformers.image_text_classes()
    strange = [name for name in classes if name not in UNSUPPORTED_VLMS and VLM_CATALOG.get(name) is None]
    expect(not strange, f"nothing is known of {', '.join(strange)}: a row is to be written, or a line in UNSUPPORTED_VLMS")
