"""Visual attention redistribution: what heads spend on sinks goes to the other image tokens.

VAR ("See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321, ICLR 2025). A few tokens with
huge hidden states, the first one and some of the background, draw attention that means nothing. In heads that do look at the
image, a fraction of the attention to all sinks is handed to the image tokens that are not sinks, in proportion; rows still sum to 1.

The paper's p and rho stand the other way round in the released code (its p is the fraction that stays), hence other names here.
No probabilities are stored: with P_c the mass on span c and o_c its part of the output,
``o' = o - f o_sinks + f P_sinks / P_rest o_rest`` for the fraction f.

Experimental. Not testable on the bundled model, whose image tokens are not sinks. Nor on `llava-smollm2`, whose only sink is the
first token.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch.nn.functional import pad

from accelplug.errors import RecipeError
from accelplug.kernels.spans import fit, last, only, read_rows, row_attention, with_masses
from accelplug.kernels.vision import massive, normalised
from accelplug.patches.base import Config, Numbers, Patch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Prompt, Site

logger = logging.getLogger("accelplug")


def massive_dims(first: Tensor, threshold: float) -> Tensor:
    """Dimensions in which the normalised first token (B, C) is massive: bool (B, C), the largest four at most."""
    fourth = first.abs().topk(min(4, first.shape[-1])).values[:, -1:]
    return massive(first, threshold) & (first.abs() >= fourth)


def sinks_of(hidden: Tensor, dims: Tensor, threshold: float) -> Tensor:
    """Tokens whose normalised hidden state (B, S, C) reaches the threshold in one of `dims` (B, C): bool (B, S)."""
    return (normalised(hidden).abs() * dims[:, None]).amax(-1) >= threshold


def redistribute(out: Tensor, sinks: Tensor, rest: Tensor, masses: Tensor, fraction: float) -> Tensor:
    """Move a fraction of the attention to sinks to the rest of the image.

    Parameters
    ----------
    out, sinks, rest : (B, H, S_q, D_v), the output and its parts from sinks and from the other image tokens.
    masses : (B, H, S_q, 2), attention to sinks and to the rest.
    """
    gain = (masses[..., 0] / masses[..., 1].clamp(min=1e-9))[..., None]
    return (out.float() - fraction * sinks.float() + fraction * gain * rest.float()).to(out.dtype)


@dataclass(frozen=True, eq=False)
class Params:
    """The image's tokens (B, S) bool; sinks of this layer (B, S) bool while decoding; `memory` and rows while a prompt is read."""

    visual: Tensor
    sinks: Tensor | None = None
    prompt: Prompt | None = None
    memory: dict[str, Any] | None = None
    layer: int = 0
    layers: int = 1


