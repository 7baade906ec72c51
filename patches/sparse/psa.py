"""Pyramid sparse attention: the less a key block matters, the more of its keys are read as one.

Pyramid Sparse Attention (arXiv 2512.04025): exact, coarse and coarser blocks, then none.

A block at level h is read as the means of h consecutive keys and values, each with the logarithm of its count added to
its logit (``ln h``; less in a short tail, where the release repeats the last key instead).

* Importance of key block j to query block m: of a quarter of the tokens of both, the largest attention probability,
  divided by its sum over the row. All blocks are sampled by one permutation of their slots.
* Each row ranks its blocks by importance. ``thresholdbound``: a level takes blocks until their importance, with that of
  all before them, reaches its bound; level 1 takes at least ``floor(least_exact * blocks) + 1``. ``topk``: bounds are
  shares of ranks.
* A level's blocks are rounded up to fill whole tiles of keys, ``ceil(h * tile / block_k)`` blocks at a time, or down at
  the end of the row: what does not fill a tile there is not read. The release has tile 32; our kernels need none.
* `similarity` (off in most presets, as by default): the mean cosine of the first and the last key of each group of 2, 4
  and 8 must exceed its threshold, or the block is read at the finest level that it passes.

Text blocks are not candidates: they are read exactly, and read all. A row reads at least one visual block exactly (ours:
a small share of few blocks may be none).

On the bundled model (blocks of 64 by 32, twelve calls) attention outputs err by 13.4 % at density 0.135, random blocks of
equal density by 29.6 %; ``rest: pool`` brings 9.3 and 21.8 %. Rectification of the blocks of level 0 made it worse (14.0 %).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from accelplug.call import Layout
from accelplug.kernels.importance import sampled_importance
from accelplug.kernels.plan import LEVELS, BlockPlan
from accelplug.patches.sparse.template import Blocks, Scored, ScoredConfig
from accelplug.table import Table

PYRAMID = (1, *LEVELS)
"""Consecutive keys that are read as one; 0 stands for a block that is not read."""

LevelEnd = Annotated[float, Field(ge=0.0, le=1.0)]
Cosine = Annotated[float, Field(ge=-1.0, le=1.0)]


class Psa(Scored):
    """Read key blocks exactly, as means of 2, 4 or 8 keys, or not at all, by their importance."""

    class Config(ScoredConfig):
        """The released presets have block 128, block_k 128 or 32, and Gilbert order on Wan."""

        bounds: tuple[LevelEnd, LevelEnd, LevelEnd, LevelEnd] = Field(
            (0.4, 0.5, 0.6, 0.8), description="Where levels 1, 2, 4 and 8 end, cumulative; blocks behind are not read."
        )
        rule: Literal["thresholdbound", "topk"] = Field(
            "thresholdbound", description="Whether bounds are shares of a row's importance, or of its blocks."
        )
        reach: Annotated[float, Field(gt=0.0, le=100.0)] | Table = Field(
            1.0, description="Factor on all bounds, which then end at 1, or a table (steps, layers, heads) of them. Ours."
        )
        least_exact: float = Field(
            0.06,
            ge=0.0,
            le=1.0,
            description="Share of its blocks that a row reads at level 1 at least (rule: thresholdbound).",
        )
        tile: int | None = Field(
            None,
            ge=8,
            le=128,
            description="Keys that the blocks of a level are rounded to fill, 32 as released; none: no rounding.",
        )
        similarity: tuple[Cosine, Cosine, Cosine] | None = Field(
            None, description="Cosine above which the keys of a block may be read at level 2, 4 and 8; none: always."
        )
        seed: int = Field(0, ge=0, description="Of the permutation that says which tokens of a block are sampled.")

        @model_validator(mode="after")
        def _ascend(self) -> Self:
            if any(lower > upper for lower, upper in pairwise(self.bounds)):
                raise ValueError(f"bounds {self.bounds} must not descend: each is where a level ends and the next begins")
            return self

    config: Config
    by_means = True
    knob = "reach"
    rungs = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 2.5)

    def neutral(self, layout: Layout) -> bool:
        return not isinstance(self.config.reach, Table) and self.config.bounds[0] * self.config.reach >= 1.0

    def route(self, blocks: Blocks, budget: Tensor | None = None) -> BlockPlan:
        importance = sampled_importance(
            blocks.q,
            blocks.k,
            blocks.query_lengths,
            blocks.key_lengths,
            blocks.block,
            blocks.block_k,
            blocks.scale,
            blocks.key_mask,
            self.config.seed,
        )
        level = self.levels(importance, blocks.candidates, self.allowed(budget))
        if self.config.similarity is not None:
            level = torch.minimum(level, self.coarsest(blocks)[..., None, :])
        return blocks.plan(level == 1, torch.where(level > 1, level, 0))

    def levels(self, importance: Tensor, candidates: Tensor, reach: float | Tensor = 1.0) -> Tensor:
        """Return the level of each block, uint8 (B, H, M, N), 0 where it is not read.

        Parameters
        ----------
        importance : float32 (B, H, M, N), at least 0.
        candidates : bool (B|1, H|1, N), blocks that have a level.
        reach : factor on all bounds, or float32 (H, 1).
        """
        candidates = candidates[..., None, :]  # [B|1, H|1, 1, N]
        number = candidates.sum(-1)  # [B|1, H|1, 1]
        ranked, block = torch.where(candidates, importance, -1.0).sort(dim=-1, descending=True, stable=True)
        mass = ranked.clamp(min=0).cumsum(-1)
        before = (
            torch.nn.functional.pad(mass, (1, -1)) / mass[..., -1:]
        )  # share of all that rank higher; NaN where all are 0
        rank = torch.arange(importance.shape[-1], device=importance.device)
        ranked_level = torch.zeros_like(block, dtype=torch.uint8)
        start = torch.zeros_like(number)
        for h, bound in zip(PYRAMID, self.config.bounds, strict=True):
            end = self.end(h, torch.as_tensor(bound * reach, device=number.device).clamp(max=1), before, number)
            end = self.whole_tiles(h, start, torch.maximum(end, start), number)
            ranked_level = torch.where((rank >= start[..., None]) & (rank < end[..., None]), h, ranked_level)
            start = end
        return torch.zeros_like(ranked_level).scatter(-1, block, ranked_level)

    def end(self, h: int, bound: Tensor, before: Tensor, number: Tensor) -> Tensor:
        """Return the rank at which level h ends, by its bound alone: int64 (B, H, M) or (B|1, H|1, 1).

        Parameters
        ----------
        bound : float32 () or (H, 1), share at which the level ends.
        before : float32 (B, H, M, N), share of a row's importance in the blocks of higher rank.
        number : int64 (B|1, H|1, 1), candidates of a row.
        """
        if self.config.rule == "topk":
            end, least = (number * bound + 1e-4).long(), torch.ones_like(number)  # 20 * 0.15 is 3
        else:
            end = torch.where(bound < 1, (before < bound[..., None]).sum(-1), number)
            least = (number * self.config.least_exact + 1e-4).long() + 1
        return torch.minimum(torch.maximum(end, least) if h == 1 else end, number)

    def whole_tiles(self, h: int, start: Tensor, end: Tensor, number: Tensor) -> Tensor:
        """Move the end of level h so that its blocks fill tiles, inside the row's `number` of blocks."""
        if self.config.tile is None:
            return end
        fill = -(-h * self.config.tile // self.config.key_block)  # blocks
        up = start + -(-(end - start) // fill) * fill
        return torch.where(up < number, up, start + (number - start) // fill * fill)

    def coarsest(self, blocks: Blocks) -> Tensor:
        """Return the coarsest level at which each block's keys are alike enough, uint8 (B, H, N)."""
        gap = (0, blocks.k_tiles.slots - blocks.k.shape[-2])
        keys = torch.nn.functional.normalize(blocks.k.float(), dim=-1).repeat_interleave(
            blocks.q.shape[1] // blocks.k.shape[1], 1
        )
        keys = torch.nn.functional.pad(keys, (0, 0, *gap))
        valid = blocks.k_tiles.held
        if blocks.key_mask is not None:
            valid = valid & torch.nn.functional.pad(blocks.key_mask, gap)
        valid = valid[:, None] if valid.ndim == 2 else valid  # [P], [B, 1, P] or [B, H, P]
        coarsest = torch.ones(*keys.shape[:2], len(blocks.key_lengths), dtype=torch.uint8, device=keys.device)
        for h, threshold in zip(PYRAMID[1:], self.config.similarity or (), strict=True):
            groups = keys.unflatten(-2, (-1, blocks.block_k // h, h))  # [B, H, N, block_k / h, h, D]
            whole = valid.unflatten(-1, (-1, blocks.block_k // h, h))[..., [0, -1]].all(-1)
            cosine = (groups[..., 0, :] * groups[..., -1, :]).sum(-1).masked_fill(~whole, 0.0)
            number = whole.sum(-1)
            alike = (cosine.sum(-1) / number.clamp(min=1) > threshold) & (number > 0)
            coarsest = torch.where(alike, h, coarsest)
        return coarsest
