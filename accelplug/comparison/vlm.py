"""Before and after on questions and descriptions: what recipes do to a vision-language model's truth, length and speed."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelplug import files
from accelplug.chat import Chat, prompt
from accelplug.comparison import arguments
from accelplug.comparison.environment import environment
from accelplug.comparison.evaluators import amber, chair, mme, pope
from accelplug.comparison.evaluators.pope import YesNo
from accelplug.comparison.evaluators.statistics import Health, collapsed, holm, mcnemar, paired_bootstrap, wilson
from accelplug.comparison.exam import Exam
from accelplug.errors import AccelplugError
from accelplug.kernels.timing import synchronise
from accelplug.plug import apply
from accelplug.show import Shown, as_html

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

DENSE = "dense"
HARDEST = "adversarial"
"""The split whose hallucination rate is reported first."""


@dataclass
class Variant:
    """What one row runs.

    Attributes
    ----------
    recipe : None for the stock model.
    kind : ``dense``, ``recipe`` or ``control``: what a real effect must beat.
    picture : what becomes of every picture before it is shown, for the blind control.
    """

    name: str
    recipe: Any = None
    kind: str = "recipe"
    picture: Callable[[Any], Any] | None = None


@dataclass
class Delta:
    """A difference to dense with its 95 % interval, resampled over pictures."""

    value: float
    low: float
    high: float


@dataclass
class Outcome:
    """One row: what was answered, and what it is worth.

    Attributes
    ----------
    replies : by split, the answers as text; margins : logit of yes over that of no, at the first answered token.
    mme : by task, where the exam has pairs of questions.
    amber : AMBER's counts of descriptions and, of its questions, accuracy and figures of the class no; dimensions : those by dimension.
    pope : by split; interval : of the hallucination rate on the hardest split.
    hallucination, chair_i : differences to dense; p : McNemar on all questions, each once, holm : corrected over all recipes.
    matched : dense with a constant added to its yes-logit so that its share of yes is this row's, on the hardest split.
    described : the hardest split answered by the descriptions, yes for what they mention (offline POPE), with McNemar's p and its
        correction, and the difference of hallucination rates.
    tokens_per_s : over all descriptions, prompts included.
    alarms : signs that fewer errors come from saying less.
    """

    name: str
    kind: str
    replies: dict[str, list[str]] = field(default_factory=dict)
    margins: dict[str, list[float]] = field(default_factory=dict)
    descriptions: dict[Any, str] = field(default_factory=dict)
    pope: dict[str, YesNo] = field(default_factory=dict)
    interval: tuple[float, float] = (math.nan, math.nan)
    mme: mme.Mme | None = None
    chair: chair.Chair | None = None
    amber: dict[str, float] = field(default_factory=dict)
    dimensions: dict[str, dict[str, float]] = field(default_factory=dict)
    hallucination: Delta | None = None
    chair_i: Delta | None = None
    p: float = math.nan
    holm: float = math.nan
    matched: YesNo | None = None
    described: YesNo | None = None
    described_hallucination: Delta | None = None
    described_p: float = math.nan
    described_holm: float = math.nan
    tokens_per_s: float = math.nan
    alarms: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def right(self, exam: Exam, split: str) -> list[bool]:
        """Whether each question of a split was answered as it should be."""
        asked = exam.of(split)
        return [exam.read(said) is question.answer for said, question in zip(self.replies[split], asked, strict=True)]

    def said_yes(self, exam: Exam) -> list[bool]:
        """Whether each question of the hardest split was answered with yes."""
        return [exam.read(said) is True for said in self.replies.get(HARDEST, [])]

    def mentioned(self, exam: Exam) -> list[bool]:
        """Whether the description mentions what each question of the hardest split asks for."""
        said = {key: set(exam.vocabulary.mentions(text)) for key, text in self.descriptions.items()}
        return [question.thing in said[question.image] for question in exam.of(HARDEST)]

    def summary(self) -> dict[str, Any]:
        """Return the figures as plain data, without the texts."""
        caption = self.chair
        shown = ("chair_s", "chair_i", "recall", "precision", "f1", "mean_words", "n_mentions", "n_captions", "singulariser")
        return {
            "name": self.name,
            "kind": self.kind,
            "pope": {split: asdict(figures) for split, figures in self.pope.items()},
            "hallucination_rate_interval": self.interval,
            "hallucination_delta": asdict(self.hallucination) if self.hallucination else None,
            "mcnemar_p": self.p,
            "holm_p": self.holm,
            "matched_offset": asdict(self.matched) if self.matched else None,
            "described": asdict(self.described) if self.described else None,
            "described_hallucination_delta": asdict(self.described_hallucination) if self.described_hallucination else None,
            "described_mcnemar_p": self.described_p,
            "described_holm_p": self.described_holm,
            "mme": {task: {**asdict(found), "score": found.score} for task, found in self.mme.tasks.items()}
            if self.mme
            else None,
            "mme_hallucination": self.mme.hallucination if self.mme else None,
            "chair": {name: getattr(caption, name) for name in shown} if caption else None,
            "chair_i_delta": asdict(self.chair_i) if self.chair_i else None,
            "amber": self.amber,
            "amber_dimensions": self.dimensions,
            "tokens_per_s": self.tokens_per_s,
            "alarms": self.alarms,
            "notes": self.notes,
        }


@dataclass(repr=False)
class VlmComparison(Shown):
    """What `compare` found on a vision-language model. Prints as a table; writes JSON or a page."""

    model: str
    exam: Exam
    rows: list[Outcome]
    environment: dict[str, Any]

    def __getitem__(self, name: str) -> Outcome:
        for row in self.rows:
            if row.name == name:
                return row
        raise AccelplugError(f"There is no row {name!r}; there are {', '.join(row.name for row in self.rows)}.")

    def table(self) -> Table:
        """Return the rows side by side."""
        from rich.table import Table

        table = Table(title=f"{self.model} on {self.exam.name}", title_justify="left")
        lines = [self._cells(row) for row in self.rows]
        heads = [head for head in lines[0] if any(line[head] for line in lines)]
        for head in heads:
            table.add_column(head, no_wrap=not head)  # names stay whole
        for line in lines:
            table.add_row(*(line[head] for head in heads))
        return table

    @staticmethod
    def _cells(row: Outcome) -> dict[str, str]:
        """One line of the table by its headings; empty where something was not asked."""
        hard, caption, counts = row.pope.get(HARDEST), row.chair, row.amber
        low, high = row.interval
        return {
            "": row.name if row.kind != "control" else f"[dim]{row.name}",
            "hallucinates, adversarial": f"{hard.hallucination_rate:.1%} ({low:.1%} to {high:.1%})" if hard else "",
            "to dense": _delta(row.hallucination) if hard else "",
            "p (Holm)": "" if math.isnan(row.holm) else f"{row.holm:.2g}",
            "F1": f"{hard.f1:.3f}" if hard else "",
            "MCC": f"{hard.mcc:.3f}" if hard else "",
            "yes": f"{hard.yes_ratio:.2f}" if hard else "",
            "offset MCC": f"{row.matched.mcc:.3f}" if row.matched else "",
            "CHAIR_I": f"{caption.chair_i:.1%} {_delta(row.chair_i)}" if caption else "",
            "recall": f"{caption.recall:.2f}" if caption else "",
            "words": f"{caption.mean_words:.1f}" if caption else "",
            "MME": f"{sum(task.score for task in row.mme.tasks.values()):.0f} of {200 * len(row.mme.tasks)}"
            if row.mme
            else "",
            **{
                f"AMBER {name}": f"{counts[name]:.1%}" if "score" in counts else ""
                for name in ("chair", "cover", "hal", "cog", "f1")
            },
            "AMBER": f"{counts['score']:.1f}" if "score" in counts else "",
            "tokens/s": "" if math.isnan(row.tokens_per_s) else f"{row.tokens_per_s:.0f}",
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()
        for row in self.rows:
            for alarm in row.alarms:
                yield f"[bold red]{row.name}:[/] {alarm}"
            for note in row.notes:
                yield f"{row.name}: {note}"

    def to_json(self, path: str | Path) -> Path:
        """Write all figures, the settings of the exam and the environment."""
        exam = {
            "name": self.exam.name,
            "truth": self.exam.source,
            "pictures": len(self.exam.pictures),
            "questions": len(self.exam.questions),
            "parse": self.exam.parse,
            "questions_sha256": pope.digest(list(self.exam.questions)),
            "describe": self.exam.describe,
            "max_new_tokens": self.exam.max_new_tokens,
        }
        data = {"model": self.model, "exam": exam, "environment": self.environment, "rows": [r.summary() for r in self.rows]}
        return files.write(path, json.dumps(_finite(data), indent=1) + "\n")

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page."""
        return files.write(path, f"<!doctype html><meta charset=utf-8><title>{self.model}</title>{as_html(self)}")


