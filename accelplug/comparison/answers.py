"""The page of a vision-language comparison: figures beside stock's, the pictures on which answers changed, and how it was measured.

It has no script: every figure and picture is an element of the page.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelplug.comparison.charts import CHARTS_STYLE, charts
from accelplug.comparison.evaluators.evaluator import Question
from accelplug.comparison.exam import Exam
from accelplug.comparison.outcome import Outcome
from accelplug.comparison.rows import STOCK_ROW
from accelplug.show import as_definitions, as_elements, framed

CARDS = 6
"""How many changed answers of each kind, righted and broken, a row shows."""
THUMB = 224
"""Longer side of a picture on the page, in pixels."""

CARDS_STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 215px), 1fr)); gap: 14px; margin: 12px 0; }
.card { font-size: 14px; line-height: 1.4; }
.card img { border-radius: 6px; margin-bottom: 6px; max-height: 224px; }
.card dl { gap: 0 10px; }
.righted { border-top: 3px solid var(--accent); padding-top: 8px; }
.broken { border-top: 3px solid var(--bad); padding-top: 8px; }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 500; }
"""


def answers_page(
    model: str, exam: Exam, rows: Sequence[Outcome], environment: Mapping[str, Any], tables: Sequence[Any]
) -> str:
    """Return the page as text; `rows` are the stock model's and the others', `tables` are what shows them side by side."""
    alarms = [(row.name, alarm) for row in rows if row.kind == "recipe" for alarm in row.alarms]
    told = "".join(f'<p class="alarm"><b>{html.escape(name)}:</b> {html.escape(alarm)}</p>' for name, alarm in alarms)
    body = [
        f'<div class="soft">{html.escape(model)} on {html.escape(exam.name)}, {html.escape(_when(environment))}</div>',
        f"<h1>{html.escape(_verdict(rows))}</h1>",
        told,
        '<p class="soft">Dots are values; bars are 95 % intervals of the difference to stock, resampled over pictures. '
        "A bar that crosses the dashed line, stock, shows no difference. Controls, in grey: what a real effect must beat.</p>",
        charts(rows),
        *map(as_elements, tables),
        "<h2>Where answers changed</h2>",
        _changes(exam, rows),
        "<h2>Where this was measured</h2>",
        f'<div class="panel">{_measured_where(exam, rows, environment)}</div>',
    ]
    return framed(f"accelplug: {model} before and after", "\n".join(body), CHARTS_STYLE + CARDS_STYLE)


def _verdict(rows: Sequence[Outcome]) -> str:
    """Return what came of it in a sentence: which recipes are better, by the first figure that has intervals."""
    recipes = [row for row in rows if row.kind == "recipe"]
    found = {row.name: next((figure for figure in row.drawn() if figure.delta is not None), None) for row in recipes}
    measured = {name: figure for name, figure in found.items() if figure is not None}
    if not measured:
        return "What the model answers, stock and with each recipe" if recipes else "What the stock model answers"
    what = next(iter(measured.values())).name
    alarmed = {row.name for row in recipes if row.alarms}
    by_verdict: dict[str, list[str]] = {"better": [], "": [], "worse": []}
    for name, figure in measured.items():
        by_verdict[figure.verdict].append(name + (" (with an alarm)" if name in alarmed else ""))
    words = {"better": "better than stock", "": "no difference shown", "worse": "worse"}
    parts = [f"{words[key]}: {', '.join(names)}" for key, names in by_verdict.items() if names]
    return f"{what[:1].upper()}{what[1:]}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Change:
    """A question that a row answers otherwise than the stock model."""

    question: Question
    before: str
    after: str
    right_before: bool
    right_after: bool

    @property
    def kind(self) -> str:
        """Whether the row is right now, wrong now, or wrong in another way."""
        return "righted" if self.right_after else "broken" if self.right_before else ""


def changes(exam: Exam, stock: Outcome, row: Outcome) -> list[Change]:
    """Return the questions that a row answers otherwise than the stock model, each once, in the order of the exam."""
    found: dict[tuple[Any, str], Change] = {}
    for split in stock.said.replies:
        for question, before, after in zip(
            exam.of(split), stock.said.replies[split], row.said.replies.get(split, ()), strict=False
        ):
            read = exam.read(before), exam.read(after)
            if read[0] is not read[1]:
                right = (answer is question.answer for answer in read)
                found.setdefault((question.image, question.text), Change(question, before, after, *right))
    return list(found.values())


def _changes(exam: Exam, rows: Sequence[Outcome]) -> str:
    """The changed answers of each row but stock, righted and broken ones, each picture once a row."""
    stock, *others = rows
    shown: dict[Any, str] = {}
    parts = []
    for row in others:
        found = changes(exam, stock, row)
        count = {kind: sum(change.kind == kind for change in found) for kind in ("righted", "broken")}
        head = f"{row.name}: {count['righted']} righted, {count['broken']} broken"
        cards = "".join(_card(change, exam, shown) for kind in count for change in _chosen(found, kind))
        if row.kind == "recipe":
            parts.append(f'<details open><summary>{html.escape(head)}</summary><div class="cards">{cards}</div></details>')
        else:
            parts.append(f'<p class="soft">{html.escape(head)}</p>')
    return "\n".join(parts) or '<p class="soft">Nothing was compared with the stock model.</p>'


def _chosen(found: Sequence[Change], kind: str) -> list[Change]:
    """The first of a kind, of as many different pictures as there are."""
    first = {change.question.image: change for change in reversed([c for c in found if c.kind == kind])}
    return list(reversed(first.values()))[:CARDS]


def _card(change: Change, exam: Exam, shown: dict[Any, str]) -> str:
    key = change.question.image
    if key not in shown:
        shown[key] = _thumb(exam.picture(key))
    facts = {"truth": "yes" if change.question.answer else "no", STOCK_ROW: change.before, "recipe": change.after}
    told = "".join(
        f"<dt>{name}</dt><dd>{html.escape(value.strip()[:120]) or '(nothing)'}</dd>" for name, value in facts.items()
    )
    asked = html.escape(change.question.text)
    return f'<div class="card {change.kind}"><img alt="" src="{shown[key]}">{asked}<dl>{told}</dl></div>\n'


def _thumb(picture: Any) -> str:
    """A picture of PIL's as a small inlined WebP."""
    small = picture.copy()
    small.thumbnail((THUMB, THUMB))
    if max(small.size) < THUMB // 2:  # a tiny picture is shown larger, with its pixels
        small = small.resize((2 * small.width, 2 * small.height), 0)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _when(facts: Mapping[str, Any]) -> str:
    return ", ".join(str(facts[key]) for key in ("date", "device") if facts.get(key))


def _measured_where(exam: Exam, rows: Sequence[Outcome], environment: Mapping[str, Any]) -> str:
    facts: dict[str, Any] = {
        "exam": f"{exam.name}: {len(exam.questions)} questions on {len(exam.pictures)} pictures; truth: {exam.source or 'given'}",
        "answers": f"read {'as the release does' if exam.parse == 'official' else 'strictly: yes or no'}, greedy",
        "descriptions": f"{exam.describe!r}, at most {exam.max_new_tokens} tokens",
        **environment,
    }
    return as_definitions(facts | {f"note on {row.name}": "; ".join(row.notes) for row in rows})
