"""What becomes of the key blocks that a plan does not select."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Drop:
    """They are not read."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Each is read as one key: the mean of its keys and of its values, with ``weight * log(length)`` added to the logit.

    At weight 1 a pooled block stands for as many equal keys as it is long, so it is exact where the keys of a block are
    equal (Sol-Attn, arXiv 2607.24027; PISA, arXiv 2602.01077). At weight 0 it counts as a single key.

    Attributes
    ----------
    weight : None for 1, or Tensor (H,) float32, one per query head.
    """

    weight: Tensor | None = None


Rest = Drop | Pool
