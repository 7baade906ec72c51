"""The families of denoisers: for each model class, where it attends and how its tokens lie. Imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any, get_args

from accelplug import compat
from accelplug.call import Kind
from accelplug.catalog import Catalog, EntryPoints
from accelplug.compat.contracts import contract, expect
from accelplug.errors import AccelplugError, UnsupportedError, nearest
from accelplug.families.base import Family
from accelplug.families.unsupported import UNSUPPORTED

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
    "audio",
    "easyanimate",
    "motif",
    "minimax",
    "krea",
    "ideogram",
    "auraflow",
    "cogview",
    "hidream",
    "ernie",
    "joyimage",
    "lumina",
    "nucleus",
    "prx",
    "bria",
    "omnigen",
    "helios",
)
"""Modules of this package, each with the families that it defines. A new one is a file, and a line here."""

FAMILIES: tuple[Family, ...] = tuple(
    found for file in FILES for found in vars(import_module(f"{__name__}.{file}")).values() if isinstance(found, Family)
)
"""Our own."""


def family_of(model: Any) -> Family | None:
    """Return the family of a denoiser by the names of its class and the classes that it derives from, or None."""
    return FAMILY_CATALOG.of(model)


def why_unsupported(model: Any) -> str | None:
    """Return why a denoiser without a family can have none, by its class and those that it derives from; None if that is not known."""
    return next((UNSUPPORTED[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in UNSUPPORTED), None)


def require_family(model: Any) -> Family:
    """Return the family of a denoiser.

    Raises
    ------
    UnsupportedError
        If there is none: why its class cannot be patched, or that it is not known, which classes are, and how a family is registered.
    """
    if (family := family_of(model)) is not None:
        return family
    name = type(model).__name__
    if (reason := why_unsupported(model)) is not None:
        raise UnsupportedError(f"{name} cannot be patched: {reason}")
    known = [cls for family in list_families() for cls in family.classes]
    raise UnsupportedError(
        f"{name} is not a denoiser that accelplug knows{nearest(name, known)}. It knows the {len(known)} classes of "
        "accelplug.families.list_families(). Say where this one attends and how its tokens lie by accelplug.register_family(...), as "
        "docs/extending.md shows."
    )


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


@contract("diffusers: every denoiser has a family, or a reason why it has none")
def _every_denoiser_is_placed() -> None:
    strange = [
        name for name in compat.diffusers.denoiser_classes() if name not in UNSUPPORTED and FAMILY_CATALOG.get(name) is None
    ]
    expect(not strange, f"nothing is known of {', '.join(strange)}: a family is to be written, or a line in UNSUPPORTED")
