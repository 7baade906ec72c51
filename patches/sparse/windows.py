"""Windows on axes of the token grid: what methods share whose queries read a product of windows over frames, rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import Layout
from accelplug.kernels.orders import Tiles, axis_tiles, tiles
from accelplug.kernels.plan import BlockPlan, Box
from accelplug.kernels.static import product
from accelplug.patches.base import Config, Positive, UnimplementedHalf
from accelplug.patches.sparse.template import BlockSparse, TiledConfig

FAR = 1 << 30
"""Beyond every coordinate."""

Extent = Positive | Literal["full"]


class WindowConfig(TiledConfig):
    """The keys that all methods share whose queries read windows of the token grid."""

    tile_thw: tuple[Positive, Positive, Positive] | None = Field(
        None, description="Tokens per block on each axis, at most `block` in all; none: the tile that reads fewest blocks."
    )
    mask: Literal["token", "tile"] = Field("token", description="token is exact; tile reads every block it visits whole.")


@dataclass(frozen=True)
class Axis:
    """Windows along one axis.

    Positions that are `dilation` apart form a group, and windows stay inside groups. The *coordinate* of a position counts
    group by group, so that every window is an interval of coordinates. `cut` windows lose what lies beyond a border.
    """

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool
    cut: bool = False

    @classmethod
    def fit(
        cls,
        length: int,
        window: int | str,
        stride: int = 1,
        dilation: int = 1,
        causal: bool = False,
        cut: bool = False,
    ) -> Axis:
        """Fit settings to the axis. Windows that do not cross borders must lie in every group, unless they are whole groups."""
        dilation = min(dilation, length)
        if window == "full":
            window, cut = -(-length // dilation), False
        elif not cut:
            window = min(int(window), length // dilation)
        return cls(length, int(window), min(stride, int(window)), dilation, causal, cut)

    @property
    def full(self) -> bool:
        """Whether every position reads the whole axis."""
        first, last = self.reads()
        return self.dilation == 1 and bool((first == 0).all() and (last == self.length).all())

    def coordinate(self) -> Tensor:
        """Coordinate of each position, int64 (length,)."""
        position = torch.arange(self.length)
        return self._base(position) + position // self.dilation

    def reads(self) -> tuple[Tensor, Tensor]:
        """First and one-past-last coordinate that each position reads, both int64 (length,)."""
        position = torch.arange(self.length)
        group = (self.length - position % self.dilation + self.dilation - 1) // self.dilation  # positions in its group
        place = position // self.dilation
        leader = place // self.stride * self.stride
        if self.causal:
            leader = torch.minimum(leader + self.stride - 1, group - 1)
            first, last = (leader - self.window + 1).clamp(min=0), place + 1
        elif self.cut:
            first = leader + self.stride // 2 - self.window // 2
            first, last = first.clamp(min=0), torch.minimum(first + self.window, group)
        else:
            leader = torch.minimum(leader + self.stride // 2, group - 1)
            # Shifted inside. A whole group may be shorter than the window.
            first = torch.minimum(leader - self.window // 2, group - self.window).clamp(min=0)
            last = torch.minimum(first + self.window, group)
        return self._base(position) + first, self._base(position) + last

    def _base(self, position: Tensor) -> Tensor:
        return position % self.dilation * -(-self.length // self.dilation)

    def visits(self, tile: int) -> Tensor:
        """Which tiles each tile reads from, bool (tiles, tiles); tiles as in `orders.axis_tiles`.

        Windows move by at most their own size, so the windows of a tile leave no gap between them.
        """
        coordinate, (first, last) = self.coordinate(), self.reads()
        parts = axis_tiles(self.length, tile, self.dilation)
        low, high = (torch.stack([x[part[end]] for part in parts]) for x, end in ((first, 0), (last, -1)))
        key_low, key_high = (torch.stack([coordinate[part[end]] for part in parts]) for end in (0, -1))
        return (low[:, None] <= key_high) & (key_low < high[:, None])

    def meets(self, tile: int, steps: int) -> Tensor:
        """Which tiles hold positions a multiple of `steps` from one of each tile's, bool (tiles, tiles)."""
        tiles = axis_tiles(self.length, tile, self.dilation)
        residue = torch.stack([torch.bincount(part % steps, minlength=steps) for part in tiles])
        return residue @ residue.mT > 0