def _delta(delta: Delta | None) -> str:
    return "" if delta is None or math.isnan(delta.value) else f"{delta.value:+.1%} ({delta.low:+.1%} to {delta.high:+.1%})"


def _finite(data: Any) -> Any:
    """Replace NaN, which JSON does not have, by null."""
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and math.isnan(data) else data


def compare_vlm(
    model: Any,
    recipes: Mapping[str, Any] | Sequence[Variant],
    exam: Exam,
    processor: Any,
    *,
    batch: int = 32,
    descriptions: bool = True,
    progress: bool = True,
) -> VlmComparison:
    """Examine a model stock and with recipes, on the same pictures, greedily, with the same attention kernel.

    Parameters
    ----------
    model : a transformers vision-language model; it is left as it was.
    recipes : by name, anything that `accelplug.apply` takes; or variants, controls among them.
    exam : what is asked.
    processor : the model's.
    batch : prompts at a time.
    descriptions : whether pictures are described too, for CHAIR, AMBER, length and speed.

    Raises
    ------
    AccelplugError
        If the exam has no question.
    """
    if not exam.questions:
        raise AccelplugError("The exam has no questions; Exam.scenes(), Exam.coco(folder) and Exam.amber(folder) make some.")
    arguments.require_whole(batch, "compare, prompts at a time", 1)
    exam.require_pictures()
    named = [Variant(name, recipe) for name, recipe in recipes.items()] if isinstance(recipes, Mapping) else list(recipes)
    examiner = Examiner(model, processor, exam, batch)
    rows = []
    for variant in [Variant(DENSE, kind="dense"), *named]:
        if progress:
            print(f"examining {variant.name} ...", flush=True)
        rows.append(examiner.examine(variant, descriptions))
    _judge(rows, exam)
    return VlmComparison(type(model).__name__, exam, rows, environment(model))


