"""Block attention by gathering: the keys that a query block reads, through scaled_dot_product_attention. Needs no compiler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from accelplug import compat
from accelplug.bounded import Bounded
from accelplug.kernels.plan import BlockPlan, held_slots
from accelplug.kernels.rest import Coarse, extended


@dataclass(frozen=True, eq=False)
class _Group:
    """Query blocks that read the same keys.

    Attributes
    ----------
    rows : int64 (R,), their query slots, or a slice where they lie side by side.
    keys : int64 (C,), the key slots that they read; the coarse keys stand behind the plan's last slot.
    exact : how many of `keys` are read exactly. They stand in front.
    """

    rows: Tensor | slice
    keys: Tensor
    exact: int


# The plan is kept beside its groups, so that the address in the key stays its own.
_grouped: Bounded[tuple, tuple[BlockPlan, list[list[list[_Group]]]]] = Bounded(16)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    coarse: Coarse | None,
    scale: float,
    key_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return (out, lse); see `attention.block_attention`."""
    levels = () if coarse is None else coarse.levels
    key = (plan.bits.data_ptr(), compat.torch.times_written(plan.bits), levels)
    groups = _grouped.get(key, lambda: (plan, _groups(plan, levels)))[1]
    bias = _bias(coarse, key_mask, plan.key_slots, q.device)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = torch.full(q.shape[:-1], -torch.inf, device=q.device) if return_lse else None
    ratio = q.shape[1] // k.shape[1]
    k, v = extended(k, v, coarse, plan.key_slots)
    for b, of_batch in enumerate(groups):
        batch = slice(None) if len(groups) == 1 else slice(b, b + 1)
        for h, of_head in enumerate(of_batch):
            head, kv_head = slice(None), slice(None)
            if len(of_batch) > 1:
                head, kv_head = slice(h, h + 1), slice(h // ratio, h // ratio + 1)
            for group in of_head:
                rows = group.rows if isinstance(group.rows, slice) else group.rows[group.rows < q.shape[-2]]
                keys, values = (x[batch, kv_head].index_select(-2, group.keys) for x in (k, v))
                mask = None
                if bias is not None:
                    of_bias = (batch if len(bias) > 1 else slice(None), head if bias.shape[1] > 1 else slice(None))
                    mask = bias[of_bias].index_select(-1, group.keys)[:, :, None]  # [B|1, H|1, 1, C]
                if plan.box is not None:
                    slots = torch.arange(q.shape[-2], device=q.device)[rows]
                    inside = F.pad(
                        plan.box.allows(slots, group.keys[: group.exact]), (0, len(group.keys) - group.exact), value=True
                    )
                    mask = torch.where(inside, 0.0 if mask is None else mask, -torch.inf)  # [B|1, H|1, R, C]
                    mask = mask if mask.ndim == 4 else mask[None, None]
                part, part_lse = _dense(q[batch, head][:, :, rows], keys, values, mask, scale, return_lse)
                out[batch, head, rows] = part
                if lse is not None and part_lse is not None:
                    lse[batch, head, rows] = part_lse
    return out, lse


def _bias(coarse: Coarse | None, key_mask: Tensor | None, slots: int, device: torch.device) -> Tensor | None:
    """What is added to the logits of each key, float32 (B|1, H|1, slots, or slots + E); None for nothing."""
    exact = torch.zeros(1, 1, slots, device=device)
    if key_mask is not None:
        exact = exact.masked_fill(~F.pad(key_mask, (0, slots - key_mask.shape[-1]))[:, None], -torch.inf)
    if coarse is None:
        return None if key_mask is None else exact
    shape = torch.broadcast_shapes(exact.shape[:2], coarse.bias.shape[:2])
    return torch.cat([exact.expand(*shape, -1), coarse.bias.expand(*shape, -1)], -1)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if mask is not None:
        out = out.nan_to_num(nan=0.0)  # rows that a mask leaves without a key
    if not return_lse:
        return out, None
    logits = (q.float() * scale) @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    return out, (logits if mask is None else logits + mask).logsumexp(-1)


def _groups(plan: BlockPlan, levels: tuple[int, ...]) -> list[list[list[_Group]]]:
    """Groups by batch entry, then head, of the plan."""
    reads = plan.members.repeat_interleave(plan.block_k, -1) & held_slots(plan.k_len, plan.block_k)  # [B|1, H|1, M, slots]
    exact = reads.shape[-1]
    if levels:
        reads = torch.cat([reads, plan.coarse_reads(levels)], -1)
    words = torch.cat([plan.bits, plan.taken] if plan.level is None else [plan.bits, plan.taken, plan.level], -1)
    return [
        [_groups_of(plan, *rows, exact) for rows in zip(*of_batch, strict=True)]
        for of_batch in zip(words, reads, strict=True)
    ]


def _groups_of(plan: BlockPlan, words: Tensor, reads: Tensor, exact: int) -> list[_Group]:
    """Groups of one head: `words` (M, W) tell its patterns apart, `reads` bool (M, slots and means) are the keys read."""
    patterns, owner = torch.unique(words, dim=0, return_inverse=True)
    groups = []
    for pattern in range(len(patterns)):
        blocks = (owner == pattern).nonzero()[:, 0]
        blocks = blocks[plan.q_len[blocks] > 0]
        if not len(blocks):
            continue
        keys = reads[blocks[0]].nonzero()[:, 0]
        if not len(keys):  # a skipped head
            continue
        first, last = int(blocks[0]), int(blocks[-1])
        rows: Tensor | slice = slice(first * plan.block_q, (last + 1) * plan.block_q)
        if last - first + 1 != len(blocks):
            rows = (blocks[:, None] * plan.block_q + torch.arange(plan.block_q, device=words.device)).flatten()
        groups.append(_Group(rows, keys, int((keys < exact).sum())))
    return groups
