"""Templates of the block-sparse methods: order, select, run the kernel, un-order.

A method that selects by the layout is a `BlockSparse` and writes `select`; one that looks at queries and keys is a `Scored` and writes
`route`. A key block that is not selected is treated as `rest` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch.nn.functional import pad

from accelplug.bounded import Bounded
from accelplug.errors import ShapeError
from accelplug.kernels.attention import Backend, block_attention, measure_choice
from accelplug.kernels.clusters import cluster_order, cluster_tiles
from accelplug.kernels.importance import sampled_mass
from accelplug.kernels.memory import COLD, Memory
from accelplug.kernels.orders import Order, Tiles, tiles
from accelplug.kernels.plan import LEVELS, BlockPlan, Box, Threshold, counted, pool
from accelplug.kernels.precision import Precision, ValuePrecision
from accelplug.kernels.rectify import rectify
from accelplug.kernels.repair import Probes, block_rows, probe_rows, repair_, step_of
from accelplug.kernels.rest import Drop, Linear, Pool, Rectified, Representative, Rest, Slope, Tied
from accelplug.kernels.reuse import KeptPlan, Reuse, kept, packed, recalled, unpacked
from accelplug.patches.base import Config, Patch, Positive, UnimplementedHalf
from accelplug.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Layout, Site


RestKind = Literal["drop", "pool", "linear", "rectified", "tied"]
"""Names of what may become of the key blocks that are not selected; see `kernels.rest`, `kernels.linear` and `kernels.rectify`."""
WEIGHTED_RESTS = ("pool", "linear")
"""Rests in which a block is read as one key, whose weight `rest_weight` says."""
RepairKind = Literal["none", "output", "output_query"]
"""What the error of all this is regressed on, if it is repaired; see `kernels.repair`."""


class BlockConfig(Config):
    """The keys that all block-sparse methods share."""

    block: int = Field(128, ge=8, le=1024, multiple_of=8, description="Slots per query block.")
    block_k: int | None = Field(None, ge=8, le=1024, multiple_of=8, description="Slots per key block; as `block` if none.")
    rest: RestKind = Field("drop", description="What becomes of the key blocks that are not selected.")
    rest_weight: Annotated[float, Field(ge=0.0, le=1.0)] | Table = Field(
        1.0,
        description="Factor on log(length) of a pooled block (rest: pool or linear), or a table (layers, heads) of them.",
    )
    representative: Representative = Field(
        "mean", description="What a pooled block is read as: mean, centre, or centre_k_mean_v (rest: pool)."
    )
    slope: Slope = Field(
        "mass", description="Mean over blocks that the first-order term has: mass (ours), or keys, as PISA (rest: linear)."
    )
    rest_gain: bool = Field(
        True, description="Whether blocks that are not worth a pooled key are left out (rest: rectified)."
    )
    repair: RepairKind = Field(
        "none",
        description="What the error of exact rows is regressed on, to be taken off all: output (SparsePR), or output_query (ours).",
    )
    probes: float = Field(
        0.0625,
        gt=0.0,
        le=65536,
        description="Rows of a head that are exact (repair): a number, as SparsePR's 64, or below 1 a share of visual ones (ours).",
    )
    ridge: float = Field(
        5.0, gt=0.0, description="Rows without error that the prior counts for (repair). Ours; SparsePR has 0.1."
    )
    carry: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="Weight of the last step's probes in this one's regression, by squares for the one before (repair); 0 for none. Ours.",
    )
    precision: Precision = Field(
        "native", description="Of q.k where it is exact: native, int8 or fp8, keys smoothed. Only Triton is faster for it."
    )
    values: ValuePrecision = Field(
        "native", description="Of p.v where it is exact: native, or int8, by rows of tiles. PAROAttention, tiles finer."
    )
    backend: Backend = Field(
        "auto",
        description="Kernel that runs the plan: auto, first, triton, flex, flash, blocked, reference, or, untried, cudnn or sol.",
    )

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        if self.block % self.key_block and self.key_block % self.block:
            raise ValueError(f"one of block {self.block} and block_k {self.block_k} must divide the other")
        return self

    @property
    def key_block(self) -> int:
        """Slots per key block."""
        return self.block_k or self.block

    @property
    def unit(self) -> int:
        """Slots that hold whole query blocks and whole key blocks."""
        return max(self.block, self.key_block)


class TiledConfig(BlockConfig):
    """The keys of methods whose blocks may be tiles of the grid."""

    tile_thw: tuple[Positive, Positive, Positive] | None = Field(None, description="Frames, rows and columns of a tile.")

    @model_validator(mode="after")
    def _tile_fits(self) -> Self:
        if self.tile_thw and math.prod(self.tile_thw) > self.unit:
            raise ValueError(
                f"tile_thw {self.tile_thw} holds {math.prod(self.tile_thw)} tokens, more than {self.unit}, the larger of the two blocks"
            )
        return self


class OrderedConfig(TiledConfig):
    """The keys of methods that take tokens in any order of the grid."""

    order: Order = Field("raster", description="How visual tokens line up in blocks.")
    tile_thw: tuple[Positive, Positive, Positive] | None = Field(
        None, description="Frames, rows and columns of a tile (order: tile); none: the one that cuts the grid into fewest."
    )


class ScoredConfig(OrderedConfig):
    """The keys that all methods share that select by scores: the order may be found in queries and keys too."""

    order: Order | Literal["kmeans"] = Field(  # type: ignore[assignment]  # a wider choice of a value that is only read
        "raster", description="How visual tokens line up in blocks; kmeans: alike ones together, found in every call."
    )
    query_clusters: int | None = Field(
        None, ge=2, description="Clusters of queries (order: kmeans); none: 300 for 75,600 tokens, and in proportion. SVG2."
    )
    key_clusters: int | None = Field(
        None, ge=2, description="Clusters of keys (order: kmeans); none: 1,000 for 75,600 tokens, and in proportion. SVG2."
    )
    cluster_iterations: int = Field(50, ge=0, description="Iterations of k-means in the first step (order: kmeans). SVG2.")
    cluster_iterations_warm: int = Field(
        2, ge=0, description="Iterations of k-means in a later step, from the centres of the last one (order: kmeans). SVG2."
    )
    reuse_steps: int = Field(
        1, ge=1, description="Consecutive steps that share the plan of blocks that the first of them makes. Ours."
    )


@dataclass(frozen=True, eq=False)
class BlockParams:
    """What a block-sparse `attend` needs.

    Attributes
    ----------
    tiles : how tokens line up.
    plan : which key blocks are read, or None where that depends on the scores.
    where : what else `route` is told: plain values that the plan depends on beside the layout, and tensors made of both.
    tickets : of the `Memory` of query and of key clusters (order: kmeans), int64 () on the CPU.
    rest_weight : float32 (H,), factors on log(length) of pooled blocks, where they stand in a table.
    reuse : whether the plan is kept for the next steps, or recalled, and where (reuse_steps above 1).
    """

    tiles: Tiles
    plan: BlockPlan | None
    where: Mapping[str, Any] = field(default_factory=dict)
    tickets: tuple[Tensor, Tensor] = (COLD, COLD)
    rest_weight: Tensor | None = None
    reuse: Reuse | None = None

    def to(self, device: torch.device | str) -> BlockParams:
        """Return the params with their tensors on `device`."""
        where = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in self.where.items()}
        weight = None if self.rest_weight is None else self.rest_weight.to(device)
        plan = self.plan and self.plan.to(device)
        return replace(self, tiles=self.tiles.to(device), plan=plan, where=where, rest_weight=weight)

    def within(self, budget: Tensor | None) -> BlockParams:
        """Return the params with how much each head reads, float32 (H,), in the units of the method's `BlockSparse.knob`."""
        return self if budget is None else replace(self, where={**self.where, "budget": budget})


