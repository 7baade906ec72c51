"""Block attention by gathering: the keys of many query blocks at a time, through batched matrix products. Needs no compiler.

Query blocks that read about as many keys go together, so many at a time that what is gathered for them stays in the caches. What of it
needs no mask by token has none. Logits are float32. On a CPU, ``exp2`` takes a tenth of the time of ``exp``, which is left to MKL, and
batches are multiples of the number of threads, which share them out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accelplug.kernels import chunks
from accelplug.kernels.plan import LOG2_E, BlockPlan
from accelplug.kernels.rest import Coarse

GATHERED = 1 << 21
"""Most numbers that are gathered and computed at a time, 8 MiB in float32. Ours: with half as many, calls of torch take their share."""

PAIRS = 1 << 18
"""Most pairs of blocks whose lists are made at a time."""

SLACK = 1 / 8
"""Query blocks go together that read so many more keys at most than the first of them, in shares of its own."""


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
    call = _Call(q, k, v, plan, coarse, key_mask)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = torch.full(q.shape[:-1], -torch.inf, device=q.device) if return_lse else None
    scratch = _Scratch()
    for piece in call.pieces():
        heads = piece.owner[:, None] * call.together + torch.arange(call.together, device=q.device)  # of queries, [G, t]
        queries = call.q.take(heads, piece.slots[:, None].clamp(max=q.shape[-2] - 1)).flatten(1, 2).float()
        answer, log = _attention(queries.mul_(scale * LOG2_E), piece.owner, list(call.parts(piece)), scratch)
        at = heads[..., None] * q.shape[-2] + piece.slots[:, None]
        held = (piece.slots < q.shape[-2])[:, None].expand_as(at)  # the last block may have fewer slots
        out.view(-1, v.shape[-1]).index_copy_(0, at[held], answer.view(*at.shape, -1)[held].to(out.dtype))
        if lse is not None:
            lse.view(-1).index_copy_(0, at[held], log.view(at.shape)[held])
    return out, lse


class _Scratch:
    """Memory that piece after piece takes: asked for anew, it would go back to the system each time, and come with page faults."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def of(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return memory of that name and shape, in the dtype of `like`, with anything in it."""
        number, held = math.prod(shape), self._held.pop(name, None)
        if held is None or held.numel() < number or held.dtype != like.dtype:
            held = None  # given back first
            held = like.new_empty(number)
        self._held[name] = held
        return held[:number].view(shape)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of a tensor (B, H, S, D) where they lie.

    Attributes
    ----------
    table : (R, D), what lies from the first row to the last.
    first : int64 (B * H,), where each head begins.
    step : rows from token to token.
    """

    table: Tensor
    first: Tensor
    step: int

    @classmethod
    def of(cls, x: Tensor, heads: int) -> _Rows:
        """Without a copy, if rows lie at multiples of their width. Each head counts for as many as make `heads` of them."""
        width = x.shape[-1]
        if x.stride(-1) != 1 or any(step % width for step, size in zip(x.stride(), x.shape[:3], strict=False) if size > 1):
            x = x.contiguous()
        steps = [step // width if size > 1 else 0 for step, size in zip(x.stride(), x.shape[:3], strict=False)]
        rows = 1 + sum((size - 1) * step for size, step in zip(x.shape, steps, strict=False))
        batch, head = (torch.arange(n, device=x.device) for n in (len(x), heads))
        first = batch[:, None] * steps[0] + head // (heads // x.shape[1]) * steps[1]
        return cls(x.as_strided((rows, width), (width, 1)), first.flatten(), steps[2])

    def take(self, owner: Tensor, slots: Tensor) -> Tensor:
        """Return slots, int64 (..., n), of heads `owner`, int64 (...) in B * H: (..., n, D)."""
        return self.take_into(_Scratch(), owner, slots)

    def take_into(self, scratch: _Scratch, owner: Tensor, slots: Tensor) -> Tensor:
        """`take`, into memory that the next rows take too."""
        at = self.first[owner][..., None] + slots * self.step
        into = scratch.of("rows", self.table, at.numel(), self.table.shape[1])
        return torch.index_select(self.table, 0, at.flatten(), out=into).view(*at.shape, -1)


@dataclass(frozen=True, eq=False)
class _Lists:
    """Lists of different lengths: `index`, int64 (G, n), and how many of each are its own, int64 (G,); behind them stands 0."""

    index: Tensor
    number: Tensor

    @classmethod
    def of(cls, read: Tensor) -> _Lists:
        """Of where `read`, bool (G, N), is true."""
        number = read.sum(-1)
        listed = torch.arange(int(number.max()), device=read.device) < number[:, None]
        index = torch.zeros(listed.shape, dtype=torch.int64, device=read.device)
        return cls(index.masked_scatter_(listed, read.nonzero()[:, 1]), number)

    def at(self, rows: Tensor) -> _Lists:
        """Some of them, no longer than they need be."""
        number = self.number[rows]
        return _Lists(self.index[rows, : int(number.max())], number)

    @property
    def own(self) -> Tensor | None:
        """Which entries are a list's own, bool (G, n); None where all are."""
        if bool((self.number == self.index.shape[1]).all()):
            return None
        return torch.arange(self.index.shape[1], device=self.index.device) < self.number[:, None]


