"""Clusters: an order in which tokens that are alike share blocks, found by k-means in every call, for every head.

Tokens are sorted by cluster, and clusters lined up along the first principal direction of their centres, so that a block that
spans two clusters mixes near ones. Blocks have equally many slots as in any order; selectors judge them by their own means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accelplug.kernels.chunks import at_once
from accelplug.kernels.memory import memory_of
from accelplug.kernels.orders import Tiles


@dataclass(frozen=True, eq=False)
class ClusterTiles(Tiles):
    """Tiles of clusters. Keys that may not be read stand behind all others, in every head alike: one mask does for all."""

    gather: Tensor
    scatter: Tensor

    def permute_mask(self, mask: Tensor) -> Tensor:
        return mask.gather(-1, self.gather[:, 0])


def cluster_tiles(tiles: Tiles, unit: int, order: Tensor) -> ClusterTiles:
    """Line up the visual tokens of a call by cluster, those of each head and batch row by themselves.

    Parameters
    ----------
    tiles : the layout in raster order, its slots a multiple of `unit`; text keeps its slots.
    order : int64 (B, H, visual), as `cluster_order` gives it.
    """
    layout = tiles.layout
    first, visual = layout.text_before, layout.visual
    order = order + first
    at = torch.arange(tiles.visual_slots, device=order.device)
    slots = order[..., torch.where(at < visual, at, at // unit * unit)]
    scatter = torch.empty_like(order).scatter_(-1, order - first, at[:visual].expand_as(order))
    # Text keeps its place: as in raster order, where it lies in slots, or where `tiles` left it as it is.
    there = (
        torch.arange(tiles.slots, device=order.device).clamp(max=tiles.tokens - 1) if tiles.gather is None else tiles.gather
    )
    back = tiles.slot_of_token()
    heads = order.shape[:2]
    text_slots = there[tiles.visual_slots :].expand(*heads, -1)
    before, after = back[:first].expand(*heads, -1), back[first + visual :].expand(*heads, -1)
    return ClusterTiles(
        gather=torch.cat([slots, text_slots], -1),
        scatter=torch.cat([before, scatter, after], -1),
        slots=tiles.slots,
        tokens=tiles.tokens,
        held=tiles.held,
        visual_slots=tiles.visual_slots,
        layout=layout,
    )


@torch.library.custom_op("accelplug::cluster_order", mutates_args=())
def cluster_order(
    x: Tensor,
    valid: Tensor | None,
    first: int,
    number: int,
    clusters: int,
    iterations: int,
    warm_iterations: int,
    ticket: Tensor,
) -> Tensor:
    """Return tokens in cluster order, int64 (B, H, number), counted from `first`. One opaque node in compiled graphs.

    Parameters
    ----------
    x : Tensor (B, H, S, D); tokens `first` to ``first + number`` are clustered.
    valid : bool (B, S), tokens that count; None for all.
    clusters : how many, at most `number`.
    iterations : of Lloyd's algorithm, where it starts anew.
    warm_iterations : of Lloyd's algorithm, where it starts from the centres of the last step.
    ticket : of a `Memory`, int64 () on the CPU; of one that is gone, or `COLD`: none.
    """
    batch, heads, _, dim = x.shape
    tokens = x[:, :, first : first + number].flatten(0, 1).float()  # [R, n, D]
    counts = None if valid is None else valid[:, first : first + number].repeat_interleave(heads, 0)
    memory = memory_of(ticket, x.device)
    shape = (batch, heads, min(clusters, number), dim)
    last = memory.started(shape, x.device) if memory is not None else None
    if last is not None:
        centres, iterations = last.flatten(0, 1).float(), warm_iterations
    else:
        # Any tokens do; drawn once for all heads, by a generator of our own.
        drawn = torch.randperm(number, generator=torch.Generator().manual_seed(0))[: shape[2]]
        centres = tokens[:, drawn.to(x.device)]
    centres, label = kmeans(tokens, centres, iterations, counts)
    if memory is not None:
        memory.end = centres.view(shape).to(x.dtype)
    place = lined_up(centres, cluster_sizes(label, counts, shape[2])).gather(-1, label)
    place = place if counts is None else place.masked_fill(~counts, shape[2])
    return place.sort(dim=-1, stable=True).indices.view(batch, heads, number)


@cluster_order.register_fake
def _cluster_order_fake(
    x: Tensor,
    valid: Tensor | None,
    first: int,
    number: int,
    clusters: int,
    iterations: int,
    warm_iterations: int,
    ticket: Tensor,
) -> Tensor:
    return x.new_empty((*x.shape[:2], number), dtype=torch.int64)


def kmeans(x: Tensor, centres: Tensor, iterations: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm, row by row. It stops early only where another iteration would change nothing.

    Parameters
    ----------
    x : float32 (R, n, D).
    centres : float32 (R, C, D), where it starts. A cluster that loses all tokens keeps its centre.
    valid : bool (R, n), tokens that move centres; None for all.

    Returns
    -------
    centres : float32 (R, C, D).
    label : int64 (R, n), nearest centre of each token; of equally near ones the first.
    """
    label = nearest_centres(x, centres)
    for _ in range(iterations):
        centres = means(x, centres, label, valid)
        moved = nearest_centres(x, centres)
        if torch.equal(moved, label):
            break
        label = moved
    return centres, label


