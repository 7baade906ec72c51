"""Attention on spans of keys, without the S x S probabilities: log-bias, span masses, redistribution, single rows.

Three exact devices carry all of it on any fused kernel, since none of them looks inside:

* a bias of low rank rides in extra head dimensions, ``[q, r] . [k, c] = q.k + r.c``;
* values that are 1 on a span and 0 elsewhere come out as the span's mass, so that spans need no probabilities;
* a few last rows are cheap to compute anew, with their probabilities.

Notation: ``p`` attention after the softmax, P_c its mass on span c. All masses and probabilities are float32.
"""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from accelplug.call import AttentionCall, Rows

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


def unit_values(call: AttentionCall) -> AttentionCall:
    """Return a call whose values are unit vectors, so that what it gives is its probabilities: (B, H, S_q, S_k)."""
    keys = call.k.shape[2]
    v = torch.eye(keys, dtype=call.v.dtype, device=call.v.device).expand(*call.k.shape[:2], keys, keys)

    def dense(q: Tensor = call.q, k: Tensor = call.k, v: Tensor = v) -> Tensor:
        return call.dense(q, k, v)

    return replace(call, v=v, dense=dense)


# ----------------------------------------------------------------------------------------------------------- a few rows


def exactly(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Have a function of a call and more compute outside of autocast, which would do its float32 products in low precision."""

    @wraps(function)
    def computed(call: AttentionCall, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(call.q.device.type, enabled=False):
            return function(call, *args, **kwargs)

    return computed


def take_rows(x: Tensor, rows: Rows) -> Tensor:
    """Return rows (B, H, n, D) of a tensor (B, H, S_q, D)."""
    return x[:, :, -rows:] if isinstance(rows, int) else x.take_along_dim(rows[:, None, :, None].to(x.device), 2)


def keep_rows(call: AttentionCall, rows: Rows) -> Tensor | None:
    """Which keys some queries may read: bool or additive, broadcastable to (B, H, n, S_k); None for all.

    An additive mask is -inf where it hides a key, so that nothing that is added to a score brings it back.
    """
    mask = call.mask
    if mask is not None and mask.ndim == 4:
        mask = take_rows(mask, rows) if mask.shape[2] > 1 else mask
        return mask if mask.dtype == torch.bool else mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))
    keys = call.k.shape[-2]
    valid = None
    if mask is not None:  # a static cache has keys behind the last token
        valid = pad(mask[:, -keys:].bool(), (0, max(0, keys - mask.shape[-1])))
    near = _near(call, rows, valid)
    valid = None if valid is None else valid[:, None, None]
    return valid if near is None else near if valid is None else near & valid


def _near(call: AttentionCall, rows: Rows, valid: Tensor | None) -> Tensor | None:
    """Which keys stand where some queries look, ahead of them and in their window: bool (B|1, 1, n, S_k); None for all.

    Distances leave padding out, as kernels do that are told which keys are `valid`, bool (B, S_k).
    """
    queries, keys, place = call.q.shape[-2], call.k.shape[-2], call.place
    ahead = place is not None and place.causal and queries > 1
    window = None if place is None or place.window is None or place.window >= keys else place.window
    if place is None or not (ahead or window):
        return None
    at = torch.arange(keys, device=call.q.device)[None] if valid is None else valid.cumsum(-1) - 1  # [B|1, S_k]
    if queries > 1:
        first = place.first_query - place.first_key
        own = at[:, first : first + queries]
        own = own[:, -rows:] if isinstance(rows, int) else own.take_along_dim(rows.to(own.device), 1)
    else:  # a decode step's query is the last token there is
        own = at.amax(-1, keepdim=True)
    behind = own[:, None, :, None] - at[:, None, None]  # how far back a key lies
    near = behind >= 0 if ahead else torch.ones_like(behind, dtype=torch.bool)
    return near & (behind.abs() < window) if window else near


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


@exactly
def row_products(call: AttentionCall, rows: Rows = 1) -> Tensor:
    """Return ``scale * q.k`` of some queries with all keys, whatever the mask says: float32 (B, H, n, S_k)."""
    q, k = take_rows(call.q, rows).float(), call.k.float()
    batch, heads, number, dim = q.shape
    q = q.reshape(batch, k.shape[1], -1, dim)  # query heads that share keys side by side
    return (q @ k.mT).reshape(batch, heads, number, -1) * call.scale


def masked(scores: Tensor, keep: Tensor | None) -> Tensor:
    """Return scores with what `keep_rows` says applied: -inf where a row may not read."""
    if keep is None:
        return scores
    return scores.masked_fill(~keep, float("-inf")) if keep.dtype == torch.bool else scores + keep.float()


def row_scores(call: AttentionCall, rows: Rows = 1) -> Tensor:
    """Return the scores of some queries, before the softmax: float32 (B, H, n, S_k), -inf where they may not read."""
    return masked(row_products(call, rows), keep_rows(call, rows))


def probabilities(scores: Tensor) -> Tensor:
    """Return the softmax of scores (..., S_k), 0 in rows that may read nothing."""
    return scores.softmax(-1).nan_to_num(0.0)


def row_attention(call: AttentionCall, rows: Rows = 1) -> Tensor:
    """Return the attention of some queries, after the softmax: float32 (B, H, n, S_k); 0 in rows that are padding."""
    return probabilities(row_scores(call, rows))


@exactly
def read_rows(call: AttentionCall, p: Tensor) -> Tensor:
    """Return the outputs (B, H, rows, D_v) of probabilities (B, H, rows, S_k)."""
    batch, heads, rows, keys = p.shape
    v = call.v.float()
    out = p.reshape(batch, v.shape[1], -1, keys) @ v
    return out.reshape(batch, heads, rows, -1).to(call.v.dtype)


@exactly
def on_spans(call: AttentionCall, p: Tensor, spans: Tensor) -> Tensor:
    """Return the masses (B, H, rows, C) of probabilities (B, H, rows, S_k) on spans, float32 (B, S_k, C)."""
    return p @ spans[:, None]


def replace_rows(call: AttentionCall, new: Tensor, rows: Rows) -> Tensor:
    """Return the dense outputs of a call, (B, H, S_q, D_v), with some rows replaced by `new` (B, H, n, D_v)."""
    if isinstance(rows, int):
        return new if rows == call.q.shape[2] else torch.cat([(out := call.dense())[:, :, :-rows], new.to(out.dtype)], 2)
    out = call.dense()
    return out.scatter(2, rows[:, None, :, None].to(out.device).expand_as(new), new.to(out.dtype))


def decode_biased(call: AttentionCall, bias: Tensor) -> Tensor:
    """Attend with one query and a bias: copying the keys, as `biased` does, would cost more than the attention.

    Parameters
    ----------
    bias : (B|1, H|1, 1, S_k) float32, added to the scores.
    """
    bias = masked(bias, keep_rows(call, 1))
    q, k, v = call.q, call.k, call.v
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # query heads that share keys become queries of one head
        batch, heads, _, dim = q.shape
        q = q.reshape(batch, heads // groups, groups, dim)
        if bias.shape[1] > 1:
            bias = bias.reshape(-1, heads // groups, groups, bias.shape[-1])
    out = scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=call.scale)
    return out.reshape(*call.q.shape[:3], v.shape[-1])


def raised(call: AttentionCall, share: Tensor, heads: Tensor | None = None, mean: bool = False) -> Tensor:
    """Attend with ``s + share |s|`` in the rows that answer, share (B, S) by key; in `heads`, bool (B, H, n), if given.

    With `mean`, ``|s|`` is the mean over all heads of the layer.
    """
    rows = call.place.answers if call.place else 1
    scores = row_products(call, rows)  # [B, H, n, S_k]
    share = fit(share, call).to(scores.device)[:, None, None]
    if heads is not None:
        share = share * heads[..., None]
    size = scores.abs()
    if mean:
        size = (call.place.gather_heads(size) if call.place else size).mean(1, keepdim=True)
    scores = scores.addcmul(share, size)  # ahead of the mask: no alpha brings back what it hides
    new = read_rows(call, probabilities(masked(scores, keep_rows(call, rows))))
    return replace_rows(call, new, rows)


def says_more(mask: Tensor, valid: Tensor, first_query: int) -> bool:
    """Whether a mask (B, 1|H, S_q, S_k) lets a token read more or fewer keys than causal attention does.

    Parameters
    ----------
    valid : bool (B, S), the sequence's tokens that are not padding.
    first_query : place of the first of the S_q queries among them.
    """
    may = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    rows, valid = slice(first_query, first_query + mask.shape[2]), valid.to(mask.device)
    differs = may.sum(-1) != valid.cumsum(-1)[:, None, rows]
    return bool((differs & valid[:, None, rows]).any())
