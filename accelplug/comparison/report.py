"""The page: one self-contained HTML file made of `report.html` and the data of a comparison, or of a search.

Everything but the sentences and the table is drawn by the page's script, from one block of JSON.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelplug.comparison.result import DENSE, jsonable
from accelplug.tuning.budget import METRICS as BOUNDS

if TYPE_CHECKING:
    from accelplug.comparison.result import Comparison, Row
    from accelplug.tuning.result import Point, Tuned

TEMPLATE = Path(__file__).with_name("report.html")
MAX_SIDE = 384
"""Frames wider or higher than this are shrunk for the page, in pixels."""
LOSSLESS_PIXELS = 2_000_000
"""Clips of more pixels than this, over all frames, are embedded with loss: a page must open on a telephone."""
METRICS = {
    "fg_psnr_db": "foreground PSNR, dB",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "agreement": "agreement",
    "latent_distance": "distance of latents",
}
"""Attribute of a `Sample` -> what the page calls it."""


@dataclass
class Dot:
    """A point of the plot, and what is told of it.

    Attributes
    ----------
    label : a short name, for the plot.
    verdict : ``front``, ``tried``, ``proven`` or ``overturned``.
    worst, mean : quality over runs, on the plot's axis; mean is None where only the worst run is known.
    front : whether neither dense nor another one is both as fast and better.
    holds : whether it keeps the budget; True where there is none.
    facts : what, measured, foretold; as text, the last two may be empty.
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
class Axis:
    """The quality that is plotted: what it is called, the bound that it must keep, if any, and whether more is better."""

    name: str
    limit: float | None = None
    higher_is_better: bool = True


def page(comparison: Comparison, tuned: Tuned | None = None) -> str:
    """Return the page as text; with `tuned`, of all that its search ran. Clips are embedded as sprite sheets, one image a clip."""
    axis, dots = _of_comparison(comparison) if tuned is None else _of_search(tuned, comparison)
    shown = {DENSE, *(dot.name for dot in dots if tuned is None or dot.front or dot.verdict == "proven")}
    floors = [row for row in comparison.rows if row.kind == "floor" and tuned is None]
    data = {
        **comparison.to_dict(),
        "chosen": getattr(tuned.proven if tuned else comparison.best, "name", None),
        "notes": tuned.notes if tuned else (),
        "axis": asdict(axis),
        "dots": [asdict(dot) for dot in dots],
        "floors": [{"name": row.name, "worst": row.worst(comparison.metric)} for row in floors],
        "clips": [
            {"name": name, "prompt": prompt, "seed": seed, **sprite(clip)}
            for (name, prompt, seed), clip in comparison.clips.items()
            if name in shown
        ],
    }
    if tuned is None:
        table = _table(comparison.headings(), ((row.name, row.kind, comparison.cells(row)) for row in comparison.rows))
    else:
        table = _table(tuned.headings(), ((point.name, "recipe", tuned.cells(point)) for point in tuned.points))
    text = TEMPLATE.read_text(encoding="utf-8")
    for slot, filling in {
        "MODEL": html.escape(f"{comparison.model} on {comparison.environment.get('device', 'a device that was not noted')}"),
        "VERDICT": html.escape(tuned.why if tuned else comparison.verdict),
        "TIMED": html.escape(f"Timed {comparison.timed}." if tuned is None else _told(tuned)),
        "TABLE": table,
        # No "<" of the data may end the script or begin another.
        "DATA": json.dumps(jsonable(data)).replace("<", "\\u003c"),
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


# ------------------------------------------------------------------------------------------------------------- points


def _of_comparison(comparison: Comparison) -> tuple[Axis, list[Dot]]:
    """Every recipe and cache, by its worst run."""
    metric = comparison.metric
    dots = []
    for row in comparison.rows:
        worst = row.worst(metric)
        if row.kind not in ("recipe", "cache") or worst is None:
            continue
        gain, step = comparison.speedup(row), comparison.step_gain(row)
        facts = [("speed-up", _spread(gain.p20, gain.p50, gain.p80), _times(row.predicted))]
        if step is not None:
            facts.append(("in steps with patches", _spread(step.p20, step.p50, step.p80), _times(row.forward_predicted)))
        if row.mean_density is not None:
            facts.append(("density", f"{row.mean_density:.3f}", ""))
        facts += _qualities(row)
        facts += [("runs", str(len(row.samples)), ""), ("worst run", _worst_run(comparison, row, metric), "")]
        dots.append(
            Dot(row.name, row.name, row.kind, "tried", gain.p50, worst, row.mean(metric), False, True, facts, row.rules)
        )
    best = -math.inf
    for dot in sorted(dots, key=lambda dot: (-dot.speedup, -dot.worst)):
        if dot.speedup > 1 and dot.worst > best:
            best, dot.front, dot.verdict = dot.worst, True, "front"
    return Axis(METRICS[metric]), dots


def _of_search(tuned: Tuned, comparison: Comparison) -> tuple[Axis, list[Dot]]:
    """Every candidate that was run whole, by its worst run on the bound, or by its margin where there are several."""
    front = tuned.front
    single = tuned.bounds[0] if len(tuned.bounds) == 1 else None
    dots = []
    for point in tuned.points:
        told, row = point.foretold, comparison.row(point.name)
        margin = told.get("margin")
        density = told.get("density")
        facts = [
            ("speed-up", _times(point.speedup), _times(told.get("speedup"))),
            *(
                (f"worst {bound.name}, bound {bound.limit:g}", f"{point.worst[bound.name]:.2f}", "")
                for bound in tuned.bounds
            ),
            ("margin", f"{point.margin:+.2f}", "" if margin is None else f"{margin:+.2f}"),
            ("density", "", "" if density is None else f"{density:.3f}"),
            *_qualities(row),
            ("runs", str(point.runs), ""),
        ]
        if point.worst_run is not None:
            facts.append(("worst run", _run(comparison, *point.worst_run), ""))
        worst = point.worst[single.name] if single else point.margin
        name, told_as, holds = point.name, tuned.verdict(point), point.margin >= 0
        dots.append(
            Dot(name, _short(point), row.kind, told_as, point.speedup, worst, None, point in front, holds, facts, row.rules)
        )
    if single is None:
        return Axis("margin to the nearest bound", 0.0), dots
    attribute, _ = BOUNDS.get(single.name, (single.name, ""))
    return Axis(METRICS.get(attribute, single.name), single.limit, single.higher_is_better), dots


def _short(point: Point) -> str:
    """The patch and its first setting; the cache beside it is only named."""
    words = point.name.split(" + ")[0].split()[:2]
    beside = "cache" in point.recipe and point.recipe["rules"][-1]["patch"] != DENSE
    return " ".join(words) + (" + cache" if beside else "")


def _told(tuned: Tuned) -> str:
    spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in tuned.seconds.items())
    against = "Every speed-up is against a dense run of the same prompt and seed."
    return f"Budget: {tuned.budget}, on every run. {against} Spent: {spent}."


