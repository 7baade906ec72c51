"""Subsets: the upper share of a layer's heads, and as many heads or tokens drawn at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall


def upper(x: Tensor, share: float) -> Tensor:
    """The given share of heads with the largest values, at least one: bool, x (..., H)."""
    number = max(1, round(share * x.shape[-1]))
    chosen = torch.zeros_like(x, dtype=torch.bool)
    return chosen.scatter(-1, x.topk(number).indices, True)


def upper_heads(call: AttentionCall, x: Tensor, share: float) -> Tensor:
    """As `upper`, row by row among the heads of all processes, for those of this one: bool, x (B, H, R)."""
    place, heads = call.place, x.shape[1]
    if place is None:
        return upper(x.mT, share).mT
    return upper(place.gather_heads(x).mT, share).mT[:, place.first_head : place.first_head + heads]


def over_heads(call: AttentionCall, x: Tensor) -> Tensor:
    """The sum over the heads of all processes, (B, R), of x (B, H, R)."""
    return (x if call.place is None else call.place.gather_heads(x)).sum(1)


def shuffled(chosen: Tensor, seed: int, among: Tensor | None = None) -> Tensor:
    """As many as are chosen, bool (B, N), but drawn at random, `among` these if given: the control that a choice must beat."""
    draws = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(seed)).to(chosen.device)
    draws = draws if among is None else draws.masked_fill(~among, 2.0)
    order = draws.argsort(-1).argsort(-1)
    return order < chosen.sum(-1, keepdim=True)
