"""Landmarks: each block of the past is stood for by one key, and the few that a block's queries would gate to are read whole.

Landmark attention (arXiv 2305.16300) trains a token at the end of each block whose key is a gate to the block: attention is a softmax
over the landmarks times one inside of each block, and a few blocks of most weight are read. Without its training a block's mean key
stands in for the landmark. With ``g_iJ`` the softmax over past blocks J of ``s q_i.k_J + log |J|``, a query block reads the `k` blocks
of largest mean gate. Scoring costs ``1 / block`` of the products q.k of dense attention.

Experimental: means are poor landmarks of blocks in which one key matters.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from accelplug.kernels.past import gated_past
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.rows import top_k
from accelplug.patches.sparse.prefill import Prefill, PrefillConfig, PromptBlocks


class Landmark(Prefill):
    """Read the few past key blocks that a softmax over their mean keys gives most weight."""

    class Config(PrefillConfig):
        k: int = Field(
            4, ge=1, description="Past blocks that are read, beside those that all read. Paper: 2 or 4, of 50 tokens."
        )

    config: Config

    def route(self, blocks: PromptBlocks, budget: Tensor | None = None) -> BlockPlan:
        gate = gated_past(blocks.q, blocks.k, blocks.block, blocks.causal, blocks.scale, blocks.held, blocks.reads)
        return blocks.plan(top_k(gate, self.config.k, candidates=blocks.candidates))
