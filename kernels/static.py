"""Static masks: which blocks read which by their place alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def band_width(tokens: int, density: float) -> float:
    """Return w for which ``|i - j| <= w`` holds for that share of all pairs of `tokens` positions: ``S (1 - sqrt(1 - d))``."""
    return tokens * (1 - math.sqrt(1 - density))


def band(slots: int, block: int, block_k: int, width: float) -> Tensor:
    """Which pairs of blocks have their middles within `width` slots, or lie in one another: bool (M, N)."""
    middle, middle_k = ((torch.arange(0, slots, size) + size / 2) for size in (block, block_k))
    return (middle[:, None] - middle_k).abs() <= max(width, abs(block - block_k) / 2)


def product(axes: Sequence[Tensor]) -> Tensor:
    """Combine what each axis says of its tiles, bool (T, T), (H, H), (W, W), for all tiles: bool (T * H * W, T * H * W)."""
    number = math.prod(len(axis) for axis in axes)
    return torch.einsum("ad,be,cf->abcdef", *(axis.int() for axis in axes)).bool().reshape(number, number)
