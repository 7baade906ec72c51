"""Block attention by gathering: the keys that a query block reads, through scaled_dot_product_attention. Needs no compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from accelplug import compat
from accelplug.bounded import Bounded
from accelplug.kernels.chunks import at_once
from accelplug.kernels.plan import BlockPlan, Box, held_slots
from accelplug.kernels.rest import Coarse


@dataclass(frozen=True, eq=False)
class _Group:
    """Query blocks that read the same keys.

    Attributes
    ----------
    rows : int64 (R,), their query slots, or a slice where they lie side by side.
    blocks : int64 (n,) each, the key blocks that they read exactly, then at each of the coarse levels.
    """

    rows: Tensor | slice
    blocks: tuple[Tensor, ...]

    def keys(self, plan: BlockPlan, levels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The key slots that they read exactly, int64 (n,), and the coarse keys, int64 (e,)."""
        parts, before = [], 0
        for level, blocks in zip((1, *levels), self.blocks, strict=True):
            run = level or plan.block_k
            each = plan.block_k // run
            place = torch.arange(each, device=blocks.device)
            slots = before + blocks[:, None] * each + place
            parts.append(slots[place * run < plan.k_len[blocks, None]])
            before += each * len(plan.k_len) if level != 1 else 0  # coarse keys are counted from 0
        return parts[0], torch.cat([parts[0][:0], *parts[1:]])


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
    # By its shape too: one head of a plan starts where the whole plan does.
    key = (plan.bits.data_ptr(), plan.bits.shape, compat.torch.times_written(plan.bits), levels)
    groups = _grouped.get(key, lambda: (plan, _groups(plan, levels)))[1]
    bias = _bias(coarse, key_mask, plan.key_slots, q.device)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = torch.full(q.shape[:-1], -torch.inf, device=q.device) if return_lse or plan.causal is not None else None
    ratio = q.shape[1] // k.shape[1]
    for b, of_batch in enumerate(groups):
        batch = slice(None) if len(groups) == 1 else slice(b, b + 1)
        each = q.shape[1] // len(of_batch)
        for h, alone in enumerate(of_batch):
            for group in alone:
                exact, means = group.keys(plan, levels)
                at = torch.cat([exact, means + plan.key_slots])  # places in `bias`
                rows = group.rows if isinstance(group.rows, slice) else group.rows[group.rows < q.shape[-2]]
                alike = range(h * each, (h + 1) * each)
                for head, kv_head in _heads_at_once(alike, ratio, len(at) * (k.shape[-1] + v.shape[-1])):
                    theirs = (batch, kv_head)
                    keys, values = k[theirs].index_select(-2, exact), v[theirs].index_select(-2, exact)
                    if coarse is not None:
                        keys = torch.cat([keys, coarse.k[theirs].index_select(-2, means)], -2)
                        values = torch.cat([values, coarse.v[theirs].index_select(-2, means)], -2)
                    mask = None
                    if bias is not None:
                        of_bias = (batch if len(bias) > 1 else slice(None), head if bias.shape[1] > 1 else slice(None))
                        mask = bias[of_bias].index_select(-1, at)[:, :, None]  # [B|1, H|1, 1, C]
                    for some in _rows_at_once(rows, q.shape[-2], plan, len(at)):
                        inside = mask if plan.box is None else _windowed(plan.box, some, exact, len(means), mask, q.device)
                        queries = q[batch, head][:, :, some]
                        if lse is None:
                            out[batch, head, some] = _dense(queries, keys, values, inside, scale)
                        else:
                            both = _dense_with_lse(queries, keys, values, inside, scale)
                            out[batch, head, some], lse[batch, head, some] = both
    if lse is None or plan.causal is None:
        return out, lse
    # What rows read in part is not among the groups: it stands in bands, and all bands go through one call.
    near, near_lse = _diagonal(q, k, v, plan, scale, key_mask)
    share = torch.sigmoid(near_lse - lse).nan_to_num(0.0)[..., None]  # NaN: neither has a key
    return torch.lerp(out, near, share.to(out.dtype)), torch.logaddexp(lse, near_lse)


