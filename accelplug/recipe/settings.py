"""Settings that are not one value everywhere: ramps over steps or layers, tables, layers in percent of the depth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from accelplug.call import Clock, Site
from accelplug.recipe.conditions import Strict, index_of
from accelplug.recipe.explaining import shortened
from accelplug.recipe.matching import ModelFacts
from accelplug.table import Table


class TableRef(Strict):
    """A table that a calibration made: which file beside the recipe, which bytes, which tensor of it."""

    file: str = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    key: str = Field(min_length=1)

    def path(self, folder: Path | None) -> Path:
        """Where the file is: beside the recipe's; for recipes given as mappings, wherever `file` says. ValueError outside."""
        if folder is None:
            return Path(self.file)
        if self.file != Path(self.file).name or self.file == "..":
            raise ValueError(f"tables stand beside the recipe's file: expected a name without folders, got {self.file!r}")
        return folder / self.file


class Ramp(Strict):
    """A value that moves in a straight line over all steps of a run, or over all layers."""

    first: float = Field(alias="from")
    last: float = Field(alias="to")
    over: Literal["steps", "layers"]

    def at(self, site: Site, clock: Clock) -> float | str:
        """Return the value here and now, or the reason why it is not known."""
        index, count = (clock.step, clock.steps) if self.over == "steps" else (site.layer, site.layers)
        if index is None or count is None:
            cure = "; tell it by plug.step(index, steps)" if self.over == "steps" else ""
            return f"a value ramps over {self.over}, and which of how many this is is not known{cure}"
        return self.value(min(index / (count - 1), 1.0) if count > 1 else 0.0)

    def value(self, way: float) -> float:
        """Return the value at a share of the way, from 0 to 1, in few digits: equal configs share plans and graphs."""
        return float(f"{self.first + (self.last - self.first) * way:.6g}")


def read_varying(key: str, value: Mapping[str, Any]) -> Ramp | TableRef:
    """Read a value that is not the same everywhere."""
    is_table = set(value) == {"table"} and isinstance(value["table"], Mapping)
    try:
        return TableRef.model_validate(dict(value["table"])) if is_table else Ramp.model_validate(dict(value))
    except ValidationError:
        raise ValueError(
            f"with.{key}: expected a value, a ramp {{from: number, to: number, over: steps or layers}}, or a table "
            f"{{table: {{file: name, sha256: 64 digits, key: name}}}}, got {shortened(dict(value))}"
        ) from None


def table_for(key: str, value: Any, folder: Path | None, facts: ModelFacts | None) -> Any:
    """Return the table that a setting refers to, or the setting as it is."""
    if isinstance(value, Mapping) and isinstance(ref := read_varying(key, value), TableRef):
        value = Table.read(ref.path(folder), ref.sha256, ref.key)
    if isinstance(value, Table) and facts is not None:
        differs = [
            f"{name} {facts.value(name)!r} where the table has {wanted!r}"
            for name, wanted in value.origin.model.items()
            if (wanted not in facts.class_names if name == "class" else _plainly(facts.value(name)) != wanted)
        ]
        if differs:
            raise ValueError(
                f"{value!r} was made for another model: this one has {', '.join(differs)}. Calibrate for this one."
            )
    return value


def _plainly(value: Any) -> Any:
    """A config's value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _percent(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"([0-9]{1,2}(\.[0-9]{1,9})?|100)%", value) is not None


def in_percent(value: Any) -> bool:
    """Whether a setting is a layer in percent of the depth, ``34%``, or a range with such an end, ``[38%, 72%]``."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return any(map(_percent, value)) and all(type(end) is int or _percent(end) for end in value)
    return _percent(value)


def at_depth(settings: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return settings with layers that are told in percent as numbers in a model of so many; no range comes to nothing."""

    def resolved(value: Any) -> Any:
        if not in_percent(value):
            return value
        if isinstance(value, str):
            return index_of(value, layers)
        first, end = map(resolved, value)
        return [first, end + (end == first)]

    return {key: resolved(value) for key, value in settings.items()}


def shown(value: Any) -> str:
    """Return a setting as text for people."""
    if isinstance(value, Table):
        return repr(value)
    if isinstance(value, Mapping) and "table" in value:
        return f"table {value['table']['key']} of {value['table']['file']}"
    if isinstance(value, Mapping) and "over" in value:
        return f"{value['from']} to {value['to']} over {value['over']}"
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
