"""The two stages of Qihoo-T2X: windows exchange what they mean by proxies, and settle their texture by themselves.

PT-DiT (arXiv 2409.04005) replaces self-attention by two modules in a row. In the first, the proxies of the windows, means of their tokens,
attend to each other, and every token reads them:

    ``P' = softmax(s Q_P K_P^T) V_P``,   ``global_i = softmax(s q_i K_P^T) P'``;

in the second, tokens attend within their window, ``window_i``, then within windows that are moved by half of one, ``shifted_i``.

Trained in the paper: each of the four attentions has projections of its own, adds to the residual stream by itself, and reads what the
one before has made of it. A model that was not trained so has one q, k and v, which all of them use here, side by side; their answers are
averaged, by `weights` (ours: the paper has nothing to weigh). What reads the proxies knows no counts in the paper, nor here, windows being
of one size but at borders.

Without such training `proxy` is the honest form: exact near windows and counted proxies in one softmax. This one is here for models that
were trained in two stages, and to be compared with. Text reads every key, and is read in the first stage beside the proxies.

Experimental. On DINOv2-small, which was not trained so, little of the features is left (`benchmarks.encoders`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.merge import Cells, cells, merge, slot_sizes
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.windows import Windows, windows
from accelplug.patches.base import Config, Patch, Positive
from accelplug.patches.tokens.counted import between_text


@dataclass(frozen=True, eq=False)
class Params:
    """What `PtDit.attend` needs.

    Attributes
    ----------
    proxies : the windows as cells, of each of which there is a proxy.
    windows, shifted : the windows, and those that are moved by half of one; `ragged`: whether not all hold equally many tokens.
    cut : the arguments that they were made with.
    before : text tokens ahead of the visual ones.
    """

    proxies: Cells
    windows: Windows
    shifted: Windows
    cut: tuple
    before: int
    ragged: bool

    @classmethod
    def of(cls, grid_thw: tuple, window_thw: tuple, before: int, device: torch.device | str = "cpu") -> Params:
        """Cut a grid."""
        half = tuple(0 if n >= length else n // 2 for n, length in zip(window_thw, grid_thw, strict=True))
        shifted = windows(grid_thw, window_thw, half, device=device)
        cut = (grid_thw, window_thw)
        whole = windows(*cut, device=device)
        ragged = not bool(whole.held.all() and shifted.held.all())
        return cls(cells(*cut, device=device), whole, shifted, cut, before, ragged)

    def to(self, device: torch.device | str) -> Params:
        """Return the params with their tensors on `device`."""
        grid_thw, window_thw = self.cut
        return Params.of(grid_thw, window_thw, self.before, device)


Weight = Annotated[float, Field(ge=0.0, le=1e3)]


class PtDit(Patch):
    """Let windows read each other by proxies, and tokens their window and one moved by half."""

    class Config(Config):
        """The triple is frames, rows, columns, in tokens."""

        window_thw: tuple[Positive, Positive, Positive] = Field(
            (1, 8, 8), description="Tokens of a window on each axis; at the far borders it may hold fewer."
        )
        weights: tuple[Weight, Weight, Weight] = Field(
            (1.0, 1.0, 1.0), description="Of what proxies, window and moved window answer, in their average; not all 0."
        )

        @model_validator(mode="after")
        def _weighs(self) -> Self:
            if not sum(self.weights):
                raise ValueError("weights must not all be 0")
            return self

    config: Config

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | None:
        if all(length <= window for length, window in zip(layout.grid_thw, self.config.window_thw, strict=True)):
            return None
        return Params.of(layout.grid_thw, self.config.window_thw, layout.text_before)

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        weights = [weight / sum(self.config.weights) for weight in self.config.weights]
        out = self._across(call, params) * weights[0]
        for weight, cut in zip(weights[1:], (params.windows, params.shifted), strict=True):
            out = out + self._within(call, params, cut) * weight
        return between_text(call, out, params.before)

    def _across(self, call: AttentionCall, params: Params) -> Tensor:
        """What tokens read of the proxies, which have read each other: (B, H, N, D_v)."""
        before, behind = params.before, params.before + params.windows.tokens
        proxies = params.proxies.size.shape[-1]
        slot = params.proxies.slot.expand(len(call.k), -1)
        valid = None if call.mask is None else call.mask.float().expand(len(call.k), -1)
        weight = None if valid is None else valid[:, before:behind]
        mask = None
        if valid is not None:
            there = slot_sizes(slot, proxies, weight)
            mask = torch.cat([valid[:, :before], there, valid[:, behind:]], -1)[:, None, None] > 0

        def fewer(x: Tensor) -> Tensor:
            return torch.cat(
                [x[..., :before, :], merge(x[..., before:behind, :], slot, proxies, weight), x[..., behind:, :]], -2
            )

        q, k, v = call.q[..., before:behind, :], fewer(call.k), fewer(call.v)
        read = call.dense(q=merge(q, slot, proxies, weight), k=k, v=v, attn_mask=mask)
        if (groups := read.shape[1] // v.shape[1]) > 1:  # queries of one key head have each read something else
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        v = torch.cat([v[..., :before, :], read, v[..., before + proxies :, :]], -2)
        return call.dense(q=q, k=k, v=v, attn_mask=mask)

    def _within(self, call: AttentionCall, params: Params, cut: Windows) -> Tensor:
        """What tokens read of their window: (B, H, N, D_v)."""
        before, behind = params.before, params.before + cut.tokens
        batch, mask = len(call.q), None
        if params.ragged or call.mask is not None:
            valid = cut.held.expand(batch, -1, -1)
            if call.mask is not None:
                mine = call.mask.expand(batch, -1)[:, before:behind, None]
                valid = valid & cut.split(mine)[..., 0]
            mask = valid | ~valid.any(-1, keepdim=True)  # where nothing of a window may be read, all is: no answer counts
            mask = mask.flatten(0, 1)[:, None, None]

        def windowed(x: Tensor) -> Tensor:
            return cut.split(x[..., before:behind, :]).transpose(1, 2).flatten(0, 1)  # [B * G, H, n, D]

        out = call.dense(q=windowed(call.q), k=windowed(call.k), v=windowed(call.v), attn_mask=mask)
        return cut.join(out.unflatten(0, (batch, -1)).transpose(1, 2))

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, BlockPlan | None]:
        tokens, visual, proxies = call.q.shape[-2], params.windows.tokens, params.proxies.size.shape[-1]
        text = tokens - visual
        within = sum(int(cut.held.sum(-1).square().sum()) for cut in (params.windows, params.shifted))
        return ((proxies + visual) * (proxies + text) + within + text * tokens) / tokens**2, None