@dataclass(frozen=True, eq=False)
class OncePerDevice:
    """Tensors of a layout that many calls share: a copy on each device is made once. A subclass writes `moved`."""

    _copies: dict[torch.device, Self] = field(default_factory=dict, init=False, repr=False)

    def moved(self, device: torch.device) -> Self:
        """Return a copy with its tensors on `device`."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Self:
        """Return the copy on `device`, the same one for all who ask."""
        device = torch.device(device)
        if device not in self._copies:
            self._copies[device] = self.moved(device)
        return self._copies[device]


class BlockSparse(Patch):
    """Template of the block-sparse methods: order, select, run the kernel, un-order.

    A subclass writes `select`, and `order` where tokens do not lie in raster order. The plan depends on the layout alone and
    is made once. A method whose plan also depends on the site or the clock overrides `prepare` to end in
    ``self.weighted(self.params(layout, axis=site.layer % 3), site, clock)``: `order` and `select` are then told ``axis``.
    Methods that look at queries and keys are `Scored`.
    """

    Config: ClassVar[type[Config]] = BlockConfig
    family = "sparse"
    writes: ClassVar[tuple[str, ...]] = ("select",)
    knob: ClassVar[str] = ""
    """The setting of how much is read that may be a table, if there is one: `route` is then told a head's value as ``budget``."""
    rungs: ClassVar[tuple[float, ...]] = ()
    """Values of it that a calibration of budgets tries, whatever their order."""
    config: BlockConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._prepared: Bounded[tuple, BlockParams] = Bounded(16)
        self._weighted: Bounded[tuple, tuple[BlockParams, BlockParams]] = Bounded(256)

    def neutral(self, layout: Layout) -> bool:
        """Whether this config reads every key of `layout`: then the call runs dense, bit for bit."""
        return False

    def order(self, layout: Layout, **where: Any) -> Tiles:
        """Return how tokens line up in blocks; raster by default."""
        return tiles(layout, "raster", self.config.unit)

    def select(self, tiles: Tiles, **where: Any) -> BlockPlan:
        """Return the blocks, of ``config.unit`` slots, that each reads: `plan` turns membership into what this returns."""
        raise UnimplementedHalf(type(self), "select")

    def plan(self, members: Tensor, tiles: Tiles, box: Box | None = None, skipped: Tensor | None = None) -> BlockPlan:
        """Make a plan from membership of units, bool (..., U, U): text is read by all rows, and reads all.

        `skipped`, bool (B|1, H|1): heads whose visual rows read nothing and give 0, text neither.
        """
        block, block_k, unit = self.config.block, self.config.key_block, self.config.unit
        members = members.repeat_interleave(unit // block, -2).repeat_interleave(unit // block_k, -1)
        return _text_dense(members, tiles, tiles, block, block_k, box, skipped=skipped)

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> BlockParams | None:
        return None if self.neutral(layout) else self.weighted(self.params(layout), site, clock)

    def params(self, layout: Layout, **where: Any) -> BlockParams:
        """Return the params of a layout, made once for each ``where``, whose values must be hashable."""
        return self._prepared.get((layout, *where.items()), lambda: self._params(layout, where))

    def _params(self, layout: Layout, where: dict[str, Any]) -> BlockParams:
        tiles = self.order(layout, **where)
        return BlockParams(tiles, self.select(tiles, **where), where)

    def weighted(self, params: BlockParams, site: Site, clock: Clock) -> BlockParams:
        """Return the params with what tables have for a layer's heads now, where there are such tables."""
        weight, budget = self.rest_weights(site, clock), self.budgets(site, clock)
        if weight is None and budget is None:
            return params
        # The originals are kept beside the weighted ones, so that an id stays theirs.
        key = (id(params), *(None if x is None else tuple(x.tolist()) for x in (weight, budget)))
        return self._weighted.get(key, lambda: (params, replace(params.within(budget), rest_weight=weight)))[1]

    def rest_weights(self, site: Site, clock: Clock) -> Tensor | None:
        """Return what a table of weights says here and now, float32 (H,), or None without one."""
        table = self.config.rest_weight
        return table.at(site, clock).float() if isinstance(table, Table) and self.config.rest in WEIGHTED_RESTS else None

    def budgets(self, site: Site, clock: Clock) -> Tensor | None:
        """Return what a table of budgets says here and now, float32 (H,), or None without one."""
        table = getattr(self.config, self.knob, None)
        return table.at(site, clock).float() if isinstance(table, Table) else None

    def allowed(self, budget: Tensor | None, axes: int = 1) -> float | Tensor:
        """Return how much may be read: one value for all heads, or float32 (H, 1, ...) with so many `axes` of length 1."""
        return getattr(self.config, self.knob) if budget is None else budget[(..., *[None] * axes)]

    def attend(self, call: AttentionCall, params: BlockParams) -> Tensor:
        blocks, plan = self.laid_out(call, params)
        arguments, q_tiles, probes = self._arguments(blocks, plan, params), blocks.q_tiles, blocks.probes
        del blocks
        out = block_attention(**arguments)
        del arguments  # with it go q, k and v in block order: the output is put back without them
        return self.repaired(q_tiles.unpermute(out), call, q_tiles, plan, *probes)

    def repaired(
        self,
        out: Tensor,
        call: AttentionCall,
        tiles: Tiles,
        plan: BlockPlan | Threshold | None = None,
        probes: Probes | None = None,
    ) -> Tensor:
        """Return the output (B, H, S, D_v) of a call with its error repaired in place, as the config says; an own `attend` ends in it.

        `probes`: rows that are known exactly already; None: the config says how many are computed.
        """
        probes = self._probes(call, tiles) if probes is None else probes
        if probes is None:
            return out
        # Tokens that come in order already have their visual ones in front.
        first = 0 if tiles.applied else tiles.layout.text_before
        visual = slice(first, first + tiles.layout.visual)
        skipped = plan.skipped if isinstance(plan, BlockPlan) else None
        left, whole = repair_(
            out,
            call.q,
            probes,
            visual,
            on_query=self.config.repair == "output_query",
            ridge=self.config.ridge,
            carry=self.config.carry,
            ticket=self._ticket(call),
            skipped=skipped,
        )
        if call.error is not None:
            call.error.copy_(left.norm() / whole.norm().clamp(min=1e-12))
        return out

    def _probes(self, call: AttentionCall, tiles: Tiles) -> Probes | None:
        number = self.probed(tiles.layout, call)
        if number == 0:
            return None
        step = step_of(call.q, self._ticket(call))
        rows = probe_rows(tiles.layout.text_before, tiles.layout.visual, number, call.q.device, step)
        rows = tiles.slot_of_token()[rows] if tiles.applied else rows
        mask = None if call.mask is None else call.mask[:, None, None]
        return Probes(rows, call.dense(q=call.q[..., rows, :], attn_mask=mask))

    def _ticket(self, call: AttentionCall) -> Tensor:
        """Where a call finds what the last step's left, if it takes any of it."""
        return COLD if call.ticket is None or not self.config.carry else call.ticket

    @property
    def estimates(self) -> bool:
        """Whether an estimate of the error comes with the output: where it is repaired."""
        return self.config.repair != "none"

    @property
    def asked_probes(self) -> float:
        """How many rows of a head are to be exact: a share of the visual ones, or from 1 on a number."""
        return self.config.probes

    @property
    def repairs(self) -> str:
        """How the error is repaired, in words."""
        config = self.config
        if config.repair == "none":
            return ""
        return f"{config.repair}, {self.exact_rows} exact, carry {config.carry:g}"

    @property
    def exact_rows(self) -> str:
        """Which rows of a head are computed exactly, in words."""
        probes = self.config.probes
        return f"{probes:g} rows" if probes >= 1 else f"{probes:.3g} of the rows"

    def probed(self, layout: Layout, call: AttentionCall) -> int:
        """Return how many rows of each head are probed; 0 where it does not pay (more than half of them would be) or says nothing (one)."""
        if self.config.repair == "none":
            return 0
        features = call.v.shape[-1] + (call.q.shape[-1] if self.config.repair == "output_query" else 0)
        asked = self.asked_probes if self.asked_probes >= 1 else max(self.asked_probes * layout.visual, 2 * features)
        number = round(asked)
        return number if 2 <= number <= layout.visual // 2 else 0

    def choose_backend(self, call: AttentionCall, params: BlockParams) -> None:
        if self.config.backend == "auto":
            measure_choice(**self._arguments(*self.laid_out(call, params), params))

    def inspect(self, call: AttentionCall, params: BlockParams) -> tuple[float, BlockPlan]:
        plan = self.planned(call, params)
        return float(self.costs(plan).mean()), plan

    def planned(self, call: AttentionCall, params: BlockParams) -> BlockPlan:
        """Return the block plan of a call."""
        blocks, plan = self.laid_out(call, params)
        return plan.lower(blocks.q_pool, blocks.k_pool, call.scale) if isinstance(plan, Threshold) else plan

    def costs(self, plan: BlockPlan) -> Tensor:
        """Return what a plan costs as a fraction of dense, by head: float64 (B|1, H|1)."""
        exact, rest = (plan.density(rest=too) for too in (False, True))
        if self.config.rest in WEIGHTED_RESTS:
            return rest
        # Rectified and tied, the rest is read once for all rows of a query block.
        return exact if self.config.rest == "drop" else exact + (rest - exact) / self.config.block

    def arrange(self, call: AttentionCall, params: BlockParams) -> tuple[Tiles, Tiles]:
        """Return how queries and how keys line up in this call."""
        return params.tiles, params.tiles

    def shared_order(self, params: Any) -> Tiles | None:
        return params.tiles if type(params) is BlockParams and params.tiles.can_be_applied else None

    def in_order(self, params: BlockParams) -> BlockParams:
        return replace(params, tiles=replace(params.tiles, applied=True))

    def laid_out(self, call: AttentionCall, params: BlockParams) -> tuple[Blocks, BlockPlan | Threshold]:
        """The call in block order, and what is read of it."""
        q_tiles, k_tiles = self.arrange(call, params)
        blocks = Blocks.of(call, q_tiles, k_tiles, self.config.block, self.config.key_block, self._ticket(call))
        plan = params.plan if params.plan is not None else self._route(blocks, params)
        # Only the Triton kernel finds blocks as it goes. Others need the plan, and here the pooled queries and keys are at hand.
        finds = self.config.backend in ("triton", "sol") or call.q.device.type != "cpu"
        if isinstance(plan, Threshold) and (self.config.rest == "rectified" or not finds):
            plan = plan.lower(blocks.q_pool, blocks.k_pool, blocks.scale)
        return blocks, plan

    def _route(self, blocks: Blocks, params: BlockParams) -> BlockPlan | Threshold:
        raise UnimplementedHalf(type(self), "select")

    def _arguments(self, blocks: Blocks, plan: BlockPlan | Threshold, params: BlockParams) -> dict[str, Any]:
        """Everything that `block_attention` takes."""
        rest = self._rest(blocks, plan, params)
        tensors = {"q": blocks.q, "k": blocks.k, "v": blocks.v, "key_mask": blocks.key_mask, "scale": blocks.scale}
        return {
            **tensors,
            "plan": plan,
            "rest": rest,
            "precision": self.config.precision,
            "values": self.config.values,
            "backend": self.config.backend,
        }

    def _rest(self, blocks: Blocks, plan: BlockPlan | Threshold, params: BlockParams) -> Rest:
        if self.config.rest == "rectified" and isinstance(plan, BlockPlan):
            visual_slots, gain = blocks.k_tiles.visual_slots, self.config.rest_gain
            return Rectified(*rectify(blocks.q, blocks.k, plan, visual_slots, blocks.scale, blocks.key_mask, gain=gain))
        if self.config.rest == "pool":
            return Pool(self._pool_weight(blocks.q, params.rest_weight), self.config.representative)
        if self.config.rest == "linear":
            return Linear(self._pool_weight(blocks.q, params.rest_weight), self.config.slope)
        return Tied() if self.config.rest == "tied" else Drop()

    def _pool_weight(self, q: Tensor, table: Tensor | None) -> Tensor | None:
        if table is not None:
            if table.shape != (q.shape[1],):
                raise ShapeError(f"The table of rest_weight is for {table.shape[0]} heads, this call has {q.shape[1]}.")
            return table
        if isinstance(self.config.rest_weight, Table) or self.config.rest_weight == 1.0:
            return None
        return torch.full((q.shape[1],), self.config.rest_weight, device=q.device)


class Scored(BlockSparse):
    """Template of the block-sparse methods that look at queries and keys: `route` is called at every call, inside the graph.

    It takes the place of `select`. What it does must not depend on values in Python: tensors in, a plan out.
    """

    Config: ClassVar[type[Config]] = ScoredConfig
    writes: ClassVar[tuple[str, ...]] = ("route",)
    by_means: ClassVar[bool] = False
    """Whether its plans have levels: `reuse_steps` keeps them then."""
    config: ScoredConfig

    def order(self, layout: Layout, **where: Any) -> Tiles:
        order = "raster" if self.config.order == "kmeans" else self.config.order  # clusters wait for queries and keys
        return tiles(layout, order, self.config.unit, self.config.tile_thw)

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> BlockParams | None:
        params = super().prepare(site, layout, clock, state)
        return params and self.remember(params, clock, state)

    def remember(self, params: BlockParams, clock: Clock, state: dict[str, Any]) -> BlockParams:
        """Return params that start from what the last step left, clusters and plans: for an own `prepare` to end in."""
        if self.config.reuse_steps > 1 and clock.step is not None:
            plans: KeptPlan = state.setdefault("plans", KeptPlan())
            params = replace(params, reuse=plans.at(params, clock.step, self.config.reuse_steps, clock.branch))
        if self.config.order != "kmeans":
            return params
        memories: tuple[Memory, Memory] = state.setdefault("clusters", (Memory(), Memory()))
        for memory in memories:
            memory.advance(clock.step)
        return replace(params, tickets=(memories[0].ticket, memories[1].ticket))

    def arrange(self, call: AttentionCall, params: BlockParams) -> tuple[Tiles, Tiles]:
        config, layout, reuse = self.config, params.tiles.layout, params.reuse
        if config.order != "kmeans":
            return super().arrange(call, params)
        first, visual = layout.text_before, layout.visual
        queries = config.query_clusters or max(round(visual / 252), 2)
        keys = config.key_clusters or max(round(visual / 75.6), 2)

        def clustered(x: Tensor, valid: Tensor | None, clusters: int, centres: Tensor, place: Tensor | None) -> Tiles:
            if reuse is not None and reuse.recalls and place is not None:
                as_it_came = torch.arange(visual, device=x.device, dtype=torch.int32).expand(*x.shape[:2], -1)
                order = recalled(as_it_came, place).long()
            else:
                rounds = config.cluster_iterations, config.cluster_iterations_warm
                order = cluster_order(x, valid, first, visual, clusters, *rounds, centres)
                order = order if place is None else kept(order.int(), place).long()
            return cluster_tiles(params.tiles, config.unit, order)

        places = (None, None) if reuse is None else (reuse.queries, reuse.keys)
        return (
            clustered(call.q, None, queries, params.tickets[0], places[0]),
            clustered(call.k, call.mask, keys, params.tickets[1], places[1]),
        )

    def route(self, blocks: Blocks, **where: Any) -> BlockPlan | Threshold:
        """Return the key blocks that each query block reads: ``blocks.plan`` turns membership into what this returns."""
        raise UnimplementedHalf(type(self), "route")

    def _params(self, layout: Layout, where: dict[str, Any]) -> BlockParams:
        return BlockParams(self.order(layout, **where), None, where)

    def _route(self, blocks: Blocks, params: BlockParams) -> BlockPlan | Threshold:
        reuse = params.reuse
        if reuse is None:
            return self.route(blocks, **params.where)
        batch, heads, number = *blocks.q.shape[:2], len(blocks.key_lengths)
        if reuse.recalls:  # where a call has another batch than the one that made the plan, it reads everything
            words = -(-number // 32)
            everything = blocks.query_lengths.new_full((batch, heads, len(blocks.query_lengths), words), -1)
            read = recalled(pad(everything, (0, self.by_means * len(LEVELS) * words)), reuse.plan)
        else:
            plan = self.route(blocks, **params.where)
            if isinstance(plan, Threshold):
                plan = plan.lower(blocks.q_pool, blocks.k_pool, blocks.scale)
            read = kept(packed(plan, batch, heads, self.by_means), reuse.plan)
        return blocks.plan(*unpacked(read, number, self.by_means))


@dataclass(frozen=True, eq=False)
class Blocks:
    """A call in block order: what a selector by scores sees.

    Attributes
    ----------
    q, k, v : (B, H, P, D), (B, H_kv, P, D) and (B, H_kv, P, D_v), tokens in slots; H_kv is H where orders differ by head.
    key_mask : bool (B, P), or (B, H, P) where orders differ by head, keys that may be read; None for all.
    scale : factor on q.k.
    q_tiles, k_tiles : how queries and keys line up.
    block, block_k : slots per query and key block, M and N of them.
    ticket : of what the call's last step left, see `kernels.memory`.
    probes : rows that a selector has computed exactly: none or one `Probes`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    scale: float
    q_tiles: Tiles
    k_tiles: Tiles
    block: int
    block_k: int
    ticket: Tensor = COLD
    probes: list[Probes] = field(default_factory=list)
    _means: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, call: AttentionCall, q_tiles: Tiles, k_tiles: Tiles, block: int, block_k: int, ticket: Tensor = COLD
    ) -> Blocks:
        """Lay a call out in block order."""
        key_mask = call.mask if call.mask is None else k_tiles.permute_mask(call.mask)
        q, k, v = q_tiles.permute(call.q), k_tiles.permute(call.k), k_tiles.permute(call.v)
        q, k, v = _filled(q, q_tiles.slots, block), _filled(k, k_tiles.slots, block_k), _filled(v, k_tiles.slots, block_k)
        if key_mask is not None:
            key_mask = pad(key_mask, (0, k.shape[-2] - key_mask.shape[-1]))
        return cls(q, k, v, key_mask, call.scale, q_tiles, k_tiles, block, block_k, ticket)

    @property
    def q_pool(self) -> Tensor:
        """Mean query of each block, float32 (B, H, M, D); 0 where it has none."""
        return self._mean("q", self.q, self.query_lengths, self.block, None)

    @property
    def k_pool(self) -> Tensor:
        """Mean key of each block, over those that may be read, float32 (B, H, N, D); 0 where it has none."""
        return self._mean("k", self.k, self.key_lengths, self.block_k, self.key_mask)

    @property
    def v_pool(self) -> Tensor:
        """Mean value of each block, over those that may be read, float32 (B, H, N, D_v); 0 where it has none."""
        return self._mean("v", self.v, self.key_lengths, self.block_k, self.key_mask)

    def _mean(self, name: str, x: Tensor, lengths: Tensor, block: int, valid: Tensor | None) -> Tensor:
        if name not in self._means:  # a functools.cached_property takes a lock, which Dynamo does not trace
            mean, _ = pool(x, lengths, block, valid)
            self._means[name] = mean.repeat_interleave(self.q.shape[1] // x.shape[1], 1)
        return self._means[name]

    @property
    def k_number(self) -> Tensor:
        """How many keys of each block may be read, float32 (B|1, 1, N)."""
        return counted(self.key_lengths, self.block_k, self.key_mask)

    @property
    def query_lengths(self) -> Tensor:
        """Tokens per query block, int32 (M,); 0 where none of them asks."""
        return self.q_tiles.query_lengths(self.block)

    @property
    def key_lengths(self) -> Tensor:
        """Tokens per key block, int32 (N,)."""
        return self.k_tiles.lengths(self.block_k)

    @property
    def query_text(self) -> Tensor:
        """Which query blocks hold text that asks, bool (M,)."""
        return self.q_tiles.is_text(self.block) & (self.query_lengths > 0)

    @property
    def key_text(self) -> Tensor:
        """Which key blocks hold text, bool (N,)."""
        return self.k_tiles.is_text(self.block_k)

    @property
    def candidates(self) -> Tensor:
        """Key blocks that a selector has the choice of: visual, with a key that may be read. Bool (B|1, 1, N)."""
        return (self.k_number > 0) & ~self.key_text

    def sampled_mass(self, rows: int, probe: bool) -> Tensor:
        """Return the share of attention that so many rows of each block give to each key block, float32 (B, H, M, N); 0 for text's.

        `probe`: these rows are computed exactly, and left in `probes`. They are others in every step that knows of the last one.
        """
        visual = self.q_tiles.visual_slots // self.block
        step = step_of(self.q, self.ticket) if probe else 0.0
        slots, counted = block_rows(self.query_lengths[:visual], self.block, rows, step)
        number, v = len(self.key_lengths), self.v if probe else None
        mass, out = sampled_mass(self.q, self.k, slots, number, self.block_k, self.scale, self._readable, v)
        if probe:
            self.probes.append(Probes(self.q_tiles.tokens_in(slots.flatten()), out, counted.flatten()))
        return pad(mass, (0, 0, 0, len(self.query_lengths) - visual))

    @property
    def _readable(self) -> Tensor | None:
        """Keys that may be read, bool (B|1, H|1, P); None for all."""
        mask = self.key_mask if self.key_mask is None or self.key_mask.ndim == 3 else self.key_mask[:, None]
        if self.k_tiles.tokens == self.k.shape[-2]:  # every slot holds one
            return mask
        held = self.k_tiles.held[None, None, : self.k.shape[-2]]
        return held if mask is None else held & mask

    def plan(self, members: Tensor, level: Tensor | None = None) -> BlockPlan:
        """Make a plan from block membership, bool (B|1, H|1, M, N): text is read by all rows, and reads all.

        `level`, uint8 like `members`: what is not a member and has level 2, 4 or 8 is read as means of so many slots.
        """
        return _text_dense(members, self.q_tiles, self.k_tiles, self.block, self.block_k, level=level)


def _filled(x: Tensor, slots: int, block: int) -> Tensor:
    """Add slots without a token (B, H, P, D) where a whole block of them stands at the end: a plan counts it all the same."""
    return x if x.shape[-2] > slots - block else pad(x, (0, 0, 0, slots - x.shape[-2]))


def _text_dense(
    members: Tensor,
    q_tiles: Tiles,
    k_tiles: Tiles,
    block: int,
    block_k: int,
    box: Box | None = None,
    level: Tensor | None = None,
    skipped: Tensor | None = None,
) -> BlockPlan:
    columns = k_tiles.is_text(block_k) if skipped is None else k_tiles.is_text(block_k) & ~skipped[..., None, None]
    members = members | q_tiles.is_text(block)[:, None] | columns
    q_len, k_len = q_tiles.query_lengths(block), k_tiles.lengths(block_k)
    if any(q_tiles.layout.unasked):
        asks = (q_len > 0)[:, None]
        members, level = members & asks, None if level is None else level * asks
    return BlockPlan.from_members(members, q_len, k_len, block, block_k, box, level=level, skipped=skipped)
