"""Comparisons of models that answer in one forward: every recipe is forced and timed between dense forwards, on one case at a time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

from accelplug.comparison.environment import timed_runs
from accelplug.comparison.rows import DENSE_ROW
from accelplug.errors import AccelplugError
from accelplug.hosts.gate import Verdict
from accelplug.plug import apply
from accelplug.recipe import Recipe
from accelplug.show import table

if TYPE_CHECKING:
    import torch
    from rich.console import Group
    from rich.table import Table

    from accelplug.hosts.ledger import Event

FromForward = TypeVar("FromForward")

REPEATS = 3
"""Timed forwards of every case with every recipe, beside as many dense ones ahead of them and behind them."""


@dataclass
class OnCase:
    """One row on one case.

    Attributes
    ----------
    ms : milliseconds of each timed forward; `dense_ms` of dense ones around them.
    """

    ms: list[float]
    dense_ms: list[float]

    @property
    def gain(self) -> float:
        """How much faster than dense, by medians."""
        return statistics.median(self.dense_ms) / statistics.median(self.ms)


@dataclass
class ForwardRow:
    """One line of the table: the dense model, or a recipe.

    Attributes
    ----------
    rules : the recipe as text for people.
    on : what came of each case.
    density : fraction of (query, key) pairs computed, pooled keys counted, mean over all layers that rules can name.
    peak_mib : most memory in a timed forward, MiB; None where the system does not tell.
    notes : what ran dense all the same, and why.
    """

    name: str
    kind: str
    rules: str = ""
    on: list[Any] = field(default_factory=list)
    density: float | None = None
    peak_mib: float | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, recipes: Mapping[str, Recipe]) -> list[Self]:
        """Return the dense row, and one for each recipe."""
        told = [cls(name, "recipe", "\n".join(recipe.describe().split("\n")[1:])) for name, recipe in recipes.items()]
        return [cls(DENSE_ROW, DENSE_ROW), *told]

    @property
    def dense(self) -> bool:
        """Whether it is the dense model."""
        return self.kind == DENSE_ROW

    @contextmanager
    def applied(self, model: Any, recipe: Recipe | None) -> Iterator[Callable[[Callable[[], FromForward]], FromForward]]:
        """Have its recipe on a model, forced; yields what runs a forward and notes how much was read in it."""
        with nullcontext() if recipe is None else apply(model, recipe, gate="report") as plug:

            def noted(forward: Callable[[], FromForward]) -> FromForward:
                with nullcontext([]) if plug is None else plug.trace() as events:
                    answer = forward()
                self._note(events)
                return answer

            yield noted
            if plug is not None:
                self.notes = [*plug.report().left_dense, *_forced(plug.choices["verdicts"])]

    def _note(self, events: Sequence[Event]) -> None:
        layers = max((event.site.layers for event in events), default=0)
        read = [1.0 if event.density is None else event.density for event in events]
        self.density = (sum(read) + layers - len(read)) / layers if layers else None

    def timed(self, forward: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
        """Return the milliseconds of so many forwards; their peak is noted."""
        ms, peak = timed_runs(forward, device, repeats)
        if peak is not None:
            self.peak_mib = max(self.peak_mib or 0.0, peak)
        return ms


@dataclass(repr=False)
class OfForwards:
    """What was found: the table, and what is said with it. A subclass has a row's cells, and `verdict`.

    Attributes
    ----------
    rows : dense first.
    generated : whether the cases are drawn.
    """

    model: str
    generated: bool
    environment: dict[str, Any]
    rows: list[Any]

    def __getitem__(self, name: str) -> Any:
        for row in self.rows:
            if row.name == name:
                return row
        raise AccelplugError(f"There is no row {name!r}; there are {', '.join(row.name for row in self.rows)}.")

    @property
    def heading(self) -> str:
        """What ran where."""
        return f"{self.model} on {self.environment.get('device', 'a device that was not noted')}"

    @property
    def verdict(self) -> str:
        """Every recipe in a few words."""
        return "; ".join(self.said(row) for row in self.rows if not row.dense) or "Dense only: nothing to compare."

    def said(self, row: Any) -> str:
        """Say a recipe in a few words."""
        raise NotImplementedError

    def table(self) -> Table:
        """Return the figures as a rich table."""
        raise NotImplementedError

    def table_of(self, headings: Sequence[str], cells: Callable[[Any], list[str]], caption: str) -> Table:
        """Return a table of all rows, without the columns that nobody fills."""
        from rich.box import SIMPLE_HEAD

        from accelplug.comparison.report import filled_columns

        filled, lines = filled_columns(headings, [cells(row) for row in self.rows])
        found = table(self.verdict, *filled, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in found.columns[1:]:
            column.justify = "right"
        for line in lines:
            found.add_row(*line)
        return found

    def __rich__(self) -> Group:
        from rich.console import Group

        notes = [f"{row.name}: {note}" for row in self.rows for note in row.notes]
        return Group(f"[bold]{self.heading}[/]", self.table(), *notes)


def pace(gain: float) -> str:
    """Return how much faster, or slower, in words."""
    return f"{gain:.2f}x faster" if gain >= 1 else f"{1 / gain:.2f}x slower"


def _forced(verdicts: Iterable[Mapping[str, Any]]) -> list[str]:
    """What `apply` would leave dense, and was forced here."""
    told = [Verdict.from_dict(one) for one in verdicts]
    return [f"forced here, where apply() would leave it dense: {one.reason}" for one in told if not one.pays]
