"""Guidance by heads: the attention maps of chosen heads are drawn towards identity, and predictions led away from what comes of it.

HeadHunter and SoftPAG (arXiv 2506.10978, NeurIPS 2025), from the paper; no code is published. With A the map of a chosen head,
O = A V its output, and e, e' what a step's forward predicts as it is and with chosen heads perturbed,

    A' = (1 - u) A + u I,    so that    O' = (1 - u) O + u V,
    guided = e_u + g (e - e_u) + scale (e - e').

The first line mixes what any attention kernel gave, so the model's own stays. At u = 1, in all heads of a layer, it is perturbed-attention
guidance. Which heads are chosen is what the paper is about: single ones govern structure, light, texture or style, and
``accelplug calibrate --patch headhunter --objective ...`` hunts for those that raise a function of the picture.

Only the conditional branch is made twice: with classifier-free guidance a run has three predictions a step in place of two, without it
two in place of one. Fewer steps cost less (``where: {steps: "0:20%"}``), and so do late layers: in chained blocks the second time begins at
the first one with a chosen head. In joint attention the paper draws text rows to identity too.

Published, Stable Diffusion 3, PickScore: 19.66 unguided, 20.70 with 24 heads at scale 3 and no classifier-free guidance, 20.87 with that at
3, 20.92 with both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from accelplug.bounded import Bounded
from accelplug.call import ALL_HEADS
from accelplug.errors import RecipeError, UnsupportedError
from accelplug.patches.base import Config
from accelplug.patches.perturbation import Perturbation

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Layout, Site

Head = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
"""Layer and head, 0-based."""


@dataclass(frozen=True, eq=False)
class Params:
    """Which of a layer's first N heads are perturbed, bool (N, 1, 1) (None: all), from which row to which, the end not included.

    N is the same in all layers, and which heads they are is a tensor, so that layers share a compiled graph.
    """

    heads: Tensor | None
    first: int
    stop: int

    def to(self, device: torch.device | str) -> Params:
        """Return the params with their tensor on `device`."""
        return self if self.heads is None else Params(self.heads.to(device), self.first, self.stop)


def towards_identity(out: Tensor, v: Tensor, u: float) -> Tensor:
    """Return what ``(1 - u) A + u I`` gives in place of A: `out` = A v and v, (B, H, S, D) both."""
    return out.lerp(v.to(out.dtype), u)


class HeadHunter(Perturbation):
    """Lead predictions away from those of the same model with chosen heads drawn towards identity."""

    class Config(Config):
        heads: Annotated[tuple[Head, ...], Field(min_length=1, max_length=4096)] | Literal["all"] = Field(
            description="Layer and head of each, 0-based: [[7, 3], [12, 0]]; all: every head of the layers that the rule names."
        )
        u: float = Field(1.0, ge=0, le=1, description="How far maps go towards identity; 0: not at all. SoftPAG: below 1.")
        scale: float = Field(
            3.0, ge=-100, le=100, description="Weight of the difference of predictions; 0: none is made. Paper: 3."
        )
        rows: Literal["all", "image"] = Field(
            "all", description="Rows of joint attention that are drawn: the text's too, or the image's alone. Paper: all."
        )

    config: Config

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._prepared: Bounded[tuple[int | None, Layout], Params | None] = Bounded(256)

    @property
    def scale(self) -> float:
        return self.config.scale

    def require_heads(self, heads: Mapping[int, int]) -> None:
        for layer, head in () if self.config.heads == "all" else self.config.heads:
            if head >= heads.get(layer, 0):
                has = f"its layer {layer} has {heads[layer]} heads" if layer in heads else f"it has layers {_span(heads)}"
                raise RecipeError(f"headhunter, heads: [{layer}, {head}] is not in the model: {has}, counted from 0.")

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | None:
        if site.heads != ALL_HEADS:
            raise UnsupportedError(
                f"headhunter numbers the heads of a whole layer, and {site.denoiser} has them shared out over {site.heads.ranks} ranks. "
                "Run it without tensor or context parallelism."
            )
        return self._prepared.get((site.layer, layout), lambda: self.params(site.layer, layout))

    def params(self, layer: int | None, layout: Layout) -> Params | None:
        """Return what is perturbed in a layer; None where nothing is."""
        if not self.config.u or not self.config.scale:
            return None
        heads = None
        if self.config.heads != "all":
            own = {head for at, head in self.config.heads if at == layer}
            if not own:
                return None
            number = 1 + max(head for _, head in self.config.heads)
            heads = torch.tensor([head in own for head in range(number)])[:, None, None]
        if self.config.rows == "all":
            return Params(heads, 0, layout.length)
        return Params(heads, layout.text_before, layout.text_before + layout.visual)

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        out, v = call.dense(), call.v
        if v.shape[1] != out.shape[1]:
            v = v.repeat_interleave(out.shape[1] // v.shape[1], 1)
        heads = None if params.heads is None else params.heads[: out.shape[1]]  # layers may have unequally many
        part = slice(None), slice(None if heads is None else len(heads)), slice(params.first, params.stop)
        drawn = towards_identity(out[part], v[part], self.config.u)
        perturbed = out.clone()
        perturbed[part] = drawn if heads is None else torch.where(heads, drawn, out[part])
        return perturbed


def _span(layers: Mapping[int, int]) -> str:
    return f"{min(layers)} to {max(layers)}" if layers else "none"
