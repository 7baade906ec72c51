"""Block attention by gathering: the keys that a query block reads, through scaled_dot_product_attention. Needs no compiler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.kernels.plan import BlockPlan, pool, unpack_bits
from accelplug.kernels.rest import Pool, Rest


@dataclass(frozen=True, eq=False)
class _Group:
    """Query blocks that read the same key blocks.

    Attributes
    ----------
    rows : int64 (R,), their query slots, or a slice where they lie side by side.
    keys : int64 (C,), the key slots that they read and that hold a token.
    rest : int64 (U,), the key blocks that they do not read and that hold a token.
    """

    rows: Tensor | slice
    keys: Tensor
    rest: Tensor


# The plan is kept beside its groups, so that the address in the key stays its own.
_grouped: Bounded[tuple[int, int], tuple[BlockPlan, list[list[list[_Group]]]]] = Bounded(16)


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, rest: Rest, scale: float, key_mask: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (out, lse); see `attention.block_attention`."""
    key = (plan.bits.data_ptr(), plan.bits._version)
    groups = _grouped.get(key, lambda: (plan, _groups(plan)))[1]
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = torch.full(q.shape[:-1], -torch.inf, device=q.device) if return_lse else None
    ratio = q.shape[1] // k.shape[1]
    pools = None
    if isinstance(rest, Pool):
        (k_pool, number), (v_pool, _) = (pool(x, plan.k_len, plan.block_k, key_mask) for x in (k, v))
        weight = torch.ones(q.shape[1], device=q.device) if rest.weight is None else rest.weight
        # A block without a key that may be read: log 0 would turn into NaN times a weight of 0.
        logs = number.clamp(min=1).log() * weight[:, None] + torch.where(number > 0, 0.0, -torch.inf)  # [B|1, H, N]
        pools = k_pool.to(k.dtype), v_pool.to(v.dtype), logs
    for b, of_batch in enumerate(groups):
        batch = slice(None) if len(groups) == 1 else slice(b, b + 1)
        for h, of_head in enumerate(of_batch):
            head, kv_head = slice(None), slice(None)
            if len(of_batch) > 1:
                head, kv_head = slice(h, h + 1), slice(h // ratio, h // ratio + 1)
            for group in of_head:
                rows = group.rows if isinstance(group.rows, slice) else group.rows[group.rows < q.shape[-2]]
                keys, values = (x[batch, kv_head].index_select(-2, group.keys) for x in (k, v))
                reads = None if plan.box is None else plan.box.allows(_slots(rows, q), group.keys)  # [R, C]
                if key_mask is not None:
                    allowed = key_mask[batch].index_select(-1, group.keys)[:, None, None]  # [B, 1, 1, C]
                    reads = allowed if reads is None else allowed & reads
                bias: Tensor | None = None
                if pools is not None and len(group.rest):
                    k_pool, v_pool, logs = pools
                    bias = _bias(
                        reads, len(group.keys), logs[batch if len(logs) > 1 else slice(None), head][..., group.rest]
                    )
                    keys = torch.cat([keys, k_pool[batch, kv_head].index_select(-2, group.rest)], -2)
                    values = torch.cat([values, v_pool[batch, kv_head].index_select(-2, group.rest)], -2)
                mask = reads if bias is None else bias.to(q.dtype)
                part, part_lse = _dense(q[batch, head][:, :, rows], keys, values, mask, scale, return_lse)
                out[batch, head, rows] = part
                if lse is not None and part_lse is not None:
                    lse[batch, head, rows] = part_lse
    return out, lse


def _bias(reads: Tensor | None, exact: int, logs: Tensor) -> Tensor:
    """Additive mask over exact, then pooled keys: float32 (B|1, H, R|1, exact + U)."""
    logs = logs[:, :, None]  # [B|1, H, 1, U]
    if reads is None:
        return F.pad(logs, (exact, 0))
    seen = torch.where(reads, 0.0, -torch.inf)  # [R, C] or [B, 1, R|1, C]
    seen = seen if seen.ndim == 4 else seen[None, None]
    batch = max(len(seen), len(logs))
    seen, logs = (x.expand(batch, logs.shape[1], seen.shape[2], -1) for x in (seen, logs))
    return torch.cat([seen, logs], -1)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    if not k.shape[-2]:
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), torch.full(q.shape[:-1], -torch.inf, device=q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if mask is not None:
        out = out.nan_to_num(nan=0.0)  # rows that a mask leaves without a key
    if not return_lse:
        return out, None
    logits = (q.float() * scale) @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    return out, logits.logsumexp(-1)


def _slots(rows: Tensor | slice, q: Tensor) -> Tensor:
    return torch.arange(q.shape[-2], device=q.device)[rows]


def _groups(plan: BlockPlan) -> list[list[list[_Group]]]:
    """Groups by batch entry, then head, of the plan."""
    return [[_groups_of(plan, bits) for bits in of_batch] for of_batch in plan.bits]


def _groups_of(plan: BlockPlan, bits: Tensor) -> list[_Group]:
    patterns, owner = torch.unique(bits, dim=0, return_inverse=True)
    members = unpack_bits(patterns, len(plan.k_len))  # [patterns, N]
    slot = torch.arange(plan.block_k, device=bits.device)
    held = slot < plan.k_len[:, None]  # [N, block_k]
    groups = []
    for pattern in range(len(patterns)):
        blocks = (owner == pattern).nonzero()[:, 0]
        blocks = blocks[plan.q_len[blocks] > 0]
        if not len(blocks):
            continue
        first, last = int(blocks[0]), int(blocks[-1])
        rows: Tensor | slice = slice(first * plan.block_q, (last + 1) * plan.block_q)
        if last - first + 1 != len(blocks):
            rows = (blocks[:, None] * plan.block_q + torch.arange(plan.block_q, device=bits.device)).flatten()
        keys = (held & members[pattern][:, None]).flatten().nonzero()[:, 0]
        groups.append(_Group(rows, keys, (~members[pattern] & (plan.k_len > 0)).nonzero()[:, 0]))
    return groups
