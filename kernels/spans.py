"""Attention on spans of keys, without the S x S probabilities: log-bias, span masses, redistribution, single rows.

Three exact devices carry all of it on any fused kernel, since none of them looks inside:

* a bias of low rank rides in extra head dimensions, ``[q, r] . [k, c] = q.k + r.c``;
* values that are 1 on a span and 0 elsewhere come out as the span's mass, so that spans need no probabilities;
* a few last rows are cheap to compute anew, with their probabilities.

Notation: ``p`` attention after the softmax, P_c its mass on span c. All masses and probabilities are float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall

ALIGN = 8
"""Fused kernels want head dimensions that are multiples of this."""
ROOM = 512
"""Zeros kept behind what is known of a prompt's keys, so that as many decode steps cut it to length and do not pad it."""


def fit(columns: Tensor, call: AttentionCall) -> Tensor:
    """Bring what is known of positions (..., S) to the keys of a call: (..., S_k).

    A static cache has keys behind the last token, a sliding window has lost the first ones.
    """
    first, keys = call.place.first_key if call.place else 0, call.k.shape[-2]
    columns = columns[..., first : first + keys]
    return pad(columns, (0, keys - columns.shape[-1])) if columns.shape[-1] < keys else columns


def roomy(columns: Tensor) -> Tensor:
    """Append `ROOM` zeros, for tokens to come, to what is known of a prompt's positions (..., S)."""
    return pad(columns, (0, ROOM))


def _aligned(x: Tensor, extra: Tensor) -> Tensor:
    """Append dimensions and fill up to a multiple of ALIGN with zeros."""
    x = torch.cat([x, extra.to(x.dtype)], -1)
    return pad(x, (0, -x.shape[-1] % ALIGN))


