"""The worth-it gate: a speed patch stays on only where it was seen to be faster than the user's own dense attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from accelplug.bounded import Bounded

MARGIN = 0.9
"""Sparse must take at most this share of dense's time: below it the gain drowns in noise."""


@dataclass(frozen=True)
class Verdict:
    """What the gate saw for one (patch, shape, dtype, device); times in milliseconds per call."""

    patch: str
    shape_bhsd: tuple[int, ...]
    dtype: str
    device: str
    dense_ms: float
    sparse_ms: float

    @property
    def pays(self) -> bool:
        """Whether the patch is to be used."""
        return self.sparse_ms < MARGIN * self.dense_ms

    @property
    def reason(self) -> str:
        """The verdict in words."""
        return (
            f"{self.patch} would not pay at (B, H, S, D) = {self.shape_bhsd}, {self.dtype} on {self.device}: "
            f"dense {self.dense_ms:.1f} ms, sparse {self.sparse_ms:.1f} ms"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data, for reports."""
        return {**asdict(self), "shape_bhsd": list(self.shape_bhsd), "pays": self.pays}


class Gate:
    """Times dense against sparse once per (patch, shape, dtype, device) and remembers."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._verdicts: Bounded[tuple, Verdict] = Bounded(128)

    @property
    def verdicts(self) -> list[Verdict]:
        """All verdicts so far."""
        return self._verdicts.values()

    def verdict(
        self, name: str, key: object, q: Tensor, dense: Callable[[], Any], sparse: Callable[[], Any]
    ) -> Verdict | None:
        """Return the verdict for a call, timing both ways if it is new; None where the gate is off."""
        if self.mode == "off":
            return None
        shape, dtype, device = tuple(q.shape), str(q.dtype).removeprefix("torch."), str(q.device)

        def measure() -> Verdict:
            return Verdict(name, shape, dtype, device, median_ms(dense, q.device), median_ms(sparse, q.device))

        return self._verdicts.get((key, shape, dtype, device), measure)


def median_ms(run: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Median wall time of `run` in milliseconds, after one call to warm up."""
    run()
    return statistics.median(timed_ms(run, device)[1] for _ in range(repeats))


def timed_ms(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Run once; return the result and the wall time in milliseconds, the device synchronised before and after."""
    synchronise(device)
    start = time.perf_counter()
    result = run()
    synchronise(device)
    return result, 1e3 * (time.perf_counter() - start)


def synchronise(device: torch.device) -> None:
    """Wait for `device` to finish, where it runs ahead."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
