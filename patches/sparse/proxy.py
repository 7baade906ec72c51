"""Proxy tokens: near windows are read exactly, each far window through one key that stands for it.

Proxy tokens (PT-DiT, arXiv 2409.04005) for models that were not trained with them.

PT-DiT cuts the grid into windows, lets all tokens read one proxy a window, its mean, and refines within the window and one
shifted by half. Its projections are its own, so what can be had without training is the scheme: a query reads its own window,
the windows around it (`halo_thw`) and text exactly, and a far window C of n tokens through its proxy,

    ``z_iC = s q_i.k_C + log n  [ + s^2 / 2 * sum_d q_id^2 var_C(k_d) ]``,   value ``v_C``,

in one softmax with the exact keys. A proxy is the mean of its window's keys and values; or the token at the window's centre is, or
lends its key (`representative`). Among all maps that are constant within far windows, and without the bracket, the mean
is the one of least KL divergence from the true softmax. The bracket (`variance`) makes good that a mean of exponentials exceeds the
exponential of the mean, by Gaussian spread and without covariances.

The paper keeps the number of windows: 8 x 8 at all resolutions, of one frame in images and of four in videos, so that a
recipe gives each resolution its own `window_thw`. A layout of which more than 90 % would be read all the same stays dense.

For models that were trained in its two stages there is `ptdit`.

Experimental: no result without training is published. Whole runs of the bundled model come no nearer to dense than with random
blocks: 14.3 dB of foreground PSNR at density .29, those with the rest dropped 14.1. Single layers do: they err by .18 and .32.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.call import AttentionCall, Layout
from accelplug.kernels.attention import block_attention
from accelplug.kernels.orders import Tiles, axis_tiles, tiles
from accelplug.kernels.plan import BlockPlan, pool
from accelplug.kernels.rest import Drop
from accelplug.kernels.static import product
from accelplug.patches.base import Positive
from accelplug.patches.sparse.template import BlockConfig, BlockParams, BlockSparse

logger = logging.getLogger("accelplug")

MOST_PAIRS = 0.9
"""Share of dense's pairs above which a layout is left dense."""

Halo = Annotated[int, Field(ge=0)]


class Proxy(BlockSparse):
    """Read near windows exactly, and each far window through one key that stands for it."""

    class Config(BlockConfig):
        """Triples are frames, rows, columns.

        A key block holds a window, a query block a part of it: by default the next power of two and at most 128 slots.
        """

        window_thw: tuple[Positive, Positive, Positive] = Field(
            (1, 8, 8), description="Tokens of a window on each axis; at the far borders it may hold fewer."
        )
        halo_thw: tuple[Halo, Halo, Halo] = Field(
            (1, 1, 1), description="Windows on either side of its own, on each axis, that a query reads exactly."
        )
        rest: Literal["drop", "pool"] = Field(
            "pool", description="Far windows: pool reads each as one key, drop not at all."
        )
        variance: bool = Field(
            False,
            description="Whether a far window's score has the second-order term of its keys' spread (representative: mean).",
        )

        @model_validator(mode="before")
        @classmethod
        def _blocks_hold_windows(cls, values: Any) -> Any:
            window = values.get("window_thw", cls.model_fields["window_thw"].default)
            try:
                slots = 1 << max(math.prod(map(int, window)) - 1, 7).bit_length()  # a power of two, as kernels want it
            except (TypeError, ValueError):  # the field says what is wrong with it
                return values
            return {"block": min(slots, 128), "block_k": slots, **values}

        @model_validator(mode="after")
        def _fits(self) -> Self:
            window = math.prod(self.window_thw)
            if self.key_block < window or self.key_block % self.block:
                raise ValueError(
                    f"a key block must hold the {window} tokens of window_thw {self.window_thw}, and query blocks divide it; "
                    f"got block {self.block}, block_k {self.key_block}"
                )
            if self.variance and (self.rest, self.representative) != ("pool", "mean"):
                raise ValueError("variance is that of keys around their mean: it needs rest: pool and representative: mean")
            return self

    config: Config

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._neutral: Bounded[Layout, bool] = Bounded(64)

    def cost(self, layout: Layout) -> float:
        """Return the share of (query, key) pairs that is computed, a proxy counted as one key."""
        near, windows, lone = 1, 1, 1  # exact pairs; windows; near windows, summed over queries
        for length, tile, halo in zip(layout.grid_thw, self.config.window_thw, self.config.halo_thw, strict=True):
            size, around = _axis(length, tile, halo)
            near *= int(size @ around.long() @ size)
            lone *= int(size @ around.long().sum(-1))
            windows *= len(size)
        pairs = near + (layout.visual * windows - lone if self.config.rest == "pool" else 0)
        text, asking = layout.length - layout.visual, layout.queries - layout.visual
        return (pairs + layout.visual * text + asking * layout.length) / (layout.queries * layout.length)

    def neutral(self, layout: Layout) -> bool:
        return self._neutral.get(layout, lambda: self._not_worth_it(layout))

    def _not_worth_it(self, layout: Layout) -> bool:
        cost = self.cost(layout)
        if MOST_PAIRS < cost < 1:
            logger.warning(
                "proxy with window_thw %s and halo_thw %s would compute %.0f %% of the pairs of grid %s: left dense.",
                *(self.config.window_thw, self.config.halo_thw, 100 * cost, layout.grid_thw),
            )
        return cost > MOST_PAIRS

    def order(self, layout: Layout, **where: Any) -> Tiles:
        windows = tiles(layout, "tile", self.config.unit, self.config.window_thw)
        return windows if self.config.representative == "mean" else centre_in_the_middle(windows, self.config.unit)

    def select(self, tiles: Tiles, **where: Any) -> BlockPlan:
        axes = zip(tiles.layout.grid_thw, self.config.window_thw, self.config.halo_thw, strict=True)
        near = [_axis(*axis)[1] for axis in axes]
        text = tiles.is_text(self.config.unit)
        members = torch.zeros(len(text), len(text), dtype=torch.bool)
        number = int((~text).sum())
        members[:number, :number] = product(near)
        return self.plan(members, tiles)

    def attend(self, call: AttentionCall, params: BlockParams) -> Tensor:
        if not self.config.variance:
            return super().attend(call, params)
        blocks, plan = self.laid_out(call, params)
        plan = cast(BlockPlan, plan)  # `select` makes no threshold
        near = block_attention(**{**self._arguments(blocks, plan, params), "rest": Drop()}, return_lse=True)
        far = spread_attention(blocks.q, blocks.k, blocks.v, plan, call.scale, blocks.key_mask)
        return self.repaired(blocks.q_tiles.unpermute(joined_by_lse(near, far)), call, blocks.q_tiles)


