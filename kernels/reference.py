"""The oracle: block attention in plain float32 torch, with the whole S x S in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.rest import Coarse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    coarse: Coarse | None,
    scale: float,
    key_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse); see `attention.block_attention`."""
    groups, q = q.shape[1] // k.shape[1], q.float() * scale
    reads = plan.dense_mask()[..., : q.shape[-2], : k.shape[-2]]  # [B|1, H|1, P_q, P_k]
    if key_mask is not None:
        reads = reads & key_mask[:, None, None]
    logits = _logits(q, k, groups).masked_fill(~reads, -torch.inf)
    if coarse is not None:
        reads = plan.coarse_reads(coarse.levels).repeat_interleave(plan.block_q, -2)[..., : q.shape[-2], :]
        by_mean = _logits(q, coarse.k, groups) + coarse.bias[:, :, None]
        logits = torch.cat([logits, by_mean.masked_fill(~reads, -torch.inf)], -1)
        v = torch.cat([v, coarse.v], -2)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return (weights @ v.float().repeat_interleave(groups, 1)).to(k.dtype), lse


def _logits(q: Tensor, k: Tensor, groups: int) -> Tensor:
    return q @ k.float().repeat_interleave(groups, 1).mT
