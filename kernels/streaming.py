"""Attention to first tokens, to a window, and to one token that stands for all in between: exact for every query, however it is fed.

With r the number of a query's token in its row, its keys are those of tokens 0 .. sink - 1 and r - window + 1 .. r, and, where compensated,
one key and value that are the mean of those of tokens sink .. r - window, counted as often as these are (RazorAttention, arXiv 2407.15891):

    ``o = (sum_read e^{s q.k_j} v_j + n e^{s q.k^} v^) / (sum_read e^{s q.k_j} + n e^{s q.k^})``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

QUERIES_AT_ONCE = 256
"""Queries that are answered at once: each piece reads its window and its own keys."""


def streaming_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    number: Tensor,
    scale: float,
    sink: int,
    window: int,
    dropped: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend as the module says.

    Parameters
    ----------
    q : Tensor (B, H, T, D), the last T of the slots of `k`.
    k, v : Tensor (B, H_kv, S, D) and (B, H_kv, S, D_v): what is kept of earlier tokens, and the new ones, in order.
    number : int64 (B, S), which token of its row stands in a slot, from 0; -1 for none: padding.
    scale : factor on q.k.
    sink, window : tokens that are read; window at least 1.
    dropped : float32 (B, H_kv, D) and (B, H_kv, D_v), sums of the keys and values that stand in no slot any more; None to read
        no token for what is left out.

    Returns
    -------
    (B, H, T, D_v); 0 for queries that are padding.
    """
    batch, heads, tokens, _ = q.shape
    if tokens == 1:
        return _step(q, k, v, number, scale, sink, window, dropped)
    key_heads, slots = k.shape[1], k.shape[2]
    held = number >= 0
    order = number.cummax(-1).values  # rises, whatever padding stands in between
    sums = None if dropped is None else tuple(x.clone() for x in dropped)
    middle, counted = held & (number >= sink), 0
    out = torch.empty(batch, heads, tokens, v.shape[-1], dtype=q.dtype, device=q.device)
    for start in range(0, tokens, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, tokens)
        new = slots - tokens  # the slot of the first query
        own = number[:, new + start : new + stop]  # [B, P]
        oldest = order[:, new + start : new + start + 1] - window  # [B, 1], the last that no query of the piece reads
        begin = int((order <= oldest).sum(-1).min())  # the first slot that a window reaches
        sinks = int(((number < sink) & held).cumsum(-1).argmax(-1).max()) + 1 if sink else 0
        near = torch.arange(begin, new + stop, device=q.device)
        read = torch.cat([torch.arange(min(sinks, begin), device=q.device), near])
        at = number[:, read][:, None]  # [B, 1, n]
        behind = own[..., None] - at
        may = (at >= 0) & (behind >= 0) & ((behind < window) | (at < sink))  # [B, P, n]
        queries = q[:, :, start:stop].float().unflatten(1, (key_heads, -1)) * scale  # [B, H_kv, g, P, D]
        means: list[Tensor] = []
        if sums is not None:
            upto = torch.searchsorted(order, own - window, right=True)  # slots up to the last that stands in between
            first, last = int(upto.min()), int(upto.max())
            sums = tuple(x + _sum(y, middle, counted, first) for x, y in zip(sums, (k, v), strict=True))
            counted = max(counted, first)
            means = [
                _running(x, y, middle, counted, last, upto) for x, y in zip(sums, (k, v), strict=True)
            ]  # [B, H_kv, P, D]
        answer = _mixed(queries, k[:, :, read], v[:, :, read], may, own - window - sink + 1, means)
        out[:, :, start:stop] = answer.to(q.dtype)
    return out


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    number: Tensor,
    scale: float,
    sink: int,
    window: int,
    dropped: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """One query, that of the last slot: all slots are looked at, and nothing waits for a device."""
    own, held = number[:, -1:], number >= 0
    near = held & ((number > own - window) | (number < sink))
    queries = q.float().unflatten(1, (k.shape[1], -1)) * scale
    totals: list[Tensor] = []
    if dropped is not None:
        between = (held & ~near)[:, None, :, None]
        totals = [(x + (y.float() * between).sum(2))[:, :, None] for x, y in zip(dropped, (k, v), strict=True)]
    return _mixed(queries, k, v, near[:, None], own - window - sink + 1, totals).to(q.dtype)


def _mixed(queries: Tensor, k: Tensor, v: Tensor, may: Tensor, left: Tensor, totals: list[Tensor]) -> Tensor:
    """Attend to keys, and to one token in place of others.

    Parameters
    ----------
    queries : float32 (B, H_kv, g, P, D), scaled.
    k, v : Tensor (B, H_kv, n, D) and (B, H_kv, n, D_v).
    may : bool (B, P, n), which of them a query reads.
    left : int64 (B, P), how many tokens one stands for; 0 or less for none.
    totals : float32 (B, H_kv, P, D) and (B, H_kv, P, D_v), sums of their keys and values; none: nothing stands for them.

    Returns
    -------
    float32 (B, H, P, D_v); 0 for queries that read nothing.
    """
    scores = (queries @ k.float().mT[:, :, None]).masked_fill_(~may[:, None, None], float("-inf"))
    if totals:
        count = left.clamp(min=1)[:, None, :, None]  # [B, 1, P, 1]
        key, value = (total / count for total in totals)
        extra = (queries * key[:, :, None]).sum(-1, keepdim=True) + count.log()[:, :, None]
        scores = torch.cat([scores, extra.masked_fill((left < 1)[:, None, None, :, None], float("-inf"))], -1)
    p = scores.softmax(-1).nan_to_num_(0.0)
    answer = p[..., : k.shape[2]] @ v.float()[:, :, None]
    if totals:
        answer = answer + p[..., -1:] * value[:, :, None]
    return answer.flatten(1, 2)


def _sum(x: Tensor, members: Tensor, start: int, stop: int) -> Tensor:
    """Sum of the members among some slots of x (B, H, S, D): float32 (B, H, D)."""
    part = members[:, None, start:stop, None]
    return (x[:, :, start:stop].float() * part).sum(2)


def _running(total: Tensor, x: Tensor, members: Tensor, start: int, stop: int, upto: Tensor) -> Tensor:
    """A total (B, H, D) and the members of x (B, H, S, D) from slot `start` up to each query's slot (B, P): float32 (B, H, P, D)."""
    stop = max(start, stop)
    part = (x[:, :, start:stop].float() * members[:, None, start:stop, None]).cumsum(2)
    part = torch.cat([torch.zeros_like(total)[:, :, None], part], 2)
    at = (upto - start).clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
    return total[:, :, None] + part.gather(2, at)
