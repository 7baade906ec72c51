"""FlashBias: an additive bias of low rank, on any attention kernel.

FlashBias (arXiv 2505.12044): ``softmax(scale q k^T + b) v`` by a kernel that knows no bias, where b has low rank.

With ``b = rows @ columns.T`` of rank R, ``[q, rows / scale] [k, columns]^T`` is the biased score over scale, so R more head
dimensions do what would take S x S numbers. Distances are on the token grid, between query i and key j, a the weights of
its axes, s the strength:

* ``linear``: ``s sum_a a (j - i)``, rank 2. ALiBi's; where attention is not causal it favours what comes later.
* ``square``: ``-s sum_a a (i - j)^2``, rank 2 and one for each axis: a Gaussian window without an edge.
* ``absolute``: ``-s sum_a a |i - j|``, ALiBi's in both directions. Not of low rank, but each axis's table nearly is: singular
  vectors that hold `energy` of its squares, 4 at 0.995 for axes of 17 to 256.

Positions count from the middle of their axis, so that factors stay small; still, what ``square`` loses goes by the largest
square, 2^-16 of it in bfloat16. Text is neither biased nor biases. It is not a speed
patch: the model's own dense kernel runs, at a head dimension that is a multiple of 8 larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from accelplug.bounded import Bounded
from accelplug.errors import UnsupportedError
from accelplug.kernels.spans import dense_at_one_width, with_low_rank
from accelplug.patches.base import Config, Patch

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Layout, Site

MAX_RANK = 16
"""Above this, the extra head dimensions cost more than they save (FlashBias, section 3)."""

Factors = tuple["Tensor", "Tensor"]
"""Float64 (N, R) each, of rows and of columns: the bias is their product ``rows @ columns.T``."""


@dataclass(frozen=True, eq=False)
class Params:
    """Float32 (S, R) each; text has zeros in both, so that no pair with it is biased."""

    rows: Tensor
    columns: Tensor

    def to(self, device: torch.device | str) -> Params:
        """Return the params with their tensors on `device`."""
        return Params(self.rows.to(device), self.columns.to(device))


class Bias(Patch):
    """Add a bias of low rank by distance, in extra head dimensions of the model's own kernel."""

    class Config(Config):
        """Nobody published values for denoisers without training: `strength` has no default."""

        form: Literal["linear", "square", "absolute"] = Field(
            "absolute", description="Of the distance: signed as in ALiBi, its negative square, or its negative size."
        )
        strength: float = Field(
            ge=-100, le=100, description="Of the bias per token of distance, in nats; 0 is dense, below 0 favours the far."
        )
        axes: tuple[float, float, float] | Literal["token"] = Field(
            (1.0, 1.0, 1.0),
            description="Weight of the distance in frames, rows, columns; token: along the sequence instead.",
        )
        heads: Literal["equal", "alibi"] = Field(
            "equal", description="alibi: head h of H has 2^(-8 h / H) of the strength, h from 1 (arXiv 2108.12409)."
        )
        energy: float = Field(
            0.995,
            gt=0.0,
            le=1.0,
            description="Share of a table's squared entries that its factors hold. Paper's, for tables.",
        )

        @model_validator(mode="after")
        def _factors_are_at_hand(self) -> Self:
            if self.axes != "token" and max(map(abs, self.axes)) > 100:
                raise ValueError(f"axes: expected weights from -100 to 100, got {self.axes}")
            if self.form == "absolute" and self.axes == "token":
                raise ValueError(
                    "form absolute takes the distance on axes of the grid: its table over all tokens is too large to factor. "
                    "Give axes as three weights"
                )
            return self

    config: Config
    speed = False

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._prepared: Bounded[Layout, Params | None] = Bounded(16)

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Params | None:
        return self._prepared.get(layout, lambda: self.params(layout))

    def params(self, layout: Layout) -> Params | None:
        """Return the factors of the tokens of `layout`; None where they are zero."""
        rows, columns = self.factors(layout)
        used = rows.any(0) & columns.any(0)
        if not used.any():
            return None
        rows, columns = rows[:, used], columns[:, used]
        around = (0, 0, layout.text_before, layout.text_after)
        rows, columns = (torch.nn.functional.pad(x.float(), around) for x in balanced(rows, columns))
        return Params(rows, columns)

    def factors(self, layout: Layout) -> Factors:
        """Return the factors of the visual tokens, strength included.

        Raises
        ------
        UnsupportedError
            If they are more than 16.
        """
        config = self.config
        lengths, axes = ((layout.visual,), (1.0,)) if config.axes == "token" else (layout.grid_thw, config.axes)
        weights = [config.strength * weight for weight in axes]
        if config.form == "absolute":
            per_axis = [low_rank(-weight * _distances(n), config.energy) for n, weight in zip(lengths, weights, strict=True)]
            places = torch.meshgrid(*(torch.arange(n) for n in lengths), indexing="ij")
            rows, columns = (
                torch.cat([factor[place.flatten()] for factor, place in zip(side, places, strict=True)], -1)
                for side in zip(*per_axis, strict=True)
            )
        else:
            at = from_the_middle(lengths)  # [N, A]
            rows, columns = (linear if config.form == "linear" else square)(at, at.new_tensor(weights))
        if rows.shape[-1] > MAX_RANK:
            raise UnsupportedError(
                f"A bias of form {config.form} takes rank {rows.shape[-1]} on a grid of {layout.grid_thw} to hold "
                f"{config.energy:.2%} of its energy, more than {MAX_RANK}. Lower energy, or give fewer axes a weight."
            )
        return rows, columns

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        rows = params.rows
        if self.config.heads == "alibi":
            heads = call.q.shape[1]
            share = torch.exp2(-8.0 / heads * torch.arange(1, heads + 1, device=rows.device))
            rows = share[:, None, None] * rows  # [H, S, R]
        return dense_at_one_width(call, *with_low_rank(call, rows, params.columns))


