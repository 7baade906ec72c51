"""tune(): search for the fastest recipe within a quality budget, and prove it on runs that the search never saw."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accelplug.comparison.result import DENSE
from accelplug.comparison.study import Study, Variant, quiet
from accelplug.errors import AccelplugError
from accelplug.hosts.diffusers import denoisers
from accelplug.hosts.transformers import is_language_model
from accelplug.plug import model_facts
from accelplug.recipe import Measured, Recipe, load
from accelplug.tuning.budget import Bound, parse
from accelplug.tuning.caches import FEW_STEPS, Cache, Seen, fitting
from accelplug.tuning.fingerprint import adapters, fingerprint, is_compiled
from accelplug.tuning.forecast import OBSERVED, Forecast, Trajectory
from accelplug.tuning.journal import Journal
from accelplug.tuning.result import Point, Tuned
from accelplug.tuning.space import Arm, Candidate, arms, cached, variants

logger = logging.getLogger("accelplug")

WORTH = 1.03
"""A gain below this is not worth a recipe."""
FINALISTS = 4
"""Candidates that are proven at most, the fastest first."""
PROBE_SHARE = 0.35
"""Share of the time that probing may take."""
CACHE_SHARE = 0.25
"""Share of what is left then that runs of step caches alone may take."""
GRAPHS = 512
"""Graphs that a compiled function may have during a search."""


def tune(
    pipe: Any,
    inputs: Any = None,
    budget: str | Bound | Sequence[str | Bound] | None = None,
    *,
    time_budget_s: float = 600.0,
    seeds: int | Sequence[int] = 4,
    patches: Sequence[str] | None = None,
    caches: bool = True,
    foreground: Callable[[np.ndarray], np.ndarray] | None = None,
    detect: Callable[[np.ndarray, str], float] | None = None,
    processor: Any = None,
    objective: str | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Tuned:
    """Find the fastest recipe that keeps a diffusers pipeline within a quality budget; of a language model, the most accurate.

    Cheap before dear. A dense run is recorded; every patch and setting is tried on a few of its denoiser calls, which foretells
    time and spoil of whole runs (`accelplug.tuning.forecast`). The fastest that promise to stay within the budget are run whole
    on one prompt and seed, and each run corrects the forecast; those that hold go on to more seeds. The winner is proven on
    prompts and seeds that the search never saw, its worst run within every bound; if it fails there, the next one is.

    Nothing is drawn at random: from equal measurements follow equal proposals in equal order. Times are measurements too, and how
    many proposals are tried hangs on how long they take; `resume` keeps the probes, so that they at least are the same again.

    Where the denoiser goes through torch.compile, each candidate compiles anew, and its first run is not timed.

    Language models: patches aim attention at the picture, and make no model faster. Candidates answer questions, few at first,
    and the better half goes on to more (successive halving). Those that beat the stock model answer questions about pictures
    that were held out; the recipe is one that beats it there too (McNemar's test, for likelihoods the sign test, with Holm's
    correction over the finalists) within the budget: the fastest of those that do equally well. Else: stay stock, and why.

    Parameters
    ----------
    pipe : a diffusers pipeline, or a transformers language or vision-language model. It is left as it was.
    inputs : arguments of the pipeline's call, one mapping or several. The last of several prompts is held out for the proof.
        Language models: an `Exam`, or a list of ``{"text", "answer", "image"}``, image a PIL image or a path, and optional;
        generated scenes if left out. Half of the pictures are held out.
    budget : bounds that every run must keep against dense at the same seed: ``"fg_psnr>=26"``, ``"ssim>=.9, agreement>=1"``,
        a `Bound` with a function of yours, or a list of such; ``"psnr>=26"`` if left out. Language models: bounds on figures
        over all questions, ``"accuracy>=0.8, hallucination<=stock, speed>=0.9"``, none if left out. accuracy: share that is
        right; mcc, recall, hallucination: of questions of yes and no; nll: nats a token of the reference answers; speed: the
        stock model's time over the patched one's; each against a number or against ``stock+0.01``.
    time_budget_s : seconds to spend, about; the proof is kept time for. Ctrl-C ends the search and keeps the best so far.
    seeds : number of seeds, or the seeds. The second half is held out for the proof. Language models: the first one draws which
        pictures are.
    patches : names of patches to try; all that have a ladder in `accelplug.tuning.space`, `accelplug.tuning.aims`.
    caches : also try step caches, alone and with patches. None are tried in runs of few steps; `Tuned.notes` says what does not fit.
    foreground, detect : as for `accelplug.compare`, for the bounds ``fg_psnr`` and ``agreement``.
    processor : a language model's: its processor, or its tokenizer.
    objective : what a language model should do better: ``accuracy``, ``mcc`` or ``nll``. Accuracy if left out, or nll where
        references are not all yes or no.
    resume : a file that keeps what was measured; a second call goes on from there.
    progress : show a progress bar with the best so far.

    Returns
    -------
    `Tuned`: a recipe for `accelplug.apply`, with the front, all that was tried, and why; a dense one if nothing pays.

    Raises
    ------
    AccelplugError
        If inputs, seeds or the budget cannot be used.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if is_language_model(pipe):
        if foreground is not None or detect is not None:
            raise AccelplugError(
                "foreground and detect are about clips; bound a language model's answers, or leave them out."
            )
        from accelplug.tuning.language import tune_language

        return tune_language(
            pipe,
            inputs,
            budget,
            objective=objective,
            processor=processor,
            time_budget_s=time_budget_s,
            seed=numbers[0],
            patches=patches,
            resume=resume,
            progress=progress,
        )
    prompts = [dict(inputs)] if isinstance(inputs, Mapping) else [dict(item) for item in inputs or ()]
    if not prompts or len(numbers) < 2:
        raise AccelplugError(
            f"tune needs inputs and at least two seeds, one to search and one to prove with; got {len(prompts)} inputs and "
            f"{len(numbers)} seeds."
        )
    bounds = parse("psnr>=26" if budget is None else budget)
    half = len(numbers) // 2
    seen = list(itertools.product(range(max(len(prompts) - 1, 1)), numbers[:half]))
    unseen = list(itertools.product([len(prompts) - 1], numbers[half:]))
    study = Study(pipe, prompts, numbers, foreground, detect)
    search = Search(study, bounds, seen, unseen, time_budget_s, Journal(resume, fingerprint(pipe, prompts, numbers)))
    with quiet(pipe), room_to_compile(pipe), _bar(progress, time_budget_s) as search.tell:
        search.run(patches, caches)
    return search.result()


