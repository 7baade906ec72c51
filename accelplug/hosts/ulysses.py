"""Context parallelism by exchange (DeepSpeed-Ulysses, arXiv 2309.14509): inside attention, all tokens and a share of the heads.

Ranks hold a share of the tokens each. Ahead of attention they exchange: every rank gets all tokens of its share of the heads;
behind it they exchange back. A patch answers in between, and sees a whole sequence. diffusers does the exchanging.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelplug import compat
from accelplug.call import Layout


@dataclass(frozen=True, eq=False)
class Gathered:
    """Where tokens lie after the exchange, if not in the model's order: rank by rank, each rank's text beside its part of the grid.

    Attributes
    ----------
    token : which token is at each place, int64 (S,).
    place : where each token is, int64 (S,).
    """

    token: Tensor
    place: Tensor

    @classmethod
    def of(cls, layout: Layout, ranks: int) -> Gathered | None:
        """Where tokens of a layout lie whose text and grid were split over ranks each for itself; None: in the model's order."""
        if layout.length == layout.visual:
            return None
        spans = torch.arange(layout.length).split([layout.text_before, layout.visual, layout.text_after])
        shares = [span.tensor_split(ranks) for span in spans]
        token = torch.cat([share[rank] for rank in range(ranks) for share in shares])
        return cls(token, token.argsort())

    def to(self, device: torch.device | str) -> Gathered:
        """Return the indices on `device`."""
        return Gathered(self.token.to(device), self.place.to(device))

    def in_order(self, x: Tensor) -> Tensor:
        """Tokens of (B, S, H, D) in the model's order."""
        return x.index_select(1, self.place)

    def as_gathered(self, x: Tensor) -> Tensor:
        """Undo `in_order`."""
        return x.index_select(1, self.token)

    def mask_in_order(self, mask: Tensor) -> Tensor:
        """The mask of such tokens, (B, S) or (B, H, S_q, S)."""
        rows = mask.ndim == 4 and mask.shape[-2] != 1
        return (mask.index_select(-2, self.place) if rows else mask).index_select(-1, self.place)


def exchanges(parallel: Any) -> bool:
    """Whether attention under this ``parallel_config`` of a call has all tokens and a share of the heads."""
    context = getattr(parallel, "context_parallel_config", None)
    return context is not None and context.ulysses_degree > 1 and context.ring_degree == 1


def attend_exchanged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    parallel: Any,
    answer: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Exchange, let `answer` attend, exchange back. Inference only.

    Parameters
    ----------
    query, key, value : (B, S of this rank, H, D).
    mask : None, or what there is of this rank's keys, (..., S of this rank).
    answer : (q, k, v (B, S, H of this rank, D), mask (..., S)) -> (B, S, H of this rank, D).
    """

    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *others: Any, **more: Any) -> Tensor:
        return answer(q, k, v, mask)

    exchange = compat.diffusers.context_parallel_attention()
    return exchange(query, key, value, mask, scale=scale, forward_op=forward, backward_op=None, _parallel_config=parallel)
