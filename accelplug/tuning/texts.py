"""tune() for language models on long prompts: the fastest recipe that finds what stock finds, and predicts a text as well.

First each candidate is looked at, the likeliest first: it reads one context, which tells its speed, and what the last tokens of that and
a few behind it cost in nats (`ContextReader.glance`). Those that are faster, and whose likelihood leaves them a chance, have tasks put to
them, the fastest first; the fastest reading of prompts and the fastest steps are also one candidate together. The finalists are proven
on contexts of another seed, which the search never saw: the winner is the fastest that keeps the budget there, and is faster than stock
beyond `WORTH`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import TypeAdapter

from accelplug import show
from accelplug.chat import tokenizer_of
from accelplug.comparison import arguments
from accelplug.comparison.evaluators.statistics import paired_bootstrap
from accelplug.comparison.journal import Journal, fingerprint_of
from accelplug.comparison.metrics import AnswerMetric
from accelplug.comparison.questions import Item, Reply
from accelplug.comparison.texts import TextExam
from accelplug.comparison.texts.context import Context
from accelplug.comparison.texts.exam import TASKS
from accelplug.comparison.texts.reader import ContextReader, Glance
from accelplug.comparison.texts.scores import RULER, TEXT_METRICS
from accelplug.errors import AccelplugError, worded
from accelplug.hosts.host import model_facts
from accelplug.recipe import Measured
from accelplug.tuning.aims import Aim, aims
from accelplug.tuning.budget import Bound, parse_budget
from accelplug.tuning.contest import SEARCH_SHARE, STOCK, Contest
from accelplug.tuning.language import Answered, tuned, untried
from accelplug.tuning.prefills import GENERIC, both, one_of_each, prefill_ladders, reads_prompts
from accelplug.tuning.result import Point
from accelplug.tuning.space import FINALISTS, WORTH

logger = logging.getLogger("accelplug")

SEARCH_EXAM: Mapping[str, Any] = {"tokens": (4096,), "trials": 2, "suffix": 64}
"""What a search asks where nothing is said: prompts from which on sparse prefill is at work by default; contexts of each kind, and as
many for the proof; and fewer tokens than compare weighs, since a candidate costs a reading and an answer."""
TEXT_BUDGET = "needle>=stock, nll<=stock+0.02"
LOOKING_SHARE = 0.5
"""Share of the search's time in which candidates are looked at; tasks have the rest."""
ERRORS = 2.0
"""Standard errors by which a first look must miss a bound on likelihood to leave a candidate no chance."""


