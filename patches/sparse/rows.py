"""Sampled rows: a few exact rows of each query block say which key blocks the others read.

After SampleAttention (arXiv 2406.15486), which finds the keys of a whole head by some of its queries; by blocks it is ours. A mean query
against mean keys (`psa`, `sol`, `bilevel`) does not see a single key that stands out in its block. Here n rows of each query block are held
against every key, and with the probability ``p_ri`` that row r gives to key i

    ``mass_mj = mean_r sum_i p_ri``, i in block j,

is the share of attention that they give to the block. The rows of block m read the likeliest key blocks: so many that they hold `top_p` of
the mass, or a share `density` of them. Sampling costs ``n / block`` of dense attention.

Text blocks are read by all, and read all. They are not candidates: mass is shared out among visual blocks alone.

With `repair`, the same rows are its probes, unless `probes` asks for others: their exact output ``sum_i p_ri v_i`` is one product more.
They then stand elsewhere in each step. Blocks were chosen for these very rows, so they err less than the others: the estimate of the error
is too low, and as many rows of their own would repair better, at the cost of computing them
(`python -m benchmarks.rest_layers --carry --grid small` measures both).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import Layout
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.rows import top_k, top_p
from accelplug.patches.sparse.template import Blocks, RestKind, Scored, ScoredConfig
from accelplug.table import Table


class SampledRows(Scored):
    """Read the key blocks to which a few exact rows of each query block give most attention."""

    class Config(ScoredConfig):
        block: int = Field(64, ge=8, le=1024, multiple_of=8, description="Slots per query and key block.")
        rest: RestKind = Field("pool", description="What becomes of the key blocks that are not read.")
        rows: int = Field(4, ge=1, le=64, description="Rows of each query block that are held against all keys.")
        probes: float | None = Field(  # type: ignore[assignment]  # a wider choice of a value that is only read
            None,
            gt=0.0,
            le=65536,
            description="Rows of a head that are exact (repair); none: those that are sampled. Else a share or a number of others.",
        )
        density: Annotated[float, Field(gt=0.0, le=1.0)] | Table | None = Field(
            0.2, description="Share of the visual key blocks that a block reads, or a table (steps, layers, heads) of them."
        )
        top_p: float = Field(
            0.9, ge=0.0, le=1.0, description="Share of its attention that the blocks hold which it reads (density: none)."
        )

    config: Config
    knob = "density"
    rungs = (0.02, 0.04, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.55, 0.75, 1.0)

    @property
    def asked_probes(self) -> float:
        """Where a plan is recalled (`reuse_steps`), no rows are sampled: as many others are probed."""
        return self.config.probes or self.config.rows / self.config.block

    def neutral(self, layout: Layout) -> bool:
        return self.config.density == 1.0 if self.config.density is not None else self.config.top_p == 1.0

    @property
    def exact_rows(self) -> str:
        return super().exact_rows if self.config.probes is not None else f"{self.config.rows} rows of each block"

    def route(self, blocks: Blocks, budget: Tensor | None = None) -> BlockPlan:
        mass = blocks.sampled_mass(self.config.rows, probe=self.estimates and self.config.probes is None)
        candidates = blocks.candidates[..., None, :]  # [B|1, H|1, 1, N]
        mass = torch.where(candidates, mass, 0.0)
        if self.config.density is not None:
            number = (self.allowed(budget) * candidates.sum(-1) + 1e-4).long().clamp(min=1)
            return blocks.plan(top_k(mass, number, candidates=candidates))
        mass = mass / mass.sum(-1, keepdim=True).clamp(min=1e-30)
        return blocks.plan(top_p(mass, self.config.top_p, candidates=candidates))
