"""What tune() found: a recipe that knows its front, what was tried, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelplug import files
from accelplug.comparison import report
from accelplug.comparison.metrics import METRICS
from accelplug.comparison.report import Dot, PlotAxis
from accelplug.comparison.result import Comparison, errors, qualities, times_text
from accelplug.comparison.rows import DENSE_ROW
from accelplug.errors import AccelplugError
from accelplug.recipe import ModelFacts, Recipe, match_for, write_recipe
from accelplug.show import jsonable
from accelplug.show import table as lined
from accelplug.table import Table as Tensors
from accelplug.table import write_tables
from accelplug.tuning.budget import Bound

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Point:
    """One candidate that was run whole.

    Attributes
    ----------
    name : what it is, in words.
    recipe : rules and cache, as a recipe mapping.
    runs : number of whole runs.
    speedup : gain over dense, by `accelplug.comparison.result.gains`: the median over runs.
    worst : worst value of each bound's metric over the runs.
    margin : smallest distance to a bound, negative outside of the budget.
    verdict : ``tried``, ``front``, ``proven`` on runs the search never saw, or ``overturned`` there.
    worst_run : prompt and seed of the run with that margin.
    predicted : what the predictor said before the first run: density, and speed-up, margin and the estimated error where it could.
    gain, holm : language models: the objective's gain over stock on the same questions; on the proof with its 95 % interval (else NaN),
        and the corrected p-value.

    Of a language model `runs` counts questions, `speedup` is the stock model's time over the candidate's, `worst` holds all figures,
    the gain over stock is one of the margins, and a verdict may be ``stock``, ``confirmed`` where a faster one does as well, or
    ``looked at``: no question was put, since a first look left it no chance, or for want of time.
    """

    name: str
    recipe: dict[str, Any]
    runs: int
    speedup: float
    worst: dict[str, float]
    margin: float
    verdict: str = "tried"
    worst_run: tuple[int, int] | None = None
    predicted: dict[str, float | None] = field(default_factory=dict)
    gain: tuple[float, float, float] | None = None
    holm: float | None = None

    def add(self, run: tuple[int, int], values: Mapping[str, float], bounds: Sequence[Bound]) -> None:
        """Take in what one more run, at a prompt and a seed, scored on each bound."""
        self.runs += 1
        for bound in bounds:
            worse = min if bound.higher_is_better else max
            self.worst[bound.figure] = worse(self.worst.get(bound.figure, values[bound.figure]), values[bound.figure])
        margin = min(bound.margin(values[bound.figure]) for bound in bounds)
        if self.worst_run is None or margin < self.margin:
            self.margin, self.worst_run = margin, run


@dataclass(frozen=True, eq=False, repr=False)
class Tuned(Recipe):
    """The fastest recipe within the budget, or dense. A `Recipe` like others, that also knows how it was found.

    Attributes
    ----------
    why : the result in a sentence.
    bounds : the budget.
    points : everything that was run whole, the fastest first.
    notes : what bounds the search, and what was not tried and why.
    comparison : all runs beside dense ones, with clips.
    seconds : how long it took, by phase.
    facts : the model that it was tuned on.
    """

    why: str = ""
    bounds: tuple[Bound, ...] = ()
    points: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()
    comparison: Comparison | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    facts: ModelFacts | None = None

    @property
    def budget(self) -> str:
        """The bounds, in words."""
        return ", ".join(map(str, self.bounds))

    @property
    def proven(self) -> Point | None:
        """The point that the recipe is, or None for dense."""
        return next((point for point in self.points if point.verdict == "proven"), None)

    @property
    def front(self) -> list[Point]:
        """Points that neither dense nor another one beats in both speed and margin, the fastest first."""
        kept: list[Point] = []
        for point in sorted(self.points, key=lambda p: -p.speedup):
            if point.speedup > 1 and (not kept or point.margin > kept[-1].margin):
                kept.append(point)
        return kept

    def to_yaml(self, path: str | Path, facts: ModelFacts | None = None) -> Path:
        """Write a recipe file, with a `measured` row where the recipe was proven, and beside it the table it refers to.

        `facts`: the model that the file is for; the one that was tuned if left out.

        Raises
        ------
        AccelplugError
            If no model is known, or the file cannot be written.
        """
        if (facts := facts or self.facts) is None:
            raise AccelplugError("There is no model to write a recipe file for: this recipe was not made by tune().")
        if not files.is_first():
            return Path(path)
        entry: dict[str, Any] = {"summary": self.summary}
        entry |= _referring(self.proven.recipe, Path(path)) if self.proven else {"rules": [{"patch": "dense"}]}
        entry["measured"] = [row.model_dump(exclude_defaults=True) for row in self.measured]
        return write_recipe(Path(path), match_for(facts), "tuned", entry)

    def page(self) -> str:
        """Return one self-contained page: all points in a Pareto plot, clips of the front beside dense, and the table.

        Raises
        ------
        AccelplugError
            If nothing was run.
        """
        if (comparison := self.comparison) is None:
            raise AccelplugError("There is no comparison to show: this recipe was not made by tune().")
        proven = self.proven
        dots = [self._dot(point, comparison) for point in self.points]
        shown = {DENSE_ROW, *(dot.name for dot in dots if dot.front or dot.verdict == "proven")}
        spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self.seconds.items())
        against = "Every speed-up is against a dense run of the same prompt and seed."
        return report.page(
            comparison.subject,
            self.why,
            f"Budget: {self.budget}, on every run. {against} Spent: {spent}.",
            {**comparison.to_dict(), "chosen": proven.name if proven else None, "notes": self.notes, "floors": ()},
            axis=self._axis,
            dots=dots,
            clips={key: clip for key, clip in comparison.clips.items() if key[0] in shown},
            headings=self.headings(),
            lines=((point.name, "recipe", self.cells(point)) for point in self.points),
        )

    @property
    def _axis(self) -> PlotAxis:
        """The bound, or the margin where there are several."""
        if len(self.bounds) != 1:
            return PlotAxis("margin to the nearest bound", 0.0)
        (bound,) = self.bounds
        name = METRICS[bound.name].heading if bound.figure in METRICS else bound.figure
        return PlotAxis(name, bound.limit, bound.higher_is_better)

    def _dot(self, point: Point, comparison: Comparison) -> Dot:
        """A candidate that was run whole, by its worst run."""
        told, row = point.predicted, comparison.row(point.name)
        margin, density = told.get("margin"), told.get("density")
        facts = [
            ("speed-up", times_text(point.speedup), times_text(told.get("speedup"))),
            *(
                (f"worst {bound.figure}, bound {bound.limit:g}", f"{point.worst[bound.figure]:.2f}", "")
                for bound in self.bounds
            ),
            ("margin", f"{point.margin:+.2f}", "" if margin is None else f"{margin:+.2f}"),
            ("density", "", "" if density is None else f"{density:.3f}"),
            *errors(row, told.get("estimate")),
            *qualities(row),
            ("runs", str(point.runs), ""),
        ]
        if point.worst_run is not None:
            facts.append(("worst run", comparison.run_name(*point.worst_run), ""))
        return Dot(
            name=point.name,
            label=_label(point),
            kind=row.kind,
            verdict=self.verdict(point),
            speedup=point.speedup,
            worst=point.worst[self.bounds[0].figure] if len(self.bounds) == 1 else point.margin,
            mean=None,
            front=point in self.front,
            holds=point.margin >= 0,
            facts=facts,
            rules=row.rules,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what was tried, as plain data."""
        tried = [{**vars(point), "recipe": _named_tables(point.recipe)} for point in self.points]
        return jsonable({name: getattr(self, name) for name in ("why", "budget", "notes", "seconds")} | {"points": tried})

    def without_clips(self) -> Tuned:
        """Return it without the clips, which are most of its size."""
        return replace(self, comparison=self.comparison and replace(self.comparison, clips={}))

    def table(self) -> Table:
        """Return what was run as a rich table."""
        table = lined(self.why, *self.headings(), names=False, caption="\n".join([f"budget: {self.budget}", *self.notes]))
        for column in table.columns[1:-1]:
            column.justify = "right"
        for point in self.points:
            table.add_row(*self.cells(point))
        return table

    def headings(self) -> list[str]:
        """Column headings of the table."""
        memory = [self.comparison.memory] if self.comparison is not None else []
        return ["candidate", "runs", "speed-up", "predicted", "worst", "margin", *memory, "verdict"]

    def cells(self, point: Point) -> list[str]:
        """One line of the table, as text."""
        return [
            point.name,
            str(point.runs),
            f"{point.speedup:.2f}x",
            f"{point.predicted['speedup']:.2f}x" if point.predicted.get("speedup") else "",
            ", ".join(f"{name} {value:.2f}" for name, value in point.worst.items()),
            f"{point.margin:+.2f}",
            *self._memory(point),
            self.verdict(point),
        ]

    def _memory(self, point: Point) -> list[str]:
        """Most memory of its runs, MiB, where runs are known."""
        if self.comparison is None:
            return []
        peak = self.comparison.row(point.name).peak_mib
        return [f"{peak:.0f}" if peak else ""]

    def verdict(self, point: Point) -> str:
        """The point's verdict, ``front`` for what was tried and is on it."""
        return "front" if point.verdict == "tried" and point in self.front else point.verdict

    def __rich__(self) -> Table:
        return self.table()


