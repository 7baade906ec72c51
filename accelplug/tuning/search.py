"""The search for the fastest recipe within a quality budget, and its proof on runs that the search never saw."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from accelplug.comparison.journal import Journal, adapters
from accelplug.comparison.ranks import Ranks
from accelplug.comparison.rows import DENSE_ROW, Pair, gains
from accelplug.comparison.study import OBSERVED, Study
from accelplug.errors import AccelplugError
from accelplug.hosts.host import model_facts
from accelplug.hosts.models import denoisers
from accelplug.recipe import Measured, Recipe, load, presets
from accelplug.show import Tell
from accelplug.tuning.budget import Bound
from accelplug.tuning.caches import Cache, CacheFacts, fitting
from accelplug.tuning.prediction import Predictor, Trajectory
from accelplug.tuning.probing import Prober, no_8_bits, no_weights, pools
from accelplug.tuning.result import Point, Tuned
from accelplug.tuning.space import FINALISTS, WORTH, Arm, Candidate, arms, cached, variants
from accelplug.tuning.verdict import limit, why
from accelplug.tuning.workers import Job, Workers

logger = logging.getLogger("accelplug")

PROBE_SHARE = 0.35
"""Share of the time that probing may take."""
BESIDE = 2
"""Step caches that patches are tried beside, the fastest that hold alone."""
CACHE_SHARE = 0.25
"""Share of what is left then that runs of step caches alone may take."""


@dataclass
class Search:
    """A search under way."""

    study: Study
    bounds: tuple[Bound, ...]
    seen: list[tuple[int, int]]
    unseen: list[tuple[int, int]]
    time_budget_s: float
    journal: Journal
    ranks: Ranks = field(default_factory=Ranks)
    tell: Tell = lambda done, now="": None
    started: float = field(default_factory=lambda: time.monotonic())
    predictor: Predictor | None = None
    candidates: list[Candidate] = field(default_factory=list)
    points: dict[Candidate, Point] = field(default_factory=dict)
    scores: dict[Candidate, dict[Pair, dict[str, float]]] = field(default_factory=dict)
    """What each bound's metric says of each run."""
    ladders: list[list[Cache]] = field(default_factory=list)
    presets: list[Recipe] = field(default_factory=list)
    """Shipped recipes that are tried as they stand."""
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    lost: float = 0.0
    """The most that a finalist's margin fell where the search never looked."""
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.workers = Workers(self.study, self.bounds, [*self.seen, *self.unseen], self.ranks)

    @property
    def first(self) -> list[Pair]:
        """What a candidate is run on first: a prompt and seed for each process."""
        return self.seen[: self.ranks.parts]

    # ---------------------------------------------------------------------------------------------------- time

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def budget(self) -> str:
        """The bounds in words."""
        return ", ".join(map(str, self.bounds))

    @property
    def run_s(self) -> float:
        """Seconds of a dense run."""
        return self.study.rows[DENSE_ROW].latency.p50 / 1e3

    def _affords(self, pairs: Sequence[tuple[int, int]]) -> bool:
        """Whether time is left to run a candidate there, dense runs included, and for the proof of one recipe."""
        known = {(sample.prompt, sample.seed) for sample in self.study.rows[DENSE_ROW].samples}
        runs = len(pairs) + sum(pair not in known for pair in pairs) + 2 * len(self.unseen)
        return self.spent_s + math.ceil(runs / self.ranks.parts) * self.run_s < self.time_budget_s

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
            if self.predictor is None:
                raise  # nothing is known yet
            self.interrupted = True
            logger.warning("tune: interrupted; the best so far is proven now. Interrupt again to stop at once.")
        try:
            self.prove()
        except KeyboardInterrupt:
            self.interrupted = True
            logger.warning("tune: interrupted; what is not proven yet is not recommended.")

    def prepare(self, patches: Sequence[str] | None, caches: bool) -> None:
        """Run dense, record its snapshots, see which caches fit, and probe all arms on the snapshots, then layers."""
        with self._phase("dense"):
            self.tell(self.spent_s, "dense run")
            trajectory = Trajectory.record(self.study, *self.seen[0])
            self.workers.run(Job(tuple(self.first)))
        if not trajectory.layouts or not trajectory.snapshots:
            raise AccelplugError(
                f"{type(self.study.pipe).__name__} has no self-attention on a known token grid: nothing to tune. "
                "`accelplug inspect` says what is known of the model."
            )
        sample = self.study.rows[DENSE_ROW].samples[0]
        self.predictor = Predictor(trajectory, self.bounds, sample.denoise_ms, sample.latency_ms - sample.denoise_ms)
        self._note(limit(self.predictor))
        if caches:
            seen = CacheFacts(trajectory.steps, trajectory.contexts, trajectory.magnitudes)
            self.ladders, why_not = fitting(denoisers(self.study.pipe), seen)
            self._note(*why_not)
        shipped = presets(model_facts(self.study.pipe))
        self.presets = [
            recipe if caches else replace(recipe, cache=None)
            for recipe in shipped
            if patches is None or {entry.name for entry in recipe.patches()} <= set(patches)
        ]
        with self._phase("probing"):
            self._probe(arms(trajectory.layout, patches))
        probes = self.predictor.probes
        # What reads everything here, or changes no snapshot, is dense, whatever the clock said; kernels differ by rounding.
        sparse = [arm for arm in self.predictor.front() if probes[arm].density != 1 and any(probes[arm].errors.values())]
        paying = [arm for arm in sparse if probes[arm].ratio < 1 / WORTH]
        self.candidates = [candidate for arm in paying for candidate in self._variants(arm)]

    def explore(self) -> None:
        """Run the most promising candidate whole, learn, and go on until time is up or nothing faster can hold."""
        with self._phase("whole runs"):
            self._run_caches()
            self._run_presets()
            self._climb()
            if self._weigh():
                self._climb()
            self._halve()

    def prove(self) -> None:
        """Prove the fastest that holds, and go on while there is time: among what is slower where it fails, else among what is faster."""
        self._prove()
        while not self.interrupted and self._affords(()):
            with self._phase("whole runs"):
                self._climb()
                self._halve()
            if not self._finalists():
                break
            self._prove()

    def _climb(self) -> None:
        while self._affords(self.first) and (candidate := self._next()) is not None:
            self._run(candidate, self.first)

    def _weigh(self) -> bool:
        """Calibrate the pooled blocks of the arm that is faster than all that hold and misses the budget by least."""
        assert self.predictor is not None
        predictor = self.predictor
        fastest = max((self.points[c].speedup for c in self._holding()), default=WORTH)
        bare = [c for c in self.candidates if c.arm and pools(c.arm) and not (c.dense_steps or c.dense_layers)]
        faster = [c for c in bare if predictor.dense_ms / predictor.latency_ms(c) > fastest]
        # The calibration is a dense run in which a part of the calls is tried at a dozen weights.
        if not faster or not self._affords(self.first * 4):
            return False
        if why_not := no_weights(self.study.pipe):
            self._note(why_not)
            return False
        best = min(faster, key=lambda candidate: predictor.predicted_error(candidate, 2.0))
        assert best.arm is not None
        prompt, seed = self.seen[0]
        arm = self._prober.weighted(best.arm, self.study.prompts[prompt], seed)
        self.candidates += self._variants(arm) if arm is not None else []
        return arm is not None

    def _halve(self) -> None:
        """Successive halving: the fastest that hold, on as many pairs again as they have seen; half of them go on."""
        survivors, seen = self._holding()[: 2 * FINALISTS], len(self.first)
        while survivors and seen < len(self.seen):
            pairs = self.seen[seen : 2 * seen]
            for candidate in survivors:
                if self.points[candidate].runs <= seen and self._affords(pairs):
                    self._run(candidate, pairs)
            seen += len(pairs)
            survivors = [candidate for candidate in self._holding() if candidate in survivors]
            survivors = survivors[: (len(survivors) + 1) // 2]

    def _prove(self) -> None:
        """Run the fastest that holds where the search never looked; if it fails there, the next.

        What a finalist lost there the others may lose too: the fastest that has as much to lose comes next, else the safest.
        Once one is proven, what is faster has its turn, the safest first, while there is time.
        """
        with self._phase("proof"):
            for _ in range(FINALISTS):
                held, proven = self._finalists(), self._proven
                if not held or (proven and not self._affords(())):
                    break
                safest = max(held, key=lambda c: self.points[c].margin)
                enough = [c for c in held if self.points[c].margin > self.lost]
                candidate = enough[0] if enough and not proven else safest
                point, margin = self.points[candidate], self.points[candidate].margin
                self._run(candidate, self.unseen)
                self._tell_of_the_proof(candidate)
                point.verdict = "proven" if point.margin >= 0 else "overturned"
                self.lost = max(self.lost, margin - point.margin)

    def _tell_of_the_proof(self, candidate: Candidate) -> None:
        """Where a prompt was held out, report a finalist on that prompt only: a `measured` row then names runs that `verify` can repeat."""
        if {prompt for prompt, _ in self.seen} & {prompt for prompt, _ in self.unseen}:
            return
        row, point = self.study.rows[self.points[candidate].name], self.points[candidate]
        row.samples = [sample for sample in row.samples if (sample.prompt, sample.seed) in self.unseen]
        point.runs, point.worst, point.worst_run = 0, {}, None
        for pair in self.unseen:
            point.add(pair, self.scores[candidate][pair], self.bounds)
        self._compare_times()

    def result(self) -> Tuned:
        """Put the recipe, its measurement and the front together."""
        points = sorted(self.points.values(), key=lambda p: -p.speedup)
        for point in points:  # what holds, and gains nothing where the search never looked, is not the recipe
            if point.verdict == "proven" and point.speedup < WORTH:
                point.verdict = "tried"
        proven = self._proven
        mapping = proven.rules() if proven is not None else OBSERVED
        facts = model_facts(self.study.pipe)
        recipe = load(mapping, facts)
        # An interrupt leaves rows that are empty.
        self.study.rows = {name: row for name, row in self.study.rows.items() if row.samples}
        comparison = self.study.finish({})
        if idle := [point.name for point in points if comparison.row(point.name).is_dense]:
            self._note(f"Dense to the last bit, whatever was measured: {', '.join(idle)}.")
        measured: tuple[Measured, ...] = ()
        if proven is not None:
            row = comparison.measured(comparison.row(self.points[proven].name))
            checked = [bound for bound in self.bounds if bound.checkable]
            measured = (Measured.model_validate({**row, "budget": ", ".join(map(str, checked)) or None}),)
        fields = {name: getattr(recipe, name) for name in ("rules", "cache", "match", "source", "loc")}
        said = why(
            self.budget,
            points,
            self.points[proven] if proven is not None else None,
            self.predictor,
            proposed=bool(self.candidates),
            interrupted=self.interrupted,
            time_budget_s=self.time_budget_s,
            run_s=self.run_s,
        )
        comparison.headline = said
        if found := adapters(self.study.pipe):
            named = ", ".join(f"{name} ({factor})" for name, factor in found.items())
            self._note(f"Tuned with the LoRA adapters {named}; for others tune again.")
        return Tuned(
            name="tuned",
            model="tuned",
            summary=". ".join(text.rstrip(".") for text in (said, *(note for note in self.notes if "LoRA" in note))),
            measured=measured,
            why=said,
            bounds=self.bounds,
            points=tuple(points),
            notes=tuple(self.notes),
            comparison=comparison,
            seconds={**self.seconds, "all": round(self.spent_s, 1)},
            facts=facts,
            **fields,
        )

    def _note(self, *texts: str) -> None:
        """Say once what the user should know of the search."""
        for text in texts:
            if text not in self.notes:
                self.notes.append(text)
                logger.info("tune: %s", text)

    # ------------------------------------------------------------------------------------------------ measuring

    @property
    def _prober(self) -> Prober:
        assert self.predictor is not None
        return Prober(self.predictor, self.study.pipe, self.journal, lambda what: self.tell(self.spent_s, what))

    def _probe(self, found: Sequence[Arm]) -> None:
        """Measure arms while there is time for it, what none beats also repaired, the fastest also with q.k in 8 bits, then layers."""
        assert self.predictor is not None
        prober, predictor, until = self._prober, self.predictor, PROBE_SHARE * self.time_budget_s
        by_layer_s = 2 * predictor.trajectory.layers * predictor.trajectory.snapshots[0].ms / 1e3
        half, rest = (self.spent_s + until - by_layer_s) / 2, until - by_layer_s
        for measure, those, end in ((prober.arm, lambda: found, half), (prober.arm_repaired, predictor.front, rest)):
            for arm in those():
                if self.spent_s > end:
                    break
                try:
                    measure(arm)
                except AccelplugError as error:
                    self._note(f"Not tried, {arm}: {error}")
        if self.spent_s > until or not predictor.probes:
            return
        if why_not := no_8_bits(predictor.trajectory.snapshots[0].output.device):
            self._note(why_not)
        else:
            for arm in sorted(predictor.probes, key=lambda arm: predictor.probes[arm].ratio)[:2]:
                prober.arm_in_8_bits(arm)
        if self.spent_s + by_layer_s < until:
            prober.layers()

    def _variants(self, arm: Arm) -> Iterator[Candidate]:
        assert self.predictor is not None
        share = self.predictor.layer_share
        return variants(arm, sorted(share, key=lambda layer: -share[layer]), self.predictor.trajectory.steps)

    def _run_caches(self) -> None:
        """Caches alone, on one whole run each: what one saves, it also saves beside a patch. Bolder than one that fails is worse."""
        assert self.predictor is not None
        until = self.spent_s + CACHE_SHARE * (self.time_budget_s - self.spent_s)
        failed: set[str] = set()
        for rung in itertools.zip_longest(*self.ladders):  # one of each kind before the second of any
            for cache in rung:
                if cache is None or (ladder := cache.ladder) in failed:
                    continue
                if self.spent_s > until or not self._affords(self.first):
                    return
                self._run(candidate := Candidate(None, cache=cache), self.first)
                failed |= {ladder} if self.points[candidate].margin < 0 else set()

    def _run_presets(self) -> None:
        """Shipped recipes that are for every denoiser, on one whole run each."""
        for preset in self.presets:
            if self._affords(self.first):
                self._run(Candidate(None, preset=preset), self.first)

    def _run(self, candidate: Candidate, pairs: Sequence[tuple[int, int]]) -> None:
        """Run a candidate whole on some prompts and seeds, dense beside it, and learn from it."""
        assert self.predictor is not None
        name, kind = str(candidate), "recipe" if candidate.arm or candidate.preset else "cache"
        point = self.points.get(candidate) or Point(
            name, candidate.rules(), 0, 0.0, {}, math.inf, predicted=self._predicted(candidate)
        )
        self.tell(self.spent_s, f"{name}, seeds {', '.join(str(seed) for _, seed in pairs)}; best so far {self._best()}")
        scores = self.workers.run(Job(tuple(pairs), name, kind, candidate.rules()))
        for pair, values in scores.items():
            point.add(pair, values, self.bounds)
        self.scores.setdefault(candidate, {}).update(scores)
        self.points[candidate] = point
        self._compare_times()
        if candidate in self._holding()[:1] and point.speedup > 1:
            # A new best: a dense run that something held up would flatter it.
            self.tell(self.spent_s, f"dense once more, beside {name}")
            self.workers.run(Job(tuple(pairs[-self.ranks.parts :]), again=True))
            self._compare_times()

    def _compare_times(self) -> None:
        """Hold every run against the fastest dense run at the same prompt and seed: what else a machine does only slows down."""
        assert self.predictor is not None
        rows = self.study.rows
        for point in self.points.values():
            point.speedup = float(np.median(gains(rows[DENSE_ROW], rows[point.name])))
        fastest = min(rows[DENSE_ROW].samples, key=lambda sample: sample.latency_ms)
        self.predictor.denoise_ms, self.predictor.other_ms = fastest.denoise_ms, fastest.latency_ms - fastest.denoise_ms
        self.predictor.runs = [(c, p.worst, p.speedup) for c, p in self.points.items()]
        self.predictor.cache_ratio = {c.cache: 1 / p.speedup for c, p in self.points.items() if c.arm is c.preset is None}

    def _predicted(self, candidate: Candidate) -> dict[str, float | None]:
        assert self.predictor is not None
        if candidate.preset is not None:
            return {}
        known = candidate.cache is None or candidate.cache in self.predictor.cache_ratio
        speedup = self.predictor.dense_ms / self.predictor.latency_ms(candidate) if known else None
        return {
            "margin": self.predictor.margin(candidate),
            "speedup": speedup,
            "density": self.predictor.density(candidate),
            "estimate": self.predictor.probes[candidate.arm].estimate if candidate.arm else None,
        }

    # ------------------------------------------------------------------------------------------------- choosing

    def _holding(self) -> list[Candidate]:
        """Candidates within the budget so far, the fastest first."""
        held = [(c, p) for c, p in self.points.items() if p.margin >= 0 and p.verdict == "tried"]
        return [candidate for candidate, _ in sorted(held, key=lambda item: -item[1].speedup)]

    @property
    def _proven(self) -> Candidate | None:
        """The fastest that is proven and worth it."""
        proven = [c for c, p in self.points.items() if p.verdict == "proven" and p.speedup >= WORTH]
        return max(proven, key=lambda c: self.points[c].speedup, default=None)

    def _finalists(self) -> list[Candidate]:
        """What holds, is worth it and not slower than what is proven, the fastest first."""
        bar = self.points[self._proven].speedup if self._proven else WORTH
        return [candidate for candidate in self._holding() if self.points[candidate].speedup >= bar]

    def _best(self) -> str:
        held = self._holding()
        return f"{self.points[held[0]].speedup:.2f}x" if held else "dense"

    def _next(self) -> Candidate | None:
        """The fastest that promises to hold, alone or beside a cache that holds alone; None if none could be the best."""
        assert self.predictor is not None
        predictor = self.predictor
        held = sorted({*self._holding(), *filter(None, [self._proven])}, key=lambda c: -self.points[c].speedup)
        fastest = max((self.points[c].speedup for c in held), default=WORTH)
        caches = [c.cache for c in held if c.arm is None and c.cache is not None and self.points[c].speedup > WORTH]
        pool = [candidate for bare in self.candidates for candidate in (bare, *cached(bare, caches[:BESIDE]))]
        open_ = [c for c in pool if c not in self.points and predictor.dense_ms / predictor.latency_ms(c) > fastest]
        if not open_:
            return None
        margins = {candidate: predictor.margin(candidate) for candidate in open_}
        promising = [c for c in open_ if (m := margins[c]) is not None and m >= 0]
        if promising:
            return min(promising, key=predictor.latency_ms)
        if all(margin is None for margin in margins.values()):  # nothing was run yet: one in the middle, alone, teaches most
            bare = [candidate for candidate in self.candidates if candidate not in self.points]
            by_error = sorted(bare, key=lambda c: predictor.predicted_error(c, 2.0))
            return by_error[len(by_error) // 3] if bare else None
        closest = max(open_, key=lambda c: margins[c] or 0.0)
        # A prediction is off by some decibels: what misses by less than that is worth a run while there is time.
        scale = max(abs(bound.limit) for bound in self.bounds)
        return closest if (margins[closest] or 0.0) > -0.1 * scale else None
