"""PAROAttention: for every head the order of axes in which its attention falls into blocks, and a static mask of those blocks.

PAROAttention (arXiv 2506.16054): each head's tokens in that order of frames, rows and columns that makes its map blocky.

Locality in time, rows and columns turns into blocks on the diagonal when that axis counts fastest. One of the six orders
per head, for all steps and prompts; static masks per head over blocks in that order, one for each of several spans of the
first half of the steps, one for the second half. Both come from a calibration (`ParoSearch`).

Its 8-bit products are the keys `precision` and `values`, which all block-sparse patches have. Off by default: the release, which has
kernels for both, runs Wan with 8-bit q.k alone.

Not taken over: 4-bit products, heads whose output is left out, and the last row and column of blocks, which the release always reads
since they hold its text and padding. Text stands in blocks of its own here, is read by all rows, and reads all.

*The calibration*: first an order for every head, then, in that order, the masks. Both terms of an order's cost are to be small, and
are divided by their sums over the six orders:

    ``cost = alpha * (1 - M_sp) / sum(1 - M_sp) + (1 - alpha) * M_q / sum(M_q)``

M_sp is the share of blocks of the attention map that are sparse; M_q the mean over blocks of ``max / mean``, which is what
quantisation suffers from. The map is never made: query blocks are sampled for the metrics, rows of each for the masks.

A mask keeps the blocks with the largest sums, over all prompts, until the density is reached, and each row's largest. Sums are
float16 (masks, layers, H, M, M) on the CPU: 3.1 GiB for the 40 layers and heads of Wan 2.1 14B at 720p, 591 blocks of 128, with
three masks, which take 206 MiB in the file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.errors import RecipeError, UnsupportedError
from accelplug.kernels.chunks import at_once
from accelplug.kernels.orders import Tiles, tiles
from accelplug.kernels.plan import BlockPlan, pack_bits, unpack_bits
from accelplug.kernels.static import band, band_width
from accelplug.patches.calibration import MAX_STATE, Calibration, CalibrationConfig, Seen
from accelplug.patches.sparse.template import BlockConfig, BlockParams, BlockSparse
from accelplug.table import MAX_BYTES, Bits, Table, bucket

AxisOrder = Literal["thw", "twh", "hwt", "htw", "wht", "wth"]
ORDERS = get_args(AxisOrder)


def mask_row(clock: Clock, rows: int) -> int:
    """Which mask holds now: all but the last share the first half of the steps evenly, the last has the second half."""
    return min(bucket(clock, 2 * (rows - 1)), rows - 1) if rows > 1 else 0


def mask_rows(buckets: int) -> int:
    """How many masks that many spans of equal length are for."""
    return buckets // 2 + 1


class ParoSearch(Calibration):
    """Find an order for every head; then, in that order, its masks."""

    class Config(CalibrationConfig):
        """The thresholds are not published: small and sparse are ours."""

        rows: int = Field(16, ge=1, description="Queries sampled per block, for the sums.")
        blocks: int = Field(4, ge=1, description="Query blocks sampled per call and order, for the metrics.")
        alpha: float = Field(
            0.5, ge=0.0, le=1.0, description="Weight of sparsity against incoherence in the choice of an order."
        )
        small: float = Field(0.5, gt=0.0, description="Below which a probability is small, in units of 1 / S.")
        sparse: float = Field(0.9, gt=0.0, le=1.0, description="Share of small entries from which a block is sparse.")
        density: float = Field(0.3, gt=0.0, le=1.0, description="Share of each head's blocks that the masks keep.")

    config: Config
    patch: Paro
    parts = 2
    axes = {"order": ("layers", "heads"), "masks": ("steps", "layers", "heads")}  # noqa: RUF012

    def observe(self, seen: Seen, part: int) -> None:
        self._require_room(seen)
        self._observe_orders(seen) if part == 0 else self._observe_blocks(seen)

    def _require_room(self, seen: Seen) -> None:
        """Refuse at the first call, not after the runs for the orders, what the sums or the file cannot hold."""
        block, masks = self.patch.config.block, mask_rows(seen.buckets)
        heads, layers, tokens = seen.call.q.shape[1], seen.site.layers, seen.layout.visual

        def sizes(block: int, masks: int) -> tuple[int, int]:
            number = -(-tokens // block)
            return masks * layers * heads * number * number * 2, masks * layers * heads * number * -(-number // 32) * 4

        def fits(block: int, masks: int) -> bool:
            return all(size <= limit for size, limit in zip(sizes(block, masks), (MAX_STATE, MAX_BYTES), strict=True))

        if fits(block, masks):
            return
        sums, table = (size / (1 << 20) for size in sizes(block, masks))
        fitting: dict[int, int] = {}  # masks by block: fewer masks where they let blocks be smaller
        for fewer in range(masks, 0, -1):
            for larger in (block << doubled for doubled in range((1024 // block).bit_length())):
                if fits(larger, fewer):
                    fitting.setdefault(larger, fewer)
                    break
        ways = [
            f"block={size} with buckets={max(2 * number - 2, 1)}" for size, number in sorted(fitting.items(), reverse=True)
        ]
        raise UnsupportedError(
            f"Calibrating Paro with blocks of {block} and {masks} masks over the steps, for {tokens} tokens, {layers} layers and "
            f"{heads} heads, takes {sums:.0f} MiB of sums and {table:.0f} MiB of masks, with {MAX_STATE >> 20} and "
            f"{MAX_BYTES >> 20} MiB allowed. What fits: {', or '.join(ways) or 'nothing, take a smaller grid'}."
        )

    def _observe_orders(self, seen: Seen) -> None:
        block, grid = self.patch.config.block, seen.layout
        costs = torch.zeros(seen.call.q.shape[1], len(ORDERS), 2, dtype=torch.float64)
        for number, order in enumerate(ORDERS):
            visual = self._visual(grid, order).to(seen.call.q.device)  # [V] tokens in this order
            whole = visual[: len(visual) // block * block].view(-1, block)  # blocks that tokens fill
            for rows in whole[seen.sample(self.config.blocks, len(whole))]:
                for row, head in seen.heads():
                    map_ = (
                        seen.logits(rows, row, head).softmax(-1)[:, whole.flatten()].unflatten(-1, (-1, block))
                    )  # [b, N, b]
                    small = (map_ < self.config.small / seen.call.k.shape[-2]).float().mean((0, 2))
                    incoherence = map_.amax((0, 2)) / map_.mean((0, 2)).clamp(min=torch.finfo(torch.float32).tiny)
                    dense = 1 - (small >= self.config.sparse).float().mean()
                    costs[head, number] += torch.stack([dense, incoherence.mean()]).cpu()
        self.add(seen, "cost", costs / (seen.call.q.shape[0] * self.config.blocks))

    def _observe_blocks(self, seen: Seen) -> None:
        block, heads = self.patch.config.block, seen.call.q.shape[1]
        number = -(-seen.layout.visual // block)
        sums = torch.zeros(heads, number, number)
        pick = seen.sample(self.config.rows * number, block).view(number, -1)  # slots, in a short block from its start again
        chunk = at_once(self.config.rows * seen.call.k.shape[-2])
        for row, head in seen.heads():
            order = self._visual(seen.layout, ORDERS[int(self.orders()[seen.site.layer or 0, head])]).to(pick.device)
            starts = torch.arange(number, device=pick.device)[:, None] * block
            rows = order[starts + pick % (len(order) - starts).clamp(max=block)]  # [M, rows]
            for first in range(0, number, chunk):
                part = rows[first : first + chunk]
                map_ = seen.logits(part.flatten(), row, head).softmax(-1)[:, order].unflatten(0, part.shape).mean(1)
                blocks = torch.nn.functional.pad(map_, (0, number * block - len(order))).unflatten(-1, (number, block))
                sums[head, first : first + chunk] += blocks.sum(-1).cpu()
        masks = mask_rows(seen.buckets)
        self.add(seen, "sums", sums.half(), (mask_row(seen.clock, masks), masks))

    def _visual(self, layout: Layout, order: AxisOrder) -> Tensor:
        """Visual tokens in an order, int64 (V,)."""
        laid = tiles(layout, order, self.patch.config.block)
        gather = torch.arange(laid.slots) if laid.gather is None else laid.gather
        return gather[: laid.visual_slots][laid.held[: laid.visual_slots]]

    def orders(self) -> Tensor:
        """The order with the least cost for each head, by its number, int64 (layers, H)."""
        cost = self.state["cost"].sum(0) / self.state["cost calls"].sum(0)[:, None, None, None]  # [layers, H, 6, 2]
        share = cost / cost.sum(-2, keepdim=True).clamp(min=1e-12)
        return (self.config.alpha * share[..., 0] + (1 - self.config.alpha) * share[..., 1]).nan_to_num(nan=1.0).argmin(-1)

    def tables(self) -> dict[str, Tensor]:
        masks = [[self._kept(sums) for sums in layers] for layers in self.state["sums"]]  # a layer at a time: they are large
        return {"order": self.orders().to(torch.uint8), "masks": torch.stack([torch.stack(row) for row in masks])}

    def _kept(self, sums: Tensor) -> Tensor:
        """Masks of a layer from its sums (H, M, M), packed: int32 (H, M, words). All blocks where nothing was seen."""
        sums = sums.float()
        number = sums.shape[-1]
        kept = max(round(self.config.density * number * number), 1)
        mask = torch.zeros_like(sums, dtype=torch.bool)
        mask.flatten(-2).scatter_(-1, sums.flatten(-2).topk(kept, -1).indices, True)
        mask.scatter_(-1, sums.argmax(-1, keepdim=True), True)
        return pack_bits(mask | (sums == 0).all(-1, keepdim=True).all(-2, keepdim=True))


class Paro(BlockSparse):
    """Read a static mask of blocks, in that order of frames, rows and columns that suits the head."""

    class Config(BlockConfig):
        """Released: blocks of 64, density 0.2 to 0.5, 4 (Wan) or 10 (CogVideoX) masks over the steps."""

        block: int = Field(64, ge=8, le=1024, multiple_of=8, description="Slots per query and key block.")
        order: AxisOrder | Table = Field(
            "thw",
            description="Which axis counts slowest, then next, for all heads, or a table (layers, heads) of their numbers.",
        )
        masks: Literal["all", "diagonal"] | Annotated[Table, Bits(2)] = Field(
            "diagonal",
            description="A table (steps, layers, heads) of packed masks; uncalibrated, all blocks, or a band of `density`.",
        )
        density: float = Field(0.3, gt=0.0, le=1.0, description="Share of the blocks that are read (masks: diagonal).")

    config: Config
    Calibration = ParoSearch

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._prepared = Bounded(256)  # a plan for each layer
        self._stacked: Bounded[Layout, Tiles] = Bounded(16)

    def neutral(self, layout: Layout) -> bool:
        return self.config.masks == "all"

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> BlockParams | None:
        if self.neutral(layout):
            return None
        order, masks = self.config.order, self.config.masks
        orders = tuple(ORDERS[i] for i in order.at(site, clock).tolist()) if isinstance(order, Table) else (order,)
        row = mask_row(clock, masks.values.shape[0]) if isinstance(masks, Table) and "steps" in masks.axes else 0
        layer = site.layer if isinstance(masks, Table) else None
        where = {"orders": orders, "layer": layer, "row": row, "heads": site.heads}
        return self.weighted(self.params(layout, **where), site, clock)

    def _params(self, layout: Layout, where: dict[str, Any]) -> BlockParams:
        choice = torch.tensor([ORDERS.index(order) for order in where["orders"]])
        return replace(super()._params(layout, where), where={"choice": choice})

    def order(self, layout: Layout, **where: Any) -> Tiles:
        """The order of all heads, or all six, of which `arrange` picks: layers share them, an order a head is 48 MB at Wan 14B."""
        orders = where["orders"] if len(where["orders"]) == 1 else ORDERS
        laid = [tiles(layout, order, self.config.unit) for order in orders]
        return laid[0] if len(laid) == 1 else self._stacked.get(layout, lambda: Tiles.per_head(laid))

    def arrange(self, call: AttentionCall, params: BlockParams) -> tuple[Tiles, Tiles]:
        laid = params.tiles.of_heads(params.where["choice"])
        return laid, laid

    def select(self, tiles: Tiles, **where: Any) -> BlockPlan:
        masks, unit = self.config.masks, self.config.unit
        visual, number = tiles.visual_slots // unit, tiles.slots // unit
        if not isinstance(masks, Table):
            width = band_width(tiles.layout.visual, self.config.density)
            return self.plan(band(tiles.slots, unit, unit, width), tiles)
        row = masks.rows(where["row"], where["layer"], where["heads"])  # [H, M, words]
        if row.shape[-2:] != (visual, -(-visual // 32)):
            raise RecipeError(
                f"{masks!r} holds masks of other blocks: this layout has {visual} of {unit} slots. Calibrate for them."
            )
        members = torch.zeros(1, len(row), number, number, dtype=torch.bool)
        members[..., :visual, :visual] = unpack_bits(row, visual)
        return self.plan(members, tiles)
