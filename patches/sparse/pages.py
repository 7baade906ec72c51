"""Pages: of each page of keys the least and the largest value of every channel bound how much a query can make of it.

Quest (arXiv 2406.10774). With ``lo`` and ``hi`` the channels' extremes over a page of keys,

    ``U = sum_c max(q_c lo_c, q_c hi_c)``

bounds q.k of every key in it, and the pages of largest U are read token by token: as many as hold `budget` tokens. The first
tokens and the newest are read anyway. Extremes cost an eighth of the keys' bytes at pages of 16, and are written once, when a page
has left the window; the paper writes them as tokens come.

The paper has a head of keys for every head of queries. Here heads that share keys choose together: each gives its pages shares, the
softmax of its bounds, and pages are ranked by the sum of these (ours).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from accelplug.patches.sparse.decode import Decode, DecodeConfig, Reads, Step


class Pages(Decode):
    """A step reads the pages of keys with the largest upper bound of q.k."""

    class Config(DecodeConfig):
        page: int = Field(16, ge=1, description="Tokens of a page. Paper.")
        budget: int = Field(1024, ge=1, description="Tokens of the pages that a step reads. Paper: 256 to 4,096.")

    config: Config

    @property
    def piece(self) -> int:
        return self.config.page

    def summarise(
        self, keys: Tensor, values: Tensor, ranks: Tensor, held: Tensor, known: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        page = self.config.page
        short = -ranks.shape[1] % page
        held = pad(held, (0, short)).unflatten(1, (-1, page))  # [B, P, page]
        keys = pad(keys, (0, 0, 0, short)).unflatten(2, (-1, page))
        out = ~held[:, None, ..., None]
        size = held.sum(-1)[:, None]  # [B, 1, P]
        empty = (size == 0)[..., None]
        lo = keys.masked_fill(out, torch.inf).amin(3).masked_fill(empty, 0.0)
        hi = keys.masked_fill(out, -torch.inf).amax(3).masked_fill(empty, 0.0)
        return {"lo": lo, "hi": hi, "first": ranks[:, None, ::page], "size": size}

    def choose(self, step: Step) -> Reads:
        lo, hi, first, size = (step.index[name] for name in ("lo", "hi", "first", "size"))
        bound = step.q.clamp(min=0) @ hi.float().mT + step.q.clamp(max=0) @ lo.float().mT  # [B, H_kv, G, P]
        share = bound.masked_fill((size == 0)[:, :, None], -torch.inf).softmax(-1).nan_to_num(nan=0.0).sum(2)
        best = share.topk(min(-(-self.config.budget // self.config.page), share.shape[-1])).indices  # [B, H_kv, k]
        place = torch.arange(self.config.page, device=best.device)
        first, size = (x.expand(-1, best.shape[1], -1).gather(2, best)[..., None] for x in (first, size))
        return Reads((first + place).flatten(2), (place < size).flatten(2))
