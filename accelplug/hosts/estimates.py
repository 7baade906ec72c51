"""What patches say of their own error, by site, step and guidance branch, and the bound above which a call is to run dense.

A patch that estimates its error writes it into a tensor that it is handed with the call. That works in compiled graphs too: the host
makes the tensor ahead of the forward, and it is read when somebody asks.

With a bound (``gate="quality"``) an eager call is judged by its own estimate: where that is above, dense attention answers in its place.
What a compiled graph has computed is used as it is. There, a site whose estimate was above the bound runs dense in the next step, and
tries again in the one after. An estimate that never came (too few tokens to probe) counts as above.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.call import Clock, Site
from accelplug.kernels.timing import capturing


@dataclass(frozen=True)
class Estimate:
    """What a patch says of the relative error of its answer at a site and step; the last one's, where no step is known."""

    site: Site
    clock: Clock
    patch: str
    error: float


@dataclass(frozen=True)
class ErrorSpread:
    """Estimates of several calls: their median and the worst, with its module and step."""

    median: float
    worst: float
    module: str
    step: int | None

    @classmethod
    def of(cls, estimates: Iterable[Estimate]) -> ErrorSpread:
        """Sum up some estimates, one at least."""
        known = list(estimates)
        worst = max(known, key=lambda said: said.error)
        median = statistics.median(said.error for said in known)
        return cls(median, worst.error, worst.site.module, worst.clock.step)

    def __str__(self) -> str:
        step = "" if self.step is None else f", step {self.step}"
        return f"median {self.median:.3f}, worst {self.worst:.3f} ({self.module}{step})"


@dataclass(frozen=True, eq=False)
class _Asked:
    """A tensor that waits for an estimate. `error` is None where dense attention runs."""

    site: Site
    clock: Clock
    patch: str
    error: Tensor | None
    too_wrong: bool = False


class Estimates:
    """Estimates of one plug.

    Parameters
    ----------
    bound : relative error above which calls are to run dense; None: they never are.
    """

    def __init__(self, bound: float | None = None) -> None:
        self.bound = bound
        self._asked: Bounded[tuple, dict[int | None, _Asked]] = Bounded(1 << 10)

    def ask(
        self, site: Site, clock: Clock, patch: str, device: torch.device, state: MutableMapping[str, Any], compiled: bool
    ) -> tuple[Tensor | None, str | None]:
        """Return a tensor, float32 (), NaN, into which a patch is to write its error at a site and time; or why it must not run.

        `state` is kept from step to step. `compiled`: whether calls cannot be judged when they come.
        """
        last: _Asked | None = state.get("asked")
        where = site.denoiser, site.module, clock.branch
        if last is None:
            self._asked.put(where, {})  # a run begins: nothing is left of the one before
        if last is None or last.clock != clock:
            too_wrong = compiled and last is not None and last.error is not None and self.is_above(last.error)
            with torch.inference_mode(False):  # calls outside of inference mode may write to it too
                error = None if too_wrong else torch.full((), torch.nan, device=device)
            last = state["asked"] = _Asked(site, clock, patch, error, too_wrong)
            self._asked.get(where, dict)[clock.step] = last
        return last.error, f"{self.reason}, in the step before" if last.too_wrong else None

    def is_above(self, error: Tensor) -> bool:
        """Whether an estimate is above the bound."""
        return self.bound is not None and not capturing(error.device) and not float(error) <= self.bound

    @property
    def reason(self) -> str:
        """Why a call runs dense whose estimate is above the bound."""
        return f"its estimated error is above max_error={self.bound:g}"

    def known(self) -> list[Estimate]:
        """Return what was said in the latest run, by site, step and guidance branch."""
        return [said for said in self._answers() if not math.isnan(said.error)]

    def missing(self) -> dict[str, int]:
        """Count by patch the calls of the latest run that were asked for an estimate, and of which none came."""
        return dict(Counter(said.patch for said in self._answers() if math.isnan(said.error)))

    def _answers(self) -> list[Estimate]:
        """What came of all that was asked of patches that run, NaN where nothing did."""
        asked = [asked for by_step in self._asked.values() for asked in list(by_step.values())]
        return [Estimate(one.site, one.clock, one.patch, float(one.error)) for one in asked if one.error is not None]

    def by_patch(self) -> dict[str, ErrorSpread]:
        """Sum up by name of the patch."""
        return self._summed(lambda said: said.patch)

    def by_module(self) -> dict[str, ErrorSpread]:
        """Sum up by attention module, as ``transformer.blocks.3.attn1``, in the order of layers."""
        return self._summed(lambda said: f"{said.site.denoiser}.{said.site.module}")

    def _summed(self, key: Callable[[Estimate], str]) -> dict[str, ErrorSpread]:
        groups: dict[str, list[Estimate]] = {}
        for said in sorted(self.known(), key=lambda said: (said.site.denoiser, said.site.layer or 0)):
            groups.setdefault(key(said), []).append(said)
        return {name: ErrorSpread.of(group) for name, group in groups.items()}
