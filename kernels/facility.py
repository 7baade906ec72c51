"""ToMA's match (arXiv 2509.10918): the tokens of a window that cover the others best, and how much of each token goes to which of them.

Pure functions of tensors, in float32. A match has two parts: the *chosen* tokens of every window, and a *share* (B, G, d, n), how much of
token j of the window goes to its d-th chosen one; over these it sums to 1. Both are each sample's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from accelplug.kernels.chunks import by_heads
from accelplug.kernels.windows import Windows

TIE = 1e-4
"""Gains that are nearer to each other than this count as equal: a sum of cosines in float32 is off by less. Ours."""


def choose(metric: Tensor, windows: Windows, number: int) -> Tensor:
    """Choose tokens by facility location, greedily: each adds most to ``sum_i max_{j chosen} cos(x_i, x_j)`` in its window.

    Within 1 - 1/e of the best choice there is. Of tokens that add as much, within `TIE`, the first: two that are each other's nearest
    always do, and rounding, which is another in another batch, must not choose.

    Parameters
    ----------
    metric : Tensor (B, N, C).
    windows : of N tokens.
    number : how many to choose in each window. What stands behind as many as it holds means nothing.

    Returns
    -------
    chosen : int64 (B, G, number), places in the window, the best first.
    """
    unit = windows.split(normalize(metric.float(), dim=-1, eps=1e-6))  # [B, G, n, C]
    alike = unit @ unit.transpose(-1, -2)
    counts = windows.held.float()[:, :, None]  # tokens to be covered
    free = windows.held.expand(len(metric), -1, -1)
    covered = alike.new_full(alike.shape[:-1], -1.0)
    chosen = []
    for _ in range(number):
        gain = ((alike - covered[..., None]).relu_() * counts).sum(-2)  # [B, G, n]
        gain = gain.masked_fill(~free, -1.0)
        best = (gain >= gain.amax(-1, keepdim=True) - TIE).float().argmax(-1, keepdim=True)
        chosen.append(best)
        free = free.scatter(-1, best, torch.zeros_like(free))
        covered = torch.maximum(covered, alike.gather(-1, best[..., None, :].expand(*covered.shape, 1))[..., 0])
    return torch.cat(chosen, -1)


def token_shares(metric: Tensor, chosen: Tensor, windows: Windows, used: Tensor, sharpness: float) -> Tensor:
    """Return how much of each token goes to which chosen one: ``softmax_d(sharpness * cos(x_d, x_j))``, float32 (B, G, d, n).

    0 for chosen ones that are not `used`, bool (G, d), and for places that hold no token.
    """
    unit = windows.split(normalize(metric.float(), dim=-1, eps=1e-6))
    mine = unit.gather(-2, chosen[..., None].expand(-1, -1, -1, unit.shape[-1]))
    score = (sharpness * (mine @ unit.transpose(-1, -2))).masked_fill(~used[..., None], -torch.inf)
    return score.softmax(-2) * windows.held[:, None]


def merge_shares(x: Tensor, share: Tensor, windows: Windows, weight: Tensor | None = None) -> Tensor:
    """Average tokens by their shares.

    Parameters
    ----------
    x : Tensor (B, H, N, D).
    share : float32 (B, G, d, n).
    weight : float32 (B, N), 0 for tokens that do not count; None for all 1.

    Returns
    -------
    mean : (B, H, G * d, D) in x's dtype; 0 where nothing counts.
    """
    share = _counting(share, windows, weight)
    share = (share / share.sum(-1, keepdim=True).clamp(min=1e-6))[:, None]  # [B, 1, G, d, n]
    parts = []
    for (some,) in by_heads(len(x) * windows.token.numel() * x.shape[-1], x):
        parts.append((share @ windows.split(some.float())).flatten(2, 3).to(x.dtype))
    return torch.cat(parts, 1)


def share_sizes(share: Tensor, windows: Windows, weight: Tensor | None = None) -> Tensor:
    """How many tokens each chosen one stands for: float32 (B, G * d)."""
    return _counting(share, windows, weight).sum(-1).flatten(1)


def unmerge_shares(x: Tensor, share: Tensor, windows: Windows) -> Tensor:
    """Give every token what its chosen ones have, by its shares: (B, H, G * d, D) -> (B, H, N, D)."""
    back = share.transpose(-1, -2)[:, None]  # [B, 1, G, n, d]
    parts = []
    for (some,) in by_heads(len(x) * windows.token.numel() * x.shape[-1], x):
        parts.append(windows.join(back @ some.float().unflatten(2, share.shape[1:3])).to(x.dtype))
    return torch.cat(parts, 1)


def _counting(share: Tensor, windows: Windows, weight: Tensor | None) -> Tensor:
    return share if weight is None else share * weight[:, windows.token][:, :, None]