@dataclass
class ReadingContest(Contest):
    """A contest whose pages are contexts."""

    metrics: ClassVar[Mapping[str, AnswerMetric]] = TEXT_METRICS
    took: list[float] = field(default_factory=list)
    """Seconds that each page took with all its questions."""
    glances: dict[str, Glance] = field(default_factory=dict)
    """By candidate, what a first look told."""

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

    def page_s(self, aim: Aim) -> float:
        """See `Contest`. A page takes longer than its request, whose time counts."""
        return statistics.fmean(self.took) if self.took else super().page_s(aim)

    # ------------------------------------------------------------------------------------------------- first looks

    def explore(self) -> None:
        """Look at candidates in their order, then put tasks to those that promise most, the fastest first."""
        self.all_candidates = list(self.candidates)
        if f"{STOCK.name}, glance" not in self.journal.entries:
            self.warm()
        self.look(STOCK)
        until = LOOKING_SHARE * self.search_s
        for aim in list(self.candidates):
            if len(self.glances) > 1 and self.spent_s + self.glance_s > until:
                break
            self.look(aim)
        self._join()
        self._answer(STOCK, 0)
        self.candidates = self.promising()
        self._ask_the_fastest()

    def look(self, aim: Aim) -> None:
        """Have a context read once with a candidate on."""
        context = next(c for c in self.asker.contexts.values() if any(item.task == "suffix" for item in c.items))
        read = TypeAdapter(Glance).validate_python
        if (found := self.measured(aim, "glance", lambda: asdict(self.asker.glance(context)), read)) is not None:
            self.glances[aim.name] = found

    @property
    def glance_s(self) -> float:
        """Seconds that a first look takes, with what is done around it."""
        return statistics.fmean(glance.took_s for glance in self.glances.values())

    @property
    def untouched(self) -> int:
        """See `Contest`."""
        return len(self.all_candidates) + 1 - len(self.glances) - len(self.refused)

    @property
    def enough_s(self) -> float:
        """See `Contest`: looks at all candidates, and the stock model's first page."""
        looks = (len(self.all_candidates) + 1) * self.glance_s
        return (looks + self.page_s(STOCK)) / (LOOKING_SHARE * SEARCH_SHARE)

    def times_as_fast(self, aim: Aim) -> float:
        """Stock's time of a request over a candidate's, by a first look."""
        return self.glances[STOCK.name].seconds / self.glances[aim.name].seconds

    def loss(self, aim: Aim) -> tuple[float, float]:
        """How many nats a token more than stock it costs by a first look, and the standard error of that."""
        more = np.subtract(self.glances[aim.name].costs, self.glances[STOCK.name].costs)
        return float(more.mean()), float(more.std(ddof=1) / math.sqrt(len(more)))

    def promising(self) -> list[Aim]:
        """Candidates that a first look leaves a chance, the fastest first: faster than stock, and no bound on NLL is surely missed."""

        looked_at = [aim for aim in self.candidates if aim.name in self.glances]
        return sorted((aim for aim in looked_at if self.chance(aim, ERRORS) > 0), key=self.times_as_fast, reverse=True)

    def chance(self, aim: Aim, errors: float = 0.0) -> float:
        """By how much a first look is faster than stock, or within a bound on NLL, some standard errors taken off; below 0 for no."""
        loss, error = self.loss(aim)
        slack = [bound.margin(loss - errors * error) for bound in self.bounds if bound.name == "nll" and bound.to == "stock"]
        return min([self.times_as_fast(aim) - 1, *slack])

    def _join(self) -> None:
        """Look at the fastest reading of prompts and the fastest steps as one candidate."""
        best: dict[bool, Aim] = {}
        for aim in self.promising():
            best.setdefault(reads_prompts(aim), aim)
        if len(best) == 2:
            joined = both(best[True], best[False])
            self.candidates.append(joined)
            self.all_candidates.append(joined)
            self.look(joined)

    def _ask_the_fastest(self) -> None:
        """Put all pages of the search to candidates, the fastest first, while they keep the budget and there is time."""
        holding = 0
        for aim in list(self.candidates):
            for page in range(self.first_held):
                if len(self.tried) and self.spent_s + self.page_s(STOCK) > self.search_s:
                    return
                self._answer(STOCK, page)
                self._answer(aim, page)
                if aim.name in self.refused or self.standing(aim).slack < 0:
                    break
            holding += aim.name not in self.refused and self.standing(aim).holds
            if holding == FINALISTS:
                return

    def looked_at(self) -> list[Point]:
        """Candidates that no question was put to, as a result shows them."""
        return [
            Point(
                aim.name,
                dict(aim.recipe),
                0,
                self.times_as_fast(aim),
                {"nll change": self.loss(aim)[0]},
                self.chance(aim),
                "looked at",
                gain=(self.times_as_fast(aim) - 1, math.nan, math.nan),
            )
            for aim in self.all_candidates
            if aim.name in self.glances and aim.name not in self.sheets
        ]

    # ------------------------------------------------------------------------------------------------------- proof

    @property
    def most_finalists(self) -> int:
        """As many as there is time for, beside stock."""
        return max(1, min(FINALISTS, int((self.time_budget_s - self.spent_s) / self.page_s(STOCK)) - 1))

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
    least = min(len(context.ids) for context in searched)
    contest.candidates = one_of_each(aims(model_facts(model), depth, patches, ladders, GENERIC, min_tokens=least))
    with show.progress("tuning", time_budget_s, progress) as contest.tell:
        try:
            contest.explore()
        except KeyboardInterrupt:
            if STOCK.name not in contest.sheets:
                raise
            logger.warning("tune: interrupted; the best so far is proven now. Interrupt again to stop at once.")
        contest.prove()
    told = told_of(exam, held[: len(contest.proof)])
    return tuned(contest, seed, _outcome(contest), untried(contest), contest.looked_at(), **told)


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


# --------------------------------------------------------------------------------------------------- what a row was proven on


def told_of(exam: TextExam, proven: Sequence[Context]) -> dict[str, str | int | bool]:
    """What a row of a recipe file says of the contexts that a recipe was proven on: all that makes them anew."""
    return {
        "tokens": ", ".join(map(str, exam.tokens)),
        "text": exam.source,
        "trials": exam.trials,
        "suffix": exam.suffix,
        "depths": ", ".join(map(str, exam.depths)),
        "tasks": ", ".join(exam.tasks),
        "anew": exam.anew,
        "contexts": len(proven),
        "contexts_sha256": digest_of(proven),
    }


