"""8-bit products: q.k with smoothed keys (SageAttention, arXiv 2410.02367), and p.v by tiles (PAROAttention, arXiv 2506.16054).

*q.k.* Keys are first freed of what all of them share, ``k' = k - mean(k)``: that shifts every logit of a row alike, so the softmax
does not see it, and what is left needs a smaller step. Each block of queries and of keys then has one step,
``max|x| / 127`` for int8 and ``max|x| / 448`` for fp8 (e4m3).

*p.v.* Every channel of a head's values has one step, ``max|v| / 127``, and so has each row of a tile of keys: what the online softmax
gives them, over the largest of the row in the tile, is rounded to 127ths. Paper: a step a tile of 64 x 64; its release: 127ths of the
row's largest so far. Ours, a step a row and tile, is finer than both, and the order of tiles has no say in it. Sums of probabilities
are taken before they are rounded, as in the release.

Only keys that are read exactly are in 8 bits. Pooled keys and values keep full precision, but their queries are the rounded ones.
The Triton kernel multiplies 8-bit numbers. Other backends round and multiply in the dtype of q, some heads at a time: the same result,
no gain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelplug.kernels.chunks import by_heads
from accelplug.kernels.plan import held_slots

Precision = Literal["native", "int8", "fp8"]
ValuePrecision = Literal["native", "int8"]

DTYPES: dict[str, torch.dtype | None] = {"native": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
TILE = 64
"""Most keys whose probabilities share a step. PAROAttention."""
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_LEAST_STEP = 1e-15  # the product of two is still a normal number


@dataclass(frozen=True, eq=False)
class Quantised:
    """Queries and smoothed keys in 8 bits, with a step per block: ``x = step * values``.

    Attributes
    ----------
    q, k : int8 or float8_e4m3fn (B, H, P_q, D) and (B, H_kv, P_k, D).
    q_step, k_step : float32 (B, H, M) and (B, H_kv, N).
    block_q, block_k : slots per block.
    shared : float32 (B, H_kv, 1, D), the mean key that was taken off.
    """

    q: Tensor
    k: Tensor
    q_step: Tensor
    k_step: Tensor
    block_q: int
    block_k: int
    shared: Tensor

    def restored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what the 8-bit numbers stand for, (B, H, P_q, D) and (B, H_kv, P_k, D)."""
        parts = ((self.q, self.q_step, self.block_q), (self.k, self.k_step, self.block_k))
        q, k = ((x.float() * _by_slot(step, block, x.shape[-2])).to(dtype) for x, step, block in parts)
        return q, k

    def smoothed(self, keys: Tensor) -> Tensor:
        """Return coarse keys (B, H_kv, E, D) without what all keys share."""
        return (keys.float() - self.shared).to(keys.dtype)


@dataclass(frozen=True, eq=False)
class QuantisedValues:
    """Values in int8, with a step per channel: ``v = step * values``.

    Attributes
    ----------
    v : int8 (B, H_kv, D_v, N * block_k), a channel's values side by side, as 8-bit products want them; 0 in a slot without a token.
    step : float32 (B, H_kv, D_v).
    tile : keys whose probabilities share a step.
    """

    v: Tensor
    step: Tensor
    tile: int

    def restored(self, dtype: torch.dtype, slots: int) -> Tensor:
        """Return what the numbers stand for, (B, H_kv, slots, D_v)."""
        return (self.v.float() * self.step[..., None]).to(dtype).mT[..., :slots, :]

    def in_steps(self, values: Tensor) -> Tensor:
        """Return coarse values (B, H_kv, E, D_v) in steps of their channels."""
        return (values.float() / self.step[..., None, :]).to(values.dtype)


def tile_of(block_k: int) -> int:
    """Return how many keys share a step: `TILE`, or the most of it that divide a block."""
    return math.gcd(TILE, block_k)


def shared_key(k: Tensor, plan: Any, key_mask: Tensor | None) -> Tensor:
    """Return the mean key over those that may be read, float32 (B, H_kv, 1, D)."""
    holds = _held(k, plan.k_len, plan.block_k, key_mask)
    number = holds.sum(-2, keepdim=True).clamp(min=1)
    means = [x.float().masked_fill(~holds, 0.0).sum(-2, keepdim=True) / number for (x,) in by_heads(k[:, 0].numel(), k)]
    return torch.cat(means, 1)


