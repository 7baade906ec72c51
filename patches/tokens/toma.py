"""ToMA: the tokens that cover a window best stand for all of it, and every token spreads over those that are like it.

Token Merge with Attention (arXiv 2509.10918) at attention's q, k and v. In each window of n tokens, destinations D are chosen greedily to
maximise ``sum_i max_{j in D} cos(x_i, x_j)`` (facility location). Token i goes to destination d by the share

    ``A_di = softmax_{d in D}(tau cos(x_d, x_i))``,   merged ``= (A / A 1) X``,   unmerged ``= A^T Y``,

products of small matrices without sorting; with the release's tau = 1,000 (`sharpness`) nearly all of a token goes to one destination.
`mode: qkv`, the paper's, merges queries too and unmerges what they are answered; `mode: kv` leaves them.

The paper merges what enters the block and the MLP too, which is out of a patch's reach; the metric here is the key, mean over heads,
after norm and RoPE. It gives a merged token the position of its destination; here rotated keys are averaged, among tokens of one window
that are alike. Ours: a key counts as often as it has tokens (`proportional`), as in `tome`. Matches are made for one sample each (the
release takes the first sample's for all), and shared by `interval` steps and `reuse_layers` layers, as the paper does with several of both.
Text is never merged, and text queries read every key.

The release cuts the 64 x 64 tokens of FLUX.1 into 256 windows, leaves the first five blocks of each kind alone, and matches anew every
third step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.facility import choose, merge_shares, share_sizes, token_shares, unmerge_shares
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.windows import Windows, windows
from accelplug.patches.base import Config, Patch, Positive
from accelplug.patches.tokens.counted import attend_counted, between_text
from accelplug.patches.tokens.sharing import SharedMatch, shared_match


@dataclass(frozen=True, eq=False)
class Params:
    """What `Toma.attend` needs.

    Attributes
    ----------
    windows : of the visual tokens; `cut` are the arguments they were made with.
    used : bool (G, d), as many destinations as each window has; `slots` int64 (n,), where they are among G * d places.
    before : text tokens ahead of the visual ones.
    memory : where the match is shared, None if it is not; `reads`: whether one that is there is good here.
    """

    windows: Windows
    cut: tuple
    used: Tensor
    slots: Tensor
    before: int
    memory: SharedMatch | None
    reads: bool

    def to(self, device: torch.device | str) -> Params:
        """Return the params with their tensors on `device`."""
        cut = windows(*self.cut, device=device)
        return replace(self, windows=cut, used=self.used.to(device), slots=self.slots.to(device))


class Toma(Patch):
    """Let the tokens that cover a window best stand for it; every token spreads over those that are like it."""

    class Config(Config):
        """The triple is frames, rows, columns, in tokens. Ratio and sharpness are those of the release, windows ours."""

        ratio: float = Field(0.5, ge=0.0, lt=1.0, description="Share of a window's tokens that is merged away.")
        mode: Literal["kv", "qkv"] = Field("qkv", description="kv merges keys and values; qkv queries too, and unmerges.")
        tile_thw: tuple[Positive, Positive, Positive] = Field(
            (1, 8, 8), description="Tokens of a window on each axis; at the far borders it may hold fewer."
        )
        sharpness: float = Field(
            1000.0, gt=0.0, le=1e5, description="How much of a token goes to the likest: factor on cosines."
        )
        interval: Positive = Field(1, description="Steps that share a match.")
        reuse_layers: Positive = Field(1, description="Layers in a row that share a match, that of the first of them.")
        proportional: bool = Field(
            True, description="Whether a merged key counts as often as it has tokens: log(size) is added."
        )

    config: Config

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | None:
        config = self.config
        cut = (layout.grid_thw, config.tile_thw)
        found = windows(*cut)
        held = found.held.sum(-1)
        kept = held - (held * config.ratio).long()
        if bool((kept == held).all()):
            return None
        used = torch.arange(int(kept.max())) < kept[:, None]
        slots = used.flatten().nonzero().flatten()
        shared = {"interval": config.interval, "layers": config.reuse_layers}
        memory, reads = shared_match(self, site, layout, clock, state, **shared)
        return Params(found, cut, used, slots, layout.text_before, memory, reads)

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        cut, slots, before = params.windows, params.slots, params.before
        behind = before + cut.tokens
        share = self._share(call.k[..., before:behind, :], params)  # [B, G, d, n]
        valid = None if call.mask is None else call.mask.float().expand(len(call.k), -1)
        weight = None if valid is None else valid[:, before:behind]

        def fewer(x: Tensor) -> Tensor:
            visual = merge_shares(x[..., before:behind, :], share, cut, weight).index_select(2, slots)
            return torch.cat([x[..., :before, :], visual, x[..., behind:, :]], -2)

        q = call.q[..., before:behind, :]
        if self.config.mode == "qkv":
            q = merge_shares(q, share, cut).index_select(2, slots)
        number = None  # [B, S_k], tokens that each key stands for
        if self.config.proportional or valid is not None:
            valid = torch.ones_like(call.k[:, 0, :, 0], dtype=torch.float32) if valid is None else valid
            sizes = share_sizes(share, cut, weight).index_select(1, slots)
            number = torch.cat([valid[:, :before], sizes, valid[:, behind:]], -1)
            number = number if self.config.proportional else (number > 0).float()
        out = attend_counted(call, q, fewer(call.k), fewer(call.v), number)
        if self.config.mode == "qkv":
            places = out.new_zeros((*out.shape[:2], share.shape[1] * share.shape[2], out.shape[-1]))
            out = unmerge_shares(places.index_copy(2, slots, out), share, cut)
        return between_text(call, out, before)

    def _share(self, keys: Tensor, params: Params) -> Tensor:
        """Return the match: the one in memory where that is good, else that of these visual keys (B, H_kv, N, D)."""
        memory = params.memory
        if memory is not None and params.reads and memory.for_batch(len(keys)) is not None and memory.weight is not None:
            return memory.weight
        metric = keys.mean(1, dtype=torch.float32)
        chosen = choose(metric, params.windows, params.used.shape[-1])
        share = token_shares(metric, chosen, params.windows, params.used, self.config.sharpness)
        if memory is not None:
            memory.slot, memory.weight = chosen, share
        return share

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, BlockPlan | None]:
        tokens, visual, slots = call.q.shape[-2], params.windows.tokens, params.slots.shape[0]
        queries = slots if self.config.mode == "qkv" else visual
        pairs = queries * (tokens - visual + slots) + (tokens - visual) * tokens
        return pairs / tokens**2, None
