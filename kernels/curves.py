"""Space-filling curves: orders of the cells of a grid in which blocks of consecutive cells are compact.

Each function takes ``grid_thw`` (frames, rows, columns, any sizes) and returns a permutation, int64 (T * H * W,): the raster
index of each cell along the curve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def morton(grid_thw: tuple[int, int, int]) -> Tensor:
    """Z-order: the bits of column, row and frame interleaved, column lowest."""
    axes = _coordinates(grid_thw)
    return _interleave(axes, max(grid_thw).bit_length()).argsort()


def hilbert(grid_thw: tuple[int, int, int]) -> Tensor:
    """Hilbert curve through the smallest cube of a power of two that holds the grid, what lies outside left out.

    On a cube of a power of two, consecutive cells are neighbours; where the grid is smaller, the curve leaves it and comes
    back elsewhere. Axes of one cell are left out, so that a picture is walked by the two-dimensional curve. From coordinates
    to the place on the curve by Skilling's transposition (AIP Conf. Proc. 707, 381, 2004), all cells at once.
    """
    axes = [axis for axis, size in zip(_coordinates(grid_thw), grid_thw, strict=True) if size > 1]
    if not axes:
        return torch.zeros(1, dtype=torch.int64)
    bits = (max(grid_thw) - 1).bit_length()
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for i in range(len(axes)):
            far = ((axes[i] >> bit) & 1).bool()
            differ = torch.where(far, 0, (axes[0] ^ axes[i]) & low)
            axes[0] = torch.where(far, axes[0] ^ low, axes[0] ^ differ)  # reflect in the far half, exchange in the near
            if i:
                axes[i] = axes[i] ^ differ
    for i in range(1, len(axes)):  # Gray code
        axes[i] = axes[i] ^ axes[i - 1]
    flip = torch.zeros_like(axes[0])
    for bit in range(bits - 1, 0, -1):
        flip ^= ((axes[-1] >> bit) & 1) * ((1 << bit) - 1)
    return _interleave([axis ^ flip for axis in axes], bits).argsort()


def gilbert(grid_thw: tuple[int, int, int]) -> Tensor:
    """Generalised Hilbert curve: consecutive cells are neighbours (L1 distance 1), on every grid, without exception.

    A box is crossed from one corner to the next one along its first axis a. Like the curve of J. Červený
    (github.com/jakubcerveny/gilbert) it is cut into two boxes behind each other where a is long, three around an axis that is
    longer than the other, or five. That curve takes diagonal steps on grids with odd sides; this one has none, for it cuts by
    parity: a box can be crossed iff a is even or all its sides are odd, so first parts are even, the grid is entered along an
    even side if it has one, and a box is cut in five only where that leaves boxes that can be crossed. All boxes of a level
    are cut at once.
    """
    strides = (grid_thw[1] * grid_thw[2], grid_thw[2], 1)
    even = [i for i in range(3) if grid_thw[i] % 2 == 0] or range(3)
    first = max(even, key=lambda i: (grid_thw[i], i))
    axes = (first, *(i for i in (2, 1, 0) if i != first))
    # A box: its place on the curve, the raster index of its first cell, and the sides and signed raster strides of a, b, c.
    boxes: tuple[Tensor, ...] = (
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([[grid_thw[i] for i in axes]]),
        torch.tensor([[strides[i] for i in axes]]),
    )
    lines = []
    while len(boxes[0]):
        place, start, sides, steps = boxes
        kind, sides, steps = _orient(sides, steps)
        of_kind = [(kind == number).nonzero()[:, 0] for number in range(len(_CUTS) + 1)]
        lines.append((place[of_kind[0]], start[of_kind[0]], sides[of_kind[0], 0], steps[of_kind[0], 0]))
        parts = [cut(place[at], start[at], sides[at], steps[at]) for cut, at in zip(_CUTS, of_kind[1:], strict=True)]
        boxes = tuple(torch.cat(x) for x in zip(*parts, strict=True))
    place, start, length, stride = (torch.cat(x) for x in zip(*lines, strict=True))
    along = place.argsort()
    place, start, stride = (x[along].repeat_interleave(length[along]) for x in (place, start, stride))
    return start + (torch.arange(len(place)) - place) * stride


def _orient(sides: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Say how each box is cut, 0 for a line and 1, 2, 3 for `_CUTS`, and swap its axes b and c where the cut asks for it."""
    a, b, c = sides.unbind(-1)
    long = (2 * a > 3 * b) & (2 * a > 3 * c) & (a >= 4)
    flat = 3 * torch.maximum(b, c) > 4 * torch.minimum(b, c)
    around = flat | (a % 2 == 1) | ((b % 2 == 1) & (c % 2 == 1))  # five parts need an even a, and an even c
    kind = torch.where(long, 1, torch.where(around, 2, 3)).masked_fill((b == 1) & (c == 1), 0)
    swap = torch.where(around, c > b, c % 2 == 1)[:, None]
    sides, steps = (torch.where(swap, x[:, [0, 2, 1]], x) for x in (sides, steps))
    return kind, sides, steps


