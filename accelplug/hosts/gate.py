"""The worth-it gate: a speed patch stays on only where it was seen to be faster than the user's own dense attention."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.errors import AccelplugError
from accelplug.kernels.timing import capturing, timed_ms

if TYPE_CHECKING:
    from accelplug.patches.base import Patch

MARGIN = 0.9
"""Sparse must take at most this share of dense's time: below it the gain drowns in noise."""


@dataclass(frozen=True)
class Verdict:
    """What the gate saw for one (patch, config, shape, dtype, device); times in milliseconds per call."""

    patch: str
    shape_bhsd: tuple[int, ...]
    dtype: str
    device: str
    dense_ms: float
    sparse_ms: float
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pays(self) -> bool:
        """Whether the patch is to be used."""
        return self.sparse_ms < MARGIN * self.dense_ms

    @property
    def reason(self) -> str:
        """The verdict in words."""
        return (
            f"{self.patch} would not pay at (B, H, S, D) = {self.shape_bhsd}, {self.dtype} on {self.device}: "
            f"dense {self.dense_ms:.1f} ms, sparse {self.sparse_ms:.1f} ms a call"
        )

    def covers(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it is about calls of this shape, dtype and device."""
        return (self.shape_bhsd, self.dtype, self.device) == (shape, _plain(dtype), str(device))

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data, for reports and for `Gate.recall`."""
        return {**asdict(self), "shape_bhsd": list(self.shape_bhsd), "config": dict(self.config), "pays": self.pays}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """Read what `to_dict` gave."""
        known = {entry.name: data[entry.name] for entry in fields(cls) if entry.name in data}
        return TypeAdapter(cls).validate_python({**known, "shape_bhsd": tuple(data["shape_bhsd"])})


class Gate:
    """Times dense against sparse once per (patch, config, shape, dtype, device) and remembers.

    Parameters
    ----------
    mode : ``auto``, ``report`` or ``off``.
    times : if False, nothing is timed: the only verdicts are those given to `recall`.
    """

    def __init__(self, mode: str, times: bool = True) -> None:
        self.mode, self.times = mode, times
        self.unjudged: set[str] = set()
        """Calls that could not be timed when they came, in words."""
        self._verdicts: Bounded[tuple, Verdict] = Bounded(128)
        self._told: dict[tuple, Verdict] = {}

    def postpone(self, name: str, where: str) -> None:
        """Take note of a patch that was first met in compiled code, where nothing can be timed; `settle` when it has been."""
        self.unjudged.add(_postponed(name, where))

    def settle(self, name: str, where: str) -> None:
        """Take note that a patch that was postponed has been judged."""
        self.unjudged.discard(_postponed(name, where))

    @property
    def verdicts(self) -> list[Verdict]:
        """All verdicts so far."""
        return self._verdicts.values()

    def recall(self, verdicts: Iterable[Mapping[str, Any]]) -> None:
        """Take verdicts that an earlier gate gave, as plain data; they stand, untimed.

        Raises
        ------
        AccelplugError
            If they are something else.
        """
        try:
            told = [Verdict.from_dict(data) for data in verdicts]
        except (KeyError, TypeError, ValueError) as error:
            raise AccelplugError(
                f"choices hold no verdicts of a gate: expected what plug.choices gave, got {error}."
            ) from error
        self._told |= {_verdict_key(v.patch, v.config, v.shape_bhsd, v.dtype, v.device): v for v in told}

    def may_time(self, device: torch.device) -> bool:
        """Whether calls on `device` can be timed now: not while a graph is captured."""
        return self.times and not capturing(device)

    def known(
        self, name: str, patch: Patch, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Verdict | None:
        """Return the verdict for such calls, or None if there is none yet."""
        found = self._verdicts.peek((patch, shape, dtype, device))
        if found is not None or not self._told:
            return found
        return self._told.get(_verdict_key(name, settings(patch), shape, _plain(dtype), str(device)))

    def verdict(
        self, name: str, patch: Patch, q: Tensor, dense: Callable[[], Any], sparse: Callable[[], Any]
    ) -> Verdict | None:
        """Return the verdict for a call, timing both ways if it is new; None where the gate is off or may not time."""
        if self.mode == "off":
            return None
        shape = tuple(q.shape)
        known = self.known(name, patch, shape, q.dtype, q.device)
        if known is None and not self.may_time(q.device):
            why = (
                "a graph was being captured; call plug.warmup(...) first"
                if self.times
                else "its choices hold no verdict on it"
            )
            self.unjudged.add(f"{name} at (B, H, S, D) = {shape}: {why}")
            return None

        def measure() -> Verdict:
            if known is not None:
                return known
            times = median_ms(dense, q.device), median_ms(sparse, q.device)
            return Verdict(name, shape, _plain(q.dtype), str(q.device), *times, config=settings(patch))

        return self._verdicts.get((patch, shape, q.dtype, q.device), measure)


def _postponed(name: str, where: str) -> str:
    return f"{name} in {where}: compiled whole, so that nothing could be timed yet; run plug.warmup(...) before compiling"


def settings(patch: Patch) -> dict[str, Any]:
    """A patch's config as plain data."""
    return patch.config.model_dump(mode="json")


def _verdict_key(name: str, config: Mapping[str, Any], shape: tuple[int, ...], dtype: str, device: str) -> tuple:
    return name, json.dumps(config, sort_keys=True), tuple(shape), dtype, device


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def median_ms(run: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Median wall time of `run` in milliseconds, after one call to warm up."""
    run()
    return statistics.median(timed_ms(run, device)[1] for _ in range(repeats))
