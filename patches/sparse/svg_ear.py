"""SVG-EAR: tokens by cluster, the rest pooled, and read exactly what pooling would get most wrong.

SVG-EAR (arXiv 2603.08982): error-aware routing over clusters of queries and keys.

What is not read exactly is read as one key a block (``rest: pool``), so a block is worth reading by the error that its
mean would make, not by its score: a block of equal keys and values may score high and be pooled for nothing. For query
block m with mean query q, and key block n with means k' and v',

    ``error_mn = mean_j |exp(scale q.k') v' - exp(scale q.k_j) v_j|^2``    over the keys j of n

(`kernels.compensation`), here over the squared softmax sum of q, so that rows compare. It is the error per key, hence
per cost. How much a row reads, its attention to the means says, ``P = softmax(scale q.k' + log n)`` for blocks of n keys:

* its budget is the keys of its likeliest blocks, up to a mass of `top_p`, and of ``floor(2 min_ratio N)`` at least;
* the ``floor(min_ratio N)`` likeliest blocks are read in any case;
* what is left of the budget goes to the blocks of largest error per key.

With `density` (ours), in place of the first, each head spends that share of its pairs of blocks where the error is largest.
Text is read by all, and reads all.

The paper routes whole clusters of uneven length; here clusters are sorted and cut into blocks of equal length, which
every kernel takes, and each block is judged by itself.

On the bundled model (blocks of 64, twelve calls of one clip, the rest pooled) a budget for each head is the better one: attention
outputs err by 3.6 % with `density` at 0.39, where pairs compete over all rows, and by 5.4 % with the released budget by row, at
0.42 (random blocks: 17 %); `python -m benchmarks.rest_layers --steps 5 13`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import Layout
from accelplug.kernels.compensation import compensation_error
from accelplug.kernels.orders import Order
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.rows import top_k, top_p, within_budget
from accelplug.patches.sparse.template import Blocks, RestKind, Scored, ScoredConfig
from accelplug.table import Table


class SvgEar(Scored):
    """Read exactly the blocks that pooling would get most wrong, and pool the rest."""

    class Config(ScoredConfig):
        block_k: int | None = Field(
            64, ge=8, le=1024, multiple_of=8, description="Slots per key block; 64 is near SVG2's 76 keys a cluster. Ours."
        )
        order: Order | Literal["kmeans"] = Field(
            "kmeans", description="How visual tokens line up in blocks; kmeans: published."
        )
        rest: RestKind = Field("pool", description="What becomes of the key blocks that are not read; pool is the method.")
        top_p: float = Field(
            0.9,
            ge=0.0,
            le=1.0,
            description="Share of its attention that a row's likeliest blocks hold: their size is what it may read. 1: dense. Released.",
        )
        min_ratio: float = Field(
            0.1,
            ge=0.0,
            le=1.0,
            description="Share of the visual key blocks that a row reads as its likeliest; it reads twice as many at least. Released.",
        )
        density: Annotated[float, Field(gt=0.0, le=1.0)] | Table | None = Field(
            None,
            description="Share of its visual pairs of blocks that a head reads, or a table of them, in place of top_p. Ours.",
        )

    config: Config
    knob = "density"
    rungs = (0.02, 0.04, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.55, 0.75, 1.0)

    def neutral(self, layout: Layout) -> bool:
        return self.config.density == 1.0 if self.config.density is not None else self.config.top_p == 1.0

    def route(self, blocks: Blocks, budget: Tensor | None = None) -> BlockPlan:
        error = compensation_error(
            blocks.q_pool, blocks.k, blocks.v, blocks.key_lengths, blocks.block_k, blocks.scale, blocks.key_mask
        )
        number = blocks.k_number[..., None, :]  # [B|1, 1, 1, N]
        candidates = blocks.candidates[..., None, :]
        logits = (blocks.q_pool * blocks.scale) @ blocks.k_pool.transpose(-1, -2) + number.log()
        mass = logits.masked_fill(~candidates, -torch.inf).softmax(-1)
        return blocks.plan(self.worst(error, mass, number, candidates, blocks.query_text, budget))

    def worst(
        self,
        error: Tensor,
        mass: Tensor,
        keys: Tensor,
        candidates: Tensor,
        query_text: Tensor,
        density: Tensor | None = None,
    ) -> Tensor:
        """Return which blocks are read exactly, bool (B, H, M, N).

        Parameters
        ----------
        error : float32 (B, H, M, N), at least 0, per key.
        mass : float32 (B, H, M, N), share of a row's attention to the means; a row sums to 1 over its candidates.
        keys : float32 (B|1, 1, 1, N), keys of each block: what it costs to read.
        candidates : bool (B|1, H|1, 1, N), key blocks that may be chosen.
        query_text : bool (M,), rows that read everything in any case, and spend no budget.
        density : float32 (H,), in place of the config's; None without a table.
        """
        number = candidates.sum(-1)  # [B|1, H|1, 1]

        def share(ratio: float) -> Tensor:
            return (ratio * number + 1e-4).long().clamp(min=1 if ratio else 0)  # 30 * 0.1 is 3

        least = share(self.config.min_ratio)
        if self.config.density is None:
            first = top_k(mass, least, candidates=candidates)
            likeliest = top_p(mass, self.config.top_p, share(2 * self.config.min_ratio).clamp(min=1), candidates=candidates)
            left = (likeliest * keys).sum(-1) - (first * keys).sum(-1)
            return first | within_budget(error, keys, left, candidates=candidates & ~first)
        pairs = (candidates & ~query_text[:, None]).expand(error.shape)
        first = top_k(mass, least.clamp(min=1), candidates=pairs)
        budget = (self.allowed(density, 0) * pairs.sum((-2, -1)) + 1e-4).long()  # [B, H]
        ranked = error.masked_fill(first, torch.inf).flatten(-2)  # what rows read at least is spent first
        return first | top_k(ranked, budget, candidates=pairs.flatten(-2)).unflatten(-1, error.shape[-2:])
