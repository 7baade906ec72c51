"""Token merging: which tokens of a grid are alike enough to be averaged, the averages, and the way back.

Pure functions of tensors. A *partition* says who may merge into whom and knows no scores; a match, int64 (B, N), says into which
slot each of N tokens goes. Slots keep the order of the tokens that own them. On CUDA the two hot parts, the likest destination and the
means, are the Triton kernels of `triton_merge`, which no GPU has run yet; without Triton, and elsewhere, what stands here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

import torch
from torch import Tensor

from accelplug.errors import ShapeError
from accelplug.kernels.attention import triton_missing
from accelplug.kernels.chunks import by_heads, by_rows


@dataclass(frozen=True, eq=False)
class Partition:
    """Sources, which may be merged, and the destinations of their tile, which they may be merged into.

    Attributes
    ----------
    source : int64 (G, A), tokens of the sources of each of G tiles; behind the last one, any.
    destination : int64 (G, E), tokens of its destinations, likewise.
    is_source, is_destination : bool (G, A) and (G, E), False behind the last one.
    sources, tokens : how many there are in all.
    """

    source: Tensor
    destination: Tensor
    is_source: Tensor
    is_destination: Tensor
    sources: int
    tokens: int


@lru_cache(maxsize=64)
def partition(
    grid_thw: tuple[int, int, int],
    cell_thw: tuple[int, int, int] = (1, 2, 2),
    tile_thw: tuple[int, int, int] = (1, 16, 16),
    seed: int | None = 0,
    device: torch.device | str = "cpu",
) -> Partition:
    """Choose one destination in each whole cell of a grid; all other tokens are sources.

    Parameters
    ----------
    grid_thw : frames, rows, columns of tokens, in raster order.
    cell_thw : tokens of a cell on each axis, cut to the grid. What is left over at the far borders are sources.
    tile_thw : tokens of a tile, in which sources look for a destination: rounded to whole cells, of about equal tiles, so that none
        is without a destination.
    seed : of the draw of destinations, which is this alone (no global generator); None takes the first token of each cell.
    """
    cell = tuple(min(c, n) for c, n in zip(cell_thw, grid_thw, strict=True))
    cells = tuple(n // c for n, c in zip(grid_thw, cell, strict=True))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    offset = [  # place of the destination in its cell, on each axis: [cells_t, cells_h, cells_w]
        torch.zeros(cells, dtype=torch.int64) if generator is None else torch.randint(c, cells, generator=generator)
        for c in cell
    ]
    corner = torch.meshgrid(*(torch.arange(n) * c for n, c in zip(cells, cell, strict=True)), indexing="ij")
    frame, row, column = (c + o for c, o in zip(corner, offset, strict=True))
    token = torch.arange(grid_thw[0] * grid_thw[1] * grid_thw[2]).view(grid_thw)
    chosen = torch.zeros(grid_thw, dtype=torch.bool)
    chosen[frame, row, column] = True

    cuts = [_cuts(*axis) for axis in zip(grid_thw, cell, tile_thw, strict=True)]
    tiles = [tuple(slice(*ends) for ends in place) for place in product(*(pairwise(cut) for cut in cuts))]
    source, is_source = _in_rows([token[tile][~chosen[tile]] for tile in tiles])
    destination, is_destination = _in_rows([token[tile][chosen[tile]] for tile in tiles])
    source, destination, is_source, is_destination = (x.to(device) for x in (source, destination, is_source, is_destination))
    return Partition(source, destination, is_source, is_destination, int((~chosen).sum()), token.numel())


@dataclass(frozen=True, eq=False)
class Cells:
    """A grid cut into cells, t-major, then rows, then columns.

    Attributes
    ----------
    slot : int64 (1, N), cell of each token.
    centre : int64 (n,), the token nearest to the middle of each cell; of two, the later one.
    size : float32 (1, n), tokens of each.
    """

    slot: Tensor
    centre: Tensor
    size: Tensor

    @property
    def even(self) -> bool:
        """Whether all cells have one size."""
        return bool((self.size == self.size[:, :1]).all())


@lru_cache(maxsize=64)
def cells(grid_thw: tuple[int, int, int], cell_thw: tuple[int, int, int], device: torch.device | str = "cpu") -> Cells:
    """Cut a grid into cells of `cell_thw` tokens; those at the far borders may be smaller."""
    slot, centre, size = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.ones(1)
    for length, cell in zip(grid_thw, cell_thw, strict=True):
        place = torch.arange(length)
        first = place[::cell]
        held = (length - first).clamp(max=cell)
        slot = (slot[:, None] * len(first) + place // cell).flatten()
        centre = (centre[:, None] * length + first + held // 2).flatten()
        size = (size[:, None] * held).flatten()
    return Cells(slot[None].to(device), centre.to(device), size[None].to(device))


def _cuts(length: int, cell: int, tile: int) -> list[int]:
    """Where tiles begin and end on an axis: at whole cells, the last at the border."""
    cells = length // cell
    tiles = -(-cells // max(tile // cell, 1))
    return [cells * i // tiles * cell for i in range(tiles)] + [length]


def _in_rows(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Lists of tokens as rows of equal length, and which entries are real."""
    length = torch.tensor([len(part) for part in parts])
    rows = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return rows, torch.arange(rows.shape[1]) < length[:, None]