def biased(call: AttentionCall, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k whose product has a bias added: ``scale * q.k + sum_c rows_c * columns_c``.

    Parameters
    ----------
    rows : (B|1, H|1, S_q, C) float32.
    columns : (B|1, S_k, C), values that the dtype of k holds exactly, such as 0 and 1.

    Returns
    -------
    q (B, H, S_q, D') and k (B, H_kv, S_k, D'), D' a multiple of 8. In low precision a row's value rides as its rounding and the
    remainder, so that no more is lost than in the product itself.
    """
    q, k = call.q, call.k
    rows = rows / call.scale
    high = rows.to(q.dtype)
    low = (rows - high.to(rows.dtype)).to(q.dtype)
    extra = torch.cat([high, low], -1).expand(*q.shape[:-1], -1)
    both = torch.cat([columns, columns], -1)[:, None].expand(*k.shape[:-1], -1)
    return _aligned(q, extra), _aligned(k, both)


def with_low_rank(call: AttentionCall, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """As `biased`, for columns of any values: ``scale * q.k + sum_c rows_c * columns_c`` (FlashBias, arXiv 2505.12044).

    Parameters
    ----------
    rows : (B|1, H|1, S_q, C) float32.
    columns : (B|1, H_kv|1, S_k, C) float32.

    Returns
    -------
    q (B, H, S_q, D') and k (B, H_kv, S_k, D'), D' a multiple of 8. In low precision both factors ride as rounding and remainder;
    of their four products the one of the remainders is left out, which is as far below the others as they are below one.
    """
    q, k, rows = call.q, call.k, rows / call.scale
    extra, both = [rows], [columns]
    if q.dtype in (torch.bfloat16, torch.float16):
        high, key_high = rows.to(q.dtype), columns.to(k.dtype)
        low, key_low = rows - high.to(rows.dtype), columns - key_high.to(columns.dtype)
        extra, both = [high, low, high], [key_high, key_high, key_low]
    parts = ((q, extra), (k, both))
    q, k = (_aligned(x, torch.cat([p.to(x.dtype) for p in more], -1).expand(*x.shape[:-1], -1)) for x, more in parts)
    return q, k


def dense_at_one_width(call: AttentionCall, q: Tensor, k: Tensor) -> Tensor:
    """Attend with longer q and k, the values filled up with zeros: flash kernels want one head dimension for all."""
    dim = call.v.shape[-1]
    return call.dense(q, k, pad(call.v, (0, q.shape[-1] - dim)))[..., :dim]


def attend_biased(call: AttentionCall, rows: Tensor, columns: Tensor) -> Tensor:
    """Attend with the bias of `biased`: (B, H, S_q, D_v)."""
    q, k = biased(call, rows, columns)
    dim = call.v.shape[-1]
    v = pad(call.v, (0, max(0, q.shape[-1] - dim)))  # flash kernels want one head dimension for all
    return call.dense(q, k, v)[..., :dim]


def with_masses(
    call: AttentionCall, spans: Tensor, q: Tensor | None = None, k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend, and also return each span's mass.

    Parameters
    ----------
    spans : bool (B, S_k, C).

    Returns
    -------
    output (B, H, S_q, D_v), masses (B, H, S_q, C) float32.
    """
    v = _aligned(call.v, spans[:, None].expand(*call.v.shape[:-1], -1))
    q, k = call.q if q is None else q, call.k if k is None else k
    width = max(q.shape[-1], v.shape[-1])  # flash kernels want one head dimension for all
    q, k, v = (pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    out = call.dense(q, k, v)
    dim = call.v.shape[-1]
    return out[..., :dim], out[..., dim : dim + spans.shape[-1]].float()


def only(v: Tensor, span: Tensor) -> Tensor:
    """Return values with all outside a span (B, S_k) at zero: attending to them gives the span's part of the output."""
    return v * span[:, None, :, None].to(v.dtype)


# ------------------------------------------------------------------------------------------------------------ last rows


def keep_rows(call: AttentionCall, rows: int) -> Tensor | None:
    """Which keys the last `rows` queries may read: bool or additive, broadcastable to (B, H, rows, S_k); None for all."""
    queries, keys = call.q.shape[-2], call.k.shape[-2]
    mask = call.mask
    if mask is not None and mask.ndim == 4:
        return mask[:, :, -rows:] if mask.shape[2] > 1 else mask
    causal = None
    if queries > 1 and call.place is not None:
        last = call.place.first_query + queries - rows + torch.arange(rows, device=call.q.device)
        first_key = call.place.first_key
        causal = (torch.arange(first_key, first_key + keys, device=call.q.device) <= last[:, None])[None, None]
    if mask is None:
        return causal
    valid = mask[:, None, None, -keys:].bool()
    return valid if causal is None else valid & causal


def last(call: AttentionCall, rows: int) -> AttentionCall:
    """Return a call as if only its last `rows` queries were there, answered by SDPA: rows are few, so their mask is small."""
    if call.place is None or rows >= call.q.shape[2]:
        return call
    mask, groups = keep_rows(call, rows), call.q.shape[1] // call.k.shape[1]
    tail = call.q[:, :, -rows:]

    def dense(q: Tensor = tail, k: Tensor = call.k, v: Tensor = call.v) -> Tensor:
        bias = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=call.scale)

    first = call.place.first_query + call.q.shape[2] - rows
    return replace(call, q=tail, mask=mask, dense=dense, place=replace(call.place, first_query=first))


def row_scores(call: AttentionCall, rows: int = 1) -> Tensor:
    """Return the scores of the last queries, before the softmax: float32 (B, H, rows, S_k), -inf where they may not read."""
    q, k = call.q[:, :, -rows:].float(), call.k.float()
    batch, heads, _, dim = q.shape
    q = q.reshape(batch, k.shape[1], -1, dim)  # query heads that share keys side by side
    scores = (q @ k.mT).reshape(batch, heads, rows, -1) * call.scale
    keep = keep_rows(call, rows)
    if keep is None:
        return scores
    if keep.dtype == torch.bool:
        return scores.masked_fill(~keep, float("-inf"))
    return scores + keep.float()


def row_attention(call: AttentionCall, rows: int = 1) -> Tensor:
    """Return the attention of the last queries, after the softmax: float32 (B, H, rows, S_k); 0 in rows that are padding."""
    return row_scores(call, rows).softmax(-1).nan_to_num(0.0)


def read_rows(call: AttentionCall, p: Tensor) -> Tensor:
    """Return the outputs (B, H, rows, D_v) of probabilities (B, H, rows, S_k)."""
    batch, heads, rows, keys = p.shape
    v = call.v.float()
    out = p.reshape(batch, v.shape[1], -1, keys) @ v
    return out.reshape(batch, heads, rows, -1).to(call.v.dtype)


def replace_last(out: Tensor, rows: Tensor) -> Tensor:
    """Return outputs (B, H, S_q, D_v) with the last rows replaced by (B, H, rows, D_v)."""
    n = rows.shape[2]
    return rows if n == out.shape[2] else torch.cat([out[:, :, :-n], rows.to(out.dtype)], 2)


def decode_biased(call: AttentionCall, bias: Tensor) -> Tensor:
    """Attend with one query and a bias: copying the keys, as `biased` does, would cost more than the attention.

    Parameters
    ----------
    bias : (B|1, H|1, 1, S_k) float32, added to the scores.
    """
    keep = keep_rows(call, 1)
    if keep is not None:
        bias = bias.masked_fill(~keep, float("-inf")) if keep.dtype == torch.bool else bias + keep
    q, k, v = call.q, call.k, call.v
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # query heads that share keys become queries of one head
        batch, heads, _, dim = q.shape
        q = q.reshape(batch, heads // groups, groups, dim)
        if bias.shape[1] > 1:
            bias = bias.reshape(-1, heads // groups, groups, bias.shape[-1])
    out = scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=call.scale)
    return out.reshape(*call.q.shape[:3], v.shape[-1])
