"""LVSA: every frame of a long video reads a window around it and anchors over its whole length, which move on with every step.

Long Video Sparse Attention (arXiv 2605.31057), for videos longer than those that a model was trained on, without training. Dense
attention over T latent frames costs T^2, and beyond the trained length T_0 comes to a near-static video. Here every query reads as many
frames as in training: with a half-width W, a period P and `first` leading frames F, in step s of the denoising

    ``A_s(t) = G_s + W_s(t),   G_s = {0 .. F - 1} + {(s + i P) mod T : i = 0 .. ceil(T / P) - 1}``

G_s are the anchors, whole frames that all read. They move by one frame a step (equation 3), so that in P steps every frame is one: fixed
ones would leave the frames between them poorer. W_s(t) is ``[t - W, t + W]``, moved inside at the ends, and then widened, by turns to the
left and to the right, until 2 W + 1 of its frames are other than anchors: so every frame reads equally many. P is the largest with which
``ceil(T / P)`` frames and the leading ones make the rest of the budget, ``C - (2 W + 1)`` with ``C = budget * T_0``, but not 1: cost
grows with T, not with T^2.

Two things are as released, where the paper has them otherwise: its algorithm 1 widens a window on the side with more room, and its
anchors are those that move, alone (`first` 0). The paper's W is 4 latent frames; the release's default is 3 (12 video frames).

At the trained length, or below, all is read: the call runs dense. Positions beyond it are the model's own; a recipe's key
``positions`` changes them, which the paper found to add little to this.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from accelplug.call import Clock, Layout, Site
from accelplug.patches.base import Positive
from accelplug.patches.sparse.frames import FrameSparse
from accelplug.patches.sparse.template import BlockConfig, BlockParams


class Lvsa(FrameSparse):
    """Every frame reads a window around it, and anchors over the whole video that move on with every step."""

    class Config(BlockConfig):
        """All numbers of frames are of latent ones."""

        native: Positive = Field(
            21, description="Frames that the model was trained on. Wan 21 (81 in pixels), HunyuanVideo 33, CogVideoX 13."
        )
        window: NonNegativeInt = Field(4, description="W, frames on either side of its own that a frame reads. Paper.")
        first: NonNegativeInt = Field(1, description="Frames at the front that are anchors in every step. Released code.")
        budget: float = Field(
            1.0,
            gt=0.0,
            le=16.0,
            description="Frames that each reads, as a multiple of native. Paper: 1; more is nearer dense.",
        )
        rotate: bool = Field(True, description="Whether anchors move on by a frame with every step. Paper.")

    config: Config

    def neutral(self, layout: Layout) -> bool:
        return layout.grid_thw[0] <= self.config.native

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> BlockParams | None:
        if self.neutral(layout):
            return None
        step = clock.step or 0 if self.config.rotate else 0
        return self.weighted(self.params(layout, shift=step % self.period(layout.grid_thw[0])), site, clock)

    def period(self, frames: int) -> int:
        """Return P, the distance of anchors among `frames`."""
        config = self.config
        return _distance_of_anchors(
            frames, max(int(config.budget * config.native), config.first + 1), config.window, config.first
        )

    def reads(self, frames: int, shift: int = 0) -> Tensor:
        anchors = _anchors(frames, self.period(frames), self.config.first, shift)
        read = torch.zeros(frames, frames, dtype=torch.bool)
        read[:, sorted(anchors)] = True
        for frame in range(frames):
            low, high = self._window(frame, frames, anchors)
            read[frame, low : high + 1] = True
        return read

    def _window(self, frame: int, frames: int, anchors: set[int]) -> tuple[int, int]:
        """First and last frame of a window that holds 2 W + 1 frames other than anchors, or all there are."""
        width = 2 * self.config.window
        low = max(0, min(frame - self.config.window, frames - 1 - width))
        high = min(frames - 1, max(frame + self.config.window, width))
        lacking = min(width + 1, frames - len(anchors)) - sum(at not in anchors for at in range(low, high + 1))
        left = True
        while lacking > 0:
            if (left and low > 0) or high == frames - 1:
                low, added = low - 1, low - 1
            else:
                high, added = high + 1, high + 1
            lacking -= added not in anchors
            left = not left
        return low, high


def _anchors(frames: int, period: int, first: int, shift: int = 0) -> set[int]:
    moving = {(shift + i * period) % frames for i in range(-(-frames // period))}
    return moving | set(range(min(first, frames)))


@lru_cache(maxsize=64)
def _distance_of_anchors(frames: int, budget: int, window: int, first: int) -> int:
    number = max(budget - (2 * window + 1), first, 1)
    largest = next((p for p in range(frames, 1, -1) if len(_anchors(frames, p, first)) >= number), 1)
    # Just above the trained length no period but 1 gives so many: fewer are read then, as in the release.
    room = 2 * window + first
    return max(largest, -(-max(frames - room, budget - room) // max(budget - room, 1)))
