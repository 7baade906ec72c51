"""Orders: how the tokens of a layout line up in blocks.

An order is a list of runs of visual tokens; each run starts a new block, so that a run never shares a block with another.
Text follows in blocks of its own. The permutation is applied to q, k and v after RoPE, and undone on the output. It may
differ by head, or by head and batch row: then blocks hold equally many tokens all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.call import Layout
from accelplug.errors import ShapeError
from accelplug.kernels import curves

Order = Literal["raster", "tile", "morton", "hilbert", "gilbert", "thw", "twh", "hwt", "htw", "wht", "wth"]
"""Names of orders. Three are curves. Six say which of frame, row and column counts slowest, then next; ``thw`` is the raster."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tokens laid out in blocks of equally many slots.

    Attributes
    ----------
    gather : int64 (P,), or (H, P) or (B, H, P) where the order differs by head; the token in each slot. A slot without a
        token repeats its block's first one. None: tokens are in order already, only the tail is padded.
    scatter : int64 (S,), (H, S) or (B, H, S), slot of each token. None with `gather`.
    slots : P, a multiple of the unit it was made for.
    tokens : S.
    held : bool (P,), slots that hold a token. They stand at the front of each run.
    visual_slots : slots of the visual runs; text slots follow.
    layout : what was laid out.
    applied : whether tokens come in this order already: then nothing is left to permute, and `gather` only says who is where.
    """

    gather: Tensor | None
    scatter: Tensor | None
    slots: int
    tokens: int
    held: Tensor
    visual_slots: int
    layout: Layout
    applied: bool = False

    @property
    def can_be_applied(self) -> bool:
        """Whether tokens can come in this order: one for all heads, in which slots without a token stand behind all others."""
        return self.gather is not None and self.gather.ndim == 1 and bool(self.held[: self.tokens].all())

    def lengths(self, block: int) -> Tensor:
        """Tokens per block of `block` slots, int32 (P / block,)."""
        return self.held.unflatten(0, (-1, block)).sum(-1, dtype=torch.int32)

    def query_lengths(self, block: int) -> Tensor:
        """Tokens per block, as `lengths`, but 0 for blocks of text of which no token asks."""
        before, after = self.layout.unasked
        lengths = self.lengths(block)
        if not before + after:
            return lengths
        first = torch.arange(0, self.slots, block, device=self.held.device) - self.visual_slots  # of each block, among text
        asks = (first + block > before) & (first < self.tokens - self.layout.visual - after)
        return lengths * ((first < 0) | asks)

    def is_text(self, block: int) -> Tensor:
        """Which blocks hold text, bool (P / block,)."""
        return torch.arange(0, self.slots, block, device=self.held.device) >= self.visual_slots

    def permute(self, x: Tensor) -> Tensor:
        """Put tokens (B, H, S, D) into slots (B, H, P, D), or leave them where they are already in order.

        Fewer heads than the order has (grouped-query attention) are repeated.
        """
        return x if self.gather is None or self.applied else take(x, self.gather)

    def unpermute(self, x: Tensor) -> Tensor:
        """Put slots (B, H, P, D) back to tokens (B, H, S, D)."""
        return x[..., : self.tokens, :] if self.scatter is None or self.applied else take(x, self.scatter)

    def permute_mask(self, mask: Tensor) -> Tensor:
        """Put flags of tokens, bool (B, S), into slots: (B, P), or (B, H, P) where the order differs by head."""
        if self.gather is None or self.applied:
            return mask
        if self.gather.ndim == 1:
            return mask.index_select(-1, self.gather)
        gather = self.gather.expand(len(mask), -1, -1)
        return mask[:, None].expand(-1, gather.shape[1], -1).gather(-1, gather)

    def coordinates(self) -> Tensor:
        """Frame, row and column of the token in each slot, int64 (..., P, 3); -1 for text."""
        _, rows, columns = self.layout.grid_thw
        token = torch.arange(self.slots, device=self.held.device) if self.gather is None else self.gather
        visual = token - self.layout.text_before
        places = torch.stack([visual // (rows * columns), visual // columns % rows, visual % columns], -1)
        return places.masked_fill(((visual < 0) | (visual >= self.layout.visual))[..., None], -1)

    def slot_of_token(self) -> Tensor:
        """`scatter`, written out where tokens are in order: int64 (..., S)."""
        return torch.arange(self.tokens, device=self.held.device) if self.scatter is None else self.scatter

    def pick(self, choice: Tensor) -> Tiles:
        """Return for every batch row and head one of the orders that `per_head` stacked: choice int64 (B, H)."""
        if self.gather is None or self.scatter is None:  # all are the same
            return self
        return replace(self, gather=self.gather[choice], scatter=self.scatter[choice])

    def tokens_in(self, slots: Tensor) -> Tensor:
        """Return which token of those that come stands in each of some slots, int64 (R,) -> (R,), (H, R) or (B, H, R)."""
        return slots if self.gather is None or self.applied else self.gather[..., slots]

    def to(self, device: torch.device | str) -> Tiles:
        """Return the tiles with their tensors on `device`, the same copy for all who ask: layers share an order."""
        device = torch.device(device)
        return self if self.held.device == device else _moved.get((id(self), device), lambda: (self, self._to(device)))[1]

    def _to(self, device: torch.device) -> Tiles:
        gather, scatter = (x if x is None else x.to(device) for x in (self.gather, self.scatter))
        return replace(self, gather=gather, scatter=scatter, held=self.held.to(device))

    def of_heads(self, choice: Tensor) -> Tiles:
        """Return tiles whose heads are, one after the other, those that `choice`, int64 (H',), names here; one is for all."""
        if self.gather is None or self.scatter is None or self.gather.ndim == 1:
            return self
        gather, scatter = (x.index_select(-2, choice) for x in (self.gather, self.scatter))
        if choice.shape[0] == 1:
            gather, scatter = gather[..., 0, :], scatter[..., 0, :]
        return replace(self, gather=gather, scatter=scatter)

    @staticmethod
    def per_head(choices: Sequence[Tiles]) -> Tiles:
        """Stack one choice per head.

        Raises
        ------
        ShapeError
            If their blocks do not hold equally many tokens: the kernel knows one length per block, not per head.
        """
        first = choices[0]
        if any(not torch.equal(tiles.held, first.held) or tiles.layout != first.layout for tiles in choices):
            raise ShapeError(
                "Orders of several heads must fill equally many slots of each block, got blocks of other lengths. Stack "
                "orders of one run (raster, curves, axis orders) of the same layout and unit."
            )
        if all(tiles.gather is None for tiles in choices):
            return first
        in_order = torch.arange(first.slots).clamp(max=first.tokens - 1), torch.arange(first.tokens)
        gathers = [in_order[0] if tiles.gather is None else tiles.gather for tiles in choices]
        scatters = [in_order[1] if tiles.scatter is None else tiles.scatter for tiles in choices]
        return replace(first, gather=torch.stack(gathers), scatter=torch.stack(scatters))


# The original is kept beside its copy, so that the id in the key stays its own.
_moved: Bounded[tuple[int, torch.device], tuple[Tiles, Tiles]] = Bounded(64)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Pick along the sequence of x (B, H, S, D) by an index (P,), (H, P) or (B, H, P)."""
    if index.ndim == 1:
        return x.index_select(-2, index)
    if x.shape[1] != index.shape[-2]:
        x = x.repeat_interleave(index.shape[-2] // x.shape[1], 1)
    # All heads' rows in one axis: index_select copies whole rows, 1.3 to 7 times as fast on a CPU as gather, which looks up
    # each number.
    batch, heads, tokens, dim = x.shape
    head = torch.arange(batch * heads, device=x.device).view(batch, heads, 1)
    return x.reshape(-1, dim).index_select(0, (index + head * tokens).flatten()).view(batch, heads, -1, dim)


def tiles(
    layout: Layout,
    order: Order = "raster",
    unit: int = 128,
    tile_thw: tuple[int, int, int] | None = None,
    dilation_thw: tuple[int, int, int] = (1, 1, 1),
) -> Tiles:
    """Lay the tokens of `layout` out in blocks.

    Parameters
    ----------
    order : one of `Order`.
    unit : slots per block, or the larger of the two where query and key blocks differ.
    tile_thw : frames, rows and columns of a tile, for ``tile``; their product is at most `unit`. None: `compact_tile`.
    dilation_thw : steps between the frames, rows and columns of a tile, for ``tile``.
    """
    if order == "tile" and tile_thw is None:
        tile_thw = compact_tile(layout.grid_thw, unit)
    return _tiles(layout, order, unit, tile_thw, dilation_thw)


def compact_tile(grid_thw: tuple[int, int, int], unit: int) -> tuple[int, int, int]:
    """Return the tile of at most `unit` tokens that cuts the grid into fewest tiles, the most compact of equals."""
    frames, rows, columns = grid_thw
    shapes = [
        (t, h, min(unit // (t * h), columns))
        for t in range(1, min(frames, unit) + 1)
        for h in range(1, min(rows, unit // t) + 1)
    ]
    return min(shapes, key=lambda tile: (math.prod(-(-n // m) for n, m in zip(grid_thw, tile, strict=True)), sum(tile)))


@lru_cache(maxsize=64)
def _tiles(
    layout: Layout,
    order: str,
    unit: int,
    tile_thw: tuple[int, int, int] | None,
    dilation_thw: tuple[int, int, int],
) -> Tiles:
    if order == "tile":
        runs = _tile_runs(layout.grid_thw, tile_thw or layout.grid_thw, dilation_thw)
    else:
        runs = [_CURVES[order](layout.grid_thw) if order in _CURVES else axis_order(layout.grid_thw, order)]
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


def axis_order(grid_thw: tuple[int, int, int], axes: str) -> Tensor:
    """Tokens with the axes counting in the order named, the slowest first: int64 (T * H * W,). ``thw`` is the raster."""
    return raster(grid_thw).view(grid_thw).permute(*("thw".index(axis) for axis in axes)).flatten()


def axis_tiles(length: int, tile: int, dilation: int = 1) -> list[Tensor]:
    """Cut one axis into tiles of every `dilation`-th position, residue by residue; the last tile of a residue may be short."""
    return [part for residue in range(min(dilation, length)) for part in torch.arange(residue, length, dilation).split(tile)]


def _tile_runs(
    grid_thw: tuple[int, int, int], tile_thw: tuple[int, int, int], dilation_thw: tuple[int, int, int]
) -> list[Tensor]:
    """One run per tile: the product of the three axes' tiles, columns fastest."""
    token = raster(grid_thw).view(grid_thw)
    axes = (axis_tiles(*axis) for axis in zip(grid_thw, tile_thw, dilation_thw, strict=True))
    return [token[frames[:, None, None], rows[:, None], columns].flatten() for frames, rows, columns in product(*axes)]


_CURVES = {"raster": raster, "morton": curves.morton, "hilbert": curves.hilbert, "gilbert": curves.gilbert}
