"""What a method measures on dense runs, to make the tables of its recipe. See `accelplug.calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from accelplug.errors import UnsupportedError
from accelplug.patches.base import Config, Patch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelplug.call import AttentionCall, Clock, Layout, Site

MAX_STATE = 4 << 30
"""Bytes of sums that a calibration may keep, on the CPU, beside a model of tens of GB where they are as many."""


@dataclass(frozen=True, eq=False)
class Seen:
    """One dense attention call that was observed.

    Attributes
    ----------
    call : its q, k, v (B, H, S, D), key mask and scale.
    out : what it gave, (B, H, S, D_v).
    site, layout, clock : where, on which grid, when.
    bucket, buckets : in which of how many spans of equal length of the run.
    generator : for sampling; the same for the same call whenever it is observed. On the CPU.
    prompt, prompts : which of how many.
    """

    call: AttentionCall
    out: Tensor
    site: Site
    layout: Layout
    clock: Clock
    bucket: int
    buckets: int
    generator: torch.Generator
    prompt: int = 0
    prompts: int = 1

    def sample(self, number: int, of: int | None = None) -> Tensor:
        """Draw indices below `of`, or visual tokens of the sequence, with replacement: int64 (number,), on the call's device."""
        first, count = (self.layout.text_before, self.layout.visual) if of is None else (0, of)
        return (first + torch.randint(count, (number,), generator=self.generator)).to(self.call.q.device)

    def heads(self) -> Iterator[tuple[int, int]]:
        """Yield (batch row, query head): what is looked at goes head by head, so that it stays small."""
        yield from ((row, head) for row in range(self.call.q.shape[0]) for head in range(self.call.q.shape[1]))

    def logits(self, tokens: Tensor, row: int, head: int) -> Tensor:
        """Scores of the queries of `tokens` (R,) on all keys, float32 (R, S), -inf where the mask hides a key."""
        q, k, mask = self.call.q, self.call.k, self.call.mask
        scores = (q[row, head, tokens].float() * self.call.scale) @ k[row, self._kv(head)].float().T
        return scores if mask is None else scores.masked_fill(~mask[row], -torch.inf)

    def values(self, row: int, head: int) -> Tensor:
        """Values that a query head reads, float32 (S, D_v)."""
        return self.call.v[row, self._kv(head)].float()

    def _kv(self, head: int) -> int:
        return head * self.call.k.shape[1] // self.call.q.shape[1]


class CalibrationConfig(Config):
    """The knobs that all calibrations share."""

    rows: int = Field(64, ge=1, description="Queries sampled per observed call.")


class Calibration:
    """What one method measures. It stands on the method's page, as ``Patch.Calibration``.

    `observe` adds numbers to `state` by `add`, so that a calibration can be put down and taken up again between two runs, and several
    processes can share the runs; everything else must follow from the state and the knobs. Each part has sums of its own.
    """

    Config: ClassVar[type[CalibrationConfig]] = CalibrationConfig
    parts: ClassVar[int] = 1
    """How many times all prompts are run; `observe` is told which time it is."""
    axes: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Leading axes of each table, by key, which is the name of the setting that takes it."""

    def __init__(self, patch: Patch, config: Any = None) -> None:
        self.patch = patch
        self.config = self.Config.read(config, f"Settings of {type(self).__name__}")
        self.state: dict[str, Tensor] = {}

    def observe(self, seen: Seen, part: int) -> None:
        """Look at a dense call."""
        raise NotImplementedError

    def serves(self, patch: Patch) -> bool:
        """Whether a patch takes the tables."""
        return type(patch) is type(self.patch)

    def tables(self) -> dict[str, Tensor]:
        """Return the tables, by key; see `axes`."""
        raise NotImplementedError

    def told(self) -> str:
        """Return what there is to say of the tables, in a sentence; nothing by default."""
        return ""

    def add(self, seen: Seen, name: str, values: Tensor, row: tuple[int, int] | None = None) -> None:
        """Add numbers of one call, [H, ...], to a sum [rows, layers, H, ...] of their dtype, and count the call.

        `row`: which of how many rows; the call's bucket if left out.
        """
        at, rows = row or (seen.bucket, seen.buckets)
        layer = seen.site.layer or 0
        for key, part in ((name, values.cpu()), (f"{name} calls", torch.ones((), dtype=torch.int32))):
            if key not in self.state:
                self._make_room(key, (rows, seen.site.layers, *part.shape), part.dtype)
            self.state[key][at, layer] += part

    def _make_room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        new = torch.Size(shape).numel() * dtype.itemsize
        held = sum(x.nbytes for x in self.state.values())
        if held + new > MAX_STATE:
            raise UnsupportedError(
                f"Calibrating {type(self.patch).__name__} would sum {name!r} into {new >> 20} MiB of shape "
                f"{' x '.join(map(str, shape))}, with {MAX_STATE >> 20} MiB allowed for all. Take larger blocks, fewer buckets, "
                "or a smaller grid."
            )
        self.state[name] = torch.zeros(shape, dtype=dtype)

    def mean(self, name: str) -> Tensor:
        """Mean over the calls that were added, [buckets, layers, H, ...]; NaN where there was none."""
        total, calls = self.state[name], self.state[f"{name} calls"]
        return total / calls.view(*calls.shape, *[1] * (total.ndim - 2))


def attended(logits: Tensor, readable: Tensor, values: Tensor) -> Tensor:
    """Attention of some rows (R, S) to the keys that they may read, bool (R, S): float32 (R, D_v); 0 for rows without one."""
    scores = logits.masked_fill(~readable, -torch.inf)
    return scores.softmax(-1).nan_to_num(nan=0.0) @ values


def relative_error(out: Tensor, exact: Tensor) -> Tensor:
    """Squared error over squared size: 0 for the same, 1 for nothing at all."""
    return (out - exact).square().sum() / exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
