"""Budgets: how much each layer, head and span of steps should read, where all of them together may read so much.

Reading little costs some heads nothing and others everything. For every cell (a span of steps, a layer, a head) the selector's own plan and
kernel, repair too where it is on, are tried with each of its `BlockSparse.rungs` on dense runs. That gives a curve of error over cost:

* cost: the share of keys that the head reads, pooled ones counted, times the steps of the span that are sparse;
* error: the head's squared error over the squared size of the layer's output, times these steps and the *sensitivity* of the span and
  the layer: the squared error of the final latents, over their size, for each unit of such error. A run of the recipe as it is in one
  span alone and one in each layer alone measure that. Errors of parts are taken to add up.

The least total error at a total cost is where all curves have one slope (a Lagrange multiplier, Everett 1963). On the lower convex hulls
the steepest steps are taken first until the cost of the recipe as it is has been spent (`allocate`). Ours; by layer, Sparse-vDiT and STA
choose in the same spirit among ways of reading, and do not hold the cost.

In whole runs it is not proven. Of `rows` at density .1 (1,728 tokens, 12 steps, four captions, two seeds; foreground PSNR 14.7 dB, so
errors are large) budgets by layer and head gain .7 dB, standard error .6, by layer alone they lose .6 (.25), by step 1.0 (.6), by all
three .1 (.6), though less error was predicted of each: what is so large does not add up (`python -m benchmarks.budgets tables`). By step
it is experimental.

Cells that `over` leaves together share one budget. The last prompts are held out of every choice, and say what it is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import Clock
from accelplug.patches.calibration import Calibration, CalibrationConfig, Seen
from accelplug.patches.sparse.template import BlockSparse
from accelplug.table import AXES, bucket


class Budgets(Calibration):
    """Find how much each layer, head and span of steps reads, at the cost of the recipe as it is and with the least error."""

    class Config(CalibrationConfig):
        """Of each call all queries are looked at; `rows` is not used."""

        over: tuple[Literal["steps", "layers", "heads"], ...] = Field(
            ("layers", "heads"), min_length=1, description="What budgets differ by: steps (experimental), layers, heads."
        )
        sensitivity: tuple[Literal["steps", "layers"], ...] = Field(
            ("steps", "layers"),
            description="By what the effect of errors on the final latents is measured: a run for each span, each layer.",
        )
        held_out: float = Field(
            0.25, ge=0.0, lt=1.0, description="Share of the prompts that judge and do not choose; of several one at least."
        )

    config: Config

    def __init__(self, choose: Callable[..., BlockSparse | None], method: type[BlockSparse], config: Any = None) -> None:
        super().__init__(BlockSparse(), config)
        self._choose = choose  # (site, layout, clock) -> the selector that would answer there and then
        self.method = method
        self.axes = {method.knob: AXES}  # type: ignore[misc]  # of this one method

    def serves(self, patch: Any) -> bool:
        """Whether a patch takes the table."""
        return isinstance(patch, self.method)

    def observe(self, seen: Seen, part: int) -> None:
        patch = self._choose(seen.site, seen.layout, seen.clock)
        if patch is None or not self.serves(patch):
            return
        knob, rungs = self.method.knob, self.method.rungs
        device, heads = seen.call.q.device, seen.call.q.shape[1]
        as_it_is = patch.prepare(seen.site, seen.layout, seen.clock, {})
        ladder = self.method(patch.config.model_copy(update={knob: rungs[0]}))
        params = ladder.prepare(seen.site, seen.layout, seen.clock, {})
        if as_it_is is None or params is None:
            return
        ways = [(patch, as_it_is), *((ladder, params.within(torch.full((heads,), rung))) for rung in rungs)]
        errors = torch.zeros(heads, len(ways), dtype=torch.float64)
        costs = torch.zeros_like(errors)
        size = seen.out.float().square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        for place, (way, given) in enumerate(ways):
            given = given.to(device)
            costs[:, place] = way.costs(way.planned(seen.call, given)).mean(0).cpu()
            wrong = (way.attend(seen.call, given).float() - seen.out.float()).square().sum((0, 2, 3)) / size
            errors[:, place] = wrong.cpu()
        what = "held out " if self.judges(seen) else ""
        self.add(seen, f"{what}error", errors)
        self.add(seen, f"{what}cost", costs)
        row, own = patch.budgets(seen.site, seen.clock), getattr(patch.config, knob)
        value = math.nan if row is None and not isinstance(own, float) else own
        self.add(seen, "own", torch.full((heads,), value) if row is None else row.cpu())
        self.add(seen, "steps", torch.tensor(float(self.steps(seen))))

    def judges(self, seen: Seen) -> bool:
        """Whether a call is of a prompt that is held out."""
        number = max(round(self.config.held_out * seen.prompts), 1) if self.config.held_out and seen.prompts > 1 else 0
        return seen.prompt >= seen.prompts - number

    def steps(self, seen: Seen) -> int:
        """How many steps of the call's span are sparse."""
        steps = seen.clock.steps or 1
        clocks = (Clock(step, steps, seen.clock.branch) for step in range(steps))
        return sum(
            self.serves(self._choose(seen.site, seen.layout, clock))
            for clock in clocks
            if bucket(clock, seen.buckets) == seen.bucket
        )

    # -------------------------------------------------------------------------------------------------- what follows

    def weigh(self, axis: str, final: Tensor) -> None:
        """Take the squared relative errors of final latents, float64 (buckets,) or (layers,), where one of these alone was sparse."""
        self.state[f"final {axis}"] = final

    def tables(self) -> dict[str, Tensor]:
        choice = self.chosen()  # [buckets, layers, H]
        rungs = torch.tensor(self.method.rungs)
        own = self.mean("own").float()
        values = torch.where(choice == 0, own, rungs[(choice - 1).clamp(min=0)])
        seen = (self.state["steps calls"] > 0)[..., None] & ~values.isnan()
        # Spans that the recipe leaves dense have the budgets of the next one: runs with other steps may come to need them.
        last = len(values) - 1
        for row, other in [*((row, row + 1) for row in reversed(range(last))), *((row + 1, row) for row in range(last))]:
            values[row] = torch.where(seen[row], values[row], values[other])
            seen[row] |= seen[other]
        return {self.method.knob: torch.where(seen, values, rungs[0])}

    def chosen(self) -> Tensor:
        """Return the rung of each cell, int64 (buckets, layers, H): 0 as the recipe has it, then those of `BlockSparse.rungs`."""
        error, cost = self.curves()
        allowed = cost[..., 0].sum()
        together = tuple(AXES.index(axis) for axis in AXES if axis not in self.config.over)
        own = self.mean("own")
        unsaid = own.isnan() & (self.sparse_steps() > 0)[..., None]
        error[..., 0].masked_fill_(unsaid, math.inf)  # no number says what it has
        if together:
            error, cost = (x.sum(together, keepdim=True) for x in (error, cost))
        choice = allocate(error.flatten(0, -2), cost.flatten(0, -2), float(allowed))
        return choice.view(error.shape[:-1]).expand(own.shape)

    def curves(self, what: str = "") -> tuple[Tensor, Tensor]:
        """Return what errors and costs each rung makes in all sparse steps of a cell, float64 (buckets, layers, H, V); 0 where unseen."""
        error, cost = (self.mean(f"{what}{name}").nan_to_num(nan=0.0) for name in ("error", "cost"))
        return error * self.weights()[..., None, None], cost * self.sparse_steps()[..., None, None]

    def sparse_steps(self) -> Tensor:
        """Sparse steps of each span and layer, float64 (buckets, layers)."""
        return self.mean("steps").double().nan_to_num(nan=0.0)

    def weights(self) -> Tensor:
        """Return what a unit of error in one step makes of a cell, times its steps: float64 (buckets, layers)."""
        steps = self.sparse_steps()
        made = self.mean("error")[..., 0].sum(-1).nan_to_num(nan=0.0) * steps  # [buckets, layers], as the recipe is
        weights = steps
        for axis, other in (("steps", 1), ("layers", 0)):
            if axis in self.config.sensitivity and (final := self.state.get(f"final {axis}")) is not None:
                here = made.sum(other)
                rate = final[: len(here)] / here.clamp(min=1e-30)
                rate = torch.where(here > 0, rate, 0.0)
                first = axis == "steps" or "steps" not in self.config.sensitivity
                weights = weights * (rate if first else rate * here.sum() / final.sum().clamp(min=1e-30)).unsqueeze(other)
        return weights

    @property
    def weighed(self) -> bool:
        """Whether errors count by what they make of the final latents."""
        return any(f"final {axis}" in self.state for axis in self.config.sensitivity)

    def told(self) -> str:
        """Return in a sentence what the budgets are worth."""
        choice = self.chosen()
        held = "held out error" in self.state
        error, cost = self.curves("held out " if held else "")
        total = self.sparse_steps().sum() * choice.shape[-1]

        def of(choice: Tensor) -> tuple[float, float]:
            squares, read = (x.gather(-1, choice[..., None]).sum() for x in (error, cost))
            scale = 1.0 if self.weighed else total / choice.shape[-1]
            return float((squares / scale).sqrt()), float(read / total)

        (mine, reads), (theirs, read) = of(choice), of(torch.zeros_like(choice))
        what = "final latents" if self.weighed else "attention outputs"
        where = "held-out prompts" if held else "the prompts that chose them, since none was held out"
        return (
            f"Budgets by {', '.join(self.config.over)}: {what} are predicted to err by {mine:.4f} at density {reads:.3f}, "
            f"by {theirs:.4f} at {read:.3f} without, on {where}."
        )


