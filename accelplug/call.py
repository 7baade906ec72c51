"""What a patch sees: the attention call, where it happens, how its tokens lie, and when. Types only, no torch at import."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["self", "joint", "cross", "temporal", "frame", "global"]


@dataclass(frozen=True)
class AttentionCall:
    """One attention call, after RoPE and norm.

    Attributes
    ----------
    q : Tensor (B, H, S_q, D)
    k, v : Tensor (B, H_kv, S_k, D) and (B, H_kv, S_k, D_v); H_kv divides H (grouped-query attention).
    mask : None, or bool (B, S_k), True where the key may be read.
    scale : factor on q.k, never None.
    dense : ``dense(q=None, k=None, v=None) -> (B, H, S_q, D_v)``, the user's own backend; a tensor left out is the call's.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    dense: Callable[..., Tensor]


@dataclass(frozen=True)
class Site:
    """Where a call happens: one attention module of one denoiser."""

    module: str
    """Path inside the denoiser, ``blocks.3.attn1``."""
    denoiser: str
    """Name of the component: ``transformer``, ``transformer_2``, ``unet``."""
    kind: Kind
    layer: int | None
    """0-based over double, then single blocks; None where layers have no order (refiners)."""
    layers: int
    """Number of layers that `layer` counts in."""


@dataclass(frozen=True)
class Layout:
    """How the tokens of a self- or joint-attention call lie along the sequence.

    The visual tokens are one run, t-major, then rows, then columns. Everything else is text: read and answered densely.
    """

    grid_thw: tuple[int, int, int]
    """Latent frames, patch rows, patch columns."""
    text_before: int = 0
    """Tokens ahead of the visual run."""
    text_after: int = 0
    """Tokens behind the visual run."""

    @property
    def visual(self) -> int:
        """Number of visual tokens, T * H * W."""
        return math.prod(self.grid_thw)

    @property
    def length(self) -> int:
        """Number of tokens in all."""
        return self.text_before + self.visual + self.text_after


@dataclass(frozen=True)
class Clock:
    """When a call happens. ``step`` is 0-based; both numbers are None where the host cannot know them."""

    step: int | None = None
    steps: int | None = None
    branch: str | None = None
    """Name of the guidance branch: ``cond``, ``uncond``, ..., None where the pipeline does not say."""
