"""Several processes on one task, as `accelerate launch` and torchrun start them: who runs what, and how all come to know of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from accelplug import compat
from accelplug.errors import AccelplugError, UnsupportedError
from accelplug.files import is_running, launched
from accelplug.hosts.models import denoisers

T = TypeVar("T")

MEETING = timedelta(minutes=10)
"""How long processes wait for each other at the start of a task."""
WORK = timedelta(days=7)
"""How long they wait for each other's results: shares take unequally long."""


@dataclass(frozen=True)
class Ranks:
    """Processes that share a task. Every one makes the same calls of `gather` and `to_first`, in the same order.

    Attributes
    ----------
    rank, ranks : number of this process, and how many there are.
    joined : whether they hold one model between them (tensor or context parallelism): then each runs everything, with the others.
    group : of torch.distributed, on the CPU; None for a process alone.
    """

    rank: int = 0
    ranks: int = 1
    joined: bool = False
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process shows progress and writes files."""
        return self.rank == 0

    @property
    def parts(self) -> int:
        """How many things are run at a time."""
        return 1 if self.joined else self.ranks

    def share(self, items: Sequence[T]) -> list[T]:
        """Return what of `items` is run here."""
        return list(items) if self.joined else list(items)[self.rank :: self.ranks]

    def gather(self, x: T) -> list[T]:
        """Return what the processes have for `x`, in their order; where they are joined, the first one's only, for all have the same."""
        if self.ranks == 1:
            return [x]
        found: list[Any] = [None] * self.ranks
        distributed.all_gather_object(found, x, group=self.group)
        return found[: self.parts]

    def agreed(self, x: T) -> T:
        """Return what the first process has for `x`: decisions that depend on timing would differ between processes."""
        return self.gather(x)[0]

    def to_first(self, x: T) -> list[T]:
        """Return, to the first process, what `gather` would; to the others what they have."""
        if self.ranks == 1:
            return [x]
        found: list[Any] | None = [None] * self.ranks if self.first else None
        distributed.gather_object(x, found, dst=0, group=self.group)
        return [x] if found is None else found[: self.parts]


def require_one(what: str) -> None:
    """Refuse to run in one of several processes.

    Raises
    ------
    UnsupportedError
        If there are several: each would decide by times of its own.
    """
    if launched() or (is_running() and distributed.get_world_size() > 1):
        raise UnsupportedError(f"{what} runs in one process, and several were launched together. Launch one.")


def device() -> torch.device:
    """Return the device of this process, of several that were launched: they then know of each other."""
    from accelerate import PartialState

    return PartialState().device


_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Have what is done inside be this process' own work, though others were launched with it: `working` then meets nobody."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


@contextmanager
def working(model: Any) -> Iterator[Ranks]:
    """Share a task over the processes that were launched together; all must come.

    Raises
    ------
    AccelplugError
        If some do not come within `MEETING`.
    """
    if launched() and not is_running():
        device()
    if _ALONE.get() or not is_running() or distributed.get_world_size() == 1:
        yield Ranks()
        return
    try:
        meeting = distributed.new_group(backend="gloo", timeout=MEETING)
        distributed.monitored_barrier(meeting, timeout=MEETING, wait_all_ranks=True)
    except RuntimeError as error:
        raise AccelplugError(
            f"{distributed.get_world_size()} processes were launched together, and share this work; some did not come within "
            f"{MEETING.total_seconds():.0f} s. Call it in every process, or launch one. {error}"
        ) from error
    group = distributed.new_group(backend="gloo", timeout=WORK)
    parts = [model] if isinstance(model, nn.Module) else denoisers(model).values()
    joined = any(map(compat.diffusers.is_parallel, parts))
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), joined, group)
    finally:
        distributed.destroy_process_group(group)
        distributed.destroy_process_group(meeting)