def from_the_middle(lengths: tuple[int, ...]) -> Tensor:
    """Positions of all tokens of a grid, from the middle of each axis: float64 (N, A), last axis fastest."""
    axes = [torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in lengths]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def linear(at: Tensor, weights: Tensor) -> Factors:
    """Factors of ``sum_a weights_a (at_ja - at_ia)``; at (N, A), weights (A,)."""
    place = at @ weights
    one = torch.ones_like(place)
    return torch.stack([-place, one], -1), torch.stack([one, place], -1)


def square(at: Tensor, weights: Tensor) -> Factors:
    """Factors of ``-sum_a weights_a (at_ia - at_ja)^2``; at (N, A), weights (A,)."""
    own = (at.square() @ -weights)[:, None]
    one = torch.ones_like(own)
    return torch.cat([2 * weights * at, own, one], -1), torch.cat([at, one, own], -1)


def low_rank(table: Tensor, energy: float) -> Factors:
    """Factors of a table, float64 (N, N): its first singular vectors, as few as hold `energy` of the squared entries."""
    left, values, right = torch.linalg.svd(table)
    held = values.square().cumsum(0)
    rank = int((held < energy * held[-1]).sum()) + 1 if held[-1] > 0 else 0
    return left[:, :rank] * values[:rank], right[:rank].mT


def balanced(rows: Tensor, columns: Tensor) -> Factors:
    """Share the size of each factor equally between its row and its column, so that neither leaves a short dtype's range."""
    row_size, column_size = (x.abs().amax(0).clamp(min=torch.finfo(x.dtype).tiny) for x in (rows, columns))
    share = (column_size / row_size).sqrt()
    return rows * share, columns / share


def _distances(length: int) -> Tensor:
    at = torch.arange(length, dtype=torch.float64)
    return (at[:, None] - at).abs()
