"""Sol-Attn: blocks whose pooled score stands out are read exactly, the others as one pooled key each."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import Layout
from accelplug.kernels.orders import Tiles, tiles
from accelplug.kernels.plan import Threshold
from accelplug.patches.base import BlockConfig, BlockSparse, Scores


class SolConfig(BlockConfig):
    """Knobs of `Sol`. Defaults are those of the released code and its integrations."""

    block: int = Field(64, ge=8, le=1024, multiple_of=8, description="Slots per query and key block.")
    rest: Literal["drop", "pool"] = Field("pool", description="What becomes of the key blocks that are not selected.")
    tau: float | Literal["dense"] = Field(1.0, description="Deviations above the mean score; dense reads all, bit for bit.")
    statistic: Literal["diag", "exact"] = Field("diag", description="Score variance from channel variances, or in full.")
    order: Literal["raster", "morton"] = Field("raster", description="How tokens line up before they are cut in blocks.")
    band: int = Field(1, ge=0, description="Blocks to each side of the diagonal that are always read.")


class Sol(BlockSparse):
    """Sol-Attn (arXiv 2607.24027): a threshold on pooled scores, evaluated inside the kernel.

    With the means ``q_m`` and ``k_j`` of query block m and key block j, and ``a = scale * log2(e)``, the score of a block is
    ``a <q_m, k_j>``. Over the visual key blocks it has the mean ``a <q_m, mu>`` and, for given q_m, the variance
    ``a^2 q_m^T C q_m``, where mu and C are the mean and covariance of the k_j. Block j is read exactly iff

        ``a <q_m, k_j> > a <q_m, mu> + tau * sqrt(a^2 q_m^T C q_m + 1e-6)``

    so tau = 1 reads about 16 % of the blocks of Gaussian keys, 2 about 2.3 %, whatever the scale. ``diag`` keeps the diagonal
    of C alone. The `band` around the diagonal and all text are always read; text queries read everything.

    The released code takes the statistics over all blocks; text and empty blocks are left out of them here, because they are
    read anyhow.
    """

    Config = SolConfig
    config: SolConfig
    cite = "arXiv 2607.24027"
    static = False

    def neutral(self, layout: Layout) -> bool:
        return self.config.tau == "dense"

    def order(self, layout: Layout) -> Tiles:
        return tiles(layout, self.config.order, self.config.block)

    def select(self, tiles: Tiles, scores: Scores | None = None) -> Threshold:
        block = self.config.block
        lengths, text = tiles.lengths(block), tiles.is_text(block)
        theta = torch.empty(0) if scores is None else self.threshold(scores, (lengths > 0) & ~text)
        return Threshold(theta, self.config.band, text, text, lengths, lengths, block, block)

    def threshold(self, scores: Scores, counted: Tensor) -> Tensor:
        """Return the threshold of each query block in the log2 domain, float32 (B, H, M).

        Parameters
        ----------
        scores : pooled queries (B, H, M, D) and keys (B, H, N, D), and the scale on q.k.
        counted : bool (N,), key blocks that the statistics are taken over.
        """
        a = scores.scale * math.log2(math.e)
        share = counted.to(scores.k_pool.dtype) / counted.sum()  # [N]
        mu = (scores.k_pool * share[:, None]).sum(-2, keepdim=True)  # [B, H, 1, D]
        spread = scores.k_pool - mu  # [B, H, N, D]
        if self.config.statistic == "exact":
            variance = ((scores.q_pool @ spread.transpose(-1, -2)).square() * share).sum(-1)  # [B, H, M]
        else:
            per_channel = (spread.square() * share[:, None]).sum(-2, keepdim=True)  # [B, H, 1, D]
            variance = (scores.q_pool.square() * per_channel).sum(-1)  # [B, H, M]
        mean = (scores.q_pool * mu).sum(-1) * a
        return mean + float(self.config.tau) * (a * a * variance + 1e-6).sqrt()
