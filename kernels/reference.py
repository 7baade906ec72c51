"""The oracle: block attention in plain float32 torch, with the whole S x S in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from accelplug.kernels.plan import BlockPlan, pool
from accelplug.kernels.rest import Pool, Rest


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, rest: Rest, scale: float, key_mask: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Return (out, lse); see `attention.block_attention`."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    reads = plan.dense_mask()[..., : q.shape[-2], : k.shape[-2]]  # [B|1, H|1, P_q, P_k]
    if key_mask is not None:
        reads = reads & key_mask[:, None, None]
    logits = ((q.float() * scale) @ k.float().transpose(-1, -2)).masked_fill(~reads, -torch.inf)
    values = v.float()
    if isinstance(rest, Pool):
        (k_pool, number), (v_pool, _) = (pool(x, plan.k_len, plan.block_k, key_mask) for x in (k, v))
        unread = (~plan.members & (number > 0)[..., None, :]).repeat_interleave(plan.block_q, -2)[..., : q.shape[-2], :]
        bias = number[:, :, None].log()  # [B|1, 1, 1, N]
        if rest.weight is not None:
            bias = bias.nan_to_num(neginf=0.0) * rest.weight[:, None, None]
        pooled = (q.float() * scale) @ k_pool.transpose(-1, -2) + bias
        logits = torch.cat([logits, pooled.masked_fill(~unread, -torch.inf)], -1)
        values = torch.cat([values, v_pool], -2)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return (weights @ values).to(q.dtype), lse