@dataclass(frozen=True, eq=False)
class _Piece:
    """Query blocks that go together, and what each reads.

    Attributes
    ----------
    owner : int64 (G,), their heads, by place in (B, H / t): t heads go together.
    slots : int64 (G, block_q), their query slots.
    whole, cut, means : blocks of which all slots are read, blocks of which a mask says what is, and coarse keys.
    """

    owner: Tensor
    slots: Tensor
    whole: _Lists
    cut: _Lists
    means: _Lists


@dataclass(frozen=True, eq=False)
class _Part:
    """Keys of a piece.

    Attributes
    ----------
    keys, values : where they are from.
    slots : int64 (G, n), which ones.
    bias : float32 (G, 1|t * block_q, n), what is added to their logits, which are binary; None for nothing.
    """

    keys: _Rows
    values: _Rows
    slots: Tensor
    bias: Tensor | None


class _Call:
    """A call, to be taken piece by piece.

    Attributes
    ----------
    together : query heads that read the same keys; `heads` of such groups there are.
    width : slots of key blocks, up to the last that holds a token in any of them.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, coarse: Coarse | None, key_mask: Tensor | None
    ) -> None:
        self.plan, self.coarse, self.key_mask = plan, coarse, key_mask
        alike = plan.bits.shape[1] <= k.shape[1] and (coarse is None or coarse.bias.shape[1] <= k.shape[1])
        self.together = q.shape[1] // k.shape[1] if alike else 1
        self.batch, self.heads = len(q), q.shape[1] // self.together
        self.slots_k, self.width = k.shape[-2], int(plan.k_len.max())
        self.q, self.k, self.v = _Rows.of(q, q.shape[1]), _Rows.of(k, self.heads), _Rows.of(v, self.heads)
        if coarse is not None:
            bias = coarse.bias[..., None].expand(self.batch, -1, -1, -1)
            self.coarse_k, self.coarse_v, self.bias = (_Rows.of(x, self.heads) for x in (coarse.k, coarse.v, bias))

    def pieces(self) -> Iterator[_Piece]:
        """The query blocks that hold queries and read something."""
        plan, blocks, levels = self.plan, len(self.plan.q_len), () if self.coarse is None else self.coarse.levels
        shape = plan.bits.shape[:3]
        own = torch.arange(math.prod(shape), device=plan.bits.device).view(shape)
        own = own.repeat_interleave(self.heads // shape[1], 1).expand(self.batch, -1, -1).flatten()
        uncut = plan.past & (plan.k_len == self.width)  # [M, N]
        if self.key_mask is not None or plan.box is not None:
            uncut = torch.zeros_like(uncut)
        filled = (plan.q_len > 0).repeat(self.batch * self.heads).nonzero()[:, 0]
        for rows in filled.split(max(min(PAIRS, chunks.CHUNK) // len(plan.k_len), 1)):
            some, may = _plan_of(plan, own[rows]), uncut[rows % blocks]
            read = some.members[0, 0]
            coarse_read = some.coarse_reads(levels)[0, 0] if levels else read[:, :0]
            lists = [_Lists.of(part) for part in (read & may, read & ~may, coarse_read)]
            keys, order = ((lists[0].number + lists[1].number) * self.width + lists[2].number).sort(stable=True)
            numbers = keys.tolist()
            first = bisect_right(numbers, 0)  # heads that are skipped read nothing
            while first < len(numbers):
                alike = bisect_right(numbers, numbers[first] * (1 + SLACK))
                here = order[first : min(first + self._at_once(numbers[first]), alike)]
                first += len(here)
                owner, block = rows[here] // blocks, rows[here] % blocks
                slots = block[:, None] * plan.block_q + torch.arange(plan.block_q, device=rows.device)
                yield _Piece(owner, slots, *(part.at(here) for part in lists))

    def _at_once(self, keys: int) -> int:
        """How many query blocks go at a time that read so many keys each: a multiple of the number of threads, if memory allows."""
        axes = 0 if self.plan.box is None else self.plan.box.coord.shape[1]
        each = keys * (self.k.table.shape[1] + self.v.table.shape[1] + self.plan.block_q * (self.together + axes))
        number, threads = min(GATHERED, chunks.CHUNK) // each, torch.get_num_threads()
        return number - number % threads or max(min(chunks.CHUNK // each, threads), 1)

    def parts(self, piece: _Piece) -> Iterator[_Part]:
        """What a piece reads."""
        place = torch.arange(self.width, device=piece.owner.device)
        for lists in (piece.whole, piece.cut):
            if not lists.index.shape[1]:
                continue
            own, slots = lists.own, lists.index[..., None] * self.plan.block_k + place  # [G, n, width]
            reads = None if own is None else own[..., None].expand(slots.shape).flatten(1)[:, None]
            slots = slots.flatten(1)
            if lists is piece.cut:
                inside = self._inside(piece, lists.index, slots)
                reads = inside if reads is None else reads & inside
                slots = slots.clamp(max=self.slots_k - 1)
            yield _Part(self.k, self.v, slots, None if reads is None else torch.where(reads, 0.0, -torch.inf))
        means = piece.means
        if means.index.shape[1]:
            bias = self.bias.take(piece.owner, means.index).mT * LOG2_E  # [G, 1, n]
            bias = bias if (own := means.own) is None else bias.masked_fill(~own[:, None], -torch.inf)
            yield _Part(self.coarse_k, self.coarse_v, means.index, bias)

    def _inside(self, piece: _Piece, blocks: Tensor, slots: Tensor) -> Tensor:
        """Which slots, int64 (G, n), of blocks that are cut are read by each query: bool (G, 1|t * block_q, n)."""
        place = torch.arange(self.width, device=slots.device)
        inside = (place < self.plan.k_len[blocks][..., None]).flatten(1)[:, None]
        if self.key_mask is not None:
            seen = self.key_mask[(piece.owner // self.heads)[:, None], slots.clamp(max=self.slots_k - 1)]
            inside = inside & seen[:, None]
        if self.plan.causal is not None:
            inside = inside & (slots[:, None] <= self.plan.causal + piece.slots[..., None])
        if self.plan.box is not None:
            inside = inside & self.plan.box.allows(piece.slots, slots)
        return inside if inside.shape[1] == 1 else inside.repeat(1, self.together, 1)


def _plan_of(plan: BlockPlan, rows: Tensor) -> BlockPlan:
    """A plan of one head whose query blocks are those that `rows`, int64 (G,), names in (B|1, H|1, M)."""
    picked = {name: x.flatten(0, 2)[rows][None, None] for name in plan.BY_HEAD if (x := getattr(plan, name)) is not None}
    return replace(plan, **picked)


def _attention(queries: Tensor, owner: Tensor, parts: list[_Part], scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """Attention over all parts: (G, n_q, D_v), and the natural log-sum-exp, (G, n_q). Queries, float32, have scale and log2(e) in them."""
    # Each part on its own: torch goes batch entry by batch entry where a product is written into a slice.
    logits: list[Tensor] = []
    for part in parts:
        keys = part.keys.take_into(scratch, owner, part.slots).float()
        product = scratch.of(f"logits {len(logits)}", queries, *queries.shape[:2], keys.shape[1])
        logits.append(torch.bmm(queries, keys.mT, out=product))
        del keys
        if part.bias is not None:
            product += part.bias
    top = torch.stack([x.amax(-1, keepdim=True) for x in logits]).amax(0)
    top.clamp_(min=torch.finfo(torch.float32).min)  # -inf where a row has no key
    weights = [x.sub_(top).exp2_() for x in logits]
    total = torch.stack([x.sum(-1, keepdim=True) for x in weights]).sum(0)
    log = top.add_(total.log2()).mul_(math.log(2))[..., 0]
    total.clamp_(min=torch.finfo(torch.float32).tiny)
    halves = parts[0].values.table.dtype != torch.float32
    out = None
    for part, weight in zip(parts, weights, strict=True):
        values = part.values.take_into(scratch, owner, part.slots)
        # Halves are rounded once, to the dtype of the values.
        more = torch.bmm(weight.div_(total).to(values.dtype) if halves else weight, values)
        out = more if out is None else out.add_(more)
    assert out is not None
    return out if halves else out.div_(total), log
