"""What a vision-language model answered, what it is worth, and whether a row differs from the dense one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from accelplug.comparison.evaluators import chair, mme, pope
from accelplug.comparison.evaluators.statistics import Health, YesNo, collapsed, holm, mcnemar, paired_bootstrap, shifted
from accelplug.comparison.exam import Exam

HARDEST = "adversarial"
"""The split whose hallucination rate is reported first."""


@dataclass
class Delta:
    """A difference to dense with its 95 % interval, resampled over pictures."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "" if math.isnan(self.value) else f"{self.value:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


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


def hold_against_dense(rows: list[Outcome], exam: Exam) -> None:
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
        if HARDEST in dense.margins and HARDEST in row.margins:
            truth = [question.answer for question in exam.of(HARDEST)]
            row.matched = pope.score(truth, shifted(dense.margins[HARDEST], sum(row.said_yes(exam))))
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
