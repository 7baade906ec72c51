"""Template of sparse prefill: a language model's prompt is read by blocks, which a method selects; its answer is decoded as ever.

A method writes `route`, which looks at queries and keys and names past key blocks. Always read are the block of the query itself
and the blocks of the first (`sink`) and of the last (`local`) tokens before it. What remains is dropped, or read as one key a
block (`rest: pool`).

* Causal: no row reads a key behind it, and no block depends on a later one. Inside of a block, rows choose together.
* Blocks count from each row's own first token: padding on the left moves none. Padding is neither read nor asked.
* Layers with a window of their own are left alone; so are what hybrids have in the place of attention.
* A prompt that is shorter than `min_tokens`, a forward of fewer tokens than a block, and every decode step run the model's own
  attention. No clock decides: with `gate="auto"` too, a prompt runs sparse from `min_tokens` on.
* In chunks of whole blocks it is the whole, but for the chunks before the prompt has `min_tokens`, which run dense.
  Where rows of a batch have padding on the left, blocks of later chunks count from the first slot.
* With `min_mass` each plan is audited: the attention of a few exact rows says what share of it the blocks hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn.functional import pad

from accelplug.call import FULL_ATTENTION
from accelplug.kernels.attention import Backend, block_attention
from accelplug.kernels.past import kept_mass
from accelplug.kernels.plan import BlockPlan, past_and_reached
from accelplug.kernels.rest import Drop, Pool
from accelplug.kernels.spans import says_more
from accelplug.patches.base import Config, Patch, UnimplementedHalf
from accelplug.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Prompt, Site

AUDIT_ROWS = 16
"""Rows of a prompt that an audit looks at: 16 of 8,192 tokens are 1/512 of the products q.k. Ours."""


class PrefillConfig(Config):
    """The keys that all methods of sparse prefill share."""

    block: int = Field(64, ge=8, le=1024, multiple_of=8, description="Tokens per query and key block.")
    sink: int = Field(64, ge=0, description="Tokens at the front that all read. Ours: a block.")
    local: int = Field(128, ge=0, description="Tokens ahead of its own block that a block reads. Ours: two blocks.")
    min_tokens: int = Field(
        4096,
        ge=0,
        description="Shorter prompts run dense. Ours, measured by benchmarks.long_context, two cores: at 2,048 tokens of SmolLM2-135M no "
        "method gains, at 4,096 they take 1.1 to 1.5 times less.",
    )
    rest: Literal["drop", "pool"] = Field(
        "drop", description="What becomes of past blocks that are not selected: dropped, or one mean key and value each."
    )
    min_mass: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="Least share of their attention that 16 exact rows of a head must find in its blocks; a head that has less reads "
        "everything, which is counted. none: nobody looks.",
    )
    backend: Backend = Field(
        "auto", description="Kernel that runs the plan: auto, first, triton, flex, flash, blocked or reference."
    )


@dataclass(frozen=True, eq=False)
class Params:
    """What a call needs to know of its sequence.

    Attributes
    ----------
    valid : bool (B, S), False for padding.
    padded : whether there is any.
    state : what its layers share.
    budget : float32 (H,), what a table says of how much each head reads; None without one.
    """

    valid: Tensor
    padded: bool
    state: dict[str, Any]
    budget: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PromptBlocks:
    """A call by blocks: what a method of sparse prefill sees.

    Attributes
    ----------
    q, k, v : (B, H, P_q, D), (B, H_kv, P_k, D) and (B, H_kv, P_k, D_v).
    held : bool (B|1, P_q), queries that are tokens, not padding.
    reads : bool (B, P_k), keys that are tokens, not padding; None for all.
    scale : factor on q.k.
    causal : the key slot at which query slot 0 stands.
    block : slots per query and key block, M and N of them.
    sink, local : tokens that are always read.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    held: Tensor
    reads: Tensor | None
    scale: float
    causal: int
    block: int
    sink: int
    local: int

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Slots of each query and of each key block, int32 (M,) and (N,)."""

        def of(x: Tensor) -> Tensor:
            start = torch.arange(0, x.shape[-2], self.block, device=x.device)
            return (x.shape[-2] - start).clamp(max=self.block).int()

        return of(self.q), of(self.k)

    @property
    def past(self) -> Tensor:
        """Key blocks that stand wholly ahead of each query block, bool (M, N)."""
        return past_and_reached(self.causal, *self.lengths, self.block, self.block)[0]

    @property
    def forced(self) -> Tensor:
        """Past blocks that are always read, bool (B|1, 1, M, N)."""
        queries, keys = self.lengths
        start = torch.arange(len(keys), device=keys.device) * self.block
        first = self.causal + torch.arange(len(queries), device=keys.device)[:, None] * self.block
        near = start + self.block > first - self.local  # [M, N]
        if self.reads is None:
            return (self.past & (near | (start < self.sink)))[None, None]
        front = self.reads & (self.reads.cumsum(-1) <= self.sink)
        front = pad(front, (0, len(keys) * self.block - front.shape[-1])).unflatten(-1, (-1, self.block)).any(-1)
        return (self.past & (near | front[:, None]))[:, None]

    @property
    def candidates(self) -> Tensor:
        """Past blocks that a method has the choice of, bool (B|1, 1, M, N): not those that are read anyway, or hold padding alone."""
        some = self.past & ~self.forced
        if self.reads is None:
            return some
        width = len(self.lengths[1]) * self.block
        return (
            some & pad(self.reads, (0, width - self.reads.shape[-1])).unflatten(-1, (-1, self.block)).any(-1)[:, None, None]
        )

    def last(self, rows: int) -> Tensor:
        """Past blocks of the query blocks that hold one of the last `rows` tokens, bool (B|1, 1, M, N)."""
        number = self.held.sum(-1, keepdim=True)  # [B|1, 1]: tokens stand in front
        end = (torch.arange(len(self.lengths[0]), device=number.device) + 1) * self.block
        return (torch.minimum(end, number) > number - rows)[:, None, :, None] & self.past

    def plan(self, members: Tensor) -> BlockPlan:
        """Make a plan from the past blocks that are selected, bool (B|1, H|H_kv|1, M, N): what is always read is read too."""
        return BlockPlan.from_members(members | self.forced, *self.lengths, self.block, self.block, causal=self.causal)


class Prefill(Patch):
    """Template of sparse prefill; a method writes `route`."""

    Config: ClassVar[type[Config]] = PrefillConfig
    family = "prefill"
    writes: ClassVar[tuple[str, ...]] = ("route",)
    needs = frozenset({"probabilities"})
    about_images = False
    knob: ClassVar[str] = ""
    """The setting of how much is read that may be a table, if there is one: `route` is then told a head's value as ``budget``."""
    config: PrefillConfig

    def neutral(self) -> bool:
        """Whether this config reads all: then prompts run dense, bit for bit."""
        return False

    def route(self, blocks: PromptBlocks, budget: Tensor | None = None) -> BlockPlan:
        """Return the key blocks that each query block reads: ``blocks.plan`` turns membership into what this returns."""
        raise UnimplementedHalf(type(self), "route")

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Params | None:
        tokens, few = layout.image.shape[1], max(self.config.block, 2)
        if clock.phase != "prefill" or self.neutral() or tokens < self.config.min_tokens or tokens - layout.past < few:
            return None
        if site.layer_type != FULL_ATTENTION:
            return None
        table = getattr(self.config, self.knob, None)
        budget = table.at(site, clock).float().to(layout.valid.device) if isinstance(table, Table) else None
        return Params(layout.valid, layout.padded, state, budget)

    def declines(self, call: AttentionCall, params: Params) -> str | None:
        place = call.place
        if place is None or not place.causal:
            return "its rows read what stands behind them"
        if place.window is not None or place.first_key:
            return "the layer reads a window of its own"
        if call.mask is None or call.mask.ndim == 2:
            return None
        seen = (call.mask.data_ptr(), call.mask.shape, place.first_query)
        known = params.state.setdefault("forward", {})
        if seen not in known:  # all layers are given the same
            known[seen] = says_more(call.mask, params.valid, place.first_query)
        return (
            "the model's mask is not that of causal attention: several sequences in a row, or one of its own"
            if known[seen]
            else None
        )

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        blocks, back = self._laid_out(call, params)
        rest = Pool() if self.config.rest == "pool" else Drop()
        plan = self.route(blocks, params.budget)
        if self.config.min_mass is not None:
            plan = self._audited(blocks, plan, call, self.config.min_mass)
        tensors: Any = {"key_mask": blocks.reads, "scale": blocks.scale, "backend": self.config.backend}
        out = block_attention(blocks.q, blocks.k, blocks.v, plan, rest=rest, **tensors)
        return out if back is None else _rows(out, back)

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, BlockPlan]:
        plan = self.route(self._laid_out(call, params)[0], params.budget)
        return float(plan.density(rest=self.config.rest == "pool").mean()), plan

    def kept(self, call: AttentionCall, params: Params, plan: BlockPlan | None) -> Tensor | None:
        return None if plan is None else self._kept(self._laid_out(call, params)[0], plan)

    def _kept(self, blocks: PromptBlocks, plan: BlockPlan) -> Tensor:
        return kept_mass(blocks.q, blocks.k, plan, AUDIT_ROWS, blocks.scale, blocks.held, blocks.reads)

    def _audited(self, blocks: PromptBlocks, plan: BlockPlan, call: AttentionCall, least: float) -> BlockPlan:
        """A plan in which heads that keep less than `least` read everything; heads that share a list are one."""
        kept = self._kept(blocks, plan)  # [B, H]
        below = kept < least
        if call.audited is not None:
            call.audited(kept, below)
        if not bool(below.any()):
            return plan
        heads = plan.count.shape[1]
        some = below.unflatten(1, (heads, -1)).any(2)[..., None, None]
        return blocks.plan(plan.members & blocks.past | some & blocks.past)

    def _laid_out(self, call: AttentionCall, params: Params) -> tuple[PromptBlocks, Tensor | None]:
        """The call by blocks, and which of its slots each row of the output is, int64 (B, S_q), where they were moved."""
        assert call.place is not None
        tokens, causal, back = params.valid.shape[1], call.place.first_query, None
        q, k, v, valid = call.q, call.k[:, :, :tokens], call.v[:, :, :tokens], params.valid.to(call.q.device)
        if params.padded and not causal:  # each row begins with its first token
            slot = torch.arange(tokens, device=q.device)
            shift = valid.int().argmax(-1, keepdim=True)
            there, back = (slot + shift) % tokens, (slot - shift) % tokens
            q, k, v, valid = _rows(q, there), _rows(k, there), _rows(v, there), valid.gather(1, there)
        held, reads = valid[:, causal : causal + q.shape[2]], valid if params.padded else None
        config = self.config
        sizes = (call.scale, causal, config.block, config.sink, config.local)
        return PromptBlocks(q, k, v, held, reads, *sizes), back


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, H, S, D) by an index (B, S)."""
    return x.take_along_dim(index[:, None, :, None], 2)
