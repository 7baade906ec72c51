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
from accelplug.comparison.ranks import is_first, write
from accelplug.errors import AccelplugError
from accelplug.show import Shown

if TYPE_CHECKING:
    from rich.table import Table

DENSE = "dense"
GOOD_DB = 25.0
"""Below this PSNR a clip is another sample rather than the same one, in dB."""


@dataclass
class Sample:
    """One run of one row, at one prompt and seed, and its quality against the dense run of the same prompt and seed.

    Times in milliseconds: `latency_ms` end to end, `denoise_ms` from the first denoiser call to the last step's end,
    `step_ms` per step. Quality is None for the dense run itself.
    """

    prompt: int
    seed: int
    latency_ms: float
    denoise_ms: float
    step_ms: list[float] = field(default_factory=list)
    psnr_db: float | None = None
    ssim: float | None = None
    fg_psnr_db: float | None = None
    latent_distance: float | None = None
    agreement: float | None = None


@dataclass
class Spread:
    """Median with 20 and 80 % quantiles."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarise values; one value is its own quantiles."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
        return cls(low, statistics.median(values), high)


@dataclass
class Row:
    """One line of the table: the dense run, a recipe, a cache, or a floor.

    Attributes
    ----------
    kind : ``dense``, ``recipe``, ``cache`` or ``floor``.
    rules : the recipe as text for people.
    attention_ms : self- and joint-attention of one traced run, in all.
    density : by layer and step, fraction of (query, key) pairs computed, pooled keys counted; None where it did not run.
    plans : a few block plans: layer -> {step, blocks (M, N) as rows of "0" and "1", density}.
    predicted : end-to-end gain over dense that the gate foretold (see `Forecast`), text encoder and decoding counted.
    denoising_predicted, forward_predicted : the same for denoising alone, and for a forward in which patches answer.
    ideal : end-to-end gain if attention time went with density.
    answered : calls that patches answered in the traced run; None where none was traced, or a step cache is on too.
    """

    name: str
    kind: str
    recipe: str = ""
    rules: str = ""
    samples: list[Sample] = field(default_factory=list)
    attention_ms: float | None = None
    density: list[list[float | None]] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)
    predicted: float | None = None
    denoising_predicted: float | None = None
    forward_predicted: float | None = None
    ideal: float | None = None
    peak_mib: float | None = None
    notes: list[str] = field(default_factory=list)
    choices: dict[str, Any] = field(default_factory=dict)
    answered: int | None = None

    @property
    def fastest_ms(self) -> dict[tuple[int, int], float]:
        """End-to-end milliseconds of the fastest run at each prompt and seed: what else a machine does only slows down."""
        found: dict[tuple[int, int], float] = {}
        for sample in self.samples:
            pair = sample.prompt, sample.seed
            found[pair] = min(sample.latency_ms, found.get(pair, math.inf))
        return found

    @property
    def latency(self) -> Spread:
        """End-to-end milliseconds, the fastest run at each prompt and seed."""
        return Spread.of(list(self.fastest_ms.values()))

    @property
    def is_dense(self) -> bool:
        """Whether it is dense under another name: patches answered no call, or every run gave what dense gave, to the last bit."""
        same = [s.psnr_db == math.inf and s.latent_distance in (None, 0.0) for s in self.samples]
        return self.kind == "dense" or self.answered == 0 or (bool(same) and all(same))

    @property
    def mean_density(self) -> float | None:
        """Mean over the calls that ran."""
        values = [value for layer in self.density for value in layer if value is not None]
        return statistics.fmean(values) if values else None

    def values(self, metric: str) -> list[float]:
        """All values of a quality metric that are known."""
        found = [getattr(sample, metric) for sample in self.samples]
        return [value for value in found if value is not None and not math.isnan(value)]

    def mean(self, metric: str) -> float | None:
        """Mean of a metric over samples."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def worst(self, metric: str) -> float | None:
        """Worst sample of a metric."""
        values = self.values(metric)
        return (max if metric == "latent_distance" else min)(values) if values else None


def gains(dense: Row, row: Row) -> list[float]:
    """Return how much faster than dense a row ran at each prompt and seed that both ran, 1 where the row is dense itself.

    All that is said of speed, in tables, pages, searches and `measured` rows, is the median of these.
    """
    dense_ms = dense.fastest_ms
    return [1.0 if row.is_dense else dense_ms[pair] / ms for pair, ms in row.fastest_ms.items() if pair in dense_ms]