def digest_of(contexts: Sequence[Context]) -> str:
    """Return 16 hex digits for contexts and what is asked about them."""
    return hashlib.sha256(
        repr([(c.ids, [(a.ids, a.room, a.spans) for a in c.asked]) for c in contexts]).encode()
    ).hexdigest()[:16]


def contexts_again(model: Any, name: str, row: Measured, given: Any, processor: Any) -> list[Context]:
    """Make the contexts anew that a row of recipe `name` was proven on; `given`: a `TextExam` with its file of text, where it had one.

    Raises
    ------
    AccelplugError
        If the row does not say enough, or other contexts come of it.
    """
    told = {key: str(value) for key, value in row.inputs.items()}
    text = getattr(given, "text", None)
    own = TextExam().source
    if "contexts_sha256" not in told:
        raise AccelplugError(
            f"{name}: the row of {row.date} does not say which contexts it was measured on: an older version wrote it. Tune again."
        )
    if (text is None) != (told["text"] == own):
        cure = worded("inputs=TextExam(text=PATH)", "--text FILE")
        wanted = "Give no text" if told["text"] == own else f"Give it: {cure}"
        raise AccelplugError(f"{name}: the row of {row.date} was measured on {told['text']}. {wanted}.")
    exam = TextExam(
        tokens=tuple(map(int, told["tokens"].split(", "))),
        depths=tuple(map(float, told["depths"].split(", "))),
        tasks=tuple(told["tasks"].split(", ")),
        text=text,
        suffix=int(told["suffix"]),
        trials=int(told["trials"]),
        seed=row.seeds[0] + 1,
        anew=bool(row.inputs["anew"]),
    )
    made = contexts_of(model, exam, processor)[: int(told["contexts"])]
    if digest_of(made) != told["contexts_sha256"]:
        raise AccelplugError(
            f"{name}: the row of {row.date} was measured on other contexts. Give the tokenizer and the text that it was tuned with."
        )
    return made


# ------------------------------------------------------------------------------------------------------------------ in words


def _outcome(contest: ReadingContest) -> str:
    """The result in a sentence."""
    budget, proof = ", ".join(map(str, contest.bounds)), contest.proof

    def said(aim: Aim, pages: Sequence[int]) -> str:
        found = contest.standing(aim, pages).figures
        figures = ", ".join(f"{bound.name} {found[bound.name]:.3f}" for bound in contest.bounds)
        return f"{aim.name}: {found['speed']:.2f}x, {figures}"

    def glanced(aim: Aim) -> str:
        loss, error = contest.loss(aim)
        return f"{aim.name}: {contest.times_as_fast(aim):.2f}x, {loss:+.3f} nats a token (standard error {error:.3f})"

    if contest.winner is not None:
        stock = said(STOCK, proof).split("x, ", 1)[1]
        return f"{said(contest.winner, proof)} (stock: {stock}), on {len(proof)} contexts held out, within {budget}"
    if len(contest.glances) < 2:
        return (
            f"Stay stock: {contest.time_budget_s:.0f} s are too few to try a patch, a context takes {contest.page_s(STOCK):.0f} s. "
            f"Give {worded('time_budget_s', '--time')} of about {contest.enough_s:.0f}."
        )
    if contest.finalists:
        tried = "; ".join(said(aim, proof) for aim in contest.finalists)
        return f"Stay stock: what kept {budget} in the search does not on contexts held out, or gains less than {WORTH:.2f}x. {tried}"
    if contest.tried:
        best = max(contest.tried, key=lambda aim: min((standing := contest.standing(aim)).gain, standing.slack))
        nearest = said(best, contest.searched(best))
        return f"Stay stock: none of {len(contest.tried)} candidates that were asked is faster and keeps {budget}. Nearest: {nearest}"
    if promising := contest.promising():
        return f"Stay stock: it ended before a task was put. Most promising at a first look: {glanced(promising[0])}"
    best = max((aim for aim in contest.all_candidates if aim.name in contest.glances), key=contest.times_as_fast)
    number = len(contest.glances) - 1
    return (
        f"Stay stock: none of {number} candidates is faster and predicts as well at a first look. Fastest: {glanced(best)}"
    )
