"""Two streams of image tokens, as the vision tower sees them: local detail, and summaries of the scene.

PAINT ("Fixing Imbalanced Attention to Mitigate In-Context Hallucination", arXiv 2501.12206). The class token of the vision tower
tells two kinds of patches apart: those it attends to in its first layer (local), and the few that stand out of its attention in
the last layer but one (summaries: registers of the whole scene). In the row that answers, scores of both are raised by a share of
their size, as in PAI. The abstract's head-specific modulation is not in the released code, which treats all heads alike;
`head_share` offers it: only the heads with most visual mass are changed. The code's contrast of logits with those of the text
alone is `contrast`. Needs a vision tower with a class token and one image token a patch, as in LLaVA-1.5.

Experimental. On the bundled model, one small model of coloured shapes, it made +2.5 points of hallucination (95 %: +1.1 to +3.9).
On `llava-smollm2` it made no difference that shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch.nn.functional import pad

from accelplug.kernels.spans import fit, raised, row_attention
from accelplug.kernels.subsets import upper, upper_heads
from accelplug.patches.base import Config, Patch

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Prompt, Site


def streams(first: Tensor, late: Tensor, local_share: float) -> tuple[Tensor, Tensor]:
    """Local and summary patches of one image, bool (N,) each, from the class token's attention (N,) in an early and a late layer."""
    low, high = late.float().quantile(torch.tensor([0.25, 0.75], device=late.device))
    summary = late > high + 1.5 * (high - low)
    return upper(first, local_share) & ~summary, summary


@dataclass(frozen=True, eq=False)
class Params:
    """How much each key's score is raised (B, S) float32; the image's tokens (B, S) bool."""

    share: Tensor
    visual: Tensor


class Imbalance(Patch):
    """Raise the scores of local and of summary image tokens in the rows that answer."""

    class Config(Config):
        local_share: float = Field(0.25, gt=0, le=1, description="Share of patches that are local. Code: 0.25.")
        local_alpha: float = Field(0.7, ge=0, le=10, description="Share of its size that a local score gains. Code: 0.7.")
        summary_alpha: float = Field(
            0.3, ge=0, le=10, description="Share of its size that a summary's score gains. Code: 0.3."
        )
        head_share: float = Field(1.0, gt=0, le=1, description="Share of heads that are changed, by visual mass. Code: all.")

    config: Config
    needs = frozenset({"answers", "vision_attention", "probabilities"})
    speed = False

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Params | None:
        if self.config.local_alpha == self.config.summary_alpha == 0:
            return None
        if maps := state.pop("vision_attention", None):
            share = self._share(layout, *maps)
            known = state.get("share", share[:, :0])  # of images of earlier turns
            state["share"] = share + pad(known, (0, share.shape[1] - known.shape[1]))
        return Params(state["share"], layout.visual[:, : state["share"].shape[1]]) if "share" in state else None

    def _share(self, prompt: Prompt, first: Tensor, late: Tensor) -> Tensor:
        """Scatter each new image's streams to its tokens; `first` and `late` are (B, S), 0 off the new images."""
        share = torch.zeros_like(first)
        for row in range(len(share)):
            new = prompt.image[row, prompt.past :]
            for number in new[new > 0].unique().tolist():
                here = prompt.image[row] == number
                local, summary = streams(first[row, here], late[row, here], self.config.local_share)
                share[row, here] = self.config.local_alpha * local.float() + self.config.summary_alpha * summary.float()
        return share

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        heads = None
        if self.config.head_share < 1:
            p = row_attention(call, call.place.answers if call.place else 1)
            mass = (p * fit(params.visual, call).to(p.device)[:, None, None]).sum(-1)  # [B, H, n]
            heads = upper_heads(call, mass, self.config.head_share)
        return raised(call, params.share, heads)