def match(metric: Tensor, partition: Partition, merged: int) -> Tensor:
    """Merge the sources that are most like their best destination: bipartite soft matching (arXiv 2210.09461), in tiles.

    Likeness is the cosine of the metric. Each sample has a match of its own.

    Parameters
    ----------
    metric : Tensor (B, N, C).
    partition : of N tokens.
    merged : how many tokens go, at most ``partition.sources``.

    Returns
    -------
    slot : int64 (B, N), slot of each token, below N - `merged`. Kept tokens have their own, in order.

    Raises
    ------
    ShapeError
        If `metric` is of another number of tokens, or more are to be merged than are sources.
    """
    if metric.ndim != 3 or metric.shape[1] != partition.tokens or merged > partition.sources:
        raise ShapeError(
            f"match takes a metric (B, {partition.tokens}, C) and merges at most {partition.sources} tokens for this partition, "
            f"got {tuple(metric.shape)} and {merged}."
        )
    unit = torch.nn.functional.normalize(metric.float(), dim=-1, eps=1e-6)
    parts = (partition.source, partition.destination, partition.is_destination)
    best, which = _best_op(unit, *parts) if unit.is_cuda else best_destination(unit, *parts)  # [B, G, A]
    target = partition.destination.expand(len(unit), -1, -1).gather(-1, which).flatten(1)  # [B, G * A], tokens
    picked = best.masked_fill(~partition.is_source, -torch.inf).flatten(1).topk(merged, sorted=False).indices  # [B, merged]
    source, target = partition.source.flatten()[picked], target.gather(1, picked)
    kept = torch.ones_like(metric[..., 0], dtype=torch.int64).scatter(1, source, 0)
    slot = kept.cumsum(1) - 1
    return slot.scatter(1, source, slot.gather(1, target))


