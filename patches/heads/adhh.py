"""Heads that hallucinate let go of text: where one of them is held by the text behind the image, that attention is dropped.

AD-HH ("Understanding and Mitigating Hallucination in Large Vision-Language Models via Modular Attribution and Intervention",
OpenReview Bjq4W7P2Us, ICLR 2025). Ablation tells which heads make a model name what is not there; they favour what was said over
what is seen. With P_T the mass of such a head on text behind the image, question and answer, in the row that answers, and o_T its
part of the output, where ``P_T >= threshold``:

    o' = o - (1 - keep) P_T o_T,

that is, its attention there is multiplied by `keep`, 0 as released, and nothing is renormalised. Which heads hallucinate belongs to a
model: the recipes of LLaVA-1.5 have the released lists, and there is no list for others.

Experimental. On the bundled model, one small model of coloured shapes, it made no difference that shows, with a list of ours
(`benchmarks.hallucinating_heads`), which other pictures would have made another. On `llava-smollm2` descriptions have 7.7 points
less of CHAIR_I (95 %: -12.8 to -2.6), and name .40 of what is there instead of .68.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from accelplug.errors import RecipeError
from accelplug.kernels.spans import fit, read_rows, replace_rows, roomy, row_attention
from accelplug.patches.base import Config, Patch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Prompt, Site

Number = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, eq=False)
class Params:
    """Keys other than text behind the image, bool (B, S); rows that show one, bool (B,); heads, int64 (n,), filled up with -1."""

    others: Tensor
    shows: Tensor
    heads: Tensor


class Adhh(Patch):
    """Drop the attention of listed heads to text behind the image, where they spend much on it."""

    class Config(Config):
        heads: Annotated[tuple[tuple[Number, Number], ...], Field(min_length=1)] = Field(
            description="Layers and heads that hallucinate, [layer, head] each, 0-based."
        )
        threshold: float = Field(0.4, ge=0, le=1, description="Least mass on text behind the image. Code: 0.4.")
        keep: float = Field(0.0, ge=0, le=1, description="Share of that attention that stays. Code: 0.")

    config: Config
    needs = frozenset({"answers", "probabilities"})
    speed = False

    def check(self, sites: Sequence[Site], heads: int, width: int) -> None:
        depth = sites[0].layers
        for layer, head in self.config.heads:
            if layer >= depth or head >= heads:
                raise RecipeError(
                    f"adhh: heads: the model has layers 0 to {depth - 1} and heads 0 to {heads - 1}, got [{layer}, {head}]. A list "
                    "is of one model."
                )
        if {site.layer for site in sites}.isdisjoint(layer for layer, _ in self.config.heads):
            raise RecipeError("adhh: heads: none is in a layer of its rule. Have the rule name them: where: {layers: ...}.")

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Params | None:
        by_layer: dict[int | None, list[int]] = {}
        for layer, head in self.config.heads:
            by_layer.setdefault(layer, []).append(head)
        if self.config.keep == 1 or site.layer not in by_layer:
            return None
        mine, most = by_layer[site.layer], max(map(len, by_layer.values()))  # as many in every layer, for compiled code
        heads = torch.tensor([*mine, *[-1] * (most - len(mine))], device=layout.image.device)
        return Params(roomy(~layout.later), layout.visual.any(-1), heads)

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        rows, first = (call.place.answers, call.place.first_head) if call.place else (1, 0)
        here = call.q.device
        p = row_attention(call, rows)  # [B, H, n, S_k]
        text = ~fit(params.others, call).to(here)[:, None, None]  # what was answered since, too
        chosen = torch.isin(torch.arange(first, first + p.shape[1], device=here), params.heads.to(here))
        held = (p * text).sum(-1, keepdim=True) >= self.config.threshold
        held = held & chosen[:, None, None] & params.shows.to(here)[:, None, None, None]
        return replace_rows(call, read_rows(call, torch.where(held & text, self.config.keep * p, p)), rows)