@dataclass
class Search:
    """A search under way."""

    study: Study
    bounds: tuple[Bound, ...]
    seen: list[tuple[int, int]]
    unseen: list[tuple[int, int]]
    time_budget_s: float
    journal: Journal
    tell: Callable[[str, float], None] = lambda what, spent: None
    started: float = field(default_factory=lambda: time.monotonic())
    forecast: Forecast | None = None
    candidates: list[Candidate] = field(default_factory=list)
    points: dict[Candidate, Point] = field(default_factory=dict)
    ladders: list[list[Cache]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False

    # ---------------------------------------------------------------------------------------------------- time

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def run_s(self) -> float:
        """Seconds of a dense run."""
        return self.study.rows[DENSE].latency.p50 / 1e3

    def _affords(self, pairs: Sequence[tuple[int, int]]) -> bool:
        """Whether time is left to run a candidate there, dense runs included, and for the proof of one recipe."""
        runs = len(pairs) + sum(pair not in self.study.dense_runs for pair in pairs) + 2 * len(self.unseen)
        return self.spent_s + runs * self.run_s < self.time_budget_s

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 1)

    # ------------------------------------------------------------------------------------------------- phases

    def run(self, patches: Sequence[str] | None, caches: bool) -> None:
        """Go through all phases. An interrupt ends the search, a second one the proof; what was measured is kept."""
        try:
            self.prepare(patches, caches)
            self.explore()
        except KeyboardInterrupt:
            if self.forecast is None:
                raise  # nothing is known yet
            self.interrupted = True
            logger.warning("tune: interrupted; the best so far is proven now. Interrupt again to stop at once.")
        try:
            self.prove()
        except KeyboardInterrupt:
            self.interrupted = True
            logger.warning("tune: interrupted; what is not proven yet is not recommended.")

    def prepare(self, patches: Sequence[str] | None, caches: bool) -> None:
        """Run dense, record its moments, see which caches fit, and probe all arms on the moments, then layers."""
        with self._phase("dense"):
            self.tell("dense run", self.spent_s)
            trajectory = Trajectory.record(self.study, *self.seen[0])
            self._dense(self.seen[0])
        if not trajectory.layouts or not trajectory.moments:
            raise AccelplugError(
                f"{type(self.study.pipe).__name__} has no self-attention on a known token grid: nothing to tune. "
                "`accelplug inspect` says what is known of the model."
            )
        sample = self.study.rows[DENSE].samples[0]
        self.forecast = Forecast(trajectory, self.bounds, sample.denoise_ms, sample.latency_ms - sample.denoise_ms)
        self._note(self._limit())
        if caches:
            seen = Seen(trajectory.steps, trajectory.contexts, trajectory.magnitudes)
            self.ladders, why_not = fitting(denoisers(self.study.pipe), seen)
            self._note(*why_not)
        with self._phase("probing"):
            found = arms(max(trajectory.layouts, key=lambda layout: layout.visual), patches)
            for arm in found:
                if self.spent_s > PROBE_SHARE * self.time_budget_s:
                    break
                self.tell(f"probing {arm}", self.spent_s)
                self._probe(arm)
            self._probe_layers()
        order = sorted(self.forecast.layer_share, key=lambda layer: -self.forecast.layer_share[layer])  # type: ignore[union-attr]
        paying = [arm for arm, probe in self.forecast.probes.items() if probe.ratio < 1 / WORTH]
        self.candidates = [candidate for arm in paying for candidate in variants(arm, order, trajectory.steps)]

    def explore(self) -> None:
        """Run the most promising candidate whole, learn, and go on until time is up or nothing faster can hold."""
        with self._phase("whole runs"):
            self._run_caches()
            while self._affords(self.seen[:1]) and (candidate := self._next()) is not None:
                self._run(candidate, self.seen[:1])
            self._halve()

    def _halve(self) -> None:
        """Successive halving: the fastest that hold, on as many pairs again as they have seen; half of them go on."""
        survivors, seen = self._holding()[: 2 * FINALISTS], 1
        while survivors and seen < len(self.seen):
            pairs = self.seen[seen : 2 * seen]
            for candidate in survivors:
                if self._affords(pairs):
                    self._run(candidate, pairs)
            seen += len(pairs)
            survivors = [candidate for candidate in self._holding() if candidate in survivors]
            survivors = survivors[: (len(survivors) + 1) // 2]

    def prove(self) -> None:
        """Run the fastest that holds where the search never looked; if it fails there, the next."""
        with self._phase("proof"):
            for candidate in self._holding()[:FINALISTS]:
                point = self.points[candidate]
                if point.speedup < WORTH:
                    break
                self._run(candidate, self.unseen)
                point.verdict = "proven" if point.margin >= 0 else "overturned"
                if point.verdict == "proven" and point.speedup >= WORTH:
                    break

    def result(self) -> Tuned:
        """Put the recipe, its measurement and the front together."""
        points = sorted(self.points.values(), key=lambda p: -p.speedup)
        proven = next((c for c, p in self.points.items() if p.verdict == "proven" and p.speedup >= WORTH), None)
        mapping = proven.rules() if proven is not None else OBSERVED
        recipe = load(mapping, model_facts(self.study.pipe))
        self.study.rows = {
            name: row for name, row in self.study.rows.items() if row.samples
        }  # an interrupt leaves empty ones
        comparison = self.study.finish({})
        measured: tuple[Measured, ...] = ()
        if proven is not None:
            row = comparison.measured(comparison.row(self.points[proven].name))
            measured = (Measured.model_validate(row),)
        budget = ", ".join(map(str, self.bounds))
        fields = {name: getattr(recipe, name) for name in ("rules", "cache", "match", "source", "loc")}
        why = self._why(proven, budget)
        if self.forecast is not None and self.forecast.trajectory.steps <= FEW_STEPS:
            why = f"{why}. {self._limit()}"
        if found := adapters(self.study.pipe):
            named = ", ".join(f"{name} ({factor})" for name, factor in found.items())
            self._note(f"Tuned with the LoRA adapters {named}; for others tune again.")
        return Tuned(
            name="tuned",
            model="tuned",
            summary=". ".join([why, *(note for note in self.notes if "LoRA" in note)]),
            measured=measured,
            why=why,
            bounds=self.bounds,
            points=tuple(points),
            notes=tuple(self.notes),
            comparison=comparison,
            seconds={**self.seconds, "all": round(self.spent_s, 1)},
            **fields,
        )

    def _note(self, *texts: str) -> None:
        """Say once what the user should know of the search."""
        for text in texts:
            if text not in self.notes:
                self.notes.append(text)
                logger.info("tune: %s", text)

    def _limit(self) -> str:
        """What is there to gain at all: Amdahl's law."""
        assert self.forecast is not None
        forecast, steps = self.forecast, self.forecast.trajectory.steps
        if (share := forecast.trajectory.attention) is None:
            return "What a patch can gain at most is not known: attention could not be timed by itself."
        shares = (
            f"attention being {share:.0%} of a step and denoising {forecast.denoise_ms / forecast.dense_ms:.0%} of a run"
        )
        if steps > FEW_STEPS:
            return f"With {shares}, no patch can gain more than {forecast.ceiling(0):.2f}x."
        return (
            f"With {steps} steps, one of them dense, {shares}, no patch can gain more than {forecast.ceiling(1):.2f}x; "
            f"with none dense {forecast.ceiling(0):.2f}x."
        )

    def _why(self, proven: Candidate | None, budget: str) -> str:
        if proven is not None:
            point = self.points[proven]
            worst = ", ".join(f"{name} {value:.2f}" for name, value in point.worst.items())
            return f"{point.name}: {point.speedup:.2f}x within {budget}, worst of {point.runs} runs {worst}"
        held = sorted((point for point in self.points.values() if point.margin >= 0), key=lambda p: -p.speedup)
        if self.interrupted:
            best = [f"{p.name} kept {budget} at {p.speedup:.2f}x in {p.runs} runs of the search" for p in held[:1]]
            return f"Stay dense: interrupted before anything was proven; {best[0] if best else 'nothing was seen to hold'}"
        if self.forecast is None or not self.forecast.probes:
            return (
                f"Stay dense: {self.time_budget_s:.0f} s were over before a patch could be probed, a dense run takes "
                f"{self.run_s:.0f} s. Give time_budget_s of at least {30 * self.run_s:.0f}"
            )
        if not self.candidates and not self.points:
            return "Stay dense: no patch was faster than dense attention at this shape on this device"
        if any(point.verdict == "overturned" for point in self.points.values()):
            return f"Stay dense: what held {budget} in the search did not on unseen prompts and seeds"
        if held:
            return f"Stay dense: what keeps {budget} gains less than {WORTH:.2f}x, at best {held[0].speedup:.2f}x"
        return f"Stay dense: none of {len(self.points)} candidates that were run keeps {budget}"

    # ------------------------------------------------------------------------------------------------ measuring

    def _dense(self, pair: tuple[int, int]) -> None:
        if pair not in self.study.dense_runs:
            self._time(Variant(DENSE, "dense"), pair)

    def _time(self, variant: Variant, pair: tuple[int, int]) -> None:
        """Time one run; where it has to be compiled first, after one that is not timed."""
        if variant.name not in self.study.rows:
            if is_compiled(self.study.pipe):
                self.study.warm_up(variant, *pair)
            self.study.rows[variant.name] = self.study.new_row(variant)
        self.study.time(variant, *pair)

    def _probe(self, arm: Arm) -> None:
        from accelplug.tuning.forecast import Probe

        assert self.forecast is not None
        trajectory, pipe = self.forecast.trajectory, self.study.pipe

        def measure() -> dict[str, Any]:
            probe = trajectory.probe(pipe, Candidate(arm).rules())
            errors = {str(step): error for step, error in probe.errors.items()}
            return {"errors": errors, "ratio": probe.ratio, "density": probe.density}

        found = self.journal.get(f"probe {arm}", measure)
        self.forecast.probes[arm] = Probe(
            {int(s): e for s, e in found["errors"].items()}, found["ratio"], found.get("density")
        )

    def _probe_layers(self) -> None:
        """Share of the squared error that each layer makes, by a bold arm on that layer alone, at one moment."""
        assert self.forecast is not None
        trajectory, layers = self.forecast.trajectory, self.forecast.trajectory.layers
        calls = layers * 2 * trajectory.moments[0].ms / 1e3
        if not self.forecast.probes or self.spent_s + calls > PROBE_SHARE * self.time_budget_s:
            return
        arm = max(self.forecast.probes, key=lambda arm: self.forecast.probes[arm].error(0))  # type: ignore[union-attr]
        moment = trajectory.moments[len(trajectory.moments) // 2]

        def measure() -> list[float]:
            squares = []
            for layer in range(layers):
                self.tell(f"probing layer {layer}", self.spent_s)
                only = {"rules": [{"where": {"layers": layer}, "patch": arm.patch, "with": dict(arm.settings)}]}
                squares.append(trajectory.probe(self.study.pipe, only, [moment]).errors[moment.step] ** 2)
            return squares

        squares = self.journal.get(f"layers {arm}", measure)
        self.forecast.layer_share = {layer: square / (sum(squares) or 1.0) for layer, square in enumerate(squares)}

    def _run_caches(self) -> None:
        """Caches alone, on one whole run each: what one saves, it also saves beside a patch. Bolder than one that fails is worse."""
        assert self.forecast is not None
        until = self.spent_s + CACHE_SHARE * (self.time_budget_s - self.spent_s)
        failed: set[str] = set()
        for rung in itertools.zip_longest(*self.ladders):  # one of each kind before the second of any
            for cache in rung:
                if cache is None or (ladder := cache.ladder) in failed:
                    continue
                if self.spent_s > until or not self._affords(self.seen[:1]):
                    return
                self._run(candidate := Candidate(None, cache=cache), self.seen[:1])
                self.forecast.cache_ratio[cache] = 1 / self.points[candidate].speedup
                failed |= {ladder} if self.points[candidate].margin < 0 else set()

    def _run(self, candidate: Candidate, pairs: Sequence[tuple[int, int]]) -> None:
        """Run a candidate whole on some prompts and seeds, dense beside it, and learn from it."""
        assert self.forecast is not None
        name = str(candidate)
        recipe = load(candidate.rules(), model_facts(self.study.pipe))
        variant = Variant(name, "cache" if candidate.arm is None else "recipe", recipe)
        point = self.points.get(candidate) or Point(
            name, candidate.rules(), 0, 0.0, {}, math.inf, foretold=self._foretold(candidate)
        )
        for pair in pairs:
            self.tell(f"{name}, seed {pair[1]}; best so far {self._best()}", self.spent_s)
            self._dense(pair)
            self._time(variant, pair)
            clips = self.study.clips[DENSE, *pair], self.study.clips[name, *pair]
            values = {bound.name: bound.value(self.study.rows[name].samples[-1], *clips) for bound in self.bounds}
            point.add(pair, values, self.bounds)
        row, dense = self.study.rows[name], {(s.prompt, s.seed): s.latency_ms for s in self.study.rows[DENSE].samples}
        point.speedup = float(np.median([dense[s.prompt, s.seed] / s.latency_ms for s in row.samples]))
        self.points[candidate] = point
        self.forecast.runs = [(c, p.worst, p.speedup) for c, p in self.points.items()]

    def _foretold(self, candidate: Candidate) -> dict[str, float | None]:
        assert self.forecast is not None
        known = candidate.cache is None or candidate.cache in self.forecast.cache_ratio
        speedup = self.forecast.dense_ms / self.forecast.latency_ms(candidate) if known else None
        return {
            "margin": self.forecast.margin(candidate),
            "speedup": speedup,
            "density": self.forecast.density(candidate),
        }

    # ------------------------------------------------------------------------------------------------- choosing

    def _holding(self) -> list[Candidate]:
        """Candidates within the budget so far, the fastest first."""
        held = [(c, p) for c, p in self.points.items() if p.margin >= 0 and p.verdict == "tried"]
        return [candidate for candidate, _ in sorted(held, key=lambda item: -item[1].speedup)]

    def _best(self) -> str:
        held = self._holding()
        return f"{self.points[held[0]].speedup:.2f}x" if held else "dense"

    def _next(self) -> Candidate | None:
        """The fastest that promises to hold, with or without the cache that held best; None if none could be the best."""
        assert self.forecast is not None
        forecast = self.forecast
        fastest = max((self.points[c].speedup for c in self._holding()), default=WORTH)
        pool = list(self.candidates)
        for base in [c for c in self._holding() if c.arm is not None and c.cache is None][:2]:
            pool += cached(base, [c.cache for c in self._holding() if c.arm is None and c.cache is not None])
        open_ = [c for c in pool if c not in self.points and forecast.dense_ms / forecast.latency_ms(c) > fastest]
        if not open_:
            return None
        margins = {candidate: forecast.margin(candidate) for candidate in open_}
        promising = [c for c in open_ if (m := margins[c]) is not None and m >= 0]
        if promising:
            return min(promising, key=forecast.latency_ms)
        unknown = [c for c in open_ if margins[c] is None]
        if unknown:  # nothing was run yet: one in the middle teaches most
            spoils = sorted(unknown, key=lambda c: forecast.spoil(c, 2.0))
            return spoils[len(spoils) // 3]
        closest = max(open_, key=lambda c: margins[c] or 0.0)
        # A forecast is off by some decibels: what misses by less than that is worth a run while there is time.
        scale = max(abs(bound.limit) for bound in self.bounds)
        return closest if (margins[closest] or 0.0) > -0.1 * scale else None


@contextmanager
def room_to_compile(pipe: Any) -> Iterator[None]:
    """Let a compiled denoiser have a graph for each candidate: Dynamo gives a function up after 8. They are dropped at the end."""
    if not is_compiled(pipe):
        yield
        return
    with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=64 * GRAPHS):
        try:
            yield
        finally:
            torch._dynamo.reset()


@contextmanager
def _bar(show: bool, seconds: float) -> Iterator[Callable[[str, float], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), disable=not show, transient=True
    ) as bar:
        task = bar.add_task("tuning", total=seconds)
        yield lambda what, spent: bar.update(task, description=what, completed=min(spent, seconds))


__all__ = ["Recipe", "tune"]
