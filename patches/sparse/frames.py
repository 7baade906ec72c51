"""Whole frames: what methods share whose queries read every token of some latent frames, and none of the others."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from accelplug.call import Layout
from accelplug.kernels.orders import Tiles, compact_tile, tiles
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.base import UnimplementedHalf
from accelplug.patches.sparse.template import BlockSparse


class FrameSparse(BlockSparse):
    """Template of the methods whose queries read whole frames; a subclass writes `reads`.

    A block never holds tokens of two frames, so that what is read is exactly what `reads` says: at 30 x 52 tokens a frame fills 13 blocks
    of 128 with 120 tokens each.
    """

    writes = ("reads",)

    def reads(self, frames: int, **where: Any) -> Tensor:
        """Return which frames the queries of each frame read, bool (T, T)."""
        raise UnimplementedHalf(type(self), "reads")

    def order(self, layout: Layout, **where: Any) -> Tiles:
        return tiles(layout, "tile", self.config.unit, _within_a_frame(layout.grid_thw, self.config.unit))

    def select(self, tiles: Tiles, **where: Any) -> BlockPlan:
        frames, unit = tiles.layout.grid_thw[0], self.config.unit
        units, visual = tiles.slots // unit, tiles.visual_slots // unit
        read = self.reads(frames, **where).repeat_interleave(visual // frames, 0).repeat_interleave(visual // frames, 1)
        members = read.new_zeros(units, units)
        members[:visual, :visual] = read
        return self.plan(members, tiles)


@lru_cache(maxsize=64)
def _within_a_frame(grid_thw: tuple[int, int, int], unit: int) -> tuple[int, int, int]:
    return compact_tile((1, *grid_thw[1:]), unit)