def allocate(error: Tensor, cost: Tensor, allowed: float) -> Tensor:
    """Choose a rung for each cell, so that the total error is small and the total cost `allowed` at most.

    Parameters
    ----------
    error, cost : float64 (cells, V), at least 0; a rung with an infinite error is not taken.
    allowed : what the chosen rungs may cost together; the cheapest are taken whatever it is.

    Returns
    -------
    choice : int64 (cells,). The best there is but for the last step on the hulls, which may not fit.
    """
    hulls = [lower_hull(e, c) for e, c in zip(error.tolist(), cost.tolist(), strict=True)]
    choice, left = [hull[0] for hull in hulls], allowed
    steps = []
    for cell, hull in enumerate(hulls):
        left -= float(cost[cell, hull[0]])
        for place, (here, there) in enumerate(pairwise(hull)):
            more = float(cost[cell, there] - cost[cell, here])
            steps.append((-float(error[cell, here] - error[cell, there]) / more, cell, place, more))
    stopped: set[int] = set()
    for _, cell, place, more in sorted(steps):
        if cell in stopped or more > left + 1e-12 * allowed:
            stopped.add(cell)
            continue
        choice[cell], left = hulls[cell][place + 1], left - more
    return torch.tensor(choice)


def lower_hull(error: list[float], cost: list[float]) -> list[int]:
    """Return the points (cost, error) that straight lines between others do not pass below, cheapest first, errors falling."""
    hull: list[int] = []
    for point in sorted((i for i, e in enumerate(error) if math.isfinite(e)), key=lambda i: (cost[i], error[i])):
        if hull and error[point] >= error[hull[-1]]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], point, error, cost):
            hull.pop()
        hull.append(point)
    return hull


def _above(first: int, middle: int, last: int, error: list[float], cost: list[float]) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    return (error[middle] - error[first]) * (cost[last] - cost[first]) >= (error[last] - error[first]) * (
        cost[middle] - cost[first]
    )
