"""How every result shows itself: one rendering for text, terminal and notebook; JSON; a page. And how work shows that it goes on."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelplug import files

TEXT_WIDTH = 150
"""Width of a table that is printed as text, where no terminal says how wide it is."""
NOTEBOOK_WIDTH = 110


class Shown:
    """Base of results. A subclass writes ``__rich__``: a table, or a Group of several; dataclasses are made with ``repr=False``."""

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data that JSON can hold; see `jsonable`."""
        names: list[str] = [f.name for f in dataclasses.fields(self)] if dataclasses.is_dataclass(self) else []
        return {name: jsonable(getattr(self, name)) for name in names}

    def to_json(self, path: str | Path) -> Path:
        """Write `to_dict` to a file.

        Raises
        ------
        AccelplugError
            If it cannot be written.
        """
        return files.write(path, json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n")

    def page(self) -> str:
        """Return one self-contained HTML page."""
        return framed(type(self).__name__, as_elements(self))

    def to_html(self, path: str | Path) -> Path:
        """Write `page` to a file.

        Raises
        ------
        AccelplugError
            If it cannot be written.
        """
        return files.write(path, self.page())


def as_text(renderable: Any) -> str:
    """Render as plain text, without a line's end."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=TEXT_WIDTH)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip("\n")


def as_html(renderable: Any) -> str:
    """Render for a notebook or a page."""
    from rich.console import Console

    console = Console(record=True, width=NOTEBOOK_WIDTH, file=io.StringIO())
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format="<pre style='font-family:monospace'>{code}</pre>")


def as_elements(renderable: Any) -> str:
    """Render as elements of a page: tables as tables, groups one under another, other text as paragraphs."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if hasattr(renderable, "__rich__"):
        return as_elements(renderable.__rich__())
    if isinstance(renderable, Group):
        return "\n".join(map(as_elements, renderable.renderables))
    if isinstance(renderable, Table):
        return _table_elements(renderable)
    if not isinstance(renderable, str | Text):
        return f"<pre>{html.escape(as_text(renderable))}</pre>"
    lines = "<br>".join(map(html.escape, _unmarked(renderable).split("\n")))
    return f"<p>{lines}</p>"


def _table_elements(table: Any) -> str:
    """A table of rich's as HTML, with its title and caption."""
    columns = [(column, [_unmarked(cell) for cell in column.cells]) for column in table.columns]
    align = [' class="figure"' if column.justify == "right" else "" for column, _ in columns]
    head = "".join(
        f"<th{side}>{html.escape(_unmarked(column.header))}</th>" for side, (column, _) in zip(align, columns, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(f'<td{side}>{html.escape(cell)}</td>' for side, cell in zip(align, cells, strict=True))}</tr>\n"
        for cells in zip(*(cells for _, cells in columns), strict=True)
    )
    title = f"<h2>{html.escape(_unmarked(table.title))}</h2>" if table.title else ""
    caption = f'<p class="soft">{html.escape(_unmarked(table.caption))}</p>' if table.caption else ""
    head = f"<thead><tr>{head}</tr></thead>" if table.show_header else ""
    return f'{title}<div class="panel scroll"><table>{head}<tbody>\n{body}</tbody></table></div>{caption}'


def _unmarked(cell: Any) -> str:
    """The text of a cell, a heading or a title, without its marks."""
    from rich.text import Text

    return Text.from_markup(cell).plain if isinstance(cell, str) else as_text(cell)


def framed(title: str, body: str, style: str = "") -> str:
    """Return a self-contained page, without scripts: light and dark, from 390 pixels on.

    Parameters
    ----------
    title : of the window, as text.
    body : elements.
    style : rules beside those of ``page.css``.
    """
    rules = Path(__file__).with_name("page.css").read_text(encoding="utf-8") + style
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>\n{rules}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def jsonable(value: Any) -> Any:
    """Return `value` as plain data that JSON can hold.

    NaN is None, an infinite number the text ``inf`` or ``-inf``; arrays and tensors are lists, dataclasses and mappings objects, and
    what is none of these is its text.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, Shown):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(jsonable, value), key=str)
    return jsonable(value.tolist()) if hasattr(value, "tolist") else str(value)


Tell = Callable[..., None]
"""``tell(done, now="")``: so much of the total is done, and this is done now."""


@contextmanager
def progress(what: str, total: float, show: bool = True) -> Iterator[Tell]:
    """Show how far work has come: a bar in a terminal, elsewhere a line on stderr for each thing that is done.

    Parameters
    ----------
    what : the work in a word, ``comparing``.
    total : how much there is to do, in any unit: runs, seconds.
    show : whether to show anything.

    Yields
    ------
    ``tell(done, now="")``.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if not show:
        yield lambda done, now="": None
    elif not console.is_terminal:
        yield _lines(what, total)
    else:
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done, now="": bar.update(task, completed=min(done, total), description=_line(what, now))


def _line(what: str, now: str) -> str:
    return f"{what}: {now}" if now else what


def _lines(what: str, total: float) -> Tell:
    last = ""

    def tell(done: float, now: str = "") -> None:
        nonlocal last
        line = _line(what, now)
        if line != last:  # of what is told often, each thing once
            print(f"[{min(done / total, 1.0) if total else 1.0:4.0%}] {line}", file=sys.stderr, flush=True)
        last = line

    return tell
