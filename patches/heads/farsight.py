"""Attention registers: what a row of the prompt would waste on outliers, it may leave in places behind it that hold nothing.

FarSight ("Seeing Far and Clearly: Mitigating Hallucinations in MLLMs with Attention Causal Decoding", arXiv 2505.16652, CVPR 2025), as
its ``Shell/farsight_patch.py`` has it. A softmax must spend a row's whole attention. Here the keys behind row i, which the causal mask
hides, stand as registers with scores of their own, and their share is dropped behind the softmax:

    W = s in the past, P in the future;    P_ij = -(j - i) (sigma (1 - fade i / (N - 1)) + slope_h);    A = softmax(W), 0 in the future,

so that rows sum to less than 1. Registers decay with their distance, less so in later rows, and by a slope of each head, ALiBi's
``2^(-8 (h + 1) / H)``. They hold no values, and all that is wanted of them is a sum: with L_i the logarithm of the sum of exponentials
of a row's own scores, and n_i the keys behind it,

    o'_i = o_i sigmoid(L_i - log c_i),    c_i = sum_{t=1..n_i} exp(-t r_ih),    r_ih = sigma (1 - fade i / (N - 1)) + slope_h.

Behind the newest row there is nothing, and so it has no registers. Here rows of the prompt have some, one for each of its tokens behind
them, and an answer reads what became of that. The released code has no cache and reads all tokens anew for each: rows of the answer get
registers too as it grows, and those of the prompt more. That is ``answer_rows: true`` with ``generate(use_cache=False)``.

Padding makes none. Where images are read both ways, registers stand beside what a row may read. Prompts without an image are left
alone. A new turn needs a new cache.

What registers take depends on the size of scores, which the softmax does not know: a constant that is added to all scores of a row
changes nothing there, and here it does.

Experimental. On the bundled model, one small model of coloured shapes, it made no difference that shows. On `llava-smollm2` it
made +3.3 points of hallucination (95 %: +1.4 to +5.6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from accelplug.kernels.spans import row_scores
from accelplug.patches.base import Config, Patch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Prompt, Site

SCORED_AT_ONCE = 128
"""Rows whose scores are held at a time."""


def log_registers(rate: Tensor, number: Tensor) -> Tensor:
    """Return log sum_{t=1..n} exp(-t r) of rates r > 0 and numbers n, -inf where n is 0: the shape that both broadcast to."""
    return torch.log1p(-torch.exp(-rate * number)) - rate - torch.log1p(-torch.exp(-rate))


@dataclass(frozen=True, eq=False)
class Params:
    """Of the rows of this forward: how many tokens stand behind each, float32 (B, S_q), 0 for padding and in rows without an image; and
    how far each is along its sequence, float32 (B, S_q) in [0, 1]."""

    behind: Tensor
    along: Tensor


class FarSight(Patch):
    """Give rows of the prompt registers behind them, which take attention and hold nothing."""

    class Config(Config):
        sigma: float = Field(
            math.log(256) / math.log(1024),
            gt=0,
            le=100,
            description="Decay of registers, each token. Code: log 256 / log 1024 = 0.8.",
        )
        fade: float = Field(0.25, ge=0, lt=1, description="Share of it that is gone in the last row. Code: half of 0.5.")
        slopes: bool = Field(True, description="Whether each head's slope is added. Code.")
        answer_rows: bool = Field(
            False, description="Whether an answer that is read anew, without a cache, has and is registers. Code: yes."
        )
        strength: float = Field(1.0, ge=0, le=1000, description="Factor on what registers take; 0 for none. Ours.")

    config: Config
    needs = frozenset({"whole_prompt", "probabilities"})
    speed = False
    _heads = 1

    def check(self, sites: Sequence[Site], heads: int, width: int) -> None:
        self._heads = heads

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Params | None:
        if self.config.strength == 0 or clock.phase == "decode" or layout.drafts:
            return None
        valid = (layout.valid if self.config.answer_rows else layout.valid & layout.asked).float()
        at, last = valid.cumsum(-1) - 1, valid.sum(-1, keepdim=True) - 1
        behind = (last - at) * valid * layout.visual.any(-1, keepdim=True)
        return Params(behind[:, layout.past :], (at / last.clamp(min=1))[:, layout.past :])

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        out, queries, first = call.dense(), call.q.shape[2], call.place.first_head if call.place else 0
        heads = torch.arange(first + 1, first + 1 + call.q.shape[1], device=out.device)
        slope = torch.exp2(-8 * heads / self._heads) if self.config.slopes else torch.zeros_like(heads, dtype=torch.float32)
        behind, along = (x[:, None, -queries:].to(out.device) for x in (params.behind, params.along))  # [B, 1, S_q]
        rate = self.config.sigma * (1 - self.config.fade * along) + slope[:, None]
        registers = log_registers(rate, behind) + math.log(self.config.strength)  # [B, H, S_q]
        own = torch.cat(
            [self._own(call, rows) for rows in torch.arange(queries, device=out.device).split(SCORED_AT_ONCE)], -1
        )
        gain = torch.where(behind > 0, torch.sigmoid(own - registers), 1.0)
        return (out * gain[..., None]).to(out.dtype)

    def _own(self, call: AttentionCall, rows: Tensor) -> Tensor:
        """The logarithm of the sum of some rows' own scores' exponentials: (B, H, n)."""
        return row_scores(call, rows.expand(len(call.q), -1)).logsumexp(-1)