def nearest_centres(x: Tensor, centres: Tensor) -> Tensor:
    """Return the nearest centre of each token, int64 (R, n), a chunk of tokens at a time."""
    rows, clusters, _ = centres.shape
    offset = -0.5 * centres.square().sum(-1)[:, None]  # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2)
    chunks = x.split(at_once(rows * clusters), 1)
    return torch.cat([torch.baddbmm(offset, part, centres.transpose(-1, -2)).argmax(-1) for part in chunks], 1)


def means(x: Tensor, centres: Tensor, label: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the mean token of each cluster, float32 (R, C, D), its old centre where it has none.

    Sorted segments: unlike adding up by index, they sum in the same order in every run on a GPU too.
    """
    rows, clusters, dim = centres.shape
    label = label if valid is None else label.masked_fill(~valid, clusters)
    number = torch.zeros(rows, clusters + 1, dtype=torch.int64, device=x.device)
    number.scatter_add_(-1, label, torch.ones_like(label))
    order = label.sort(dim=-1, stable=True).indices
    by_cluster = x.gather(1, order[..., None].expand(-1, -1, dim)).flatten(0, 1)
    total = torch.segment_reduce(by_cluster, "sum", lengths=number.flatten(), axis=0, unsafe=True)
    total, number = (y.view(rows, clusters + 1, -1)[:, :clusters] for y in (total, number))
    return torch.where(number > 0, total / number.clamp(min=1), centres)


def cluster_sizes(label: Tensor, valid: Tensor | None, clusters: int) -> Tensor:
    """Return how many tokens that count each cluster has, float32 (R, C)."""
    weight = torch.ones_like(label) if valid is None else valid.long()
    return label.new_zeros(len(label), clusters).scatter_add_(-1, label, weight).float()


def lined_up(centres: Tensor, size: Tensor, rounds: int = 16) -> Tensor:
    """Return the place of each cluster along the first principal direction of the centres, int64 (R, C).

    Parameters
    ----------
    centres : float32 (R, C, D).
    size : float32 (R, C), how much each counts.
    rounds : power iterations. Where they do not settle, two directions do nearly as well.
    """
    weight = (size / size.sum(-1, keepdim=True).clamp(min=1))[..., None]
    centred = centres - (weight * centres).sum(-2, keepdim=True)
    covariance = centred.transpose(-1, -2) @ (weight * centred)  # [R, D, D]
    widest = covariance.diagonal(dim1=-2, dim2=-1).argmax(-1)
    direction = covariance.gather(-1, widest[:, None, None].expand(-1, covariance.shape[-1], 1))
    for _ in range(rounds):
        direction = torch.nn.functional.normalize(covariance @ direction, dim=-2)
    return (centred @ direction)[..., 0].argsort(dim=-1, stable=True).argsort(dim=-1)
