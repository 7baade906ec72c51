"""Span search: of candidates that thin out with distance, the best few stand for spans of keys that a block reads whole.

Superlinear multi-step attention (arXiv 2601.18401) searches a past of N tokens in two steps: of ``O(N^p)`` candidates, p about a
half, that lie the farther apart the farther back they are, some are chosen, and around each a span of as many tokens is read. Its
search keys are trained. Here the mean key of the candidate's block stands in for them (as in FlashPrefill): with M blocks ahead,
candidates lie ``i^(1/p)`` blocks back, i = 1, 2, ..., and the best `spans` of them are read with the blocks before them, ``M^p`` in
all. So a prompt reads ``O(N^(1+p))`` pairs.

Experimental: without its training, what lies between two candidates is not looked at.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from accelplug.kernels.past import mean_past
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.rows import top_k
from accelplug.patches.sparse.prefill import Prefill, PrefillConfig, PromptBlocks


class Superlinear(Prefill):
    """Read the spans whose candidate scores best, of candidates that thin out with distance."""

    class Config(PrefillConfig):
        power: float = Field(
            0.5, ge=0.25, le=1.0, description="p: candidates and tokens of a span go by N^p. Paper: .5 to .55."
        )
        spans: int = Field(3, ge=1, le=64, description="Spans that a block reads. Paper: 2 or 3.")

    config: Config

    def route(self, blocks: PromptBlocks, budget: Tensor | None = None) -> BlockPlan:
        score = mean_past(blocks.q, blocks.k, blocks.block, blocks.causal, blocks.scale, blocks.held, blocks.reads)
        queries, keys = (torch.arange(len(x), device=score.device) for x in blocks.lengths)
        ahead = (blocks.causal + queries[:, None] * blocks.block) // blocks.block
        distance = ahead - keys  # [M, N]
        steps = torch.arange(1, len(keys) + 1, device=score.device)
        stripes = (steps.double() ** (1 / self.config.power)).round().long()
        anchors = top_k(score, self.config.spans, candidates=blocks.candidates & torch.isin(distance, stripes))
        width = (ahead.double() ** self.config.power).ceil().long()  # [M, 1], blocks of a span
        behind = pad(anchors.flip(-1).cumsum(-1).flip(-1), (0, 1))  # how many anchors lie at a block or behind it
        far = (keys + width).clamp(max=len(keys)).expand(*anchors.shape)
        return blocks.plan(blocks.candidates & (behind[..., :-1] > behind.gather(-1, far)))
