"""Hierarchical attention in two levels: a block's own keys one by one, every other block as one, weighed once for all rows.

Hierarchical Self-Attention (arXiv 2509.15448, theorem 3.2) over a tree of two levels: blocks, and their tokens.

A query block B reads its own keys E exactly. Any other block C is read through the means of its keys and values, and
what it weighs is settled between blocks, once for all rows of B:

    ``a_B  = mean_i logsumexp_{j in E} (scale q_i.k_j)``                     i over the rows of B
    ``b_BC = log |C| + scale mean(q_B).mean(k_C)``
    ``(mu_B, w_BC) = softmax(a_B, b_BC)``
    ``out_i = mu_B out_exact_i + sum_C w_BC mean(v_C)``

Of all attention maps that are constant on each pair (B, C), this one has the least KL divergence to the softmax, summed
over rows. ``rest: pool`` is the same without the tie, so never further from it, and reads every pooled key with every
row; the tied far part costs ``1 / block`` of that. Text is in E, and text rows read everything.

The paper derives ``b`` from distances of normalised queries and keys; with the RMS norms on q and k that most denoisers
have, lengths are nearly constant, and the inner product above says the same.

Experimental: no result on denoisers is published. On the bundled model (blocks of 64, twelve calls) attention outputs err
by 35 % with a block alone and 25 % with two neighbours on either side (32 % with as many random blocks); ``rest: pool``,
with one more key per block and row, by 29 and 22 %. Selectors by scores err by 10 to 16 % at two to four times the density.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt

from accelplug.call import Layout
from accelplug.kernels.orders import Tiles, tiles
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.static import band
from accelplug.patches.sparse.template import BlockSparse, OrderedConfig, RestKind


class Hierarchical(BlockSparse):
    """Read a block's own keys one by one, every other block as one, weighed once for all rows of the block."""

    class Config(OrderedConfig):
        rest: RestKind = Field(
            "tied", description="What becomes of the blocks beyond; tied is the method, pool weighs them row by row."
        )
        band: NonNegativeInt | Literal["full"] = Field(
            0,
            description="Blocks on either side of its own that a query block reads exactly too; full: all, the call runs dense.",
        )

    config: Config

    def neutral(self, layout: Layout) -> bool:
        return self.config.band == "full" or layout.visual <= self.config.unit

    def order(self, layout: Layout, **where: Any) -> Tiles:
        return tiles(layout, self.config.order, self.config.unit, self.config.tile_thw)

    def select(self, tiles: Tiles, **where: Any) -> BlockPlan:
        unit = self.config.unit
        width = tiles.slots if self.config.band == "full" else self.config.band * unit
        return self.plan(band(tiles.slots, unit, unit, width), tiles)
