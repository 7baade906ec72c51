"""What a recipe says about an attention module: the choice that every host asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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
    rule: int | None = None
    """Number of the recipe's rule that says so, from 0; None where none does."""
    under: Choice | None = None
    """What reads a prompt beneath the patch: its answer is that patch's dense attention."""

    @property
    def stages(self) -> tuple[Choice, ...]:
        """It and what stands beneath, which comes first."""
        return (self,) if self.under is None else (self.under, self)

    @property
    def chosen(self) -> bool:
        """Whether a rule says something: a patch, or dense for a reason that is counted."""
        return any(one.patch is not None or one.reason is not None for one in self.stages)


LEFT_DENSE = Choice()


def given(signature: inspect.Signature, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a method is called with, by name; a `forward` that somebody set on the instance may take more keywords."""
    names = [name for name in signature.parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


Decide = Callable[[Site, Any, Clock], Choice]
"""(site, layout or None, clock) -> choice."""
