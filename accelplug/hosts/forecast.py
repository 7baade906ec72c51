"""What a recipe can gain end to end: the share of attention in a forward, and Amdahl's law over the recipe's steps and layers."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from accelplug.bounded import Bounded
from accelplug.call import Clock
from accelplug.hosts.gate import Gate, Verdict
from accelplug.hosts.record import Decide
from accelplug.hosts.run import Passed
from accelplug.hosts.site import SiteRecord
from accelplug.kernels.timing import synchronise

FORWARDS = 2
"""Forwards of a shape that are measured. The last one stands: the first warms kernels and allocators up."""


@dataclass(frozen=True)
class Cost:
    """Where the time of one eager forward of a denoiser would go if all of its attention were dense, in milliseconds.

    Attributes
    ----------
    shape : of the latents.
    other_ms : all but self- and joint attention.
    dense_ms : self- and joint attention, by module.
    calls : (B, H, S, D) of the queries, dtype and device, by module.
    """

    shape: tuple[int, ...]
    other_ms: float = 0.0
    dense_ms: Mapping[str, float] = field(default_factory=dict)
    calls: Mapping[str, tuple[tuple[int, ...], torch.dtype, torch.device]] = field(default_factory=dict)

    @property
    def total_ms(self) -> float:
        """The forward."""
        return self.other_ms + sum(self.dense_ms.values())

    @property
    def share(self) -> float:
        """Share of self- and joint attention in the forward, in [0, 1]."""
        return 1 - self.other_ms / self.total_ms


@dataclass(frozen=True)
class Forecast:
    """What the gate's timings predict for one denoiser at one size.

    Attributes
    ----------
    shape : of the latents.
    unknown : why nothing is predicted, or None.
    forward_ms : a dense forward.
    attention_share : share of self- and joint attention in it, in [0, 1].
    forward_gain : a dense forward's time over that of a forward in which patches answer, on average over those; None while
        a patch has no verdict.
    run_gain : the same over all forwards of a run; None where also the number of steps is unknown.
    sparse_steps, steps : steps in which a patch answers, and all that the denoiser takes.
    stepped : whether forwards are steps of a run; those of an image encoder are runs of their own.
    """

    denoiser: str
    shape: tuple[int, ...]
    unknown: str | None = None
    forward_ms: float | None = None
    attention_share: float | None = None
    forward_gain: float | None = None
    run_gain: float | None = None
    sparse_steps: int | None = None
    steps: int | None = None
    stepped: bool = True

    @property
    def ceiling(self) -> float | None:
        """Gain of a forward if its self- and joint attention took no time."""
        return None if self.attention_share is None else amdahl(self.attention_share, math.inf)

    @property
    def with_one_dense_step_fewer(self) -> float | None:
        """Gain of the run if one of its dense steps had patches too; None where none is dense, or nothing would change."""
        if self.run_gain is None or self.forward_gain is None or self.steps is None or self.sparse_steps == self.steps:
            return None
        saved = 1 - 1 / self.forward_gain  # in dense forwards
        return self.steps / (self.steps / self.run_gain - saved) if saved > 0 else None

    def __str__(self) -> str:
        if self.attention_share is None:
            return f"share of attention unknown: {self.unknown}"
        said = f"attention is {self.attention_share:.0%} of a dense forward of {self.forward_ms:.0f} ms (at most {self.ceiling:.2f}x)"
        if self.forward_gain is None:
            return f"{said}; gain unknown: {self.unknown}"
        said += f"; {self.forward_gain:.2f}x for a forward with patches"
        if self.run_gain is None:
            return f"{said}; number of steps unknown" if self.stepped else said
        said += f", {self.run_gain:.2f}x for the run, {self.sparse_steps} of whose {self.steps} steps have them"
        one_fewer = self.with_one_dense_step_fewer
        return said if one_fewer is None else f"{said} ({one_fewer:.2f}x with one dense step fewer)"

    def to_dict(self) -> dict[str, Any]:
        """Return the forecast as plain data."""
        return {**asdict(self), "shape": list(self.shape)}


def amdahl(share: float, gain: float) -> float:
    """Gain of the whole if a part that is `share` of its time gets `gain` times faster."""
    left = 1 - share + share / gain
    return 1 / left if left else math.inf


def overall_gain(forecasts: Iterable[Forecast], gain: str, steps: str) -> float | None:
    """Gain over all denoisers, each weighed by its time: ``run_gain`` over ``steps``, or ``forward_gain`` over ``sparse_steps``.

    None where one of them is not known.
    """
    dense = sparse = 0.0
    for forecast in forecasts:
        if getattr(forecast, gain) is None or forecast.forward_ms is None:
            return None
        spent_ms = forecast.forward_ms * getattr(forecast, steps)
        dense += spent_ms
        sparse += spent_ms / getattr(forecast, gain)
    return dense / sparse if sparse else None


class Meter:
    """Times the first eager forwards of each shape of a denoiser: all of it, and what it spends inside attention."""

    def __init__(self) -> None:
        self._costs: Bounded[tuple, list[Cost]] = Bounded(16)
        self._measuring = _Measuring()

    def share_of(self, verdict: Verdict) -> float | None:
        """Share in a forward of the calls that a verdict is about; None where none was measured."""
        for cost in self.costs:
            of_them = [cost.dense_ms[module] for module, call in cost.calls.items() if verdict.covers(*call)]
            if of_them:
                return sum(of_them) / cost.total_ms
        return None

    @property
    def costs(self) -> list[Cost]:
        """The cost of a forward, by shape. One without calls was seen, and none of its attention."""
        return [max(reversed(seen), key=lambda cost: len(cost.calls)) for seen in self._costs.values() if seen]

    def forget(self) -> None:
        """Measure anew: the weights are others."""
        self._costs = Bounded(16)

    def begin(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Start on a forward, if its shape was not measured often enough."""
        seen = self._costs.get((shape, dtype, device), list)
        run = self._measuring.open = _Open(shape, device, seen) if len(seen) < FORWARDS else None
        if run is not None:
            synchronise(device)
            run.start = time.perf_counter()

    def clock(self, device: torch.device) -> float | None:
        """Return the time on entering attention, in seconds; None where no forward is measured."""
        if self._measuring.open is None:
            return None
        synchronise(device)
        return time.perf_counter()

    def call(self, module: str, q: torch.Tensor, dense_ms: float | None, entered: float) -> None:
        """Note an attention call: what dense attention takes, if that is known, and since when we were at it, timings included."""
        if (run := self._measuring.open) is None:
            return
        run.inside_ms += 1e3 * (time.perf_counter() - entered)
        if dense_ms is not None:
            run.dense_ms[module] = run.dense_ms.get(module, 0.0) + dense_ms
            run.calls[module] = tuple(q.shape), q.dtype, q.device

    def end(self) -> None:
        """End a forward that was begun."""
        if (run := self._measuring.open) is None:
            return
        self._measuring.open = None
        synchronise(run.device)
        whole_ms = 1e3 * (time.perf_counter() - run.start)
        run.seen.append(Cost(run.shape, max(whole_ms - run.inside_ms, 0.0), run.dense_ms, run.calls))


