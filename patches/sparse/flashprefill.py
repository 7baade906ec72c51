"""FlashPrefill: past key blocks whose mean key stands out, against the best of the row of blocks.

FlashPrefill (arXiv 2603.06199) scores block J for query block I by its mean key,

    ``score_IJ = sum_(q in I) exp(s q.k_J)``,   kept where ``score_IJ >= alpha max_J' score_IJ'``,

without sorting or cumulative sums: a threshold relative to the largest. Read anyway are the first tokens, a window, and all by
the last query blocks. Its second version (arXiv 2608.19758) reads what is left as one key a block, its mean key with ``log |J|``
added to the logit and its mean value: ``rest: pool``. `alpha` is .1 for all models there; .18 for Llama and .08 for Qwen2 in the
first. Scoring costs ``1 / block`` of the products q.k of dense attention. Padded queries have no part in a score.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.kernels.past import mean_past
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.sparse.prefill import Prefill, PrefillConfig, PromptBlocks


class FlashPrefill(Prefill):
    """Read the past key blocks whose mean key scores within a factor of the best."""

    class Config(PrefillConfig):
        block: int = Field(128, ge=8, le=1024, multiple_of=8, description="Tokens per query and key block. Paper.")
        sink: int = Field(256, ge=0, description="Tokens at the front that all read. Paper.")
        local: int = Field(512, ge=0, description="Tokens ahead of its own block that a block reads. Paper.")
        alpha: float = Field(0.1, ge=0.0, le=1.0, description="Least score that is read, as a share of the largest. Paper.")
        last: int = Field(8, ge=0, description="Query blocks at the end that read all. Paper: 8, in its first version 2.")
        rest: Literal["drop", "pool"] = Field(
            "pool", description="What becomes of past blocks that are not selected: pool, or drop as in the first version."
        )

    config: Config

    def neutral(self) -> bool:
        return self.config.alpha == 0.0

    def route(self, blocks: PromptBlocks, budget: Tensor | None = None) -> BlockPlan:
        score = mean_past(blocks.q, blocks.k, blocks.block, blocks.causal, blocks.scale, blocks.held, blocks.reads)
        bound = score.amax(-1, keepdim=True) + torch.tensor(self.config.alpha, device=score.device).log()
        number = blocks.held.sum(-1, keepdim=True)  # [B|1, 1]: tokens stand in front
        end = (torch.arange(score.shape[2], device=score.device) + self.config.last) * blocks.block
        return blocks.plan((score >= bound) | (end >= number)[:, None, :, None])