@dataclass
class Examiner:
    """Asks a model everything in an exam."""

    model: Any
    processor: Any
    exam: Exam
    batch: int

    def examine(self, variant: Variant, descriptions: bool = True) -> Outcome:
        """Ask, score, and take the recipe off again."""
        row = Outcome(variant.name, variant.kind)
        stock = variant.recipe is None
        plug: Any = nullcontext() if stock else apply(self.model, variant.recipe, gate="off", processor=self.processor)
        with plug as on:
            for split in self.exam.splits:
                texts = [(question.image, question.text) for question in self.exam.of(split)]
                row.replies[split], row.margins[split] = self.ask(texts, variant.picture)
            if self.exam.pairs:
                row.mme = self._pairs(variant)
            if descriptions:
                row.descriptions, row.tokens_per_s = self.describe(variant.picture)
            if on is not None:
                report = on.report()
                row.notes = [f"fell back to dense: {what} ({n} calls)" for what, n in report.fallbacks.items()]
                row.notes += [] if report.served else ["no call was answered: this row is dense"]
        self._score(row)
        return row

    @functools.cached_property
    def chat(self) -> Chat:
        """The model as one that is put questions to."""
        return Chat(self.model, self.processor)

    def ask(self, asked: Sequence[tuple[Any, str]], picture: Any = None) -> tuple[list[str], list[float]]:
        """Return answers of a few tokens, and margins of yes over no."""
        replies, margins = [], []
        for chunk in _chunks(asked, self.batch):
            said, by = self.chat.say(self._inputs(chunk, picture), 4)
            replies += said
            margins += by
        return replies, margins

    def describe(self, picture: Any = None) -> tuple[dict[Any, str], float]:
        """Return a description of every picture, and tokens a second."""
        texts: dict[Any, str] = {}
        tokens, seconds = 0, 0.0
        for keys in _chunks(list(self.exam.pictures), self.batch):
            start = time.perf_counter()
            inputs = self._inputs([(key, self.exam.describe) for key in keys], picture)
            out = self.chat.generate(inputs, self.exam.max_new_tokens)
            synchronise(out.device)
            seconds += time.perf_counter() - start
            tokens += int((out[:, inputs["input_ids"].shape[1] :] != self.chat.pad).sum())
            texts |= dict(zip(keys, self.chat.texts(inputs, out), strict=True))
        return texts, tokens / seconds

    def _inputs(self, asked: Sequence[tuple[Any, str]], picture: Any) -> dict[str, Any]:
        shown = [self.exam.picture(key) for key, _ in asked]
        prompts = [prompt(self.processor, text, picture=True) for _, text in asked]
        return self.chat.inputs(prompts, [picture(item) for item in shown] if picture else shown)

    def _pairs(self, variant: Variant) -> mme.Mme:
        texts = [(key, text) for _, key, *both in self.exam.pairs for text in both]
        said, _ = self.ask(texts, variant.picture)
        answered = [
            mme.Pair(task, f"{key} {i}", said[2 * i], said[2 * i + 1]) for i, (task, key, *_) in enumerate(self.exam.pairs)
        ]
        return mme.score(answered)

    def _score(self, row: Outcome) -> None:
        for split, said in row.replies.items():
            truth = [question.answer for question in self.exam.of(split)]
            row.pope[split] = pope.score(truth, [self.exam.read(answer) for answer in said])
        if HARDEST in row.replies:
            asked = self.exam.of(HARDEST)
            said_yes = [yes for yes, q in zip(row.said_yes(self.exam), asked, strict=True) if not q.answer]
            row.interval = wilson(sum(said_yes), len(said_yes))
        exam, dimensions = self.exam, [split for split in row.replies if split in amber.DIMENSIONS.values()]
        if dimensions:
            asked = [question for split in dimensions for question in exam.of(split)]
            found = amber.discriminate(asked, [said for split in dimensions for said in row.replies[split]], exam.parse)
            row.amber |= {name: getattr(found.all, name) for name in ("accuracy", "precision", "recall", "f1")}
            row.dimensions = {name: asdict(figures) for name, figures in found.dimensions.items()}
        if row.descriptions:
            counts = amber.score(
                row.descriptions,
                exam.truth,
                exam.vocabulary,
                likely=exam.likely or None,
                associations=exam.associations,
                safe=exam.safe,
            )
            row.amber |= {name: getattr(counts, name) for name in ("chair", "cover", "hal", "cog")}
            if dimensions:
                row.amber["score"] = amber.amber_score(counts.chair, found.all.f1)
        if row.descriptions and not exam.associations:  # CHAIR knows classes and their synonyms alone
            row.chair = chair.score(row.descriptions, exam.truth, exam.vocabulary)
        if row.descriptions and HARDEST in row.replies:
            hardest = [question.answer for question in exam.of(HARDEST)]
            row.described = pope.score(hardest, row.mentioned(exam))


