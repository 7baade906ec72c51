"""How much of a large intermediate is held at a time: longer ones are made piece by piece."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 24
"""Most numbers of an intermediate that are held at a time; 64 MiB in float32."""

CACHED = 1 << 18
"""So many numbers stay in a CPU's caches from one pass to the next; 1 MiB in float32. Ours, measured by `benchmarks.repair_overhead`."""


def at_once(numbers: int) -> int:
    """Return how many rows of so many numbers are made at a time, at least one."""
    return max(CHUNK // numbers, 1)


def by_heads(numbers: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors (B, H|1, ...) some heads at a time, as many as `at_once` says; `numbers` of an intermediate are one head's.

    All at once in a compiled graph, which makes one pass of what stands in the way here.
    """
    heads = max(x.shape[1] for x in tensors)
    step = heads if torch.compiler.is_compiling() else at_once(numbers)
    for first in range(0, heads, step):
        yield tuple(x if x.shape[1] == 1 else x[:, first : first + step] for x in tensors)


def by_rows(numbers: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors (..., R, D) some rows at a time; `numbers` of an intermediate are one row's. All at once in a compiled graph."""
    first = tensors[0]
    held = min(CACHED, CHUNK) if first.device.type == "cpu" else CHUNK
    step = first.shape[-2] if torch.compiler.is_compiling() else max(held // numbers, 1)
    for row in range(0, first.shape[-2], step):
        yield tuple(x[..., row : row + step, :] for x in tensors)
