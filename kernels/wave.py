"""Clusters of keys: which tokens are alike, how many, their mean key and value, and the tokens of some clusters as rows of equal length."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from accelplug.kernels.clusters import cluster_sizes, kmeans, means

NOWHERE = 1e4
"""Where a centre is put, on every axis, that no key shall come to."""


def cluster_keys(keys: Tensor, values: Tensor, ranks: Tensor, held: Tensor, size: int, iterations: int) -> dict[str, Tensor]:
    """Return clusters of keys: k-means (Lloyd's algorithm) from every `size`-th key on, for each row and head by itself.

    Parameters
    ----------
    keys, values : Tensor (B, H_kv, n, D) and (B, H_kv, n, D_v).
    ranks : int64 (B, n), what the tokens are called.
    held : bool (B, n), False for filling, which is in no cluster.
    size : mean number of tokens.
    iterations : at most.

    Returns
    -------
    centre, mean : float32 (B, H_kv, C, D) and (B, H_kv, C, D_v), the mean key and the mean value.
    number : int64 (B, H_kv, C), tokens of each; 0 for clusters of nothing.
    first : int64 (B, H_kv, C), where the tokens of each begin among `member`.
    member : int64 (B, H_kv, n), ranks of tokens by cluster; filling at the end.
    """
    batch, heads, tokens, _ = keys.shape
    x, valid = keys.float().flatten(0, 1), held.repeat_interleave(heads, 0)
    begin = torch.arange(0, tokens, size, device=keys.device)
    start = x[:, begin].masked_fill(~valid[:, begin, None], NOWHERE)
    centre, label = kmeans(x, start, iterations, valid)
    centre = means(x, centre, label, valid)  # of those it has now
    number = cluster_sizes(label, valid, len(begin)).long()
    mean = means(values.float().flatten(0, 1), centre.new_zeros(*centre.shape[:2], values.shape[-1]), label, valid)
    order = label.masked_fill(~valid, len(begin)).argsort(dim=-1, stable=True)
    found = {
        "centre": centre,
        "mean": mean,
        "number": number,
        "first": number.cumsum(-1) - number,
        "member": ranks.repeat_interleave(heads, 0).gather(1, order),
    }
    return {name: y.unflatten(0, (batch, heads)) for name, y in found.items()}


def members(clusters: Mapping[str, Tensor], chosen: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens of some clusters.

    Parameters
    ----------
    clusters : as `cluster_keys` returns them.
    chosen : int64 (B, H_kv, c), clusters.
    held : bool (B, H_kv, c), False for those that are not meant.

    Returns
    -------
    ranks : int64 (B, H_kv, n), as many as the most that a head has.
    held : bool (B, H_kv, n), False for filling.
    """
    number = clusters["number"].gather(2, chosen) * held
    end = number.cumsum(-1)
    most = int(end[..., -1].max())
    place = torch.arange(most, device=chosen.device).expand(*chosen.shape[:2], -1).contiguous()
    which = torch.searchsorted(end, place, right=True)
    inside = which < chosen.shape[-1]
    which = which.clamp(max=chosen.shape[-1] - 1)
    first = clusters["first"].gather(2, chosen) - (end - number)
    at = (first.gather(2, which) + place).clamp(0, clusters["member"].shape[-1] - 1)
    return clusters["member"].gather(2, at), inside
