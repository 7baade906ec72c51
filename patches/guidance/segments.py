"""Several prompts for one video: every span of frames reads a text of its own, and all frames see each other.

The symmetric mask of Mask2DiT (arXiv 2503.19881), and nothing else of it. With texts P_1 .. P_N and a video cut into as many spans of
frames V_1 .. V_N, token i reads token j where

    ``M(i, j) = 1   if both are frames, or i and j belong to the same n: P_n and P_n, P_n and V_n, V_n and P_n``

That is joint attention of text and frames. Where the text is read by cross-attention (Wan), V_n reads P_n alone, and self-attention among
frames is as ever. No mask over all pairs is made: spans are answered one by one, by the model's own kernel.

Prompts stand in one string, with a bar between them::

    with accelplug.apply(pipe, {"rules": [{"patch": "segments"}]}):
        pipe("a red circle moves left | a blue square moves up", num_frames=81)

Each is encoded for itself, and a negative prompt is read by all of them. Of embeddings that you join yourself, (B, N x tokens, C), say how
many `tokens` a prompt has. More than two prompts, and spans of other lengths, by `shares`; a span is of whole latent frames.

In models with a text refiner (HunyuanVideo) the refiner still mixes the texts: only attention over frames is divided. What sums up a text
in one vector is the mean over the prompts.

Experimental. The paper trains CogVideoX with this mask, in two stages; here nothing is trained. On the bundled model, with two captions for
17 frames, the detector finds both captions in their spans in 9 of 12 pairs, and in none with one caption or both as one
(`benchmarks/segments.py`); where colour, kind and direction change at once, in 1 of 3. One tiny model: try it on yours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from accelplug.errors import AccelplugError
from accelplug.patches.guidance.apart import Apart, ReadsApart, places_of_texts

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import Layout

Proportion = Annotated[float, Field(gt=0, le=1000)]


class Segments(ReadsApart):
    """Every span of frames reads the text of its own prompt."""

    class Config(ReadsApart.Config):
        shares: Annotated[tuple[Proportion, ...], Field(min_length=1, max_length=64)] | None = Field(
            None, description="How long the spans are, relative to each other, one for each prompt; none: all alike."
        )

    config: Config

    def parts(self, layout: Layout, texts: tuple[int, ...]) -> Apart:
        """Return who reads whom.

        Raises
        ------
        AccelplugError
            If the prompts are more than the latent frames, or other ones than there are shares for.
        """
        spans = self._spans(layout, len(texts))
        words = places_of_texts(layout, texts)
        frames = tuple(span + (0 if layout.crossed else layout.text_before) for span in spans)
        if layout.crossed:
            return Apart.of(frames, words)
        picture = torch.cat(frames)
        queries = [*frames, *words]
        keys = [*(torch.cat([picture, own]) for own in words), *map(torch.cat, zip(words, frames, strict=True))]
        return Apart.of(queries, keys)

    def _spans(self, layout: Layout, number: int) -> tuple[Tensor, ...]:
        """Visual tokens of each prompt, int64 (n,) each, counted from the first."""
        frames, rows, columns = layout.grid_thw
        shares = self.config.shares or (1.0,) * number
        if len(shares) != number:
            raise AccelplugError(f"segments: expected as many shares as prompts, {number}, got {len(shares)}: {shares}.")
        if frames < number:
            raise AccelplugError(
                f"segments: expected at least one latent frame a prompt, got {number} prompts for {frames}. Make a longer video."
            )
        ends = [round(frames * sum(shares[: n + 1]) / sum(shares)) for n in range(number)]
        for n in range(number):  # each has one frame at least
            ends[n] = min(max(ends[n], (ends[n - 1] if n else 0) + 1), frames - (number - 1 - n))
        return torch.arange(layout.visual).tensor_split([end * rows * columns for end in ends[:-1]])