def quantised(q: Tensor, k: Tensor, shared: Tensor, plan: Any, precision: str, key_mask: Tensor | None) -> Quantised:
    """Round queries, and keys without what they share, to ``int8`` or ``fp8``; slots that hold no token, or a key that may not be
    read, become 0."""
    queries = (q, torch.zeros_like(q[:, :, :1]), _held(q, plan.q_len, plan.block_q, None), plan.block_q)
    keys = (k, shared, _held(k, plan.k_len, plan.block_k, key_mask), plan.block_k)
    (q8, q_step), (k8, k_step) = (_rounded(*x, precision) for x in (queries, keys))
    return Quantised(q8, k8, q_step, k_step, plan.block_q, plan.block_k, shared)


def quantised_values(v: Tensor, plan: Any, key_mask: Tensor | None) -> QuantisedValues:
    """Round values to int8; slots that hold no token, or one that may not be read, become 0."""
    batch, heads, slots, dim = v.shape
    holds = _held(v, plan.k_len, plan.block_k, key_mask)
    out = torch.zeros(batch, heads, dim, len(plan.k_len) * plan.block_k, dtype=torch.int8, device=v.device)
    step = torch.empty(batch, heads, dim, device=v.device)
    for some, into, their_step in by_heads(v[:, 0].numel(), v, out, step):
        kept = some.float().masked_fill(~holds, 0.0)
        their_step.copy_((kept.abs().amax(-2) / 127).clamp(min=_LEAST_STEP))
        into[..., :slots] = (kept / their_step[..., None, :]).round_().mT
    return QuantisedValues(out, step, tile_of(plan.block_k))


def softmax(logits: Tensor, tiles: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return weights, float32 (..., C), and log-sum-exps, float32 (...), of rows; a row without a key has weights of 0.

    Parameters
    ----------
    logits : float32 (..., C), -inf for keys that are not read.
    tiles : int64 (E,), ascending, which tile each of the first E keys is of: their numerators are rounded as p.v in 8 bits rounds
        them. None to round nothing.
    """
    lse = logits.logsumexp(-1)
    total = lse.nan_to_num(neginf=0.0)[..., None]
    weights = (logits - total).exp()
    if tiles is not None and len(tiles):
        exact = logits[..., : len(tiles)]
        top = exact.new_full((*exact.shape[:-1], int(tiles[-1]) + 1), -torch.inf)
        top = top.scatter_reduce(-1, tiles.expand_as(exact), exact, "amax").nan_to_num(neginf=0.0)
        theirs = top.index_select(-1, tiles)
        weights[..., : len(tiles)] = ((exact - theirs).exp() * 127 + 0.5).floor() / 127 * (theirs - total).exp()
    return weights, lse


def _rounded(x: Tensor, shared: Tensor, holds: Tensor, block: int, precision: str) -> tuple[Tensor, Tensor]:
    slots, largest = x.shape[-2], _LARGEST[precision]
    values = torch.empty(x.shape, dtype=DTYPES[precision], device=x.device)
    steps = torch.empty(*x.shape[:2], -(-slots // block), device=x.device)
    for some, less, into, step in by_heads(x[:, 0].numel(), x, shared, values, steps):
        kept = (some.float() - less).masked_fill_(~holds, 0.0)
        top = pad(kept.abs().amax(-1), (0, -slots % block)).unflatten(-1, (-1, block)).amax(-1)  # [B, H, M]
        step.copy_((top / largest).clamp(min=_LEAST_STEP))
        kept.div_(_by_slot(step, block, slots)).clamp_(-largest, largest)
        into.copy_(kept.round_() if precision == "int8" else kept)
    return values, steps


def _held(x: Tensor, lengths: Tensor, block: int, key_mask: Tensor | None) -> Tensor:
    """Which slots of x (B, H, P, D) hold a token that counts, bool (B|1, 1, P, 1)."""
    return held_slots(lengths, block, key_mask)[:, None, : x.shape[-2], None]


def _by_slot(step: Tensor, block: int, slots: int) -> Tensor:
    return step.repeat_interleave(block, -1)[..., :slots, None]
