"""What a vision-language model answered, what it is worth, and whether a row differs from the stock one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from accelplug.comparison.environment import memory_heading
from accelplug.comparison.evaluators import EVALUATORS
from accelplug.comparison.evaluators.evaluator import Figure, Said
from accelplug.comparison.evaluators.pope import pooled
from accelplug.comparison.evaluators.statistics import Health, collapsed, holm
from accelplug.comparison.exam import Exam


@dataclass
class Outcome:
    """One row: what was answered, and what it is worth.

    Attributes
    ----------
    figures : by evaluator, for those that the exam asks for: ``row.figures["pope"].splits["adversarial"].mcc``.
    p, holm : by test, ``questions`` and ``described``: the p-value against stock, and corrected over all recipes; see `PopeEvaluator`.
    tokens_per_s : over all descriptions, prompts included.
    peak_mib : most memory meanwhile; None where the system does not tell.
    alarms : signs that fewer errors come from saying less.
    """

    name: str
    kind: str
    said: Said = field(default_factory=Said)
    figures: dict[str, Any] = field(default_factory=dict)
    p: dict[str, float] = field(default_factory=dict)
    holm: dict[str, float] = field(default_factory=dict)
    tokens_per_s: float = math.nan
    peak_mib: float | None = None
    alarms: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def score(self, exam: Exam) -> None:
        """Have every evaluator score what was said."""
        found = {evaluator.name: evaluator.score(exam, self.said) for evaluator in EVALUATORS}
        self.figures = {name: figures for name, figures in found.items() if figures is not None}

    def cells(self) -> dict[str, dict[str, str]]:
        """Return its line of each table: by the title, then by heading; empty where something was not asked."""
        cells = {
            tool.title: tool.columns(self.figures[tool.name], self.holm) for tool in EVALUATORS if tool.name in self.figures
        }
        speed = {} if math.isnan(self.tokens_per_s) else {"tokens a second": f"{self.tokens_per_s:.0f}"}
        memory = {} if self.peak_mib is None else {memory_heading(): f"{self.peak_mib:.0f}"}
        return cells | {"speed of descriptions, prompts included": speed, "memory": memory}

    def drawn(self) -> list[Figure]:
        """What a page draws: the figures of all evaluators, and speed."""
        found = [
            figure for tool in EVALUATORS if tool.name in self.figures for figure in tool.drawn(self.figures[tool.name])
        ]
        return [*found, Figure("tokens a second", self.tokens_per_s, "more", share=False)]

    def summary(self) -> dict[str, Any]:
        """Return the figures, without the texts."""
        data: dict[str, Any] = {"name": self.name, "kind": self.kind}
        for evaluator in EVALUATORS:
            data |= evaluator.summary(self.figures.get(evaluator.name), self.p, self.holm)
        return data | {
            "tokens_per_s": self.tokens_per_s,
            "peak_mib": self.peak_mib,
            "alarms": self.alarms,
            "notes": self.notes,
        }


def hold_against_stock(rows: list[Outcome], exam: Exam) -> None:
    """Hold every row against the first, the stock model."""
    stock = rows[0]
    before = _health(stock, exam)
    stock.alarms = collapsed(before, before)  # what is neither yes nor no is so without a recipe, too
    for row in rows[1:]:
        for evaluator in EVALUATORS:
            if (name := evaluator.name) in stock.figures and name in row.figures:
                row.p |= evaluator.hold(exam, stock.said, row.said, stock.figures[name], row.figures[name])
        row.alarms = collapsed(before, _health(row, exam))
    tested = [row for row in rows if row.kind == "recipe"]
    for test in dict.fromkeys(test for row in tested for test in row.p):
        made = [row for row in tested if test in row.p]
        for row, p in zip(made, holm([row.p[test] for row in made]), strict=True):
            row.holm[test] = p


def _health(row: Outcome, exam: Exam) -> Health:
    return Health.of(list(row.said.descriptions.values()), pooled(exam, row.said))
