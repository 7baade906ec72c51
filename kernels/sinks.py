"""What draws attention in text whatever it says, how far back heads look, and which tokens later ones look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall

ALIKE = 0.9
"""Size of the cosine with the first sink from which a token is one too."""
FIRST = 3
"""Tokens of which one is the first sink."""
OUTLIVED = 4
"""Layers that a secondary sink must outlive."""
LASTING = 15
"""A sink that dies fewer layers than this ahead of the end is like the first one."""
ROWS_AT_ONCE = 256
"""Rows whose attention is held at once."""


def sinks(hidden: Tensor) -> tuple[int, range, Tensor]:
    """Find the tokens that point where the first sink points (secondary attention sinks, arXiv 2512.22213).

    Parameters
    ----------
    hidden : Tensor (L, S, C), residual stream behind each layer.

    Returns
    -------
    first : which token the first sink is: the largest of the first three, mean over layers.
    lives : the layers in which it is one, from the largest rise of its size to the largest fall.
    alike : bool (L, S), tokens whose cosine with it is over `ALIKE` in size, in these layers.
    """
    first = int(hidden[:, :FIRST].float().norm(dim=-1).mean(0).argmax())
    sizes = hidden[:, first].float().norm(dim=-1)
    steps = sizes.diff()
    begin = int(steps.argmax()) + 1 if len(steps) else 0
    end = begin + int(steps[begin:].argmin()) + 1 if begin < len(steps) else len(hidden)
    lives = range(begin, end if begin < len(steps) and float(steps[end - 1]) < 0 else len(hidden))
    alike = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    for layer in lives:
        cosine = torch.cosine_similarity(hidden[layer].float(), hidden[layer, first][None].float(), dim=-1)
        alike[layer] = cosine.abs() > ALIKE
    return first, lives, alike


def kinds(alike: Tensor) -> tuple[Tensor, Tensor]:
    """Return which tokens are sinks through most of the depth, and which in its middle alone: bool (S,) each, of bool (L, S)."""
    lived, layers = alike.sum(0), len(alike)
    lasting = lived >= max(layers - LASTING, layers // 2 + 1)
    return lasting, (lived > OUTLIVED) & ~lasting


def looks(call: AttentionCall, window: int, near: int, far: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return how far the heads of a causal call of one row look, and who is looked at (arXiv 2510.13554).

    Parameters
    ----------
    call : its q (1, H, S, D); its mask hides nothing but the future.
    window : distances count up to this.
    near, far : the rows behind a token by which its influence is told.

    Returns
    -------
    clipped : float32 (H,), ``mean_t sum_s p_ts min(t - s, window)``: windowed average attention distance.
    distance : float32 (H,), the same without a bound.
    influence : float32 (H, S), mean of ``p_ts`` over t from s + near to s + far: future attention influence; 0 where no row is that far.
    received : float32 (H, S), attention that a token gets, mean over the rows that see it.
    """
    q, k, scale = call.q[0].float(), call.k[0].float(), call.scale
    heads, tokens, groups = q.shape[0], q.shape[1], q.shape[0] // k.shape[0]
    at = torch.arange(tokens, device=q.device)
    clipped, distance = q.new_zeros(heads), q.new_zeros(heads)
    influence, received, rows_seen = q.new_zeros(heads, tokens), q.new_zeros(heads, tokens), q.new_zeros(tokens)
    for start in range(0, tokens, ROWS_AT_ONCE):
        rows = at[start : start + ROWS_AT_ONCE]
        back = rows[:, None] - at[: int(rows[-1]) + 1]  # [r, keys]
        scores = q[:, rows].unflatten(0, (-1, groups)) @ k[:, None, : back.shape[1]].mT * scale
        p = scores.masked_fill(back < 0, float("-inf")).softmax(-1).flatten(0, 1)  # [H, r, keys]
        clipped += (p * back.clamp(0, window)).sum((1, 2))
        distance += (p * back.clamp(min=0)).sum((1, 2))
        band = (back >= near) & (back <= far)
        influence[:, : back.shape[1]] += (p * band).sum(1)
        rows_seen[: back.shape[1]] += band.sum(0)
        received[:, : back.shape[1]] += p.sum(1)
    return clipped / tokens, distance / tokens, influence / rows_seen.clamp(min=1), received / (tokens - at)
