"""Agent attention: a few agents read all keys for everybody, and every query reads the agents.

Agent Attention (arXiv 2312.08874) as it is used, without training, on Stable Diffusion. Of n agents a_c, queries themselves,

    ``v_c = softmax(s a_c K^T) V``,   ``out_i = softmax(s^k q_i A^T) v + w v_i``,

with s = 1 / sqrt(d), k = `k_scale` and w = `shortcut`: two calls of the user's own attention that cost N n each, not N^2. The exponent
makes the second softmax sharper, and the shortcut brings back what makes a token differ from its neighbours.

Agents are means of the visual queries: of a cell of the grid each, or of the tokens that are merged into one destination a cell because
they look alike, in its tile (``agents: merged``), which is nearer to the release: that one looks all over the picture, by what enters
the projections. Text asks every key and is not an agent; visual queries read text by way of the agents.

The release has agents in the first 20 of 50 steps alone (cells of 4 x 4, and beside them two fifths of the tokens merged) and merges
tokens from then on: a recipe does that by ``where: {steps: "0:40%"}`` and a rule of `tome` behind it. Only the finest attention of Stable
Diffusion 1.5 is touched.

Experimental. On DINOv2-small, in every layer, little of the features is left (`benchmarks.encoders`), with or without exponent and
shortcut: attention that was not trained for agents, and is not the finest of a UNet, should not have them. On transformers with RoPE, whose
queries are averaged behind it, nothing is published.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.merge import Cells, Partition, cells, match, merge, partition
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.base import Config, Patch, Positive


@dataclass(frozen=True, eq=False)
class Params:
    """What `Agent.attend` needs.

    Attributes
    ----------
    pools : which queries an agent is the mean of; `cut` are the arguments it was made with.
    before : text tokens ahead of the visual ones.
    """

    pools: Cells | Partition
    cut: tuple
    before: int

    def to(self, device: torch.device | str) -> Params:
        """Return the params with their tensors on `device`."""
        make = cells if isinstance(self.pools, Cells) else partition
        return replace(self, pools=make(*self.cut, device=device))


class Agent(Patch):
    """Let a few agents read all keys, and all queries read the agents."""

    class Config(Config):
        """Triples are frames, rows, columns, in tokens. Scale, shortcut and cells are those of the release."""

        cell_thw: tuple[Positive, Positive, Positive] = Field(
            (1, 4, 4), description="Tokens of a cell on each axis, for which there is one agent."
        )
        agents: Literal["cells", "merged"] = Field(
            "cells", description="Which queries an agent is the mean of: those of its cell, or those most like one of it."
        )
        tile_thw: tuple[Positive, Positive, Positive] = Field(
            (1, 16, 16), description="Tokens of a tile, in which a query looks for its agent (agents: merged)."
        )
        k_scale: float = Field(0.3, ge=0.0, le=4.0, description="Exponent of the scale with which queries read agents.")
        shortcut: float = Field(0.075, ge=0.0, le=4.0, description="Weight of a token's own value in what it is answered.")

    config: Config

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | None:
        config = self.config
        cut: tuple[Any, ...] = (layout.grid_thw, config.cell_thw)
        pools: Cells | Partition = cells(*cut)
        if config.agents == "merged":
            cut = (*cut, config.tile_thw, None)
            pools = partition(*cut)
        return None if 2 * _agents_of(pools) >= layout.visual else Params(pools, cut, layout.text_before)

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        before = params.before
        behind = before + _tokens_of(params.pools)
        q = call.q[..., before:behind, :]
        agents = self._agents(q, params.pools)
        asking = torch.cat([call.q[..., :before, :], agents, call.q[..., behind:, :]], -2)
        read = call.dense(q=asking) if call.mask is None else call.dense(q=asking, attn_mask=call.mask[:, None, None])
        end = before + agents.shape[-2]
        sharper = q * call.scale ** (self.config.k_scale - 1)
        out = call.dense(q=sharper, k=agents, v=read[..., before:end, :], attn_mask=None)
        v = call.v[..., before:behind, :]
        out = out + self.config.shortcut * v.repeat_interleave(out.shape[1] // v.shape[1], 1)
        return torch.cat([read[..., :before, :], out, read[..., end:, :]], -2)

    def _agents(self, q: Tensor, pools: Cells | Partition) -> Tensor:
        """Means of visual queries: (B, H, N, D) -> (B, H, n, D)."""
        if isinstance(pools, Cells):
            return merge(q, pools.slot.expand(len(q), -1), _agents_of(pools))
        slot = match(q.mean(1, dtype=torch.float32), pools, pools.sources)
        return merge(q, slot, _agents_of(pools))

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, BlockPlan | None]:
        tokens, visual, agents = call.q.shape[-2], _tokens_of(params.pools), _agents_of(params.pools)
        return ((agents + tokens - visual) * tokens + visual * agents) / tokens**2, None


def _agents_of(pools: Cells | Partition) -> int:
    """How many agents there are."""
    return pools.size.shape[-1] if isinstance(pools, Cells) else pools.tokens - pools.sources


def _tokens_of(pools: Cells | Partition) -> int:
    """How many visual tokens there are."""
    return pools.slot.shape[-1] if isinstance(pools, Cells) else pools.tokens