def _qualities(row: Row) -> list[tuple[str, str, str]]:
    """Worst value and mean of each metric that was measured."""
    found = []
    for metric, name in METRICS.items():
        worst, mean = row.worst(metric), row.mean(metric)
        if worst is not None and mean is not None:
            digits = 1 if name.endswith("dB") else 3
            found.append((name, f"{_plain(worst, digits)} worst, {_plain(mean, digits)} mean", ""))
    return found


def _worst_run(comparison: Comparison, row: Row, metric: str) -> str:
    worst = min((s for s in row.samples if getattr(s, metric) is not None), key=lambda s: getattr(s, metric))
    return _run(comparison, worst.prompt, worst.seed)


def _run(comparison: Comparison, prompt: int, seed: int) -> str:
    return f"seed {seed}, {comparison.prompts[prompt]}"


def _spread(low: float, middle: float, high: float) -> str:
    return f"{middle:.2f}x" + (f" ({low:.2f} to {high:.2f})" if low != high else "")


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _plain(value: float, digits: int) -> str:
    return "same" if math.isinf(value) else f"{value:.{digits}f}"


# -------------------------------------------------------------------------------------------------------------- table


def _table(headings: Sequence[str], lines: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """A table of text; each line is (name, kind, cells). Columns that are empty in every line are left out."""
    lines = list(lines)
    told = [any(cells[column] for _, _, cells in lines) for column in range(len(headings))]
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in compress(headings, told))
    body = ""
    for name, kind, cells in lines:
        line = "".join(f"<td>{html.escape(cell)}</td>" for cell in compress(cells, told))
        body += f'<tr class="{kind}" data-name="{html.escape(name)}">{line}</tr>\n'
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
