"""Whether a difference is one: paired tests, intervals, and alarms for a model that says less instead of better.

Everything is paired by item, since the same questions and images are put before and after. A share whose
denominator is zero is NaN, here and in all evaluators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import TypeVar

import numpy as np

from accelplug.errors import AccelplugError

Resampled = TypeVar("Resampled")

YES_SHIFT = 0.05
"""A yes-ratio may move this far, in absolute value, before the MCC has to rise with it."""
SHORTER, LONGER = 0.7, 1.5
"""Mean length after over before: outside of this the answers are of another kind."""
REPEATING = 0.15
"""Distinct-1 may fall by this much."""
UNPARSED = 0.05
"""Share of answers that may be neither yes nor no."""


def ratio(part: float, whole: float) -> float:
    """Return part over whole, NaN where the whole is zero."""
    return part / whole if whole else math.nan


def mcc(tp: int, fp: int, fn: int, tn: int) -> float:
    """Matthews correlation of a 2 x 2 table, in [-1, 1]; NaN where a row or a column of it is empty."""
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return ratio(tp * tn - fp * fn, math.sqrt(margins))


def shifted(margins: Sequence[float], yes: int) -> list[bool]:
    """Say yes to the `yes` questions with the largest margin of yes over no: a model whose yes-logit was shifted by a constant.

    A patch that does no better than that has moved a threshold.
    """
    said = np.zeros(len(margins), dtype=bool)
    said[np.argsort(-np.array(margins), kind="stable")[:yes]] = True
    return said.tolist()


def mcnemar(first_right: Sequence[bool], second_right: Sequence[bool]) -> float:
    """Return the exact two-sided p-value that both runs are right equally often.

    Only the items on which they differ count; under the null hypothesis either run wins one with probability 1/2.

    Parameters
    ----------
    first_right, second_right : by item, whether the run was right; both in the same order.

    Returns
    -------
    float
        In (0, 1]; 1 where the runs never differ.

    Raises
    ------
    AccelplugError
        The runs are of different length.
    """
    same_length("McNemar's test", first_right, second_right)
    won = sum(bool(a) and not b for a, b in zip(first_right, second_right, strict=True))
    lost = sum(bool(b) and not a for a, b in zip(first_right, second_right, strict=True))
    differ = won + lost
    tail = sum(math.comb(differ, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**differ)


EXACT = 16
"""Differences up to which all choices of signs are gone through."""
FLIPS = 100_000
"""Choices that are drawn where there are more."""


def sign_flips(differences: Sequence[float]) -> float:
    """Return the two-sided p-value that paired differences are as likely of either sign (Fisher's randomisation test of their mean).

    Exact up to `EXACT` differences; beyond, of `FLIPS` choices of signs, drawn with a fixed seed.

    Returns
    -------
    float
        In (0, 1], at least ``2 / 2**len(differences)``; 1 where all differences are 0.
    """
    given = np.asarray(differences, dtype=np.float64)
    exact = len(given) <= EXACT
    if exact:
        bits = np.arange(2 ** len(given))[:, None] >> np.arange(len(given)) & 1
    else:
        bits = np.random.default_rng(0).integers(2, size=(FLIPS, len(given)), dtype=np.int8)
    sums = np.abs((1 - 2.0 * bits) @ given)
    seen = abs(float(given.sum()))
    extreme = int((sums >= seen - 1e-12 * float(np.abs(given).sum())).sum())
    return extreme / len(sums) if exact else (extreme + 1) / (len(sums) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm, step-down), in the order given, each at most 1.

    Raises
    ------
    AccelplugError
        A value is not in [0, 1].
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise AccelplugError(f"Holm's adjustment takes p-values in [0, 1], got {p}; leave out tests that were not made.")
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = floor
    return adjusted


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share, (low, high) in [0, 1]; NaN for n = 0.

    Raises
    ------
    AccelplugError
        `successes` is not in 0..n, or `level` not in (0, 1).
    """
    if not 0 <= successes <= n:
        raise AccelplugError(f"Wilson's interval takes successes in 0..n, got {successes} of {n}; pass counts, not shares.")
    _check_level(level)
    if n == 0:
        return math.nan, math.nan
    z, share = NormalDist().inv_cdf((1 + level) / 2), successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(
    statistic: Callable[[Sequence[Resampled]], float],
    items: Sequence[Resampled],
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Return a statistic with its percentile interval over resampled items.

    Parameters
    ----------
    statistic : a figure of a list of items, such as the difference between two figures.
    items : one entry an image, with all that belongs to it: of before and after, and of all its questions.
    samples : how many times as many items are drawn, with replacement.
    level : mass of the interval.

    Returns
    -------
    value, low, high : float
        Samples for which the statistic is NaN are left out of the interval; all NaN if there are no items.

    Raises
    ------
    AccelplugError
        `level` is not in (0, 1), or `samples` below 1.
    """
    _check_level(level)
    if samples < 1:
        raise AccelplugError(f"A bootstrap takes at least one sample, got {samples}; 2000 is usual.")
    if not len(items):
        return math.nan, math.nan, math.nan
    draws = np.random.default_rng(seed).integers(len(items), size=(samples, len(items)))
    values = np.array([statistic([items[i] for i in draw]) for draw in draws.tolist()], dtype=np.float64)
    defined = values[~np.isnan(values)]
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]) if defined.size else (math.nan, math.nan)
    return float(statistic(items)), float(low), float(high)


@dataclass(frozen=True)
class Health:
    """What tells whether a model still answers as it did; NaN where it was not measured.

    Attributes
    ----------
    yes_ratio : yes among the parsed answers.
    mcc : Matthews correlation of the answers with the truth.
    mean_words : words an answer.
    distinct_1 : share of distinct words in an answer, mean over answers (over all answers together it would fall with their number).
    unparsed : share of answers that are neither yes nor no.
    """

    yes_ratio: float = math.nan
    mcc: float = math.nan
    mean_words: float = math.nan
    distinct_1: float = math.nan
    unparsed: float = math.nan

    @classmethod
    def of(cls, answers: Sequence[str] = (), yes_no: YesNo | None = None) -> Health:
        """Measure answers, figures of yes/no questions, or both."""
        words = [answer.lower().split() for answer in answers]
        said = [answer for answer in words if answer]
        lengths = {
            "mean_words": fmean(map(len, words)) if words else math.nan,
            "distinct_1": fmean(len(set(answer)) / len(answer) for answer in said) if said else math.nan,
        }
        if yes_no is None:
            return cls(**lengths)
        return cls(yes_no.yes_ratio, yes_no.mcc, **lengths, unparsed=ratio(yes_no.unparsed, yes_no.n))


def collapsed(before: Health, after: Health) -> list[str]:
    """Return the signs that fewer errors come from saying less, one sentence each; empty if there are none.

    A figure that is NaN raises no alarm, but an undefined MCC counts as 0: saying always the same shows no skill.
    """
    shift = after.yes_ratio - before.yes_ratio
    rises = (0 if math.isnan(after.mcc) else after.mcc) > (0 if math.isnan(before.mcc) else before.mcc)
    length = ratio(after.mean_words, before.mean_words)
    signs = {
        f"The share of yes moved by {shift:+.3f} while the MCC did not rise ({before.mcc:.3f} to {after.mcc:.3f}).": (
            abs(shift) > YES_SHIFT and not rises
        ),
        f"Answers have {length:.0%} of their length before ({before.mean_words:.1f} to {after.mean_words:.1f} words).": (
            length < SHORTER or length > LONGER
        ),
        f"Answers repeat themselves: distinct-1 fell from {before.distinct_1:.2f} to {after.distinct_1:.2f}.": (
            before.distinct_1 - after.distinct_1 > REPEATING
        ),
        f"{after.unparsed:.1%} of the answers are neither yes nor no.": after.unparsed > UNPARSED,
    }
    return [sign for sign, holds in signs.items() if holds]


def same_length(what: str, first: Sequence[object], second: Sequence[object]) -> None:
    """Raise AccelplugError unless both are of the same length."""
    if len(first) != len(second):
        raise AccelplugError(
            f"{what} pairs items: expected equally many, got {len(first)} and {len(second)}; pass both in the same order."
        )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise AccelplugError(f"The level of an interval is expected in (0, 1), got {level}; 95 % is 0.95.")


@dataclass(frozen=True)
class YesNo:
    """Figures of yes/no answers; yes is the positive class, and all but the counts are shares, NaN where undefined.

    Attributes
    ----------
    n : questions.
    unparsed : answers that are neither yes nor no. They are wrong in the accuracy, missed in the recall, no yes in precision and
        hallucination rate, left out of the yes-ratio, and the opposite of the truth in the MCC.
    yes_ratio : yes among the parsed answers (of the predictions, not of the truth).
    hallucination_rate : yes among the answers to questions whose truth is no.
    """

    n: int
    unparsed: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    mcc: float
    hallucination_rate: float
