"""The families of denoisers: for each model class, where it attends and how its tokens lie. Imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any, get_args

from accelplug.call import Kind
from accelplug.catalog import Catalog, EntryPoints
from accelplug.errors import AccelplugError
from accelplug.families.base import Family

FILES = (
    "wan",
    "hunyuan",
    "cogvideox",
    "mochi",
    "ltx",
    "cosmos",
    "allegro",
    "kandinsky",
    "flux",
    "sd3",
    "qwen",
    "zimage",
    "pixart",
    "unet",
    "sana",
    "audio",
)
"""Modules of this package, each with the families that it defines. A new one is a file, and a line here."""

FAMILIES: tuple[Family, ...] = tuple(
    found for file in FILES for found in vars(import_module(f"{__name__}.{file}")).values() if isinstance(found, Family)
)
"""Our own."""


def family_of(model: Any) -> Family | None:
    """Return the family of a denoiser by the names of its class and the classes that it derives from, or None."""
    return FAMILY_CATALOG.of(model)


def list_families() -> tuple[Family, ...]:
    """Return all families: ours, then those of others."""
    return FAMILY_CATALOG.all()


def register_family(family: Family) -> Family:
    """Have denoisers of a family's classes known: patches go on, and recipes whose match names such a class fit.

    An installed package names its families by entry points of the group ``accelplug.families``; see docs/extending.md.

    Parameters
    ----------
    family : its classes, where they attend, and how their tokens lie. What is registered already may come again.

    Raises
    ------
    AccelplugError
        If it is not a `Family`, lacks what one needs, or another family has its name or one of its classes.
    """
    if not isinstance(family, Family):
        raise AccelplugError(f"register_family: expected an accelplug.families.base.Family, got {family!r}.")
    if faults := _faults(family):
        raise AccelplugError(f"The family {family.name!r} cannot be registered: {'; '.join(faults)}. See docs/extending.md.")
    FAMILY_CATALOG.add(family.classes, family)
    return family


def _faults(family: Family) -> list[str]:
    """What a family lacks."""
    faults = []
    if isinstance(family.classes, str) or not family.classes:
        faults.append(f"`classes` must be a tuple of names of denoiser classes, got {family.classes!r}")
    if unknown := [kind for _, kind in family.sites if kind not in get_args(Kind)]:
        faults.append(
            f"`sites` must be pairs (glob of a module's path, one of {', '.join(get_args(Kind))}), got {unknown[0]!r}"
        )
    if not family.sites:
        faults.append("`sites` names no attention module")
    if not callable(family.geometry):
        faults.append(f"`geometry` must be a function of a config and a forward's arguments, got {family.geometry!r}")
    if any(other.name == family.name and other != family for other in list_families()):
        faults.append("there is another family of that name")
    return faults


FAMILY_CATALOG: Catalog[Family] = Catalog(
    "denoiser class",
    {cls: family for family in FAMILIES for cls in family.classes},
    EntryPoints("accelplug.families", register_family),
)
