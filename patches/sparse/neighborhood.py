"""Neighbourhood attention: every query reads a window around it, on a grid of frames, rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from accelplug.call import Layout
from accelplug.kernels.orders import Tiles, axis_tiles, tiles
from accelplug.kernels.plan import BlockPlan, Box
from accelplug.patches.base import BlockConfig, BlockSparse

FAR = 1 << 30
"""Beyond every coordinate."""

Positive = Annotated[int, Field(ge=1)]
Extent = Positive | Literal["full"]


class NeighborhoodConfig(BlockConfig):
    """Knobs of `Neighborhood`; triples are frames, rows, columns."""

    window: tuple[Extent, Extent, Extent] = Field(
        ("full", 24, 24), description="Keys that a query reads on each axis; full for the whole axis; more is cut to it."
    )
    stride: tuple[Positive, Positive, Positive] = Field(
        (1, 1, 1), description="Neighbours that share one window on each axis; 1 slides, the window's size partitions."
    )
    dilation: tuple[Positive, Positive, Positive] = Field((1, 1, 1), description="Steps between the keys of a window.")
    causal: tuple[bool, bool, bool] = Field((False, False, False), description="Axes on which nothing ahead is read.")
    tile_thw: tuple[Positive, Positive, Positive] | None = Field(
        None, description="Tokens per block on each axis, at most `block` in all; none: the tile that reads fewest blocks."
    )
    mask: Literal["token", "tile"] = Field("token", description="token is exact; tile reads every block it visits whole.")

    @model_validator(mode="after")
    def _fits(self) -> NeighborhoodConfig:
        for window, stride in zip(self.window, self.stride, strict=True):
            if window != "full" and stride > window:
                raise ValueError(
                    f"stride {stride} is more than window {window}: keys between two windows would never be read"
                )
        if self.tile_thw and math.prod(self.tile_thw) > self.unit:
            raise ValueError(
                f"tile_thw {self.tile_thw} holds {math.prod(self.tile_thw)} tokens, more than a block of {self.unit}"
            )
        return self


@dataclass(frozen=True)
class Axis:
    """Windows along one axis.

    Positions that are `dilation` apart form a group, and windows stay inside groups. The *coordinate* of a position counts
    group by group, so that every window is an interval of coordinates.
    """

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    @classmethod
    def fit(cls, length: int, window: int | str, stride: int = 1, dilation: int = 1, causal: bool = False) -> Axis:
        """Cut settings to the axis: every group must hold a whole window."""
        dilation = 1 if window == "full" else min(dilation, length)
        window = length if window == "full" else min(int(window), length // dilation)
        return cls(length, window, min(stride, window), dilation, causal)

    @property
    def full(self) -> bool:
        """Whether every position reads the whole axis."""
        return self.window == self.length and (self.length == 1 or not self.causal)

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
        else:
            leader = torch.minimum(leader + self.stride // 2, group - 1)
            first = torch.minimum((leader - self.window // 2).clamp(min=0), group - self.window)  # shifted inside
            last = first + self.window
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


def visited_tiles(axes_thw: tuple[Axis, ...], tile_thw: tuple[int, ...]) -> int:
    """Count the (query tile, key tile) pairs that are read: what attention costs, in tiles."""
    return math.prod(int(axis.visits(tile).sum()) for axis, tile in zip(axes_thw, tile_thw, strict=True))


class Neighborhood(BlockSparse):
    """Generalized neighbourhood attention (arXiv 2504.16922), a product of windows over frames, rows and columns.

    On an axis of L positions with window w and stride s, position i follows ``leader = min(i // s * s + s // 2, L - 1)``
    and reads the w positions from ``leader - w // 2``, shifted inside at the borders, so that every query keeps exactly w.
    On a causal axis ``leader = min(i // s * s + s - 1, L - 1)``, and i reads ``[max(leader - w + 1, 0), i]``. With dilation
    d, all this happens among the positions of one residue mod d.

    Settings give the family: stride 1 is neighbourhood attention, dilation its dilated form (arXiv 2209.15001), stride =
    window blocked attention, and window and stride in multiples of the tile the sliding tiles of arXiv 2502.04507 (an odd
    number of them), where tiles are read whole or not at all. Tiles are cut, not padded, at the far border. ``mask: tile``
    reads a superset: every tile that a window touches, whole.
    """

    Config = NeighborhoodConfig
    config: NeighborhoodConfig
    cite = "arXiv 2504.16922"

    def axes(self, layout: Layout) -> tuple[Axis, ...]:
        """Return the axes of `layout`: frames, rows, columns."""
        config = self.config
        return tuple(map(Axis.fit, layout.grid_thw, config.window, config.stride, config.dilation, config.causal))

    def neutral(self, layout: Layout) -> bool:
        return all(axis.full for axis in self.axes(layout))

    def tile_thw(self, layout: Layout) -> tuple[int, int, int]:
        """Return the tile: the config's, or the one that reads fewest blocks; the most compact of equals."""
        return self.config.tile_thw or _best_tile(self.axes(layout), self.config.unit)

    def order(self, layout: Layout) -> Tiles:
        frames, rows, columns = (axis.dilation for axis in self.axes(layout))
        return tiles(layout, "tile", self.config.unit, self.tile_thw(layout), (frames, rows, columns))

    def select(self, tiles: Tiles) -> BlockPlan:
        axes = self.axes(tiles.layout)
        visits = [axis.visits(tile) for axis, tile in zip(axes, self.tile_thw(tiles.layout), strict=True)]
        units, number = (slots // self.config.unit for slots in (tiles.slots, tiles.visual_slots))
        members = torch.zeros(units, units, dtype=torch.bool)
        members[:number, :number] = torch.einsum("ad,be,cf->abcdef", *(v.int() for v in visits)).reshape(number, number)
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
def _best_tile(axes_thw: tuple[Axis, ...], block: int) -> tuple[int, int, int]:
    divisors = [n for n in range(1, block + 1) if block % n == 0]
    shapes = [(t, h, block // t // h) for t in divisors for h in divisors if block % (t * h) == 0]
    return min(shapes, key=lambda tile_thw: (visited_tiles(axes_thw, tile_thw), sum(tile_thw)))
