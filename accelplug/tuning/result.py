"""What tune() found: a recipe that knows its front, what was tried, and why."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from accelplug.errors import AccelplugError
from accelplug.recipe import SCHEMA, ModelFacts, Recipe

if TYPE_CHECKING:
    from rich.table import Table

    from accelplug.comparison.result import Comparison


@dataclass
class Point:
    """One candidate that was run whole.

    Attributes
    ----------
    name : what it is, in words.
    recipe : rules and cache, as a recipe mapping.
    runs : number of whole runs.
    speedup : median over runs, each against the dense run beside it.
    worst : worst value of each bound's metric over the runs.
    margin : smallest distance to a bound, negative outside of the budget.
    verdict : ``tried``, ``front``, ``proven`` on runs the search never saw, or ``overturned`` there.
    foretold : what the forecast said before the first run: speed-up, and margin where it could.
    """

    name: str
    recipe: dict[str, Any]
    runs: int
    speedup: float
    worst: dict[str, float]
    margin: float
    verdict: str = "tried"
    foretold: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Tuned(Recipe):
    """The fastest recipe within the budget, or dense. A `Recipe` like others, that also knows how it was found.

    Attributes
    ----------
    why : the result in a sentence.
    budget : the bounds, in words.
    points : everything that was run whole, the fastest first.
    notes : what bounds the search, and what was not tried and why.
    comparison : the front's runs beside dense ones, with clips; its page shows the Pareto plot.
    seconds : how long it took, by phase.
    """

    why: str = ""
    budget: str = ""
    points: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()
    comparison: Comparison | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def proven(self) -> Point | None:
        """The point that the recipe is, or None for dense."""
        return next((point for point in self.points if point.verdict == "proven"), None)

    @property
    def front(self) -> list[Point]:
        """Points that no other one beats in both speed and margin, the fastest first."""
        kept: list[Point] = []
        for point in sorted(self.points, key=lambda p: -p.speedup):
            if not kept or point.margin > kept[-1].margin:
                kept.append(point)
        return kept

    def to_yaml(self, path: str | Path, facts: ModelFacts) -> Path:
        """Write a recipe file for the model, with a `measured` row where the recipe was proven."""
        keys = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels")
        match = {"class": facts.class_names[0], **{k: facts.config[k] for k in keys if k in facts.config}}
        entry: dict[str, Any] = {"summary": self.summary}
        entry |= self.proven.recipe if self.proven else {"rules": [{"patch": "dense"}]}
        entry["measured"] = [row.model_dump(exclude_defaults=True) for row in self.measured]
        name = Path(path).stem.lower().replace(" ", "-")
        file = {"schema": SCHEMA, "model": name, "match": match, "default": "tuned", "recipes": {"tuned": entry}}
        path = Path(path)
        path.write_text(yaml.safe_dump(_plain(file), sort_keys=False, width=120))
        return path

    def to_html(self, path: str | Path) -> Path:
        """Write the page of the front: the Pareto plot, and clips side by side.

        Raises
        ------
        AccelplugError
            If nothing was run.
        """
        if self.comparison is None:
            raise AccelplugError("There is no comparison to show: this recipe was not made by tune().")
        kept = {point.name for point in self.front} | {"dense"}
        shown = replace(
            self.comparison,
            rows=[row for row in self.comparison.rows if row.name in kept],
            clips={key: clip for key, clip in self.comparison.clips.items() if key[0] in kept},
        )
        return shown.to_html(path)

    def to_json(self, path: str | Path) -> Path:
        """Write what was tried."""
        data = {key: getattr(self, key) for key in ("why", "budget", "notes", "seconds")}
        data["points"] = [vars(point) for point in self.points]
        path = Path(path)
        path.write_text(json.dumps(_plain(data), indent=1) + "\n")
        return path

    def table(self) -> Table:
        """Return what was run as a rich table."""
        from rich.table import Table

        caption = "\n".join([f"budget: {self.budget}", *self.notes])
        table = Table(title=self.why, caption=caption, title_justify="left", caption_justify="left")
        for heading in ("candidate", "runs", "speed-up", "foretold", "worst", "margin", "verdict"):
            table.add_column(heading, justify="left" if heading in ("candidate", "verdict") else "right")
        front = self.front
        for point in self.points:
            worst = ", ".join(f"{name} {value:.2f}" for name, value in point.worst.items())
            verdict = "front" if point.verdict == "tried" and point in front else point.verdict
            table.add_row(
                point.name,
                str(point.runs),
                f"{point.speedup:.2f}x",
                f"{point.foretold['speedup']:.2f}x" if point.foretold.get("speedup") else "",
                worst,
                f"{point.margin:+.2f}",
                verdict,
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        from accelplug.comparison.result import _rendered

        return "".join(_rendered(self.table()))


def _plain(value: Any) -> Any:
    """YAML- and JSON-safe data."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
