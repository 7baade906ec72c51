"""FlashVGGT: every frame is read through a small grid of descriptors, key frames through all their patches (arXiv 2512.01540).

All queries are kept. Keys and values are: the special tokens of all frames; every patch of the key frames; and of each other frame its
grid made smaller by `factor` on each side, as bilinear interpolation without a filter makes it: the mean of the two middle rows and
columns of a cell, or its middle one where the factor is odd. The first frame is a key frame, and so is one more of every `every` frames.

Approximate: the paper makes hidden states smaller ahead of the projections, and trains the model for that. Without training nothing is
published. Here k and v themselves are made smaller, after norm and RoPE. In the paper key frames come by k-means over mean tokens, here the
one whose mean key is farthest from those that were chosen is next, which depends on no order of frames. In the release a key frame's
patches and descriptors are both read, so that it counts twice; here its patches alone. `count: log` (ours) has a descriptor count as often
as it has patches. The memory of frames that arrive in chunks is not here.

Official code: wzpscott/FlashVGGT; written from the paper and a description of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.thinned import farthest_first, smaller_grid
from accelplug.patches.base import Config, Patch, Positive
from accelplug.patches.tokens.counted import attend_counted


@dataclass(frozen=True, eq=False)
class Params:
    """What `FlashVggt.attend` needs.

    Attributes
    ----------
    layout : of the call.
    key_frames : how many frames are read whole.
    """

    layout: Layout
    key_frames: int

    def to(self, device: torch.device | str) -> Params:
        """Return the params: they have no tensors."""
        return self


class FlashVggt(Patch):
    """Read frames through few descriptors each, and key frames whole."""

    class Config(Config):
        """Defaults are the paper's, for a model that was trained so."""

        factor: Positive = Field(4, description="How many times smaller a frame's grid of descriptors is, on each side.")
        every: Positive = Field(200, description="Frames of which one is read whole; the first always is.")
        count: Literal["log", "none"] = Field(
            "log", description="log: a descriptor counts as often as it has patches (ours); none: once, as in the paper."
        )

    config: Config

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | None:
        frames = layout.grid_thw[0]
        key_frames = math.ceil(frames / self.config.every)
        return None if self.config.factor == 1 or key_frames == frames else Params(layout, key_frames)

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        before, (frames, rows, columns) = params.layout.text_before, params.layout.grid_thw
        grids = [x[:, :, before:].unflatten(2, (frames, rows * columns)) for x in (call.k, call.v)]  # (B, H, T, N, D)
        order = farthest_first(grids[0].mean((1, 3), dtype=torch.float32), params.key_frames)  # (B, T)
        whole, others = order.split([params.key_frames, frames - params.key_frames], 1)
        parts = []
        for x, grid in zip((call.k, call.v), grids, strict=True):
            few = smaller_grid(_frames(grid, others).unflatten(3, (rows, columns)), self.config.factor)
            parts.append(torch.cat([x[:, :, :before], _frames(grid, whole).flatten(2, 3), few.flatten(2, 4)], 2))
        (k, v), number = parts, None
        if self.config.count == "log":
            number = torch.ones(1, k.shape[2], device=k.device)
            number[:, before + params.key_frames * rows * columns :] = self._patches_each(params)
        return attend_counted(call, call.q, k, v, number)

    def _descriptors(self, params: Params) -> int:
        return math.prod(max(length // self.config.factor, 1) for length in params.layout.grid_thw[1:])

    def _patches_each(self, params: Params) -> float:
        return math.prod(params.layout.grid_thw[1:]) / self._descriptors(params)

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, BlockPlan | None]:
        frames, rows, columns = params.layout.grid_thw
        few = self._descriptors(params)
        read = params.layout.text_before + params.key_frames * rows * columns + (frames - params.key_frames) * few
        return read / params.layout.length, None


def _frames(grid: Tensor, chosen: Tensor) -> Tensor:
    """Take frames (B, n) of a tensor (B, H, T, N, D)."""
    place = chosen[:, None, :, None, None].expand(-1, grid.shape[1], -1, *grid.shape[3:])
    return grid.gather(2, place)
