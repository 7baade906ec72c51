"""The first-order term of pooled blocks: what the slope of exp adds to reading a block at its mean key.

PISA (arXiv 2602.01077). Let C be a pooled block of |C| keys, and ``w_iC = e^(s q_i.k_C) / Z_i`` its weight for one key. Around the mean key
k_C, ``e^(s q.k_j) = e^(s q.k_C) (1 + s q.(k_j - k_C) + ...)``. In the sum of weights the first-order terms cancel, so that the log-sum-exp
stays that of pooling; in the sum of weighted values they leave

    ``w_iC s q_i H_C``,   ``H_C = sum_(j in C) (k_j - k_C) v_j^T = sum_(j in C) (k_j - k_C) (v_j - v_C)^T``.

A matrix for each block would cost ``D_v / |C|`` of dense attention and more. The paper gives all blocks of a head the same mean per key,

    ``out_i += g_i s q_i H / T``,   ``H = sum_C H_C``,   ``T = sum_C |C|``,   ``g_i = sum over the pooled C of |C| w_iC``,

one product of each row with one matrix: ``slope: keys``. A few blocks of widely spread keys that hardly anybody reads, or that are read
exactly, then rule H. Ours is the mean by what the rows give to the blocks they pool, ``slope: mass``,

    ``out_i += g_i s q_i M``,   ``M = sum_C m_C (H_C / |C|) / sum_C m_C``,   ``m_C = sum over rows i that pool C of |C| w_iC``,

the matrix with which the terms of all rows sum to what each block's own would give, if queries did not matter. Also ours: H and T are of
the blocks that some row pools, which leaves out text, as all rows read it; only keys that may be read count; g and m are found from
log-sum-exps, so that every kernel that gives them serves.

On six calls of the bundled model at 1,728 tokens, sol at tau 1: error .138 pooled, .102 with the term (keys alike .103), by layer between
.226 -> .095 and .163 -> .170. With `repair` on the query, which finds what is linear in it, .073 each: nothing is left of the term
(``python -m benchmarks.rest_layers --grid small --steps 7 --block 32``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelplug.kernels.chunks import at_once, by_heads
from accelplug.kernels.plan import BlockPlan, counted, held_slots, pool
from accelplug.kernels.rest import Linear, log_number


def first_order(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    rest: Linear,
    scale: float,
    key_mask: Tensor | None,
) -> Tensor:
    """Add the first-order term to attention with pooled blocks, in place.

    Parameters
    ----------
    out, lse : (B, H, P_q, D_v) and float32 (B, H, P_q), attention with pooled blocks and its log-sum-exp.
    q, k, v : Tensor (B, H, P_q, D), (B, H_kv, P_k, D) and (B, H_kv, P_k, D_v), tokens in block order.
    plan : which blocks are pooled.
    rest : what was added to their logits, and which mean is taken.
    scale : factor on q.k.
    key_mask : bool (B, P_k), keys that may be read; None for all.

    Returns
    -------
    out : `out`; the same numbers as before in rows that pool nothing.
    """
    k_pool, _ = pool(k, plan.k_len, plan.block_k, key_mask)
    logs = log_number(plan, rest.weight, key_mask)
    given, taken = pooled_mass(lse, q, k_pool, logs, plan.at(0), plan.q_len, plan.block_q, scale)
    if rest.slope == "keys":
        ever = (plan.at(0) & (plan.q_len > 0)[:, None]).any(-2)  # [B|1, H|1, N]
        taken = (ever * counted(plan.k_len, plan.block_k, key_mask)).expand(*q.shape[:2], -1)
    by_query = (scale * slope(k, v, taken, plan.k_len, plan.block_k, key_mask)).to(q.dtype)  # [B, H, D, D_v]
    for some, query, theirs, share in by_heads(len(q) * out[0, 0].numel(), out, q, by_query, given[..., None]):
        some.addcmul_(share.to(out.dtype), query @ theirs)
    return out


@torch.library.custom_op("accelplug::slope", mutates_args=())
def slope(k: Tensor, v: Tensor, weight: Tensor, k_len: Tensor, block_k: int, key_mask: Tensor | None) -> Tensor:
    """Return the mean over blocks of ``H_C / |C|``, one key head after the other, so that little is held in float32.

    Parameters
    ----------
    k, v : Tensor (B, H_kv, P_k, D) and (B, H_kv, P_k, D_v), tokens in block order.
    weight : float32 (B, H, N), at least 0, of each block in the mean; they need not sum to 1.
    k_len : int32 (N,), keys at the front of each block of `block_k` slots.
    key_mask : bool (B, P_k), keys that may be read; None for all.

    Returns
    -------
    slope : float32 (B, H, D, D_v), 0 where all weights are.
    """
    number, held = counted(k_len, block_k, key_mask), held_slots(k_len, block_k, key_mask)[:, None, : k.shape[-2], None]
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30) / number.clamp(min=1)
    of_head = []
    for head, of_group in enumerate(weight.chunk(k.shape[1], 1)):
        apart = []
        for x in (k[:, head : head + 1], v[:, head : head + 1]):
            mean = pool(x, k_len, block_k, key_mask)[0].repeat_interleave(block_k, -2)[..., : x.shape[-2], :]
            apart.append((x.float() - mean).masked_fill(~held, 0.0))  # [B, 1, P_k, D]
        of_key = of_group.repeat_interleave(block_k, -1)[..., : k.shape[-2], None]  # [B, H / H_kv, P_k, 1]
        of_head.append(apart[0].mT @ (of_key * apart[1]))
    return torch.cat(of_head, 1)


@slope.register_fake
def _slope_fake(k: Tensor, v: Tensor, weight: Tensor, *others: object) -> Tensor:
    return weight.new_empty(*weight.shape[:2], k.shape[-1], v.shape[-1])


@torch.library.custom_op("accelplug::pooled_mass", mutates_args=())
def pooled_mass(
    lse: Tensor,
    q: Tensor,
    k_pool: Tensor,
    logs: Tensor,
    pooled: Tensor,
    q_len: Tensor,
    block_q: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return what each row gives to the blocks it pools, and each block gets from the rows that pool it.

    It costs ``1 / block_k`` of the products of dense attention.

    Parameters
    ----------
    lse : float32 (B, H, P_q), log-sum-exp of all that a row reads, pooled blocks too; -inf for a row without a key.
    q : Tensor (B, H, P_q, D).
    k_pool : float32 (B, H_kv, N, D), mean key of each block.
    logs : float32 (B|1, H|1, N), what is added to their logits.
    pooled : bool (B|1, H|1, M, N), which blocks each query block pools.
    q_len : int32 (M,), rows at the front of each query block of `block_q` slots.
    scale : factor on q.k.

    Returns
    -------
    given : float32 (B, H, P_q), shares of a row's attention, 0 to 1.
    taken : float32 (B, H, N), sums of such shares over rows.
    """
    rows, keys = q.shape[-2], k_pool.repeat_interleave(q.shape[1] // k_pool.shape[1], 1).mT
    lse, held = lse.nan_to_num(neginf=0.0), held_slots(q_len, block_q)[0, :rows]
    step = at_once(q.shape[0] * q.shape[1] * keys.shape[-1] * block_q)  # query blocks
    given, taken = torch.empty_like(lse), torch.zeros_like(keys[..., 0, :])
    for first in range(0, len(q_len), step):
        some = slice(first * block_q, min((first + step) * block_q, rows))
        may = pooled[..., first : first + step, :].repeat_interleave(block_q, -2)[..., : some.stop - some.start, :]
        logits = scale * q[..., some, :].float() @ keys + logs[:, :, None] - lse[..., some, None]
        share = logits.masked_fill(~may, -torch.inf).exp()
        given[..., some] = share.sum(-1).clamp(max=1.0)
        taken += share.masked_fill(~held[some, None], 0.0).sum(-2)
    return given, taken


@pooled_mass.register_fake
def _pooled_mass_fake(lse: Tensor, q: Tensor, k_pool: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(lse), lse.new_empty(*q.shape[:2], k_pool.shape[-2])
