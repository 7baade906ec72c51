"""Before and after on long texts: what recipes do to what a language model finds in a context, to its time and to its memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from accelplug import show
from accelplug.chat import tokenizer_of
from accelplug.comparison.environment import environment
from accelplug.comparison.evaluators.evaluator import Figure
from accelplug.comparison.rows import STOCK_ROW, Variant
from accelplug.comparison.texts.context import Context, TextItem
from accelplug.comparison.texts.exam import TextExam
from accelplug.comparison.texts.page import texts_page
from accelplug.comparison.texts.reader import ContextReader
from accelplug.comparison.texts.row import LayerReads, TextRow, by_task, needle_grid
from accelplug.comparison.texts.scores import TEXT_METRICS
from accelplug.errors import AccelplugError
from accelplug.plug import apply
from accelplug.show import Shown, jsonable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

LOOKED_AT = 4
"""Steps behind a context of which it is told what they read."""
WARM = 256
"""Tokens that are read ahead of the first context, so that its time is not that of a first call."""


@dataclass(repr=False)
class TextComparison(Shown):
    """What `compare` found on a language model. Prints as a table; writes JSON or a page.

    Attributes
    ----------
    items : all that is scored, in the order of each row's replies.
    rows : the stock model's first.
    """

    model: str
    exam: TextExam
    items: list[TextItem]
    rows: list[TextRow]
    environment: dict[str, Any]

    def __getitem__(self, name: str) -> TextRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise AccelplugError(f"There is no row {name!r}; there are {', '.join(row.name for row in self.rows)}.")

    def table(self) -> Table:
        """Return the rows side by side: a line a figure."""
        from rich.table import Table

        columns = [dict(self._cells(row)) for row in self.rows]
        title = f"{self.model} on {self.exam.source}, seed {self.exam.seed}"
        table = Table("", *(row.name for row in self.rows), title=title, title_justify="left")
        for what in dict.fromkeys(what for cells in columns for what in cells):
            table.add_row(what, *(cells.get(what, "") for cells in columns))
        return table

    def _cells(self, row: TextRow) -> Iterator[tuple[str, str]]:
        for name in TEXT_METRICS:
            if (figure := row.figures.get(name)) is not None:
                yield figure.name, f"{figure}  {figure.difference}".strip()
        for tokens in dict.fromkeys(length for length, _ in row.readings):
            seconds = statistics.median(reading.first_s for reading in row.of(tokens))
            yield f"first token at {tokens:,}", f"{seconds:.2f} s{_faster(row.figures[f'first {tokens}'])}"
            for what in ("kv", "peak"):
                if (figure := row.figures.get(f"{what} {tokens}")) is not None:
                    yield figure.name, f"{figure.value:,.1f}" if figure.value < 100 else f"{figure.value:,.0f}"
            for what, kept, reads in (
                ("pairs read", "attention kept", row.layers),
                ("keys read by a step", "attention kept by a step", row.steps_read),
            ):
                if (layers := reads.get(tokens)) is not None:
                    yield f"{what} at {tokens:,}", f"{layers.mean_density:.3f}"
                    yield f"{kept} at {tokens:,}", "" if math.isnan(layers.mean_kept) else f"{layers.mean_kept:.3f}"
        if row.steps:
            yield "a token", f"{1e3 * statistics.median(row.steps):.1f} ms{_faster(row.figures['step'])}"

    def __rich__(self) -> Group:
        from rich.console import Group

        return Group(self.table(), *(f"{row.name}: {note}" for row in self.rows for note in row.notes))

    def page(self) -> str:
        """Return one self-contained HTML page."""
        return texts_page(self.model, self.exam, self.items, self.rows, self.environment, self.table())

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, the settings of the exam and the environment; no answers."""
        rows = [
            {
                "name": row.name,
                "kind": row.kind,
                "figures": row.figures,
                "needle": {f"depth {depth:g}, {n}": share for (depth, n), share in needle_grid(self.items, row).items()},
                "tasks": {f"{task}, {n}": share for (task, n), share in by_task(self.items, row).items()},
                "contexts": {
                    key: {name: value for name, value in vars(reading).items() if name != "replies"}
                    for (_, key), reading in row.readings.items()
                },
                "layers": row.layers,
                "steps_read": row.steps_read,
                "notes": row.notes,
            }
            for row in self.rows
        ]
        return jsonable({"model": self.model, "exam": self.exam, "environment": self.environment, "rows": rows})


def compare_texts(
    model: Any, recipes: Mapping[str, Any] | Sequence[Variant], exam: TextExam, processor: Any, *, progress: bool = True
) -> TextComparison:
    """Examine a language model stock and with recipes, on the same contexts, by turns; see `ContextReader` for how.

    Parameters
    ----------
    model : a transformers language model; it is left as it was.
    recipes : by name, anything that `accelplug.apply` takes; or variants.
    exam : what is asked.
    processor : the model's tokenizer, or a processor that has one.

    Raises
    ------
    AccelplugError
        If the exam's text is too short.
    UnsupportedError
        If a recipe needs a prompt in one piece: ask with ``anew=True``.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    contexts = exam.contexts(tokenizer_of(processor), longest)
    reader = ContextReader(model, processor, contexts, exam.anew)
    named = [Variant(name, recipe) for name, recipe in recipes.items()] if isinstance(recipes, Mapping) else list(recipes)
    variants = [Variant(STOCK_ROW, kind=STOCK_ROW), *named]
    rows = {variant.name: TextRow(variant.name, variant.kind) for variant in variants}
    first = {context.tokens: context for context in reversed(contexts)}
    looks = list(product((first[tokens] for tokens in sorted(first)), named))
    reads = list(product(contexts, variants))
    with show.progress("reading", len(looks) + len(reads), progress) as tell:
        reader.warm(contexts[0].ids[:WARM])
        for done, (context, variant) in enumerate(looks):
            tell(done, f"{variant.name}: what it reads of {context.tokens:,} tokens")
            row = rows[variant.name]
            row.layers[context.tokens], row.steps_read[context.tokens] = layer_reads(reader, context, variant)
        for done, (context, variant) in enumerate(reads, len(looks)):
            tell(done, f"{variant.name}: {context.key.split()[0]} of {context.tokens:,} tokens")
            with _with_recipe(reader, variant) as plug:
                rows[variant.name].readings[context.tokens, context.key] = reader.read(context)
                if plug is not None:
                    rows[variant.name].note(plug.report())
    items = [item for context in contexts for item in context.items]
    stock, *_ = rows.values()
    for row in rows.values():
        row.hold(stock, items)
    return TextComparison(type(model).__name__, exam, items, list(rows.values()), environment(model))


def layer_reads(reader: ContextReader, context: Context, variant: Variant) -> tuple[LayerReads, LayerReads]:
    """Return what a recipe reads of a context, and in steps behind it, from one more reading, which is not timed."""
    with _with_recipe(reader, variant) as plug, plug.trace() as events:
        reader.warm(context.ids, LOOKED_AT)
    depth = reader.model.config.get_text_config().num_hidden_layers
    return LayerReads.of(events, depth, "prefill"), LayerReads.of(events, depth, "decode")


def _faster(figure: Figure) -> str:
    """How many times as fast as stock, with its interval."""
    low, high = figure.interval
    return "" if figure.delta is None else f", {figure}x ({low:.2f} to {high:.2f})"


def _with_recipe(reader: ContextReader, variant: Variant) -> Any:
    if variant.recipe is None:
        return nullcontext()
    return apply(reader.model, variant.recipe, gate="off", processor=reader.processor)