@dataclass(repr=False)
class Comparison(Shown):
    """Speed and quality of recipes beside the dense run. Made by `compare`.

    Attributes
    ----------
    rows : dense first, then recipes, caches and floors.
    clips : (row name, prompt, seed) -> uint8 (F, H, W, 3), for the page; not part of the JSON.
    timed : what the times include, in words.
    headline : what a search says of its runs, in place of a verdict on rows of which most miss the budget.
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

    def speedup(self, row: Row) -> Spread:
        """End-to-end gain over dense, paired by prompt and seed: runs of one pair are neighbours in time."""
        ratios = gains(self.dense, row)
        return Spread.of(ratios) if ratios else Spread(math.nan, math.nan, math.nan)

    def step_gain(self, row: Row) -> Spread | None:
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
        return Spread.of(ratios) if ratios else None

    @property
    def metric(self) -> str:
        """The quality that counts: foreground PSNR where it was measured, else PSNR."""
        return "fg_psnr_db" if any(row.values("fg_psnr_db") for row in self.rows) else "psnr_db"

    @property
    def best(self) -> Row | None:
        """The fastest recipe at `GOOD_DB` or better, or the one of best quality if none is; None if all are dense."""
        metric = self.metric
        recipes = [row for row in self.rows if row.kind == "recipe" and not row.is_dense]
        at_work = [row for row in recipes if row.mean_density is None or row.mean_density < 1]
        good = [row for row in at_work if (row.mean(metric) or 0.0) >= GOOD_DB]
        return max(good or at_work, key=lambda row: self.speedup(row).p50 if good else row.mean(metric) or 0.0, default=None)

    @property
    def verdict(self) -> str:
        """The best recipe in a sentence, its gain and its quality."""
        if self.headline:
            return self.headline
        recipes = [row.name for row in self.rows if row.kind == "recipe"]
        if not recipes:
            return "Dense only: nothing to compare."
        best = self.best
        if best is None:
            ran = any(row.mean_density for row in self.rows)
            what = "every attention call ran dense" if ran else "no attention call was answered"
            return f"{', '.join(recipes)}: {what}, so nothing was gained or lost."
        metric = self.metric
        what = "foreground PSNR" if metric == "fg_psnr_db" else "PSNR"
        gain = self.speedup(best).p50
        pace = f"{gain:.2f}x faster" if gain >= 1 else f"{1 / gain:.2f}x slower"
        mean, worst = best.mean(metric), best.worst(metric)
        if mean is None:
            return f"{best.name}: {pace} end to end"
        return f"{best.name}: {pace} end to end, {what} {_number(mean, 1)} dB (worst {_number(worst, 1)} dB)"

    def table(self) -> Table:
        """Return the figures as a rich table."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        left: Any = {"title_justify": "left", "caption_justify": "left"}
        table = Table(title=self.verdict, caption=self.timed, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), **left)
        for heading in self.headings():
            run = heading == "run"
            table.add_column(heading, justify="left" if run else "right", no_wrap=run)
        for row in self.rows:
            table.add_row(*self.cells(row), style="dim" if row.kind == "floor" else None)
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
            "peak MiB",
            "PSNR dB",
            "worst",
            "fg PSNR dB",
            "worst",
            "SSIM",
            "agreement",
        ]

    def cells(self, row: Row) -> list[str]:
        """One line of the table, as text."""
        gain = self.speedup(row)
        spread = f" ({gain.p20:.2f}-{gain.p80:.2f})" if len(row.samples) > 1 else ""
        timed = row.kind != "floor"
        step = self.step_gain(row) if row.kind == "recipe" else None
        return [
            row.name,
            f"{row.latency.p50 / 1e3:.2f}" if timed else "",
            f"{gain.p50:.2f}x{spread}" if timed else "",
            f"{row.predicted:.2f}x" if row.predicted else "",
            (f"{step.p50:.2f}x" + (f" ({row.forward_predicted:.2f}x)" if row.forward_predicted else "")) if step else "",
            f"{row.mean_density:.3f}" if row.mean_density is not None else "",
            f"{row.peak_mib:.0f}" if row.peak_mib else "",
            *(_number(value, 1) for m in ("psnr_db", "fg_psnr_db") for value in (row.mean(m), row.worst(m))),
            _number(row.mean("ssim"), 3),
            _number(row.mean("agreement"), 2),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the clips as JSON-safe data; an infinite PSNR is the text "inf"."""
        data = {
            name: getattr(self, name)
            for name in ("model", "prompts", "seeds", "settings", "timed", "environment", "headline")
        }
        return jsonable({**data, "verdict": self.verdict, "rows": [asdict(row) for row in self.rows]})

    def to_json(self, path: str | Path) -> Path:
        """Write the figures."""
        return write(path, json.dumps(self.to_dict(), indent=1) + "\n")

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
            # Samples hold numbers only: there "inf" is a number, while a prompt may be any text.
            rows = [
                Row(**{**row, "samples": [Sample(**_from_jsonable(sample)) for sample in row["samples"]]})
                for row in data.pop("rows")
            ]
            return cls(**data, rows=rows)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise AccelplugError(f"{path} holds no comparison: expected what to_json() wrote, got {error!r}.") from error

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page: Pareto plot, clips side by side, difference, table, densities, plans."""
        from accelplug.comparison.report import page

        return write(path, page(self))

    def record(self) -> list[Path]:
        """Append a `measured` row to the file of each recipe that came from one; return the files, none in later processes."""
        return (
            []
            if not is_first()
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
        floor = next((r for r in self.rows if r.kind == "floor"), None)
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
            "dense_ms": asdict(Spread.of([ms for pair, ms in self.dense.fastest_ms.items() if pair in row.fastest_ms])),
            "ms": asdict(row.latency),
            "speedup": asdict(self.speedup(row)),
            "density": row.mean_density,
            "peak_mib": row.peak_mib,
            "psnr_db": quality(row, "psnr_db"),
            "ssim": quality(row, "ssim"),
            "foreground_psnr_db": quality(row, "fg_psnr_db"),
            "floor_psnr_db": quality(floor, "psnr_db") if floor else None,
        }
        return {key: value for key, value in entry.items() if value is not None}

    def __rich__(self) -> Table:
        return self.table()


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return "same" if math.isinf(value) else f"{value:.{digits}f}"


def jsonable(value: Any) -> Any:
    """Plain data for JSON; a float that is not finite is text."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _from_jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_jsonable(item) for item in value]
    return float(value) if value in ("inf", "-inf", "nan") else value
