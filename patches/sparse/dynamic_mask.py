"""Dynamic mask: so many keys as a budget says, by scores that weigh what a key would bring as well as how well it fits.

Dynamic mask attention (arXiv 2508.02124) learns from the values a bias for every key, and reads the `keys` of largest score. Without
its training, what is left of the bias is the size of a value: with ``a_IJ`` the weight of block J for query block I by its mean key,

    ``score_IJ = log a_IJ + log mean_(j in J) ||v_j||``,

and a query block reads the blocks of largest score, `keys` tokens in all. So a prompt reads ``O(N keys)`` pairs.

Experimental: a budget of keys that does not grow with the prompt is spent by heads that need all of it and by heads that need none.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from accelplug.kernels.past import mean_past
from accelplug.kernels.plan import BlockPlan, pool
from accelplug.kernels.rows import top_k
from accelplug.patches.sparse.prefill import Prefill, PrefillConfig, PromptBlocks


class DynamicMask(Prefill):
    """Read the past key blocks that fit best and have the largest values, as many as a budget of keys allows."""

    class Config(PrefillConfig):
        keys: int = Field(
            2048, ge=8, description="Keys that a block reads beside those that all read, in whole blocks. Paper."
        )

    config: Config

    def route(self, blocks: PromptBlocks, budget: Tensor | None = None) -> BlockPlan:
        fit = mean_past(blocks.q, blocks.k, blocks.block, blocks.causal, blocks.scale, blocks.held, blocks.reads)
        size, _ = pool(blocks.v.float().norm(dim=-1, keepdim=True), blocks.lengths[1], blocks.block, blocks.reads)
        size = size.mT.clamp(min=1e-30).log().repeat_interleave(fit.shape[1] // size.shape[1], 1)  # [B, H, 1, N]
        return blocks.plan(top_k(fit + size, self.config.keys // blocks.block, candidates=blocks.candidates))
