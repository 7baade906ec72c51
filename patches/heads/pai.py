"""Pay attention to the image: scores of image tokens raised by a share of their size, in the row that answers.

PAI ("Paying More Attention to Image", arXiv 2407.21771, ECCV 2024): ``s_j += alpha |s_j|`` for image tokens j, before the softmax,
in the last row only, layers from 2 on. What it does depends on the sign and offset of the scores, which the softmax does not
know: models with normed queries, biases or other positions answer differently (`visual_bias` does not). It is here as the
baseline that papers compare with. It is half of the method: the other, a contrast of logits with those of the text alone, is
`contrast`, and the recipes have both as ``pai_contrast``.

HGAI ("Devils in Middle Layers of Large Vision-Language Models", arXiv 2411.16724, CVPR 2025) is ``sizes: mean``: every head's score
gains a share of the mean size over the layer's heads, in the middle layers, so that heads that do not look are told where others do.

Experimental. On the bundled model, one small model of coloured shapes, it made +1.7 points of hallucination (95 %: +0.6 to +3.1).
On `llava-smollm2` it made no difference that shows, as HGAI did not beside a shifted threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from accelplug.kernels.spans import raised, roomy
from accelplug.patches.base import Config, Patch

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Prompt, Site


@dataclass(frozen=True, eq=False)
class Params:
    """How much each key's score is raised, as a share of its size: (B, S) float32."""

    share: Tensor


class Pai(Patch):
    """Raise the scores of image tokens in the rows that answer."""

    class Config(Config):
        alpha: float = Field(
            0.2, ge=0, le=10, description="Share of a score's size that is added. Paper: 0.2; 0.5 captions."
        )
        sizes: Literal["head", "mean"] = Field(
            "head",
            description="Whose size that is: the head's own, or the mean over the layer's heads. PAI: head; HGAI: mean.",
        )

    config: Config
    needs = frozenset({"answers", "probabilities"})
    speed = False

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Params | None:
        return Params(roomy(self.config.alpha * layout.visual.float())) if self.config.alpha else None

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        return raised(call, params.share, mean=self.config.sizes == "mean")
