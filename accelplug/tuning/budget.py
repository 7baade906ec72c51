"""Quality budgets in the user's terms: ``fg_psnr>=26``, ``ssim>=.9, agreement>=1``, ``accuracy>=stock-0.01``, or a function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelplug.comparison.metrics import METRICS, ClipMetric, Metric
from accelplug.errors import AccelplugError, nearest, worded

if TYPE_CHECKING:
    import numpy as np

    from accelplug.comparison.rows import Sample


NUMBER = r"\d*\.?\d+"


@dataclass(frozen=True)
class Bound:
    """One bound of a budget. Pipelines must keep it on every prompt and seed, language models over all questions.

    Attributes
    ----------
    name : a metric of `METRICS` or `ANSWER_METRICS`, or any name where `score` is given.
    limit : the worst value that is still good.
    higher_is_better : which side of the limit is good.
    score : ``(dense, candidate) -> float`` on clips, uint8 (F, H, W, 3), of language models on lists of (`Item`, `Reply`);
        None for a metric of the tables.
    to_stock : whether `limit` is a difference to the stock model's value, as in ``accuracy>=stock-0.01``.
    """

    name: str
    limit: float
    higher_is_better: bool = True
    score: Callable[[Any, Any], float] | None = None
    to_stock: bool = False

    def value(self, sample: Sample, dense: np.ndarray, candidate: np.ndarray) -> float:
        """Return what a run scores.

        Raises
        ------
        AccelplugError
            If the metric was not measured, as ``fg_psnr`` without a ``foreground``.
        """
        if self.score is not None:
            return float(self.score(dense, candidate))
        if (found := sample.scores.get(METRICS[self.name].key)) is None:
            raise self.unmeasured()
        return found

    def unmeasured(self) -> AccelplugError:
        """Return the error for a metric that needs what was not given."""
        needs = METRICS[self.name].needs
        cure = worded("Pass it to tune", f"Tune from Python, accelplug.tune(..., {needs}...)")
        return AccelplugError(f"The budget bounds {self.name}, which needs {needs}. {cure}, or bound psnr.")

    def margin(self, value: float, stock: float = 0.0) -> float:
        """How far a value lies on the good side; negative if it does not. NaN is bad."""
        limit = self.limit + stock if self.to_stock else self.limit
        if math.isnan(value) or math.isnan(limit):
            return -math.inf
        return value - limit if self.higher_is_better else limit - value

    def __str__(self) -> str:
        limit = f"stock{self.limit:+g}" if self.to_stock and self.limit else "stock" if self.to_stock else f"{self.limit:g}"
        return f"{self.name}{'>=' if self.higher_is_better else '<='}{limit}"


def parse_budget(budget: str | Bound | Sequence[str | Bound], metrics: Mapping[str, Metric] = METRICS) -> tuple[Bound, ...]:
    """Read a budget: bounds split by commas, `Bound` objects, or a list of either; `metrics` are those it may name.

    Raises
    ------
    AccelplugError
        If a bound cannot be read or names no metric.
    """
    items = budget.split(",") if isinstance(budget, str) else [budget] if isinstance(budget, Bound) else budget
    if not isinstance(items, Sequence) or not all(isinstance(item, str | Bound) for item in items):
        raise AccelplugError(f"A budget is text such as 'psnr>=26', a Bound, or a list of either, got {budget!r}.")
    for item in items:
        if isinstance(item, Bound) and (not isinstance(item.limit, int | float) or not math.isfinite(item.limit)):
            raise AccelplugError(f"The limit of bound {item.name!r}: expected a number, got {item.limit!r}.")
    bounds = tuple(item if isinstance(item, Bound) else _bound(item, metrics) for item in items)
    if not bounds:
        raise AccelplugError("The budget is empty; give at least one bound, such as 'psnr>=26'.")
    return bounds


def require_measured(bounds: Sequence[Bound], given: Mapping[str, Any]) -> None:
    """Refuse bounds whose metric needs a function that was not given; `given` goes by what a metric needs, ``foreground=``.

    Raises
    ------
    AccelplugError
        If there is one.
    """
    for bound in bounds:
        if bound.score is None and given.get(METRICS[bound.name].needs, True) is None:
            raise bound.unmeasured()


def _bound(text: str, metrics: Mapping[str, Metric]) -> Bound:
    found = re.fullmatch(rf"\s*(\w+)\s*(>=|<=)\s*(?:(-?{NUMBER})|(stock)\s*([+-]\s*{NUMBER})?)\s*", text)
    of_clips = metrics is METRICS
    if found is None or (found[4] and of_clips):
        example = "'psnr>=26'" if of_clips else "'accuracy>=0.8' or 'nll<=stock-0.01'"
        raise AccelplugError(f"A bound is a metric, >= or <=, and a number, such as {example}, got {text!r}.")
    name, side, number, stock, offset = found.groups()
    limit = float((number or offset or "0").replace(" ", ""))
    if (metric := metrics.get(name)) is None:
        raise AccelplugError(
            f"There is no metric {name!r}{nearest(name, metrics)}. Known: {', '.join(metrics)}"
            + worded("; for one of your own pass Bound(name, limit, score=(dense, candidate) -> float).", ".")
        )
    if side != metric.better:
        written = number or f"{stock}{offset or ''}"
        raise AccelplugError(f"{name} is good on the other side: write {name}{metric.better}{written}.")
    score = metric.load() if isinstance(metric, ClipMetric) and metric.load is not None else None
    return Bound(name, limit, metric.higher_is_better, score, to_stock=stock is not None)