def _axis(length: int, tile: int, halo: int) -> tuple[Tensor, Tensor]:
    """Windows along an axis: their tokens, int64 (W,), and which read which, bool (W, W)."""
    size = torch.tensor([len(part) for part in axis_tiles(length, tile)])
    place = torch.arange(len(size))
    return size, (place[:, None] - place).abs() <= halo


def centre_in_the_middle(tiles: Tiles, block: int) -> Tiles:
    """Let the token nearest to the centroid of each block change places with the middle one, which stands for the block."""
    held, place = tiles.held.unflatten(0, (-1, block)), tiles.coordinates().double().unflatten(0, (-1, block))
    number = held.sum(-1)
    centroid = (place * held[..., None]).sum(1) / number.clamp(min=1)[:, None]  # [N, 3]
    distance = (place - centroid[:, None]).square().sum(-1).masked_fill(~held, torch.inf)
    nearest, middle = (slot[:, None] for slot in (distance.argmin(-1), number // 2))
    gather = torch.arange(tiles.slots).clamp(max=tiles.tokens - 1) if tiles.gather is None else tiles.gather
    gather = gather.unflatten(0, (-1, block))
    gather = gather.scatter(1, middle, gather.gather(1, nearest)).scatter(1, nearest, gather.gather(1, middle)).flatten()
    scatter = torch.empty(tiles.tokens, dtype=torch.int64)
    scatter[gather[tiles.held]] = tiles.held.nonzero()[:, 0]
    return replace(tiles, gather=gather, scatter=scatter)


def spread_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend to the key blocks that are not in `plan`, each as the Gaussian of its keys: mean, variances and number.

    Returns
    -------
    out : float32 (B, H, P, D_v); lse : float32 (B, H, P), -inf where all blocks are in the plan.
    """
    groups = q.shape[1] // k.shape[1]
    (k_pool, number), (k_square, _), (v_pool, _) = (
        pool(x, plan.k_len, plan.block_k, key_mask) for x in (k, k.float().square(), v)
    )
    variance = (k_square - k_pool.square()).clamp(min=0)  # rounding may pass below 0
    proxy = torch.cat([k_pool, (0.5 * scale) * variance], -1).repeat_interleave(groups, 1)  # [B, H, N, 2 D]
    spread = torch.cat([q.float(), q.float().square()], -1)
    score = scale * spread @ proxy.transpose(-1, -2) + number.log()[..., None, :]
    read = plan.members.repeat_interleave(plan.block_q, -2)[..., : q.shape[-2], :]
    score = score.masked_fill(read, -torch.inf)
    lse = score.logsumexp(-1)
    weights = (score - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return weights @ v_pool.repeat_interleave(groups, 1), lse


def joined_by_lse(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over the union of disjoint key sets, from each set's (out, log-sum-exp), in the first one's dtype."""
    outs, lses = zip(*parts, strict=True)
    share = torch.stack(lses).softmax(0)  # [parts, B, H, P]
    return sum(out.float() * part[..., None] for out, part in zip(outs, share, strict=True)).to(outs[0].dtype)
