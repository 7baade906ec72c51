"""Sinks and a window: each block of a prompt reads its first tokens and its last ones.

StreamingLLM (arXiv 2309.17453) as a mask: the first tokens, which take the attention that a head has no use for, and a sliding window.
Positions stay those of the prompt. It is what `sink` and `local` of all methods of sparse prefill read, and no more: heads that look
for something far away lose it, so that it is for layers and heads that are known to look near.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from accelplug.kernels.plan import BlockPlan
from accelplug.patches.sparse.prefill import Prefill, PrefillConfig, PromptBlocks


class StreamingWindow(Prefill):
    """Read the first tokens and a sliding window."""

    class Config(PrefillConfig):
        sink: int = Field(64, ge=0, description="Tokens at the front that all read. Paper: 4; here whole blocks.")
        local: int = Field(1024, ge=0, description="Tokens ahead of its own block that a block reads. Paper: 512 to 2,044.")

    config: Config

    def route(self, blocks: PromptBlocks, budget: Tensor | None = None) -> BlockPlan:
        return blocks.plan(blocks.forced)
