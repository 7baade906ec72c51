"""MME: two questions an image, one to be answered yes and one no; both right is what counts twice (arXiv 2306.13394)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from accelplug.comparison.evaluators.evaluator import Asked, Figure, Said
from accelplug.comparison.evaluators.statistics import ratio

HALLUCINATION = ("existence", "count", "position", "color")


@dataclass(frozen=True)
class TwoAnswers:
    """The answers to both questions about one image.

    Attributes
    ----------
    yes, no : what was said to the question whose truth is yes, and to the one whose truth is no.
    """

    task: str
    image: str | int
    yes: str
    no: str

    @property
    def right(self) -> tuple[bool, bool]:
        """Whether each was answered as it should be."""
        return read_start(self.yes) is True, read_start(self.no) is False


@dataclass(frozen=True)
class TaskScore:
    """Figures of one task; acc and acc_plus in percent, NaN without images.

    Attributes
    ----------
    n : images.
    unparsed : answers that are neither yes nor no; they are wrong.
    acc : questions answered right.
    acc_plus : images with both questions answered right.
    """

    n: int
    unparsed: int
    acc: float
    acc_plus: float

    @property
    def score(self) -> float:
        """Accuracy and accuracy+ together, at most 200."""
        return self.acc + self.acc_plus

    @classmethod
    def of(cls, pairs: list[TwoAnswers]) -> TaskScore:
        """Score the pairs of one task."""
        right = [pair.right for pair in pairs]
        return cls(
            n=len(pairs),
            unparsed=sum(read_start(answer) is None for pair in pairs for answer in (pair.yes, pair.no)),
            acc=100 * ratio(sum(map(sum, right)), 2 * len(right)),
            acc_plus=100 * ratio(sum(map(all, right)), len(right)),
        )


@dataclass(frozen=True)
class Mme:
    """Figures by the task's name, and their sums over groups of tasks."""

    tasks: dict[str, TaskScore]

    @property
    def hallucination(self) -> float:
        """Sum over existence, count, position and color, at most 800; NaN if one of them is missing."""
        return self.total(HALLUCINATION)

    def total(self, names: Iterable[str]) -> float:
        """Sum of scores; NaN if a task is missing, for a partial sum would look like a low one."""
        return sum(self.tasks[name].score if name in self.tasks else math.nan for name in names)


def read_start(answer: str) -> bool | None:
    """Read an answer as MME does: yes, else no, within its first four characters; None if neither is.

    "None" and "Now" are therefore no.
    """
    start = answer.strip().lower()[:4]
    return True if "yes" in start else False if "no" in start else None


def score(pairs: Iterable[TwoAnswers]) -> Mme:
    """Score pairs, task by task in the order of appearance."""
    tasks: defaultdict[str, list[TwoAnswers]] = defaultdict(list)
    for pair in pairs:
        tasks[pair.task].append(pair)
    return Mme({name: TaskScore.of(of_task) for name, of_task in tasks.items()})


class MmeEvaluator:
    """Pairs of questions, where the exam has some."""

    name, title = "mme", "pairs of questions: MME"

    def score(self, asked: Asked, said: Said) -> Mme | None:
        """See `Evaluator`."""
        if not said.pairs:
            return None
        asked_pairs = enumerate(zip(asked.pairs, said.pairs, strict=True))
        return score(TwoAnswers(task, f"{key} {i}", *both) for i, ((task, key, *_), both) in asked_pairs)

    def hold(self, asked: Asked, stock: Said, said: Said, before: Mme, figures: Mme) -> dict[str, float]:
        """See `Evaluator`; scores of tasks have no test."""
        return {}

    def columns(self, figures: Mme, holm: Mapping[str, float]) -> dict[str, str]:
        """See `Evaluator`."""
        return {"MME": f"{sum(task.score for task in figures.tasks.values()):.0f} of {200 * len(figures.tasks)}"}

    def drawn(self, figures: Mme) -> list[Figure]:
        """See `Evaluator`."""
        total = sum(task.score for task in figures.tasks.values())
        return [Figure(f"MME, of {200 * len(figures.tasks)}", total, "more", share=False)]

    def summary(self, figures: Mme | None, p: Mapping[str, float], holm: Mapping[str, float]) -> dict[str, Any]:
        """See `Evaluator`."""
        if figures is None:
            return {"mme": None, "mme_hallucination": None}
        tasks = {task: {**asdict(found), "score": found.score} for task, found in figures.tasks.items()}
        return {"mme": tasks, "mme_hallucination": figures.hallucination}
