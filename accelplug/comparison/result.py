"""What a comparison found: plain data that prints as a table and writes JSON or a page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelplug import files
from accelplug.comparison import report
from accelplug.comparison.environment import memory_heading
from accelplug.comparison.floors import FLOORS, Between, between
from accelplug.comparison.metrics import BY_KEY, METRICS
from accelplug.comparison.paired import Difference, differences, too_few, versus
from accelplug.comparison.parts import Stack, StackGains
from accelplug.comparison.report import Dot, PlotAxis
from accelplug.comparison.rows import ARMS, DENSE_ROW, ErrorSummary, Quantiles, Row, Sample, from_jsonable, gains
from accelplug.errors import AccelplugError
from accelplug.show import Shown, jsonable
from accelplug.show import table as lined

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

GOOD_DB = 25.0
"""Below this PSNR a clip is another sample rather than the same one, in dB."""


@dataclass(repr=False)
class Comparison(Shown):
    """Speed and quality of recipes beside the dense run. Made by `compare`.

    Attributes
    ----------
    rows : dense first, then recipes, caches and floors.
    clips : (row name, prompt, seed) -> uint8 (F, H, W, 3), for the page; not part of the JSON.
    timed : what the times include, in words.
    headline : the result of a search, shown in place of a verdict on rows most of which miss the budget.
    stacks : recipes that were taken apart; `shares` says who gave how much.
    """

    model: str
    prompts: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    timed: str
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    clips: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict, repr=False)
    recorders: dict[str, Callable[[dict[str, Any]], Path]] = field(default_factory=dict, repr=False)
    headline: str = ""
    stacks: list[Stack] = field(default_factory=list)

    @property
    def dense(self) -> Row:
        """The row that all others are held against."""
        return self.rows[0]

    def row(self, name: str) -> Row:
        """Return a row by its name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise AccelplugError(f"No row {name!r}; there are {[row.name for row in self.rows]}.")

    def speedup(self, row: Row) -> Quantiles:
        """End-to-end gain over dense, paired by prompt and seed: runs of one pair are neighbours in time."""
        ratios = gains(self.dense, row)
        return Quantiles.of(ratios) if ratios else Quantiles(math.nan, math.nan, math.nan)

    def step_gain(self, row: Row) -> Quantiles | None:
        """Gain over dense in the steps in which patches answered, paired by prompt and seed; None where there were none."""
        if row.is_dense:
            return None
        steps = [
            step for step, read in enumerate(zip(*row.density, strict=True)) if any(d is not None and d < 1 for d in read)
        ]
        dense = {(sample.prompt, sample.seed): sample.step_ms for sample in self.dense.samples}
        ratios = [
            sum(dense[s.prompt, s.seed][i] for i in steps) / sum(s.step_ms[i] for i in steps)
            for s in row.samples
            if steps and len(s.step_ms) > steps[-1]
        ]
        return Quantiles.of(ratios) if ratios else None

    @property
    def metric(self) -> str:
        """The quality that counts: foreground PSNR where it was measured, else PSNR."""
        return "fg_psnr_db" if any(row.values("fg_psnr_db") for row in self.rows) else "psnr_db"

    @property
    def floors(self) -> dict[str, Row]:
        """Rows of the floors, by the names of `FLOORS`: those that were run."""
        found = {row.name: row for row in self.rows if row.kind == "floor"}
        return {name: found[floor.row] for name, floor in FLOORS.items() if floor.row in found}

    def between(self, row: Row, metric: str = "") -> Between | None:
        """Hold a figure of a row, by the key of its metric (the one that counts, if left out), against the floors; None without any."""
        return between(row, self.floors, metric or self.metric)

    def paired(self, *metrics: str) -> list[Difference]:
        """Return how every two arms differ in speed and in metrics, at the same prompts and seeds, and how certain that is.

        `metrics` : by their keys; the one that counts if none is named. Of a search's rows, which ran on different pairs, nothing is said.
        """
        return [] if self.headline else differences(self.rows, metrics or (self.metric,))

    def _measured_metrics(self) -> list[str]:
        """Keys of the metrics that the table shows of arms, in its order."""
        found = {key for row in self.rows[1:] for sample in row.samples for key in sample.scores}
        return [metric.key for metric in METRICS.values() if metric.columns and metric.key in found]

    @property
    def best(self) -> Row | None:
        """The fastest recipe at `GOOD_DB` or better, or the one of best quality if none is; None if all are dense."""
        metric = self.metric
        recipes = [row for row in self.rows if row.kind in ARMS and not row.is_dense]
        at_work = [row for row in recipes if row.mean_density is None or row.mean_density < 1]
        good = [row for row in at_work if (row.mean(metric) or 0.0) >= GOOD_DB]
        return max(good or at_work, key=lambda row: self.speedup(row).p50 if good else row.mean(metric) or 0.0, default=None)

    @property
    def verdict(self) -> str:
        """The best recipe in a sentence, its gain and its quality."""
        if self.headline:
            return self.headline
        recipes = [row.name for row in self.rows if row.kind in ARMS]
        if not recipes:
            return "Dense only: nothing to compare."
        best = self.best
        if best is None:
            ran = any(row.mean_density for row in self.rows)
            what = "every attention call ran dense" if ran else "no attention call was answered"
            return f"{', '.join(recipes)}: {what}, so nothing was gained or lost."
        metric = self.metric
        what = BY_KEY[metric].title
        gain = self.speedup(best).p50
        pace = f"{gain:.2f}x faster" if gain >= 1 else f"{1 / gain:.2f}x slower"
        mean, worst = best.mean(metric), best.worst(metric)
        if mean is None:
            return f"{best.name}: {pace} end to end"
        return f"{best.name}: {pace} end to end, {what} {rounded(mean, 1)} dB (worst {rounded(worst, 1)} dB)"

    def forced(self) -> list[str]:
        """Say which rows ran what `apply` would leave dense, and why."""
        return [
            f"{row.name} is forced here: apply() would leave it dense where it does not pay. {'; '.join(row.forced)}."
            for row in self.rows
            if row.forced
        ]

    def told(self) -> list[str]:
        """Say what the floors are, and whether there are prompts enough to tell who is better."""
        said = []
        if floors := self.floors:
            prompts = len({sample.prompt for row in floors.values() for sample in row.samples})
            said.append(
                f"between floors: 0 % is dense at another seed, 100 % dense in another kernel or dtype, in {BY_KEY[self.metric].title}, "
                f"on {prompts} of {len(self.prompts)} prompts."
            )
        return [*said, *filter(None, [too_few(self.rows)])]

    def table(self) -> Table:
        """Return the figures as a rich table."""
        from rich.box import SIMPLE_HEAD

        headings, lines = report.filled_columns(self.headings(), [self.cells(row) for row in self.rows])
        caption = "\n".join([self.timed, *self.forced(), *self.told()])
        table = lined(self.verdict, *headings, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in table.columns[1:]:
            column.justify = "right"
        for row, cells in zip(self.rows, lines, strict=True):
            table.add_row(*cells, style="dim" if row.kind == "floor" else None)
        return table

    def errors_by_layer(self) -> Table | str:
        """Return what is estimated of errors by layer, as a rich table: median over steps, worst and its step, a column for each row."""
        rows = [row for row in self.rows if row.error]
        if not rows:
            return "No row estimates its error: rules whose settings have repair do, where there are tokens enough to probe."
        table = lined("estimated error", "layer", *(row.name for row in rows))
        for layer in range(max(len(row.errors) for row in rows)):
            found = [ErrorSummary.of(row.errors[layer : layer + 1]) for row in rows]
            said = [f"{error.median:.3f}, worst {error.worst:.3f} in step {error.step}" if error else "" for error in found]
            table.add_row(str(layer), *said)
        return table

    def headings(self) -> list[str]:
        """Column headings of the table."""
        return [
            "run",
            "seconds",
            "speed-up",
            "predicted",
            "sparse steps (pred.)",
            "density",
            "estimated error (worst)",
            self.memory,
            "between floors",
            *(metric.heading if column == "mean" else "worst" for metric in METRICS.values() for column in metric.columns),
        ]

    @property
    def memory(self) -> str:
        """What the column of peak memory is called: what was measured, and its unit."""
        of = self.environment.get("memory")
        return memory_heading(of) if of else "peak MiB"

    @property
    def shares(self) -> list[StackGains]:
        """Of each recipe that was taken apart, who gave how much."""
        return [StackGains.of(stack, self.row, self.metric) for stack in self.stacks]

    def parts(self) -> list[Table]:
        """Return who gave how much as rich tables, one for each recipe that was taken apart."""
        return [shares.table(BY_KEY[self.metric].heading, self.memory) for shares in self.shares]

    def cells(self, row: Row) -> list[str]:
        """One line of the table, as text."""
        gain = self.speedup(row)
        spread = f" ({gain.p20:.2f}-{gain.p80:.2f})" if len(row.samples) > 1 else ""
        timed = row.kind != "floor"
        step = self.step_gain(row) if row.kind == "recipe" else None
        held = None if row.kind in ("dense", "floor") else self.between(row)
        return [
            row.name + (" (forced)" if row.forced else ""),
            f"{row.latency.p50 / 1e3:.2f}" if timed else "",
            f"{gain.p50:.2f}x{spread}" if timed else "",
            f"{row.predicted:.2f}x" if row.predicted else "",
            (f"{step.p50:.2f}x" + (f" ({row.forward_predicted:.2f}x)" if row.forward_predicted else "")) if step else "",
            f"{row.mean_density:.3f}" if row.mean_density is not None else "",
            f"{row.error.median:.3f} ({row.error.worst:.3f})" if row.error else "",
            f"{row.peak_mib:.0f}" if row.peak_mib else "",
            str(held or ""),
            *(
                rounded((row.mean if column == "mean" else row.worst)(metric.key), metric.digits)
                for metric in METRICS.values()
                for column in metric.columns
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the clips as JSON-safe data; an infinite PSNR is the text "inf"."""
        data = {
            name: getattr(self, name)
            for name in ("model", "prompts", "seeds", "settings", "timed", "environment", "headline")
        }
        rows = [
            {
                **vars(row),
                "samples": [sample.to_dict() for sample in row.samples],
                "error": row.error,
                "forced": row.forced,
                "between": self._between(row),
            }
            for row in self.rows
        ]
        shares = [shares.to_dict() for shares in self.shares]
        return jsonable(
            {
                **data,
                "verdict": self.verdict,
                "rows": rows,
                "paired": self.paired(*self._measured_metrics()),
                "parts": shares,
            }
        )

    def _between(self, row: Row) -> dict[str, Any]:
        """All figures of a row between their floors, by the key of the metric."""
        keys = [] if row.kind in ("dense", "floor") else BY_KEY
        found = {key: self.between(row, key) for key in keys}
        return {key: {**vars(told), "share": told.share} for key, told in found.items() if told is not None}

    @classmethod
    def from_json(cls, path: str | Path) -> Comparison:
        """Read what `to_json` wrote; clips are not in it.

        Raises
        ------
        AccelplugError
            If the file cannot be read, or holds something else.
        """
        text = files.read(path, "A comparison")
        try:
            data = json.loads(text)
            data.pop("verdict")
            data.pop("paired", None)
            stacks = [Stack.from_dict(told) for told in data.pop("parts", ())]
            for row in data["rows"]:
                for made in ("error", "forced", "between"):
                    row.pop(made, None)
            # Samples hold numbers only: there "inf" is a number, while a prompt may be any text.
            rows = [
                Row(**{**row, "samples": [Sample.from_dict(from_jsonable(sample)) for sample in row["samples"]]})
                for row in data.pop("rows")
            ]
            return cls(**data, rows=rows, stacks=stacks)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise AccelplugError(f"{path} holds no comparison: expected what to_json() wrote, got {error!r}.") from error

    def page(self) -> str:
        """Return one self-contained page: Pareto plot, clips side by side, difference, table, densities, plans."""
        metric = self.metric
        dots = self._dots()
        shown = {DENSE_ROW, *(dot.name for dot in dots)}
        floors = [{"name": row.name, "worst": row.worst(metric)} for row in self.rows if row.kind == "floor"]
        return report.page(
            self.subject,
            self.verdict,
            " ".join([f"Timed {self.timed}.", *self.forced()]),
            {
                **self.to_dict(),
                "chosen": self.best.name if self.best else None,
                "notes": [*self.told(), *map(str, self.paired())],
                "floors": floors,
            },
            axis=PlotAxis(BY_KEY[metric].heading),
            dots=dots,
            clips={key: clip for key, clip in self.clips.items() if key[0] in shown},
            headings=self.headings(),
            lines=((row.name, row.kind, self.cells(row)) for row in self.rows),
            more=self.parts(),
        )

    @property
    def subject(self) -> str:
        """What ran where."""
        return f"{self.model} on {self.environment.get('device', 'a device that was not noted')}"

    def run_name(self, prompt: int, seed: int) -> str:
        """A run in words."""
        return f"seed {seed}, {self.prompts[prompt]}"

    def _dots(self) -> list[Dot]:
        """Every recipe and cache, by its worst run."""
        metric = self.metric
        dots = []
        for row in self.rows:
            worst = row.worst(metric)
            if row.kind not in (*ARMS, "cache") or worst is None:
                continue
            gain, step = self.speedup(row), self.step_gain(row)
            facts = [("speed-up", spread_text(gain), times_text(row.predicted))]
            if step is not None:
                facts.append(("in steps with patches", spread_text(step), times_text(row.forward_predicted)))
            if row.mean_density is not None:
                facts.append(("density", f"{row.mean_density:.3f}", ""))
            facts += errors(row)
            facts += qualities(row)
            if (told := self.between(row)) is not None:
                ends = f"another seed {told.seed:.1f}, another kernel or dtype {rounded(told.floor, 1)}"
                facts.append(("between floors", f"{told}: {told.value:.1f}, {ends}", ""))
            facts += [("runs", str(len(row.samples)), ""), ("worst run", self._worst_run(row, metric), "")]
            mean = row.mean(metric)
            dots.append(Dot(row.name, row.name, row.kind, "tried", gain.p50, worst, mean, False, True, facts, row.rules))
        best = -math.inf
        for dot in sorted(dots, key=lambda dot: (-dot.speedup, -dot.worst)):
            if dot.speedup > 1 and dot.worst > best:
                best, dot.front, dot.verdict = dot.worst, True, "front"
        return dots

    def _worst_run(self, row: Row, metric: str) -> str:
        worst = min((s for s in row.samples if metric in s.scores), key=lambda s: s.scores[metric])
        return self.run_name(worst.prompt, worst.seed)

    def record(self) -> list[Path]:
        """Append a `measured` row to the file of each recipe that came from one; return the files, none in later processes."""
        return (
            []
            if not files.is_first()
            else [self.recorders[row.name](self.measured(row)) for row in self.rows if row.name in self.recorders]
        )

    def measured(self, row: Row) -> dict[str, Any]:
        """Return a row as a recipe's `measured` entry."""

        def quality(of: Row, metric: str) -> dict[str, float] | None:
            worst = of.worst(metric)
            finite = [value for value in of.values(metric) if math.isfinite(value)]  # some runs may be as dense
            return {"mean": statistics.fmean(finite), "worst": worst} if finite and worst is not None else None

        env = self.environment
        prompts, seeds = ({pair[i] for pair in row.fastest_ms} for i in (0, 1))
        entry = {
            "date": env["date"],
            "device": env["device"],
            "versions": env["versions"],
            "git": env.get("git"),
            "inputs": {key: value for key, value in self.settings.items() if isinstance(value, str | int | float | bool)},
            "prompts": [text for i, text in enumerate(self.prompts) if i in prompts and text != f"inputs {i}"],
            "dtype": env.get("dtype"),
            "seeds": [seed for seed in self.seeds if seed in seeds],
            "baseline": env.get("baseline"),
            "choices": {key: str(value) for key, value in row.choices.items() if key in ("gate", "backend")},
            "dense_ms": asdict(Quantiles.of([ms for pair, ms in self.dense.fastest_ms.items() if pair in row.fastest_ms])),
            "ms": asdict(row.latency),
            "speedup": asdict(self.speedup(row)),
            "density": row.mean_density,
            "peak_mib": row.peak_mib,
            **{metric.recorded: quality(row, metric.key) for metric in METRICS.values() if metric.recorded},
            "floors": {
                name: {m.recorded: found for m in METRICS.values() if m.recorded and (found := quality(of, m.key))}
                for name, of in self.floors.items()
            }
            or None,
        }
        return {key: value for key, value in entry.items() if value is not None}

    def __rich__(self) -> Group | Table:
        from rich.console import Group

        found = self.paired()
        below = [*([versus(found)] if found else []), *self.parts()]
        return Group(self.table(), *(item for table in below for item in ("", table))) if below else self.table()


def errors(row: Row, predicted: float | None = None) -> list[tuple[str, str, str]]:
    """What is estimated of its errors, where something is, and the median that was predicted."""
    return [("estimated error", str(row.error), "" if predicted is None else f"{predicted:.3f}")] if row.error else []


def qualities(row: Row) -> list[tuple[str, str, str]]:
    """Worst value and mean of each metric that was measured."""
    found = []
    for metric in METRICS.values():
        worst, mean = row.worst(metric.key), row.mean(metric.key)
        if worst is not None and mean is not None:
            found.append((metric.heading, f"{rounded(worst, metric.digits)} worst, {rounded(mean, metric.digits)} mean", ""))
    return found


def spread_text(gain: Quantiles) -> str:
    """A gain with its quantiles, where they differ."""
    return f"{gain.p50:.2f}x" + (f" ({gain.p20:.2f} to {gain.p80:.2f})" if gain.p20 != gain.p80 else "")


def times_text(value: float | None) -> str:
    """A gain, or nothing."""
    return "" if value is None else f"{value:.2f}x"


def rounded(value: float | None, digits: int) -> str:
    """A figure as text; ``same`` where it is infinite, for the runs are alike to the last bit."""
    if value is None:
        return ""
    return "same" if math.isinf(value) else f"{value:.{digits}f}"
