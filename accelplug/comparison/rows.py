"""One line of a comparison: its runs, their times and quality. Plain data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeAlias

from accelplug.call import Clock, Site
from accelplug.comparison.metrics import BY_KEY
from accelplug.hosts.gate import Verdict

LayerGrid: TypeAlias = "list[list[float | None]]"
"""Values by layer and step; None where there is none."""

Pair: TypeAlias = tuple[int, int]
"""Numbers of a prompt and of a seed."""
DENSE_ROW = "dense"
"""What the first row of a comparison of pipelines is called: all others are held against it."""
STOCK_ROW = "stock"
"""What the first row of a vision-language comparison is called, and its kind: the model as it is."""
ARMS = ("recipe", "function")
"""Kinds of rows that a verdict may name."""


@dataclass
class Variant:
    """What one row runs.

    Attributes
    ----------
    recipe : None for the stock model; language models: anything that `accelplug.apply` takes.
    kind : ``dense`` or ``stock``, ``recipe``, ``function``, ``cache``, ``part`` of a recipe, or ``control``: what a real effect must beat.
    change : pipelines: a function in place of a recipe, see `accelplug.comparison.arms`.
    picture : language models: what becomes of every picture before it is shown, for a blind control.
    around : pipelines: makes what stands around its runs.
    """

    name: str
    recipe: Any = None
    kind: str = "recipe"
    picture: Callable[[Any], Any] | None = None
    change: Callable[[Any], Callable[[], Any]] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Sample:
    """One run of one row, at one prompt and seed, and its quality against the dense run of the same prompt and seed.

    Times in milliseconds: `latency_ms` end to end, `denoise_ms` from the first denoiser call to the last step's end,
    `step_ms` per step. `scores`: by key of a metric, see `accelplug.comparison.metrics`; few of the dense run itself.
    """

    prompt: int
    seed: int
    latency_ms: float
    denoise_ms: float
    step_ms: list[float] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as one flat mapping, None for metrics that were not measured."""
        own = {name: value for name, value in vars(self).items() if name != "scores"}
        return {**own, **dict.fromkeys(BY_KEY), **self.scores}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sample:
        """Make it of what `to_dict` gave."""
        own = {name: data.pop(name) for name in ("prompt", "seed", "latency_ms", "denoise_ms", "step_ms")}
        return cls(**own, scores={key: value for key, value in data.items() if value is not None})


@dataclass
class Quantiles:
    """Median with 20 and 80 % quantiles."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Quantiles:
        """Summarise values; one value is its own quantiles."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
        return cls(low, statistics.median(values), high)


@dataclass(frozen=True)
class ErrorSummary:
    """Estimated relative errors of attention outputs, over layers and steps: the median and the worst, and where that is."""

    median: float
    worst: float
    layer: int
    step: int

    @classmethod
    def of(cls, errors: LayerGrid) -> ErrorSummary | None:
        """Sum up errors by layer and step; None if there are none."""
        known = [
            (error, layer, step)
            for layer, by_step in enumerate(errors)
            for step, error in enumerate(by_step)
            if error is not None
        ]
        return cls(statistics.median(error for error, _, _ in known), *max(known)) if known else None

    def __str__(self) -> str:
        return f"{self.median:.3f}, worst {self.worst:.3f} in layer {self.layer}, step {self.step}"


def by_layer_and_step(found: Sequence[tuple[Site, Clock, float | None]], of: Callable[[list[float]], float]) -> LayerGrid:
    """Put values of attention calls in a table of layers by steps, None where there are none; `of` several makes one."""
    layers = max((site.layers for site, _, _ in found), default=0)
    steps = max((max(clock.steps or 0, 1 + (clock.step or 0)) for _, clock, _ in found), default=0)
    values: dict[tuple[int, int], list[float]] = {}
    for site, clock, value in found:
        if site.layer is not None and value is not None:
            values.setdefault((site.layer, clock.step or 0), []).append(value)
    return [
        [of(values[layer, step]) if (layer, step) in values else None for step in range(steps)] for layer in range(layers)
    ]


@dataclass
class Row:
    """One line of the table: the dense run, a recipe, a function of the user's, a cache, a part of a recipe, or a floor.

    Attributes
    ----------
    kind : ``dense``, ``recipe``, ``function``, ``cache``, ``part`` or ``floor``.
    rules : the recipe as text for people, or the function's source.
    attention_ms : self- and joint-attention of one traced run, in all.
    density : by layer and step, fraction of (query, key) pairs computed, pooled keys counted; None where it did not run.
    errors : by layer and step, what patches estimate of the relative error of their answers, the largest of all runs and guidance
        branches; empty where none of them does.
    plans : a few block plans: layer -> {step, blocks (M, N) as rows of "0" and "1", density}.
    predicted : end-to-end gain over dense that was predicted from the gate's timings (see `Forecast`), text encoder and decoding counted.
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
    density: LayerGrid = field(default_factory=list)
    errors: LayerGrid = field(default_factory=list)
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
    def latency(self) -> Quantiles:
        """End-to-end milliseconds, the fastest run at each prompt and seed."""
        return Quantiles.of(list(self.fastest_ms.values()))

    @property
    def is_dense(self) -> bool:
        """Whether it is dense under another name: patches answered no call, or every run gave what dense gave, to the last bit."""
        same = [s.scores.get("psnr_db") == math.inf and s.scores.get("latent_distance", 0.0) == 0.0 for s in self.samples]
        return self.kind == "dense" or self.answered == 0 or (bool(same) and all(same))

    @property
    def forced(self) -> list[str]:
        """Why `apply` would leave calls dense that its patches answered here, in words."""
        return [Verdict.from_dict(told).reason for told in self.choices.get("verdicts", ()) if not told["pays"]]

    def add_errors(self, errors: LayerGrid) -> None:
        """Take in the estimates of one more run, or of another process."""
        lines = zip_longest(self.errors, errors, fillvalue=())
        pairs = [[[e for e in pair if e is not None] for pair in zip_longest(*both)] for both in lines]
        self.errors = [[max(pair, default=None) for pair in line] for line in pairs]

    @property
    def error(self) -> ErrorSummary | None:
        """What is estimated of its errors, in short; None where nothing is."""
        return ErrorSummary.of(self.errors)

    @property
    def mean_density(self) -> float | None:
        """Mean over the calls that ran."""
        values = [value for layer in self.density for value in layer if value is not None]
        return statistics.fmean(values) if values else None

    def values(self, metric: str) -> list[float]:
        """All values of a metric, by its key, that are known."""
        found = [sample.scores.get(metric, math.nan) for sample in self.samples]
        return [value for value in found if not math.isnan(value)]

    def mean(self, metric: str) -> float | None:
        """Mean of a metric over samples."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def worst(self, metric: str) -> float | None:
        """Worst sample of a metric."""
        values = self.values(metric)
        return (min if BY_KEY[metric].higher_is_better else max)(values) if values else None


def gains(dense: Row, row: Row) -> list[float]:
    """Return how much faster than dense a row ran at each prompt and seed that both ran, 1 where the row is dense itself.

    All that is said of speed, in tables, pages, searches and `measured` rows, is the median of these.
    """
    dense_ms = dense.fastest_ms
    return [1.0 if row.is_dense else dense_ms[pair] / ms for pair, ms in row.fastest_ms.items() if pair in dense_ms]


def from_jsonable(value: Any) -> Any:
    """Return plain data in which infinite numbers and NaN are numbers again; a text that reads like one becomes one, too."""
    if isinstance(value, dict):
        return {key: from_jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_jsonable(item) for item in value]
    return float(value) if value in ("inf", "-inf", "nan") else value
