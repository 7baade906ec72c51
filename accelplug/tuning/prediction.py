"""Probe cheaply, then run: the time and the error of a candidate's whole run, predicted from a few denoiser calls of a dense run.

A candidate is first seen at a few *snapshots*: calls of the denoiser that a dense run made, repeated with a patch on. Their outputs
differ from dense ones by a relative error e(s) at step s, and in time. From that a whole run is predicted:

* time: the dense run's, with the steps and layers that a candidate patches shrunk by the ratio that was seen;
* predicted error: ``sum over patched steps of w(s) e(s)``, where ``w(s) = |sigma(s) - sigma(s + 1)| exp(-kappa s / steps)``
  is how far a step moves the latents, and how much of an error made there is left in the end. Errors of one patch at
  neighbouring steps point the same way, so they add; those of layers do not, so dense layers take away their share of the
  square. kappa and the line from log(predicted error) to a metric are fitted to the full runs seen so far without a cache: attention
  errors alone do not say what a clip looks like;
* beside a cache: what patch and cache lose each alone they lose together. Noise adds, so that a PSNR is that of both powers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from accelplug.call import Layout
from accelplug.comparison.metrics import METRICS
from accelplug.comparison.study import OBSERVED, Study
from accelplug.hosts.forecast import amdahl
from accelplug.kernels.timing import timed_ms
from accelplug.plug import apply
from accelplug.tuning.budget import Bound
from accelplug.tuning.caches import magnitudes
from accelplug.tuning.space import WORTH, Arm, Candidate

KAPPAS = (0.0, 1.0, 2.0, 4.0, 8.0)
DECIBEL_SLOPE = -30.0
"""dB that a PSNR falls where an error grows tenfold: 28 to 30 by `python -m benchmarks.estimates`, 20 if clips were linear in it. Other
metrics are taken to lose as much as their limit, until runs say better."""


@dataclass
class Snapshot:
    """One denoiser call of a dense run: its step, arguments, output and time."""

    part: Any
    step: int
    steps: int
    args: tuple
    kwargs: dict[str, Any]
    output: torch.Tensor
    ms: float = math.nan


@dataclass
class Trajectory:
    """Snapshots of a dense run, and how far each step moves the latents.

    Attributes
    ----------
    snapshots : the first denoiser call of a few steps.
    moves : |sigma(s) - sigma(s + 1)| of all steps, adding up to 1; equal where the scheduler has no sigmas.
    layouts : token layouts that were seen.
    layers : number of attention layers.
    attention : share of self- and joint-attention in a denoiser call, None where it could not be seen, as in compiled blocks.
    contexts : names of the cache contexts that the pipeline opened.
    magnitudes : see `accelplug.tuning.caches.CacheFacts`.
    """

    snapshots: list[Snapshot]
    moves: list[float]
    layouts: list[Layout]
    layers: int
    attention: float | None = None
    contexts: frozenset[str] = frozenset()
    magnitudes: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @classmethod
    def record(cls, study: Study, prompt: int, seed: int, at: Sequence[float] = (0.1, 0.4, 0.7, 0.95)) -> Trajectory:
        """Run dense once, and keep the snapshots at these shares of the steps."""
        snapshots: dict[int, Snapshot] = {}
        contexts: set[str] = set()
        with apply(study.pipe, OBSERVED, gate="off") as plug:
            hosts = {host.root: host for host in plug.hosts}

            def keep(part: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
                now = hosts[part].now
                contexts.update([now.branch] if now.branch else [])
                if now.step is None or now.steps is None or now.step in snapshots:
                    return
                if now.step in {min(round(share * now.steps), now.steps - 1) for share in at}:
                    tensor = (output[0] if isinstance(output, tuple) else output.sample).clone()
                    snapshots[now.step] = Snapshot(part, now.step, now.steps, _cloned(args), _cloned(kwargs), tensor)

            with ExitStack() as stack:
                for part in hosts:
                    stack.callback(part.register_forward_hook(keep, with_kwargs=True).remove)
                ratios = stack.enter_context(magnitudes({host.name: host.root for host in plug.hosts}))
                study.run(prompt, seed)
            layouts = list(dict.fromkeys(r.layout for host in hosts.values() for r in host.records if r.layout is not None))
            layers = max((site.layers for site in plug.sites), default=0)
            attention = _attention_share(plug, list(snapshots.values()))
        found = list(snapshots.values())
        trajectory = cls(found, _moves(study.pipe), layouts, layers, attention, frozenset(contexts), ratios)
        for snapshot in trajectory.snapshots:
            snapshot.ms = min(timed_ms(lambda m=snapshot: _call(m), snapshot.output.device)[1] for _ in range(2))  # type: ignore[misc]
        return trajectory

    @property
    def layout(self) -> Layout:
        """The largest token layout."""
        return max(self.layouts, key=lambda layout: layout.visual)

    @property
    def steps(self) -> int:
        """Diffusion steps of a run."""
        return len(self.moves)

    def probe(self, pipe: Any, recipe: Mapping[str, Any], snapshots: Sequence[Snapshot] | None = None) -> Probe:
        """Repeat snapshots with a recipe on; the first call, which may compile, is not timed but traced."""
        snapshots = self.snapshots if snapshots is None else snapshots
        errors, ratios = {}, []
        densities: list[float | None] = []
        with apply(pipe, recipe, gate="report") as plug:
            for number, snapshot in enumerate(snapshots):
                plug.step(snapshot.step, snapshot.steps)
                if number == 0:
                    with plug.trace() as events:
                        _call(snapshot)
                    densities = [event.density for event in events]
                output, ms = timed_ms(lambda m=snapshot: _call(m), snapshot.output.device)  # type: ignore[misc]
                errors[snapshot.step] = float(
                    (output.float() - snapshot.output.float()).norm() / snapshot.output.float().norm()
                )
                ratios.append(ms / snapshot.ms)
            said = [estimate.error for estimate in plug.estimates]
        known = [density for density in densities if density is not None]
        density = statistics.fmean(known) if known else None
        return Probe(errors, statistics.median(ratios), density, statistics.median(said) if said else None)


@dataclass
class Probe:
    """What a recipe did to the snapshots.

    Attributes
    ----------
    errors : relative error of the denoiser's output by step.
    ratio : time over dense time.
    density : mean over the attention calls of the first snapshot.
    estimate : median over layers and snapshots of what the patch estimates of the error of its own answers; None where it does not.
    """

    errors: dict[int, float]
    ratio: float
    density: float | None = None
    estimate: float | None = None

    def error(self, step: int) -> float:
        """The error at a step, in a straight line between those seen."""
        steps = sorted(self.errors)
        return float(np.interp(step, steps, [self.errors[s] for s in steps]))


@dataclass
class Predictor:
    """What is known of arms, layers and full runs, and what it predicts of candidates."""

    trajectory: Trajectory
    bounds: Sequence[Bound]
    denoise_ms: float
    other_ms: float
    probes: dict[Arm, Probe] = field(default_factory=dict)
    layer_share: dict[int, float] = field(default_factory=dict)
    """Share of the squared error that a layer makes."""
    cache_ratio: dict[Any, float] = field(default_factory=dict)
    """Denoising time with a cache alone over dense."""
    runs: list[tuple[Candidate, dict[str, float], float]] = field(default_factory=list)
    """Full runs: the worst value of each bound, and the speed-up."""

    def steps_patched(self, candidate: Candidate) -> range:
        """The steps in which the arm is on."""
        steps = self.trajectory.steps
        return range(round(candidate.dense_steps * steps / 100), steps)

    @property
    def dense_ms(self) -> float:
        """Time of a dense run."""
        return self.denoise_ms + self.other_ms

    def ceiling(self, dense_steps: int) -> float:
        """Amdahl's bound on any patch with so many dense steps: attention free of cost in all others. NaN if its share is unknown."""
        share = math.nan if self.trajectory.attention is None else self.trajectory.attention
        return amdahl(self.denoise_ms / self.dense_ms * share * (1 - dense_steps / self.trajectory.steps), math.inf)

    def latency_ms(self, candidate: Candidate) -> float:
        """Predict the time of a run. Where whole runs with an arm took other times than probes predicted, so will this one."""
        taken = [
            self.dense_ms / gain / self._probed_ms(other)
            for other, _, gain in self.runs
            if other.arm == candidate.arm is not None
        ]
        return self._probed_ms(candidate) * (float(np.median(taken)) if taken else 1.0)

    def _probed_ms(self, candidate: Candidate) -> float:
        ratio = 1.0
        if candidate.arm is not None:
            ratio -= (1 - self.probes[candidate.arm].ratio) * self._share_patched(candidate)
        return self.other_ms + self.denoise_ms * ratio * self.cache_ratio.get(candidate.cache, 1.0)

    def _share_patched(self, candidate: Candidate) -> float:
        """Share of the steps and layers in which the arm is on."""
        kept = 1 - len(candidate.dense_layers) / max(self.trajectory.layers, 1)
        return kept * len(self.steps_patched(candidate)) / self.trajectory.steps

    def density(self, candidate: Candidate) -> float | None:
        """Predict the mean density of attention calls, as if no cache left any out."""
        if candidate.arm is None:
            return 1.0
        density = self.probes[candidate.arm].density
        return None if density is None else 1 - (1 - density) * self._share_patched(candidate)

    def predicted_error(self, candidate: Candidate, kappa: float) -> float:
        """Predict how much of the arm's error is left in the end; caches are not in it."""
        if candidate.arm is None:
            return 0.0
        probe, steps = self.probes[candidate.arm], self.trajectory.steps
        left = 1 - sum(self.layer_share.get(layer, 0.0) for layer in candidate.dense_layers)
        moved = sum(
            self.trajectory.moves[s] * math.exp(-kappa * s / steps) * probe.error(s) for s in self.steps_patched(candidate)
        )
        return moved * math.sqrt(max(left, 1e-3))

    def front(self) -> list[Arm]:
        """Return the arms that no other one beats by `WORTH` in time at no larger error, the fastest first."""
        errors = {arm: self.predicted_error(Candidate(arm), 2.0) for arm in self.probes}
        kept: list[Arm] = []
        for arm in sorted(self.probes, key=lambda arm: self.probes[arm].ratio):
            least = self.probes[arm].ratio / WORTH
            if not any(self.probes[other].ratio <= least and errors[other] <= errors[arm] for other in kept):
                kept.append(arm)
        return kept

    def margin(self, candidate: Candidate) -> float | None:
        """Predict the smallest margin over the bounds, in the bound's own unit; None where no run says what arm and cache lose alone.

        Where whole runs with the arm, or else with the cache beside another, came out otherwise than predicted, so will this one.
        """
        margins = [m for bound in self.bounds if (m := self._margin(bound, candidate)) is not None]
        return min(margins, default=None)

    def _margin(self, bound: Bound, candidate: Candidate) -> float | None:
        if candidate.arm is None or (predicted := self._uncorrected(bound, candidate)) is None:
            return None
        patched = [run for run in self.runs if run[0].arm is not None]
        akin = [run for run in patched if run[0].arm == candidate.arm] or [
            run for run in patched if run[0].cache == candidate.cache is not None
        ]
        off = [
            bound.margin(values[bound.figure]) - expected
            for other, values, _ in akin
            if (expected := self._uncorrected(bound, other)) is not None
        ]
        known = [difference for difference in off if math.isfinite(difference)]
        return predicted + (statistics.median(known) if known else 0.0)

    def _uncorrected(self, bound: Bound, candidate: Candidate) -> float | None:
        """Predict the margin to a bound, with a cache from what arm and cache lose alone."""
        alone = [
            (other, margin)
            for other, values, _ in self.runs
            if other.arm is not None and other.cache is None and self.predicted_error(other, 0.0) > 0
            if math.isfinite(margin := bound.margin(values[bound.figure]))
        ]
        if not alone:
            return None
        in_db = bound.score is None and METRICS[bound.name].unit == "dB"
        margin = self._line(candidate, alone, DECIBEL_SLOPE if in_db else -abs(bound.limit))
        if candidate.cache is None:
            return margin
        cache = [
            bound.margin(v[bound.figure]) for other, v, _ in self.runs if other == Candidate(None, cache=candidate.cache)
        ]
        return margin_of_both(margin, cache[0], in_db) if cache else None

    def _line(self, candidate: Candidate, points: list[tuple[Candidate, float]], usual: float) -> float:
        """The margin on the best line from log10(predicted error), over all kappas; with under three runs, on one of the usual slope."""
        y = np.array([value for _, value in points])
        best: tuple[float, float] = (math.inf, float(y.mean()))
        for kappa in KAPPAS if len(points) > 2 else KAPPAS[2:3]:
            x = np.log10([max(self.predicted_error(other, kappa), 1e-9) for other, _ in points])
            at = math.log10(max(self.predicted_error(candidate, kappa), 1e-9))
            slope = usual
            if len(points) > 2 and x.std() > 1e-6:
                slope = min(float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()), 0.0)
            line = y.mean() + slope * (x - x.mean())
            best = min(best, (float(((y - line) ** 2).mean()), float(y.mean() + slope * (at - x.mean()))))
        return best[1]


