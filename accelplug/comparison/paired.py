"""Who beats whom, clip by clip: figures of two arms at the same prompt and seed, their differences, and with what certainty they are none.

Clips differ by an order of magnitude more than arms do (15 prompts, every sparse arm from 13.2 to 25.9 dB;
github.com/sgl-project/sglang/pull/34578), so that means say nothing, and paired differences all. Seeds of one prompt are akin: they are
averaged first, and a prompt counts once. Intervals are bootstrapped over prompts; certainty is 1 - p of the exact sign-flip test
(Fisher's randomisation test), with Holm's correction over all pairs of arms, and can be no more than n prompts bear: 1 - 2 / 2^n.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

from accelplug.comparison.evaluators.statistics import holm, paired_bootstrap, sign_flips
from accelplug.comparison.metrics import BY_KEY
from accelplug.comparison.rows import Pair, Row

if TYPE_CHECKING:
    from rich.table import Table

CERTAIN = 0.95
"""Certainty from which a difference is called one, and mass of the intervals."""
FEWEST = 3
"""Prompts below which nothing is said."""
SAME_DB = 100.0
"""What an infinite PSNR, of clips that are alike to the last bit, counts as, in dB."""
SPEED = "speed"
"""The figure that every arm has: milliseconds of the fastest run."""


@dataclass(frozen=True)
class Difference:
    """How two arms differ in a figure, over the prompts that both ran.

    Attributes
    ----------
    first, second : names of rows.
    figure : ``speed``, or the key of a metric.
    mean, low, high : first minus second, and its 95 % interval; of speed the factor by which the first is faster.
    certainty : that there is a difference at all, in [0, 1); 1 - p, corrected. 1 where all differences are exactly 0: that there is none.
    better : the name of the better one, empty where that cannot be told.
    """

    first: str
    second: str
    figure: str
    prompts: int
    mean: float
    low: float
    high: float
    certainty: float
    better: str = ""

    @property
    def none(self) -> bool:
        """Whether both are alike to the last bit on every prompt."""
        neutral = 1.0 if self.figure == SPEED else 0.0
        return self.mean == self.low == self.high == neutral

    @property
    def size(self) -> str:
        """The difference with its interval, as text."""
        if self.figure == SPEED:
            return f"{self.mean:.2f}x ({self.low:.2f} to {self.high:.2f})"
        digits = BY_KEY[self.figure].digits
        return f"{self.mean:+.{digits}f} ({self.low:+.{digits}f} to {self.high:+.{digits}f})"

    def cells(self) -> tuple[str, str]:
        """How much, and how sure that is."""
        if self.none:
            return "the same", "100 %"
        return self.size, percent(self.certainty) + (f": {self.better}" if self.better else "")

    def __str__(self) -> str:
        pair = f"{self.first} against {self.second}, {'speed' if self.figure == SPEED else BY_KEY[self.figure].heading}"
        if self.none:
            return f"{pair}: no difference, with certainty: the same on all {self.prompts} prompts."
        said = f"{self.better} is better" if self.better else f"no difference that {self.prompts} prompts show"
        return f"{pair}: {said}, {self.size}, certainty {percent(self.certainty)}."


def percent(certainty: float) -> str:
    """A certainty as text; what is short of 1 never reads as 100 %."""
    return f"{math.floor(1e3 * certainty) / 10:g} %"


def by_prompt(values: Mapping[Pair, float]) -> dict[int, float]:
    """Mean over the seeds of each prompt."""
    found: dict[int, list[float]] = defaultdict(list)
    for (prompt, _), value in values.items():
        found[prompt].append(value)
    return {prompt: fmean(found[prompt]) for prompt in sorted(found)}


def figures_of(row: Row, figure: str) -> dict[Pair, float]:
    """Return a figure of a row by prompt and seed: of speed minus the logarithm of its milliseconds."""
    if figure == SPEED:
        return {pair: -math.log(ms) for pair, ms in row.fastest_ms.items() if ms > 0}
    known = {(s.prompt, s.seed): s.scores[figure] for s in row.samples if figure in s.scores}
    return {
        pair: min(value, SAME_DB) if BY_KEY[figure].unit == "dB" else value
        for pair, value in known.items()
        if value == value
    }


def difference(first: Row, second: Row, figure: str) -> Difference | None:
    """Return how two rows differ in a figure, uncorrected; None where they share fewer than `FEWEST` prompts."""
    ours, theirs = figures_of(first, figure), figures_of(second, figure)
    alike = figure == SPEED and first.is_dense and second.is_dense
    pairs = {pair: 0.0 if alike else ours[pair] - theirs[pair] for pair in sorted(ours) if pair in theirs}
    found = list(by_prompt(pairs).values())
    if len(found) < FEWEST:
        return None
    told = paired_bootstrap(fmean, found, level=CERTAIN)
    mean, low, high = map(math.exp, told) if figure == SPEED else told
    certainty = 1 - sign_flips(found) if any(found) else 1.0
    return Difference(first.name, second.name, figure, len(found), mean, low, high, certainty)


def differences(rows: Sequence[Row], figures: Sequence[str]) -> list[Difference]:
    """Return the differences of all pairs of arms in some figures, and of every arm to dense in speed, corrected for their number.

    `rows` : dense first, then arms; floors among them are left out.
    """
    dense, *others = rows
    arms = [row for row in others if row.kind != "floor"]
    pairs = [
        *((arm, dense, SPEED) for arm in arms),
        *((a, b, f) for a, b in combinations(arms, 2) for f in (SPEED, *figures)),
    ]
    found = [told for pair in pairs if (told := difference(*pair)) is not None]
    return list(_corrected(found))


def _corrected(found: Sequence[Difference]) -> Iterator[Difference]:
    """Correct certainties over the pairs of one figure, and say who is better."""
    for figure in dict.fromkeys(told.figure for told in found):
        those = [told for told in found if told.figure == figure]
        tested = [told for told in those if not told.none]
        certain = dict(zip(tested, (1 - p for p in holm([1 - told.certainty for told in tested])), strict=True))
        for told in those:
            certainty = certain.get(told, 1.0)
            ahead = told.mean > 1 if figure == SPEED else (told.mean > 0) == BY_KEY[figure].higher_is_better
            name = (told.first if ahead else told.second) if told in certain and certainty >= CERTAIN else ""
            yield replace(told, certainty=certainty, better=name)


def too_few(rows: Sequence[Row]) -> str:
    """Say that there are too few prompts to tell arms apart; nothing where there are enough, or no arm."""
    arms = [row for row in rows[1:] if row.kind != "floor"]
    prompts = len({sample.prompt for sample in rows[0].samples})
    if not arms or prompts >= FEWEST:
        return ""
    few = "one prompt" if prompts == 1 else "two prompts"
    return f"Who is better cannot be said of {few}: clips differ more than arms do. Give 6 or more."


def versus(found: Sequence[Difference]) -> Table:
    """Return differences as a rich table, a line a pair of arms."""
    from rich.box import SIMPLE_HEAD

    from accelplug.show import table as lined

    figures = list(dict.fromkeys(told.figure for told in found))
    headings = [x for f in figures for x in ("faster by" if f == SPEED else BY_KEY[f].heading, "certainty")]
    made = lined("who beats whom, paired by prompt and seed", "first", "second", *headings, box=SIMPLE_HEAD)
    by_pair: dict[tuple[str, str], dict[str, Difference]] = defaultdict(dict)
    for told in found:
        by_pair[told.first, told.second][told.figure] = told
    for names, of in by_pair.items():
        made.add_row(*names, *(cell for f in figures for cell in (of[f].cells() if f in of else ("", ""))))
    return made