class Var(Patch):
    """Hand attention that sinks draw to the image tokens that are not."""

    class Config(Config):
        move_fraction: float = Field(
            0.6, ge=0, le=1, description="Share of the sinks' attention that moves. Paper: 0.6; code: 0.4."
        )
        min_nonsink_ratio: float = Field(
            0.5,
            ge=0,
            le=1,
            description="Least share of a head's visual attention off sinks. Paper: 0.5 hallucination, 0.8 general.",
        )
        min_visual_mass: float = Field(0.2, ge=0, le=1, description="Least attention of a head to the image. Paper.")
        sink_dims: Numbers | Literal["auto"] = Field(
            "auto",
            description="Dimensions of the residual stream in which sinks are massive; auto: those of the first token.",
        )
        sink_threshold: float = Field(20.0, gt=0, description="Normalised value from which a token is a sink. Paper.")

    config: Config
    needs = frozenset({"hidden_states", "probabilities"})
    speed = False
    _warned = False

    def check(self, sites: Sequence[Site], heads: int, width: int) -> None:
        dims = self.config.sink_dims
        if dims != "auto" and max(dims) >= width:
            raise RecipeError(f"var: sink_dims: the model has dimensions 0 to {width - 1}, got {max(dims)}.")

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Params | str | None:
        if self.config.move_fraction == 0:
            return None
        if clock.phase == "prefill":
            if layout.past and f"dims {site.layer}" not in state:
                return "the first tokens of the sequence ran dense, so that their sinks are not known"
            return Params(layout.visual, None, layout, state, site.layer or 0, site.layers)
        sinks = state.get(f"sinks {site.layer}")
        return None if sinks is None else Params(layout.visual[:, : sinks.shape[1]], sinks)

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        if params.sinks is not None:
            return self._decode(call, params)
        sinks = self._find(call, params)
        prompt = params.prompt
        if prompt is None or sinks is None:
            return call.dense()
        rows = prompt.rows.to(call.q.device)
        number = int(rows.shape[1] - rows.any(0).long().argmax()) if bool(rows.any()) else 0
        return self._prefill(call, params, sinks, rows, number) if number else call.dense()

    def _find(self, call: AttentionCall, params: Params) -> Tensor | None:
        """Find the sinks of this layer among the prompt's tokens, as the layer's input shows them; None if the image has none."""
        prompt, memory, hidden = params.prompt, params.memory, call.hidden
        if prompt is None or memory is None or hidden is None:
            return None
        key, whole = f"sinks {params.layer}", f"all {params.layer}"
        if not prompt.drafts:  # which bring no sinks
            here = (prompt.valid & prompt.asked)[:, prompt.past :].to(hidden.device)
            dims = self._dims_by_row(prompt, memory, hidden, here, params.layer, params.layers)
            found = sinks_of(hidden, dims, self.config.sink_threshold) & here
            if prompt.past:  # answers in between bring none, and what was cropped off the cache is gone
                found = torch.cat([pad(memory[whole], (0, prompt.past - memory[whole].shape[1])), found], 1)
            visual = params.visual[:, : found.shape[1]].to(found.device)
            rows = (found & visual).any(-1, keepdim=True)  # text sinks alone change nothing
            memory[whole], memory[key] = found, found & rows if bool(rows.any()) else None
        return memory.get(key)

    def _dims_by_row(
        self, prompt: Prompt, memory: dict[str, Any], hidden: Tensor, here: Tensor, layer: int, layers: int
    ) -> Tensor:
        """Dimensions in which sinks are massive, bool (B, C), of rows that have begun; `here` is bool (B, S_q), tokens that were asked."""
        key, starts = f"dims {layer}", here.any(-1) & ~prompt.valid[:, : prompt.past].any(-1).to(here.device)
        dims = memory[key].clone() if prompt.past else torch.zeros_like(hidden[:, 0], dtype=torch.bool)
        if bool(starts.any()):
            dims[starts] = self._dims(normalised(hidden[starts, here[starts].long().argmax(-1)]), layer, layers)
        memory[key] = dims
        return dims

    def _dims(self, first: Tensor, layer: int, layers: int) -> Tensor:
        if self.config.sink_dims == "auto":
            return massive_dims(first, self.config.sink_threshold)
        dims = torch.zeros_like(first, dtype=torch.bool)
        dims[:, list(self.config.sink_dims)] = True
        middle = layers // 4 <= layer < 3 * layers // 4
        if middle and not self._warned and not bool((first.abs() * dims >= self.config.sink_threshold).any()):
            self._warned = True
            logger.warning(
                "var: the first token is not a sink in dimensions %s at layer %d; the list may be another model's. Try "
                "sink_dims: auto, and accelplug.inspect(model, inputs).sink_dims",
                list(self.config.sink_dims),
                layer,
            )
        return dims

    def _spans(self, call: AttentionCall, visual: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        """Sinks, and the other image tokens: bool (B, S_k) each."""
        sinks, visual = fit(sinks, call).to(call.q.device), fit(visual, call).to(call.q.device)
        return sinks, visual & ~sinks

    def _prefill(self, call: AttentionCall, params: Params, sinks: Tensor, rows: Tensor, number: int) -> Tensor:
        tail = last(call, number)
        sinks, rest = self._spans(call, params.visual, sinks)
        visual = fit(params.visual, call).to(rest.device)
        out, masses = with_masses(tail, torch.stack([sinks, rest, visual], -1))
        chosen = self._chosen(masses[..., 1], masses[..., 2]) & rows[:, None, -number:]
        whole = call.dense()
        if not bool(chosen.any()):
            return whole
        from_sinks, from_rest = (tail.dense(v=only(call.v, span)) for span in (sinks, rest))
        moved = redistribute(out, from_sinks, from_rest, masses[..., :2], self.config.move_fraction)
        left, asked = whole[:, :, :-number], whole[:, :, -number:]  # rows that are not chosen stay the model's own
        return torch.cat([left, torch.where(chosen[..., None], moved.to(whole.dtype), asked)], 2)

    def _decode(self, call: AttentionCall, params: Params) -> Tensor:
        assert params.sinks is not None
        sinks, rest = self._spans(call, params.visual, params.sinks)
        visual = fit(params.visual, call).to(rest.device)
        p = row_attention(call)  # [B, H, 1, S_k]
        on_sinks, on_rest, on_image = ((p * span[:, None, None]).sum(-1, keepdim=True) for span in (sinks, rest, visual))
        chosen = self._chosen(on_rest, on_image) & sinks.any(-1)[:, None, None, None]
        f = self.config.move_fraction
        weight = 1 - f * sinks[:, None, None] + f * rest[:, None, None] * on_sinks / on_rest.clamp(min=1e-9)
        return read_rows(call, torch.where(chosen, p * weight, p))

    def _chosen(self, on_rest: Tensor, on_image: Tensor) -> Tensor:
        """Heads and rows that look at the image, and at more of it than its sinks."""
        return (on_image >= self.config.min_visual_mass) & (on_rest >= self.config.min_nonsink_ratio * on_image)
