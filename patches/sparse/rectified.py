"""Rectified sparse attention: pooled scores select, neighbours in space and time are read too, and the rest is compensated.

Rectified SpaAttn (arXiv 2511.19835): Jenga's selection, its output weighed against what it leaves out.

With pooled queries and keys (the mean of each block) and ``P = softmax(scale q_m.k_j)`` over visual blocks j, a row of
blocks m reads

* its likeliest blocks until their sum exceeds p, and at least ``floor((1 - drop_rate) * blocks)`` of them. In joint
  attention P is the reallocated one (`kernels.rectify`), and all text together is one candidate more, as released: where
  it ranks high, a row reads fewer visual blocks;
* every block that holds a token within one step of one of its own, on all three axes (26 neighbours; `adjacent`);
* with `first_frame`, if it is one of the first ``floor(blocks / frames)`` blocks, the others of these. In raster order
  they are the first frame; along a curve, where it begins;
* all text; text rows read everything.

What it does not read is compensated by ``rest: rectified`` (reallocation and gain, see `kernels.rectify`), which every
other selector may have as well.

On the bundled model (blocks of 64, twelve calls) the selection errs less than random blocks of equal density with every
rest. Attention outputs err by 14.4 % with this rest at density 0.19 (19.2 % dropped, 16.8 % without gain), yet by 10.8 %
with ``rest: pool``, which weighs the blocks row by row: there, and for all selectors tried, pool was the better one.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from accelplug.call import Layout
from accelplug.kernels.orders import Tiles
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.rectify import reallocate, text_keys
from accelplug.kernels.rows import top_p
from accelplug.patches.sparse.template import BlockParams, Blocks, RestKind, Scored, ScoredConfig
from accelplug.table import Table


class RectifiedSpaAttn(Scored):
    """Read the likeliest and the neighbouring key blocks, and weigh them against the mean values of the others."""

    class Config(ScoredConfig):
        """The release has Gilbert order, block 128, p 0.3, and a drop_rate of 0.75 to 0.9 by model."""

        rest: RestKind = Field(
            "rectified", description="What becomes of the key blocks that are not read; rectified is the method."
        )
        drop_rate: Annotated[float, Field(ge=0.0, le=1.0)] | Table = Field(
            0.75,
            description="Share of the visual blocks that a row need not read, or a table of them; 0 reads all: the call runs dense.",
        )
        p: float = Field(
            0.3, ge=0.0, le=1.0, description="Probability that a row's likeliest blocks reach together, at least."
        )
        adjacent: bool = Field(True, description="Whether a block reads all blocks that it touches in time and space.")
        first_frame: bool = Field(False, description="Whether the first blocks, a frame's worth, read each other.")

        @model_validator(mode="after")
        def _clusters_have_no_neighbours(self) -> Self:
            if self.order == "kmeans" and (self.adjacent or self.first_frame):
                raise ValueError("blocks of order: kmeans have no place on the grid: set adjacent and first_frame to false")
            return self

    config: Config
    knob = "drop_rate"
    rungs = (0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.75, 0.65, 0.5, 0.3)

    def neutral(self, layout: Layout) -> bool:
        return self.config.drop_rate == 0.0

    def _params(self, layout: Layout, where: dict[str, Any]) -> BlockParams:
        tiles = self.order(layout, **where)
        clustered = self.config.order == "kmeans"  # then only a call's own tiles say how many blocks there are
        return BlockParams(tiles, None, {"always": None if clustered else self.always(tiles, tiles)})

    def always(self, q_tiles: Tiles, k_tiles: Tiles) -> Tensor:
        """Return what is read whatever the scores say, bool (M, N), or (..., M, N) where the order differs by head."""
        block, block_k = self.config.block, self.config.key_block
        read = torch.zeros(q_tiles.slots // block, k_tiles.slots // block_k, dtype=torch.bool, device=k_tiles.held.device)
        if self.config.adjacent:
            read = adjacency(q_tiles, k_tiles, block, block_k)
        if self.config.first_frame:
            frames = k_tiles.layout.grid_thw[0]
            first = [tiles.visual_slots // (size * frames) for tiles, size in ((q_tiles, block), (k_tiles, block_k))]
            read[..., : first[0], : first[1]] = True
        return read

    def route(self, blocks: Blocks, always: Tensor | None = None, budget: Tensor | None = None) -> BlockPlan:
        if always is None:
            always = self.always(blocks.q_tiles, blocks.k_tiles)
        candidates = blocks.candidates[..., None, :]  # [B|1, H|1, 1, N]
        k_min = ((1 - self.allowed(budget)) * candidates.sum(-1) + 1e-4).long().clamp(min=1)  # 30 * (1 - 0.8) is 6
        if blocks.k_tiles.visual_slots == blocks.k_tiles.slots:
            logits = (blocks.q_pool * blocks.scale) @ blocks.k_pool.transpose(-1, -2)
            probability = logits.masked_fill(~candidates, -torch.inf).softmax(-1)
            return blocks.plan(top_p(probability, self.config.p, k_min, candidates=candidates) | always)
        probability = self.beside_text(blocks)
        text = torch.ones_like(candidates[..., :1])
        members = top_p(probability, self.config.p, k_min, candidates=torch.cat([candidates, text], -1))[..., :-1]
        return blocks.plan(members | always)

    def beside_text(self, blocks: Blocks) -> Tensor:
        """Reallocated probability of each key block, 0 for blocks of text, then that of all text: float32 (B, H, M, N + 1)."""
        visual_slots, ratio = blocks.k_tiles.visual_slots, blocks.q.shape[1] // blocks.k.shape[1]
        visual = visual_slots // blocks.block_k
        text, valid = text_keys(blocks.k, blocks.key_lengths, blocks.block_k, visual_slots, blocks.key_mask)
        probability = reallocate(
            blocks.q_pool,
            blocks.k_pool[..., :visual, :],
            blocks.k_number[..., :visual],
            text.repeat_interleave(ratio, 1),
            valid,
            blocks.scale,
        )
        rest = pad(probability, (0, len(blocks.key_lengths) - visual))
        return torch.cat([rest, (1 - probability.sum(-1, keepdim=True)).clamp(min=0)], -1)


def _block_of_token(tiles: Tiles, block: int) -> Tensor:
    """Block of each visual token, int64 (T, H, W), or (..., T, H, W) where the order differs by head."""
    first = tiles.layout.text_before
    return (tiles.slot_of_token()[..., first : first + tiles.layout.visual] // block).unflatten(-1, tiles.layout.grid_thw)


def adjacency(q_tiles: Tiles, k_tiles: Tiles, block: int, block_k: int) -> Tensor:
    """Which key blocks hold a token within one step, on all three axes, of a token of each query block.

    Returns
    -------
    touches : bool (M, N), or (..., M, N) where the order differs by head. Text touches nothing.
    """
    grid_thw = k_tiles.layout.grid_thw
    query_block, key_block = (_block_of_token(tiles, size) for tiles, size in ((q_tiles, block), (k_tiles, block_k)))
    queries, keys = q_tiles.slots // block, k_tiles.slots // block_k
    pairs = []
    for step in product((-1, 0, 1), repeat=3):
        t, h, w = (slice(max(0, -d), n - max(0, d)) for d, n in zip(step, grid_thw, strict=True))
        to_t, to_h, to_w = (slice(max(0, d), n - max(0, -d)) for d, n in zip(step, grid_thw, strict=True))
        pairs.append((query_block[..., t, h, w] * keys + key_block[..., to_t, to_h, to_w]).flatten(-3))
    pair = torch.cat(pairs, -1)
    touches = torch.zeros(*pair.shape[:-1], queries * keys, dtype=torch.bool, device=pair.device)
    return touches.scatter(-1, pair, True).unflatten(-1, (queries, keys))
