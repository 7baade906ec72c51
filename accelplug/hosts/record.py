"""What a recipe says about an attention module: the choice that every host asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelplug.call import Clock, Site

if TYPE_CHECKING:
    from accelplug.patches.base import Patch


@dataclass(frozen=True)
class Choice:
    """What a recipe says about a site now: a patch, dense (None), or dense because of `reason`, which is counted."""

    patch: Patch | None = None
    name: str = "dense"
    reason: str | None = None


DENSE = Choice()

Decide = Callable[[Site, Any, Clock], Choice]
"""(site, layout or None, clock) -> choice."""