def visited_tiles(axes_thw: tuple[Axis, ...], tile_thw: tuple[int, ...], grid: tuple[int, ...] | None = None) -> int:
    """Count the (query tile, key tile) pairs that are read: what attention costs, in tiles."""
    near = [axis.visits(tile) for axis, tile in zip(axes_thw, tile_thw, strict=True)]
    number = math.prod(int(axis.sum()) for axis in near)
    if grid is not None:
        far = [axis.meets(tile, steps) for axis, tile, steps in zip(axes_thw, tile_thw, grid, strict=True)]
        both = math.prod(int((a & b).sum()) for a, b in zip(near, far, strict=True))
        number += math.prod(int(axis.sum()) for axis in far) - both
    return number


class Windowed(BlockSparse):
    """Template of the methods whose queries read a product of windows; a subclass writes `axes`."""

    Config: ClassVar[type[Config]] = WindowConfig
    config: WindowConfig

    def axes(self, layout: Layout) -> tuple[Axis, ...]:
        """Return the axes of `layout`: frames, rows, columns."""
        raise UnimplementedHalf(type(self), "axes")

    @property
    def grid(self) -> tuple[int, ...] | None:
        """Steps on each axis at which keys are read beside the window, by whole tiles."""
        return None

    def neutral(self, layout: Layout) -> bool:
        return all(axis.full for axis in self.axes(layout))

    def tile_thw(self, layout: Layout) -> tuple[int, int, int]:
        """Return the tile: the config's, or the one that reads fewest blocks; the most compact of equals."""
        return self.config.tile_thw or _best_tile(self.axes(layout), self.config.unit, self.grid)

    def order(self, layout: Layout) -> Tiles:
        frames, rows, columns = (axis.dilation for axis in self.axes(layout))
        return tiles(layout, "tile", self.config.unit, self.tile_thw(layout), (frames, rows, columns))

    def select(self, tiles: Tiles) -> BlockPlan:
        axes, tile_thw = self.axes(tiles.layout), self.tile_thw(tiles.layout)
        visual = product([axis.visits(tile) for axis, tile in zip(axes, tile_thw, strict=True)])
        if self.grid is not None:
            far = zip(axes, tile_thw, self.grid, strict=True)
            visual |= product([axis.meets(tile, steps) for axis, tile, steps in far])
        units, number = tiles.slots // self.config.unit, len(visual)
        members = torch.zeros(units, units, dtype=torch.bool)
        members[:number, :number] = visual
        box = self.box(tiles) if self.config.mask == "token" and not self.neutral(tiles.layout) else None
        return self.plan(members, tiles, box)

    def box(self, tiles: Tiles) -> Box:
        """Return the token-level windows, one axis of coordinates per axis that is not read whole."""
        layout, (_, rows, columns) = tiles.layout, tiles.layout.grid_thw
        token = torch.arange(tiles.slots) if tiles.gather is None else tiles.gather
        visual = token - layout.text_before
        is_text = (visual < 0) | (visual >= layout.visual)
        visual = visual.clamp(0, layout.visual - 1)
        places = (visual // (rows * columns), visual // columns % rows, visual % columns)
        bounds = [
            torch.stack([x[place] for x in (*axis.reads(), axis.coordinate())])
            for axis, place in zip(self.axes(layout), places, strict=True)
            if not axis.full
        ]
        low, high, coordinate = torch.stack(bounds, -1).to(torch.int32)  # [slots, axes] each
        low, high = (x.masked_fill(is_text[:, None], end) for x, end in ((low, -FAR), (high, FAR)))
        if not is_text.any():
            return Box(low, high, coordinate)
        # No point lies in every window, but one lies in every pair of half-lines: text stands right of all lower bounds on
        # one axis, and left of all upper bounds on another.
        above = coordinate.masked_fill(is_text[:, None], FAR - 1)
        below = coordinate.masked_fill(is_text[:, None], -FAR)
        return Box(
            torch.cat([low, torch.full_like(low, -FAR)], -1),
            torch.cat([torch.full_like(high, FAR), high], -1),
            torch.cat([above, below], -1),
        )


@lru_cache(maxsize=64)
def _best_tile(axes_thw: tuple[Axis, ...], block: int, grid: tuple[int, ...] | None) -> tuple[int, int, int]:
    divisors = [n for n in range(1, block + 1) if block % n == 0]
    shapes = [(t, h, block // t // h) for t in divisors for h in divisors if block % (t * h) == 0]
    return min(shapes, key=lambda tile_thw: (visited_tiles(axes_thw, tile_thw, grid), sum(tile_thw)))
