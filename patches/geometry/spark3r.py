"""Spark3R: queries are merged mildly inside groups, keys and values pruned hard, by a factor of each layer's own (arXiv 2605.06270).

What a query asks is of its own view and suffers from merging; keys and values are a scene that all share, and bear being thinned. So the
two have settings apart:

* In each group of `group_hw` patches of a frame the queries that are most like another are averaged into it, a share `query_ratio` of all.
  Tokens of a slot get the result of its query. Special tokens ask for themselves.
* Of keys and values the first of each window is read, the special tokens of all frames, and the whole first frame where poses are told in
  its coordinates. `windows` has one window for each part of the global layers; the parts are equal.

Written from the abstract, which says so much and no more. Groups, windows and their order over layers, and `count: log` (a key counts as
often as its window has patches) are ours. Likeness is the cosine of the query, mean over heads, after norm and RoPE.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.merge import Partition, match, merge, partition, unmerge
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.thinned import first_of_windows
from accelplug.patches.base import Config, Patch, Positive
from accelplug.patches.tokens.counted import attend_counted


@dataclass(frozen=True, eq=False)
class Params:
    """What `Spark3R.attend` needs.

    Attributes
    ----------
    partition : of the patches' queries; `drawn` are the arguments it was made with.
    before, merged : special tokens of all frames, and how many queries are merged away.
    kept, number : int64 and float32 (n,), tokens whose keys are read, and how many tokens each stands for; None: all are read.
    """

    partition: Partition
    drawn: tuple
    before: int
    merged: int
    kept: Tensor | None
    number: Tensor | None

    def to(self, device: torch.device | str) -> Params:
        """Return the params with their tensors on `device`."""
        kept, number = (None if x is None else x.to(device) for x in (self.kept, self.number))
        return replace(self, partition=partition(*self.drawn, device=device), kept=kept, number=number)


class Spark3R(Patch):
    """Merge queries inside groups, and read a key of each window."""

    class Config(Config):
        """Ours: the abstract gives no numbers."""

        query_ratio: float = Field(0.5, ge=0.0, lt=1.0, description="Share of the patches' queries that is merged away.")
        group_hw: tuple[Positive, Positive] = Field(
            (4, 4), description="Rows and columns of a group, inside which queries merge."
        )
        windows: Annotated[tuple[tuple[Positive, Positive], ...], Field(min_length=1)] = Field(
            ((4, 4), (2, 2), (2, 4)),
            description="Rows and columns of the window of which one key is read, for equal parts of the global layers.",
        )
        count: Literal["log", "none"] = Field(
            "log", description="log: a key counts as often as its window has patches; none: once."
        )

    config: Config

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | str | None:
        if site.layer is None:
            return "its layers have no order"
        window = self.config.windows[site.layer * len(self.config.windows) // site.layers]
        kept, number = self._read(layout, window)
        drawn = (layout.grid_thw, (1, 2, 2), (1, *self.config.group_hw), None)
        made = partition(*drawn)
        merged = min(int(layout.visual * self.config.query_ratio), made.sources)
        return Params(made, drawn, layout.text_before, merged, kept, number) if merged or kept is not None else None

    def _read(self, layout: Layout, window: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Return which tokens' keys are read, and how many each stands for."""
        frames, rows, columns = layout.grid_thw
        number = torch.ones(layout.length)
        grid = number[layout.text_before :].view(frames, rows, columns)
        high, wide = (
            torch.tensor([min(size, length - start) for start in range(0, length, size)])
            for size, length in zip(window, (rows, columns), strict=True)
        )
        first = first_of_windows(rows, columns, window)
        each = torch.zeros(rows, columns)
        each[first] = (high[:, None] * wide).flatten().float()
        grid[int(layout.reference) :] = each
        kept = number.nonzero()[:, 0]
        return (None, None) if len(kept) == layout.length else (kept, number[kept])

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        before, slot, number = params.before, None, None
        q, k, v = call.q, call.k, call.v
        if params.merged:
            patches = q[:, :, before:]
            slot = match(patches.mean(1, dtype=torch.float32), params.partition, params.merged)
            q = torch.cat([q[:, :, :before], merge(patches, slot, params.partition.tokens - params.merged)], 2)
        if params.kept is not None and params.number is not None:
            k, v = k[:, :, params.kept], v[:, :, params.kept]
            number = params.number[None] if self.config.count == "log" else None
        out = attend_counted(call, q, k, v, number)
        return out if slot is None else torch.cat([out[:, :, :before], unmerge(out[:, :, before:], slot)], 2)

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, BlockPlan | None]:
        tokens = params.before + params.partition.tokens
        keys = tokens if params.kept is None else len(params.kept)
        return (tokens - params.merged) * keys / tokens**2, None
