"""Sampled rows of a prompt: a few exact rows of each block say which past key blocks the others read.

SampleAttention (arXiv 2406.15486) finds the keys of a whole head by some of its queries; by blocks it is ours, as `rows` is for
denoisers. With ``p_ij`` the attention of row i on key j, n rows R_m of block m, and J a block of keys,

    ``mass_mJ = 1/n sum_(i in R_m) sum_(j in J) p_ij``

is the share of their attention that these rows give to J, exactly. Block m reads what is read anyway, and the past blocks of most mass:
until it has read `density` of its blocks, or, with ``density: none``, until its blocks hold `top_p` of the mass: then heads and rows
take as many as they need. Sampling costs ``n / block`` of the products q.k of dense attention.

The rows of a block tell what all of it reads, those ahead of them too: `strict` has its first row and rows of the block before tell it.
There, in chunks, the first block of a chunk has its first row alone.

The last rows of a prompt, which ask, read all (`last`); of a prompt that comes in chunks, the last rows of each.

Heads differ by ten times in what they need for the same mass, and early layers need most: keep these dense by a rule.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from accelplug.kernels.past import sampled_past
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.rows import top_k, top_p
from accelplug.patches.sparse.prefill import Prefill, PrefillConfig, PromptBlocks
from accelplug.table import Table


class PrefillRows(Prefill):
    """Read the past key blocks to which a few exact rows of each block give most attention."""

    class Config(PrefillConfig):
        rows: int = Field(4, ge=1, le=64, description="Rows of each block that are held against all keys.")
        density: Annotated[float, Field(gt=0.0, le=1.0)] | Table | None = Field(
            None,
            description="Share of the blocks up to its own that a block reads, or a table (layers, heads) of them; none: by top_p.",
        )
        top_p: float = Field(
            0.95, ge=0.0, le=1.0, description="Share of its attention that the blocks hold which a block reads."
        )
        last: int = Field(
            128,
            ge=0,
            description="Rows at the end that read all, in whole blocks. After TriangleMix: they ask, and few of them are sampled. Ours, "
            "measured by benchmarks.long_context: without, needles are lost.",
        )
        strict: bool = Field(
            False,
            description="Whether a block is told by its first row and rows before it, so that what a row reads depends on no later one. "
            "By default rows all over the block tell, up to block - 1 tokens behind a row that goes by them.",
        )
        grouped: bool = Field(False, description="Whether heads that share keys read the same blocks, by their mean mass.")

    config: Config
    knob = "density"

    def neutral(self) -> bool:
        return (self.config.top_p if self.config.density is None else self.config.density) == 1.0

    def route(self, blocks: PromptBlocks, budget: Tensor | None = None) -> BlockPlan:
        sizes = blocks.block, blocks.causal, self.config.rows, blocks.scale
        mass = sampled_past(blocks.q, blocks.k, *sizes, blocks.held, blocks.reads, self.config.strict)  # [B, H, M, N]
        if self.config.grouped:
            mass = mass.unflatten(1, (blocks.k.shape[1], -1)).mean(2)
            budget = budget if budget is None else budget.unflatten(0, (blocks.k.shape[1], -1)).mean(1)
        candidates, last = blocks.candidates, blocks.last(self.config.last)
        if self.config.density is None:
            rest = torch.where(candidates, mass, 0.0)
            missing = self.config.top_p - (1.0 - rest.sum(-1))  # [B, H, M]
            return blocks.plan(top_p(rest, missing, k_min=0, candidates=candidates) | last)
        share: Any = self.config.density if budget is None else budget[:, None]
        reached = blocks.past.sum(-1) + 1
        number = torch.ceil(share * reached - 1e-4).long() - (reached - candidates.sum(-1))
        return blocks.plan(top_k(mass, number, candidates=candidates) | last)
