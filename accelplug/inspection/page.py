"""The page of where a vision-language model looks: what was asked, maps on the pictures, attention and heads by layer. It has no script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from accelplug.inspection import drawing
from accelplug.show import as_definitions, as_elements, framed

MAP_WIDTH = 320
"""Pixels of a map; a page has less room for it."""
STYLE = """
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(135px, 1fr)); gap: 14px; margin: 12px 0; }
.maps figure { margin: 0; font-size: 13px; line-height: 1.35; color: var(--soft); }
.maps img { width: 100%; border-radius: 6px; margin-bottom: 5px; }
.maps b { display: block; color: var(--ink); font-weight: 500; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 0 18px; align-items: start; }
.layer { display: grid; grid-template-columns: 1.6em minmax(0, 1fr); gap: 10px; align-items: center; font-size: 13px; }
.bar { display: flex; height: 14px; margin: 2px 0; }
.bar .head { flex: 1; margin-right: 1px; background: var(--accent); }
.bar .chosen { border-bottom: 3px solid var(--ink); }
.legend i { display: inline-block; width: 11px; height: 11px; margin-right: 5px; }
.legend span { margin-right: 14px; white-space: nowrap; }
"""


def looking_page(found: Any, ahead: str = "") -> str:
    """Return the page of a `VlmInspection` as text; `ahead` are elements that stand above its drawings."""
    title = f"Where {found.origin or found.model} looks"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<div class="panel">{as_definitions(found.facts())}</div>',
        ahead,
        "<h2>On the picture</h2>",
        f'<p class="soft">{html.escape(drawing.MAPS_SAID)} {html.escape(found.marks)}</p>',
        *(f'<div class="maps">{_maps(look)}</div>' for look in found.looks()),
        "<h2>In the model</h2>",
        f'<div class="sides">{_panel("Attention by layer", _legend(), _bars(found))}',
        f"{_panel('What the picture changes in each head', html.escape(drawing.HEADS_SAID), _cells_of_heads(found))}</div>",
        as_elements(found.table()),
    ]
    return framed(f"accelplug: {title}", "\n".join(body), STYLE)


def _maps(look: Mapping[str, Any]) -> str:
    """A picture, and maps of the attention to it."""
    maps, captions = drawing.heat_maps(**look, width=MAP_WIDTH)
    return "\n".join(
        f'<figure><img alt="" src="{drawing.inlined(drawn)}"><b>{html.escape(name)}</b>{html.escape(more)}</figure>'
        for drawn, (name, more) in zip(maps, captions, strict=True)
    )


def _panel(title: str, said: str, lines: Iterable[tuple[int, str]]) -> str:
    """A panel with a line for each layer."""
    drawn = "\n".join(f'<div class="layer">{layer}<div class="bar">{line}</div></div>' for layer, line in lines)
    return f'<section class="panel"><h3>{title}</h3><p class="soft">{said}</p>\n{drawn}</section>'


def _ink(name: str) -> str:
    return "background: rgb({}, {}, {})".format(*drawing.SPANS[name])


def _legend() -> str:
    spans = "".join(f'<span><i style="{_ink(name)}"></i>{name}</span>' for name in drawing.SPANS)
    return f'{html.escape(drawing.MASSES_SAID)}<br><span class="legend">{spans}</span>'


def _bars(found: Any) -> Iterator[tuple[int, str]]:
    """By layer: what the three spans get, one behind another."""
    for layer, *masses in zip(found.layers, *found.masses, strict=True):
        parts = (
            f'<i style="{_ink(name)}; width: {100 * mass:.1f}%" title="{name} {mass:.1%}"></i>'
            for name, mass in zip(drawing.SPANS, masses, strict=True)
        )
        yield layer, "".join(parts)


def _cells_of_heads(found: Any) -> Iterator[tuple[int, str]]:
    """By layer: a cell a head, as full as its divergence is large."""
    strength = found.vhd / max(float(found.vhd.max()), 1e-12)
    for layer, values, chosen in zip(found.layers, strength, found.vision_heads, strict=True):
        cells = (
            f'<i class="head{" chosen" * bool(marked)}" style="opacity: {0.08 + 0.92 * value:.2f}" title="head {head}"></i>'
            for head, (value, marked) in enumerate(zip(values, chosen, strict=True))
        )
        yield layer, "".join(cells)
