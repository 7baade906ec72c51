"""Charts of a page without scripts: a line a row, dots with their intervals, and a dashed line at what they are held against."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from accelplug.comparison.evaluators.evaluator import Figure
from accelplug.comparison.rows import STOCK_ROW

CHARTS_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 18px; }
.charts .panel { margin: 0; }
.line { display: grid; grid-template-columns: minmax(80px, 9em) minmax(0, 1fr) 4.5em; gap: 10px; align-items: center; }
.line { font-size: 14px; padding: 3px 0; }
.line b { font-weight: 500; overflow-wrap: anywhere; line-height: 1.25; }
.line.control { color: var(--soft); }
.line span { text-align: right; font-variant-numeric: tabular-nums; }
.track { position: relative; height: 18px; color: var(--accent); }
.track { background: linear-gradient(var(--line), var(--line)) center / 100% 1px no-repeat; }
.control .track { color: var(--soft); }
.track i { position: absolute; top: 0; bottom: 0; border-left: 1px dashed var(--soft); }
.track u { position: absolute; top: 7px; height: 4px; border-radius: 2px; background: currentColor; opacity: .4; }
.track s { position: absolute; top: 4px; width: 10px; height: 10px; margin-left: -5px; border-radius: 50%; background: currentColor; }
"""


@dataclass(frozen=True)
class Mark:
    """A line of a chart.

    Attributes
    ----------
    name, kind : of the row; ``control`` is drawn in grey.
    value, low, high : the dot and its interval, NaN where there is none.
    text : the value as it is written; said : all there is to say of it, for who points at it.
    """

    name: str
    kind: str
    value: float
    low: float
    high: float
    text: str
    said: str = ""


def chart(title: str, hint: str, marks: Sequence[Mark], reference: float = math.nan) -> str:
    """Return one panel.

    Parameters
    ----------
    title, hint : what is drawn, and which way is better.
    marks : those without a finite value are left out.
    reference : where the dashed line stands; NaN for none.
    """
    marks = [mark for mark in marks if math.isfinite(mark.value)]
    ends = [x for mark in marks for x in (mark.value, mark.low, mark.high, reference) if math.isfinite(x)] or [0.0]
    low, high = min(ends), max(ends)
    room = 0.08 * (high - low) or 0.5 * abs(high) or 0.5
    left, whole = low - room, high - low + 2 * room

    def share(length: float) -> str:
        return f"{100 * length / whole:.2f}%"

    line = f'<i style="left: {share(reference - left)}"></i>' if math.isfinite(reference) else ""
    lines = ""
    for mark in marks:
        bar = (
            f'<u style="left: {share(mark.low - left)}; width: {share(mark.high - mark.low)}"></u>'
            if mark.high > mark.low
            else ""
        )
        track = f'<div class="track">{line}{bar}<s style="left: {share(mark.value - left)}"></s></div>'
        said, name = html.escape(mark.said or f"{mark.name}: {mark.text}"), html.escape(mark.name)
        lines += (
            f'<div class="line {mark.kind}" title="{said}"><b>{name}</b>{track}<span>{html.escape(mark.text)}</span></div>\n'
        )
    return f'<section class="panel"><h3>{html.escape(title)} <span class="soft">{html.escape(hint)}</span></h3>\n{lines}</section>'


class Drawn(Protocol):
    """A row that has figures to draw."""

    name: str
    kind: str

    def drawn(self) -> list[Figure]:
        """Return them, the most telling first."""


def charts(rows: Sequence[Drawn]) -> str:
    """Return a chart for each figure, of all rows that have it; the dashed line is the stock model's."""
    by_name: dict[str, list[tuple[Drawn, Figure]]] = {}
    for row in rows:
        for figure in row.drawn():
            by_name.setdefault(figure.name, []).append((row, figure))
    parts = []
    for name, held in by_name.items():
        marks = [
            Mark(row.name, row.kind, f.value, *f.interval, str(f), f"{row.name}: {f} {f.difference}".strip())
            for row, f in held
        ]
        better = held[0][1].better
        stock = next((figure.value for row, figure in held if row.name == STOCK_ROW), math.nan)
        parts.append(chart(name, f"{better} is better" if better else "", marks, stock))
    return f'<div class="charts">{"".join(parts)}</div>'
