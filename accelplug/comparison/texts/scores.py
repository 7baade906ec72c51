"""What readings are worth: one table, as for other answers, of which budgets may bound each. And what they are beside the stock model's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from accelplug.comparison.evaluators.evaluator import Delta
from accelplug.comparison.evaluators.statistics import paired_bootstrap, ratio
from accelplug.comparison.metrics import LIKELIHOODS, AnswerMetric
from accelplug.comparison.questions import Item, Reply

RULER = ("multikey", "multivalue", "tracking", "common", "frequent")


def _right_in(*tasks: str) -> Callable[[Any, Reply], list[float]]:
    """Right ones and all, of each task."""
    return lambda item, reply: [item.task == task and x for task in tasks for x in (reply.right, True)]


def _weighed(item: Any, reply: Reply) -> list[float]:
    return [reply.nll, reply.tokens] if item.task == "suffix" else [0.0, 0.0]


def _mean_of_tasks(*sums: float) -> float:
    """Mean over the tasks that were set."""
    shares = [right / asked for right, asked in zip(sums[::2], sums[1::2], strict=True) if asked]
    return statistics.fmean(shares) if shares else math.nan


TEXT_METRICS: Mapping[str, AnswerMetric] = {
    metric.name: metric
    for metric in (
        AnswerMetric("needle", ">=", "needle", needs="the needle task", counts=_right_in("needle")),
        AnswerMetric("ruler", ">=", "RULER", needs="RULER's tasks", counts=_right_in(*RULER), figure=_mean_of_tasks),
        AnswerMetric(
            "associative", ">=", "associative recall", needs="the associative task", counts=_right_in("associative")
        ),
        AnswerMetric("nll", "<=", "NLL", "nats a token", needs=LIKELIHOODS, counts=_weighed, figure=ratio),
        AnswerMetric("speed", ">=", "speed"),
    )
}
"""Of language models that read long contexts, by name: shares of what was found; NLL a token of how a text goes on; and speed, the
stock model's seconds of a request over the recipe's."""


def text_figures(asked: Sequence[Item], replies: Sequence[Reply]) -> dict[str, float]:
    """Return what replies are worth; NaN where it was not asked for."""
    return {name: metric.value(asked, replies) for name, metric in TEXT_METRICS.items() if metric.counts is not None}


def beside(metric: AnswerMetric, asked: Sequence[Item], stock: Sequence[Reply], own: Sequence[Reply]) -> Delta:
    """Return a metric's difference to the stock model, with its 95 % interval, resampled over questions and stretches of text."""
    by_group: dict[Any, np.ndarray] = {}
    counts = metric.counts
    assert counts is not None
    for item, *pair in zip(asked, stock, own, strict=True):
        row = np.array([counts(item, reply) for reply in pair], dtype=float)
        if row.any():
            by_group[item.group] = by_group.get(item.group, 0) + row

    def difference(groups: Sequence[np.ndarray]) -> float:
        before, after = (metric.figure(*sums) for sums in np.sum(groups, 0))
        return after - before

    return Delta(*paired_bootstrap(difference, list(by_group.values())))


def gain(stock: Sequence[float], own: Sequence[float]) -> Delta:
    """Return how much faster than stock, less 1, paired: the median of the ratios, with its 95 % interval, resampled over pairs."""
    ratios = [before / after for before, after in zip(stock, own, strict=True)]
    return Delta(*(value - 1 for value in paired_bootstrap(statistics.median, ratios)))
