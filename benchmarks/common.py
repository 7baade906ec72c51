"""What the benchmarks share: where results go, and plans of a given density."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accelplug.kernels.plan import BlockPlan

RESULTS = Path(__file__).parent / "results"


def write_json(name: str, data: Any) -> Path:
    """Write one result file, readable in a diff."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(f"wrote {path.relative_to(RESULTS.parents[1])}")
    return path


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of values without ties."""
    first, second = (np.argsort(np.argsort(values)) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def random_plan(tokens: int, block: int, density: float, seed: int = 0) -> BlockPlan:
    """A plan in which every query block reads its own and as many random key blocks as the density asks for."""
    blocks = -(-tokens // block)
    lengths = torch.full((blocks,), block, dtype=torch.int32)
    lengths[-1] = tokens - (blocks - 1) * block
    return BlockPlan.from_members(random_members(blocks, density, seed), lengths, lengths, block, block)


def random_members(blocks: int, density: float, seed: int) -> torch.Tensor:
    """Block membership of `random_plan`, bool (blocks, blocks)."""
    order = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(seed)).fill_diagonal_(2.0)
    picked = order.argsort(-1, descending=True)[:, : max(1, round(density * blocks))]
    return torch.zeros(blocks, blocks, dtype=torch.bool).scatter_(1, picked, True)
