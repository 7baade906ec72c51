"""The page of a comparison on long texts: figures beside stock's, needle grids, what each layer keeps, and answers that changed.

It has no script: every figure is an element of the page.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelplug.comparison.charts import CHARTS_STYLE, charts
from accelplug.comparison.texts.context import TextItem
from accelplug.comparison.texts.exam import TextExam
from accelplug.comparison.texts.row import TextRow, by_task, needle_grid
from accelplug.show import as_definitions, as_elements, framed

SHOWN = 12
"""Changed answers that a row shows."""
TEXTS_STYLE = """
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 18px; }
.grids .panel { margin: 0; }
.heat td { text-align: center; min-width: 3.2em; border: 2px solid var(--panel); border-radius: 6px; }
.heat th { border: 0; white-space: nowrap; }
.strip { width: 100%; height: 22px; display: block; }
.strips { display: grid; grid-template-columns: minmax(90px, 11em) minmax(0, 1fr) minmax(8em, max-content); gap: 6px 12px; }
.strips { align-items: center; font-size: 14px; } .strips b { font-weight: 500; overflow-wrap: anywhere; }
@media (max-width: 560px) { .strips { grid-template-columns: 1fr; gap: 2px; } .strips .strip { margin-bottom: 8px; } }
"""


def texts_page(
    model: str,
    exam: TextExam,
    items: Sequence[TextItem],
    rows: Sequence[TextRow],
    environment: Mapping[str, Any],
    table: Any,
) -> str:
    """Return the page as text; `rows` are the stock model's and the others', `table` is what shows them side by side."""
    recipes = rows[1:]
    notes = "".join(
        f'<p class="soft"><b>{html.escape(row.name)}:</b> {html.escape(note)}</p>' for row in recipes for note in row.notes
    )
    lengths = ", ".join(f"{tokens:,}" for tokens in exam.tokens)
    where = ", ".join(str(environment[key]) for key in ("date", "device") if environment.get(key))
    body = [
        f'<div class="soft">{html.escape(model)} on prompts of {lengths} tokens, {html.escape(where)}</div>',
        f"<h1>{html.escape(_text_verdict(recipes))}</h1>",
        notes,
        '<p class="soft">Dots are values; bars are 95 % intervals of the difference to stock: resampled over questions and stretches of '
        "text, of times over contexts. A bar that crosses the dashed line, stock, shows no difference.</p>",
        charts(rows),
        _needle_grids(items, rows),
        _strips(recipes),
        "<h2>All figures</h2>",
        as_elements(table),
        _tasks(items, rows),
        "<h2>Where answers changed</h2>",
        "".join(_changed_answers(items, rows)) or '<p class="soft">Nowhere.</p>',
        "<h2>Where this was measured</h2>",
        f'<div class="panel">{_measured_on(exam, items, environment)}</div>',
    ]
    return framed(f"accelplug: {model} before and after", "\n".join(body), CHARTS_STYLE + TEXTS_STYLE)


def _text_verdict(recipes: Sequence[TextRow]) -> str:
    """What came of each recipe, in a sentence."""
    said = []
    for row in recipes[:3]:
        times = [figure for name, figure in row.figures.items() if name.startswith("first ")]
        parts = [f"first token {times[-1]}x as fast"]
        if (needle := row.figures.get("needle")) is not None:
            parts.append(f"needles {needle}")
        if (nll := row.figures.get("nll")) is not None and nll.delta is not None:
            parts.append(f"NLL {nll.delta.value:+.3f}")
        said.append(f"{row.name}: {', '.join(parts)}")
    return "; ".join(said) or "What the stock model finds"


def _needle_grids(items: Sequence[TextItem], rows: Sequence[TextRow]) -> str:
    """The needle grid of each row: depths down, lengths across."""
    parts = []
    for row in rows:
        if not (grid := needle_grid(items, row)):
            return ""
        lengths = sorted({tokens for _, tokens in grid})
        head = "".join(f"<th>{tokens:,}</th>" for tokens in lengths)
        lines = "".join(
            f"<tr><th>{depth:.0%}</th>" + "".join(_heat(grid[depth, tokens]) for tokens in lengths) + "</tr>"
            for depth in sorted({depth for depth, _ in grid})
        )
        table = f'<table class="heat"><thead><tr><th>depth</th>{head}</tr></thead><tbody>{lines}</tbody></table>'
        parts.append(f'<section class="panel scroll"><h3>{html.escape(row.name)}</h3>{table}</section>')
    said = "The share of needles that were found, by depth in the text and length of the prompt in tokens."
    return f'<h2>Needles</h2><p class="soft">{said}</p><div class="grids">{"".join(parts)}</div>'


def _heat(share: float) -> str:
    """A cell, the deeper in colour the higher its share."""
    ground = f"color-mix(in srgb, var(--accent) {round(55 * share)}%, var(--panel))"
    return f'<td style="background: {ground}">{share:.0%}</td>'


def _strips(recipes: Sequence[TextRow]) -> str:
    """What each recipe keeps of the attention, and how much it reads, layer by layer."""
    parts = []
    for row in recipes:
        reads = [(f"{tokens:,}", layers) for tokens, layers in row.layers.items()]
        reads += [(f"steps behind {tokens:,}", layers) for tokens, layers in row.steps_read.items()]
        for where, layers in reads:
            least = layers.least_kept
            if least is not None:
                parts.append(f"<b>{html.escape(row.name)}, {where}: kept</b>{_strip(layers.kept)}")
                parts.append(f"<span>least {least[0]:.3f}, layer {least[1]}</span>")
            parts.append(f"<b>{html.escape(row.name)}, {where}: read</b>{_strip(layers.density)}")
            parts.append(f"<span>mean {layers.mean_density:.3f}</span>")
    said = (
        "From the first layer, left, to the last. Kept: the share of the true attention that falls on what is read, of 16 exact rows of "
        "the prompt, and of steps behind it. Read: the share of the pairs of query and key. Full colour: all of it."
    )
    shown = (
        f'<h2>What is read, layer by layer</h2><p class="soft">{said}</p><div class="panel strips">{"".join(parts)}</div>'
    )
    return shown if parts else ""


def _strip(shares: Sequence[float | None]) -> str:
    """A row of cells, one a layer; a layer that reads all is full."""
    cells = "".join(
        f'<rect x="{i}" width=".92" height="1" fill="var(--accent)" fill-opacity="{1.0 if share is None else share:.3f}">'
        f"<title>layer {i}: {'all' if share is None else f'{share:.3f}'}</title></rect>"
        for i, share in enumerate(shares)
    )
    return f'<svg class="strip" viewBox="0 0 {len(shares)} 1" preserveAspectRatio="none" role="img">{cells}</svg>'


def _tasks(items: Sequence[TextItem], rows: Sequence[TextRow]) -> str:
    """Shares by task and length: a line each."""
    of = [by_task(items, row) for row in rows]
    head = "".join(f'<th class="figure">{html.escape(row.name)}</th>' for row in rows)
    lines = "".join(
        f"<tr><td>{html.escape(task)}, {tokens:,}</td>"
        + "".join(f'<td class="figure">{shares[task, tokens]:.0%}</td>' for shares in of)
        + "</tr>"
        for task, tokens in of[0]
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<h2>By task</h2><div class="panel scroll">{table}</div>' if lines else ""


def _changed_answers(items: Sequence[TextItem], rows: Sequence[TextRow]) -> Iterator[str]:
    """The references that a recipe finds and stock does not, or the other way round."""
    stock = rows[0].replies
    for row in rows[1:]:
        pairs = zip(items, stock, row.replies, strict=True)
        changed = [(item, before, after) for item, before, after in pairs if before.right is not after.right]
        right = sum(after.right for _, _, after in changed)
        head = f"{row.name}: {right} righted, {len(changed) - right} broken"
        lines = "".join(
            f"<tr><td>{html.escape(item.task)}</td><td>{html.escape(item.text.strip()[-90:])}</td>"
            f"<td>{html.escape(item.answer)}</td>{_said(before)}{_said(after)}</tr>"
            for item, before, after in changed[:SHOWN]
        )
        heads = "".join(f"<th>{head}</th>" for head in ("task", "asked", "reference", "stock", "recipe"))
        table = f'<div class="panel scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
        yield f"<details open><summary>{html.escape(head)}</summary>{table if changed else ''}</details>"


def _said(reply: Any) -> str:
    """What a row said, or whether it was the likeliest."""
    said = ("right" if reply.right else "wrong") if reply.said is None else reply.said[:80]
    return f"<td>{html.escape(said) or '(nothing)'}</td>"


def _measured_on(exam: TextExam, items: Sequence[TextItem], environment: Mapping[str, Any]) -> str:
    facts: Mapping[str, Any] = {
        "text": f"{exam.source}; {exam.suffix} tokens weighed behind each",
        "prompts": f"{len({item.context for item in items})} contexts, {len(items)} items; seed {exam.seed}",
        "tasks": ", ".join(exam.tasks),
        "asked": "each question in one prompt with its context"
        if exam.anew
        else "behind a context that was read without the question",
        **environment,
    }
    return as_definitions(facts)
