"""Sparse VideoGen: each head looks around in space or along time, and a few of its queries tell which.

Sparse VideoGen (SVG, arXiv 2502.01776): one band for all heads, over tokens in one of two orders.

*Spatial* heads have their tokens frame by frame, so that a band along the diagonal is the frames around; *temporal* heads
place by place, all frames of a place side by side, so that the same band is the places around at all times. For density D
of S tokens, S_text of them text, which reads and is read by all, ``D' = D - 2 S_text / S``, and a query reads keys up to

    ``w = S (1 - sqrt(1 - D'))``

away: the share of a band of that half-width. Here a block reads the blocks whose middles are within w of its own, whole.

With `sink`, all read the first ``H W`` tokens besides, in the head's own order, as the released code does: the first frame
for spatial heads, the first places at all times for temporal ones.

Which of the two a head is, its queries say at every step: for `rows` of them, drawn from all visual ones, the output
under either mask is compared with the exact one, and the head takes the order with the smaller squared error. Published
masks for that are fixed at two frames; here they are those that will run. The choice is the batch row's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch.nn.functional import scaled_dot_product_attention

from accelplug.bounded import Bounded
from accelplug.kernels.orders import Tiles, tiles
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.static import band, band_width
from accelplug.patches.sparse.template import BlockConfig, Blocks, BlockSparse, OncePerDevice

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Layout, Site

SPATIAL, TEMPORAL = 0, 1


@dataclass(eq=False)
class Kept:
    """What the heads of a site turned out to be, int64 (B, H), and at which step."""

    step: int = -1
    modes: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Masks(OncePerDevice):
    """Both masks of a layout; axis 0 says spatial or temporal.

    Attributes
    ----------
    tiles : the order of each, (2, P).
    members : bool (2, M, N), blocks that are read.
    rows : int64 (R,), tokens whose queries the masks are tried on.
    reads : bool (2, R, S), keys that those read.
    """

    tiles: Tiles
    members: Tensor
    rows: Tensor
    reads: Tensor

    def moved(self, device: torch.device) -> Masks:
        members, rows, reads = (x.to(device) for x in (self.members, self.rows, self.reads))
        return Masks(self.tiles.to(device), members, rows, reads)


@dataclass(frozen=True, eq=False)
class Params:
    """What `attend` needs.

    Attributes
    ----------
    masks : both masks of the layout.
    modes : int64 (B, H), what heads turned out to be at an earlier step; None to try now.
    kept : where to leave what was found for later steps; None for nowhere.
    rest_weight : as in `BlockParams`.
    """

    masks: Masks
    modes: Tensor | None = None
    kept: Kept | None = None
    rest_weight: Tensor | None = None

    def to(self, device: torch.device | str) -> Params:
        """Return the params with their tensors on `device`."""
        modes, weight = (x if x is None else x.to(device) for x in (self.modes, self.rest_weight))
        return Params(self.masks.to(device), modes, self.kept, weight)


class Svg(BlockSparse):
    """Each head reads one band of blocks, frame by frame or place by place, as a few of its queries tell."""

    class Config(BlockConfig):
        density: float = Field(
            0.3,
            gt=0.0,
            le=1.0,
            description="Share of all pairs that the band and the text read. Wan 0.3, HunyuanVideo 0.25.",
        )
        sink: bool = Field(
            True,
            description="Heads read as many tokens as a frame has, the first ones in their order, besides. Released: Wan only.",
        )
        rows: int = Field(64, ge=1, description="Queries that the two masks are tried on. Released code.")
        seed: int = Field(0, description="Draws these queries.")
        profile_interval: int = Field(
            1,
            ge=1,
            description="Steps for which what a head turned out to be is kept. Published: 1, tried at every step. Ours.",
        )

    config: Config
    writes = ()  # the plan is made per call, of two masks

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._masks: Bounded[Layout, Masks] = Bounded(16)
        self._tried: Bounded[tuple, Params] = Bounded(256)

    def neutral(self, layout: Layout) -> bool:
        frames, rows, columns = layout.grid_thw
        return self.config.density == 1.0 or frames == 1 or rows * columns == 1  # no time, or no space

    def order(self, layout: Layout, **where: Any) -> Tiles:
        unit = self.config.unit
        return Tiles.per_head([tiles(layout, "thw", unit), tiles(layout, "hwt", unit)])

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | None:
        if self.neutral(layout):
            return None
        masks = self._masks.get(layout, lambda: self.masks(layout))
        weight = self.rest_weights(site, clock)
        if self.config.profile_interval == 1 or clock.step is None:
            key = (layout, None if weight is None else tuple(weight.tolist()))
            return self._tried.get(key, lambda: Params(masks, rest_weight=weight))
        kept = state.setdefault("svg", Kept())
        if kept.modes is not None and kept.step < clock.step < kept.step + self.config.profile_interval:
            return Params(masks, kept.modes, None, weight)
        kept.step, kept.modes = clock.step, None
        return Params(masks, None, kept, weight)

    def masks(self, layout: Layout) -> Masks:
        """Return both masks of a layout, and the queries that they are tried on."""
        orders = self.order(layout)
        members = self.members(orders)
        generator = torch.Generator().manual_seed(self.config.seed)
        rows = torch.randperm(layout.visual, generator=generator)[: self.config.rows] + layout.text_before
        return Masks(orders, members, rows, reads_of(orders, members, rows))

    def width(self, layout: Layout) -> float:
        """Return w, the half-width in tokens of the band that is `density` of all pairs with those of text; 0 where text alone is more."""
        text = layout.length - layout.visual
        return band_width(layout.length, max(self.config.density - 2 * text / layout.length, 0.0))

    def members(self, orders: Tiles) -> Tensor:
        """Which blocks spatial and temporal heads read, bool (2, M, N)."""
        block, block_k, layout = self.config.block, self.config.key_block, orders.layout
        near = band(orders.slots, block, block_k, self.width(layout))
        members = near | orders.is_text(block)[:, None] | orders.is_text(block_k)
        members = torch.stack([members, members])
        if self.config.sink:
            per_frame = math.prod(layout.grid_thw[1:])
            members[..., : -(-per_frame // block_k)] = True
        return members

    def modes(self, call: AttentionCall, masks: Masks) -> Tensor:
        """Try both masks on a few queries: int64 (B, H), SPATIAL or TEMPORAL."""
        groups = call.q.shape[1] // call.k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (call.k, call.v))
        q = call.q.index_select(-2, masks.rows)
        valid = None if call.mask is None else call.mask[:, None, None]  # [B, 1, 1, S]

        def output(mask: Tensor | None) -> Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale).float()

        exact = output(valid)
        spatial, temporal = (
            (output(reads if valid is None else reads & valid) - exact).square().mean((-2, -1)) for reads in masks.reads
        )
        return (temporal < spatial).long()

    def laid_out(self, call: AttentionCall, params: Params) -> tuple[Blocks, BlockPlan]:
        modes = params.modes
        if modes is None or modes.shape != call.q.shape[:2]:
            modes = self.modes(call, params.masks)
        if params.kept is not None:
            params.kept.modes = modes
        orders = params.masks.tiles.pick(modes)
        blocks = Blocks.of(call, orders, orders, self.config.block, self.config.key_block)
        return blocks, blocks.plan(params.masks.members[modes])


def reads_of(orders: Tiles, members: Tensor, rows: Tensor) -> Tensor:
    """Which keys some tokens read, bool (C, R, S): members bool (C, M, N), one order of C for each, rows int64 (R,)."""
    slots, (_, blocks, blocks_k) = orders.slots, members.shape
    reads = []
    for slot, member in zip(orders.slot_of_token().expand(len(members), -1), members, strict=True):
        block_of, key_block_of = (slot // (slots // number) for number in (blocks, blocks_k))
        reads.append(member[block_of[rows]][:, key_block_of])
    return torch.stack(reads)
