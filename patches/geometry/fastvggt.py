"""FastVGGT: most tokens of a global layer are merged into those of the first frame and of a few cells (arXiv 2509.02560).

Destinations are all patches of the first frame and one patch of each cell of every other frame. Every ``1 / protect``-th patch of a frame
is protected: neither merged nor merged into, and so are the special tokens of all frames. All else are sources. A source goes to the
destination whose metric has the largest cosine with its own; the `ratio` N of them that are most like theirs are averaged into it: q, k
and v by one match. A key that stands for n tokens has log n added to its scores, and all tokens of a slot get the result of its query.

The release has four defects, which are mended here:

* A ratio of .9 is promised, and cells and protection keep .35 of 1,000 frames: here `inspect` says what is kept.
* A token that is both protected and a destination stands twice in the sequence, and counts twice: here it stands once.
* Cells of a grid that is not whole cells are written in one run of numbers, so that rows skew; without random draws no cell has a
  destination at all. Here cells are indexed by row and column, and what is left over at the far borders are sources.
* The grid is a constant, 28 x 37, chunks of the search can come to nothing, and all samples of a batch use the match of the first: here
  the grid is the call's, and each sample has a match of its own.

Ours beside: log n (the release counts a merged key once); special tokens are never merged into, so that a camera token asks its own
question; draws and protection are the same in every frame, so that frames behind the first are a set. The metric is the key, mean over
heads, after norm and RoPE; the release takes the block's normed input, which is not known here. With `reuse_layers`
layers in a row share the match of the first of them, as in LiteVGGT (arXiv 2512.04939), which tunes the model for that.

Official code: mystorm16/FastVGGT, without a licence file; written from the paper and a description of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.merge import Partition, merge, partition, slot_sizes, unmerge
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.base import Config, Patch, Positive, Seed
from accelplug.patches.tokens.counted import attend_counted
from accelplug.patches.tokens.sharing import SharedMatch, shared_match, slot_of


@dataclass(frozen=True, eq=False)
class Params:
    """What `FastVggt.attend` needs.

    Attributes
    ----------
    partition : of all tokens, special ones first; one tile.
    merged : how many tokens are merged away.
    memory : where the match is shared, None if it is not; `reads`: whether one that is there is good here.
    """

    partition: Partition
    merged: int
    memory: SharedMatch | None
    reads: bool

    def to(self, device: torch.device | str) -> Params:
        """Return the params with their tensors on `device`."""
        made = self.partition
        names = ("source", "destination", "is_source", "is_destination")
        return replace(self, partition=replace(made, **{name: getattr(made, name).to(device) for name in names}))


class FastVggt(Patch):
    """Merge tokens of all frames into those of the first and of a few cells, attend, and copy results back."""

    class Config(Config):
        """Defaults are the release's."""

        ratio: float = Field(
            0.9, ge=0.0, lt=1.0, description="Share of all tokens that is merged away, as far as there are sources."
        )
        cell_hw: tuple[Positive, Positive] = Field(
            (2, 2), description="Rows and columns of a cell, of which one patch is a destination."
        )
        protect: float = Field(
            0.1, ge=0.0, le=1.0, description="Share of the patches that is neither merged nor merged into."
        )
        seed: Seed = Field(33, description="Of the draw of destinations, the same for all layers and frames.")
        reuse_layers: Positive = Field(
            1, description="Layers in a row that share a match, that of the first of them; the release: none do."
        )
        count: bool = Field(
            True, description="Whether a merged key counts as often as it has tokens (ours); the release: once."
        )

    config: Config

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | None:
        made = self._partition(layout)
        merged = min(int(layout.length * self.config.ratio), made.sources)
        if not merged:
            return None
        memory, reads = shared_match(self, site, layout, clock, state, interval=1, layers=self.config.reuse_layers)
        return Params(made, merged, memory, reads)

    def _partition(self, layout: Layout) -> Partition:
        """Who may merge into whom, of all tokens of a call."""
        frames, rows, columns = layout.grid_thw
        chosen = torch.zeros(rows * columns, dtype=torch.bool)
        drawn = partition((1, rows, columns), (1, *self.config.cell_hw), (1, rows, columns), self.config.seed)
        chosen[drawn.destination[drawn.is_destination]] = True
        protected = torch.zeros_like(chosen)
        if self.config.protect:
            protected[:: max(int(1 / self.config.protect), 1)] = True
        destination = chosen.repeat(frames, 1)
        destination[0] = True
        source = ~(destination | protected)
        before = layout.text_before
        sources, destinations = (before + x.flatten().nonzero()[:, 0][None] for x in (source, destination))
        is_source, is_destination = (torch.ones_like(x, dtype=torch.bool) for x in (sources, destinations))
        return Partition(sources, destinations, is_source, is_destination, sources.shape[1], layout.length)

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        slots = params.partition.tokens - params.merged
        slot = slot_of(call.k, params.partition, params.merged, params.memory, params.reads)
        number = slot_sizes(slot, slots) if self.config.count else None
        q, k, v = (merge(x, slot, slots) for x in (call.q, call.k, call.v))
        return unmerge(attend_counted(call, q, k, v, number), slot)

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, BlockPlan | None]:
        return (1 - params.merged / params.partition.tokens) ** 2, None
