"""A table that is never cut: words stay whole, and what is too wide for a terminal is several tables, one under another."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table

LONGEST = 24
"""Letters of a word that may be broken, such as a path."""


class WholeTable(Table):
    """A table of rich's whose first column, of names, stands in each part; title and caption take all the room there is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield console.render_str(str(self.title), style="table.title", highlight=False)
        for columns in self._parts(console, options):
            part = copy(self)
            part.columns, part.title, part.caption = columns, None, None
            yield from Table.__rich_console__(part, console, options)
        if self.caption:
            yield console.render_str(str(self.caption), style="table.caption", highlight=False)

    def _parts(self, console: Console, options: ConsoleOptions) -> Iterator[list[Column]]:
        """Columns that fit beside each other."""
        spans = [self._span(console, options, column) for column in self.columns]
        beside: list[int] = []
        for number in range(len(spans)):
            if len(beside) > 1 and self._spare(options, [spans[i] for i in (*beside, number)]) < 0:
                yield self._fitted(options, beside, spans)
                beside = [0]
            beside.append(number)
        yield self._fitted(options, beside, spans)

    def _span(self, console: Console, options: ConsoleOptions, column: Column) -> tuple[int, int]:
        """Letters of a column's longest word, and of its longest line."""
        cells = [*([column.header] if self.show_header else []), *column.cells]
        found = [Measurement.get(console, options, cell) for cell in cells] or [Measurement(0, 0)]
        most = max(one.maximum for one in found)
        return most if column.no_wrap else min(max(one.minimum for one in found), max(LONGEST, most // 8)), most

    def _spare(self, options: ConsoleOptions, spans: list[tuple[int, int]]) -> int:
        """Letters that are left over where each column is as narrow as it can be."""
        _, right, _, left = self.padding
        lines = 0 if self.box is None else len(spans) + 1
        return options.max_width - lines - sum(least + left + right for least, _ in spans)

    def _fitted(self, options: ConsoleOptions, numbers: list[int], spans: list[tuple[int, int]]) -> list[Column]:
        """Columns with their widths: those that want little get it, the others share the room that is left."""
        spare, columns = (
            max(self._spare(options, [spans[i] for i in numbers]), 0),
            {i: copy(self.columns[i]) for i in numbers},
        )
        for place, i in enumerate(sorted(numbers, key=lambda i: spans[i][1] - spans[i][0])):
            least, most = spans[i]
            more = min(most - least, spare // (len(numbers) - place))
            columns[i].width, spare = least + more, spare - more
        return list(columns.values())
