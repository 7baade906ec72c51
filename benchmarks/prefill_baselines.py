"""MInference and FlexPrefill as patches, to be measured beside ours by `benchmarks.long_context`: the last rows say what all read.

* minference (arXiv 2407.02490): of the last 64 queries' attention, the keys (vertical) and the diagonals (slash) of largest sums.
  The paper has a table of how many for each head of a few models; here all heads have as many. By blocks, where theirs reads tokens.
* flexprefill (arXiv 2502.20766): where mean keys tell the attention of the last block truly, blocks by mean keys (theirs: and
  mean queries) for all rows; else columns and diagonals of blocks, as many as hold `gamma` of the last block's attention.

Sequences without padding alone.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

import accelplug
from accelplug.kernels.past import mean_past
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.rows import top_k, top_p
from accelplug.patches.sparse.prefill import Prefill, PrefillConfig, PromptBlocks


def last_attention(blocks: PromptBlocks, rows: int) -> Tensor:
    """What the last rows look at: float32 (B, H, rows, P_k)."""
    q, groups = blocks.q[:, :, -rows:].float() * blocks.scale, blocks.q.shape[1] // blocks.k.shape[1]
    logits = q @ blocks.k.float().repeat_interleave(groups, 1).mT
    return logits.masked_fill(_distance(blocks, q.shape[2]) < 0, -torch.inf).softmax(-1)


def _distance(blocks: PromptBlocks, rows: int) -> Tensor:
    """How far each key stands ahead of each of the last rows: int64 (rows, P_k)."""
    first = blocks.causal + blocks.q.shape[2] - rows
    return first + torch.arange(rows)[:, None] - torch.arange(blocks.k.shape[2])


def diagonals(blocks: PromptBlocks, share: Tensor) -> Tensor:
    """Sums of attention (B, H, rows, P_k) by how far keys stand ahead: (B, H, P_k)."""
    far = _distance(blocks, share.shape[2]).clamp(min=0).flatten().expand(*share.shape[:2], -1)
    return torch.zeros_like(share[:, :, 0]).scatter_add(-1, far, share.flatten(2))


def by_block(x: Tensor, block: int) -> Tensor:
    """Sums over blocks of the last dimension."""
    return pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def along(chosen: Tensor, blocks: PromptBlocks) -> Tensor:
    """Pairs of blocks on chosen block diagonals, bool (B, H, N), 0 the main one: bool (B, H, M, N)."""
    queries, keys = (len(lengths) for lengths in blocks.lengths)
    apart = blocks.causal // blocks.block + torch.arange(queries)[:, None] - torch.arange(keys)
    return chosen[..., apart.clamp(min=0)] & (apart >= 0)


class Minference(Prefill):
    """Keys and diagonals that the last rows look at most."""

    class Config(PrefillConfig):
        vertical: int = Field(100, ge=1, description="Keys.")
        slash: int = Field(800, ge=1, description="Diagonals.")
        rows: int = Field(64, ge=1, description="Last rows that tell. Paper.")

    name, cite, summary = "minference", "arXiv 2407.02490", "The last rows say which keys and diagonals all rows read."
    config: Config

    def route(self, blocks: PromptBlocks, budget: Tensor | None = None) -> BlockPlan:
        share = last_attention(blocks, self.config.rows)
        columns = by_block(top_k(share.sum(2), self.config.vertical).float(), blocks.block) > 0
        slashes = top_k(diagonals(blocks, share), self.config.slash).float()
        near = by_block(slashes, blocks.block) > 0
        further = pad(by_block(slashes * (torch.arange(slashes.shape[-1]) % blocks.block > 0), blocks.block) > 0, (1, -1))
        return blocks.plan((columns[:, :, None] | along(near | further, blocks)) & blocks.past)


class FlexPrefill(Prefill):
    """Blocks by mean queries and keys where these tell the truth about the last block, else columns and diagonals that it looks at."""

    class Config(PrefillConfig):
        gamma: float = Field(0.9, gt=0.0, le=1.0, description="Share of the attention. Paper.")
        tau: float = Field(0.1, ge=0.0, description="Distance of distributions from which means are not trusted. Paper.")
        least: int = Field(512, ge=0, description="Tokens that are read at least. Release.")
        block: int = Field(128, ge=8, le=1024, multiple_of=8, description="Tokens per block. Release.")

    name, cite, summary = (
        "flexprefill",
        "arXiv 2502.20766",
        "Heads go by mean queries and keys, or by columns and diagonals.",
    )
    config: Config

    def route(self, blocks: PromptBlocks, budget: Tensor | None = None) -> BlockPlan:
        block, least = blocks.block, -(-self.config.least // blocks.block)
        rows = last_attention(blocks, block)

        def most(mass: Tensor, gamma: float) -> Tensor:
            """Of blocks of columns or diagonals (B, H, P_k), as many as hold so much of it, counted in tokens."""
            mass = mass / mass.sum(-1, keepdim=True)
            reached = mass.sort(-1, descending=True).values.cumsum(-1)
            number = ((reached < gamma).sum(-1) + 1) // block + 1
            return top_k(by_block(mass, block), number.clamp(min=least))

        def pattern(gamma: float) -> Tensor:
            columns, slashes = most(rows.mean(2), gamma), most(diagonals(blocks, rows), gamma)
            return columns[:, :, None] | along(slashes | pad(slashes, (1, -1)), blocks)

        score = mean_past(blocks.q, blocks.k, block, blocks.causal, blocks.scale, blocks.held, blocks.reads).softmax(-1)
        aware = top_p(score.flatten(2), self.config.gamma * score.shape[2]).unflatten(2, score.shape[2:])
        trusted = divergence(score[:, :, -1], by_block(rows.mean(2), block)) < self.config.tau
        chosen = torch.where(trusted[..., None, None], aware | pattern(0.0), pattern(self.config.gamma))
        return blocks.plan(chosen & blocks.past)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Root of Jensen and Shannon's divergence of distributions (..., N), in nats."""
    mean = (p + q) / 2
    parts = [(x * (x.clamp(min=1e-12) / mean.clamp(min=1e-12)).log()).sum(-1) for x in (p, q)]
    return (0.5 * (parts[0] + parts[1])).clamp(min=0.0).sqrt()


def register() -> None:
    """Have recipes know them by their names, in this process."""
    for patch in (Minference, FlexPrefill):
        accelplug.register_patch(patch)
