"""Gaze shift: what the question made the model look at, it goes on looking at while it answers.

GIFT (arXiv 2510.22067, ICML 2026), from the paper's formulas alone. While the question is read, each of its words moves the gaze;
the moves towards an image token, added up over content words in the heads that move most, are its saliency, scaled to S in
[0, 1]. Then, in every row that answers and in a band of layers, the half of heads with most visual mass multiplies its
attention by ``exp(alpha S_j)``, and the half with most mass on the question by the factor by which visual mass has grown, so that
the question does not lose; rows are renormalised. A log-bias, in other words.

Experimental. On the bundled model, one small model of coloured shapes, it made
+3.1 points of hallucination (95 %: +1.4 to +4.7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch.nn.functional import pad

from accelplug.kernels.spans import fit, last, read_rows, replace_rows, row_attention
from accelplug.patches.base import Config, Patch

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Prompt, Site

_STOP = """a an the this that these those is are was were be been do does did have has had can could will would shall should may
    might must there here it its he she they them his her their we you i me my your our what which who whom whose where when why
    how and or but if not no of in on at to for from with by as about into over under than then so very please"""
STOP_WORDS = frozenset(_STOP.split())
"""Words that carry no content, in place of the paper's part-of-speech tagger."""


def saliency(p: Tensor, content: Tensor, visual: Tensor, head_share: float) -> Tensor:
    """Where the question moved the gaze, (B, S_k) float32 in [0, 1].

    Parameters
    ----------
    p : (B, H, R + 1, S_k), attention of R rows of the question and of the one ahead of them.
    content : bool (B, R), rows that count.
    visual : bool (B, S_k).
    """
    moves = (p[:, :, 1:] - p[:, :, :-1]).clamp(min=0) * visual[:, None, None] * content[:, None, :, None]
    by_head = moves.sum(2)  # [B, H, S_k]
    kept = upper(by_head.sum(-1), head_share)  # [B, H]
    gaze = (by_head * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
    count = visual.sum(-1, keepdim=True).clamp(min=1)
    mean = gaze.sum(-1, keepdim=True) / count
    spread = (((gaze - mean) * visual).square().sum(-1, keepdim=True) / count).sqrt()
    gaze = gaze.clamp(min=mean - 3 * spread, max=mean + 3 * spread)
    low = gaze.masked_fill(~visual, float("inf")).amin(-1, keepdim=True)
    high = gaze.masked_fill(~visual, float("-inf")).amax(-1, keepdim=True)
    return ((gaze - low) / (high - low).clamp(min=1e-12)).where(visual, 0.0)


def upper(x: Tensor, share: float) -> Tensor:
    """The given share of heads with the largest values, at least one: bool, x (..., H)."""
    number = max(1, round(share * x.shape[-1]))
    chosen = torch.zeros_like(x, dtype=torch.bool)
    return chosen.scatter(-1, x.topk(number).indices, True)


def shifted(p: Tensor, weight: Tensor, visual: Tensor, question: Tensor, head_share: float, balance: float) -> Tensor:
    """Attention of answering rows after the shift, renormalised: (B, H, R, S_k).

    Parameters
    ----------
    p : (B, H, R, S_k).
    weight : (B, S_k), factor on image tokens, 1 elsewhere.
    visual, question : bool (B, S_k).
    """
    seen = (p * visual[:, None, None]).sum(-1)  # [B, H, R]
    asked = (p * question[:, None, None]).sum(-1)
    lookers = upper(seen.mT, head_share).mT[..., None]
    askers = upper(asked.mT, head_share).mT[..., None]
    new = torch.where(lookers, p * weight[:, None, None], p)
    old = (seen[..., None] * lookers).sum((1, 3))
    grown = torch.where(old > 0, (new * visual[:, None, None] * lookers).sum((1, 3)) / old.clamp(min=1e-30), 1.0)  # [B, R]
    boost = 1 + (balance * grown[:, None, :, None] - 1) * question[:, None, None]
    new = torch.where(askers, new * boost, new)
    return new / new.sum(-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Params:
    """The prompt's spans; what to do in this layer; the map where it is known."""

    visual: Tensor
    question: Tensor
    weight: Tensor | None
    prompt: Prompt | None = None
    state: dict[str, Any] | None = None
    watch: bool = False
    enhance: bool = False


class Gift(Patch):
    """Keep the answer's gaze on what the question pointed at."""

    class Config(Config):
        saliency_layer: int = Field(
            11, ge=0, description="Layer whose gaze is read, 0-based. LLaVA-1.5-7B: 11. Give the rule both."
        )
        enhance: tuple[int, int] = Field(
            (12, 23), description="Layers that are enhanced, half-open. LLaVA-1.5-7B: 12 to 22."
        )
        alpha: float = Field(5.0, ge=0, le=20, description="Strength: attention times exp(alpha S). Paper: 5; Qwen2-VL: 4.")
        balance: float = Field(1.0, gt=0, le=10, description="Share of the growth that the question is given too. Paper: 1.")
        head_share: float = Field(0.5, gt=0, le=1, description="Share of heads, by mass. Paper: 0.5.")

    cite = "arXiv 2510.22067"
    needs = frozenset({"whole_prompt", "probabilities"})
    speed = False
    config: Config

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Params | None:
        if self.config.alpha == 0:
            return None
        first, stop = self.config.enhance
        enhance = first <= (site.layer or 0) < stop
        watch = site.layer == self.config.saliency_layer and clock.phase == "prefill" and not layout.past
        weight = state.get("weight")
        if not watch and (not enhance or weight is None):
            return None
        prompt = layout if clock.phase == "prefill" else None
        return Params(layout.visual, layout.question, weight, prompt, state, watch, enhance)

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        if params.watch:
            self._read_gaze(call, params)
        if not params.enhance or params.weight is None:
            return call.dense()
        rows = call.place.answers if call.place else 1
        visual, question = (fit(span, call).to(call.q.device) for span in (params.visual, params.question))
        weight = 1 + fit(params.weight - 1, call).to(call.q.device)
        p = row_attention(call, rows)
        new = shifted(p, weight, visual, question, self.config.head_share, self.config.balance)
        new = torch.where(visual.any(-1)[:, None, None, None], new, p)
        return replace_rows(call, read_rows(call, new), rows)

    def _read_gaze(self, call: AttentionCall, params: Params) -> None:
        """Read the saliency of image tokens off the question's rows, and keep it for the answer."""
        prompt, state = params.prompt, params.state
        assert prompt is not None and state is not None  # noqa: PT018
        content = prompt.question[:, prompt.past :].to(call.q.device) & ~self._stops(prompt)[:, prompt.past :].to(
            call.q.device
        )
        if not bool(content.any()):
            return
        rows = content.shape[1] - int(content.any(0).long().argmax())
        tail = last(call, min(rows + 1, call.q.shape[2]))
        p = row_attention(tail, tail.q.shape[2])
        visual = fit(params.visual, call).to(call.q.device)
        gaze = saliency(p, content[:, -(p.shape[2] - 1) :], visual, self.config.head_share)
        first = call.place.first_key if call.place else 0  # a sliding window has lost the first keys
        state["weight"] = torch.exp(self.config.alpha * pad(gaze, (first, 0)))

    def _stops(self, prompt: Prompt) -> Tensor:
        """Tokens that carry no content: bool (B, S); none where the patch was given no processor."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if tokenizer is None or prompt.ids is None:
            return torch.zeros_like(prompt.valid)
        known = {int(i) for i in prompt.ids.unique().tolist()}
        idle = [i for i in known if not (word := tokenizer.decode([i]).strip().lower()).isalnum() or word in STOP_WORDS]
        return torch.isin(prompt.ids, torch.tensor(idle, device=prompt.ids.device))
