"""Sol attention: blocks whose pooled score stands out are read exactly, the others as one pooled key each.

Sol-Attn (arXiv 2607.24027): a threshold on pooled scores, set per query block from statistics of the pooled keys.

With pooled queries q_m and keys k_j (the mean of each block), ``a = scale * log2(e)``, and mean mu and variance var of
k_j over the blocks j, block j is read exactly by the rows of block m iff

    ``a <q_m, k_j>  >  theta_m = a <q_m, mu> + tau * sqrt(a^2 sum_d q_md^2 var_d + 1e-6)``

that is, iff its score lies tau standard deviations above the mean; ``statistic: exact`` has ``q_m^T Cov q_m`` for the
sum. Were the scores Gaussian, tau 1, 1.5 and 2 would read 15.9, 6.7 and 2.3 % of the blocks. Blocks within `band` are
always read. Every other block is read as one key (``rest: pool``). No sort, no top-k, a budget that follows the row.

With ``statistic: subblock`` (SGLang's score of blocks, not the paper's) a block is cut in 4, and its score is the log of the sum of
``exp(scale * q_a.k_b)`` over the means of the 4 x 4 parts, held against the mean and deviation of such scores. It sees a part that stands
out. `least` is a floor (ours): so many blocks of each row, those that score highest, are read whatever the threshold says, which alone
misses detail that moves. Neither can be told from pooled keys as the kernel meets them: the plan is then made ahead.
On the bundled model sub-blocks at tau 1 and 1.5 read .188 and .096 of the keys with errors .143 and .201, means .225 and .137 with .138 and
.185; `least` 3 changes next to nothing (``python -m benchmarks.rest_layers --grid small --steps 7 --block 32``).

Text blocks are read by all, and read all. They are not candidates, so mu and var are taken over visual blocks alone:
text keys lie far from visual ones, and would raise the threshold beyond what tau says. Blocks whose keys are all masked
do not count either. Both statistics are of the population, over blocks, whatever the blocks' lengths.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import Layout
from accelplug.kernels.importance import subblock_scores
from accelplug.kernels.plan import BlockPlan, Threshold
from accelplug.kernels.rows import top_k
from accelplug.patches.sparse.template import Blocks, RestKind, Scored, ScoredConfig
from accelplug.table import Table


class Sol(Scored):
    """Read the key blocks whose pooled score stands out exactly, all others through one key each."""

    class Config(ScoredConfig):
        block: int = Field(64, ge=8, le=1024, multiple_of=8, description="Slots per query and key block.")
        rest: RestKind = Field("pool", description="What becomes of the key blocks that are not read exactly.")
        tau: float | Table | Literal["dense"] = Field(
            1.0,
            description="Deviations above the mean score from which a block is read exactly, or a table of them; dense reads all.",
        )
        statistic: Literal["diag", "exact", "subblock"] = Field(
            "diag",
            description="Scores of means, their spread by channel variances or covariance; or of 4 x 4 parts of blocks.",
        )
        least: int = Field(0, ge=0, description="Visual key blocks that a query block reads at least, the likeliest ones.")
        band: int = Field(1, ge=0, description="Blocks on either side of its own that a query block always reads.")

    config: Config
    knob = "tau"
    rungs = (3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0, -0.5, -1.0, -2.0)

    def neutral(self, layout: Layout) -> bool:
        return self.config.tau == "dense"

    def route(self, blocks: Blocks, budget: Tensor | None = None) -> BlockPlan | Threshold:
        tau = -math.inf if self.config.tau == "dense" else self.allowed(budget, 2)
        shape = blocks.query_lengths, blocks.key_lengths, blocks.block, blocks.block_k
        if self.config.statistic != "subblock" and self.config.least == 0:
            theta = self.theta(blocks, tau)
            found = Threshold(theta, self.config.band, blocks.key_text, blocks.query_text, *shape)
            return replace(found, rule=self.rule(blocks, tau))
        score = self.scores(blocks)
        theta = self.theta_of(score, blocks, tau) if self.config.statistic == "subblock" else self.theta(blocks, tau)
        rule = Threshold(theta, self.config.band, blocks.key_text, blocks.query_text, *shape)
        members = (score > theta[..., None]) | rule.always
        if self.config.least > 0:
            members = members | top_k(score, self.config.least, candidates=blocks.candidates[..., None, :])
        return blocks.plan(members)

    def rule(self, blocks: Blocks, tau: float | Tensor) -> tuple[float, str] | None:
        """Return what makes the thresholds, where they are over all key blocks and no slot is without a token; else None."""
        layout, whole = blocks.k_tiles.layout, blocks.k.shape[-2]
        told = isinstance(tau, float | int) and math.isfinite(tau) and layout.visual == blocks.k_tiles.tokens == whole
        return (float(tau), self.config.statistic) if told else None

    def scores(self, blocks: Blocks) -> Tensor:
        """Return the score of each pair of blocks, float32 (B, H, M, N), log2 domain."""
        if self.config.statistic == "subblock":
            sizes = blocks.query_lengths, blocks.key_lengths, blocks.block, blocks.block_k
            return math.log2(math.e) * subblock_scores(blocks.q, blocks.k, *sizes, blocks.scale, blocks.key_mask)
        return (blocks.q_pool * (blocks.scale * math.log2(math.e))) @ blocks.k_pool.mT

    def theta_of(self, score: Tensor, blocks: Blocks, tau: float | Tensor) -> Tensor:
        """Return the threshold of each query block, float32 (B, H, M), from the mean and deviation of its scores."""
        weight = blocks.candidates.float()[..., None, :]
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)  # [B|1, H|1, 1, N]
        score = torch.where(weight > 0, score, 0.0)
        mean = (weight * score).sum(-1, keepdim=True)
        variance = (weight * (score - mean).square()).sum(-1, keepdim=True)
        return (mean + tau * (variance + 1e-6).sqrt())[..., 0]

    def theta(self, blocks: Blocks, tau: float | Tensor) -> Tensor:
        """Return the threshold of each query block, float32 (B, H, M), log2 domain, from the statistics of the pooled keys."""
        weight = blocks.candidates[..., None].float()
        weight = weight / weight.sum(-2, keepdim=True).clamp(min=1)  # [B|1, 1, N, 1]
        mean = (weight * blocks.k_pool).sum(-2, keepdim=True)
        centred = blocks.k_pool - mean
        query = blocks.q_pool * (blocks.scale * math.log2(math.e))
        if self.config.statistic == "diag":
            variance = query.square() @ (weight * centred.square()).sum(-2)[..., None]  # [B, H, M, 1]
        else:
            covariance = centred.transpose(-1, -2) @ (weight * centred)
            variance = ((query @ covariance) * query).sum(-1, keepdim=True).clamp(min=0)  # rounding may pass below 0
        return (query @ mean.transpose(-1, -2) + tau * (variance + 1e-6).sqrt())[..., 0]