_Three = tuple[Tensor, ...]
_Parts = list[tuple[Tensor, _Three, _Three]]
"""Of each part: the offset of its first cell, its sides, and its steps."""


def _cut(
    shape: Callable[[_Three, _Three, _Three, _Three], _Parts], place: Tensor, start: Tensor, sides: Tensor, steps: Tensor
) -> tuple[Tensor, ...]:
    """Cut boxes into parts in the order in which the curve crosses them."""
    half = sides // 2
    half = half + (half % 2) * (sides > 2)  # even, so that the part can be crossed
    parts = shape(*(x.unbind(-1) for x in (sides, half, sides - half, steps)))
    offset = torch.stack([at for at, _, _ in parts], -1)  # [boxes, parts]
    part_sides = torch.stack([torch.stack(three, -1) for _, three, _ in parts], 1)  # [boxes, parts, 3]
    part_steps = torch.stack([torch.stack(three, -1) for _, _, three in parts], 1)
    cells = part_sides.prod(-1)
    begins = place[:, None] + cells.cumsum(-1) - cells
    return begins.flatten(), (start[:, None] + offset).flatten(), part_sides.flatten(0, 1), part_steps.flatten(0, 1)


def _long(sides: _Three, half: _Three, rest: _Three, steps: _Three) -> _Parts:
    """Two boxes behind each other along a."""
    (_, b, c), (a1, *_), (a2, *_), (x, y, z) = sides, half, rest, steps
    return [(0 * a1, (a1, b, c), (x, y, z)), (a1 * x, (a2, b, c), (x, y, z))]


def _around(sides: _Three, half: _Three, rest: _Three, steps: _Three) -> _Parts:
    """Out along b in the near half of a, across a in the far part of b, and back."""
    (a, _, c), (a1, b1, _), (a2, b2, _), (x, y, z) = sides, half, rest, steps
    return [
        (0 * a, (b1, c, a1), (y, z, x)),
        (b1 * y, (a, b2, c), (x, y, z)),
        ((a - 1) * x + (b1 - 1) * y, (b1, c, a2), (-y, z, -x)),
    ]


def _five(sides: _Three, half: _Three, rest: _Three, steps: _Three) -> _Parts:
    """Out along b, out along c, across a, back along c, back along b."""
    (a, _, c), (a1, b1, c1), (a2, b2, c2), (x, y, z) = sides, half, rest, steps
    return [
        (0 * a, (b1, c1, a1), (y, z, x)),
        (b1 * y, (c, a1, b2), (z, x, y)),
        ((b1 - 1) * y + (c - 1) * z, (a, b1, c2), (x, -y, -z)),
        ((a - 1) * x + b1 * y + (c - 1) * z, (c, a2, b2), (-z, -x, y)),
        ((a - 1) * x + (b1 - 1) * y, (b1, c1, a2), (-y, z, -x)),
    ]


_CUTS = tuple(partial(_cut, shape) for shape in (_long, _around, _five))


def _coordinates(grid_thw: tuple[int, int, int]) -> list[Tensor]:
    """Frame, row and column of each cell in raster order, int64 (T * H * W,) each."""
    return [axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in grid_thw), indexing="ij")]


def _interleave(axes: list[Tensor], bits: int) -> Tensor:
    """Interleave the bits of the axes, those of the last lowest."""
    code = torch.zeros_like(axes[0])
    for bit in range(bits):
        for place, axis in enumerate(reversed(axes)):
            code |= ((axis >> bit) & 1) << (len(axes) * bit + place)
    return code