@dataclass
class _Open:
    """A forward that is being measured."""

    shape: tuple[int, ...]
    device: torch.device
    seen: list[Cost]
    start: float = 0.0
    inside_ms: float = 0.0
    dense_ms: dict[str, float] = field(default_factory=dict)
    calls: dict[str, tuple[tuple[int, ...], torch.dtype, torch.device]] = field(default_factory=dict)


class _Measuring(threading.local):
    """The forward of a thread that is being measured."""

    def __init__(self) -> None:
        self.open: _Open | None = None


class Forecaster:
    """Predicts what the patches of a denoiser gain, from what was timed so far.

    Parameters
    ----------
    name : of the denoiser.
    meter : has timed its forwards.
    records : of its attention modules.
    passed : which forwards came by.
    decide : (site, layout, clock) -> what the recipe says.
    gate : has timed dense against sparse.
    takes_turns : whether another denoiser runs some of the steps, so that those that came by are all.
    stepped : whether forwards are steps of a run.
    """

    def __init__(
        self,
        name: str,
        meter: Meter,
        records: Sequence[SiteRecord],
        passed: Passed,
        decide: Decide,
        gate: Gate,
        takes_turns: bool = False,
        stepped: bool = True,
    ) -> None:
        self.name, self.meter, self.records, self.passed = name, meter, records, passed
        self.decide, self.gate, self.takes_turns, self.stepped = decide, gate, takes_turns, stepped

    def forecasts(self) -> list[Forecast]:
        """What the timings so far predict, by size of the latents."""
        return [self._forecast(cost) for cost in self.meter.costs]

    def _forecast(self, cost: Cost) -> Forecast:
        missing = [r.site.module for r in self.records if r.site and r.routed and r.site.module not in cost.dense_ms]
        if missing or not cost.calls:
            some = f", among them that of {missing[0]}" if missing and cost.calls else ""
            why = f"attention that ran in compiled code or untimed{some}"
            return Forecast(self.name, cost.shape, why, stepped=self.stepped)
        known = Forecast(self.name, cost.shape, None, cost.total_ms, cost.share, stepped=self.stepped)
        total = self.passed.latest.steps
        steps = sorted(self.passed.steps) if total is None or self.takes_turns else range(total)
        forwards = []
        for step in steps or (None,):
            for branch in self.passed.branches:
                spent = self._predicted_ms(cost, Clock(step, total, branch))
                if spent is None:
                    return replace(known, unknown="a patch has not come by yet (plug.warmup(...) runs the model once)")
                forwards.append((step, *spent))
        patched = [ms for _, ms, answers in forwards if answers]
        forward_gain = cost.total_ms / statistics.fmean(patched) if patched else 1.0
        if total is None:
            return replace(known, forward_gain=forward_gain)
        return replace(
            known,
            forward_gain=forward_gain,
            run_gain=cost.total_ms / statistics.fmean(ms for _, ms, _ in forwards),
            sparse_steps=len({step for step, _, answers in forwards if answers}),
            steps=len(steps),
        )

    def _predicted_ms(self, cost: Cost, clock: Clock) -> tuple[float, bool] | None:
        """Milliseconds of a forward at `clock`, and whether a patch answers in it; None where one has no verdict."""
        spent, answers = cost.other_ms, False
        for record in self.records:
            if record.site is None or record.site.module not in cost.dense_ms:
                continue
            dense_ms = cost.dense_ms[record.site.module]
            seen = record.latest
            choice = self.decide(record.site, seen.layout, clock)
            neutral = choice.patch is seen.choice.patch and seen.params is None
            if choice.patch is None or seen.layout is None or neutral or not choice.patch.speed:
                spent += dense_ms
                continue
            verdict = self.gate.known(choice.name, choice.patch, *cost.calls[record.site.module])
            if verdict is None:
                return None
            used = verdict.pays or self.gate.mode == "report"
            spent += dense_ms * (verdict.sparse_ms / verdict.dense_ms if used else 1.0)
            answers |= used
        return spent, answers
