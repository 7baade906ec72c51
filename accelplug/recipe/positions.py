"""Positions beyond the trained length: what a recipe may say of the frequencies that turn a frame's number into angles.

Rotary embeddings turn pair j of a head's d channels for time by ``t theta_j``, with ``theta_j = base^(-2 j / d)``, j = 0 .. d / 2 - 1, in
frame t. In a video of T latent frames, more than the N that a model was trained on:

* ``riflex`` (arXiv 2502.15894): one frequency is the intrinsic one, whose period is that in which frames repeat. It alone becomes
  ``0.9 * 2 pi / T``, so that the video is within one period (equation 8, with the release's margin). It is told by its number k, from 1.
  The release says 6 for Wan 2.1, 4 for HunyuanVideo, 2 for CogVideoX; without a number it is the one whose period is nearest to 2 N,
  which gives the last two, and 5 for Wan.
* ``interpolate`` (position interpolation, arXiv 2306.15595): all become ``theta_j N / T``. A video then is the trained one, slower.

Up to N frames nothing changes.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from accelplug.recipe.conditions import Strict


class Positions(Strict):
    """How frames beyond the trained length are told apart: ``positions: {kind: riflex, native: 21, frequency: 6}``."""

    kind: Literal["riflex", "interpolate"]
    native: int = Field(ge=1, le=65536)
    """Latent frames that the model was trained on."""
    frequency: int | None = Field(None, ge=1, le=1024)
    """Number of the intrinsic frequency, from 1 (riflex)."""

    @model_validator(mode="after")
    def _a_frequency_is_of_riflex(self) -> Positions:
        if self.frequency is not None and self.kind != "riflex":
            raise ValueError(f"kind: {self.kind} changes all frequencies: remove frequency: {self.frequency}")
        return self

    def changed(self, channels: int, base: float, frames: int) -> dict[int, float]:
        """Return the frequencies that change in a video of so many latent frames, by j, in radians a frame.

        Parameters
        ----------
        channels : of a head, for time: d.
        base : of the frequencies.

        Raises
        ------
        ValueError
            If there is no frequency of the number asked for.
        """
        if frames <= self.native:
            return {}
        theta = [base ** (-2 * j / channels) for j in range(channels // 2)]
        if self.kind == "interpolate":
            return {j: at * self.native / frames for j, at in enumerate(theta)}
        if self.frequency is not None and self.frequency > len(theta):
            raise ValueError(f"there is no frequency {self.frequency}: this model has {len(theta)} for frames")
        nearest = min(range(len(theta)), key=lambda j: abs(2 * math.pi / theta[j] - 2 * self.native))
        intrinsic = nearest if self.frequency is None else self.frequency - 1
        return {intrinsic: 0.9 * 2 * math.pi / frames}

    def to_mapping(self) -> dict[str, Any]:
        """Return it as it stands in a file."""
        return self.model_dump(mode="json", exclude_none=True)

    def __str__(self) -> str:
        number = "" if self.frequency is None else f", frequency {self.frequency}"
        return f"{self.kind} beyond {self.native} latent frames{number}"
