"""Clusters: keys that are alike are read token by token where they matter most, by their mean where they matter less, or not at all.

RetroInfer's wave index (arXiv 2505.02922), with the budget of Double-P (arXiv 2602.05191). K-means makes clusters of about 16 keys,
within segments of the past and for each head of keys. With centre c_i, n_i tokens and the sum V_i of their values, cluster i has

    ``mass_i = n_i exp(s q.c_i)``,

and clusters in order of their mass make three zones: tokens of the first are read (`exact`, at most, and no more than hold `top_p` of the
mass); the next add ``exp(s q.c_i) V_i`` to the sum of values and ``mass_i`` to the sum of weights (`estimate`); the others are dropped.
The first tokens and the newest are read anyway; of new ones, `update` at a time become a segment of their own.

Where heads share keys, a cluster's mass is the mean of its shares in each. K-means goes by Euclidean distance, from every 16th key on
(ours; the paper by the angle to the mean key): what a centre misjudges grows with the spread about it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from accelplug.kernels.kept import rows_at
from accelplug.kernels.wave import cluster_keys, members
from accelplug.patches.sparse.decode import Decode, DecodeConfig, Reads, Step


class ClusterConfig(DecodeConfig):
    """The keys that methods with an index of clusters share."""

    cluster: int = Field(16, ge=1, description="Tokens of a cluster, on average. Paper.")
    segment: int = Field(2048, ge=16, description="Tokens that are clustered together. Ours; paper: 8,192, from 16,384 on.")
    iterations: int = Field(5, ge=0, le=100, description="Rounds of k-means. Ours; paper: 10.")
    update: int = Field(1024, ge=1, description="New tokens that become a segment of their own. Paper.")


class Clustered(Decode):
    """A method whose summary of the past is clusters of keys."""

    Config = ClusterConfig
    writes = ("choose",)
    config: ClusterConfig

    @property
    def piece(self) -> int:
        return self.config.update

    def summarise(
        self, keys: Tensor, values: Tensor, ranks: Tensor, held: Tensor, known: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        config, base = self.config, known["member"].shape[2] if known else 0
        found = []
        for start in range(0, ranks.shape[1], config.segment):
            some = slice(start, start + config.segment)
            clusters = cluster_keys(
                keys[:, :, some], values[:, :, some], ranks[:, some], held[:, some], config.cluster, config.iterations
            )
            found.append({**clusters, "first": clusters["first"] + base + start})
        return {name: torch.cat([each[name] for each in found], 2) for name in found[0]}


def shares(q: Tensor, clusters: Mapping[str, Tensor]) -> Tensor:
    """Return the share of attention that each cluster has by its centre and size, mean over the heads that share keys: (B, H_kv, C)."""
    logits = q @ clusters["centre"].mT + clusters["number"].log()[:, :, None]
    return logits.softmax(-1).nan_to_num(nan=0.0).mean(2)  # NaN: a row has no cluster yet


class Clusters(Clustered):
    """A step reads the tokens of the clusters of most mass, and the means of the next."""

    class Config(ClusterConfig):
        exact: float = Field(
            0.05,
            ge=0.0,
            le=1.0,
            description="Share of the clusters whose tokens are read, at most. Ours; paper: .018, from 16,384 tokens on.",
        )
        estimate: float = Field(
            0.232, ge=0.0, le=1.0, description="Share of the clusters that are read by their mean. Paper."
        )
        top_p: float = Field(
            1.0,
            ge=0.0,
            le=1.0,
            description="Share of the mass beyond which no cluster's tokens are read. Double-P; 1: no bound.",
        )

    config: Config

    def choose(self, step: Step) -> Reads:
        clusters, config = step.index, self.config
        number = (clusters["number"] > 0).sum(-1, keepdim=True)  # [B, H_kv, 1]
        exact, both = ((share * number - 1e-4).ceil() for share in (config.exact, min(config.exact + config.estimate, 1.0)))
        best = shares(step.q, clusters).sort(dim=-1, descending=True, stable=True)
        chosen, share = (x[..., : int(both.max().clamp(min=1))] for x in (best.indices, best.values))
        place, before = torch.arange(chosen.shape[-1], device=chosen.device), share.cumsum(-1) - share
        read = (place < exact) & (before < config.top_p)
        ranks, held = members(clusters, chosen, read)
        keys, values = (rows_at(clusters[name], chosen) for name in ("centre", "mean"))
        weight = clusters["number"].gather(2, chosen).log().masked_fill(read | (place >= both), -torch.inf)
        return Reads(ranks, held, keys, values, weight)
