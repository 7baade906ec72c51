"""FlashVGGT: every frame is read through a small grid of descriptors, key frames through all their patches (arXiv 2512.01540).

All queries are kept. Keys and values are: the special tokens of all frames; every patch of the key frames; and of each other frame its
grid made smaller by `factor` on each side, as bilinear interpolation without a filter makes it: the mean of the two middle rows and
columns of a cell, or its middle one where the factor is odd. The first frame is a key frame, and so is one more of every `every` frames.

Approximate: the paper makes hidden states smaller ahead of the projections, and trains the model for that. Without training nothing is
published. Here k and v themselves are made smaller, after norm and RoPE. In the paper key frames come by k-means over mean tokens, here the
one whose mean key is farthest from those that were chosen is next, which depends on no order of frames. In the release a key frame's
patches and descriptors are both read, so that it counts twice; here its patches alone. `count: log` (ours) has a descriptor count as often
as it has patches.

With `chunk` frames arrive so many at a time: a chunk reads its own frames and what is kept of earlier ones, the special tokens and
descriptors of a `keep`-th of them. Key frames are then the first of each `every`. Nothing else goes from frame to frame, so a chunk is told
what it would be told if later ones had not been taken yet. All frames still come in one call, since a model takes the first picture of each
call for the one that poses are told from.

With `own` (ours) a query reads the patches of its own frame, or chunk, and not the descriptors of these. Where all frames come at once a
list of keys for each frame would be as many copies. Instead all read one list, and by log-sum-exps a frame's descriptors are taken out of
the softmax and its patches put in.

Official code: wzpscott/FlashVGGT; written from the paper and a description of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.frames import frame_by_frame, specials_first
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.thinned import attend_lse, exchange, farthest_first, smaller_grid
from accelplug.patches.base import Config, Patch, Positive
from accelplug.patches.tokens.counted import EXTRA, attend_counted, keys_that_count, queries_that_count


@dataclass(frozen=True, eq=False)
class Params:
    """What `FlashVggt.attend` needs.

    Attributes
    ----------
    layout : of the call.
    key_frames : how many frames are read whole, where all come at once.
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
        chunk: int = Field(0, ge=0, description="Frames that arrive at a time, 10 in the paper; 0: all come at once.")
        keep: Positive = Field(5, description="Frames of an earlier chunk of which one is kept. The paper's.")
        own: bool = Field(False, description="Whether a query reads its own frame whole, or its own chunk (ours).")

    config: Config

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | None:
        frames, late = layout.grid_thw[0], 0 < self.config.chunk < layout.grid_thw[0]
        key_frames = math.ceil(frames / self.config.every)
        return None if not late and (self.config.factor == 1 or key_frames == frames) else Params(layout, key_frames)

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        layout = params.layout
        parts = frames, special = layout.grid_thw[0], layout.special
        k, v = (frame_by_frame(x, *parts).unflatten(2, (frames, -1)) for x in (call.k, call.v))  # (B, H, T, P, D)
        if not 0 < self.config.chunk < frames:
            order = farthest_first(k[:, :, :, special:].mean((1, 3), dtype=torch.float32), params.key_frames)  # (B, T)
            whole, others = order.split([params.key_frames, frames - params.key_frames], 1)
            if self.config.own:
                return self._read_with_own(call, k, v, whole, others, layout)
            return self._read(call, call.q, k, v, whole, others, layout)
        out = []
        for chunk, (whole, others) in zip(
            frame_by_frame(call.q, *parts).split(self.config.chunk * k.shape[3], 2), self.chunks(frames), strict=True
        ):
            out.append(self._read(call, chunk, k, v, _as_index(whole, k), _as_index(others, k), layout))
        return specials_first(torch.cat(out, 2), *parts)

    def _read(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, whole: Tensor, others: Tensor, layout: Layout
    ) -> Tensor:
        """Have queries (B, H, S_q, D) read frames (B, n) whole, and others through their special tokens and descriptors."""
        return attend_counted(call, q, *self._seen(k, v, whole, others, layout))

    def _read_with_own(
        self, call: AttentionCall, k: Tensor, v: Tensor, whole: Tensor, others: Tensor, layout: Layout
    ) -> Tensor:
        """As `_read`, of all queries; but those of `others` read their own patches, and not the descriptors of these."""
        parts = frames, special = layout.grid_thw[0], layout.special
        described = others.shape[1], self._descriptors(layout)
        few_k, few_v, number = self._seen(k, v, whole, others, layout)
        gone = [x[:, :, -math.prod(described) :].unflatten(2, described).flatten(1, 2) for x in (few_k, few_v)]
        come = [_frames(x[:, :, :, special:], others).flatten(1, 2) for x in (k, v)]  # (B, H * n, ...), as all of `others`
        q = frame_by_frame(call.q, *parts)
        asking = _frames(q.unflatten(2, (frames, -1)), others).flatten(1, 2)
        if number is not None:
            q, few_k, few_v = queries_that_count(q), keys_that_count(few_k, number, call.scale), pad(few_v, (0, EXTRA))
        out, lse = attend_lse(q, few_k, few_v, call.scale)
        out, lse = (x.unflatten(2, (frames, -1)) for x in (out[..., : v.shape[-1]], lse[..., None]))
        read, sums = (_frames(x, others).flatten(1, 2) for x in (out, lse))
        own = exchange(asking, (read, sums[..., 0]), gone, come, call.scale, self._times(layout))
        own = own.unflatten(1, (k.shape[1], -1))
        return specials_first(out.scatter(2, others[:, None, :, None, None].expand_as(own), own).flatten(2, 3), *parts)

    def _seen(
        self, k: Tensor, v: Tensor, whole: Tensor, others: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return which keys and values of frames (B, H, T, P, D) are read, descriptors last, and how often each counts, (1, n)."""
        few = []
        for x in (k, v):
            apart = _frames(x, others)
            grid = smaller_grid(apart[:, :, :, layout.special :].unflatten(3, layout.grid_thw[1:]), self.config.factor)
            parts = _frames(x, whole).flatten(2, 3), apart[:, :, :, : layout.special].flatten(2, 3), grid.flatten(2, 4)
            few.append(torch.cat(parts, 2))
        if self.config.count == "none":
            return few[0], few[1], None
        number = torch.ones(1, few[0].shape[2], device=k.device)
        number[:, few[0].shape[2] - others.shape[1] * self._descriptors(layout) :] = self._times(layout)
        return few[0], few[1], number

    def chunks(self, frames: int) -> Iterator[tuple[list[int], list[int]]]:
        """Yield which frames are read whole, and which through descriptors, by each chunk."""
        memory: list[int] = []
        for first in range(0, frames, self.config.chunk):
            own = range(first, min(first + self.config.chunk, frames))
            keys = set(range(0, own.stop, self.config.every)) | (set(own) if self.config.own else set())
            yield sorted(keys), [frame for frame in (*memory, *own) if frame not in keys]
            memory += own[:: self.config.keep]

    def _descriptors(self, layout: Layout) -> int:
        return math.prod(max(length // self.config.factor, 1) for length in layout.grid_thw[1:])

    def _times(self, layout: Layout) -> float:
        """How often a descriptor counts."""
        return math.prod(layout.grid_thw[1:]) / self._descriptors(layout) if self.config.count == "log" else 1.0

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, BlockPlan | None]:
        layout, keys, own = params.layout, params.key_frames, int(self.config.own)
        frames, patches, few = layout.grid_thw[0], math.prod(layout.grid_thw[1:]), self._descriptors(layout)
        if not 0 < self.config.chunk < frames:
            read = [(keys, keys, frames - keys), (frames - keys, keys + own, frames - keys - own)]
        else:
            asking = [min(self.config.chunk, frames - first) for first in range(0, frames, self.config.chunk)]
            read = [(n, len(whole), len(others)) for n, (whole, others) in zip(asking, self.chunks(frames), strict=True)]
        pairs = sum(n * (whole * (layout.special + patches) + others * (layout.special + few)) for n, whole, others in read)
        return pairs / frames / layout.length, None


def _as_index(chosen: list[int], x: Tensor) -> Tensor:
    """Frames of all of a batch (B, ...), (B, n)."""
    return torch.tensor(chosen, device=x.device, dtype=torch.int64).expand(len(x), -1)


def _frames(grid: Tensor, chosen: Tensor) -> Tensor:
    """Take frames (B, n) of a tensor (B, H, T, N, D)."""
    place = chosen[:, None, :, None, None].expand(-1, grid.shape[1], -1, *grid.shape[3:])
    return grid.gather(2, place)
