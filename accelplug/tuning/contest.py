"""Successive halving over candidates that answer questions, and the proof of the best on questions that were held out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, ClassVar

import numpy as np
from pydantic import TypeAdapter

from accelplug.comparison.evaluators.statistics import holm, mcnemar, paired_bootstrap
from accelplug.comparison.journal import Journal
from accelplug.comparison.metrics import ANSWER_METRICS, LIKELIHOODS, AnswerMetric
from accelplug.comparison.questions import Item, Reply
from accelplug.comparison.rows import STOCK_ROW
from accelplug.errors import AccelplugError
from accelplug.kernels.timing import synchronise
from accelplug.plug import apply
from accelplug.show import Tell
from accelplug.tuning.aims import Aim
from accelplug.tuning.budget import Bound
from accelplug.tuning.space import FINALISTS

STOCK = Aim(STOCK_ROW, {"rules": [{"patch": "dense"}]})
PAGE_SIZE = 32
"""Questions that are put at a time: a page."""
LEVEL = 0.05
SEARCH_SHARE = 0.6
"""Share of the time for the search; the rest is for the proof."""


def rungs(candidates: int, pages: int) -> list[tuple[int, int]]:
    """Successive halving: (how many candidates are left, up to which page they answer), until `FINALISTS` have seen all pages."""
    number = 1 + max(0, math.ceil(math.log2(max(candidates, 1) / FINALISTS)))
    number = max(1, min(number, int(math.log2(max(pages, 1))) + 1))
    left = [max(math.ceil(candidates / 2**i), min(candidates, FINALISTS)) for i in range(number)]
    return [(left[i], max(pages // 2 ** (number - 1 - i), 1)) for i in range(number)]


@dataclass
class Sheet:
    """A page as it was answered."""

    replies: list[Reply]
    seconds: float


@dataclass
class Standing:
    """What a candidate is worth on some pages, beside the stock model on the same."""

    figures: dict[str, float]
    gain: float
    """Of the objective over stock, positive where it is better."""
    slack: float
    """Smallest distance to a bound, negative outside of the budget."""
    tie_break: float = 0.0
    """Mean log-likelihood of the right one of yes and no, in nats: it tells candidates apart that few questions leave equal."""

    @property
    def holds(self) -> bool:
        """Whether it is better than stock, and within the budget."""
        return self.gain > 0 and self.slack >= 0


@dataclass
class Contest:
    """A search under way. Pages are numbered: those of the search, then those held out, from `first_held`.

    Attributes
    ----------
    metrics : what may be the objective and in bounds.
    candidates : those that are still in it, in order before the first page.
    sheets : by candidate and page, what was answered.
    refused : by candidate, why the model cannot have it.
    winner : the finalist that beats stock; of several that do equally well, the fastest.
    """

    asker: Any
    """`Asker`, or what asks as it does."""
    seen: list[Item]
    held: list[Item]
    objective: str
    bounds: tuple[Bound, ...]
    time_budget_s: float
    journal: Journal
    tell: Tell = lambda done, now="": None
    started: float = field(default_factory=lambda: time.monotonic())
    candidates: list[Aim] = field(default_factory=list)
    all_candidates: list[Aim] = field(default_factory=list)
    sheets: dict[str, dict[int, Sheet]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    finalists: list[Aim] = field(default_factory=list)
    holm: dict[str, float] = field(default_factory=dict)
    """By finalist, the corrected p-value."""
    winner: Aim | None = None
    proof: list[int] = field(default_factory=list)
    """Pages that the finalists were proven on."""
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: ClassVar[Mapping[str, AnswerMetric]] = ANSWER_METRICS

    def __post_init__(self) -> None:
        self.pages = [half[i : i + PAGE_SIZE] for half in (self.seen, self.held) for i in range(0, len(half), PAGE_SIZE)]
        self.first_held = math.ceil(len(self.seen) / PAGE_SIZE)

    @property
    def metric(self) -> AnswerMetric:
        """What is to be better than the stock model's."""
        return self.metrics[self.objective]

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def search_s(self) -> float:
        """When the search ends, in seconds since the start."""
        return SEARCH_SHARE * self.time_budget_s

    # ------------------------------------------------------------------------------------------------- phases

    def explore(self) -> None:
        """Put few questions to all candidates, and more to the better half, as often as it takes; each rung has its share of the time."""
        self.all_candidates = list(self.candidates)
        if f"{STOCK.name}, page 0" not in self.journal.entries:
            self.warm()
        self._answer(STOCK, 0)
        steps, page = rungs(len(self.candidates), self.first_held), 0
        for number, (left, upto) in enumerate(steps):
            self.candidates = self.ranked()[:left]
            until = self.spent_s + (self.search_s - self.spent_s) / (len(steps) - number)
            while page < upto and (page == 0 or self.spent_s < until):
                self.answer_all([STOCK, *self.candidates], [page])
                page += 1

    def warm(self) -> None:
        """Have the model answer once, so that the first page is not timed with what a first call takes."""
        self.asker.ask(self.pages[0])

    def ask(self, page: int) -> tuple[list[Reply], float]:
        """Have the model answer a page as it is; return what it said, and seconds."""
        start = time.perf_counter()
        replies = self.asker.ask(self.pages[page])
        synchronise(self.asker.model.device)
        return replies, time.perf_counter() - start

    def worth(self, asked: Sequence[Item], replies: Sequence[Reply]) -> dict[str, float]:
        """Return what replies are worth by all metrics but speed."""
        return {name: metric.value(asked, replies) for name, metric in self.metrics.items() if metric.counts is not None}

    def page_s(self, aim: Aim) -> float:
        """Seconds that a page takes with a candidate."""
        return float(np.mean([sheet.seconds for sheet in self.sheets[aim.name].values()]))

    def answer_all(self, variants: Sequence[Aim], pages: Iterable[int]) -> None:
        """Have pages answered by turns, while there is time."""
        for page, aim in product(pages, variants):
            if self.spent_s < self.search_s:
                self._answer(aim, page)

    def prove(self) -> None:
        """Put the questions that were held out to the best, and see which of them beat the stock model there."""
        start = self.spent_s
        self.seconds["search"] = round(start, 1)
        self.finalists = [aim for aim in self.ranked() if aim.name in self.sheets and self.standing(aim).holds][
            : self.most_finalists
        ]
        if not self.finalists:
            return
        page_s = sum(map(self.page_s, [STOCK, *self.finalists]))
        number = max(1, int((self.time_budget_s - start) / page_s))
        self.proof = list(range(self.first_held, len(self.pages)))[:number]
        for page, aim in product(self.proof, [STOCK, *self.finalists]):
            self._answer(aim, page)
        self.finalists = [aim for aim in self.finalists if aim.name not in self.refused]
        self.choose()
        self.seconds["proof"] = round(self.spent_s - start, 1)

    @property
    def most_finalists(self) -> int:
        """How many candidates are put to the proof at most."""
        return FINALISTS

    def choose(self) -> None:
        """Say which finalist is the winner."""
        corrected = holm([self.test(STOCK, aim) for aim in self.finalists])
        self.holm = {aim.name: p for aim, p in zip(self.finalists, corrected, strict=True)}
        if better := [aim for aim in self.finalists if self.beats(aim)]:
            best = max(better, key=lambda aim: self.standing(aim, self.proof).gain)
            equal = [aim for aim in better if aim is best or self.test(best, aim) >= LEVEL]
            self.winner = max(equal, key=lambda aim: self.standing(aim, self.proof).figures["speed"])

    def beats(self, aim: Aim) -> bool:
        """Whether a finalist is within the budget and better than stock on the proof, beyond chance."""
        return self.standing(aim, self.proof).holds and self.holm[aim.name] < LEVEL

    # ------------------------------------------------------------------------------------------------ measuring

    def _answer(self, aim: Aim, page: int) -> None:
        """Have a page answered, unless it was. A candidate that the model refuses is left out."""
        if page in self.sheets.get(aim.name, {}) or aim.name in self.refused:
            return

        def answered() -> dict[str, Any]:
            replies, seconds = self.ask(page)
            return {"replies": [asdict(reply) for reply in replies], "seconds": seconds}

        if (found := self.measured(aim, f"page {page}", answered, TypeAdapter(Sheet).validate_python)) is not None:
            self.sheets.setdefault(aim.name, {})[page] = found

    def measured(self, aim: Aim, what: str, run: Callable[[], dict[str, Any]], read: Callable[[Any], Any]) -> Any:
        """Return what `run` gives with a candidate on, as `read` makes it of what the journal keeps; None where the model refuses it."""
        key = f"{aim.name}, {what}"

        def measure() -> dict[str, Any]:
            self.tell(self.spent_s, f"{key}; best so far {self._best()}")
            if (mixing := {"agla", "contrast"} & set(aim.patches)) and self.asker.likelihoods:
                said = f"{' and '.join(sorted(mixing))} mix logits behind every other processor, where likelihoods cannot be read"
                return {"refused": said}
            try:
                model, processor = self.asker.model, self.asker.processor
                with nullcontext() if aim is STOCK else apply(model, aim.recipe, gate="off", processor=processor):
                    return run()
            except AccelplugError as error:
                if aim is STOCK:
                    raise
                return {"refused": str(error)}

        found = self.journal.get(key, measure, lambda kept: str(kept["refused"]) if "refused" in kept else read(kept))
        if not isinstance(found, str):
            return found
        self.refused[aim.name] = found
        self.candidates = [other for other in self.candidates if other is not aim]
        return None

    def _replies(self, aim: Aim, pages: Sequence[int]) -> list[Reply]:
        return [reply for page in pages for reply in self.sheets[aim.name][page].replies]

    def searched(self, aim: Aim) -> list[int]:
        """The pages of the search that a candidate answered."""
        return sorted(page for page in self.sheets[aim.name] if page < self.first_held)

    def answered(self, aim: Aim, pages: Sequence[int] | None = None) -> tuple[list[Item], list[Reply], list[Reply]]:
        """Questions with stock's replies and a candidate's, on pages, by default those of the proof."""
        pages = self.proof if pages is None else pages
        asked = [item for page in pages for item in self.pages[page]]
        return asked, self._replies(STOCK, pages), self._replies(aim, pages)

    def standing(self, aim: Aim, pages: Sequence[int] | None = None) -> Standing:
        """What a candidate is worth on pages, by default all that it answered in the search."""
        pages = self.searched(aim) if pages is None else pages
        asked, stock, own = self.answered(aim, pages)
        before, found = self.worth(asked, stock), self.worth(asked, own)
        before["speed"], found["speed"] = 1.0, float(np.median(self.speeds(aim, pages)))
        for bound in self.bounds:
            if bound.score is not None:
                found[bound.name] = float(bound.score(*(list(zip(asked, r, strict=True)) for r in (stock, own))))
        margins = [bound.margin(found[bound.name], before.get(bound.name, 0.0)) for bound in self.bounds]
        odds = [
            r.margin if item.truth else -r.margin for item, r in zip(asked, own, strict=True) if not math.isnan(r.margin)
        ]
        tie_break = -float(np.logaddexp(0, -np.array(odds)).mean()) if odds else 0.0
        gained = self.metric.gain(before[self.objective], found[self.objective])
        return Standing(found, gained, min(margins, default=math.inf), tie_break)

    def speeds(self, aim: Aim, pages: Sequence[int]) -> list[float]:
        """Stock's time over a candidate's, page by page."""
        return [self.sheets[STOCK.name][page].seconds / self.sheets[aim.name][page].seconds for page in pages]

    def test(self, first: Aim, second: Aim) -> float:
        """Exact p-value that both do equally well on the proof: McNemar's, of likelihoods the sign test."""
        pair = [self._replies(aim, self.proof) for aim in (first, second)]
        if self.metric.needs == LIKELIHOODS:
            costs = [(a.nll, b.nll) for a, b in zip(*pair, strict=True)]
            return mcnemar([a < b for a, b in costs], [b < a for a, b in costs])
        return mcnemar(*([reply.right for reply in replies] for replies in pair))

    def interval(self, aim: Aim) -> tuple[float, float, float]:
        """The gain over stock on the proof, with its 95 % interval, resampled over pictures."""
        by_group: dict[Any, np.ndarray] = {}
        counts = self.metric.counts
        assert counts is not None
        for item, stock, own in zip(*self.answered(aim), strict=True):
            row = np.array([counts(item, stock), counts(item, own)], dtype=float)
            by_group[item.group] = by_group.get(item.group, 0) + row

        def difference(groups: Sequence[np.ndarray]) -> float:
            return self.metric.gain(*(self.metric.figure(*sums) for sums in np.sum(groups, 0)))

        return paired_bootstrap(difference, list(by_group.values()))

    # ------------------------------------------------------------------------------------------------- choosing

    def ranked(self) -> list[Aim]:
        """Candidates, the best first: within the budget, then by gain, by `tie_break`, by speed. Before the first page, in their order."""

        def merit(aim: Aim) -> tuple[bool, float, float, float]:
            if aim.name not in self.sheets:
                return False, -math.inf, 0.0, 0.0
            standing = self.standing(aim)
            return standing.slack >= 0, standing.gain, standing.tie_break, standing.figures["speed"]

        return sorted(self.candidates, key=merit, reverse=True)

    @property
    def untouched(self) -> int:
        """How many candidates there was no time for."""
        return len(self.all_candidates) - len(self.tried) - len(self.refused)

    @property
    def enough_s(self) -> float | None:
        """Seconds in which all would be tried, about; None where nobody can say."""
        return None

    @property
    def tried(self) -> list[Aim]:
        """All candidates that answered something."""
        return [aim for aim in self.all_candidates if aim.name in self.sheets]

    def _best(self) -> str:
        held = [(s.gain, aim.name) for aim in self.candidates if aim.name in self.sheets and (s := self.standing(aim)).holds]
        return max(held)[1] if held else STOCK.name
