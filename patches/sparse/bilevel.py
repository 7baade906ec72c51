"""Bi-level routing: a region of queries reads the regions that it resembles most, and those around it.

BiFormer's bi-level routing attention (arXiv 2303.08810), without training.

Regions are tiles of the token grid. With mean queries q_m and mean keys k_j of regions, ``A = softmax(scale q_m . k_j)``
over all visual regions, region m reads the `k` regions of the largest A (or, with `p`, the fewest whose sum reaches p,
at least k), token by token. Always read besides: itself, the tiles within `halo` on every axis, and text.

The published network routes once for all heads, on queries and keys before they are split, and was trained to; here
every head routes for itself. Its convolution on the values is trained, and left out. Where `block_k` is smaller than
`block`, parts of a region compete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from accelplug.kernels.orders import Tiles, compact_tile
from accelplug.kernels.rows import top_k, top_p
from accelplug.patches.sparse.template import Blocks, Scored, ScoredConfig

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import Layout
    from accelplug.kernels.plan import BlockPlan


class Bilevel(Scored):
    """Each region of queries reads the regions whose mean keys score highest with its mean query, and those around it."""

    class Config(ScoredConfig):
        order: Literal["tile"] = Field("tile", description="Tokens of a region lie together.")
        k: int = Field(4, ge=1, description="Regions that a region chooses. Paper: 1 to 16, of 49.")
        p: float | None = Field(
            None,
            gt=0.0,
            le=1.0,
            description="Instead of exactly k: as many as hold this mass, at least k; 1 is dense. Ours.",
        )
        halo: int = Field(
            1, ge=0, description="Regions to each side, on every axis, that are always read. Ours; published: 0."
        )

    config: Config

    def neutral(self, layout: Layout) -> bool:
        return self.config.p == 1.0

    def route(self, blocks: Blocks) -> BlockPlan:
        scores = blocks.q_pool @ blocks.k_pool.mT * blocks.scale  # [B, H, M, N]
        candidates = blocks.candidates[..., None, :].expand(scores.shape)
        if self.config.p is None:
            chosen = top_k(scores, self.config.k, candidates=candidates)
        else:
            probability = scores.masked_fill(~candidates, -torch.inf).softmax(-1).nan_to_num(0.0)
            chosen = top_p(probability, self.config.p, self.config.k, candidates=candidates)
        return blocks.plan(chosen | self.around(blocks.k_tiles))

    def around(self, tiles: Tiles) -> Tensor:
        """Which key blocks lie in the query block's own tile or in its halo, bool (M, N)."""
        tile_thw = self.config.tile_thw or compact_tile(tiles.layout.grid_thw, self.config.unit)
        place = tiles.coordinates()
        size = place.new_tensor(tile_thw)
        rows, columns = (place[::block] // size for block in (self.config.block, self.config.key_block))
        near = ((rows[:, None] - columns).abs() <= self.config.halo).all(-1)
        text = tiles.is_text(self.config.block)[:, None] | tiles.is_text(self.config.key_block)
        return near & ~text
