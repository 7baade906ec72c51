"""How much the past key blocks of a prompt matter to each of its query blocks, in causal attention.

Query slot i stands at key slot ``causal + i``. Every function returns float32 (B, H, M, N): shares of attention, or their
logarithm, that are 0, or -inf, for blocks that no query of the block reaches. What one query block is told depends on no later
block. Inside of a block all rows have a say: what a row reads may depend on rows up to ``block - 1`` behind it, unless it is `strict`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelplug.kernels.plan import BlockPlan, pool

PIECE = (1 << 20, 1 << 25)
"""Logits held at a time: so many as a CPU's caches hold, more elsewhere. Ours."""


@torch.library.custom_op("accelplug::sampled_past", mutates_args=())
def sampled_past(
    q: Tensor,
    k: Tensor,
    block: int,
    causal: int,
    rows: int,
    scale: float,
    held: Tensor,
    reads: Tensor | None = None,
    strict: bool = False,
) -> Tensor:
    """Return the mean share of attention that some rows of each query block give to each key block, exactly.

    It costs ``rows / block`` of the q.k products of dense causal attention.

    Parameters
    ----------
    q, k : Tensor (B, H, P_q, D) and (B, H_kv, P_k, D); H_kv divides H.
    block : slots per query and key block.
    causal : the key slot at which query slot 0 stands.
    rows : sampled rows of a block, at equal distances among its tokens. One that has fewer has some of them twice.
    scale : factor on q.k.
    held : bool (B|1, P_q), queries that are tokens.
    reads : bool (B, P_k), keys that may be read; None for all.
    strict : take the first row of a block and, in place of its others, rows of the block before it, so that no row is told anything
        of those behind it. The first block has its first row alone.

    Returns
    -------
    mass : float32 (B, H, M, N). A row sums to 1, or to 0 where no sampled row is a token.
    """
    (slots_q, slots_k), groups = (q.shape[-2], k.shape[-2]), q.shape[1] // k.shape[1]
    blocks_q, blocks_k = -(-slots_q // block), -(-slots_k // block)
    if strict:
        place = -torch.arange(rows, device=q.device).expand(len(held), 1, -1) * block // rows
    else:
        number = pad(held, (0, blocks_q * block - slots_q)).unflatten(-1, (-1, block)).sum(-1, keepdim=True)  # [B|1, M, 1]
        place = ((torch.arange(rows, device=q.device) + 0.5) * number / rows).long()
    slots = torch.arange(blocks_q, device=q.device)[:, None] * block + place
    slots = slots.clamp(min=0, max=slots_q - 1)  # [B|1, M, rows]
    counts = held.gather(1, slots.flatten(1)).view(slots.shape).float()
    weight = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    mass = torch.zeros(*q.shape[:2], blocks_q, blocks_k, device=q.device)
    step = max(1, PIECE[q.device.type != "cpu"] // (len(q) * groups * rows * slots_k))  # query blocks
    for head in range(k.shape[1]):
        of_head = slice(head * groups, (head + 1) * groups)
        keys = k[:, head].float().mT  # [B, D, P_k]
        for first in range(0, blocks_q, step):
            some = slots[:, first : first + step]  # [B|1, m, rows]
            seen = min(causal + int(min((first + step) * block, slots_q)), slots_k)
            tail = min(causal + max((first - strict) * block, 0), seen)  # from here on not all rows read all
            queries = q[:, of_head].take_along_dim(some.flatten(1)[:, None, :, None], 2).float() * scale
            queries = queries.flatten(1, 2)  # [B, groups * m * rows, D]
            logits = (queries @ keys[..., :seen]).unflatten(1, (groups, -1))
            ahead = torch.arange(tail, seen, device=q.device) > causal + some.flatten(1)[:, None, :, None]
            logits[..., tail:].masked_fill_(ahead, -torch.inf)
            if reads is not None:
                logits.masked_fill_(~reads[:, None, None, :seen], -torch.inf)
            share = logits.softmax(-1).nan_to_num_(nan=0.0).unflatten(2, some.shape[1:])  # NaN: no key may be read
            share = (share * weight[:, None, first : first + step, :, None]).sum(3)  # [B, groups, m, seen]
            by_block = pad(share, (0, -seen % block)).unflatten(-1, (-1, block)).sum(-1)
            mass[:, of_head, first : first + step, : by_block.shape[-1]] = by_block
    return mass


@sampled_past.register_fake
def _sampled_past_fake(
    q: Tensor,
    k: Tensor,
    block: int,
    causal: int,
    rows: int,
    scale: float,
    held: Tensor,
    reads: Tensor | None = None,
    strict: bool = False,
) -> Tensor:
    return q.new_empty(*q.shape[:2], -(-q.shape[-2] // block), -(-k.shape[-2] // block), dtype=torch.float32)


def antidiagonal_past(
    q: Tensor, k: Tensor, block: int, causal: int, stride: int, scale: float, held: Tensor, reads: Tensor | None = None
) -> Tensor:
    """Return the share of attention of each pair of blocks by sums along antidiagonals (XAttention, arXiv 2503.16428).

    In each tile of ``stride x stride`` logits, the mean over its antidiagonal stands for the tile; a softmax over a row of tiles makes
    shares of it. It costs ``1 / stride`` of the q.k products of dense attention.

    Parameters
    ----------
    q, k, causal, scale, held, reads : as in `sampled_past`.
    block : slots per query and key block, a multiple of `stride`.
    stride : tokens of a tile.

    Returns
    -------
    mass : float32 (B, H, M, N). A row sums to 1, or to 0 where it has no token.
    """
    groups, blocks_q, blocks_k = q.shape[1] // k.shape[1], -(-q.shape[-2] // block), -(-k.shape[-2] // block)

    def tiles(x: Tensor, blocks: int, valid: Tensor | None) -> Tensor:
        x = x if valid is None else x * valid[:, None, :, None]
        return pad(x.float(), (0, 0, 0, blocks * block - x.shape[-2])).unflatten(-2, (-1, stride))  # [B, H, T, stride, D]

    queries = tiles(q, blocks_q, held).flip(-2).flatten(-2) * (scale / stride)
    keys = tiles(k, blocks_k, reads).flatten(-2)
    last_query = causal + (torch.arange(queries.shape[2], device=q.device) + 1) * stride
    ahead = (torch.arange(keys.shape[2], device=q.device) + 1) * stride > last_query[:, None]  # [T_q, T_k]
    counts = pad(held, (0, blocks_q * block - held.shape[-1])).unflatten(-1, (-1, stride)).any(-1)  # [B|1, T_q]
    empty = torch.arange(keys.shape[2], device=q.device)[None] * stride >= k.shape[-2]
    if reads is not None:
        empty = empty | ~pad(reads, (0, blocks_k * block - reads.shape[-1])).unflatten(-1, (-1, stride)).any(-1)  # [B, T_k]
    mass = []
    for head in range(q.shape[1]):
        logits = queries[:, head] @ keys[:, head // groups].mT  # [B, T_q, T_k]
        logits = logits.masked_fill(ahead | empty[:, None], -torch.inf)
        share = logits.softmax(-1).nan_to_num(nan=0.0) * counts[..., None]
        share = share.unflatten(-1, (blocks_k, -1)).sum(-1).unflatten(1, (blocks_q, -1)).sum(2)
        mass.append(share / share.sum(-1, keepdim=True).clamp(min=1e-30))
    return torch.stack(mass, 1)


def mean_past(
    q: Tensor, k: Tensor, block: int, causal: int, scale: float, held: Tensor, reads: Tensor | None = None
) -> Tensor:
    """Return the logarithm of each key block's weight by its mean key (FlashPrefill, arXiv 2603.06199): ``log sum_q exp(s q.k_J)``.

    The sum is over the tokens q of a query block. It costs ``1 / block`` of the q.k products of dense attention.

    Parameters
    ----------
    As in `sampled_past`.

    Returns
    -------
    score : float32 (B, H, M, N), -inf where no query reaches the block, or no key of it may be read.
    """
    groups, blocks_q, blocks_k = q.shape[1] // k.shape[1], -(-q.shape[-2] // block), -(-k.shape[-2] // block)
    lengths = (k.shape[-2] - torch.arange(blocks_k, device=k.device) * block).clamp(max=block).int()
    means, number = pool(k, lengths, block, reads)  # [B, H_kv, N, D], [B|1, 1, N]
    last_query = causal + torch.arange(1, blocks_q + 1, device=q.device)[:, None] * block
    ahead = torch.arange(blocks_k, device=q.device) * block >= last_query  # [M, N]
    out = ~pad(held, (0, blocks_q * block - held.shape[-1]))[..., None]  # [B|1, M * block, 1]
    scores = []
    for head in range(q.shape[1]):
        logits = scale * q[:, head].float() @ means[:, head // groups].mT
        logits = pad(logits, (0, 0, 0, blocks_q * block - q.shape[-2])).masked_fill(out, -torch.inf)
        scores.append(logits.unflatten(1, (-1, block)).logsumexp(2))  # [B, M, N]
    return torch.stack(scores, 1).masked_fill(ahead | (number == 0)[:, :, None], -torch.inf)


def kept_mass(
    q: Tensor, k: Tensor, plan: BlockPlan, rows: int, scale: float, held: Tensor, reads: Tensor | None = None
) -> Tensor:
    """Return the share of their attention that some rows give to the keys that a causal plan has them read exactly.

    Parameters
    ----------
    q, k, scale, held, reads : as in `sampled_past`.
    plan : causal, of one block size for queries and keys, for these queries and keys.
    rows : how many, at equal distances among the tokens of all queries; the last one is the last token.

    Returns
    -------
    kept : float32 (B, H), mean over the rows. What is read as part of the rest does not count.
    """
    causal = plan.causal or 0
    number, first = held.sum(-1, keepdim=True), held.int().argmax(-1, keepdim=True)  # [B|1, 1]
    place = ((torch.arange(rows, device=q.device) + 1) * number / rows).ceil().long() - 1
    slots = (first + place.clamp(min=0)).expand(len(q), -1)  # [B, R]
    members, groups = plan.members, q.shape[1] // k.shape[1]  # [B|1, H|H_kv|1, M, N]
    members = members.repeat_interleave(q.shape[1] // members.shape[1], 1).expand(len(q), -1, -1, -1)
    read = members.take_along_dim((slots // plan.block_q)[:, None, :, None], 2)  # [B, H, R, N]
    ahead = torch.arange(k.shape[-2], device=q.device) > causal + slots[:, None, :, None]  # [B, 1, R, P_k]
    out = ahead if reads is None else ahead | ~reads[:, None, None]
    kept = []
    for head in range(q.shape[1]):
        queries = q[:, head].take_along_dim(slots[..., None], 1).float() * scale
        share = (queries @ k[:, head // groups].float().mT).masked_fill(out[:, 0], -torch.inf)
        share = share.softmax(-1).nan_to_num(nan=0.0)  # [B, R, P_k]; NaN: no token in the row
        by_block = pad(share, (0, -k.shape[-2] % plan.block_k)).unflatten(-1, (-1, plan.block_k)).sum(-1)
        kept.append((by_block * read[:, head]).sum(-1).mean(-1))
    return torch.stack(kept, 1)


def gated_past(
    q: Tensor, k: Tensor, block: int, causal: int, scale: float, held: Tensor, reads: Tensor | None = None
) -> Tensor:
    """Return the mean weight of each key block in a softmax over blocks, each stood for by its mean key and as heavy as it is long.

    A query has the blocks ahead of its own as its choice. It costs ``1 / block`` of the q.k products of dense attention.

    Parameters
    ----------
    As in `sampled_past`.

    Returns
    -------
    gate : float32 (B, H, M, N). A row sums to 1, or to 0 where no token of the block has a block ahead of it.
    """
    groups, blocks_q, blocks_k = q.shape[1] // k.shape[1], -(-q.shape[-2] // block), -(-k.shape[-2] // block)
    lengths = (k.shape[-2] - torch.arange(blocks_k, device=k.device) * block).clamp(max=block).int()
    means, number = pool(k, lengths, block, reads)  # [B, H_kv, N, D], [B|1, 1, N]
    first_query = causal + torch.arange(blocks_q, device=k.device)[:, None] * block
    ahead = torch.arange(1, blocks_k + 1, device=k.device) * block > first_query  # [M, N]: not wholly past
    out = ahead | (number == 0)[:, :, None]  # [B|1, 1, M, N]
    weights = pad(held, (0, blocks_q * block - held.shape[-1])).unflatten(-1, (-1, block)).float()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)  # [B|1, M, block]
    gates = []
    for head in range(q.shape[1]):
        logits = scale * q[:, head].float() @ means[:, head // groups].mT + number[:, 0, None].log()
        logits = pad(logits, (0, 0, 0, blocks_q * block - q.shape[-2])).unflatten(1, (-1, block))  # [B, M, block, N]
        share = logits.masked_fill(out[:, 0, :, None], -torch.inf).softmax(-1).nan_to_num(nan=0.0)
        gates.append((share * weights[..., None]).sum(2))
    return torch.stack(gates, 1)
