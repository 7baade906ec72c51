"""What a recipe comes to in a run of so many steps, by its rules alone: what is sparse, what is read, the most that can be gained."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from accelplug.call import Clock, Kind, Layout, Site

if TYPE_CHECKING:
    from accelplug.recipe.rules import Decision

LENGTHS = (4, 8, 20, 50)
"""Steps of the runs that are told of where none is known: two of distilled models, two of others."""
DEPTH = 20
"""Layers that are reckoned with where no model is at hand: percents of them are whole."""


@dataclass(frozen=True)
class Expected:
    """A run of `steps` steps.

    Attributes
    ----------
    sparse_steps : steps in which a patch answers some attention.
    calls : share of the attention calls of the run that patches answer, in [0, 1].
    density : share of the keys that is read, mean over all calls, pooled ones not counted; None where the settings do not say.
    """

    steps: int
    sparse_steps: int
    calls: float
    density: float | None = None

    @property
    def dense_steps(self) -> int:
        """Steps in which all attention is dense."""
        return self.steps - self.sparse_steps

    @property
    def ceiling(self) -> float:
        """Gain of the run's attention if calls that patches answer took no time."""
        return math.inf if math.isclose(self.calls, 1) else 1 / (1 - self.calls)

    @property
    def with_one_dense_step_fewer(self) -> float | None:
        """The ceiling if one dense step were as the sparse ones; None where there is none of either."""
        if not self.dense_steps or not self.sparse_steps:
            return None
        return replace(self, calls=self.calls * (1 + 1 / self.sparse_steps)).ceiling

    def __str__(self) -> str:
        said = f"{self.dense_steps} of {self.steps} steps dense, {self.calls:.0%} of the attention calls sparse"
        said += "" if self.density is None else f", {self.density:.2f} of the keys read"
        if math.isinf(self.ceiling):
            return said
        fewer = self.with_one_dense_step_fewer
        bound = (
            ""
            if fewer is None
            else f", {'without bound' if math.isinf(fewer) else f'{fewer:.1f}x'} with one dense step fewer"
        )
        return f"{said}: its attention is at most {self.ceiling:.1f}x as fast{bound}"


def layers_of(kind: str = "self") -> list[Site]:
    """Return the attention of a model of `DEPTH` layers."""
    return [Site(f"blocks.{layer}.attn1", "transformer", cast(Kind, kind), layer, DEPTH) for layer in range(DEPTH)]


def expected(
    decide: Callable[[Site, Layout | None, Clock], Decision],
    steps: int,
    sites: Sequence[Site],
    layout: Layout | None = None,
    first: int = 0,
) -> Expected | None:
    """Return what rules come to in a run of `steps`; None where that hangs on what is not known: a branch, the token grid.

    Parameters
    ----------
    decide : ``Recipe.decide``.
    sites : attention modules.
    layout : of the tokens.
    first : step at which the run begins: late, where it starts from a picture.
    """
    by_step = [[decide(site, layout, Clock(step, steps)) for site in sites] for step in range(first, steps)]
    decisions = [decision for found in by_step for decision in found]
    if not decisions or any(decision.reason is not None for decision in decisions):
        return None
    sparse = [decision for decision in decisions if decision.patch is not None]
    known = [share for one in sparse if isinstance(share := one.config.get("density"), float | int)]
    calls = len(sparse) / len(decisions)
    read = statistics.fmean(known) if known else 1.0
    density = 1 - calls * (1 - read) if len(known) == len(sparse) else None
    return Expected(steps - first, sum(any(one.patch is not None for one in found) for found in by_step), calls, density)


def summed_up(runs: Sequence[Expected]) -> str:
    """Return what runs of several lengths come to, in one line."""
    lengths = ", ".join(str(run.steps) for run in runs)
    said = f"of {lengths} steps {', '.join(str(run.dense_steps) for run in runs)} dense"
    if all(run.density is not None for run in runs):
        said += f"; {', '.join(f'{run.density:.2f}' for run in runs)} of the keys read"
    ceilings = ", ".join("any" if math.isinf(run.ceiling) else f"{run.ceiling:.1f}x" for run in runs)
    return f"{said}; gain of attention at most {ceilings}"
