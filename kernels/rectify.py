"""The rectified rest: what share of its attention a query block keeps for the keys it reads, and what pooled blocks get.

Rectified SpaAttn (arXiv 2511.19835): sparse attention is normalised over the keys that it reads, so it gives them all
weight; one pass over pooled queries and keys says how much they should have, and where the remainder belongs:

    ``out = share_m * out_exact + sum_j weights_mj * mean(v_j)``        for every row of query block m

*Reallocation* (IPAR). Visual keys are pooled, text keys are not. In a softmax over both, a pooled key counts once, yet it
stands for n_j tokens, so probabilities are multiplied by the tokens they stand for and brought back to a sum of 1:

    ``p'_mj = n_j p_mj / Z_m``,  ``p'_mt = p_mt / Z_m``,  ``Z_m = sum_j n_j p_mj + sum_t p_mt``

which is one softmax with ``log n_j`` added. The paper has n_j = B, the block; here it is the block's true number of keys
that may be read, so that short tails and masked keys count for what they are. Then ``share_m`` is the sum of p' over what
is read, text included.

*Gain* (GAPR). A pooled block is worth its place only where the product of the means is larger than what the spread inside
the two blocks may do to it, with ``d`` the mean absolute deviation from the mean, channel by channel:

    ``|q_m . k_j|  >  |dq_m . k_j| + |q_m . dk_j|``

(both sides carry the same number of token pairs, which cancels). Where it is not, ``p'_mj`` goes to the keys that are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelplug.kernels.chunks import by_heads
from accelplug.kernels.plan import BlockPlan, pool


def reallocate(q_pool: Tensor, k_pool: Tensor, number: Tensor, k_text: Tensor, text_valid: Tensor, scale: float) -> Tensor:
    """Return p' of the pooled keys, float32 (B, H, M, N); 1 minus its sum over a row is the text's.

    Parameters
    ----------
    q_pool, k_pool : float32 (B, H, M, D) and (B, H, N, D), mean query and key of each block.
    number : (B|1, H|1, N), keys that each pooled key stands for; 0 leaves it out.
    k_text : float32 (B, H, T, D), keys that are not pooled; T may be 0.
    text_valid : bool (B|1, H|1, T), those that may be read.
    scale : factor on q.k.
    """
    query = q_pool * scale
    pooled = query @ k_pool.transpose(-1, -2) + number.log()[..., None, :]
    text = (query @ k_text.transpose(-1, -2)).masked_fill(~text_valid[..., None, :], -torch.inf)
    blocks = k_pool.shape[-2]
    return torch.cat([pooled, text], -1).softmax(-1)[..., :blocks].nan_to_num(nan=0.0)  # NaN: nothing may be read


def text_keys(k: Tensor, k_len: Tensor, block_k: int, visual_slots: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the keys that are not pooled, float32 (B, H_kv, T, D), and those of them that may be read, bool (B|1, H|1, T).

    Parameters
    ----------
    k : Tensor (B, H_kv, P, D), tokens in block order; slots from `visual_slots` on are text.
    k_len : int32 (N,), keys at the front of each block of `block_k` slots.
    key_mask : bool (B, P) or (B, H, P), keys that may be read; None for all.
    """
    slot = torch.arange(k.shape[-2], device=k.device)[visual_slots:]
    valid = (slot % block_k < k_len[slot // block_k])[None, None]
    if key_mask is not None:
        valid = valid & (key_mask[:, None] if key_mask.ndim == 2 else key_mask)[..., visual_slots:]
    return k[..., visual_slots:, :].float(), valid


def worth_a_key(q_pool: Tensor, k_pool: Tensor, q_deviation: Tensor, k_deviation: Tensor) -> Tensor:
    """Return which pairs of blocks are worth a pooled key, bool (B, H, M, N): means (B, H, M|N, D) and their deviations."""
    keys, key_deviation = k_pool.transpose(-1, -2), k_deviation.transpose(-1, -2)
    return (q_pool @ keys).abs() > (q_deviation @ keys).abs() + (q_pool @ key_deviation).abs()


def deviation(x: Tensor, mean: Tensor, lengths: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """Mean absolute deviation of each channel from the block's mean, float32 (B, H, N, D); arguments as in `plan.pool`."""
    valid = valid[:, None] if valid is not None and valid.ndim == 2 else valid
    parts = []
    for some, their_mean, *their_valid in by_heads(len(x) * x[0, 0].numel(), x, mean, *([] if valid is None else [valid])):
        apart = some.float() - their_mean.repeat_interleave(block, -2)[..., : x.shape[-2], :]
        parts.append(pool(apart.abs(), lengths, block, *their_valid)[0])
    return torch.cat(parts, 1)


def rectify(
    q: Tensor,
    k: Tensor,
    plan: BlockPlan,
    visual_slots: int,
    scale: float,
    key_mask: Tensor | None = None,
    *,
    gain: bool = True,
) -> tuple[Tensor, Tensor]:
    """Weigh what a plan reads against what it leaves out.

    Parameters
    ----------
    q : Tensor (B, H, P_q, D), tokens in block order.
    k : Tensor (B, H_kv, P_k, D); H_kv divides H.
    plan : what is read, exactly or by means of a few keys.
    visual_slots : key slots before those of text, a multiple of ``plan.block_k``.
    scale : factor on q.k.
    key_mask : bool (B, P_k) or (B, H, P_k), keys that may be read.
    gain : whether blocks that are not worth a pooled key (`worth_a_key`) are left to those that are read.

    Returns
    -------
    share : float32 (B, H, M), the factor on what the exact keys give.
    weights : float32 (B, H, M, N), the factor on each block's mean value; 0 where it is read. A row of both sums to 1.
    """
    ratio, blocks = q.shape[1] // k.shape[1], visual_slots // plan.block_k
    q_pool, _ = pool(q, plan.q_len, plan.block_q)
    k_mean, number = pool(k, plan.k_len, plan.block_k, key_mask)
    k_pool = k_mean[..., :blocks, :].repeat_interleave(ratio, 1)
    k_text, text_valid = text_keys(k, plan.k_len, plan.block_k, visual_slots, key_mask)
    probability = reallocate(q_pool, k_pool, number[..., :blocks], k_text.repeat_interleave(ratio, 1), text_valid, scale)

    rest = plan.at(0)[..., :blocks]
    if gain:
        q_deviation = deviation(q, q_pool, plan.q_len, plan.block_q)
        k_deviation = deviation(k, k_mean, plan.k_len, plan.block_k, key_mask)[..., :blocks, :].repeat_interleave(ratio, 1)
        rest = rest & worth_a_key(q_pool, k_pool, q_deviation, k_deviation)
    weights = torch.where(rest, probability, 0.0)
    share = (1 - weights.sum(-1)).clamp(min=0)
    return share, torch.nn.functional.pad(weights, (0, len(plan.k_len) - blocks))
