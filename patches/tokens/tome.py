"""ToMe: tokens that look alike are averaged before attention, and share its result.

Token merging for diffusion (arXiv 2303.17604) at attention's q, k and v, with keys weighed as in arXiv 2210.09461.

In every cell of the grid one token is a destination, all others are sources. A source's likeness is its cosine with the
destination of its tile that is most like it; the ``ratio * N`` sources that are most like theirs are averaged into them.
A key that stands for n tokens gets log n added to its scores. With ``mode: qkv`` queries are averaged too, and all tokens
of a slot get the result of its query.

Means of tokens that differ are shorter than these. `merging: mlerp` (ToFu, arXiv 2312.01026) keeps their direction and gives them
the length of the longest; `merging: prune` leaves sources out, and their destination counts for them. ToFu prunes in early layers, in
which averages do not go through unharmed, and merges in later ones: two rules by `where: {layers: ...}`.

The metric is the key, mean over heads, as attention sees it: after norm and RoPE (spatial positions differ by less than a tile). The
release takes the block's input: `metric: input` takes what enters the projections, which is that behind the block's norm. Search is local
to a tile, so that matching costs O(N * tile). Text is never merged, and text queries read every key.

With `mode: input` tokens are merged ahead of the projections, as in the release, and what leaves them is copied back: the projections of
merged tokens are saved too. That is for modules that are given tokens alone, of UNets and of encoders without RoPE; others run dense,
counted. Class and register tokens are not merged, but read merged keys. The gate times attention, and so does not judge this mode.

Destinations are drawn from (seed, step // interval) alone, so they are the same for all layers, samples and guidance
branches; matches are each sample's own, so that a batch is what its samples are alone. Layers share a match within one guidance
branch; where a pipeline does not name the branch and calls twice a step, steps after the first of an `interval` take the
later call's. Where the step is not known, every forward matches anew.

On CUDA the match and the means are Triton kernels, which no GPU has run yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.merge import Partition, merge, mlerp, own_tokens, partition, slot_sizes, unmerge
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.base import Config, Inside, Patch, Positive
from accelplug.patches.tokens.counted import attend_counted, between_text
from accelplug.patches.tokens.sharing import SharedMatch, period_of, shared_match, slot_of


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
        mode: Literal["kv", "qkv", "input"] = Field(
            "kv",
            description="kv merges keys and values; qkv queries too, and copies back; input what enters the projections, which it saves.",
        )
        metric: Literal["keys", "input"] = Field(
            "keys",
            description="What is alike: keys, or what enters the projections, as in the release; always so with mode: input.",
        )
        merging: Literal["mean", "mlerp", "prune"] = Field(
            "mean",
            description="What a slot has: the mean of its tokens; that, as long as the longest of them; or its destination alone.",
        )
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

    @property
    def enters(self) -> bool:
        """Whether it is given what enters the projections."""
        return "input" in (self.config.mode, self.config.metric)

    def merged(self, layout: Layout) -> int:
        """Return how many of the visual tokens are merged away."""
        whole_cells = math.prod(n // min(c, n) for n, c in zip(layout.grid_thw, self.config.cell_thw, strict=True))
        return min(int(layout.visual * self.config.ratio), layout.visual - whole_cells)

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | None:
        config, merged = self.config, self.merged(layout)
        if not merged:
            return None
        seed = None if config.destination == "first" else (config.seed << 31) + (period_of(clock, config.interval) or 0)
        drawn = (layout.grid_thw, config.cell_thw, config.tile_thw, seed)
        shared = {"interval": config.interval, "layers": config.reuse_layers}
        memory, reads = shared_match(self, site, layout, clock, state, **shared)
        return Params(partition(*drawn), drawn, layout.text_before, merged, memory, reads)

    def enter(self, hidden: Tensor, params: Params) -> Inside:
        tokens, before = params.partition.tokens, params.before
        behind, slots = before + tokens, tokens - params.merged
        slot = slot_of(hidden[:, None, before:behind], params.partition, params.merged, params.memory, params.reads)
        if self.config.mode != "input":
            return Inside(hidden, lambda call: self._attend(call, params, slot), lambda out: out)
        own = own_tokens(slot, slots, params.partition) if self.config.merging == "prune" else None
        visual = self._merged(hidden[:, None, before:behind], slot, slots, own)[:, 0]
        number = None  # [B, S - merged]
        if self.config.proportional:
            ones = hidden.new_ones(hidden.shape[:2], dtype=torch.float32)
            number = torch.cat([ones[:, :before], slot_sizes(slot, slots), ones[:, behind:]], -1)

        def leave(out: Tensor) -> Tensor:
            end = before + slots
            return torch.cat([out[:, :before], unmerge(out[:, None, before:end], slot)[:, 0], out[:, end:]], 1)

        fewer = torch.cat([hidden[:, :before], visual, hidden[:, behind:]], 1)
        return Inside(fewer, lambda call: attend_counted(call, call.q, call.k, call.v, number), leave)

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        behind = params.before + params.partition.tokens
        visual = call.k[..., params.before : behind, :]
        slot = slot_of(visual, params.partition, params.merged, params.memory, params.reads)
        return self._attend(call, params, slot)

    def _attend(self, call: AttentionCall, params: Params, slot: Tensor) -> Tensor:
        """Attend by a match, int64 (B, N)."""
        tokens, before = params.partition.tokens, params.before
        behind, slots = before + tokens, tokens - params.merged
        valid = None if call.mask is None else call.mask.float().expand(len(call.k), -1)
        weight = None if valid is None else valid[:, before:behind]
        own = own_tokens(slot, slots, params.partition) if self.config.merging == "prune" else None
        counts = weight if own is None else own if weight is None else own * weight  # what a slot is made of

        def fewer(x: Tensor) -> Tensor:
            visual = self._merged(x[..., before:behind, :], slot, slots, counts)
            return torch.cat([x[..., :before, :], visual, x[..., behind:, :]], -2)

        q = call.q[..., before:behind, :]
        if self.config.mode == "qkv":
            q = self._merged(q, slot, slots, own)
        number = None  # [B, S - merged], tokens that each key stands for
        if self.config.proportional or valid is not None:
            valid = torch.ones_like(call.k[:, 0, :, 0], dtype=torch.float32) if valid is None else valid
            visual = slot_sizes(slot, slots, weight)
            if own is not None and weight is not None:  # a destination that may not be read stands for nobody
                visual = visual * (slot_sizes(slot, slots, counts) > 0)
            number = torch.cat([valid[:, :before], visual, valid[:, behind:]], -1)
            number = number if self.config.proportional else (number > 0).float()
        out = attend_counted(call, q, fewer(call.k), fewer(call.v), number)
        if self.config.mode == "qkv":
            out = unmerge(out, slot)
        return between_text(call, out, before)

    def _merged(self, x: Tensor, slot: Tensor, slots: int, weight: Tensor | None) -> Tensor:
        """Tokens (B, H, N, D) -> slots (B, H, slots, D)."""
        return (mlerp if self.config.merging == "mlerp" else merge)(x, slot, slots, weight)

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, BlockPlan | None]:
        tokens, visual = call.q.shape[-2], params.partition.tokens
        queries = visual - params.merged if self.config.mode == "qkv" else visual
        pairs = queries * (tokens - params.merged) + (tokens - visual) * tokens
        return pairs / tokens**2, None
