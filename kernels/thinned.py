"""Attention to some of the keys, and to the query's own, or those of its frame, beside them."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from accelplug import compat
from accelplug.kernels.chunks import by_heads, by_rows


def first_of_windows(rows: int, columns: int, window_hw: tuple[int, int]) -> Tensor:
    """Return the first token of each window of a grid, bool (rows, columns); windows at the far borders are cut."""
    first = torch.zeros(rows, columns, dtype=torch.bool)
    first[:: window_hw[0], :: window_hw[1]] = True
    return first


def attend_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to all keys.

    Parameters
    ----------
    q : Tensor (B, H, S_q, D).
    k, v : Tensor (B, H, S_k, D).
    scale : factor on q.k.

    Returns
    -------
    out : (B, H, S_q, D) in q's dtype.
    lse : float32 (B, H, S_q), the natural log-sum-exp of each row.
    """
    found = compat.torch.attention_with_lse(q, k, v, scale)
    if found is not None:
        return found
    parts = []
    for (some,) in by_rows(q.shape[0] * q.shape[1] * k.shape[2], q):
        logits = scale * some.float() @ k.float().mT
        parts.append(((logits.softmax(-1) @ v.float()).to(q.dtype), logits.logsumexp(-1)))
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def attend_with_own(
    q: Tensor, k: Tensor, v: Tensor, scale: float, own: tuple[Tensor, Tensor, Tensor], dropped: Tensor
) -> Tensor:
    """Attend to some keys, and some queries to their own beside: softmax over all of these.

    Parameters
    ----------
    q, k, v : as for `attend_lse`; they may have more channels than `own`, which are cut off.
    scale : factor on q.k.
    own : q, k and v of all tokens, (B, H, S_q, D) each.
    dropped : int64 (n,), tokens whose own key is not among `k`.

    Returns
    -------
    out : (B, H, S_q, D) in q's dtype.
    """
    out, lse = attend_lse(q, k, v, scale)
    out = out[..., : own[2].shape[-1]]
    scores = [
        scale * (some_q[:, :, dropped].float() * some_k[:, :, dropped].float()).sum(-1)
        for some_q, some_k in by_heads(len(q) * len(dropped) * q.shape[-1], own[0], own[1])
    ]
    share = (torch.cat(scores, 1) - lse[:, :, dropped]).sigmoid()  # e^own / (e^own + e^lse)
    mixed = torch.lerp(out[:, :, dropped], own[2][:, :, dropped], share[..., None].to(out.dtype))
    return out.index_copy(2, dropped, mixed)


def exchange(
    q: Tensor, read: tuple[Tensor, Tensor], gone: Sequence[Tensor], come: Sequence[Tensor], scale: float, times: float
) -> Tensor:
    """Attend to other keys in the place of some that were read.

    With (out, e^lse) of all that was read, of `gone` and of `come`, the result is (e^r out_r - n e^g out_g + e^c out_c) over the same
    without outputs. What is rounded in `read` counts (1 + n e^g / e^c) times at most: what comes must hold what goes stood for.

    Parameters
    ----------
    q : Tensor (B, H, S_q, D).
    read : what `attend_lse` gave for q and all keys, those of `gone` among them.
    gone, come : keys and values (B, H, n, D) that q shall not read, and such that it shall.
    scale : factor on q.k.
    times : n, how often each key of `gone` was counted in `read`.

    Returns
    -------
    out : (B, H, S_q, D) in q's dtype.
    """
    minus, plus = (attend_lse(q, k, v, scale) for k, v in (gone, come))
    parts = []
    for out, lse, out_minus, lse_minus, out_plus, lse_plus in by_heads(q[:, 0].numel(), *read, *minus, *plus):
        lse_minus = lse_minus + log(times)
        most = torch.maximum(lse, lse_plus)
        was, goes, comes = ((x - most).exp()[..., None] for x in (lse, lse_minus, lse_plus))
        parts.append(((was * out - goes * out_minus + comes * out_plus) / (was - goes + comes)).to(q.dtype))
    return torch.cat(parts, 1)


def smaller_grid(x: Tensor, factor: int) -> Tensor:
    """Make grids smaller as bilinear interpolation without a filter does: (..., rows, columns, D) -> (..., rows // f, columns // f, D).

    A cell gives the mean of its two middle rows and columns, or the middle one where the factor is odd; sides shorter than the factor
    give one. What is left over at the far borders is nobody's.
    """
    for dim in (-3, -2):
        length = x.shape[dim]
        step = min(factor, length)
        cells = x.narrow(dim, 0, length // step * step).unflatten(dim, (-1, step))  # the cell's own tokens stand at `dim`
        middle = cells.narrow(dim, (step - 1) // 2, 2 - step % 2)
        x = middle.mean(dim, dtype=torch.float32).to(x.dtype)
    return x


def farthest_first(x: Tensor, number: int) -> Tensor:
    """Order rows such that each of the first `number` is the farthest from those ahead of it, the first row first; then all others.

    Parameters
    ----------
    x : float32 (B, N, C).
    number : how many are chosen, 1 to N.

    Returns
    -------
    order : int64 (B, N).
    """
    chosen = x.new_zeros(x.shape[:2], dtype=torch.bool)
    picked, gap = x.new_zeros(len(x), 1, dtype=torch.int64), x.new_full(x.shape[:2], torch.inf)
    order = [picked]
    for _ in range(number - 1):
        chosen.scatter_(1, picked, True)
        here = x.gather(1, picked[..., None].expand(-1, -1, x.shape[-1]))
        gap = torch.minimum(gap, (x - here).square().sum(-1)).masked_fill(chosen, -1.0)
        picked = gap.argmax(1, keepdim=True)
        order.append(picked)
    first = torch.cat(order, 1)
    chosen.scatter_(1, first, True)
    rest = chosen.int().argsort(dim=1, stable=True)[:, : x.shape[1] - number]  # those that were not chosen, as they came
    return torch.cat([first, rest], 1)