def _heads_at_once(heads: range, ratio: int, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Query heads that read the same blocks, and their key heads, so many at a time as `at_once` of `numbers` a key head says."""
    if len(heads) < ratio:
        yield slice(heads.start, heads.stop), slice(heads.start // ratio, heads.start // ratio + 1)
        return
    number, last = at_once(numbers), heads.stop // ratio
    for first in range(heads.start // ratio, last, number):
        end = min(first + number, last)
        yield slice(first * ratio, end * ratio), slice(first, end)


def _rows_at_once(rows: Tensor | slice, slots: int, plan: BlockPlan, keys: int) -> list[Tensor] | list[slice]:
    """The query slots `rows` of `slots`, all at a time, or under a box, whose mask has rows x keys x axes entries, some query blocks."""
    step = slots if plan.box is None else max(at_once(keys * plan.box.coord.shape[1]) // plan.block_q, 1) * plan.block_q
    if isinstance(rows, slice):
        last = min(rows.stop, slots)
        return [slice(first, min(first + step, last)) for first in range(rows.start, last, step)]
    return list(rows.split(step))


def _windowed(
    box: Box, rows: Tensor | slice, exact: Tensor, means: int, mask: Tensor | None, device: torch.device
) -> Tensor:
    """`mask` (B|1, H|1, 1, C), or None for 0, with the box's window over the exact keys: float32 (B|1, H|1, R, C)."""
    slots = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
    inside = F.pad(box.allows(slots, exact), (0, means), value=True)
    return torch.where(inside, torch.zeros(1, 1, 1, 1, device=device) if mask is None else mask, -torch.inf)


def _bias(coarse: Coarse | None, key_mask: Tensor | None, slots: int, device: torch.device) -> Tensor | None:
    """What is added to the logits of each key, float32 (B|1, H|1, slots, or slots + E); None for nothing."""
    exact = torch.zeros(1, 1, slots, device=device)
    if key_mask is not None:
        exact = exact.masked_fill(~F.pad(key_mask, (0, slots - key_mask.shape[-1]))[:, None], -torch.inf)
    if coarse is None:
        return None if key_mask is None else exact
    shape = torch.broadcast_shapes(exact.shape[:2], coarse.bias.shape[:2])
    return torch.cat([exact.expand(*shape, -1), coarse.bias.expand(*shape, -1)], -1)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out if mask is None else out.nan_to_num(nan=0.0)  # rows that a mask leaves without a key


def _dense_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    if (both := compat.torch.attention_with_lse(q, k, v, mask, scale)) is not None:
        out, lse = both
        return out, lse if mask is None else lse.masked_fill(mask.amax(-1) == -torch.inf, -torch.inf)
    logits = (q.float() * scale) @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    lse = (logits if mask is None else logits + mask).logsumexp(-1)
    return _dense(q, k, v, mask, scale), lse


def _diagonal(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the diagonal blocks alone."""
    assert plan.causal is not None
    blocks, block_q, block_k = len(plan.q_len), plan.block_q, plan.block_k
    first = plan.causal + torch.arange(blocks, device=q.device)[:, None] * block_q  # key slot of each block's first query
    past = (first + 1) // block_k * block_k  # behind the last past block
    width = block_q - 1 + max((plan.causal + 1 + block * block_q) % block_k for block in range(blocks))
    slots = past + torch.arange(width, device=q.device)  # [M, W]
    held = held_slots(plan.k_len, block_k, key_mask)  # [B|1, N * block_k]
    reads = held[:, slots.clamp(max=held.shape[-1] - 1)] & (slots < held.shape[-1])
    stands = first + torch.arange(block_q, device=q.device)  # [M, block_q]
    reads = reads[:, :, None] & (slots[:, None] <= stands[..., None])  # [B|1, M, block_q, W]
    slots = slots.clamp(max=k.shape[-2] - 1)
    rows = F.pad(q, (0, 0, 0, blocks * block_q - q.shape[-2])).unflatten(-2, (blocks, block_q))
    of_q, of_k, of_v = (
        x.transpose(1, 2).flatten(0, 1) for x in (rows, k[..., slots, :], v[..., slots, :])
    )  # [B * M, H, n, D]
    mask = torch.where(reads, 0.0, -torch.inf).expand(len(q), -1, -1, -1).flatten(0, 1)[:, None]
    out, lse = (
        x.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3) for x in _dense_with_lse(of_q, of_k, of_v, mask, scale)
    )
    return out[:, :, : q.shape[-2]], lse[:, :, : q.shape[-2]]


def _groups(plan: BlockPlan, levels: tuple[int, ...]) -> list[list[list[_Group]]]:
    """Groups by batch entry, then head, of the plan."""
    read = torch.stack([plan.at(level) & plan.past for level in (1, *levels)], 2)  # [B|1, H|1, 1 and levels, M, N]
    words = torch.cat([plan.bits, plan.taken] if plan.level is None else [plan.bits, plan.taken, plan.level], -1)
    return [[_groups_of(plan, *rows) for rows in zip(*of_batch, strict=True)] for of_batch in zip(words, read, strict=True)]


def _groups_of(plan: BlockPlan, words: Tensor, read: Tensor) -> list[_Group]:
    """Groups of one head: `words` (M, W) tell its patterns apart; `read`, bool (L, M, N), has what is read at each level."""
    patterns, owner = torch.unique(words, dim=0, return_inverse=True)
    groups = []
    for pattern in range(len(patterns)):
        blocks = (owner == pattern).nonzero()[:, 0]
        blocks = blocks[plan.q_len[blocks] > 0]
        if not len(blocks):
            continue
        first, last = int(blocks[0]), int(blocks[-1])
        listed = tuple(level.nonzero()[:, 0] for level in read[:, first])
        if not any(map(len, listed)):  # a skipped head
            continue
        rows: Tensor | slice = slice(first * plan.block_q, (last + 1) * plan.block_q)
        if last - first + 1 != len(blocks):
            rows = (blocks[:, None] * plan.block_q + torch.arange(plan.block_q, device=words.device)).flatten()
        groups.append(_Group(rows, listed))
    return groups
