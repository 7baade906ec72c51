"""Whole runs of a search, by one process or by several that were launched together: the first decides, all run a share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelplug.comparison.floors import Floors
from accelplug.comparison.ranks import Ranks
from accelplug.comparison.rows import DENSE_ROW, Pair, Sample, Variant
from accelplug.comparison.study import Study
from accelplug.errors import AccelplugError
from accelplug.hosts.host import model_facts
from accelplug.hosts.models import runs_compiled
from accelplug.recipe import load
from accelplug.tuning.budget import Bound


@dataclass(frozen=True)
class Job:
    """What the first process wants run: a variant on some pairs, dense where it was not run yet, or everywhere once more."""

    pairs: tuple[Pair, ...]
    variant: str = DENSE_ROW
    kind: str = "dense"
    rules: Any = None
    again: bool = False


@dataclass
class Result:
    """What a process did of a job."""

    samples: list[tuple[str, Sample]] = field(default_factory=list)
    values: dict[Pair, dict[str, float]] = field(default_factory=dict)
    clips: dict[tuple[str, int, int], Any] = field(default_factory=dict)
    error: str = ""


@dataclass
class Workers:
    """The processes of a search. Dense and candidate of a prompt and seed are always timed in the same one.

    Attributes
    ----------
    study : the runs of this process; in the first one, of all.
    bounds : of the budget, which each process scores its runs on.
    pairs : all prompts and seeds, in the order in which they are dealt out.
    """

    study: Study
    bounds: Sequence[Bound]
    pairs: Sequence[Pair]
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        self.floors = Floors(run=lambda *asked: self.study.floor(*asked))

    def run(self, job: Job) -> dict[Pair, dict[str, float]]:
        """Have a job run, in the first process; return what each bound's metric says of the variant, by pair."""
        return self._do(self.ranks.agreed(job))

    def follow(self) -> Any:
        """Run one's share of all jobs, in a later process; return what `stop` was given.

        Raises
        ------
        AccelplugError
            If the first process failed.
        """
        while isinstance(job := self.ranks.agreed(None), Job):
            with contextlib.suppress(Exception):  # the first process is told of it, and stops all
                self._do(job)
        if isinstance(job, AccelplugError):
            raise job
        return job

    def stop(self, result: Any) -> None:
        """Tell the others, in the first process, that nothing is to be run any more; an `AccelplugError` is raised in them."""
        self.ranks.agreed(result)

    def _do(self, job: Job) -> dict[Pair, dict[str, float]]:
        done, failed, variants = Result(), None, self._variants(job)
        try:
            self._run(job, variants, done)
        except BaseException as error:
            failed, done.error = error, f"{type(error).__name__}: {error}"
        own, *others = self.ranks.to_first(done)
        if failed is not None:
            raise failed
        for share in others:
            if share.error:
                raise AccelplugError(f"{job.variant} failed in another process: {share.error}")
            for name, sample in share.samples:
                self._row(variants[name]).samples.append(sample)
            self.study.clips |= share.clips
        return {pair: values for share in (own, *others) for pair, values in share.values.items()}

    def _variants(self, job: Job) -> dict[str, Variant]:
        recipe = None if job.rules is None else load(job.rules, model_facts(self.study.pipe))
        return {DENSE_ROW: Variant(DENSE_ROW, kind="dense"), job.variant: Variant(job.variant, recipe, job.kind)}

    def _run(self, job: Job, variants: dict[str, Variant], done: Result) -> None:
        for pair in job.pairs:
            if self.pairs.index(pair) % self.ranks.parts != self.ranks.rank:
                continue
            if job.again or pair not in self.study.dense_runs:
                self._time(variants[DENSE_ROW], pair, done)
            if job.variant != DENSE_ROW:
                self._time(variants[job.variant], pair, done)
                clips = self.study.clips[DENSE_ROW, *pair], self.study.clips[job.variant, *pair]
                sample = self.study.rows[job.variant].samples[-1]
                done.values[pair] = {bound.figure: bound.value(sample, *clips, self.floors) for bound in self.bounds}

    def _time(self, variant: Variant, pair: Pair, done: Result) -> None:
        """Time one run; where it has to be compiled first, after one that is not timed."""
        if variant.name not in self.study.rows and runs_compiled(self.study.pipe):
            self.study.warm_up(variant, *pair)
        row = self._row(variant)
        self.study.time(variant, *pair)
        done.samples.append((variant.name, row.samples[-1]))
        done.clips[variant.name, *pair] = self.study.clips[variant.name, *pair]

    def _row(self, variant: Variant) -> Any:
        return self.study.rows.setdefault(variant.name, self.study.new_row(variant))
