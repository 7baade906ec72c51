"""Running a comparison: dense, recipes, caches and floors, interleaved in one process."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from accelplug import compat
from accelplug.comparison import arguments, calling
from accelplug.comparison.arms import changed, require_same, source_of
from accelplug.comparison.environment import environment, forget_peak, peak_mib
from accelplug.comparison.floors import FLOORS, NO_FLOOR, Floor, other_seed
from accelplug.comparison.metrics import METRICS, Beside, to_uint8
from accelplug.comparison.ranks import Ranks
from accelplug.comparison.result import Comparison
from accelplug.comparison.resume import Finished, Ran
from accelplug.comparison.rows import DENSE_ROW, Pair, Row, Sample, Variant, by_layer_and_step
from accelplug.errors import AccelplugError
from accelplug.hosts.clips import clip_of
from accelplug.hosts.forecast import amdahl, overall_gain
from accelplug.hosts.ledger import Event
from accelplug.hosts.models import denoisers, runs_compiled
from accelplug.plug import apply
from accelplug.recipe import Recipe, record_measurement

OBSERVED = {"rules": [{"patch": "dense"}]}
DRAWN_LAYERS = 4
Turn = tuple[str, Callable[[], Any]]
"""What is run next, and its name."""


@dataclass
class PipelineRun:
    """One call of the pipeline."""

    clip: np.ndarray
    latents: torch.Tensor | None
    latency_ms: float
    denoise_ms: float
    step_ms: list[float]


@dataclass
class Study:
    """The runs of one comparison."""

    pipe: Any
    prompts: list[dict[str, Any]]
    seeds: list[int]
    foreground: Callable[[np.ndarray], np.ndarray] | None
    detect: Callable[[np.ndarray, str], float] | None
    rows: dict[str, Row] = field(default_factory=dict)
    dense_runs: dict[tuple[int, int], PipelineRun] = field(default_factory=dict)
    clips: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict)

    processes: int = 1
    stock: list[np.ndarray] = field(default_factory=list)
    """Clips of two dense runs ahead of all functions, where arms are such."""
    finished: Finished = field(default_factory=Finished)
    cold: set[str] = field(default_factory=set)
    """Variants that were traced otherwise than they are timed, or by a comparison that was killed: a run warms them up first."""

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs; its weights may wait elsewhere."""
        weights = next(next(iter(denoisers(self.pipe).values())).parameters())
        return compat.diffusers.execution_device(self.pipe, weights.device)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Prompts by seeds: what each variant is run on."""
        return list(itertools.product(range(len(self.prompts)), self.seeds))

    @staticmethod
    def new_row(variant: Variant) -> Row:
        """An empty row of the table."""
        if variant.change is not None:
            return Row(variant.name, variant.kind, rules=source_of(variant.change))
        if variant.recipe is None:
            return Row(variant.name, variant.kind)
        _, rules = replace(variant.recipe, measured=()).describe().split("\n", 1)
        return Row(variant.name, variant.kind, variant.recipe.name, textwrap.dedent(rules))

    def jobs(self, variants: Sequence[Variant], pairs: Sequence[Pair], floors: int) -> list[Turn]:
        """Return what is to be run, in order, each with its name: traces, then prompt by prompt all variants by turns, and floors.

        `pairs`: what is run here; `floors`: on how many prompts, the first ones, floors are run.
        """
        jobs: list[Turn] = [(f"tracing {variant.name}", partial(self.trace, variant)) for variant in variants]
        first = self.seeds[0]
        for prompt in dict.fromkeys(prompt for prompt, _ in pairs):
            here = f"prompt {prompt + 1} of {len(self.prompts)}, " if len(self.prompts) > 1 else ""
            for (at, seed), variant in itertools.product(pairs, variants):
                if at == prompt:
                    jobs.append((f"timing {variant.name}, {here}seed {seed}", partial(self.time, variant, prompt, seed)))
            if prompt < floors and (prompt, first) in pairs:
                for floor in FLOORS.values():
                    jobs.append((f"floor: {floor.row}, {here}seed {first}", partial(self.floor, floor, prompt, first)))
            jobs.append((jobs[-1][0], partial(self.forget, prompt)))  # takes no time, and is not worth a name
        return jobs

    def trace(self, variant: Variant) -> None:
        """Run once, observing every attention call; this is also the warm-up."""
        row = self.rows[variant.name] = self.new_row(variant)
        if (kept := self.finished.traced(row)) is not None:
            self.rows[variant.name] = kept
            self.cold.add(variant.name)
            return
        self._trace(variant, row)
        self.finished.keep_traced(row)
        if runs_compiled(self.pipe):  # its graphs are not those of a run that is timed
            self.cold.add(variant.name)

    def _trace(self, variant: Variant, row: Row) -> None:
        if variant.change is not None:
            self._try_out(variant)
            return
        with self._on(variant, gate="report") as plug, plug.trace(timed=True, plans=True) as events:
            self.run(0, self.seeds[0])
        row.attention_ms = sum(event.ms or 0.0 for event in events)
        row.density = by_layer_and_step([(event.site, event.clock, event.density) for event in events], statistics.fmean)
        row.plans = _drawn(events)
        row.choices = plug.choices
        row.forward_predicted = overall_gain(plug.forecasts, "forward_gain", "sparse_steps")
        row.denoising_predicted = overall_gain(plug.forecasts, "run_gain", "steps")
        report = plug.report()
        if events and variant.recipe is not None and variant.recipe.cache is None:
            row.answered = report.answered
        if variant.recipe is not None and variant.recipe.patches():
            row.notes = report.left_dense

    def _try_out(self, variant: Variant) -> None:
        """Run a function's arm once, and see whether its undo gives the stock pipeline back."""
        if not self.stock:
            self.stock = [self.run(0, self.seeds[0]).clip for _ in range(2)]
        self.warm_up(variant, 0, self.seeds[0])
        require_same(variant.name, self.stock, lambda: self.run(0, self.seeds[0]).clip)

    def warm_up(self, variant: Variant, prompt: int, seed: int) -> None:
        """Run once, as `time` does, and drop it: what is compiled is compiled then."""
        with self._on(variant, gate="off"):
            self.run(prompt, seed)

    def time(self, variant: Variant, prompt: int, seed: int) -> None:
        """Run once, timed, and hold the result against the dense run; what an earlier comparison has finished is taken as it is."""
        row = self.rows[variant.name]
        ran = self.finished.ran(variant.name, self.prompts[prompt], prompt, seed) or self._timed(variant, prompt, seed)
        row.add_errors(ran.errors)
        row.peak_mib = max(filter(None, (row.peak_mib, ran.peak_mib)), default=None)
        row.samples.append(ran.sample)
        if ran.clip is not None:
            self.clips[variant.name, prompt, seed] = ran.clip

    def _timed(self, variant: Variant, prompt: int, seed: int) -> Ran:
        if variant.name in self.cold:
            self.cold.discard(variant.name)
            self.warm_up(variant, prompt, seed)
        device, errors = self.device, []
        with self._on(variant, gate="off") as plug:
            known = forget_peak(device)
            run = self.run(prompt, seed)
            peak = peak_mib(device) if known else None
            if plug is not None:
                errors = by_layer_and_step([(said.site, said.clock, said.error) for said in plug.estimates], max)
        if variant.name == DENSE_ROW:
            self.dense_runs[prompt, seed] = run
        ran = Ran(self.sample(run, prompt, seed, variant.name == DENSE_ROW), errors, peak, to_uint8(run.clip))
        self.finished.keep(variant.name, self.prompts[prompt], seed, ran)
        return ran

    def dense(self, prompt: int, seed: int) -> PipelineRun:
        """Return the dense run of a prompt and seed; where it was timed by a comparison that was killed, it is made again."""
        if (prompt, seed) not in self.dense_runs:
            self.dense_runs[prompt, seed] = self.run(prompt, seed)
        return self.dense_runs[prompt, seed]

    def floor(self, floor: Floor, prompt: int, seed: int) -> Sample:
        """Run dense as a floor has it, and hold it against the dense run of a prompt and seed."""
        row = self.rows.setdefault(floor.row, Row(floor.row, "floor"))
        call = self.prompts[prompt]
        if (kept := self.finished.ran(floor.row, call, prompt, seed)) is not None:
            sample = kept.sample
        else:
            other = other_seed(self.seeds, seed) if floor.reseeded else seed
            known = self.dense_runs.get((prompt, other)) if floor.reseeded else None
            with contextlib.nullcontext() if known else floor.on(self.pipe, self.device):
                run = known or self.run(prompt, other)
            sample = self.sample(run, prompt, seed, False)
            self.finished.keep(floor.row, call, seed, Ran(sample))
        if sample.scores.get("psnr_db") == math.inf and NO_FLOOR not in row.notes:
            row.notes.append(NO_FLOOR)
        row.samples.append(sample)
        return sample

    def forget(self, prompt: int) -> None:
        """Drop the dense runs of a prompt: nothing more is held against them."""
        self.dense_runs = {pair: run for pair, run in self.dense_runs.items() if pair[0] != prompt}

    def run(self, prompt: int, seed: int) -> PipelineRun:
        """Call the pipeline once."""
        given = {**self.prompts[prompt], "generator": torch.Generator("cpu").manual_seed(seed)}
        given.pop("output_type", None)
        with calling.marked(self.pipe, given, self.device) as marks:
            start = marks.now()
            with arguments.refusals(self.pipe, started=lambda: marks.begun is not None):
                clip, latents = clip_of(self.pipe, given)
            end = marks.now()
        last = latents if marks.latents is None else marks.latents
        return PipelineRun(clip, last, 1e3 * (end - start), sum(marks.step_ms), marks.step_ms)

    def sample(self, run: PipelineRun, prompt: int, seed: int, is_dense: bool) -> Sample:
        """Score a run against the dense run of the same prompt and seed."""
        dense = None if is_dense else self.dense(prompt, seed)
        beside = Beside(
            run.clip,
            dense.clip if dense else None,
            run.latents,
            dense.latents if dense else None,
            self.foreground,
            self.detect,
            self.prompts[prompt].get("prompt", ""),
        )
        found = {metric.key: metric.of(beside) for metric in METRICS.values()}
        scores = {key: value for key, value in found.items() if value is not None}
        return Sample(prompt, seed, run.latency_ms, run.denoise_ms, run.step_ms, scores)

    def gather(self, ranks: Ranks) -> None:
        """Put together what all processes measured: rows as the first one traced them, with the samples of all."""
        first, *others = ranks.gather(self.rows)
        for name, row in ((name, row) for rows in others for name, row in rows.items()):
            first[name].samples += row.samples
            first[name].add_errors(row.errors)
            first[name].peak_mib = max(filter(None, (first[name].peak_mib, row.peak_mib)), default=None)
        for row in first.values():
            row.samples.sort(key=lambda sample: self.pairs.index((sample.prompt, sample.seed)))
        self.rows, self.processes = first, ranks.parts
        self.clips = {key: clip for clips in ranks.to_first(self.clips) for key, clip in clips.items()}

    def finish(self, recipes: Mapping[str, Recipe]) -> Comparison:
        """Carry what was predicted for denoising over to whole runs, and put everything together."""
        dense = self.rows[DENSE_ROW]
        denoise_ms = float(np.median([sample.denoise_ms for sample in dense.samples]))
        share = min((dense.attention_ms or 0.0) / denoise_ms, 1.0) if denoise_ms else 0.0
        denoising = denoise_ms / dense.latency.p50
        for row in self.rows.values():
            if row.kind == "recipe" and row.denoising_predicted:
                row.predicted = amdahl(denoising, row.denoising_predicted)
            if row.kind == "recipe" and row.mean_density:
                row.ideal = amdahl(denoising * share, 1 / row.mean_density)
        # Of the last prompt, which is the one that a search proves its recipe on.
        settings = {
            key: value for key, value in self.prompts[-1].items() if key != "prompt" and not isinstance(value, torch.Tensor)
        }
        timed = (
            "end to end: text encoder, all steps with guidance as set, VAE; "
            f"self-attention is {share:.0%} of denoising; one traced run per row warms up and is not timed"
        )
        if self.processes > 1:
            timed += f"; prompts and seeds shared by {self.processes} processes"
        if self.finished.sittings > 1:
            timed += (
                f"; in {self.finished.sittings} sittings: where one ended between two arms, they were not timed side by side"
            )
        texts = [str(item.get("prompt", f"inputs {i}")) for i, item in enumerate(self.prompts)]
        comparison = Comparison(type(self.pipe).__name__, texts, self.seeds, settings, timed, environment(self.pipe))
        comparison.rows, comparison.clips = list(self.rows.values()), self.clips
        for name, loaded in recipes.items():
            if loaded.path is not None:
                comparison.recorders[name] = _recorder(loaded)
        return comparison

    @contextlib.contextmanager
    def _on(self, variant: Variant, gate: str) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(variant.around())
            if variant.change is not None:
                yield stack.enter_context(changed(self.pipe, variant.name, variant.change))
            elif variant.recipe is None and gate == "off":
                yield None  # timed dense runs are the stock pipeline
            else:
                recipe = OBSERVED if variant.recipe is None else variant.recipe
                yield stack.enter_context(apply(self.pipe, recipe, gate=gate))


def _recorder(recipe: Recipe) -> Callable[[dict[str, Any]], Any]:
    def record(row: dict[str, Any]) -> Any:
        if recipe.path is None:
            raise AccelplugError(f"{recipe.name} came from no file to record in.")
        record_measurement(recipe.path, recipe.name.split("/")[-1], row)
        return recipe.path

    return record


def _drawn(events: list[Event]) -> list[dict[str, Any]]:
    """Plans of a few layers, at the last step that had one, first head."""
    with_plan = {event.site.layer: event for event in events if event.plan is not None}
    layers = sorted(layer for layer in with_plan if layer is not None)
    picked = (
        sorted({layers[round(i * (len(layers) - 1) / max(DRAWN_LAYERS - 1, 1))] for i in range(DRAWN_LAYERS)})
        if layers
        else []
    )
    drawn = []
    for layer in picked:
        event = with_plan[layer]
        if event.plan is not None:
            blocks = event.plan.members[0, 0].cpu().numpy()
            rows = ["".join("1" if read else "0" for read in row) for row in blocks]
            drawn.append({"layer": layer, "step": event.clock.step, "density": event.density, "blocks": rows})
    return drawn
