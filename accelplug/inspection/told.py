"""What inspections of all kinds of models tell in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from accelplug.show import table

if TYPE_CHECKING:
    from rich.table import Table

NO_RECIPE = "No shipped recipe matches this model; apply() takes a mapping or a file of your own."


def recipes_told(touched: Mapping[str, str], summaries: Mapping[str, str]) -> Table | str:
    """Return the recipes that match a model, by full name, with what each touches and what it does."""
    if not touched:
        return NO_RECIPE
    from rich.box import SIMPLE_HEAD

    told = table("recipes that match this model", "recipe", "touches", "what it does", box=SIMPLE_HEAD)
    for name, sites in touched.items():
        told.add_row(name, sites, summaries.get(name, ""))
    return told