def _chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


# ---------------------------------------------------------------------------------------------------------- statistics


def _judge(rows: list[Outcome], exam: Exam) -> None:
    """Hold every row against the dense one."""
    dense = rows[0]
    before = _health(dense, exam)
    dense.alarms = collapsed(before, before)  # what is neither yes nor no is so without a recipe, too
    for row in rows[1:]:
        row.p = mcnemar(*(list(_right(r, exam).values()) for r in (dense, row)))
        row.hallucination = _rate_difference(dense.said_yes(exam), row.said_yes(exam), exam)
        if dense.described and row.described:
            first, second = dense.mentioned(exam), row.mentioned(exam)
            truth = [question.answer for question in exam.of(HARDEST)]
            row.described_p = mcnemar(*([a == b for a, b in zip(said, truth, strict=True)] for said in (first, second)))
            row.described_hallucination = _rate_difference(first, second, exam)
        row.chair_i = _chair_difference(dense, row)
        row.matched = matched_offset(dense, row, exam)
        row.alarms = collapsed(before, _health(row, exam))
    tested = [row for row in rows if row.kind == "recipe"]
    for name in ("p", "described_p"):
        made = [row for row in tested if not math.isnan(getattr(row, name))]
        for row, p in zip(made, holm([getattr(row, name) for row in made]), strict=True):
            setattr(row, "holm" if name == "p" else "described_holm", p)


