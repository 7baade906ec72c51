"""TriangleMix: sinks and a window for most rows, and all keys for the last ones.

TriangleMix (arXiv 2507.21526): in the deeper layers, what rows in the middle of a prompt read far away matters little, and what
the last rows read, which answer, matters much. So every row reads the first tokens and a window, and the last `last` rows of the
prompt read all: a triangle without its middle. Shallow layers stay dense by the recipe's rules; the paper begins at layer 16 of
32 of Llama-3.1-8B, and at 20 of 28 of Qwen2.5-7B.

A prompt that comes in chunks has last rows in each. Which rows are last depends on how long the prompt is, and what they read does on
nothing else.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from accelplug.kernels.plan import BlockPlan
from accelplug.patches.sparse.prefill import Prefill, PrefillConfig, PromptBlocks


class Triangle(Prefill):
    """Read the first tokens and a window, and in the last rows everything."""

    class Config(PrefillConfig):
        sink: int = Field(8, ge=0, description="Tokens at the front that all read, in whole blocks. Paper.")
        local: int = Field(512, ge=0, description="Tokens ahead of its own block that a block reads. Paper.")
        last: int = Field(128, ge=1, description="Rows at the end that read all, in whole blocks. Paper.")

    config: Config

    def route(self, blocks: PromptBlocks, budget: Tensor | None = None) -> BlockPlan:
        return blocks.plan(blocks.last(self.config.last))