def _label(point: Point) -> str:
    """The patch and its first setting; the cache beside it is only named."""
    words = point.name.split(" + ")[0].split()[:2]
    beside = "cache" in point.recipe and point.recipe["rules"][-1]["patch"] != DENSE_ROW
    return " ".join(words) + (" + cache" if beside else "")


def _referring(recipe: dict[str, Any], path: Path) -> dict[str, Any]:
    """A recipe mapping whose tables were written beside `path`, and that refers to them."""
    rules = []
    for rule in recipe["rules"]:
        tables = {key: value for key, value in rule.get("with", {}).items() if isinstance(value, Tensors)}
        if tables:  # one rule at most has any
            origin = replace(next(iter(tables.values())).origin, axes={key: table.axes for key, table in tables.items()})
            refs = write_tables(path.with_suffix(".safetensors"), {key: t.values for key, t in tables.items()}, origin)
            rule = {**rule, "with": {**rule["with"], **refs}}
        rules.append(rule)
    return {**recipe, "rules": rules}


def _named_tables(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe mapping with words in place of its tables."""

    def named(settings: dict[str, Any]) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Tensors) else value for key, value in settings.items()}

    return {
        **recipe,
        "rules": [{**rule, "with": named(rule["with"])} if "with" in rule else rule for rule in recipe["rules"]],
    }