def _right(row: Outcome, exam: Exam) -> dict[tuple[Any, str], bool]:
    """Whether each question was answered as it should be; splits ask for the same things that are there, and those count once."""
    found: dict[tuple[Any, str], bool] = {}
    for split in row.replies:
        asked = exam.of(split)
        for question, right in zip(asked, row.right(exam, split), strict=True):
            found.setdefault((question.image, question.text), right)
    return found


def _health(row: Outcome, exam: Exam) -> Health:
    return Health.of(list(row.descriptions.values()), _pooled(row, exam))


def _pooled(row: Outcome, exam: Exam) -> YesNo:
    """All splits together."""
    truth = [question.answer for split in row.replies for question in exam.of(split)]
    return pope.score(truth, [exam.read(said) for replies in row.replies.values() for said in replies])


def _rate_difference(first: Sequence[bool], second: Sequence[bool], exam: Exam) -> Delta:
    """Difference of hallucination rates on the hardest split, from who said yes, resampled over pictures."""
    asked = exam.of(HARDEST)
    by_image: dict[Any, list[tuple[bool, bool]]] = {}
    for question, *pair in zip(asked, first, second, strict=True):
        if not question.answer:
            by_image.setdefault(question.image, []).append((pair[0], pair[1]))

    def difference(items: Sequence[list[tuple[bool, bool]]]) -> float:
        pairs = np.array([pair for item in items for pair in item], dtype=float)
        return float((pairs[:, 1] - pairs[:, 0]).mean()) if len(pairs) else math.nan

    return Delta(*paired_bootstrap(difference, list(by_image.values())))


def _chair_difference(dense: Outcome, row: Outcome) -> Delta | None:
    if dense.chair is None or row.chair is None:
        return None
    counts = [
        [(len(r.hallucinated), len(r.mentions)) for r in pair] for pair in zip(dense.chair.rows, row.chair.rows, strict=True)
    ]

    def difference(items: Sequence[list[tuple[int, int]]]) -> float:
        sums = np.array(items, dtype=float).sum(0)
        return float(sums[1, 0] / sums[1, 1] - sums[0, 0] / sums[0, 1]) if (sums[:, 1] > 0).all() else math.nan

    return Delta(*paired_bootstrap(difference, counts))


def matched_offset(dense: Outcome, row: Outcome, exam: Exam) -> YesNo | None:
    """Score the dense model with its yes-logit shifted by one constant, so that it says yes as often as a row does.

    A patch that does no better than this has moved a threshold.
    """
    if HARDEST not in dense.margins or HARDEST not in row.margins:
        return None
    wanted = sum(row.said_yes(exam))
    margins = np.array(dense.margins[HARDEST])
    said_yes = np.zeros(len(margins), dtype=bool)
    said_yes[np.argsort(-margins, kind="stable")[:wanted]] = True
    truth = [question.answer for question in exam.of(HARDEST)]
    return pope.score(truth, said_yes.tolist())