def best_destination(unit: Tensor, source: Tensor, destination: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest cosine of each source with a destination of its tile, and which that is.

    Parameters
    ----------
    unit : float32 (B, N, C), of length 1.
    source, destination, real : `source`, `destination` and `is_destination` of a `Partition` of N tokens.

    Returns
    -------
    best, which : float32 and int64 (B, G, A).
    """
    asking, goals = unit[:, source], unit[:, destination].mT  # [B, G, A, C] and [B, G, C, E]
    few: Iterable[tuple[Tensor, ...]] = [(asking,)]
    if source.shape[1]:
        few = by_rows(len(goals) * goals.shape[1] * goals.shape[-1], asking)
    found = [(rows @ goals).masked_fill(~real[:, None], -torch.inf).max(-1) for (rows,) in few]
    best, which = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    return best, which


@torch.library.custom_op("accelplug::best_destination", mutates_args=())
def _best_op(unit: Tensor, source: Tensor, destination: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """`best_destination` by Triton, where that is there: one opaque node in compiled graphs."""
    if triton_missing(unit.device) is not None:
        return best_destination(unit, source, destination, real)
    from accelplug.kernels import triton_merge

    return triton_merge.likest_destination(unit, source, destination, real)


@_best_op.register_fake
def _best_op_fake(unit: Tensor, source: Tensor, destination: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    best = unit.new_empty(len(unit), *source.shape)
    return best, torch.empty_like(best, dtype=torch.int64)


def merge(x: Tensor, slot: Tensor, slots: int, weight: Tensor | None = None) -> Tensor:
    """Average the tokens of each slot, in float32.

    Parameters
    ----------
    x : Tensor (B, H, N, D).
    slot : int64 (B, N), as from `match`, below `slots`.
    weight : float32 (B, N), 0 for tokens that do not count; None for all 1.

    Returns
    -------
    mean : (B, H, slots, D) in x's dtype; 0 where nothing counts.
    """
    return _merge_op(x, slot, slots, weight) if x.is_cuda else _slot_means(x, slot, slots, weight)


def _slot_means(x: Tensor, slot: Tensor, slots: int, weight: Tensor | None) -> Tensor:
    """`merge` in plain torch."""
    number = slot_sizes(slot, slots, weight).clamp(min=1)[:, None, :, None]
    parts = []
    for (some,) in by_heads(len(x) * x.shape[-2] * x.shape[-1], x):
        x32 = some.float() if weight is None else some.float() * weight[:, None, :, None]
        total = x32.new_zeros((*some.shape[:2], slots, x.shape[-1]))
        parts.append((total.scatter_add(2, _expand(slot, some), x32) / number).to(x.dtype))
    return torch.cat(parts, 1)


@torch.library.custom_op("accelplug::merge_slots", mutates_args=())
def _merge_op(x: Tensor, slot: Tensor, slots: int, weight: Tensor | None) -> Tensor:
    """`merge` by Triton, where that is there: one opaque node in compiled graphs."""
    if triton_missing(x.device) is not None:
        return _slot_means(x, slot, slots, weight)
    from accelplug.kernels import triton_merge

    return triton_merge.merge_slots(x, slot, slots, weight)


@_merge_op.register_fake
def _merge_op_fake(x: Tensor, slot: Tensor, slots: int, weight: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:2], slots, x.shape[-1])


def mlerp(x: Tensor, slot: Tensor, slots: int, weight: Tensor | None = None) -> Tensor:
    """Average the tokens of each slot as `merge` does, then make the mean as long as the longest of them (arXiv 2312.01026)."""
    mean = merge(x, slot, slots, weight)
    length = x.norm(dim=-1, dtype=torch.float32)  # [B, H, N]
    length = length if weight is None else length * weight[:, None]
    longest = length.new_zeros((*x.shape[:2], slots)).scatter_reduce(2, slot[:, None].expand_as(length), length, "amax")
    factor = longest / mean.norm(dim=-1, dtype=torch.float32).clamp(min=1e-6)
    return mean * factor.to(mean.dtype)[..., None]


def own_tokens(slot: Tensor, slots: int, partition: Partition) -> Tensor:
    """Which tokens were not merged into another: float32 (B, N), 1 or 0, of a match of `partition`."""
    destination, real = partition.destination.flatten()[None], partition.is_destination.flatten()[None].float()
    is_destination = real.new_zeros((1, partition.tokens)).scatter_reduce(1, destination, real, "amax")
    alone = slot_sizes(slot, slots).gather(1, slot) == 1
    return torch.maximum(is_destination, alone.float())


def slot_sizes(slot: Tensor, slots: int, weight: Tensor | None = None) -> Tensor:
    """How many tokens each slot stands for: float32 (B, slots)."""
    ones = torch.ones_like(slot, dtype=torch.float32) if weight is None else weight
    return ones.new_zeros((len(slot), slots)).scatter_add(1, slot, ones)


def unmerge(x: Tensor, slot: Tensor) -> Tensor:
    """Give every token what its slot has: (B, H, slots, D) -> (B, H, N, D)."""
    return x.gather(2, _expand(slot, x))


def _expand(slot: Tensor, like: Tensor) -> Tensor:
    return slot[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[-1])
