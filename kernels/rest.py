"""What becomes of the key blocks that a plan does not select, and the coarse keys by which blocks are read.

Notation: C a key block of |C| tokens with mean key k_C and mean value v_C; B a query block with mean query q_B; s the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from accelplug.kernels.chunks import by_heads
from accelplug.kernels.plan import BlockPlan, counted, held_slots, pool

Representative = Literal["mean", "centre", "centre_k_mean_v"]
Slope = Literal["mass", "keys"]


@dataclass(frozen=True)
class Drop:
    """They are not read."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Each is read as one key, ``weight * log|C|`` added to the logit.

    At weight 1 a pooled block stands for as many equal keys as it is long, so it is exact where the keys of a block are
    equal (Sol-Attn, arXiv 2607.24027; PISA, arXiv 2602.01077). At weight 0 it counts as a single key.

    Attributes
    ----------
    weight : None for 1, or Tensor (H,) float32, one per query head.
    representative : ``mean``, the means of the block's keys and of its values; ``centre``, the key and value of its middle
        token (of those that may be read); ``centre_k_mean_v``, that token's key with the mean value (FlashVGGT, arXiv
        2512.01540, finds the centre's key the better one after RoPE).
    """

    weight: Tensor | None = None
    representative: Representative = "mean"


@dataclass(frozen=True, eq=False)
class Rectified:
    """Each adds its mean value at a weight fixed beforehand: ``out_i = share_B * exact_i + sum_C weights_BC * v_C``, i in B.

    Attributes
    ----------
    share : float32 (B|1, H|1, M), what of each row of a query block the exact part holds.
    weights : float32 (B|1, H|1, M, N), probability of each key block as a whole; 0 for the blocks that are read.
    """

    share: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Tied:
    """All rows of a query block read the rest alike, by its mean query (two-level form of arXiv 2509.15448).

    With ``l_i`` the log-sum-exp of row i over the part that is read, and ``a_B`` its mean over the rows of B,

        ``[mu_B, w_BC] = softmax([a_B, log|C| + s q_B.k_C])``,   ``out_i = mu_B * exact_i + sum_C w_BC * v_C``.
    """


@dataclass(frozen=True, eq=False)
class Linear:
    """Each is read as one key, as with `Pool` at its mean, and a first-order term is added (PISA, arXiv 2602.01077; see `linear`).

    Attributes
    ----------
    weight : float32 (H,), as in `Pool`.
    slope : which mean over blocks the term of a head is made of: ``mass``, by what rows give to the blocks they pool, or
        ``keys``, every pooled key alike, as in the paper.
    """

    weight: Tensor | None = None
    slope: Slope = "mass"


Rest = Drop | Pool | Linear | Rectified | Tied


@dataclass(frozen=True, eq=False)
class Coarse:
    """Keys that stand for several: the means of the plan's levels, one level behind the other, then those of the rest.

    Attributes
    ----------
    levels : which levels, of 2, 4, 8 and, for the rest, 0. Level h has N * block_k / h keys, the rest N.
    k, v : (B, H_kv, E, D) and (B, H_kv, E, D_v), in the dtype of the keys.
    bias : float32 (B|1, H|1, E), what is added to their logits; -inf where a key stands for none that may be read.
    """

    levels: tuple[int, ...]
    k: Tensor
    v: Tensor
    bias: Tensor


def coarse(
    k: Tensor,
    v: Tensor,
    plan: Any,
    rest: Drop | Pool,
    key_mask: Tensor | None,
    *,
    mean: Callable[..., Tensor] | None = None,
    exact: bool = False,
) -> Coarse | None:
    """Return the coarse keys that `plan` (a `BlockPlan`, or a `Threshold`, which has no levels) and `rest` ask for, or None.

    `mean` (x, lengths, run, key_mask) -> (B, H_kv, E, D) does the averaging; `plan.pool` by default. With `exact`, level 1 is
    among the levels: the keys themselves.
    """
    mean = mean or (lambda *arguments: pool(*arguments)[0])
    levels = plan.levels if isinstance(plan, BlockPlan) else ()
    levels = (1, *levels) if exact else levels
    if not levels and isinstance(rest, Drop):
        return None
    keys, values, biases = [], [], []
    for h in levels:
        runs = plan.runs(h)
        keys.append(mean(k, runs, h, key_mask).to(k.dtype))
        values.append(mean(v, runs, h, key_mask).to(v.dtype))
        biases.append(counted(runs, h, key_mask).log())  # [B|1, 1, E]
    if isinstance(rest, Pool):
        for x, out, by_centre in ((k, keys, rest.representative != "mean"), (v, values, rest.representative == "centre")):
            block = (plan.k_len, plan.block_k, key_mask)
            out.append(_at_slots(x, _centre(*block)) if by_centre else mean(x, *block).to(x.dtype))
        biases.append(log_number(plan, rest.weight, key_mask))
    heads = max(x.shape[1] for x in biases)
    bias = torch.cat([x.expand(-1, heads, -1) for x in biases], -1)
    levels = (*levels, 0) if isinstance(rest, Pool) else levels
    return Coarse(levels, torch.cat(keys, -2), torch.cat(values, -2), bias)


def log_number(plan: Any, weight: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """``weight * log|C|``, float32 (B|1, H|1, N)."""
    number = counted(plan.k_len, plan.block_k, key_mask)
    logs = number.clamp(min=1).log()  # log 0 would turn into NaN times a weight of 0
    return (logs if weight is None else logs * weight[:, None]).masked_fill(number == 0, -torch.inf)


def _centre(lengths: Tensor, block: int, key_mask: Tensor | None) -> Tensor:
    """Slot of the middle one of each block's tokens that may be read, int64 (B|1, N)."""
    may = held_slots(lengths, block, key_mask).unflatten(-1, (len(lengths), block))
    place = may.cumsum(-1)  # a token's place among them, from 1
    middle = (place > may.sum(-1, keepdim=True) // 2).int().argmax(-1)
    return middle + torch.arange(len(lengths), device=lengths.device) * block


def _at_slots(x: Tensor, slots: Tensor) -> Tensor:
    """x (B, H, P, D) at slots (B|1, N): (B, H, N, D). Slots behind P are of empty blocks."""
    slots = slots.clamp(max=x.shape[-2] - 1)
    return x.take_along_dim(slots[:, None, :, None], -2)


def rectified(rest: Rectified, out: Tensor, v: Tensor, plan: Any, key_mask: Tensor | None) -> Tensor:
    """Return ``share * out + weights @ v_C`` from the exact output (B, H, P_q, D_v)."""
    v_pool = pool(v, plan.k_len, plan.block_k, key_mask)[0].repeat_interleave(out.shape[1] // v.shape[1], 1)
    return _blend(out, rest.share, rest.weights @ v_pool, plan.block_q)


def tied(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, key_mask: Tensor | None
) -> Tensor:
    """Return `Tied` attention from the exact output (B, H, P_q, D_v) and its log-sum-exp (B, H, P_q)."""
    k_pool, v_pool = (
        pool(x, plan.k_len, plan.block_k, key_mask)[0].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)
    )
    q_pool, _ = pool(q, plan.q_len, plan.block_q)
    number = counted(plan.k_len, plan.block_k, key_mask)
    far = scale * q_pool @ k_pool.mT + number.log()[:, :, None]  # [B, H, M, N]
    far = far.masked_fill(~plan.at(0), -torch.inf)
    near, _ = pool(lse[..., None], plan.q_len, plan.block_q)  # [B, H, M, 1]
    weights = torch.cat([near, far], -1).softmax(-1).nan_to_num(0.0)  # a skipped row reads nothing
    return _blend(out, weights[..., 0], weights[..., 1:] @ v_pool, plan.block_q)


def _blend(out: Tensor, share: Tensor, more: Tensor, block_q: int) -> Tensor:
    """``share * out + more`` in the place of `out`, both given per query block: share (B|1, H|1, M), more (B, H, M, D_v)."""
    for some, *given in by_heads(len(out) * out[0, 0].numel(), out, share[..., None], more):
        their_share, added = (x.repeat_interleave(block_q, 2)[:, :, : out.shape[2]] for x in given)
        some.copy_(their_share * some.float() + added)
    return out


def extended(k: Tensor, v: Tensor, coarse: Coarse | None, slots: int) -> tuple[Tensor, Tensor]:
    """Return keys and values with the coarse ones from slot `slots` on."""
    if coarse is None:
        return k, v
    gap = slots - k.shape[-2]
    k, v = (
        torch.cat([x, x.new_zeros(*x.shape[:2], gap, x.shape[-1]), more], -2) for x, more in ((k, coarse.k), (v, coarse.v))
    )
    return k, v
