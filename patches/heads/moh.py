"""Heads that add little are left out: their outputs are zero, and neither their scores nor their values are computed.

Mixture-of-Head attention (arXiv 2410.11842) has a router choose heads for every token, which takes training. What is left without it is one
choice for all: a table of how much each key head adds to the residual stream, which `accelplug calibrate MODEL --patch heads` measures as
``output``. The share `skip` of the model's key heads that adds least is left out, with all query heads that share it.

Experimental. It saves a part of attention alone; keys are cached all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from accelplug.errors import RecipeError
from accelplug.patches import base
from accelplug.table import Table

if TYPE_CHECKING:
    from accelplug.call import AttentionCall, Clock, Prompt, Site


class Moh(base.Patch):
    """Leave out the heads that add least."""

    class Config(base.Config):
        outputs: Annotated[float, Field(ge=-1.0)] | Table = Field(
            0.0, description="Table (layers, key heads): how much each adds, -1 for unknown. A number: dense."
        )
        skip: float = Field(
            0.05, ge=0.0, lt=1.0, description="Share of key heads that is left out; 0 is dense. Ours: little is safe."
        )

    config: Config
    about_images = False

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.computed: Tensor | None = None
        """Which key heads are computed, bool (layers, H_kv)."""
        if isinstance(outputs := self.config.outputs, Table):
            table = outputs.by_head()
            known = (table.flatten() >= 0).nonzero()[:, 0]
            least = known[table.flatten()[known].argsort(stable=True)[: round(self.config.skip * len(known))]]
            self.computed = torch.ones(table.numel(), dtype=torch.bool).index_fill_(0, least, False).view(table.shape)

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Tensor | None:
        if self.computed is None or not isinstance(self.config.outputs, Table):
            return None
        self.config.outputs.require(site, None)
        kept = site.heads.part(self.computed[site.layer or 0])
        return None if bool(kept.all()) else kept

    def attend(self, call: AttentionCall, params: Tensor) -> Tensor:
        number, queries = call.k.shape[1], call.q.unflatten(1, (call.k.shape[1], -1))
        kept = params.to(call.q.device)
        if len(kept) != number:
            raise RecipeError(
                f"The outputs of moh are of {len(params)} key heads, and the layer has {number}. Calibrate for this model: "
                "accelplug calibrate MODEL --patch heads."
            )
        some = kept.nonzero()[:, 0]
        out = call.v.new_zeros(*queries.shape[:4], call.v.shape[-1])
        if len(some):
            found = call.dense(queries[:, some].flatten(1, 2), call.k[:, some], call.v[:, some])
            out[:, some] = found.unflatten(1, (len(some), -1)).to(out.dtype)
        return out.flatten(1, 2)
