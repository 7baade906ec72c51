"""VMoBA: queries, or blocks of them, choose slabs of frames, columns of places or cuboids, by turns of layers.

VMoBA (arXiv 2506.23858), mixture of block attention for video, without its training.

The grid is cut into regions: slabs of frames in layers 0, 3, ..., columns of places through all frames in layers 1, 4, ...,
cuboids in layers 2, 5, ... A region r is represented by its mean key, and the gate of a query is their product,
``g = <q, k_r>``. Per head, the gates of *all* pairs of query and region compete: normalised to [0, 1] by their minimum and
maximum, the largest are kept until their sum reaches ``tau`` of the total. A query's own region is always read, and counts
towards that sum. So a head reads much for some queries and little for others.

With ``gates: token`` each query chooses, as published: queries are gathered region by region (`kernels.gated`), which no
block kernel can follow. With ``gates: block`` (ours, fast) the gate is that of a query block, its mean, counted as often as
it holds queries. Regions hold many key blocks or one, and are read whole.

Experimental: the paper's own results without training are 18.8 dB PSNR on Wan 2.1 1.3B at 720p, where SVG has 25.9 at
the same speed. On the bundled model (blocks of 16), attention outputs err by .49, .42 and .34 at densities of .13, .18 and
.29, where random blocks err by .47, .41 and .32; pooled, by .20 at .24 (random blocks, pooled: .32 at .25).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from accelplug.kernels.gated import gated_attention
from accelplug.kernels.orders import Tiles, tiles
from accelplug.kernels.rows import top_p
from accelplug.patches.base import Positive
from accelplug.patches.sparse.template import BlockParams, Blocks, Scored, ScoredConfig

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Layout, Site
    from accelplug.kernels.plan import BlockPlan

Parts = tuple[Positive, Positive, Positive]


class Vmoba(Scored):
    """Queries, or blocks of them, read the regions whose gates are largest, by turns of layers."""

    class Config(ScoredConfig):
        order: Literal["tile"] = Field("tile", description="Tokens of a region lie together.")
        tile_thw: None = Field(None, description="Regions follow `parts`.")
        parts: tuple[Parts, Parts, Parts] = Field(
            ((8, 1, 1), (1, 6, 8), (2, 6, 6)),
            description="Frames, rows and columns are cut in so many, by turns of layers. Paper: 8, 48, 72 regions; shapes ours.",
        )
        tau: float = Field(
            0.25, gt=0.0, le=1.0, description="Share of a head's normalised gates that is read; 1 is dense. Paper."
        )
        gates: Literal["block", "token"] = Field(
            "block",
            description="Who chooses: each query (token, published), or each block, which kernels are fast for. Ours.",
        )

        @model_validator(mode="after")
        def _tokens_have_no_plan(self) -> Self:
            given = (self.rest, self.precision, self.values, str(self.reuse_steps))
            taken = ("drop", "native", "native", "1")
            if self.gates == "token" and given != taken:
                raise ValueError(
                    "gates: token has no blocks: it takes rest, precision, values and reuse_steps of "
                    f"{', '.join(taken)}, got {', '.join(given)}"
                )
            return self

    config: Config

    def neutral(self, layout: Layout) -> bool:
        return self.config.tau == 1.0

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> BlockParams | None:
        if self.neutral(layout):
            return None
        params = self.params(layout, turn=(2 if site.layer is None else site.layer) % 3)
        return self.remember(self.weighted(params, site, clock), clock, state)

    def attend(self, call: AttentionCall, params: BlockParams) -> Tensor:
        if self.config.gates == "block":
            return super().attend(call, params)
        gate, region = self.token_gates(call, params)
        out = gated_attention(call.q, call.k, call.v, gate, region, call.scale, call.mask)
        return self.repaired(out, call, params.tiles)

    def choose_backend(self, call: AttentionCall, params: BlockParams) -> None:
        if self.config.gates == "block":
            super().choose_backend(call, params)

    def inspect(self, call: AttentionCall, params: BlockParams) -> tuple[float, BlockPlan | None]:
        if self.config.gates == "block":
            return super().inspect(call, params)
        gate, region = self.token_gates(call, params)
        read = gate[..., region.clamp(min=0)] | (region < 0)  # [B, H, S, S_k]
        return float(read.float().mean()), None

    def token_gates(self, call: AttentionCall, params: BlockParams) -> tuple[Tensor, Tensor]:
        """Return which regions each token reads, bool (B, H, S, R), and the region of each token, int64 (S,), -1 for text."""
        layout, turn = params.tiles.layout, params.where["turn"]
        region = token_regions(layout, self.region_thw(layout, turn)).to(call.q.device)
        number = int(region.max()) + 1
        own = region[:, None] == torch.arange(number, device=region.device)  # [S, R]
        valid = torch.ones_like(call.k[:, 0, :, 0], dtype=torch.bool) if call.mask is None else call.mask  # [B, S]
        weight = (own & valid[..., None]).float()[:, None]  # [B, 1, S, R]
        counted = weight.sum(-2)  # [B, 1, R]
        mean_key = weight.mT @ call.k.float() / counted.clamp(min=1)[..., None]  # [B, H_kv, R, D]
        gate = call.q.float() @ mean_key.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1).mT  # [B, H, S, R]
        ones = torch.ones_like(region, dtype=torch.int32)
        read = strongest_pairs(gate, own, counted > 0, ones, self.config.tau)
        return read | (region < 0)[:, None], region

    def region_thw(self, layout: Layout, turn: int) -> tuple[int, ...]:
        """Return the frames, rows and columns of a region; the last ones may be smaller."""
        return tuple(-(-n // min(parts, n)) for n, parts in zip(layout.grid_thw, self.config.parts[turn], strict=True))

    def order(self, layout: Layout, turn: int) -> Tiles:
        frames, rows, columns = self.region_thw(layout, turn)
        return tiles(layout, "tile", self.config.unit, (frames, rows, columns))

    def route(self, blocks: Blocks, turn: int) -> BlockPlan:
        layout = blocks.k_tiles.layout
        region_thw = self.region_thw(layout, turn)
        counts = [-(-n // size) for n, size in zip(layout.grid_thw, region_thw, strict=True)]
        query_region, key_region = (
            region_of(blocks.k_tiles, size, region_thw, counts) for size in (blocks.block, blocks.block_k)
        )
        regions = torch.arange(math.prod(counts), device=blocks.q.device)
        weight = blocks.k_number[..., None] * (key_region[:, None] == regions)  # [B|1, H|1, N, R]
        number = weight.sum(-2)  # [B|1, H|1, R]
        mean_key = weight.mT @ blocks.k_pool / number.clamp(min=1)[..., None]  # [B, H, R, D]
        gate = blocks.q_pool @ mean_key.mT  # [B, H, M, R]
        read = strongest_pairs(gate, query_region[:, None] == regions, number > 0, blocks.query_lengths, self.config.tau)
        return blocks.plan(read[..., key_region.clamp(min=0)] & ~blocks.key_text)


def region_of(tiles: Tiles, block: int, region_thw: tuple[int, ...], counts: list[int]) -> Tensor:
    """Number of the region that each block lies in, int64 (blocks,); -1 for text."""
    place = tiles.coordinates()[::block]  # [blocks, 3]
    frame, row, column = (place // place.new_tensor(region_thw)).unbind(-1)
    return torch.where(place[:, 0] < 0, -1, (frame * counts[1] + row) * counts[2] + column)


def token_regions(layout: Layout, region_thw: tuple[int, ...]) -> Tensor:
    """Number of the region that each token lies in, int64 (S,), in the order of `region_of`; -1 for text."""
    frame, row, column = (torch.arange(n) // size for n, size in zip(layout.grid_thw, region_thw, strict=True))
    _, rows, columns = (-(-n // size) for n, size in zip(layout.grid_thw, region_thw, strict=True))
    region = (frame[:, None, None] * rows + row[:, None]) * columns + column
    return torch.nn.functional.pad(region.flatten(), (layout.text_before, layout.text_after), value=-1)


def strongest_pairs(gate: Tensor, own: Tensor, readable: Tensor, lengths: Tensor, tau: float) -> Tensor:
    """Which regions query blocks read, the gates of a head competing: bool (B, H, M, R).

    Parameters
    ----------
    gate : float32 (B, H, M, R).
    own : bool (M, R), the region that a block lies in; none in rows of text, which are not candidates.
    readable : bool (B|1, H|1, R), regions with a key.
    lengths : int32 (M,), queries of each block.
    tau : share of the sum of gates, normalised to [0, 1], that is read.
    """
    visual = own.any(-1, keepdim=True) & (lengths > 0)[:, None]  # [M, 1]
    pairs = (visual & readable[..., None, :]).expand(gate.shape)
    low = gate.masked_fill(~pairs, torch.inf).amin((-2, -1), keepdim=True)
    high = gate.masked_fill(~pairs, -torch.inf).amax((-2, -1), keepdim=True)
    share = (gate - low) / (high - low).clamp(min=torch.finfo(gate.dtype).tiny) * lengths[:, None]
    share = share.masked_fill(~pairs, 0.0)
    share = share / share.sum((-2, -1), keepdim=True).clamp(min=torch.finfo(gate.dtype).tiny)
    spent = share.masked_fill(~own, 0.0).sum((-2, -1))  # [B, H]
    chosen = top_p(share.flatten(-2), tau - spent, 0, candidates=(pairs & ~own).flatten(-2))
    return chosen.unflatten(-1, gate.shape[-2:]) | own
