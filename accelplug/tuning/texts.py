"""tune() for language models on long prompts: the fastest recipe that finds what stock finds, and predicts a text as well.

The contest is that of answers, with contexts for pages: all candidates read one, the better half more. What is to be won is time: of
reading a context, and of an answer behind it. The finalists are proven on contexts of another seed, which the search never saw: the
winner is the fastest that keeps the budget there, and is faster than stock beyond `WORTH`.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from accelplug import show
from accelplug.chat import tokenizer_of
from accelplug.comparison import arguments
from accelplug.comparison.evaluators.statistics import paired_bootstrap
from accelplug.comparison.metrics import AnswerMetric
from accelplug.comparison.questions import Item, Reply
from accelplug.comparison.texts import TextExam
from accelplug.comparison.texts.context import Context
from accelplug.comparison.texts.exam import TASKS
from accelplug.comparison.texts.reader import ContextReader
from accelplug.comparison.texts.scores import RULER, TEXT_METRICS
from accelplug.errors import AccelplugError
from accelplug.hosts.host import model_facts
from accelplug.tuning.aims import Aim, aims
from accelplug.tuning.budget import Bound, parse_budget
from accelplug.tuning.contest import STOCK, Contest
from accelplug.tuning.journal import Journal, fingerprint_of
from accelplug.tuning.language import Answered, tuned, untried
from accelplug.tuning.prefills import prefill_ladders
from accelplug.tuning.space import FINALISTS, WORTH

logger = logging.getLogger("accelplug")

SEARCH_EXAM: Mapping[str, Any] = {"tokens": (4096,), "trials": 4, "suffix": 64}
"""What a search asks where nothing is said: prompts from which on sparse prefill is at work by default; contexts of each kind, and as
many for the proof; and fewer tokens than compare weighs, since a candidate costs a reading and an answer."""
TEXT_BUDGET = "needle>=stock, nll<=stock+0.02"


@dataclass
class ReadingContest(Contest):
    """A contest whose pages are contexts."""

    metrics: ClassVar[Mapping[str, AnswerMetric]] = TEXT_METRICS
    took: list[float] = field(default_factory=list)
    """Seconds that each page took with all its questions."""

    def __post_init__(self) -> None:
        seen, held = (list(self._pages(half)) for half in (self.seen, self.held))
        self.pages, self.first_held = [*seen, *held], len(seen)

    def _pages(self, half: Sequence[Any]) -> Iterator[list[Any]]:
        """The items of each context."""
        return (self.asker.contexts[key].items for key in dict.fromkeys(item.context for item in half))

    def warm(self) -> None:
        """See `Contest`."""
        self.asker.warm(next(iter(self.asker.contexts.values())).ids[:256])

    def ask(self, page: int) -> tuple[list[Reply], float]:
        """See `Contest`."""
        start = time.monotonic()
        found = self.asker.timed(self.pages[page])
        self.took.append(time.monotonic() - start)
        return found

    @property
    def most_finalists(self) -> int:
        """As many as there is time for, beside stock."""
        left = (self.time_budget_s - self.spent_s) / (statistics.fmean(self.took) if self.took else 1.0)
        return max(1, min(FINALISTS, int(left) - 1))

    def choose(self) -> None:
        """The fastest of those that keep the budget on the proof."""
        better = [aim for aim in self.finalists if self.beats(aim)]
        self.winner = max(better, key=lambda aim: self.standing(aim, self.proof).gain, default=None)

    def beats(self, aim: Aim) -> bool:
        """Whether a finalist keeps the budget on the proof, and gains what is worth a recipe."""
        standing = self.standing(aim, self.proof)
        return standing.slack >= 0 and standing.figures["speed"] >= WORTH

    def interval(self, aim: Aim) -> tuple[float, float, float]:
        """The gain in speed on the proof, with its 95 % interval, resampled over contexts."""
        value, low, high = paired_bootstrap(statistics.median, self.speeds(aim, self.proof))
        return value - 1, low - 1, high - 1


def tune_texts(
    model: Any,
    exam: TextExam | None,
    budget: str | Bound | Sequence[str | Bound] | None,
    *,
    objective: str | None,
    processor: Any,
    time_budget_s: float,
    seed: int,
    patches: Sequence[str] | None,
    resume: str | Path | None,
    progress: bool,
) -> Answered:
    """Find the fastest recipe of a language model within a budget; see `accelplug.tune` for the arguments.

    Raises
    ------
    AccelplugError
        If processor, objective, patches or budget cannot be used.
    """
    arguments.require_processor(processor, "tune")
    if objective not in (None, "speed"):
        raise AccelplugError(
            f"On long texts a language model gets faster: expected objective speed, got {objective!r}. Bound the others."
        )
    bounds = parse_budget(TEXT_BUDGET if budget is None else budget, TEXT_METRICS)
    ladders = prefill_ladders()
    exam = replace(exam or TextExam(**SEARCH_EXAM), seed=seed, tasks=tasks_of(bounds)).at_work([])
    searched, held = (contexts_of(model, replace(exam, seed=s), processor) for s in (seed, seed + 1))
    reader = ContextReader(model, processor, [*searched, *held], exam.anew)
    journal = Journal(resume, fingerprint_of(model, exam.anew, [*searched, *held]))
    seen, unseen = (of_contexts(half) for half in (searched, held))
    contest = ReadingContest(reader, seen, unseen, "speed", bounds, time_budget_s, journal)
    depth = model.config.get_text_config().num_hidden_layers
    contest.candidates = aims(
        model_facts(model), depth, patches, ladders, min_tokens=min(map(len, (c.ids for c in searched)))
    )
    with show.progress("tuning", time_budget_s, progress) as contest.tell:
        try:
            contest.explore()
        except KeyboardInterrupt:
            if STOCK.name not in contest.sheets:
                raise
            logger.warning("tune: interrupted; the best so far is proven now. Interrupt again to stop at once.")
        contest.prove()
    told = {"tokens": ", ".join(map(str, exam.tokens)), "text": exam.source, "trials": exam.trials}
    return tuned(contest, seed, _outcome(contest), untried(contest), **told)


def of_contexts(contexts: Sequence[Context]) -> list[Item]:
    """All that is scored in contexts."""
    return [item for context in contexts for item in context.items]


def tasks_of(bounds: Sequence[Bound]) -> tuple[str, ...]:
    """Return the tasks that bounds ask for; how a text goes on is always one: it is timed."""
    named = {"needle", "nll", *(bound.name for bound in bounds)}
    return tuple(task for task in TASKS if task in named or ("ruler" in named and task in RULER))


def contexts_of(model: Any, exam: TextExam, processor: Any) -> list[Context]:
    """Return an exam's contexts for a model."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return exam.contexts(tokenizer_of(processor), longest)


