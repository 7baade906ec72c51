"""A patch that is known for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelplug import registry
from accelplug.patches.base import Patch


@contextmanager
def registered(cls: type[Patch]) -> Iterator[type[Patch]]:
    """Register a patch while the context is open; one that was registered before stays.

    Raises
    ------
    AccelplugError
        As `accelplug.register_patch`.
    """
    known = registry.list_patches()
    registry.register_patch(cls)
    entry = registry.entry_of(cls)
    try:
        yield cls
    finally:
        if entry not in known:
            registry._PATCHES.drop(entry)
