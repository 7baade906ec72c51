"""Prompts for parts of a picture: what lies in a box reads a text of its own, beside or in place of the first one.

The regional attention control of C-Upscale (arXiv 2505.16976), alone. Of prompts P_0 .. P_R the first is for all of the picture, each other
for a box. A visual token reads P_0, and P_r where it lies in box r; boxes may overlap. In joint attention the mask is symmetric, as in
`segments`: words of P_r read their own prompt and the tokens of their box, visual tokens read each other. Where text is read by
cross-attention, that alone is divided. No mask over all pairs is made: tokens that read alike are answered together.

Prompts stand in one string, the first one first::

    boxes = [(0, 0, 1, 0.5), (0, 0.5, 1, 1)]  # left half, right half
    with accelplug.apply(pipe, {"rules": [{"patch": "regions", "with": {"boxes": boxes}}]}):
        pipe("a street at night | a red car | a man with a dog")

You write them, or have a vision-language model describe what a first, smaller picture shows in each box. Of embeddings that you join
yourself, (B, (R + 1) x tokens, C), say how many `tokens` a prompt has.

The paper's other parts, its loop over overlapping crops, its structure prior and its damping of words, are in
`accelplug.upscale`. What sums up a text in one vector is the mean over the prompts.

Experimental. The bundled video model hardly follows boxes that it was not trained on: 1 of 4 captions the other way round, 0 of 4 above
one another; as trained 3 of 4, where without a patch 2 of 4 are right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import AfterValidator, Field

from accelplug.errors import AccelplugError
from accelplug.patches.guidance.apart import Apart, ReadsApart, places_of_texts

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import Layout


def _opens(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    top, left, bottom, right = box
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(f"a box is top, left, bottom, right in shares of the picture, 0 to 1, got {box}")
    return box


BoxShares = Annotated[tuple[float, float, float, float], AfterValidator(_opens)]


class Regions(ReadsApart):
    """What lies in a box reads the prompt of that box."""

    class Config(ReadsApart.Config):
        boxes: Annotated[tuple[BoxShares, ...], Field(min_length=1, max_length=32)] = Field(
            description="Top, left, bottom and right of each prompt's box but the first prompt's, in shares of the picture."
        )
        everywhere: bool = Field(True, description="Whether the first prompt is read inside boxes too. Ours.")

    config: Config

    def parts(self, layout: Layout, texts: tuple[int, ...]) -> Apart:
        """Return who reads whom.

        Raises
        ------
        AccelplugError
            If there are not as many prompts as boxes, and one.
        """
        if len(texts) != len(self.config.boxes) + 1:
            raise AccelplugError(
                f"regions: expected a prompt for the picture and one for each of {len(self.config.boxes)} boxes, got {len(texts)} prompts."
            )
        words, reads = places_of_texts(layout, texts), self.reads(layout)
        shift = 0 if layout.crossed else layout.text_before
        picture = [] if layout.crossed else [torch.arange(layout.visual) + shift]
        queries, keys = [], []
        for pattern in reads.unique(dim=0):
            queries.append((reads == pattern).all(-1).nonzero()[:, 0] + shift)
            keys.append(torch.cat([*picture, *(own for own, read in zip(words, pattern, strict=True) if read)]))
        if not layout.crossed:
            queries += words
            keys += [torch.cat([own, reads[:, n].nonzero()[:, 0] + shift]) for n, own in enumerate(words)]
        return Apart.of(queries, keys)

    def reads(self, layout: Layout) -> Tensor:
        """Return which prompts each visual token reads, bool (N, R + 1). A token is where its middle is."""
        frames, rows, columns = layout.grid_thw
        y, x = ((torch.arange(n) + 0.5) / n for n in (rows, columns))
        inside = [
            (((top <= y) & (y < bottom))[:, None] & ((left <= x) & (x < right))).expand(frames, -1, -1).flatten()
            for top, left, bottom, right in self.config.boxes
        ]
        boxes = torch.stack(inside, -1)
        first = torch.ones_like(boxes[:, :1]) if self.config.everywhere else ~boxes.any(-1, keepdim=True)
        return torch.cat([first, boxes], -1)
