"""The block plan: which key blocks each query block reads. The border between methods and kernels.

Tokens are assumed to lie in *block order* (see `orders.Tiles`): query block m covers slots ``m * block_q`` to
``(m + 1) * block_q``, of which the first ``q_len[m]`` hold tokens; keys likewise. A plan never holds S x S of anything.

A causal plan says at which key slot its first query stands. Key blocks that lie wholly behind a query block (in time: before it) are
*past*: they are read whole, or left to the rest. The *diagonal* blocks, which some of its queries reach and others do not, are
always read, and masked by token. What no query reaches is neither read nor part of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from accelplug.errors import ShapeError
from accelplug.kernels.chunks import at_once, by_heads

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


LOG2_E = math.log2(math.e)
LEVELS = (2, 4, 8)
"""How many keys a mean may stand for where a block is read by means. Level 1 is exact, level 0 is left to the rest."""


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Which key blocks each query block reads, packed. A kernel that walks lists of them makes its own while it runs.

    Attributes
    ----------
    count, whole : int32 (B|1, H|1, M), how many blocks are read exactly, and how many of those are filled.
    bits : int32 (B|1, H|1, M, ceil(N / 32)), packed: bit ``j % 32`` of word ``j // 32`` says that block j is read exactly.
    taken : like `bits`, the blocks that are not left to the rest: read exactly, by means, or skipped.
    q_len, k_len : int32 (M,) and (N,), tokens that each block holds, at its front.
    block_q, block_k : slots per query and key block.
    level : uint8 (B|1, H|1, M, N) or None. At h = 2, 4 or 8 a block is read as the means of h consecutive slots, each with
        ``log(tokens averaged)`` added to its logit (PSA, arXiv 2512.04025); 0 elsewhere.
    level_count : int32 (B|1, H|1, M, 3), how many blocks have level 2, 4, 8. None with `level`.
    box : token-level window inside the blocks that are read exactly, or None to read them whole.
    causal : the key slot at which query slot 0 stands: query slot i reads no key slot after ``causal + i``. None: it may read all.
    """

    count: Tensor
    whole: Tensor
    bits: Tensor
    taken: Tensor
    q_len: Tensor
    k_len: Tensor
    block_q: int
    block_k: int
    level: Tensor | None = None
    level_count: Tensor | None = None
    box: Box | None = None
    causal: int | None = None

    BY_HEAD: ClassVar = ("count", "whole", "bits", "taken", "level", "level_count")
    """Tensors of the shape (B|1, H|1, ...); with fewer heads of keys, also (B|1, H_kv, ...): the heads that share keys read the same."""

    @classmethod
    def from_members(
        cls,
        members: Tensor,
        q_len: Tensor,
        k_len: Tensor,
        block_q: int,
        block_k: int,
        box: Box | None = None,
        *,
        level: Tensor | None = None,
        skipped: Tensor | None = None,
        causal: int | None = None,
    ) -> BlockPlan:
        """Build a plan from block membership, bool (B|1, H|1, M, N) or (M, N): the blocks that are read exactly.

        Parameters
        ----------
        level : uint8, shaped like `members`, or None; what `members` has is read exactly whatever its level.
        causal : at least 0, the key slot at which query slot 0 stands; then diagonal blocks are members whatever `members` says, and
            those that no query reaches are none.
        skipped : bool (B|1, H|1) or None, heads in which a row without any block gives exactly 0, whatever the rest.

        Raises
        ------
        ShapeError
            If `members` or `level` do not fit `q_len` and `k_len`, a level is not one of 0, 2, 4 and 8 or does not divide
            `block_k`, or a row that holds queries reads no block in a head that is not skipped.
        """
        members = members[None, None] if members.ndim == 2 else members
        level = level[None, None] if level is not None and level.ndim == 2 else level
        for what, x in (("membership", members), ("levels", level)):
            if x is not None and (x.ndim != 4 or x.shape[2:] != (len(q_len), len(k_len))):
                raise ShapeError(
                    f"Block {what} must be (B|1, H|1, M, N) with M={len(q_len)} query and N={len(k_len)} key blocks, "
                    f"got {tuple(x.shape)}. Pass lengths made for the same tiles."
                )
        if level is not None and block_k % max(LEVELS):
            raise ShapeError(f"Blocks read by means need a multiple of {max(LEVELS)} slots, got block_k={block_k}.")
        if causal is not None and (causal < 0 or box is not None):
            raise ShapeError(f"A causal plan begins at a key slot of at least 0, and has no box; got {causal=} and {box=}.")
        return cls._pack(members & (k_len > 0), level, skipped, q_len, k_len, block_q, block_k, box, causal)

    @classmethod
    def _pack(
        cls,
        members: Tensor,
        level: Tensor | None,
        skipped: Tensor | None,
        q_len: Tensor,
        k_len: Tensor,
        block_q: int,
        block_k: int,
        box: Box | None,
        causal: int | None,
    ) -> BlockPlan:
        filled, may = k_len == block_k, k_len > 0
        if causal is not None:
            past, reached = past_and_reached(causal, q_len, k_len, block_q, block_k)
            members = (members & past) | (reached & ~past & may)
            filled, may = filled & past, may & past
        count, whole = (part.sum(-1, dtype=torch.int32) for part in (members, members & filled))
        taken, block_lists, level_count, unknown = (
            members,
            count,
            None,
            torch.zeros((), dtype=torch.bool, device=members.device),
        )
        if level is not None:
            unknown = ~torch.isin(level, torch.tensor([0, *LEVELS], device=level.device)).all()
            level = torch.where(members | ~may, 0, level)  # broadcasts to both
            members, count, whole = (x.expand(*level.shape[:2], *x.shape[2:]) for x in (members, count, whole))
            level_count = torch.stack([(level == h).sum(-1, dtype=torch.int32) for h in LEVELS], -1)
            taken, block_lists = members | (level > 0), count + level_count.sum(-1, dtype=torch.int32)
        empty = block_lists == 0  # [B|1, H|1, M]
        if skipped is not None:
            taken = taken | (empty & skipped[..., None])[..., None]
            empty = empty & ~skipped[..., None]
        empty = (empty & (q_len > 0)).any()
        if not torch.compiler.is_compiling():  # a graph must not wait for a number
            without, wrong = torch.stack([empty, unknown]).tolist()
            if wrong:
                raise ShapeError(f"Levels must be 0, {', '.join(map(str, LEVELS))}. Got others among them.")
            if without:
                raise ShapeError(
                    "A query block that holds tokens reads no key block. Select at least one block for each, or name the "
                    "head in `skipped`."
                )
        if causal is not None:
            taken = taken | ~past
        bits = pack_bits(members)
        packed = bits if taken is members else pack_bits(taken)
        counts = count.contiguous(), whole.contiguous()
        return cls(*counts, bits, packed, q_len, k_len, block_q, block_k, level, level_count, box, causal)

    @property
    def skipped(self) -> Tensor:
        """Heads whose visual rows read nothing and give exactly 0, bool (B|1, H|1): no other row reads nothing."""
        return (self.count if self.level_count is None else self.count + self.level_count.sum(-1))[..., 0] == 0

    @property
    def members(self) -> Tensor:
        """Which blocks are read exactly, bool (B|1, H|1, M, N)."""
        return unpack_bits(self.bits, len(self.k_len))

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels other than exact that blocks may have here."""
        return () if self.level is None else LEVELS

    def at(self, level: int) -> Tensor:
        """Which blocks are read at `level`, bool (B|1, H|1, M, N): 1 exactly, 2, 4, 8 by means, 0 as the rest is."""
        if level == 1:
            return self.members
        if level == 0:
            return ~unpack_bits(self.taken, len(self.k_len)) & (self.k_len > 0)
        return torch.zeros_like(self.members) if self.level is None else self.level == level

    def runs(self, level: int) -> Tensor:
        """Tokens that each mean of `level` stands for, int32 (N * block_k / level,); level 0 has one mean per block."""
        run = level or self.block_k
        start = torch.arange(0, self.block_k, run, device=self.k_len.device)
        return (self.k_len[:, None] - start).clamp(0, run).int().flatten()

    @property
    def key_slots(self) -> int:
        """Length of the padded key sequence, N * block_k."""
        return len(self.k_len) * self.block_k

    def to(self, device: torch.device | str) -> BlockPlan:
        """Return the plan with its tensors on `device`."""
        tensors = {id(x): x if x is None else x.to(device) for x in self.tensors()}  # `taken` may be `bits`
        return BlockPlan.of_tensors([tensors[id(x)] for x in self.tensors()], self.block_q, self.block_k, self.causal)

    def tensors(self) -> list[Tensor | None]:
        """Everything that is a tensor, for `of_tensors`."""
        box = (None, None, None) if self.box is None else (self.box.lo, self.box.hi, self.box.coord)
        packed = (self.count, self.whole, self.bits, self.taken, self.q_len, self.k_len)
        return [*packed, self.level, self.level_count, *box]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Any], block_q: int, block_k: int, causal: int | None = None) -> BlockPlan:
        """Inverse of `tensors`."""
        count, whole, bits, taken, q_len, k_len, level, level_count, lo, hi, coord = tensors
        box = None if lo is None else Box(lo, hi, coord)
        return cls(count, whole, bits, taken, q_len, k_len, block_q, block_k, level, level_count, box, causal)

    def of_heads(self, choice: Tensor) -> BlockPlan:
        """Return a plan whose heads are, one after the other, those that `choice`, int64 (H',), names here."""
        picked = {name: x.index_select(1, choice) for name in self.BY_HEAD if (x := getattr(self, name)) is not None}
        return replace(self, **picked)

    @property
    def past(self) -> Tensor:
        """Blocks that all rows of a query block may read whole, bool (M, N)."""
        if self.causal is None:
            return (self.k_len > 0).expand(len(self.q_len), -1)
        return past_and_reached(self.causal, self.q_len, self.k_len, self.block_q, self.block_k)[0]

    @property
    def pairs(self) -> Tensor:
        """How many (query, key) pairs dense attention reads in each pair of blocks, float64 (M, N)."""
        q_len, k_len = self.q_len.double()[:, None], self.k_len.double()
        if self.causal is None:
            return q_len * k_len
        first, start = (torch.arange(len(n), device=n.device) * b for n, b in ((q_len, self.block_q), (k_len, self.block_k)))
        reach = (
            self.causal + 1 + first[:, None] - start
        ).double()  # keys of the block that its first query reaches, without a bound

        def up_to(last: Tensor) -> Tensor:
            """Sum of max(n, 0) over all n up to `last`."""
            return last.clamp(min=0) * (last.clamp(min=0) + 1) / 2

        def reads(reach: Tensor) -> Tensor:
            return up_to(reach + q_len - 1) - up_to(reach - 1)

        return reads(reach) - reads(reach - k_len)

    def density(self, rest: bool = False) -> Tensor:
        """Keys read as a fraction of the (query, key) pairs of dense attention, float64 (B|1, H|1). A box is not counted: blocks cost.

        A mean counts as one key. With `rest`, so does each block that is left to the rest.
        """
        pairs = self.pairs
        keys = (self.members * pairs).sum(-1)  # [B|1, H|1, M]
        for level in (*self.levels, *((0,) if rest else ())):
            means = (self.runs(level) > 0).view(len(self.k_len), -1).sum(-1).double()
            keys = keys + self.at(level).double() @ means * self.q_len
        return keys.sum(-1) / pairs.sum()

    def dense_mask(self) -> Tensor:
        """Token-level mask, bool (B|1, H|1, M * block_q, N * block_k). For tests and drawings: it holds S x S."""
        mask = self.members.repeat_interleave(self.block_q, -2).repeat_interleave(self.block_k, -1)
        mask = mask & _holds(self.q_len, self.block_q)[:, None] & _holds(self.k_len, self.block_k)
        slots_q, slots_k = (torch.arange(n, device=mask.device) for n in mask.shape[-2:])
        if self.box is not None:
            mask = mask & self.box.allows(slots_q, slots_k)
        return mask if self.causal is None else mask & (slots_k <= self.causal + slots_q[:, None])

    def coarse_reads(self, levels: Sequence[int]) -> Tensor:
        """Which means of `levels`, one level behind the other, each query block reads: bool (B|1, H|1, M, E)."""
        each = [self.at(h).repeat_interleave(self.block_k // (h or self.block_k), -1) & (self.runs(h) > 0) for h in levels]
        return torch.cat(each, -1)

    def block_mask(self, levels: Sequence[int] = (), key_mask: Tensor | None = None) -> BlockMask:
        """Convert to FlexAttention: full where the key block is filled and past and no box applies, partial under one mask_mod else.

        Parameters
        ----------
        levels : what stands behind the keys: the means of these levels, one level behind the other, padded to whole blocks.
        key_mask : bool (B, N * block_k), keys that may be read; then every block of the plan is partial.
        """
        from torch.nn.attention.flex_attention import BlockMask

        members, whole = self.members, self.past & (self.k_len == self.block_k)
        if self.box is not None or key_mask is not None:
            whole = torch.zeros_like(whole)
        full, partial, coarse = members & whole, members & ~whole, None
        if levels:
            coarse = self.coarse_reads(levels)
            coarse = torch.nn.functional.pad(coarse, (0, -coarse.shape[-1] % self.block_k))  # [B|1, H|1, M, E']
            some = coarse.unflatten(-1, (-1, self.block_k)).any(-1)
            partial = torch.cat([partial.expand(*some.shape[:3], -1), some], -1)
            full = torch.nn.functional.pad(full, (0, some.shape[-1])).expand(partial.shape)

        (partial_number, partial_index), (full_number, full_index) = block_lists(partial), block_lists(full)
        return BlockMask.from_kv_blocks(
            partial_number,
            partial_index,
            full_number,
            full_index,
            BLOCK_SIZE=(self.block_q, self.block_k),
            mask_mod=self._mask_mod(key_mask, coarse),
            seq_lengths=(len(self.q_len) * self.block_q, full.shape[-1] * self.block_k),
            compute_q_blocks=False,  # lists by key block: as many again, and only a backward pass reads them
        )

    def _mask_mod(
        self, key_mask: Tensor | None, coarse: Tensor | None
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        k_len, block_q, block_k, slots, box = self.k_len, self.block_q, self.block_k, self.key_slots, self.box
        # A tensor: the number would be compiled into the kernel.
        first = None if self.causal is None else torch.tensor(self.causal, device=k_len.device)
        one_batch, one_head = coarse is None or coarse.shape[0] == 1, coarse is None or coarse.shape[1] == 1

        def in_plan(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            at = torch.where(key < slots, key, 0)
            reads = at % block_k < k_len[at // block_k]
            if key_mask is not None:
                reads = reads & key_mask[b, at]
            if box is not None:
                for axis in range(box.coord.shape[1]):
                    coord = box.coord[at, axis]
                    reads = reads & (coord >= box.lo[row, axis]) & (coord < box.hi[row, axis])
            if first is not None:
                reads = reads & (at <= row + first)
            if coarse is None:
                return reads
            mean = torch.where(key < slots, 0, key - slots)
            by_mean = coarse[b * 0 if one_batch else b, h * 0 if one_head else h, row // block_q, mean]
            return torch.where(key < slots, reads, by_mean)

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
    rule : tau and statistic, where theta is what Sol-Attn makes of them over all key blocks, and no slot is without a token: for a kernel
        that makes it itself.
    """

    theta: Tensor
    band: int
    sink: Tensor
    dense_rows: Tensor
    q_len: Tensor
    k_len: Tensor
    block_q: int
    block_k: int
    rule: tuple[float, str] | None = None

    def tensors(self) -> list[Tensor | None]:
        """Everything that is a tensor, for `of_tensors`."""
        return [self.theta, self.sink, self.dense_rows, self.q_len, self.k_len]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Any], band: int, block_q: int, block_k: int) -> Threshold:
        """Inverse of `tensors`."""
        theta, sink, dense_rows, q_len, k_len = tensors
        return cls(theta, band, sink, dense_rows, q_len, k_len, block_q, block_k)

    def lower(self, q_pool: Tensor, k_pool: Tensor, scale: float) -> BlockPlan:
        """Evaluate the rule on pooled queries (B, H, M, D) and keys (B, H, N, D), both float32."""
        score = (q_pool * (scale * LOG2_E)) @ k_pool.transpose(-1, -2)
        members = ((score > self.theta[..., None]) & (self.q_len > 0)[:, None]) | self.always
        return BlockPlan.from_members(members, self.q_len, self.k_len, self.block_q, self.block_k)

    @property
    def always(self) -> Tensor:
        """Blocks read whatever their score, bool (M, N); a query block without a token reads none."""
        m = torch.arange(len(self.q_len), device=self.sink.device)[:, None] * self.block_q
        j = torch.arange(len(self.k_len), device=self.sink.device)[None] * self.block_k
        reach = self.band * self.block_k
        near = (j < m + self.block_q + reach) & (j + self.block_k > m - reach)
        return (near | self.sink | self.dense_rows[:, None]) & (self.q_len > 0)[:, None]


def past_and_reached(causal: int, q_len: Tensor, k_len: Tensor, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Which key blocks all rows of each query block may read whole, and which some row may read in part: bool (M, N) each.

    `causal` is the key slot at which query slot 0 stands; the others are as in `BlockPlan`.
    """
    first = (
        causal + torch.arange(len(q_len), device=q_len.device)[:, None] * block_q
    )  # where each block's first query stands
    start = torch.arange(len(k_len), device=k_len.device) * block_k
    return start + block_k <= first + 1, start < first + q_len[:, None]


def pool(x: Tensor, lengths: Tensor, block: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean over each block, in float32, divided by its true length.

    Parameters
    ----------
    x : Tensor (B, H, S, D), S at most ``len(lengths) * block``.
    lengths : int32 (N,), tokens at the front of each block.
    valid : bool (B, S), or (B, H, S) where it differs by head, slots that count; None for all.

    Returns
    -------
    mean : float32 (B, H, N, D), 0 where a block is empty.
    number : float32 (B|1, 1, N), or (B, H, N) as `valid` is, tokens averaged.
    """
    blocks, number = len(lengths), counted(lengths, block, valid)
    holds = _with_heads(held_slots(lengths, block, valid))[..., None]

    def mean(x: Tensor, holds: Tensor, number: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x.float(), (0, 0, 0, blocks * block - x.shape[-2]))
        x = x.masked_fill(~holds, 0.0).unflatten(-2, (blocks, block))
        return x.sum(-2) / number.clamp(min=1)[..., None]

    means = [mean(*some) for some in by_heads(len(x) * x.shape[-2] * x.shape[-1], x, holds, number)]
    return torch.cat(means, 1), number


def counted(lengths: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """How many tokens each block holds, of those that `valid` counts: float32 (B|1, 1, N), or (B, H, N) as `valid` is."""
    return _with_heads(held_slots(lengths, block, valid).unflatten(-1, (len(lengths), block)).sum(-1)).float()


def _with_heads(x: Tensor) -> Tensor:
    """(B, S) as (B, 1, S), unless it has heads already."""
    return x if x.ndim == 3 else x[:, None]


def held_slots(lengths: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """Which slots hold a token, of those that `valid`, (B, S) or (B, H, S), counts: bool (B|1, N * block) or (B, H, N * block)."""
    holds = _holds(lengths, block)[None]  # [1, N * block]
    return holds if valid is None else holds & torch.nn.functional.pad(valid, (0, holds.shape[-1] - valid.shape[-1]))


def block_lists(part: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of ``part`` bool (B, H, M, N) has, int32 (B, H, M), and their numbers in front: int32 (B, H, M, N)."""
    index = torch.empty(part.shape, dtype=torch.int32, device=part.device)
    rows = at_once(part.shape[-1])
    for some, into in zip(part.flatten(0, 2).split(rows), index.flatten(0, 2).split(rows), strict=True):
        into.copy_(some.to(torch.uint8).argsort(dim=-1, descending=True, stable=True))
    return part.sum(-1, dtype=torch.int32), index


def pack_bits(members: Tensor) -> Tensor:
    """Pack bool (..., N) into int32 (..., ceil(N / 32)), lowest bit first."""
    words = -(-members.shape[-1] // 32)
    padded = torch.nn.functional.pad(members, (0, words * 32 - members.shape[-1])).unflatten(-1, (words, 4, 8))
    octets = (padded * _powers(members.device)).sum(-1, dtype=torch.uint8)  # one byte a block, not eight
    return (octets.int() << torch.arange(0, 32, 8, device=members.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def unpack_bits(bits: Tensor, number: int) -> Tensor:
    """Inverse of `pack_bits`: bool (..., number)."""
    octets = (bits[..., None] >> torch.arange(0, 32, 8, device=bits.device, dtype=torch.int32)) & 255
    return ((octets.to(torch.uint8)[..., None] & _powers(bits.device)) != 0).flatten(-3)[..., :number]


def _powers(device: torch.device) -> Tensor:
    """Value of each bit of a byte, uint8 (8,)."""
    return 1 << torch.arange(8, device=device, dtype=torch.uint8)


def _holds(lengths: Tensor, block: int) -> Tensor:
    """Which slots hold a token, bool (len(lengths) * block,)."""
    return (torch.arange(block, device=lengths.device) < lengths[:, None]).flatten()
