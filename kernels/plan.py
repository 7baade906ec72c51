"""The block plan: which key blocks each query block reads. The border between methods and kernels.

Tokens are assumed to lie in *block order* (see `orders.Tiles`): query block m covers slots ``m * block_q`` to
``(m + 1) * block_q``, of which the first ``q_len[m]`` hold tokens; keys likewise. A plan never holds S x S of anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accelplug.errors import ShapeError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class Box:
    """A token-level window inside the selected blocks: query i reads key j iff ``lo[i] <= coord[j] < hi[i]`` on every axis.

    Attributes
    ----------
    lo, hi : int32 (S_q, A), first and one-past-last coordinate that each query slot reads, A axes.
    coord : int32 (S_k, A), coordinate of each key slot.
    """

    lo: Tensor
    hi: Tensor
    coord: Tensor

    def allows(self, q_slots: Tensor, k_slots: Tensor) -> Tensor:
        """Return bool (..., len(q_slots), len(k_slots)): may this query slot read this key slot?"""
        coord = self.coord[k_slots].unsqueeze(-3)  # [..., 1, K, A]
        inside = (coord >= self.lo[q_slots].unsqueeze(-2)) & (coord < self.hi[q_slots].unsqueeze(-2))
        return inside.all(-1)


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Lists of key blocks per query block.

    Attributes
    ----------
    index : int32 (B|1, H|1, M, K), selected key blocks: those that tokens fill first, each part ascending, padded with 0
        behind `count`; K is a power of two or N.
    count, whole : int32 (B|1, H|1, M), how many entries of `index` hold, and how many of those are filled blocks.
    bits : int32 (B|1, H|1, M, ceil(N / 32)), packed membership: bit ``j % 32`` of word ``j // 32`` is key block j.
    q_len, k_len : int32 (M,) and (N,), tokens that each block holds, at its front.
    block_q, block_k : slots per query and key block.
    box : token-level window inside the selected blocks, or None to read them whole.
    """

    index: Tensor
    count: Tensor
    whole: Tensor
    bits: Tensor
    q_len: Tensor
    k_len: Tensor
    block_q: int
    block_k: int
    box: Box | None = None

    @classmethod
    def from_members(
        cls, members: Tensor, q_len: Tensor, k_len: Tensor, block_q: int, block_k: int, box: Box | None = None
    ) -> BlockPlan:
        """Build a plan from block membership, bool (B|1, H|1, M, N) or (M, N).

        Raises
        ------
        ShapeError
            If `members` does not fit `q_len` and `k_len`, or a row that holds queries selects no block.
        """
        members = members[None, None] if members.ndim == 2 else members
        if members.ndim != 4 or members.shape[2:] != (len(q_len), len(k_len)):
            raise ShapeError(
                f"Block membership must be (B|1, H|1, M, N) with M={len(q_len)} query and N={len(k_len)} key blocks, "
                f"got {tuple(members.shape)}. Pass lengths made for the same tiles."
            )
        return cls._pack(members & (k_len > 0), q_len, k_len, block_q, block_k, box)

    @classmethod
    def _pack(cls, members, q_len, k_len, block_q, block_k, box) -> BlockPlan:
        blocks = members.shape[-1]
        count = members.sum(-1, dtype=torch.int32)
        filled = k_len == block_k
        whole = (members & filled).sum(-1, dtype=torch.int32)
        width = min(blocks, 1 << (max(int(count.max()), 1) - 1).bit_length())
        order = torch.arange(blocks, device=members.device, dtype=torch.int32)
        rank = torch.where(members, order + torch.where(filled, 0, blocks), 2 * blocks).sort(-1).values[..., :width]
        index = torch.where(rank < 2 * blocks, rank % blocks, 0).int().contiguous()
        return cls(index, count, whole, pack_bits(members), q_len, k_len, block_q, block_k, box)

    @property
    def members(self) -> Tensor:
        """Block membership, bool (B|1, H|1, M, N)."""
        return unpack_bits(self.bits, len(self.k_len))

    @property
    def key_slots(self) -> int:
        """Length of the padded key sequence, N * block_k."""
        return len(self.k_len) * self.block_k

    def to(self, device: torch.device | str) -> BlockPlan:
        """Return the plan with its tensors on `device`."""
        box = self.box and Box(self.box.lo.to(device), self.box.hi.to(device), self.box.coord.to(device))
        names = ("index", "count", "whole", "bits", "q_len", "k_len")
        return replace(self, box=box, **{name: getattr(self, name).to(device) for name in names})

    def density(self) -> Tensor:
        """Fraction of (query, key) pairs in the selected blocks, float64 (B|1, H|1). The box is not counted: blocks cost."""
        pairs = self.members.double() @ self.k_len.double() @ self.q_len.double()
        return pairs / (self.q_len.double().sum() * self.k_len.double().sum())

    def dense_mask(self) -> Tensor:
        """Token-level mask, bool (B|1, H|1, M * block_q, N * block_k). For tests and drawings: it holds S x S."""
        mask = self.members.repeat_interleave(self.block_q, -2).repeat_interleave(self.block_k, -1)
        mask = mask & _holds(self.q_len, self.block_q)[:, None] & _holds(self.k_len, self.block_k)
        if self.box is not None:
            slots_q, slots_k = (torch.arange(n, device=mask.device) for n in mask.shape[-2:])
            mask = mask & self.box.allows(slots_q, slots_k)
        return mask

    def block_mask(self, extra: int = 0, key_mask: Tensor | None = None) -> BlockMask:
        """Convert to FlexAttention: full where the key block is filled and no box applies, partial under one mask_mod else.

        Parameters
        ----------
        extra : key blocks behind those of the plan that every row reads whole.
        key_mask : bool (B, N * block_k), keys that may be read; then every block of the plan is partial.
        """
        from torch.nn.attention.flex_attention import BlockMask

        members = torch.nn.functional.pad(self.members, (0, extra), value=True)
        whole = self.k_len == self.block_k
        if self.box is not None or key_mask is not None:
            whole = torch.zeros_like(whole)
        full = members & torch.nn.functional.pad(whole, (0, extra), value=True)

        def listed(part: Tensor) -> tuple[Tensor, Tensor]:
            return part.sum(-1, dtype=torch.int32), part.int().argsort(dim=-1, descending=True, stable=True).int()

        (partial_number, partial_index), (full_number, full_index) = listed(members & ~full), listed(full)
        shape = (len(self.q_len) * self.block_q, members.shape[-1] * self.block_k)
        return BlockMask.from_kv_blocks(
            partial_number,
            partial_index,
            full_number,
            full_index,
            BLOCK_SIZE=(self.block_q, self.block_k),
            mask_mod=self._mask_mod(key_mask),
            seq_lengths=shape,
        )

    def _mask_mod(self, key_mask: Tensor | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        k_len, block_k, slots, box = self.k_len, self.block_k, self.key_slots, self.box

        def in_plan(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            at = torch.where(key < slots, key, 0)
            reads = at % block_k < k_len[at // block_k]
            if key_mask is not None:
                reads = reads & key_mask[b, at]
            if box is not None:
                for axis in range(box.coord.shape[1]):
                    coord = box.coord[at, axis]
                    reads = reads & (coord >= box.lo[row, axis]) & (coord < box.hi[row, axis])
            return reads | (key >= slots)

        return in_plan


@dataclass(frozen=True, eq=False)
class Threshold:
    """A plan that the kernel finds as it goes: key block j is read exactly iff its pooled score exceeds the row's threshold.

    The score is ``scale * log2(e) * <q_pool[m], k_pool[j]>``. Blocks with ``|m - j| <= band`` in key-block units, sink
    blocks and all blocks of dense rows are always read. `lower` turns it into a `BlockPlan`.

    Attributes
    ----------
    theta : float32 (B, H, M), threshold per query block, in the log2 domain.
    band : blocks on either side of the diagonal that are always read.
    sink : bool (N,), key blocks that every row reads.
    dense_rows : bool (M,), query blocks that read everything.
    q_len, k_len, block_q, block_k : as in `BlockPlan`.
    """

    theta: Tensor
    band: int
    sink: Tensor
    dense_rows: Tensor
    q_len: Tensor
    k_len: Tensor
    block_q: int
    block_k: int

    def lower(self, q_pool: Tensor, k_pool: Tensor, scale: float) -> BlockPlan:
        """Evaluate the rule on pooled queries (B, H, M, D) and keys (B, H, N, D), both float32."""
        score = (q_pool * (scale * math.log2(math.e))) @ k_pool.transpose(-1, -2)
        members = (score > self.theta[..., None]) | self.always
        return BlockPlan.from_members(members, self.q_len, self.k_len, self.block_q, self.block_k)

    @property
    def always(self) -> Tensor:
        """Blocks read whatever their score, bool (M, N)."""
        m = torch.arange(len(self.q_len), device=self.sink.device)[:, None] * self.block_q
        j = torch.arange(len(self.k_len), device=self.sink.device)[None] * self.block_k
        reach = self.band * self.block_k
        near = (j < m + self.block_q + reach) & (j + self.block_k > m - reach)
        return near | self.sink | self.dense_rows[:, None]


def pool(x: Tensor, lengths: Tensor, block: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean over each block, in float32, divided by its true length.

    Parameters
    ----------
    x : Tensor (B, H, S, D), S at most ``len(lengths) * block``.
    lengths : int32 (N,), tokens at the front of each block.
    valid : bool (B, S) or None, slots that count.

    Returns
    -------
    mean : float32 (B, H, N, D), 0 where a block is empty.
    number : float32 (B|1, 1, N), tokens averaged.
    """
    blocks = len(lengths)
    holds = _counted_slots(lengths, block, valid)
    x = torch.nn.functional.pad(x.float(), (0, 0, 0, blocks * block - x.shape[-2]))
    x = x.masked_fill(~holds[:, None, :, None], 0.0).unflatten(-2, (blocks, block))
    number = counted(lengths, block, valid)
    return x.sum(-2) / number.clamp(min=1)[..., None], number


def counted(lengths: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """How many tokens each block holds, of those that `valid` counts: float32 (B|1, 1, N)."""
    return _counted_slots(lengths, block, valid).unflatten(-1, (len(lengths), block)).sum(-1)[:, None].float()


def _counted_slots(lengths: Tensor, block: int, valid: Tensor | None) -> Tensor:
    holds = _holds(lengths, block)[None]  # [1, N * block]
    return holds if valid is None else holds & torch.nn.functional.pad(valid, (0, holds.shape[-1] - valid.shape[-1]))


def pack_bits(members: Tensor) -> Tensor:
    """Pack bool (..., N) into int32 (..., ceil(N / 32)), lowest bit first."""
    words = -(-members.shape[-1] // 32)
    padded = torch.nn.functional.pad(members, (0, words * 32 - members.shape[-1])).unflatten(-1, (words, 32))
    weight = torch.ones(32, dtype=torch.int64, device=members.device) << torch.arange(32, device=members.device)
    return (padded * weight).sum(-1).to(torch.int32)


def unpack_bits(bits: Tensor, number: int) -> Tensor:
    """Inverse of `pack_bits`: bool (..., number)."""
    shifts = torch.arange(32, device=bits.device, dtype=torch.int32)
    return ((bits[..., None] >> shifts) & 1).bool().flatten(-2)[..., :number]


def _holds(lengths: Tensor, block: int) -> Tensor:
    """Which slots hold a token, bool (len(lengths) * block,)."""
    return (torch.arange(block, device=lengths.device) < lengths[:, None]).flatten()
