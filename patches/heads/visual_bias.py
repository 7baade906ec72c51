"""More weight on the image, less on the system prompt: a bias on spans of keys.

After the training-free modulation of AVAR ("From Narrow to Panoramic Vision", arXiv 2603.03825, ICLR 2026) and VAF (ClearSight, arXiv
2503.13107, CVPR 2025), for text behind the image, asked and answered. ``weigh: scores`` is theirs, as released: signed scores of
a span times its weight, ``w s``, VAF's 1.15 and 0.95; AVAR's are 1 + alpha_img and 1 - alpha_sys, of which only alpha_sys up to 0.4 was
found, and no layers. What that does depends on the score's sign, which the softmax does not know: a negative score falls. The
default is the same wish in its sound form: multiply the *attention* to a span and renormalise, ``p' = w p / sum(w p)``, which is
``softmax(s + log w)``. Where a model caps its scores (Gemma 2) either would land inside of the cap: its calls run dense, and are
counted. VAF's code counts all that stands ahead of the image to the system prompt, here it is the system's turn.

The papers' Visual Attention Score, mass on images beside mass on the system prompt, is `accelplug.inspect`'s.

Experimental. On the bundled model, one small model of coloured shapes, it made no difference in answers, at any of two strengths.
On `llava-smollm2` neither; as released, on scores, +3.1 points of hallucination (95 %: +1.1 to +5.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from accelplug.errors import RecipeError
from accelplug.kernels.spans import attend_biased, decode_biased, fit, last, roomy
from accelplug.kernels.subsets import shuffled
from accelplug.patches.base import Config, Numbers, Patch, Seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Prompt, Site


@dataclass(frozen=True, eq=False)
class Params:
    """Which keys: float32 (B, 2, S), visual and system; which queries: bool (B, S_q), None for the one of a decode step.

    `logs`, float32 (1, 2), are the logarithms of their weights; `bias`, float32 (B, 1, 1, S), is both together for a decode step in
    which every head's attention is changed.
    """

    columns: Tensor
    logs: Tensor
    rows: Tensor | None
    bias: Tensor | None = None


class VisualBias(Patch):
    """Multiply later text's attention to images and to the system prompt, and renormalise."""

    class Config(Config):
        image_weight: float = Field(1.15, ge=1e-6, le=100, description="Factor on attention to images. VAF's enhancement.")
        system_weight: float = Field(0.95, ge=1e-6, le=100, description="Factor on attention to the system prompt. VAF's.")
        weigh: Literal["attention", "scores"] = Field(
            "attention",
            description="What the weights multiply: attention, renormalised, or signed scores. VAF, AVAR: scores.",
        )
        heads: Numbers | None = Field(None, description="Heads that are changed, 0-based; all if left out.")
        control_seed: Seed | None = Field(None, description="Control: as many tokens, drawn with this seed. Ours.")

    config: Config
    needs = frozenset({"scores", "turns"})
    speed = False

    def check(self, sites: Sequence[Site], heads: int, width: int) -> None:
        if self.config.heads and max(self.config.heads) >= heads:
            raise RecipeError(f"visual_bias: heads: the model has heads 0 to {heads - 1}, got {max(self.config.heads)}.")

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Params | None:
        if self.config.image_weight == self.config.system_weight == 1:
            return None
        spans = [layout.visual, layout.system]
        if self.config.control_seed is not None:
            spans = [shuffled(span, self.config.control_seed, layout.valid) for span in spans]
        columns = torch.stack(spans, 1).float()
        logs = columns.new_tensor([[math.log(self.config.image_weight), math.log(self.config.system_weight)]])
        if clock.phase == "prefill":
            return Params(columns, logs, layout.rows)
        columns, ready = roomy(columns), self.config.heads is None and self.config.weigh == "attention"
        return Params(columns, logs, None, _laid_on_keys(logs, columns) if ready else None)

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        here = call.q.device
        single = params.rows is None and call.place is not None and call.place.explicit and call.q.shape[-2] == 1
        if single and params.bias is not None:
            return decode_biased(call, fit(params.bias, call).to(here))
        columns = fit(params.columns, call).to(here)  # [B, 2, S_k]
        logs = self._by_head(params.logs.to(here), call)  # [H|1, 2]
        if self.config.weigh == "scores":
            return self._on_scores(call, params, _laid_on_keys(params.logs.to(here), columns), logs)
        if single:
            return decode_biased(call, _laid_on_keys(logs, columns))
        rows = columns.new_ones(1, 1) if params.rows is None else params.rows[:, -call.q.shape[2] :].to(columns)  # [B, S_q]
        return attend_biased(call, rows[:, None, :, None] * logs[:, None], columns.mT)

    def _on_scores(self, call: AttentionCall, params: Params, bias: Tensor, logs: Tensor) -> Tensor:
        """Attend with weighed scores, which weighed keys give; `bias` (B, 1, 1, S_k) has the logarithms of their weights."""
        k = (call.k * bias.mT.exp()).to(call.k.dtype)
        chosen = (logs != 0).any(-1)[:, None, None]  # [H|1, 1, 1]
        if params.rows is None:
            new = call.dense(k=k)
            return new if self.config.heads is None else torch.where(chosen, new, call.dense())
        rows = params.rows[:, -call.q.shape[2] :].to(call.q.device)
        out, number = call.dense(), int(rows.shape[1] - rows.any(0).long().argmax()) if bool(rows.any()) else 0
        if not number:
            return out
        new, own = last(call, number).dense(k=k).to(out.dtype), out[:, :, -number:]
        return torch.cat([out[:, :, :-number], torch.where(chosen & rows[:, None, -number:, None], new, own)], 2)

    def _by_head(self, weights: Tensor, call: AttentionCall) -> Tensor:
        """Log-weights (1, 2) of all heads alike, or (H, 2) where some heads are left alone."""
        if self.config.heads is None:
            return weights
        first = call.place.first_head if call.place else 0
        chosen = torch.arange(first, first + call.q.shape[1], device=call.q.device)
        wanted = torch.tensor(self.config.heads, device=call.q.device)
        return torch.isin(chosen, wanted)[:, None] * weights


def _laid_on_keys(logs: Tensor, columns: Tensor) -> Tensor:
    """Log-weights (H|1, 2) laid on both kinds of keys (B, 2, S): (B, H|1, 1, S)."""
    return (logs[:, :, None, None] * columns[:, None, :, None]).sum(2)
