"""The image counts more where the model is unsure, or says what the image does not show: token by token.

AdaVBoost, in its second version SAVAA (arXiv 2602.13600). While the prompt is read, every image token has logits of its own; the best
probability that any of them gives a word, G(word), is how well the image supports it. With H the entropy of the next token's
distribution over its largest, log |vocabulary|, and v the likeliest token,

    VGE = alpha H + (1 - alpha) (1 - G(v)),        risk = min(1, VGE / scale),

visual grounding entropy, by which the step behind it is changed: in the row that answers, scores of image tokens are multiplied by
``1 + (image_boost - 1) risk`` and those of the prompt's text by ``1 / text_divisor``, ahead of the softmax, as released. There is a risk
only once a token was said: prompts are read as ever, and so is a step of no risk. Where a prompt shows several images, G is over all of
them. Rows without an image are left alone.

The stock logits decide, ahead of what ``generate`` does to them. Beams and drafts are refused, since no forward tells which row goes
on with which; an answer without a cache, labels and compiled steps run dense, and are counted.

What it does depends on the sign of scores, as in `pai`.

Experimental. On the bundled model, one small model of coloured shapes, it made no difference that shows. On `llava-smollm2`,
which hallucinates as large models do, neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from accelplug.kernels.spans import fit, keep_rows, masked, probabilities, read_rows, roomy, row_products
from accelplug.patches.base import Config, Patch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from accelplug.call import AttentionCall, Behind, Clock, Prompt, Site

TOKENS_AT_ONCE = 64
"""Image tokens whose logits are held at a time: of 150,000 words in float32, 38 MB."""
ANSWERED = "tokens were answered in this forward, and how sure the model was of them is told behind it"


def support(hidden: Tensor, unembed: Callable[[Tensor], Tensor]) -> Tensor:
    """Return G, (vocabulary,) float32, of what the decoder made of a row's image tokens, (N, C): probabilities, the best of any."""
    found = [unembed(some).float().softmax(-1).amax(0) for some in hidden.split(TOKENS_AT_ONCE)]
    return torch.stack(found).amax(0)


def grounding_entropy(logits: Tensor, grounding: Tensor, alpha: float) -> Tensor:
    """Return VGE, (B,) float32, of the next token's logits and of G, (B, vocabulary) each."""
    logs = logits.float().log_softmax(-1)
    entropy = torch.special.entr(logs.exp()).sum(-1) / math.log(logits.shape[-1])
    likeliest = grounding.gather(-1, logits.argmax(-1, keepdim=True))[:, 0]
    return alpha * entropy + (1 - alpha) * (1 - likeliest)


@dataclass(frozen=True, eq=False)
class Params:
    """Keys of images and of the prompt's text, bool (B, S) each; the risk of every row, float32 (B,), which each forward renews."""

    visual: Tensor
    text: Tensor
    risk: Tensor


class AdaptiveBoost(Patch):
    """Raise scores of the image, and lower those of the prompt's text, by how unsure the last token was."""

    class Config(Config):
        alpha: float = Field(
            0.5, ge=0, le=1, description="Weight of the entropy beside what the image supports. Code: 0.5 LLaVA-NeXT."
        )
        scale: float = Field(0.5, gt=0, le=1, description="Visual grounding entropy of full risk. Code: 0.5 LLaVA-NeXT.")
        image_boost: float = Field(
            1.1, ge=1, le=10, description="Factor on scores of the image at full risk. Code: 1.1; 1.3 Qwen3-VL."
        )
        text_divisor: float = Field(
            1.7, ge=1, le=10, description="What scores of the prompt's text are divided by. Code: 1.7; 1.3 Qwen3-VL."
        )

    config: Config
    needs = frozenset({"logits", "probabilities"})
    speed = False

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Params | str | None:
        if self.config.image_boost == 1:
            return None
        if clock.phase == "prefill":
            several = layout.answers > 1 if isinstance(layout.answers, int) else layout.answers.shape[1] > 1
            grown = not layout.past and bool((layout.valid & ~layout.asked).any())
            return ANSWERED if several or grown else None
        rows = len(layout.image)
        risk = state.setdefault("risk", torch.zeros(rows, device=layout.image.device))
        return Params(roomy(layout.visual), roomy(layout.valid & layout.asked & ~layout.visual), risk)

    def learn(self, behind: Behind, state: dict[str, Any]) -> None:
        prompt, shown = behind.prompt, behind.prompt.visual.any(-1).to(behind.logits.device)
        if behind.hidden is not None:
            new = prompt.visual[:, prompt.past :]
            known = state.get("grounding", torch.zeros_like(behind.logits, dtype=torch.float32))
            state["grounding"] = known.clone()
            for row in new.any(-1).nonzero().flatten().tolist():
                found = support(behind.hidden[row, new[row].to(behind.hidden.device)], behind.unembed)
                state["grounding"][row] = torch.maximum(known[row], found)
        if "risk" in state and "grounding" in state:
            entropy = grounding_entropy(behind.logits, state["grounding"], self.config.alpha)
            state["risk"].copy_(torch.where(shown, (entropy / self.config.scale).clamp(0, 1), 0.0))

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        here = call.q.device
        visual, text = (fit(span, call).to(here)[:, None, None] for span in (params.visual, params.text))
        risk = params.risk.to(here)[:, None, None, None]
        boost = torch.where(visual, 1 + (self.config.image_boost - 1) * risk, 1.0)
        factor = torch.where(text & (risk > 0), 1 / self.config.text_divisor, boost)  # [B, 1, 1, S_k]
        return read_rows(call, probabilities(masked(row_products(call) * factor, keep_rows(call, 1))))
