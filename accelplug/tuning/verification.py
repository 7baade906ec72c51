"""verify(): run what a recipe file says was measured, once more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelplug.comparison.environment import device_name
from accelplug.comparison.study import compare
from accelplug.errors import AccelplugError, RecipeError
from accelplug.recipe import Measured, Recipe, read_file

if TYPE_CHECKING:
    from accelplug.comparison.result import Comparison

DRIFT_DB = 1.0
"""PSNR that may be lost before a figure has drifted, in dB."""
BROKEN_DB = 3.0
"""PSNR lost from which a recipe no longer does what it did, in dB."""
SLOWER = 0.9
"""Share of the recorded speed-up that must be left, on the same device."""


@dataclass(frozen=True)
class Verdict:
    """What came of one `measured` row: confirmed, drifted or broken, and why."""

    recipe: str
    date: str
    outcome: Literal["confirmed", "drifted", "broken"]
    why: str


def verify(
    pipe: Any, recipe: str | Path | Recipe, inputs: Mapping[str, Any] | None = None, progress: bool = True
) -> list[Verdict]:
    """Run every `measured` row of a recipe again, with its own inputs and seeds, and hold the figures against it.

    Parameters
    ----------
    pipe : the pipeline that it was measured on.
    recipe : a recipe file, all of whose recipes are verified; or one `Recipe`.
    inputs : arguments of the pipeline's call, for rows that name no prompt.

    Returns
    -------
    One `Verdict` a row. Speed is held against the row on the same device only.

    Raises
    ------
    AccelplugError
        If no row was measured, or a row names no prompt and no inputs are given.
    """
    recipes = [recipe] if isinstance(recipe, Recipe) else list(read_file(Path(recipe)).recipes.values())
    rows = [(found, row) for found in recipes for row in found.measured]
    if not rows:
        raise AccelplugError(f"{recipe} has no measured rows to verify; `accelplug tune` and `compare --record` write them.")
    return [_verdict(pipe, found, row, inputs, progress) for found, row in rows]


def _verdict(pipe: Any, recipe: Recipe, row: Measured, inputs: Mapping[str, Any] | None, progress: bool) -> Verdict:
    if not row.prompts and inputs is None:
        raise AccelplugError(
            f"{recipe.name}: the row of {row.date} names no prompts. Give inputs that it was measured with."
        )
    given = [{"prompt": text, **row.inputs} for text in row.prompts] or [{**(inputs or {}), **row.inputs}]
    try:
        found = compare(pipe, {"now": recipe}, given, row.seeds, floors=False, progress=progress)
    except RecipeError as error:
        return Verdict(recipe.name, row.date, "broken", str(error))
    outcome, why = judge(row, found)
    return Verdict(recipe.name, row.date, outcome, why)


def judge(row: Measured, found: Comparison) -> tuple[Literal["confirmed", "drifted", "broken"], str]:
    """Hold a new comparison's row ``now`` against a recorded one."""
    now = found.row("now")
    lost_db = 0.0
    if row.psnr_db is not None and (worst := now.worst("psnr_db")) is not None:
        lost_db = row.psnr_db.worst - worst
    gain, recorded = found.speedup(now).p50, row.dense_ms.p50 / row.ms.p50
    same_device = row.device == device_name()
    said = f"{gain:.2f}x (recorded {recorded:.2f}x" + ("" if same_device else f" on {row.device}") + ")"
    if row.psnr_db is not None:
        said += f", worst PSNR {row.psnr_db.worst - lost_db:.1f} dB (recorded {row.psnr_db.worst:.1f} dB)"
    if any("fell back" in note for note in now.notes) and now.mean_density == 1:
        return "broken", f"every call fell back to dense: {now.notes[0]}"
    if lost_db > BROKEN_DB:
        return "broken", said
    if lost_db > DRIFT_DB or (same_device and gain < SLOWER * recorded):
        return "drifted", said
    return "confirmed", said
