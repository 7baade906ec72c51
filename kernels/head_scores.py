"""What heads of a language model are there for, told from their attention: copying, echoing, induction, and how far they look.

All scores are float32 by query head, and larger for heads that need old keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

SCORES_AT_ONCE = 1 << 24
"""Scores that are held at once."""


def by_key_head(scores: Tensor, key_heads: int, total: bool = False) -> Tensor:
    """Return the largest score among the query heads (H,) that share a key head, or their sum; -1 stays: (H_kv,)."""
    shared = scores.unflatten(0, (key_heads, -1))
    return torch.where(shared.amin(-1) < 0, -1.0, shared.sum(-1)) if total else shared.amax(-1)


def added(out: Tensor, weight: Tensor) -> Tensor:
    """Return how long the vectors are that heads add to the residual stream, over the length of their sum: float32 (H,), mean over tokens.

    Parameters
    ----------
    out : Tensor (H, S, D_v), outputs of attention.
    weight : Tensor (C, H D_v), of the projection behind it.
    """
    heads, tokens, dim = out.shape
    total, lengths = torch.zeros(tokens, len(weight), device=out.device), []
    for head in range(heads):
        part = out[head].float() @ weight[:, head * dim : (head + 1) * dim].float().mT
        lengths.append(part.norm(dim=-1))
        total += part
    return (torch.stack(lengths) / total.norm(dim=-1).clamp(min=1e-9)).mean(-1)


def echo_and_induction(q: Tensor, k: Tensor, scale: float, period: int, first: int = 1) -> tuple[Tensor, Tensor]:
    """Return how much attention goes to earlier copies of a token, and to the tokens behind those (RazorAttention, arXiv 2407.15891).

    Parameters
    ----------
    q, k : Tensor (1, H, S, D) and (1, H_kv, S, D) of `first` tokens and a random sequence of `period` tokens, told over and over.
    scale : factor on q.k; attention is causal.

    Returns
    -------
    echo, induction : float32 (H,) in [0, 1], mean over all tokens from the second telling on.
    """
    heads, tokens, groups = q.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    keys = k[0].float()
    echo, induction = torch.zeros(heads, device=q.device), torch.zeros(heads, device=q.device)
    begin, step = first + period, max(1, SCORES_AT_ONCE // (heads * tokens))
    for start in range(begin, tokens, step):
        rows = torch.arange(start, min(start + step, tokens), device=q.device)
        queries = q[0, :, rows].float().unflatten(0, (-1, groups)) * scale  # [H_kv, groups, rows, D]
        scores = queries @ keys[:, None, : int(rows[-1]) + 1].mT
        ahead = torch.arange(scores.shape[-1], device=q.device) > rows[:, None]
        p = scores.masked_fill_(ahead, float("-inf")).softmax(-1).flatten(0, 1)  # [H, rows, keys]
        for copy in range(period, tokens, period):
            there = (rows - copy >= first).float()
            at = (rows - copy).clamp(min=0)[None, :, None].expand(heads, -1, 1)
            echo += (p.gather(-1, at)[..., 0] * there).sum(-1)
            induction += (p.gather(-1, at + 1)[..., 0] * there).sum(-1)
    return echo / (tokens - begin), induction / (tokens - begin)


def razor(echo: Tensor, induction: Tensor, ratio: float = 14.0) -> Tensor:
    """Return one score of RazorAttention's two: the heads above any level are the best by echo and `ratio` times as many by induction.

    Parameters
    ----------
    echo, induction : (layers, heads).
    ratio : 14 induction heads to one echo head, as published (14 % and 1 % of all).

    Returns
    -------
    float32 (layers, heads) in [0, 1]: 1 for the first of either.
    """

    def rank(x: Tensor) -> Tensor:
        return x.flatten().argsort(descending=True, stable=True).argsort().view(x.shape).float()

    best = torch.minimum(rank(induction) / ratio, rank(echo))
    return 1 - best * ratio / (ratio + 1) / max(best.numel(), 1)


def unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Take rotary positions out of queries or keys; None where pairs of dimensions lie in no order that is known.

    Parameters
    ----------
    x : Tensor (B, H, S, D), rotated in its first R dimensions.
    cos, sin : Tensor (B|1, S, R), as a model applies them, with any factor that it has on them.
    """
    return _turned(x, cos, -sin, (cos.square() + sin.square()).float())


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Put rotary positions into queries or keys; see `unrotated`."""
    return _turned(x, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, over: Tensor | None = None) -> Tensor | None:
    cos, sin, dims = cos[:, None].float(), sin[:, None].float(), cos.shape[-1]
    turned, rest = x[..., :dims].float(), x[..., dims:].float()
    if torch.equal(cos[..., : dims // 2], cos[..., dims // 2 :]):  # pairs are (i, i + R / 2), as in Llama
        low, high = turned.chunk(2, -1)
        across = torch.cat([-high, low], -1)
    elif torch.equal(cos[..., ::2], cos[..., 1::2]):  # pairs are neighbours, as in GLM
        across = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        return None
    turned = turned * cos + across * sin
    return torch.cat([turned if over is None else turned / over[:, None], rest], -1)


def look_back(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return how far back the last query looks on keys that differ by position alone: the area under its cumulative attention.

    kvpress's training-free stand-in for DuoAttention's gates (arXiv 2410.10819).

    Parameters
    ----------
    q : Tensor (H, D), a head's mean query, rotated to the last position.
    k : Tensor (H_kv, S, D), a head's mean key, rotated to all positions.

    Returns
    -------
    float32 (H,) in [0, 1]: 1 where all goes to the oldest key.
    """
    groups = q.shape[0] // k.shape[0]
    scores = (k.float() @ q.float().unflatten(0, (-1, groups)).mT).mT.flatten(0, 1) * scale  # [H, S]
    return scores.softmax(-1).cumsum(-1).mean(-1)
