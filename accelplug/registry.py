"""Which patches there are: a literal table, so that listing them imports neither torch nor a patch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from accelplug.errors import NoMatchError, nearest

if TYPE_CHECKING:
    from accelplug.patches.base import Patch


@dataclass(frozen=True)
class PatchEntry:
    """One patch: the name recipes use, where its class is, and what it does."""

    name: str
    module: str
    cls: str
    family: str
    """What it changes; a rule takes at most one patch of a family."""
    summary: str
    cite: str


_PATCHES = {
    entry.name: entry
    for entry in (
        PatchEntry(
            name="radial",
            module="accelplug.patches.sparse.radial",
            cls="Radial",
            family="sparse",
            summary="Static video mask: the spatial window halves as the distance in time doubles.",
            cite="arXiv 2506.19852",
        ),
        PatchEntry(
            name="neighborhood",
            module="accelplug.patches.sparse.neighborhood",
            cls="Neighborhood",
            family="sparse",
            summary="Every query reads a window around it on the token grid; strided, dilated or causal.",
            cite="arXiv 2504.16922",
        ),
        PatchEntry(
            name="sol",
            module="accelplug.patches.sparse.sol",
            cls="Sol",
            family="sparse",
            summary="Key blocks whose pooled score stands out are read exactly, all others through one pooled key each.",
            cite="arXiv 2607.24027",
        ),
        PatchEntry(
            name="visual_bias",
            module="accelplug.patches.heads.visual_bias",
            cls="VisualBias",
            family="heads",
            summary="Later text attends more to images and less to the system prompt: a bias on spans.",
            cite="arXiv 2603.03825",
        ),
    )
}


def list_patches() -> tuple[PatchEntry, ...]:
    """Return all patches."""
    return tuple(_PATCHES.values())


def patch_entry(name: str) -> PatchEntry:
    """Return the table's entry of a patch.

    Raises
    ------
    NoMatchError
        If there is no patch of that name.
    """
    if name not in _PATCHES:
        raise NoMatchError(f"There is no patch {name!r}{nearest(name, _PATCHES)}. Known: dense, {', '.join(_PATCHES)}.")
    return _PATCHES[name]


def patch_class(name: str) -> type[Patch]:
    """Import and return the class of a patch; see `patch_entry` for what it raises."""
    entry = patch_entry(name)
    return getattr(import_module(entry.module), entry.cls)
