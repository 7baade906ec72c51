"""What an evaluator is: one benchmark's way to score what a model said, and to show it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from accelplug.comparison.evaluators.vocabulary import Vocabulary

Image = TypeVar("Image", str, int)
"""What images go by: names or numbers."""
Parse = Literal["strict", "official"]
"""How answers are read; see `pope.read_yes_no`."""


@dataclass(frozen=True)
class Question:
    """One question about one image: is the thing there."""

    image: str | int
    text: str
    answer: bool
    thing: str
    split: str


class Asked(Protocol):
    """What evaluators read of an `Exam`."""

    @property
    def truth(self) -> Mapping[Any, Collection[str]]: ...
    @property
    def splits(self) -> list[str]: ...
    @property
    def pairs(self) -> tuple[tuple[str, Any, str, str], ...]: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def likely(self) -> Mapping[Any, Collection[str]]: ...
    @property
    def associations(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def safe(self) -> frozenset[str]: ...
    @property
    def parse(self) -> Parse: ...

    def of(self, split: str) -> list[Question]:
        """The questions of a split."""

    def read(self, answer: str) -> bool | None:
        """Read an answer: True for yes, False for no, None for neither."""


@dataclass
class Said:
    """What a model answered in an exam.

    Attributes
    ----------
    replies : by split, the answers as text; margins : logit of yes over that of no, at the first answered token.
    pairs : the answers to both questions of each of the exam's pairs.
    descriptions : by picture.
    """

    replies: dict[str, list[str]] = field(default_factory=dict)
    margins: dict[str, list[float]] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    descriptions: dict[Any, str] = field(default_factory=dict)


@dataclass
class Delta:
    """A difference to stock with its 95 % interval, resampled over pictures."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "" if math.isnan(self.value) else f"{self.value:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


@dataclass(frozen=True)
class Figure:
    """A figure of one row, as a page draws it.

    Attributes
    ----------
    name : with the unit; better : ``less`` or ``more``, empty where neither is.
    delta : to the stock model; None for that one, and where nothing was resampled.
    share : whether the value is a share, shown in percent; else with so many `digits`.
    """

    name: str
    value: float
    better: Literal["less", "more", ""] = ""
    delta: Delta | None = None
    share: bool = True
    digits: int = 2

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference to stock, around the value: it holds the stock value where nothing differs."""
        if self.delta is None:
            return self.value, self.value
        stock = self.value - self.delta.value
        return stock + self.delta.low, stock + self.delta.high

    @property
    def difference(self) -> str:
        """The difference to stock with its interval, as the value is written; empty where there is none."""
        if self.delta is None or math.isnan(self.delta.value) or self.share:
            return str(self.delta or "")
        value, low, high = (f"{x:+,.{self.digits}f}" for x in (self.delta.value, self.delta.low, self.delta.high))
        return f"{value} ({low} to {high})"

    @property
    def verdict(self) -> Literal["better", "worse", ""]:
        """What the interval says beside stock; empty where it holds no difference, or nothing was resampled."""
        if self.delta is None or not self.better or not (self.delta.low > 0 or self.delta.high < 0):
            return ""
        return "better" if (self.delta.low > 0) == (self.better == "more") else "worse"

    def __str__(self) -> str:
        digits = 0 if abs(self.value) >= 100 else self.digits
        return "" if math.isnan(self.value) else f"{self.value:.1%}" if self.share else f"{self.value:,.{digits}f}"


class Evaluator(Protocol):
    """Scores what was said, holds it against what the stock model said, and gives columns of the table and figures for the JSON.

    Figures are of the evaluator's own kind, None where the exam asks for none of it.
    """

    name: str
    title: str
    """Of its table."""

    def score(self, asked: Asked, said: Said) -> Any:
        """Return the figures of a row, or None."""

    def hold(self, asked: Asked, stock: Said, said: Said, before: Any, figures: Any) -> dict[str, float]:
        """Put differences to the stock model, which said `stock` and has the figures `before`, into a row's figures.

        Return p-values by name; they are corrected for the number of rows.
        """

    def columns(self, figures: Any, holm: Mapping[str, float]) -> dict[str, str]:
        """Return cells by their headings, with the corrected p-values at hand."""

    def drawn(self, figures: Any) -> list[Figure]:
        """Return what a page draws, the most telling first."""

    def summary(self, figures: Any, p: Mapping[str, float], holm: Mapping[str, float]) -> dict[str, Any]:
        """Return the figures as plain data, under the keys that they have in the JSON; of None too."""
