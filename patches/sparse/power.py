"""Powers of two: each block of a prompt reads the blocks 1, 2, 4, 8, ... before it.

PowerAttention (arXiv 2503.03588). Let an edge lead from block m to block ``m - b`` where b is a power of two. Then a block n before is
reached in as many layers as n has ones in binary, ``popcount(n)``: with ``log2 N`` blocks read, the field of view doubles with each
layer, and no block in it is left out. A window and the first tokens are read too.

Experimental: the paper trains on for this mask, and keeps 2 of 7 layers dense. Untrained, information is passed on only where a model
happens to do so: it is for layers and heads that are known to look near, by a recipe's rules.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from accelplug.kernels.plan import BlockPlan
from accelplug.patches.sparse.prefill import Prefill, PrefillConfig, PromptBlocks


class Power(Prefill):
    """Read the blocks at distances of powers of two, the first tokens and a window."""

    class Config(PrefillConfig):
        block: int = Field(256, ge=8, le=1024, multiple_of=8, description="Tokens per query and key block. Paper.")
        sink: int = Field(256, ge=0, description="Tokens at the front that all read. Paper.")
        local: int = Field(1024, ge=0, description="Tokens ahead of its own block that a block reads. Paper.")

    config: Config

    def route(self, blocks: PromptBlocks, budget: Tensor | None = None) -> BlockPlan:
        queries, keys = (torch.arange(len(x), device=x.device) for x in blocks.lengths)
        distance = (blocks.causal + queries[:, None] * blocks.block) // blocks.block - keys
        return blocks.plan((distance & (distance - 1) == 0) & blocks.past)
