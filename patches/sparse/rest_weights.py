"""How much a pooled block weighs: one factor on log n per head, for any selector whose rest is pooled or linear.

A pooled block of n keys enters the softmax as one key with ``weight * log n`` added to its logit. The textbook weight 1 is
right where the keys of a block are alike. Where they are not, the value that enters is the plain mean, not that of the
keys which matter, and how much of it the output can do with belongs to the head.

Weights in [0, 1] are tried on the selector's own plan and kernel; for each layer and head, the one with the least sum of
relative squared errors wins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from accelplug.patches.calibration import Calibration, CalibrationConfig, Seen, relative_error
from accelplug.patches.sparse.template import WEIGHTED_RESTS, BlockSparse


class RestWeights(Calibration):
    """Find the factor on log n with which a selector's output is nearest to dense, per layer and head."""

    class Config(CalibrationConfig):
        """Of each call all queries are looked at; `rows` is not used."""

        weights: int = Field(11, ge=2, le=101, description="How many weights are tried, evenly spaced from 0 to 1.")

    config: Config
    axes = {"rest_weight": ("layers", "heads")}  # noqa: RUF012

    def __init__(self, choose: Callable[..., BlockSparse | None], config: Any = None) -> None:
        super().__init__(BlockSparse(), config)
        self._choose = choose  # (site, layout, clock) -> the selector that would answer there and then

    def serves(self, patch: Any) -> bool:
        """Whether a patch takes the table."""
        return isinstance(patch, BlockSparse) and patch.config.rest in WEIGHTED_RESTS

    def observe(self, seen: Seen, part: int) -> None:
        patch = self._choose(seen.site, seen.layout, seen.clock)
        if patch is None or not self.serves(patch):
            return
        params = patch.prepare(seen.site, seen.layout, seen.clock, {})
        if params is None:
            return
        params, heads = params.to(seen.call.q.device), seen.call.q.shape[1]
        errors = torch.zeros(heads, self.config.weights, dtype=torch.float64)
        for place, weight in enumerate(self.tried()):
            weights = torch.full((heads,), float(weight), device=seen.call.q.device)
            out = patch.attend(seen.call, replace(params, rest_weight=weights))
            for row, head in seen.heads():
                errors[head, place] += relative_error(out[row, head].float(), seen.out[row, head].float()).cpu()
        self.add(seen, "error", errors / seen.call.q.shape[0])

    def tried(self) -> Tensor:
        """The weights that are tried, float32."""
        return torch.linspace(0, 1, self.config.weights)

    def tables(self) -> dict[str, Tensor]:
        seen = self.state["error calls"].sum(0) > 0  # [layers]
        best = self.tried()[self.state["error"].sum(0).argmin(-1)]  # [layers, H]
        return {"rest_weight": torch.where(seen[:, None], best, 1.0)}
