"""Orders: how the tokens of a layout line up in blocks.

An order is a list of runs of visual tokens; each run starts a new block, so that a run never shares a block with another.
Text follows in blocks of its own. The permutation is applied to q, k and v after RoPE, and undone on the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from accelplug.call import Layout


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tokens laid out in blocks of equally many slots.

    Attributes
    ----------
    gather : int64 (P,), token in each slot; a slot without a token repeats its block's first one. None: raster, tail only.
    scatter : int64 (S,), slot of each token. None with `gather`.
    slots : P, a multiple of the unit it was made for.
    tokens : S.
    held : bool (P,), slots that hold a token. They stand at the front of each run.
    visual_slots : slots of the visual runs; text slots follow.
    layout : what was laid out.
    """

    gather: Tensor | None
    scatter: Tensor | None
    slots: int
    tokens: int
    held: Tensor
    visual_slots: int
    layout: Layout

    def lengths(self, block: int) -> Tensor:
        """Tokens per block of `block` slots, int32 (P / block,)."""
        return self.held.unflatten(0, (-1, block)).sum(-1, dtype=torch.int32)

    def is_text(self, block: int) -> Tensor:
        """Which blocks hold text, bool (P / block,)."""
        return torch.arange(0, self.slots, block, device=self.held.device) >= self.visual_slots

    def permute(self, x: Tensor) -> Tensor:
        """Put tokens (B, H, S, D) into slots (B, H, P, D), or leave them where they are already in order."""
        return x if self.gather is None else x.index_select(-2, self.gather)

    def unpermute(self, x: Tensor) -> Tensor:
        """Put slots (B, H, P, D) back to tokens (B, H, S, D)."""
        return x[..., : self.tokens, :] if self.scatter is None else x.index_select(-2, self.scatter)

    def to(self, device: torch.device | str) -> Tiles:
        """Return the tiles with their tensors on `device`."""
        gather, scatter = (x if x is None else x.to(device) for x in (self.gather, self.scatter))
        return Tiles(gather, scatter, self.slots, self.tokens, self.held.to(device), self.visual_slots, self.layout)


def tiles(
    layout: Layout,
    order: str = "raster",
    unit: int = 128,
    tile_thw: tuple[int, int, int] | None = None,
    dilation_thw: tuple[int, int, int] = (1, 1, 1),
) -> Tiles:
    """Lay the tokens of `layout` out in blocks.

    Parameters
    ----------
    order : ``raster``, ``morton`` or ``tile``.
    unit : slots per block, or the larger of the two where query and key blocks differ.
    tile_thw : frames, rows and columns of a tile, for ``tile``; their product is at most `unit`.
    dilation_thw : steps between the frames, rows and columns of a tile, for ``tile``.
    """
    return _tiles(layout, order, unit, tile_thw, dilation_thw)


@lru_cache(maxsize=64)
def _tiles(
    layout: Layout,
    order: str,
    unit: int,
    tile_thw: tuple[int, int, int] | None,
    dilation_thw: tuple[int, int, int],
) -> Tiles:
    runs = _tile_runs(layout.grid_thw, tile_thw, dilation_thw) if order == "tile" else [_CURVES[order](layout.grid_thw)]
    runs = [run + layout.text_before for run in runs]
    visual_slots = sum(-(-len(run) // unit) * unit for run in runs)
    text = torch.cat([torch.arange(layout.text_before), torch.arange(layout.length - layout.text_after, layout.length)])
    if len(text):
        runs.append(text)
    gather, held_parts = [], []
    for run in runs:
        slots = -(-len(run) // unit) * unit
        at = torch.arange(slots)
        gather.append(run[torch.where(at < len(run), at, at // unit * unit)])
        held_parts.append(at < len(run))
    slot_token, slot_held = torch.cat(gather), torch.cat(held_parts)
    scatter = torch.empty(layout.length, dtype=torch.int64)
    scatter[slot_token[slot_held]] = slot_held.nonzero()[:, 0]
    in_order = torch.equal(scatter, torch.arange(layout.length))
    there, back = (None, None) if in_order else (slot_token, scatter)
    return Tiles(there, back, len(slot_held), layout.length, slot_held, visual_slots, layout)


def raster(grid_thw: tuple[int, int, int]) -> Tensor:
    """Frames, then rows, then columns: int64 (T * H * W,)."""
    return torch.arange(math.prod(grid_thw))


def morton(grid_thw: tuple[int, int, int]) -> Tensor:
    """Z-order: the bits of column, row and frame interleaved, column lowest; any grid size. int64 (T * H * W,)."""
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid_thw), indexing="ij")
    code = torch.zeros_like(t)
    for bit in range(max(grid_thw).bit_length()):
        for place, axis in enumerate((w, h, t)):
            code |= ((axis >> bit) & 1) << (3 * bit + place)
    return code.flatten().argsort()


def axis_tiles(length: int, tile: int, dilation: int = 1) -> list[Tensor]:
    """Cut one axis into tiles of every `dilation`-th position, residue by residue; the last tile of a residue may be short."""
    return [part for residue in range(min(dilation, length)) for part in torch.arange(residue, length, dilation).split(tile)]


def _tile_runs(
    grid_thw: tuple[int, int, int], tile_thw: tuple[int, int, int] | None, dilation_thw: tuple[int, int, int]
) -> list[Tensor]:
    """One run per tile: the product of the three axes' tiles, columns fastest."""
    if tile_thw is None:
        raise ValueError("order='tile' needs tile_thw.")
    token = raster(grid_thw).view(grid_thw)
    axes = (axis_tiles(*axis) for axis in zip(grid_thw, tile_thw, dilation_thw, strict=True))
    return [token[frames[:, None, None], rows[:, None], columns].flatten() for frames, rows, columns in product(*axes)]


_CURVES = {"raster": raster, "morton": morton}
