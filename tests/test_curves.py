"""Curves: permutations of every grid, of neighbours where that is promised, and more compact than raster."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch

from accelplug.kernels.curves import gilbert, hilbert, morton

CURVES = pytest.mark.parametrize("curve", [morton, hilbert, gilbert], ids=lambda curve: curve.__name__)
VIDEOS = [(21, 45, 80), (33, 45, 80), (21, 30, 52), (13, 30, 45), (17, 16, 24), (1, 45, 81), (1, 64, 64)]


def cells(order: torch.Tensor, grid_thw: tuple[int, int, int]) -> torch.Tensor:
    """Frame, row and column of each cell along the curve, (T * H * W, 3)."""
    _, rows, columns = grid_thw
    return torch.stack([order // (rows * columns), order // columns % rows, order % columns], -1)


def steps(order: torch.Tensor, grid_thw: tuple[int, int, int]) -> torch.Tensor:
    """L1 distance of consecutive cells."""
    return cells(order, grid_thw).diff(dim=0).abs().sum(-1)


@CURVES
def test_is_a_permutation_of_every_small_grid(curve: Callable[..., torch.Tensor]) -> None:
    for grid_thw in product(range(1, 8), repeat=3):
        assert torch.equal(curve(grid_thw).sort().values, torch.arange(math.prod(grid_thw))), grid_thw


@CURVES
@pytest.mark.parametrize("grid_thw", VIDEOS, ids=str)
def test_is_a_permutation_of_a_video(curve: Callable[..., torch.Tensor], grid_thw: tuple[int, int, int]) -> None:
    assert torch.equal(curve(grid_thw).sort().values, torch.arange(math.prod(grid_thw)))


def test_gilbert_steps_to_neighbours_only_on_every_small_grid() -> None:
    for t, h, w in product(range(1, 10), repeat=3):
        grid_thw = (t, h, w)
        assert (steps(gilbert(grid_thw), grid_thw) == 1).all(), grid_thw


@pytest.mark.parametrize("grid_thw", [*VIDEOS, (5, 97, 3), (40, 2, 2), (2, 33, 35), (7, 7, 101)], ids=str)
def test_gilbert_steps_to_neighbours_only(grid_thw: tuple[int, int, int]) -> None:
    assert (steps(gilbert(grid_thw), grid_thw) == 1).all()


@pytest.mark.parametrize("grid_thw", [(2, 2, 2), (8, 8, 8), (1, 16, 16), (4, 1, 4), (1, 1, 8)], ids=str)
def test_hilbert_steps_to_neighbours_only_on_powers_of_two(grid_thw: tuple[int, int, int]) -> None:
    assert (steps(hilbert(grid_thw), grid_thw) == 1).all()


def test_hilbert_fills_every_cube_of_a_power_of_two_before_it_goes_on() -> None:
    order = cells(hilbert((16, 16, 16)), (16, 16, 16))
    for side in (2, 4, 8):
        parts = order.split(side**3)
        assert all(torch.equal(part.amax(0) - part.amin(0), torch.full((3,), side - 1)) for part in parts)


@CURVES
@pytest.mark.parametrize("grid_thw", VIDEOS, ids=str)
def test_blocks_are_more_compact_than_in_raster_order(
    curve: Callable[..., torch.Tensor], grid_thw: tuple[int, int, int]
) -> None:
    def extent(order: torch.Tensor) -> float:
        blocks = [block.amax(0) - block.amin(0) + 1 for block in cells(order, grid_thw).split(128)]
        return float(torch.stack(blocks).sum(-1).float().mean())

    assert extent(curve(grid_thw)) < 0.6 * extent(torch.arange(math.prod(grid_thw)))
