"""The page: one self-contained HTML file made of `report.html` and the data of a result.

Everything but the sentences and the table is drawn by the page's script, from one block of JSON.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelplug.show import as_elements, jsonable

if TYPE_CHECKING:
    from rich.table import Table

PAGE_TEMPLATE = Path(__file__).with_name("report.html")
MAX_SIDE = 384
"""Frames wider or higher than this are shrunk for the page, in pixels."""
LOSSLESS_PIXELS = 2_000_000
"""Clips of more pixels than this, over all frames, are embedded with loss: a page must open on a telephone."""


@dataclass
class Dot:
    """A point of the plot, and what is said about it.

    Attributes
    ----------
    label : a short name, for the plot.
    verdict : ``front``, ``tried``, ``proven`` or ``overturned``.
    worst, mean : quality over runs, on the plot's axis; mean is None where only the worst run is known.
    front : whether neither dense nor another one is both as fast and better.
    holds : whether it keeps the budget; True where there is none.
    facts : what, measured, predicted; as text, the last two may be empty.
    rules : the recipe as text for people.
    """

    name: str
    label: str
    kind: str
    verdict: str
    speedup: float
    worst: float
    mean: float | None
    front: bool
    holds: bool
    facts: list[tuple[str, str, str]]
    rules: str


@dataclass
class PlotAxis:
    """The quality that is plotted: what it is called, the bound that it must keep, if any, and whether more is better."""

    name: str
    limit: float | None = None
    higher_is_better: bool = True


def page(
    subject: str,
    verdict: str,
    timed: str,
    data: Mapping[str, Any],
    *,
    axis: PlotAxis,
    dots: Sequence[Dot],
    clips: Mapping[tuple[str, int, int], np.ndarray],
    headings: Sequence[str],
    lines: Iterable[tuple[str, str, Sequence[str]]],
    more: Sequence[Table] = (),
) -> str:
    """Return the page as text. Clips are embedded as sprite sheets, one image a clip.

    Parameters
    ----------
    subject, verdict, timed : what was run where, what came of it, and what the times include, in words.
    data : what else the page's script reads: ``prompts``, ``seeds``, ``settings``, ``environment``, ``rows``, ``notes``, ``floors``,
        and ``chosen``, the name of the dot that is shown first.
    axis, dots : the plot.
    clips : (name, prompt, seed) -> uint8 (F, H, W, 3), dense ones among them.
    headings, lines : the table; each line is (name, kind, cells).
    more : tables below it.
    """
    sheets = [{"name": name, "prompt": prompt, "seed": seed, **sprite(clip)} for (name, prompt, seed), clip in clips.items()]
    told = {**data, "axis": axis, "dots": dots, "clips": sheets}
    text = PAGE_TEMPLATE.read_text(encoding="utf-8")
    for slot, filling in {
        "MODEL": html.escape(subject),
        "VERDICT": html.escape(verdict),
        "TIMED": html.escape(timed),
        "TABLE": _table(headings, lines) + "".join(map(as_elements, more)),
        # No "<" of the data may end the script or begin another.
        "DATA": json.dumps(jsonable(told)).replace("<", "\\u003c"),
    }.items():
        text = text.replace(f"<!--{slot}-->", filling)
    return text


def sprite(clip: np.ndarray) -> dict[str, Any]:
    """Return a clip (F, H, W, 3) uint8 as one WebP image with its frames in rows, and how to cut it."""
    from PIL import Image

    frames, height, width, _ = clip.shape
    shrink = max(1.0, max(height, width) / MAX_SIDE)
    height, width = round(height / shrink), round(width / shrink)
    columns = math.ceil(math.sqrt(frames * height / width))  # nearly square: WebP ends at 16,383 pixels a side
    sheet = Image.new("RGB", (columns * width, -(-frames // columns) * height))
    for index, pixels in enumerate(clip):
        frame = Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)
        sheet.paste(frame, (index % columns * width, index // columns * height))
    file = io.BytesIO()
    sheet.save(file, "WEBP", lossless=frames * height * width <= LOSSLESS_PIXELS, quality=88)
    source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return {"frames": frames, "height": height, "width": width, "columns": columns, "source": source}


def filled_columns(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Leave out the columns that are empty in every line."""
    kept = [any(cells[column] for cells in lines) for column in range(len(headings))]
    return list(compress(headings, kept)), [list(compress(cells, kept)) for cells in lines]


def _table(headings: Sequence[str], lines: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """A table of text; each line is (name, kind, cells). Columns that are empty in every line are left out."""
    lines = list(lines)
    headings, filled = filled_columns(headings, [cells for _, _, cells in lines])
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in headings)
    body = ""
    for (name, kind, _), cells in zip(lines, filled, strict=True):
        line = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body += f'<tr class="{kind}" data-name="{html.escape(name)}">{line}</tr>\n'
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
