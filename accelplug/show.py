"""How every result shows itself: one rendering for text, terminal and notebook; JSON; a page. And how work shows that it goes on."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelplug import files

if TYPE_CHECKING:
    from rich.table import Table

TEXT_WIDTH = 150
"""Width of a table that is printed as text, where no terminal says how wide it is."""
NOTEBOOK_WIDTH = 110
AS_DATA: dict[str, Any] = {"force_terminal": False, "force_jupyter": False}
"""What is rendered is text: a notebook neither colours it nor shows it a second time."""


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

    @property
    def heading(self) -> str:
        """What stands above its page."""
        return type(self).__name__

    def page(self) -> str:
        """Return one self-contained HTML page."""
        return framed(f"accelplug: {self.heading}", f"<h1>{html.escape(self.heading)}</h1>\n{as_elements(self)}")

    def to_html(self, path: str | Path) -> Path:
        """Write `page` to a file.

        Raises
        ------
        AccelplugError
            If it cannot be written.
        """
        return files.write(path, self.page())


def table(title: str, *headings: str, names: bool = True, **more: Any) -> Table:
    """Return a table of rich's in which nothing is cut, its first column of `names` on one line each."""
    from accelplug.tables import WholeTable

    made = WholeTable(title=title, title_justify="left", caption_justify="left", **more)
    for heading in headings:
        made.add_column(heading, no_wrap=names and not made.columns, overflow="fold")
    return made


def as_text(renderable: Any) -> str:
    """Render as plain text, without spaces at the ends of lines."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=TEXT_WIDTH, **AS_DATA)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))


def as_html(renderable: Any) -> str:
    """Render for a notebook or a page."""
    from rich.console import Console

    console = Console(record=True, width=NOTEBOOK_WIDTH, file=io.StringIO(), **AS_DATA)
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


def as_definitions(facts: Mapping[str, Any]) -> str:
    """Render facts by their names as a list of a page; those that hold nothing are left out."""

    def said(value: Any) -> str:
        return ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, Mapping) else str(value)

    known = {name: value for name, value in facts.items() if value not in (None, "", {}, [])}
    lines = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(said(value))}</dd>" for name, value in known.items())
    return f"<dl>{lines}</dl>"


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
    words = _unmarked(table.title) if table.title else ""
    title = f"<h2>{html.escape(words[:1].upper() + words[1:])}</h2>" if words else ""
    lines = "<br>".join(map(html.escape, _unmarked(table.caption).split("\n"))) if table.caption else ""
    caption = f'<p class="soft">{lines}</p>' if lines else ""
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
"""``tell(done, now="", far="")``: so much of the total is done; this is done now, and so far it has come."""
PAUSE_S = 15.0
"""Seconds between two lines about one thing, where no terminal shows a bar."""


@contextmanager
def progress(what: str, total: float, show: bool = True) -> Iterator[Tell]:
    """Show how far work has come and what time is left: in a terminal by a bar, elsewhere by lines on stderr.

    There is a line for each thing that is done, and one every `PAUSE_S` seconds while it lasts.

    Parameters
    ----------
    what : the work in a word, ``comparing``.
    total : how much there is to do, in any unit: runs, seconds.
    show : whether to show anything.

    Yields
    ------
    ``tell(done, now="", far="")``.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console, begun = Console(file=sys.stderr), time.monotonic()

    def line(now: str, far: str) -> str:
        return f"{what}: {', '.join(filter(None, (now, far)))}" if now else what

    def left(done: float) -> str:
        seconds = (time.monotonic() - begun) * (total - done) / done if 0 < done < total else 0.0
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}:{rest:02} left" if seconds >= 1 else ""

    if not show:
        yield silent
    elif not console.is_terminal:
        yield _lines(total, line, left)
    else:
        columns = (BarColumn(bar_width=None), TaskProgressColumn(), TextColumn("{task.fields[left]}"))
        with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True, expand=True) as bar:
            task = bar.add_task(what, total=total, left="")
            yield lambda done, now="", far="": bar.update(
                task, completed=min(done, total), description=line(now, far), left=left(done)
            )


def silent(done: float, now: str = "", far: str = "") -> None:
    """Tell nobody."""


def _lines(total: float, line: Callable[[str, str], str], left: Callable[[float], str]) -> Tell:
    last, at = "", -math.inf

    def tell(done: float, now: str = "", far: str = "") -> None:
        nonlocal last, at
        if now == last and time.monotonic() - at < PAUSE_S:
            return
        last, at = now, time.monotonic()
        said = ", ".join(filter(None, (line(now, far), left(done))))
        print(f"[{min(done / total, 1.0) if total else 1.0:4.0%}] {said}", file=sys.stderr, flush=True)

    return tell
