"""Quality budgets in the user's terms: ``ssim>=.9, agreement>=1``, ``psnr>=seed+9``, ``accuracy>=stock-0.01``, or a function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelplug.comparison.floors import RELATIVE_TO, Floors
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
    to : what `limit` is a difference to, empty for a limit that stands for itself: ``stock``, the stock model's value, as in
        ``accuracy>=stock-0.01``; of pipelines one of `RELATIVE_TO`, what dense attention scores at the same prompt: ``psnr>=seed+9``.
    """

    name: str
    limit: float
    higher_is_better: bool = True
    score: Callable[[Any, Any], float] | None = None
    to: str = ""

    @property
    def figure(self) -> str:
        """What it bounds: its metric, or the metric less a floor."""
        return self.name if self.to in ("", "stock") else f"{self.name} - {self.to}"

    @property
    def checkable(self) -> bool:
        """Whether text says all of it, so that `verify` can hold runs against it."""
        return self.score is None and self.name in METRICS and not METRICS[self.name].needs.endswith("=")

    def value(self, sample: Sample, dense: np.ndarray, candidate: np.ndarray, floors: Floors | None = None) -> float:
        """Return what a run scores; where the limit is relative to a floor, by how much more than the floor of its prompt.

        Raises
        ------
        AccelplugError
            If the metric was not measured, as ``fg_psnr`` without a ``foreground``.
        """
        if self.score is not None:
            return float(self.score(dense, candidate))
        if (found := sample.scores.get(METRICS[self.name].key)) is None:
            raise self.unmeasured()
        if not self.to:
            return found
        if floors is None:
            raise AccelplugError(
                f"{self} is relative to what dense attention scores, and no floors were run. Bound a number instead."
            )
        return found - floors.value(self.name, self.to, sample.prompt, sample.seed)

    def unmeasured(self) -> AccelplugError:
        """Return the error for a metric that needs what was not given."""
        needs = METRICS[self.name].needs
        cure = worded("Pass it to tune", f"Tune from Python, accelplug.tune(..., {needs}...)")
        return AccelplugError(f"The budget bounds {self.name}, which needs {needs}. {cure}, or bound psnr.")

    def margin(self, value: float, stock: float = 0.0) -> float:
        """How far a value lies on the good side; negative if it does not. NaN is bad. `stock`: what the limit is relative to, if it is."""
        limit = self.limit + stock if self.to == "stock" else self.limit
        if math.isnan(value) or math.isnan(limit):
            return -math.inf
        return value - limit if self.higher_is_better else limit - value

    def __str__(self) -> str:
        limit = f"{self.to}{self.limit:+g}" if self.to and self.limit else self.to or f"{self.limit:g}"
        return f"{self.name}{'>=' if self.higher_is_better else '<='}{limit}"


def parse_budget(budget: str | Bound | Sequence[str | Bound], metrics: Mapping[str, Metric] = METRICS) -> tuple[Bound, ...]:
    """Read a budget: bounds split by commas, `Bound` objects, or a list of either; `metrics` are those it may name.

    Raises
    ------
    AccelplugError
        If a bound cannot be read or names no metric.
    """
    relative = RELATIVE_TO if metrics is METRICS else ("stock",)
    items = budget.split(",") if isinstance(budget, str) else [budget] if isinstance(budget, Bound) else budget
    if not isinstance(items, Sequence) or not all(isinstance(item, str | Bound) for item in items):
        raise AccelplugError(f"A budget is text such as 'psnr>=26', a Bound, or a list of either, got {budget!r}.")
    for item in items:
        if isinstance(item, Bound) and (not isinstance(item.limit, int | float) or not math.isfinite(item.limit)):
            raise AccelplugError(f"The limit of bound {item.name!r}: expected a number, got {item.limit!r}.")
        if isinstance(item, Bound) and item.to and (item.score is not None or item.to not in relative):
            raise AccelplugError(
                f"Bound {item.name!r} is relative to {item.to!r}: expected a metric of the tables, relative to {' or '.join(relative)}."
            )
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
    relative = RELATIVE_TO if metrics is METRICS else ("stock",)
    found = re.fullmatch(rf"\s*(\w+)\s*(>=|<=)\s*(?:(-?{NUMBER})|([a-z]\w*)\s*([+-]\s*{NUMBER})?)\s*", text)
    example = "'psnr>=26' or 'psnr>=seed+9'" if metrics is METRICS else "'accuracy>=0.8' or 'nll<=stock-0.01'"
    if found is None:
        raise AccelplugError(f"A bound is a metric, >= or <=, and a number, such as {example}, got {text!r}.")
    name, side, number, to, offset = found.groups()
    if to is not None and to not in relative:
        raise AccelplugError(
            f"A bound is a number, or relative to {' or '.join(relative)}, such as {example}, got {text.strip()!r}{nearest(to, relative)}."
        )
    limit = float((number or offset or "0").replace(" ", ""))
    if (metric := metrics.get(name)) is None:
        raise AccelplugError(
            f"There is no metric {name!r}{nearest(name, metrics)}. Known: {', '.join(metrics)}"
            + worded("; for one of your own pass Bound(name, limit, score=(dense, candidate) -> float).", ".")
        )
    if side != metric.better:
        written = number or f"{to}{offset or ''}"
        raise AccelplugError(f"{name} is good on the other side: write {name}{metric.better}{written}.")
    if isinstance(metric, ClipMetric) and (why_not := metric.missing()) is not None:
        raise AccelplugError(why_not)
    return Bound(name, limit, metric.higher_is_better, to=to or "")
