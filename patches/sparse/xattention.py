"""XAttention: past key blocks by sums along antidiagonals.

XAttention (arXiv 2503.16428) sums logits along the antidiagonals of tiles of ``stride x stride``, which cross every row and every
column of a tile once. Groups of `stride` keys, and of queries in reversed order, are laid side by side, so that one product of
vectors of ``stride * D`` numbers is the sum of an antidiagonal; a softmax over a row of tiles, with the sum divided by `stride`,
makes shares of it. A block reads the blocks of most share until they hold `tau` of it, its own and those that are read anyway
among them. It costs ``1 / stride`` of the products q.k of dense attention. Paper: stride 8 or 16, blocks of 128, tau .9, or .82
to .99 by head.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from accelplug.kernels.past import antidiagonal_past
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.rows import top_p
from accelplug.patches.sparse.prefill import Prefill, PrefillConfig, PromptBlocks


class XAttention(Prefill):
    """Read the past key blocks that hold most of the attention along antidiagonals."""

    class Config(PrefillConfig):
        block: int = Field(128, ge=8, le=1024, multiple_of=8, description="Tokens per query and key block. Paper.")
        sink: int = Field(1, ge=0, description="Tokens at the front that all read, in whole blocks. Paper: the first block.")
        local: int = Field(0, ge=0, description="Tokens ahead of its own block that a block reads. Paper: none.")
        stride: int = Field(16, ge=2, le=128, description="Tokens of a tile. Paper: 8 or 16.")
        tau: float = Field(0.9, ge=0.0, le=1.0, description="Share that the blocks hold which a block reads. Paper.")

        @model_validator(mode="after")
        def _tiles_fit(self) -> Self:
            if self.block % self.stride:
                raise ValueError(f"block must be a multiple of stride, got block {self.block} and stride {self.stride}")
            return self

    config: Config

    def neutral(self) -> bool:
        return self.config.tau == 1.0

    def route(self, blocks: PromptBlocks, budget: Tensor | None = None) -> BlockPlan:
        sizes = blocks.block, blocks.causal, self.config.stride, blocks.scale
        mass = antidiagonal_past(blocks.q, blocks.k, *sizes, blocks.held, blocks.reads)
        candidates = blocks.candidates
        rest = torch.where(candidates, mass, 0.0)
        return blocks.plan(top_p(rest, self.config.tau - (1.0 - rest.sum(-1)), k_min=0, candidates=candidates))
