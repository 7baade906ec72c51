"""Sliding tile attention: windows of whole tiles, one for each head, as a search on dense runs found.

STA (arXiv 2502.04507): the grid is cut into tiles, and a query tile reads the tiles in a window around its own.

Windows count in tiles. At the borders they are shifted inside, ``c = clamp(c, k // 2, n - 1 - k // 2)`` for k of n tiles on
an axis, so that every tile reads equally many: neighbourhood attention (arXiv 2504.16922) of tiles, stride 1.

A tile is one block. Of (6, 8, 8), the published tile, a block of b slots takes what it holds: columns first, then rows,
then frames; 384 slots hold all of it, 128 hold (2, 8, 8). Tiles at the far borders are cut, not padded.

*The search* (algorithm 1): per step, layer and head, the window with the least error, over all prompts. Steps
count by spans of equal length (`buckets`); as many as steps are the published search. The least error alone prefers
large windows, so that those on the list should cost alike; the maximal windows of one density do.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from accelplug.call import Clock, Layout, Site
from accelplug.kernels.orders import tiles
from accelplug.kernels.static import product
from accelplug.patches.calibration import CalibrationConfig
from accelplug.patches.sparse.per_head import PerHead, WayErrors, Ways
from accelplug.patches.sparse.template import BlockConfig
from accelplug.patches.sparse.windows import Axis, Extent
from accelplug.table import Table

Triple = tuple[Extent, Extent, Extent]


class StaSearch(WayErrors):
    """Find the window with the least error, per span of steps, layer and head."""

    Config = CalibrationConfig

    axes = {"choice": ("steps", "layers", "heads")}  # noqa: RUF012

    def tables(self) -> dict[str, Tensor]:
        error = self.mean("error")  # [buckets, layers, H, W]
        return {"choice": error.nan_to_num(nan=math.inf).argmin(-1).to(torch.uint8)}


class Sta(PerHead):
    """Query tiles read the tiles in a window around their own, one of several windows for each head."""

    class Config(BlockConfig):
        """Triples are frames, rows, columns. Tiles of (6, 8, 8) take ``block: 384``, as published."""

        windows: tuple[Triple, ...] | Literal["maximal"] = Field(
            ((3, 3, 3),),
            min_length=1,
            max_length=256,
            description="Windows that heads choose from, in tiles; maximal: all of `density`, no larger one.",
        )
        density: float = Field(0.3, gt=0.0, le=1.0, description="Share of the tiles that a maximal window reads at most.")
        choice: Annotated[int, Field(ge=0)] | Table = Field(
            0, description="Which of the windows, for all heads, or a table (steps, layers, heads)."
        )

        @model_validator(mode="after")
        def _windows_are_there(self) -> Self:
            most = int(self.choice.values.max()) if isinstance(self.choice, Table) else self.choice
            if self.windows != "maximal" and most >= len(self.windows):
                raise ValueError(f"choice {most} is not one of the {len(self.windows)} windows, which count from 0")
            return self

    config: Config
    Calibration = StaSearch
    writes = ()  # the plan is made for each layer, of its windows

    def neutral(self, layout: Layout) -> bool:
        return all(axis.full for window in self.windows(layout) for axis in self.axes(layout, window))

    def choice(self, site: Site, clock: Clock) -> Tensor | None:
        choice = self.config.choice
        return choice.at(site, clock).long() if isinstance(choice, Table) else torch.tensor([choice])

    def ways(self, layout: Layout) -> Ways:
        laid = tiles(layout, "tile", self.config.unit, self.tile_thw(layout))
        number = math.prod(self.tiles_thw(layout))
        windows = self.windows(layout)
        members = torch.zeros(len(windows), *[laid.slots // self.config.unit] * 2, dtype=torch.bool)
        for way, window in zip(members, windows, strict=True):
            way[:number, :number] = product([axis.visits(1) for axis in self.axes(layout, window)])
        return Ways(laid, self.plan(members[None], laid))

    def tile_thw(self, layout: Layout) -> tuple[int, int, int]:
        """Return frames, rows and columns of a tile."""
        columns = min(8, layout.grid_thw[2], self.config.unit)
        rows = min(8, layout.grid_thw[1], self.config.unit // columns)
        return min(6, layout.grid_thw[0], self.config.unit // (rows * columns)), rows, columns

    def tiles_thw(self, layout: Layout) -> tuple[int, ...]:
        """Return how many tiles there are on each axis."""
        return tuple(-(-length // tile) for length, tile in zip(layout.grid_thw, self.tile_thw(layout), strict=True))

    def axes(self, layout: Layout, window: Triple) -> tuple[Axis, ...]:
        """Return the axes, counted in tiles, with a window on them."""
        return tuple(map(Axis.fit, self.tiles_thw(layout), window))

    def windows(self, layout: Layout) -> tuple[Triple, ...]:
        """Return the windows that heads choose from."""
        if self.config.windows == "maximal":
            return maximal_windows(self.tiles_thw(layout), self.config.density)
        return self.config.windows


def maximal_windows(tiles_thw: tuple[int, ...], density: float) -> tuple[Triple, ...]:
    """Return the windows that read at most `density` of the tiles and lie in no larger such window; odd or whole on an axis."""
    extents = [[*range(1, number, 2), number] for number in tiles_thw]
    fitting = [w for w in itertools.product(*extents) if math.prod(w) <= max(density * math.prod(tiles_thw), 1)]
    return tuple(w for w in fitting if not any(v != w and all(a <= b for a, b in zip(w, v, strict=True)) for v in fitting))
