"""How results are shown: as text, in a terminal, in a notebook, from one rich rendering."""

from __future__ import annotations

import io
from typing import Any

WIDTH = 150
"""Columns of a table that is printed as text, where no terminal says how many there are."""


class Shown:
    """Base of results that rich can render: ``print``, the prompt and a notebook show that rendering, not the data."""

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def as_text(renderable: Any) -> str:
    """Render as plain text."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=WIDTH)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def as_html(renderable: Any) -> str:
    """Render for a notebook."""
    from rich.console import Console

    console = Console(record=True, width=110, file=io.StringIO())
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format="<pre style='font-family:monospace'>{code}</pre>")