def _outcome(contest: ReadingContest) -> str:
    """The result in a sentence."""
    budget, proof = ", ".join(map(str, contest.bounds)), contest.proof

    def said(aim: Aim, pages: Sequence[int]) -> str:
        found = contest.standing(aim, pages).figures
        figures = ", ".join(f"{bound.name} {found[bound.name]:.3f}" for bound in contest.bounds)
        return f"{aim.name}: {found['speed']:.2f}x, {figures}"

    if contest.winner is not None:
        stock = said(STOCK, proof).split("x, ", 1)[1]
        return f"{said(contest.winner, proof)} (stock: {stock}), on {len(proof)} contexts held out, within {budget}"
    if not contest.tried:
        page_s = contest.sheets[STOCK.name][0].seconds
        return f"Stay stock: {contest.time_budget_s:.0f} s are too few to try a patch, a context takes {page_s:.0f} s."
    if contest.finalists:
        tried = "; ".join(said(aim, proof) for aim in contest.finalists)
        return f"Stay stock: what kept {budget} in the search does not on contexts held out, or gains less than {WORTH:.2f}x. {tried}"
    best = max(contest.tried, key=lambda aim: min((standing := contest.standing(aim)).gain, standing.slack))
    nearest = said(best, contest.searched(best))
    return f"Stay stock: none of {len(contest.tried)} candidates is faster and keeps {budget}. Nearest: {nearest}"
