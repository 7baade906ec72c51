"""The oracle: block attention in plain float32 torch, all keys by some query blocks at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from accelplug.kernels.chunks import at_once
from accelplug.kernels.plan import BlockPlan, Box
from accelplug.kernels.precision import softmax
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
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse); see `attention.block_attention`. With `tile`, probabilities are rounded as those of so many keys are."""
    step = at_once(len(q) * q.shape[1] * plan.block_q * k.shape[-2])
    parts = []
    for first in range(0, len(plan.q_len), step):
        some = slice(first * plan.block_q, (first + step) * plan.block_q)
        parts.append(_attend(q[..., some, :], k, v, _of_rows(plan, first, step), coarse, scale, key_mask, tile))
    out, lse = (x[0] if len(x) == 1 else torch.cat(x, 2) for x in zip(*parts, strict=True))
    return out, lse


def _of_rows(plan: BlockPlan, first: int, number: int) -> BlockPlan:
    """The plan of some query blocks."""
    if number >= len(plan.q_len):
        return plan
    rows, slots = slice(first, first + number), slice(first * plan.block_q, (first + number) * plan.block_q)
    theirs = {name: x[:, :, rows] for name in plan.BY_HEAD if (x := getattr(plan, name)) is not None}
    box = plan.box and Box(plan.box.lo[slots], plan.box.hi[slots], plan.box.coord)
    causal = None if plan.causal is None else plan.causal + slots.start
    return replace(plan, **theirs, q_len=plan.q_len[rows], box=box, causal=causal)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    coarse: Coarse | None,
    scale: float,
    key_mask: Tensor | None,
    tile: int | None,
) -> tuple[Tensor, Tensor]:
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
    tiles = None if tile is None else torch.arange(k.shape[-2], device=k.device) // tile
    weights, lse = softmax(logits, tiles)
    return (weights @ v.float().repeat_interleave(groups, 1)).to(k.dtype), lse


def _logits(q: Tensor, k: Tensor, groups: int) -> Tensor:
    return q @ k.float().repeat_interleave(groups, 1).mT
