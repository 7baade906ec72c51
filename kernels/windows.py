"""Windows of a grid: its tokens in rows of equal length, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Windows:
    """A grid cut into G windows of at most n tokens.

    Attributes
    ----------
    token : int64 (G, n), the tokens of each window, in order; behind the last one, its first again.
    held : bool (G, n), False behind the last one.
    place : int64 (N,), where each token is in ``token.flatten()``.
    """

    token: Tensor
    held: Tensor
    place: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens, N."""
        return self.place.shape[0]

    def split(self, x: Tensor) -> Tensor:
        """(..., N, D) -> (..., G, n, D)."""
        return x.index_select(-2, self.token.flatten()).unflatten(-2, self.token.shape)

    def join(self, x: Tensor) -> Tensor:
        """(..., G, n, D) -> (..., N, D)."""
        return x.flatten(-3, -2).index_select(-2, self.place)


@lru_cache(maxsize=64)
def windows(
    grid_thw: tuple[int, int, int],
    window_thw: tuple[int, int, int],
    shift_thw: tuple[int, int, int] = (0, 0, 0),
    device: torch.device | str = "cpu",
) -> Windows:
    """Cut a grid into windows.

    Parameters
    ----------
    grid_thw : frames, rows, columns of tokens, in raster order.
    window_thw : tokens of a window on each axis; at the far borders it may hold fewer.
    shift_thw : tokens by which the windows are moved towards the first token, below the window's; at the near borders they then hold
        fewer too. Nothing is wrapped around.
    """
    token = torch.arange(grid_thw[0] * grid_thw[1] * grid_thw[2]).view(grid_thw)
    axes = [_window_slices(*axis) for axis in zip(grid_thw, window_thw, shift_thw, strict=True)]
    parts = [token[place].flatten() for place in product(*axes)]
    longest = max(map(len, parts))
    rows = torch.stack([torch.cat([part, part[:1].expand(longest - len(part))]) for part in parts])
    held = torch.arange(longest) < torch.tensor([len(part) for part in parts])[:, None]
    place = torch.empty(token.numel(), dtype=torch.int64)
    place[rows[held]] = held.flatten().nonzero().flatten()
    return Windows(rows.to(device), held.to(device), place.to(device))


def _window_slices(length: int, window: int, shift: int) -> list[slice]:
    """Where windows are on an axis."""
    first = (window - shift) % window
    ends = [0, *range(first or window, length, window), length]
    return [slice(begin, end) for begin, end in pairwise(ends)]
