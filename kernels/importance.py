"""How much each key block matters to each query block, judged by a sample: of the tokens of both, or of rows against all keys; or by means
of parts of both."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelplug.kernels.chunks import by_heads
from accelplug.kernels.plan import LOG2_E, pool

SHARE = 4
"""One in so many tokens of a block is looked at."""

BUDGET = 1 << 25
"""Logits held at a time."""

CACHED_LOGITS = 1 << 20
"""The same on a CPU, of rows against all keys: so many stay in its caches. Ours, measured by `benchmarks.repair_overhead`."""

PARTS = 4
"""Parts of a block that have a mean each."""


def sampled_slots(lengths: Tensor, block: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw a quarter of each block's tokens, at least one, by one permutation of a block's slots for all blocks.

    Returns
    -------
    slots : int64 (N, ceil(block / 4)), slots drawn; where a short block has fewer, its first slot.
    drawn : bool (N, ceil(block / 4)), False there and where a block is empty.
    """
    permutation = _permutation(block, seed, lengths.device)
    held = permutation < lengths[:, None]  # [N, block]
    turn = held.cumsum(-1)
    turn = torch.where(held & (turn <= -(-lengths // SHARE)[:, None]), turn, 2 * block)
    turn, place = turn.sort(dim=-1, stable=True)
    width = -(-block // SHARE)
    drawn = turn[:, :width] <= block
    first = torch.arange(len(lengths), device=lengths.device)[:, None] * block
    return first + torch.where(drawn, permutation[place[:, :width]], 0), drawn


@torch.library.custom_op("accelplug::sampled_importance", mutates_args=())
def sampled_importance(
    q: Tensor,
    k: Tensor,
    q_len: Tensor,
    k_len: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    key_mask: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Return the largest attention probability in each pair of blocks, among sampled queries and sampled keys.

    Logits are computed in the dtype of q, a few query blocks at a time; a sixteenth of all of them.

    Parameters
    ----------
    q, k : Tensor (B, H, P_q, D) and (B, H_kv, P_k, D), tokens in block order; H_kv divides H.
    q_len, k_len : int32 (M,) and (N,), tokens at the front of each block.
    block_q, block_k : slots per query and key block.
    scale : factor on q.k.
    key_mask : bool (B, P_k) or (B, H, P_k), keys that may be read; the others take no part.
    seed : of the permutation.

    Returns
    -------
    importance : float32 (B, H, M, N) in [0, 1]; a row of probabilities sums to 1 over the sampled keys.
    """
    (q_slots, q_drawn), (k_slots, k_drawn) = sampled_slots(q_len, block_q, seed), sampled_slots(k_len, block_k, seed)
    keys = k[..., k_slots.clamp(max=k.shape[-2] - 1).flatten(), :].repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = k_drawn.flatten()[None, None]  # [B|1, H|1, N * s]
    if key_mask is not None:
        key_mask = key_mask[:, None] if key_mask.ndim == 2 else key_mask
        seen = seen & key_mask[..., k_slots.clamp(max=k.shape[-2] - 1).flatten()]
    per_block = q_slots.shape[1] * keys[..., 0].numel()
    parts = []
    for slots, drawn in zip(*(x.split(max(1, BUDGET // per_block)) for x in (q_slots, q_drawn)), strict=True):
        queries = q[..., slots.clamp(max=q.shape[-2] - 1).flatten(), :]
        logits = (
            ((queries * (scale * LOG2_E)) @ keys.transpose(-1, -2)).float().masked_fill_(~seen[..., None, :], -torch.inf)
        )
        largest = logits.unflatten(-1, k_slots.shape).amax(-1)  # [B, H, m * s, N]
        top = largest.amax(-1, keepdim=True)
        share = (
            (largest - top).exp2_().div_(logits.sub_(top).exp2_().sum(-1, keepdim=True)).nan_to_num_(nan=0.0)
        )  # NaN: no key may be read
        parts.append(share.unflatten(-2, slots.shape).masked_fill_(~drawn[..., None], 0.0).amax(-2))
    return torch.cat(parts, -2)


@sampled_importance.register_fake
def _sampled_importance_fake(
    q: Tensor,
    k: Tensor,
    q_len: Tensor,
    k_len: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    key_mask: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    return q.new_empty(*q.shape[:2], len(q_len), len(k_len), dtype=torch.float32)


@torch.library.custom_op("accelplug::sampled_mass", mutates_args=())
def sampled_mass(
    q: Tensor,
    k: Tensor,
    slots: Tensor,
    keys: int,
    block_k: int,
    scale: float,
    reads: Tensor | None = None,
    v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the share of attention that rows of each query block give to each key block, and what these rows read there.

    The rows are held against all keys in float32, a few heads and query blocks at a time: their share of dense attention's products.

    Parameters
    ----------
    q, k : Tensor (B, H, P_q, D) and (B, H_kv, P_k, D), tokens in block order; H_kv divides H.
    slots : int64 (M, n), the rows of each block.
    keys, block_k : key blocks, N of them, and slots of each.
    scale : factor on q.k.
    reads : bool (B|1, H_kv|1, P_k), keys that may be read; None for all.
    v : Tensor (B, H_kv, P_k, D_v), or None where the output is not asked for.

    Returns
    -------
    mass : float32 (B, H, M, N), at least 0, the mean over a block's rows. A row sums to 1, or to 0 where no key may be read.
    out : Tensor (B, H, M * n, D_v) in v's dtype, dense attention of the rows; empty without v.
    """
    groups, width, held = q.shape[1] // k.shape[1], slots.shape[1], CACHED_LOGITS if q.device.type == "cpu" else BUDGET
    queries = q[..., slots.flatten(), :].unflatten(1, (-1, groups))  # [B, H_kv, groups, M * n, D]
    given = [x for x in (v, reads if reads is None else ~reads[..., None, :]) if x is not None]
    masses, outs = [], []
    for some, key, *others in by_heads(len(k) * k[0, 0].numel(), queries, k, *given):
        key, value = key.to(_exact(k)).mT, None if v is None else others[0].to(_exact(k))
        rows = max(1, held // (width * some[..., 0, 0].numel() * key.shape[-1])) * width
        mass, out = [], []
        for part in some.split(rows, -2):
            logits = _product(part.flatten(2, 3).to(key.dtype), key, scale * LOG2_E)
            if reads is not None:
                logits.masked_fill_(others[-1], -torch.inf)
            weights = logits.sub_(logits.amax(-1, keepdim=True)).exp2_()  # [B, h, groups * m * width, P_k]
            if reads is not None:
                weights.nan_to_num_(nan=0.0)  # NaN: no key may be read
            by_block = _block_sums(weights, keys, block_k)
            total = by_block.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
            if value is not None:
                out.append(_product(weights.to(value.dtype), value).div_(total).unflatten(2, (groups, -1)))
            mass.append((by_block / total).unflatten(2, (groups, -1, width)).mean(-2))  # [B, h, groups, m, N]
        masses.append(torch.cat(mass, 3))
        outs.append(torch.cat(out, 3) if out else q.new_empty(0))
    if v is None:
        return torch.cat(masses, 1).flatten(1, 2), q.new_empty(0)
    return torch.cat(masses, 1).flatten(1, 2), torch.cat(outs, 1).flatten(1, 2).to(v.dtype)


@sampled_mass.register_fake
def _sampled_mass_fake(
    q: Tensor,
    k: Tensor,
    slots: Tensor,
    keys: int,
    block_k: int,
    scale: float,
    reads: Tensor | None = None,
    v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(0) if v is None else v.new_empty(*q.shape[:2], slots.numel(), v.shape[-1])
    return q.new_empty(*q.shape[:2], len(slots), keys, dtype=torch.float32), out


def _exact(x: Tensor) -> torch.dtype:
    """In what factors of a product are kept that is to be exact to float32: a GPU sums products of 16 bits in float32 itself."""
    return x.dtype if x.is_cuda else torch.float32


def _product(a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """Products (B, H, R, C) of matrices times a factor, float32."""
    if a.dtype == torch.float32:
        return (a if factor == 1 else a * factor) @ b
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).mul_(factor).unflatten(0, a.shape[:2])


def _block_sums(x: Tensor, blocks: int, block: int) -> Tensor:
    """Sum x (..., P) over blocks of so many columns: (..., N). The last ones may be short, or empty."""
    whole = x.shape[-1] // block
    sums = x[..., : whole * block].unflatten(-1, (whole, block)).sum(-1)
    if whole == blocks:
        return sums
    return pad(torch.cat([sums, x[..., whole * block :].sum(-1, keepdim=True)], -1), (0, blocks - whole - 1))


def subblock_scores(
    q: Tensor,
    k: Tensor,
    q_len: Tensor,
    k_len: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Return ``log sum exp(scale * q_a.k_b)`` over parts a of each query and b of each key block, by the means q_a and k_b of parts.

    The sum is over pairs of parts that hold a token. It costs ``16 / (block_q * block_k)`` of the products of dense attention.

    Parameters
    ----------
    q, k : Tensor (B, H, P_q, D) and (B, H_kv, P_k, D), tokens in block order; H_kv divides H.
    q_len, k_len : int32 (M,) and (N,), tokens at the front of each block.
    block_q, block_k : slots per query and key block, multiples of 4.
    scale : factor on q.k.
    key_mask : bool (B, P_k) or (B, H, P_k), keys that may be read.

    Returns
    -------
    scores : float32 (B, H, M, N); -inf for a block without a key that may be read. A row without a token is finite elsewhere.
    """

    def parts(x: Tensor, lengths: Tensor, block: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        start = torch.arange(0, block, block // PARTS, device=lengths.device)
        held = (lengths[:, None] - start).clamp(0, block // PARTS).int().flatten()
        mean, number = pool(x, held, block // PARTS, valid)
        return mean.unflatten(-2, (-1, PARTS)), number.unflatten(-1, (-1, PARTS)) == 0

    (queries, no_query), (keys, no_key) = parts(q, q_len, block_q, None), parts(k, k_len, block_k, key_mask)
    keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
    total = torch.full((), -torch.inf, device=q.device)
    for a in range(PARTS):
        for b in range(PARTS):
            logits = scale * queries[..., a, :] @ keys[..., b, :].mT
            logits = logits.masked_fill(no_key[..., None, :, b], -torch.inf)
            if a > 0:  # a block with a token has one in its first part
                logits = logits.masked_fill(no_query[..., a, None], -torch.inf)
            total = torch.logaddexp(total, logits)
    return total


@lru_cache(maxsize=64)
def _permutation(block: int, seed: int, device: torch.device) -> Tensor:
    return torch.randperm(block, generator=torch.Generator().manual_seed(seed)).to(device)
