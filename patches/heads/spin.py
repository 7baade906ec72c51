"""Heads that look at the image least are turned down, layer by layer and token by token.

SPIN ("Mitigating Hallucinations in Vision-Language Models through Image-Guided Head Suppression", arXiv 2505.16411, EMNLP 2025). In the
row that answers, a head's score is the sum over image tokens of its scores ahead of the softmax, ``sum_j q.k_j / sqrt(d)``. A share of a
layer's heads with the largest is left alone, the others' outputs are multiplied by a gain. As released, the share is rounded down
to whole heads. The softmax and the spread by which the paper divides change no order. Where no image token can be read, as in a window
that has left the image behind, all heads are left alone.

Experimental. Watch the share of *yes*: an audit by others saw answers turn to yes nearly always at 0.8 of the heads. On
`llava-smollm2` it made -1.9 points of hallucination (95 %: -3.6 to -0.8), more than a shifted threshold; descriptions name less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch.nn.functional import pad

from accelplug.kernels.spans import fit, probabilities, roomy, row_scores, unit_values
from accelplug.kernels.subsets import upper_heads
from accelplug.patches.base import Config, Patch

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Prompt, Site


@dataclass(frozen=True, eq=False)
class Params:
    """The images' tokens, bool (B, S)."""

    visual: Tensor


class Spin(Patch):
    """Turn down the heads whose scores say that the image matters least to them."""

    class Config(Config):
        keep_share: float = Field(
            0.95, gt=0, le=1, description="Share of a layer's heads left alone. Code: 0.95 captions, 0.8 yes or no."
        )
        gain: float = Field(0.08, ge=0, le=10, description="Factor on the others. Code: 0.08 captions, 0.1 yes or no.")

    config: Config
    needs = frozenset({"answers", "probabilities"})
    speed = False

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Params | None:
        return None if self.config.gain == 1 or self.config.keep_share == 1 else Params(roomy(layout.visual))

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        return call.dense() * self._gains(call, params).to(call.q.dtype)

    def attention(self, call: AttentionCall, params: Params) -> Tensor:
        return unit_values(call).dense()  # a gain on what heads give changes nothing of where they look

    def _gains(self, call: AttentionCall, params: Params) -> Tensor:
        """Factor on every head's output, (B, H, S_q, 1), 1 but for rows that answer."""
        rows = call.place.answers if call.place else 1
        scores = row_scores(call, rows)  # [B, H, n, S_k]
        seen = fit(params.visual, call).to(scores.device)[:, None, None] & (probabilities(scores) > 0)
        towards = scores.masked_fill(~seen, 0.0).sum(-1)  # [B, H, n]
        heads = (call.place.gather_heads(towards) if call.place else towards).shape[1]
        kept = upper_heads(call, towards, max(1, math.floor(self.config.keep_share * heads)) / heads)
        gains = torch.where(kept | ~seen.any(-1), 1.0, self.config.gain)
        before = call.q.shape[2] - gains.shape[2]
        if isinstance(rows, int):
            return pad(gains, (before, 0), value=1.0)[..., None]
        whole = gains.new_ones(*call.q.shape[:3])
        return whole.scatter(2, rows[:, None].to(gains.device).expand_as(gains), gains)[..., None]
