"""What is known for a while: a patch, a family of denoisers, of vision-language models, or of image encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelplug import families, registry
from accelplug.catalog import Catalog
from accelplug.families import encoders, vlm
from accelplug.families.base import Family
from accelplug.families.encoders import Encoder
from accelplug.families.vlm import Vlm
from accelplug.patches.base import Patch


@contextmanager
def registered(thing: type[Patch] | Family | Vlm | Encoder) -> Iterator[None]:
    """Register something while the context is open; what was registered before stays.

    Raises
    ------
    AccelplugError
        As `accelplug.register_patch`, `register_family` and `register_vlm`.
    """
    catalog, register = _home_of(thing)
    before = catalog.all()
    register(thing)
    added = [known for known in catalog.all() if known not in before]
    try:
        yield
    finally:
        for known in added:
            catalog.drop(known)


def _home_of(thing: Any) -> tuple[Catalog[Any], Callable[[Any], Any]]:
    if isinstance(thing, Family):
        return families.FAMILY_CATALOG, families.register_family
    if isinstance(thing, Vlm):
        return vlm.VLM_CATALOG, vlm.register_vlm
    if isinstance(thing, Encoder):
        return encoders.ENCODER_CATALOG, encoders.register_encoder
    return registry.PATCH_CATALOG, registry.register_patch
