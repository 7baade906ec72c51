"""Tensor parallelism in a language model: which of each layer's heads this process has, and those of all ranks side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelplug import compat


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among those that share each layer's heads."""

    rank: int
    ranks: int
    group: Any

    @classmethod
    def of(cls, model: Any) -> TensorParallel | None:
        """Return this process's place in `model`, None where its heads are not shared out."""
        part = compat.transformers.tensor_mesh(model)
        shared = part is not None and part.size() > 1
        return cls(part.get_local_rank(), part.size(), part.get_group()) if shared else None

    def gather(self, x: Tensor) -> Tensor:
        """Put the heads of all ranks side by side: (B, H, ...) -> (B, ranks * H, ...)."""
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, 1)
