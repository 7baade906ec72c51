"""ToMe: tokens that look alike are averaged before attention, and share its result.

Token merging for diffusion (arXiv 2303.17604) at attention's q, k and v, with keys weighed as in arXiv 2210.09461.

In every cell of the grid one token is a destination, all others are sources. A source's likeness is its cosine with the
destination of its tile that is most like it; the ``ratio * N`` sources that are most like theirs are averaged into them.
A key that stands for n tokens gets log n added to its scores. With ``mode: qkv`` queries are averaged too, and all tokens
of a slot get the result of its query.

The metric is the key, mean over heads, as attention sees it: after norm and RoPE (the release takes the block's input, which
is not known here; spatial positions differ by less than a tile). Search is local to a tile, so that matching costs
O(N * tile). Text is never merged, and text queries read every key.

Destinations are drawn from (seed, step // interval) alone, so they are the same for all layers, samples and guidance
branches; matches are each sample's own, so that a batch is what its samples are alone. Layers share a match within one guidance
branch; where a pipeline does not name the branch and calls twice a step, steps after the first of an `interval` take the
later call's. Where the step is not known, every forward matches anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.merge import Partition, match, merge, partition, slot_sizes, unmerge
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.base import Config, Patch, Positive
from accelplug.patches.tokens.counted import attend_counted, between_text

@dataclass(eq=False)
class SharedMatch:
    """The match that several calls share. Graphs write `slot`, and look at nothing else.

    Attributes
    ----------
    slot : int64 (B, N), None where there is none yet.
    period, step : of `interval` steps, and the last step in it, that it is for; None where steps are not known.
    leader : the first layer that shares it: it makes the match.
    """

    slot: Tensor | None = None
    period: int | None = None
    step: int | None = None
    leader: int | None = None


@dataclass(frozen=True, eq=False)
class Params:
    """What `Tome.attend` needs.

    Attributes
    ----------
    partition : of the visual tokens; `drawn` are the arguments it was made with.
    before, merged : text tokens ahead of the visual ones, and how many of these are merged away.
    memory : where the match is shared, None if it is not; `reads`: whether one that is there is good here.
    """

    partition: Partition
    drawn: tuple
    before: int
    merged: int
    memory: SharedMatch | None
    reads: bool

    def to(self, device: torch.device | str) -> Params:
        """Return the params with their tensors on `device`."""
        return replace(self, partition=partition(*self.drawn, device=device))


class Tome(Patch):
    """Merge tokens that look alike before attention; each key counts as often as it has tokens."""

    class Config(Config):
        """Triples are frames, rows, columns, in tokens. Ratio and cells are those of the release."""

        ratio: float = Field(0.5, ge=0.0, lt=1.0, description="Share of the visual tokens that is merged away.")
        mode: Literal["kv", "qkv"] = Field("kv", description="kv merges keys and values; qkv queries too, and copies back.")
        cell_thw: tuple[Positive, Positive, Positive] = Field(
            (1, 2, 2), description="Tokens of a cell, in which one is the destination: at most all others can be merged."
        )
        tile_thw: tuple[Positive, Positive, Positive] = Field(
            (1, 16, 16), description="Tokens of a tile, in which a token looks for its destination."
        )
        destination: Literal["random", "first"] = Field(
            "random",
            description="Which token of a cell is the destination: drawn anew every `interval` steps, or its first.",
        )
        seed: int = Field(0, ge=0, lt=1 << 32, description="Seed of that draw.")
        interval: Positive = Field(1, description="Steps that share a match.")
        reuse_layers: Positive = Field(1, description="Layers in a row that share a match, that of the first of them.")
        proportional: bool = Field(
            True, description="Whether a merged key counts as often as it has tokens: log(size) is added."
        )

    config: Config

    def merged(self, layout: Layout) -> int:
        """Return how many of the visual tokens are merged away."""
        whole_cells = math.prod(n // min(c, n) for n, c in zip(layout.grid_thw, self.config.cell_thw, strict=True))
        return min(int(layout.visual * self.config.ratio), layout.visual - whole_cells)

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | None:
        config, merged = self.config, self.merged(layout)
        if not merged:
            return None
        period = None if clock.step is None else clock.step // config.interval
        seed = None if config.destination == "first" else (config.seed << 31) + (period or 0)
        drawn = (layout.grid_thw, config.cell_thw, config.tile_thw, seed)
        memory, reads = self._memory(site, layout, clock.step, period, state)
        return Params(partition(*drawn), drawn, layout.text_before, merged, memory, reads)

    def _memory(
        self, site: Site, layout: Layout, step: int | None, period: int | None, state: dict[str, Any]
    ) -> tuple[SharedMatch | None, bool]:
        """Return the memory that `site` shares with other layers and steps, and whether a match that is in it will be good."""
        if self.config.interval == self.config.reuse_layers == 1 or site.layer is None:
            return None, False
        memories = state.setdefault("shared", {}).setdefault("tome", Bounded(256))
        memory = memories.get((self, layout, site.layer // self.config.reuse_layers), SharedMatch)
        if memory.period != period:
            memory.period, memory.leader, memory.slot = period, None, None
        if memory.leader is not None and site.layer > memory.leader:
            return memory, True
        if step is None or memory.step is None or step <= memory.step:  # not known to be a later step of the same run
            memory.slot = None
        memory.leader, memory.step = site.layer, step
        return memory, memory.slot is not None

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        tokens, before = params.partition.tokens, params.before
        behind, slots = before + tokens, tokens - params.merged
        slot = self._slot(call.k[..., before:behind, :], params)  # [B, N]
        valid = None if call.mask is None else call.mask.float().expand(len(call.k), -1)
        weight = None if valid is None else valid[:, before:behind]

        def fewer(x: Tensor) -> Tensor:
            return torch.cat(
                [x[..., :before, :], merge(x[..., before:behind, :], slot, slots, weight), x[..., behind:, :]], -2
            )

        q = call.q[..., before:behind, :]
        if self.config.mode == "qkv":
            q = merge(q, slot, slots)
        number = None  # [B, S - merged], tokens that each key stands for
        if self.config.proportional or valid is not None:
            valid = torch.ones_like(call.k[:, 0, :, 0], dtype=torch.float32) if valid is None else valid
            number = torch.cat([valid[:, :before], slot_sizes(slot, slots, weight), valid[:, behind:]], -1)
            number = number if self.config.proportional else (number > 0).float()
        out = attend_counted(call, q, fewer(call.k), fewer(call.v), number)
        if self.config.mode == "qkv":
            out = unmerge(out, slot)
        return between_text(call, out, before)

    def _slot(self, keys: Tensor, params: Params) -> Tensor:
        """Return the match: the one in memory where that is good, else that of these visual keys (B, H_kv, N, D)."""
        memory = params.memory
        if memory is not None and params.reads and memory.slot is not None and len(memory.slot) == len(keys):
            return memory.slot
        slot = match(keys.mean(1, dtype=torch.float32), params.partition, params.merged)
        if memory is not None:
            memory.slot = slot
        return slot

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, BlockPlan | None]:
        tokens, visual = call.q.shape[-2], params.partition.tokens
        queries = visual - params.merged if self.config.mode == "qkv" else visual
        pairs = queries * (tokens - params.merged) + (tokens - visual) * tokens
        return pairs / tokens**2, None
