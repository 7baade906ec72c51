"""8-bit q.k: keys smoothed, then queries and keys rounded block by block (SageAttention, arXiv 2410.02367).

Keys are first freed of what all of them share, ``k' = k - mean(k)``: that shifts every logit of a row alike, so the softmax
does not see it, and what is left needs a smaller step. Each block of queries and of keys then has one step,
``max|x| / 127`` for int8 and ``max|x| / 448`` for fp8 (e4m3). Only q.k of the keys read exactly is in 8 bits.
Pooled keys and the product with the values keep full precision, but their queries are the rounded ones.

The Triton kernel multiplies 8-bit numbers. The other backends round and multiply in the dtype of q: the same result, no gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelplug.kernels.plan import held_slots

Precision = Literal["native", "int8", "fp8"]

DTYPES: dict[str, torch.dtype | None] = {"native": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_LEAST_STEP = 1e-15  # the product of two is still a normal number


@dataclass(frozen=True, eq=False)
class Quantised:
    """Queries and keys in 8 bits, with a step per block: ``x = step * values``.

    Attributes
    ----------
    q, k : int8 or float8_e4m3fn (B, H, P_q, D) and (B, H_kv, P_k, D).
    q_step, k_step : float32 (B, H, M) and (B, H_kv, N).
    block_q, block_k : slots per block.
    """

    q: Tensor
    k: Tensor
    q_step: Tensor
    k_step: Tensor
    block_q: int
    block_k: int

    def restored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what the 8-bit numbers stand for, (B, H, P_q, D) and (B, H_kv, P_k, D)."""
        parts = ((self.q, self.q_step, self.block_q), (self.k, self.k_step, self.block_k))
        q, k = ((x.float() * _by_slot(step, block, x.shape[-2])).to(dtype) for x, step, block in parts)
        return q, k


def smoothed(k: Tensor, k_len: Tensor, block_k: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return keys without their mean over those that may be read, in k's dtype, and that mean, float32 (B, H_kv, 1, D)."""
    holds = held_slots(k_len, block_k, key_mask)[:, None, : k.shape[-2], None]  # [B|1, 1, P_k, 1]
    kept = k.float().masked_fill(~holds, 0.0)
    mean = kept.sum(-2, keepdim=True) / holds.sum(-2, keepdim=True).clamp(min=1)
    return ((kept - mean) * holds).to(k.dtype), mean


def quantised(q: Tensor, k: Tensor, plan: Any, precision: str, key_mask: Tensor | None) -> Quantised:
    """Round queries and smoothed keys to ``int8`` or ``fp8``; slots that hold no token, or a key that may not be read, become 0."""
    q8, q_step = _rounded(q, held_slots(plan.q_len, plan.block_q), plan.block_q, precision)
    k8, k_step = _rounded(k, held_slots(plan.k_len, plan.block_k, key_mask), plan.block_k, precision)
    return Quantised(q8, k8, q_step, k_step, plan.block_q, plan.block_k)


def _rounded(x: Tensor, holds: Tensor, block: int, precision: str) -> tuple[Tensor, Tensor]:
    slots, largest = x.shape[-2], _LARGEST[precision]
    kept = x.float().masked_fill(~holds[:, None, :slots, None], 0.0)
    top = pad(kept.abs().amax(-1), (0, -slots % block)).unflatten(-1, (-1, block)).amax(-1)  # [B, H, M]
    step = (top / largest).clamp(min=_LEAST_STEP)
    values = (kept / _by_slot(step, block, slots)).clamp(-largest, largest)
    return (values.round() if precision == "int8" else values).to(DTYPES[precision]), step


def _by_slot(step: Tensor, block: int, slots: int) -> Tensor:
    return step.repeat_interleave(block, -1)[..., :slots, None]
