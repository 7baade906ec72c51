"""Words that do not look at a part of a picture are not read where that part is drawn: C-Upscale's damping of words.

A crop that reads the prompt of the whole picture draws all that it names once more. C-Upscale (arXiv 2505.16976) screens the words of each
crop by where they look in the whole picture. Here the whole picture is the first row of a batch and crops are the others, so that
each call of cross-attention has both. With ``A`` (N, S) the attention of the first row, the mean over heads, a crop in box b reads
word s if

    ``mean_(n in b) A[n, s]  >=  least  mean_n A[n, s]``

The first row reads all. Of several prompts between bars the first alone is screened, the others are a crop's own. Branches of guidance in
one batch have each their first row. Whether the paper masks words or makes them weaker is not known to us: this masks.

Its `boxes` go with a batch that `accelplug.upscale` makes: it has no name in recipes. Experimental. Nothing was measured with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from accelplug.errors import ShapeError
from accelplug.patches import base
from accelplug.patches.base import Patch
from accelplug.patches.guidance.regions import BoxShares

if TYPE_CHECKING:
    from accelplug.call import AttentionCall, Clock, Layout, Site


@dataclass(frozen=True, eq=False)
class Looked:
    """What `Screen.attend` needs.

    Attributes
    ----------
    shares : of each box the share that a visual token has in its mean, float32 (boxes, N).
    words : how many keys are of the first prompt.
    """

    shares: Tensor
    words: int

    def to(self, device: torch.device | str) -> Looked:
        """Return the params with their tensor on `device`."""
        return Looked(self.shares.to(device), self.words)


class Screen(Patch):
    """Crops read those words of the first prompt that look at their part of the whole picture."""

    class Config(base.Config):
        boxes: Annotated[tuple[BoxShares, ...], Field(min_length=1)] = Field(
            description="Top, left, bottom and right of each crop in the order of the batch, in shares of the picture."
        )
        least: float = Field(
            0.5, gt=0, le=1, description="Times as much as everywhere that a word must look at a box. Ours, not measured."
        )

    name = "screen"
    cite = "arXiv 2505.16976"
    summary = "Crops read those words of the first prompt that look at their part of the whole picture."
    family = "texts"
    kinds = ("cross",)
    speed = False
    config: Config

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Looked:
        _, rows, columns = layout.grid_thw
        boxes = torch.tensor(self.config.boxes)
        down, across = (_covered(boxes[:, side], boxes[:, side + 2], n) for side, n in enumerate((rows, columns)))
        shares = (down[:, :, None] * across[:, None]).flatten(1)
        return Looked(shares / shares.sum(-1, keepdim=True), layout.texts[0] if layout.texts else layout.text)

    def attend(self, call: AttentionCall, params: Looked) -> Tensor:
        reads = self.reads(call, params)
        mask = reads if call.mask is None else reads & call.mask
        return call.dense(attn_mask=mask[:, None, None])

    def reads(self, call: AttentionCall, params: Looked) -> Tensor:
        """Return which keys each row of the batch reads, bool (B, S).

        Raises
        ------
        ShapeError
            If the batch has other rows than a whole picture and its crops.
        """
        rows = len(self.config.boxes) + 1
        if call.q.shape[0] % rows:
            raise ShapeError(
                f"screen: expected batches of a whole picture and {rows - 1} crops, got one of {call.q.shape[0]}. Leave guidance and "
                "images per prompt as accelplug.upscale sets them."
            )
        q, k = call.q[::rows].float(), call.k[::rows].float()
        scores = call.scale * q @ k.mT  # [guidance, heads, N, S]
        if call.mask is not None:
            scores = scores.masked_fill(~call.mask[::rows, None, None], -torch.inf)
        looks = scores.softmax(-1).mean(1)[..., : params.words]
        reads = params.shares @ looks >= self.config.least * looks.mean(1, keepdim=True)
        reads = torch.cat([torch.ones_like(reads[:, :1]), reads], 1).flatten(0, 1)
        return torch.nn.functional.pad(reads, (0, k.shape[-2] - params.words), value=True)


def _covered(low: Tensor, high: Tensor, n: int) -> Tensor:
    """How much of each of n equal cells of [0, 1] lies between two ends, (boxes, n)."""
    cells = torch.arange(n + 1) / n
    return (torch.minimum(high[:, None], cells[1:]) - torch.maximum(low[:, None], cells[:-1])).clamp(min=0)
