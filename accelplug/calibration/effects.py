"""What a recipe's errors in one part of a run make of its end: whole runs in which that part alone is sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accelplug import show
from accelplug.calibration.tally import Tally
from accelplug.call import Clock
from accelplug.comparison.metrics import relative_distance
from accelplug.comparison.ranks import Ranks
from accelplug.errors import UnsupportedError, worded
from accelplug.patches.sparse.budgets import Budgets
from accelplug.plug import apply
from accelplug.recipe import Recipe, Rule
from accelplug.table import bucket


def weigh(pipe: Any, tally: Tally, run: Callable[[], Tensor], ranks: Ranks, progress: bool) -> None:
    """Tell the budgets of a tally how far errors in each span of steps, or in each layer, move the final latents.

    Parameters
    ----------
    run : runs the pipeline, always on the same inputs and seed, and returns the final latents.
    """
    budgets = [one for one in tally.calibrations.values() if isinstance(one, Budgets)]
    asked = dict.fromkeys(axis for one in budgets for axis in one.config.sensitivity)
    axes = {axis: list(everywhere_else(axis, tally)) for axis in asked}
    if not axes or tally.target.base is None:
        return
    if not isinstance(dense := run(), Tensor):
        raise UnsupportedError(
            f"{type(pipe).__name__} gives no latents to weigh errors by, but {type(dense).__name__}. "
            + worded("Calibrate with sensitivity=[].", "Add --set sensitivity=[].")
        )
    with show.progress("weighing", 1 + sum(map(len, axes.values())), progress) as tell:
        done = 1
        for axis, elsewhere in axes.items():
            found: dict[int, float] = {}
            for number in ranks.share(range(len(elsewhere))):
                tell(done + number, f"errors in one of {len(elsewhere)} {'spans of steps' if axis == 'steps' else axis}")
                with apply(pipe, dense_there(tally.target.base, axis, elsewhere[number]), gate="off", deterministic=True):
                    found[number] = relative_distance(run(), dense) ** 2
            done += len(elsewhere)
            for share in ranks.gather(found):
                found |= share
            final = torch.tensor([found[number] for number in range(len(elsewhere))], dtype=torch.float64)
            for one in budgets:
                one.weigh(axis, final)


def everywhere_else(axis: str, tally: Tally) -> Iterator[list[int]]:
    """Yield for each span of steps the steps outside of it, or for each layer the others."""
    if axis == "layers":
        layers = range(max(one.state["steps"].shape[1] for one in tally.calibrations.values()))
        yield from ([other for other in layers if other != layer] for layer in layers)
        return
    steps = tally.steps or 1
    buckets = min(tally.buckets, steps)
    span = [bucket(Clock(step, steps), buckets) for step in range(steps)]
    yield from ([step for step in range(steps) if span[step] != number] for number in range(buckets))


def dense_there(recipe: Recipe, axis: str, places: list[int]) -> Recipe:
    """Return a recipe that leaves these steps or layers dense, without its step cache."""
    rule = Rule.model_validate({"where": {axis: places}, "patch": "dense"})
    return replace(recipe, rules=(rule, *recipe.rules) if places else recipe.rules, cache=None)
