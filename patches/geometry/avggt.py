"""AVGGT: early global layers read their own frame alone, middle ones a token of each window of the others (arXiv 2512.02541).

Of L global layers the first `frame_layers` are run as frame attention: a token reads the tokens of its own frame. The last
`dense_layers` stay as they are. In those between all queries are kept, and keys and values are thinned: read are the special tokens of all
frames, the whole first frame where poses are told in its coordinates, and of every other frame the first token of each window of
`window_hw`. Besides, a query whose own key is not among them reads it too, and all read one mean key and mean value of the n that are
dropped. All stands in one softmax:

    ``out_i = (sum_{j kept} e^{l_ij} v_j + [i dropped] e^{l_ii} v_i + c e^{s q_i k_mean} v_mean) / (the same without v)``.

The paper has c = 1 (``count: none``); with c = n (``count: log``, ours) the mean key weighs as much as those it stands for, so that equal
keys give what dense attention gives. Special tokens are exact keys; as queries they are approximated as all are.

The paper's VGGT of 24 global layers has 9 early ones and 4 late ones, its pi3 10 of 18; windows of (1, 2), (2, 2), (2, 3) and (3, 3)
keep a half to a ninth. No official code was found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.frames import batch_as_frames, frames_as_batch
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.thinned import attend_with_own, first_of_windows
from accelplug.patches.base import Config, Patch, Positive
from accelplug.patches.tokens.counted import EXTRA, keys_that_count, queries_that_count

LayerShare = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True, eq=False)
class Params:
    """What `Avggt.attend` needs.

    Attributes
    ----------
    layout : of the call.
    kept, dropped : int64, tokens whose keys are read and those whose are not, in order; None: frame attention.
    """

    layout: Layout
    kept: Tensor | None = None
    dropped: Tensor | None = None

    def to(self, device: torch.device | str) -> Params:
        """Return the params with their tensors on `device`."""
        if self.kept is None or self.dropped is None:
            return self
        return replace(self, kept=self.kept.to(device), dropped=self.dropped.to(device))


class Avggt(Patch):
    """Run early global layers as frame attention, and thin the keys of those between these and the last."""

    class Config(Config):
        """Shares are of the global layers, rounded to whole ones; 9 and 4 of 24 are the paper's for VGGT."""

        frame_layers: LayerShare = Field(
            0.375, description="LayerShare of the global layers, the first, that read their own frame alone."
        )
        dense_layers: LayerShare = Field(0.167, description="LayerShare of them, the last, that stay dense.")
        window_hw: tuple[Positive, Positive] = Field(
            (2, 2),
            description="Rows and columns of a window, of which one key is read. The paper's for a quarter of the keys.",
        )
        own_key: bool = Field(True, description="Whether a query also reads its own key where that is dropped.")
        mean_key: bool = Field(True, description="Whether all read the mean of the keys that are dropped.")
        count: Literal["log", "none"] = Field(
            "log", description="log: the mean key counts as often as keys are dropped (ours); none: once, as in the paper."
        )

    config: Config

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | str | None:
        if site.layer is None:
            return "its layers have no order"
        frames, rows, columns = layout.grid_thw
        if frames == 1 or site.layer >= site.layers - round(site.layers * self.config.dense_layers):
            return None
        if site.layer < round(site.layers * self.config.frame_layers):
            return Params(layout)
        read = torch.ones(layout.length, dtype=torch.bool)
        grid = read[layout.text_before :].view(frames, rows, columns)
        grid[int(layout.reference) :] = first_of_windows(rows, columns, self.config.window_hw)
        if read.all():
            return None
        return Params(layout, read.nonzero()[:, 0], (~read).nonzero()[:, 0])

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        if params.kept is None or params.dropped is None:
            parts = params.layout.grid_thw[0], params.layout.special
            return batch_as_frames(call.dense(*(frames_as_batch(x, *parts) for x in (call.q, call.k, call.v))), *parts)
        q, (k, v) = call.q, (x[:, :, params.kept] for x in (call.k, call.v))
        if self.config.mean_key:
            mean = (x[:, :, params.dropped].mean(2, keepdim=True, dtype=torch.float32).to(x.dtype) for x in (call.k, call.v))
            k, v = (torch.cat([x, one], 2) for x, one in zip((k, v), mean, strict=True))
            if self.config.count == "log":
                number = torch.ones(1, k.shape[2], device=k.device)
                number[:, -1] = len(params.dropped)
                q, k, v = queries_that_count(q), keys_that_count(k, number, call.scale), pad(v, (0, EXTRA))
        if not self.config.own_key:
            return call.dense(q=q, k=k, v=v)[..., : call.v.shape[-1]]
        return attend_with_own(q, k, v, call.scale, (call.q, call.k, call.v), params.dropped)

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, BlockPlan | None]:
        if params.kept is None:
            return 1 / params.layout.grid_thw[0], None
        return (len(params.kept) + self.config.mean_key) / params.layout.length, None
