"""Strided attention: every query block reads those around it, and every `stride`-th block from itself.

The strided pattern of Sparse Transformers (arXiv 1904.10509, section 4.3) by blocks, and to both sides, since denoisers read the
whole sequence: query block m reads key block n iff ``|m - n| <= reach`` or ``(m - n) mod stride = 0``. Text is read by all, and
reads all: `BlockSparse.plan` sees to it.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from accelplug.call import Layout
from accelplug.kernels.orders import Tiles
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.sparse.template import BlockConfig, BlockSparse


class Strided(BlockSparse):
    """Every query block reads those around it, and every `stride`-th block from itself."""

    class Config(BlockConfig):
        stride: int = Field(4, ge=1, description="Blocks from one that is read to the next; 1 reads all.")
        reach: int = Field(1, ge=0, description="Blocks that are read to both sides.")

    name = "strided"
    cite = "arXiv 1904.10509"
    summary = "Every query block reads those around it, and some at equal distances."
    config: Config

    def neutral(self, layout: Layout) -> bool:
        return self.config.stride == 1

    def select(self, tiles: Tiles, **where: Any) -> BlockPlan:
        block = torch.arange(tiles.slots // self.config.unit)
        distance = (block[:, None] - block).abs()  # [blocks, blocks]
        return self.plan((distance <= self.config.reach) | (distance % self.config.stride == 0), tiles)
