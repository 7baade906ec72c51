"""The first-order term of pooled blocks: what the slope of exp adds to reading a block at its mean key.

PISA (arXiv 2602.01077). Let C be a pooled block of |C| keys, and ``w_iC = e^(s q_i.k_C) / Z_i`` its weight for one key. Around the mean key
k_C, ``e^(s q.k_j) = e^(s q.k_C) (1 + s q.(k_j - k_C) + ...)``. In the sum of weights the first-order terms cancel, so that the log-sum-exp
stays that of pooling; in the sum of weighted values they leave

    ``w_iC s q_i H_C``,   ``H_C = sum_(j in C) (k_j - k_C) v_j^T = sum_(j in C) (k_j - k_C) (v_j - v_C)^T``.

A matrix for each block would cost ``D_v / |C|`` of dense attention and more. The paper gives all blocks of a head the same mean per key,

    ``out_i += g_i s q_i H / T``,   ``H = sum_C H_C``,   ``T = sum_C |C|``,   ``g_i = sum over the pooled C of |C| w_iC``,

one product of each row with one matrix. Ours: H and T are of the blocks that some row pools, which leaves out text, as all rows read it;
only keys that may be read count; g is found from log-sum-exps, so that every kernel that gives them serves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelplug.kernels.chunks import at_once
from accelplug.kernels.plan import BlockPlan, held_slots, pool


def first_order(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    logs: Tensor,
    scale: float,
    key_mask: Tensor | None,
) -> Tensor:
    """Add the first-order term to attention with pooled blocks.

    Parameters
    ----------
    out, lse : (B, H, P_q, D_v) and float32 (B, H, P_q), attention with pooled blocks and its log-sum-exp.
    q, k, v : Tensor (B, H, P_q, D), (B, H_kv, P_k, D) and (B, H_kv, P_k, D_v), tokens in block order.
    plan : which blocks are pooled.
    logs : float32 (B|1, H|1, N), what was added to the logits of the pooled blocks; -inf for one without a key.
    scale : factor on q.k.
    key_mask : bool (B, P_k), keys that may be read; None for all.

    Returns
    -------
    out : Tensor (B, H, P_q, D_v) in its dtype; the same numbers as before in rows that pool nothing.
    """
    k_pool, _ = pool(k, plan.k_len, plan.block_k, key_mask)
    mass = pooled_mass(lse, q, k_pool, logs, plan.at(0), plan.block_q, scale)
    matrix = slope(k, v, plan, key_mask)
    step = q.float() @ matrix.repeat_interleave(q.shape[1] // matrix.shape[1], 1)
    return (out.float() + (scale * mass)[..., None] * step).to(out.dtype)


def slope(k: Tensor, v: Tensor, plan: BlockPlan, key_mask: Tensor | None) -> Tensor:
    """Return ``H / T``, the mean of ``(k_j - k_C) (v_j - v_C)^T`` over keys that some row pools.

    float32 (B, H, D, D_v); (B, H_kv, D, D_v) where the plan does not differ by head.
    """
    pooled = (plan.at(0) & (plan.q_len > 0)[:, None]).any(-2).repeat_interleave(plan.block_k, -1)  # [B|1, H|1, N * block_k]
    counts = (pooled & held_slots(plan.k_len, plan.block_k, key_mask)[:, None])[..., : k.shape[-2], None]
    group = counts.shape[1] // k.shape[1] if counts.shape[1] > 1 else 1
    apart = []
    for x in (k, v):
        mean, _ = pool(x, plan.k_len, plan.block_k, key_mask)
        centred = x.float() - mean.repeat_interleave(plan.block_k, -2)[..., : x.shape[-2], :]
        apart.append(centred.repeat_interleave(group, 1).masked_fill(~counts, 0.0))
    return apart[0].mT @ apart[1] / counts.sum(-2, keepdim=True).clamp(min=1)


@torch.library.custom_op("accelplug::pooled_mass", mutates_args=())
def pooled_mass(lse: Tensor, q: Tensor, k_pool: Tensor, logs: Tensor, pooled: Tensor, block_q: int, scale: float) -> Tensor:
    """Return the share of each row's attention that its pooled blocks hold, ``1 / block_k`` of the products of dense attention.

    Parameters
    ----------
    lse : float32 (B, H, P_q), log-sum-exp of all that a row reads, pooled blocks too; -inf for a row without a key.
    q : Tensor (B, H, P_q, D).
    k_pool : float32 (B, H_kv, N, D), mean key of each block.
    logs : float32 (B|1, H|1, N), what is added to their logits.
    pooled : bool (B|1, H|1, M, N), which blocks each query block of `block_q` slots pools.
    scale : factor on q.k.

    Returns
    -------
    mass : float32 (B, H, P_q), 0 to 1.
    """
    rows, keys = q.shape[-2], k_pool.repeat_interleave(q.shape[1] // k_pool.shape[1], 1).mT
    step = at_once(q.shape[0] * q.shape[1] * keys.shape[-1] * block_q)  # query blocks
    parts = []
    for first in range(0, pooled.shape[-2], step):
        some = slice(first * block_q, min((first + step) * block_q, rows))
        may = pooled[..., first : first + step, :].repeat_interleave(block_q, -2)[..., : some.stop - some.start, :]
        logits = (scale * q[..., some, :].float() @ keys + logs[:, :, None]).masked_fill(~may, -torch.inf)
        parts.append(logits.logsumexp(-1))
    return (torch.cat(parts, -1) - lse.nan_to_num(neginf=0.0)).exp().clamp(max=1.0)


@pooled_mass.register_fake
def _pooled_mass_fake(
    lse: Tensor, q: Tensor, k_pool: Tensor, logs: Tensor, pooled: Tensor, block_q: int, scale: float
) -> Tensor:
    return torch.empty_like(lse)