def margin_of_both(a: float, b: float, in_db: bool) -> float:
    """Return the margin that is left of two losses: in dB that of the sum of both noises, else no more than the worse of both."""
    worse, better = sorted((a, b))
    return worse - 10 * math.log10(1 + 10 ** ((worse - better) / 10)) if in_db and math.isfinite(worse) else worse


def _attention_share(plug: Any, snapshots: Sequence[Snapshot]) -> float | None:
    """Share of the attention that patches may answer in one denoiser call, the second: the first may warm up."""
    if not snapshots:
        return None
    for snapshot in [snapshots[0], snapshots[0]]:
        plug.step(snapshot.step, snapshot.steps)
        with plug.trace(timed=True) as events:
            _, ms = timed_ms(lambda m=snapshot: _call(m), snapshot.output.device)  # type: ignore[misc]
        share = sum(event.ms or 0.0 for event in events) / ms
    return share if events else None


def _call(snapshot: Snapshot) -> torch.Tensor:
    with torch.no_grad():
        output = snapshot.part(*snapshot.args, **snapshot.kwargs)
    return output[0] if isinstance(output, tuple) else output.sample


def _cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    return type(value)(_cloned(item) for item in value) if type(value) in (list, tuple) else value


def _moves(pipe: Any) -> list[float]:
    scheduler = pipe.scheduler
    steps = len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) != steps + 1:
        return [1 / steps] * steps
    moves = (sigmas[:-1] - sigmas[1:]).abs().double()
    return (moves / moves.sum()).tolist()
