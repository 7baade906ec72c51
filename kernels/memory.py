"""What a call leaves for the same attention module in the next step. Compiled graphs take tensors and no objects: they take its ticket."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from accelplug.kernels.timing import capturing


@dataclass(eq=False)
class Memory:
    """A tensor of one attention module and guidance branch, from step to step.

    A step starts where the last one ended; within a step every call starts from the same tensor, or from what the first one left, so
    that measuring or drawing a call does not change what comes after. Without a step count every call starts anew.

    Attributes
    ----------
    start, end : what the last step left, and what this one leaves, the same until its first call; None before the first call, and
        `start` where nobody asks for it again.
    step : diffusion step that `start` belongs to.
    first : whether no step came before it: a run that starts over where it began is then the same, though nobody said so.
    differed : whether calls of one step left different things, where somebody looks.
    ticket : int64 () on the CPU, the number by which `memory_of` finds it.
    """

    start: Tensor | None = None
    end: Tensor | None = None
    step: int | None = None
    first: bool = True
    differed: bool = False
    ticket: Tensor = field(init=False)

    def __post_init__(self) -> None:
        number = next(_numbers)
        self.ticket = torch.tensor(number, device="cpu")
        _memories[number] = self

    def advance(self, step: int | None) -> None:
        """Begin a step, unless it has begun already."""
        if step != self.step:
            self.start, self.step, self.first = self.end, step, self.end is None

    def started(self, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Return what the last step left, if it fits."""
        return _fitting(self.start, shape, device)

    def ended(self, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Return what a call of this step left, if it fits; None before there was one."""
        return None if self.end is self.start else _fitting(self.end, shape, device)


def _fitting(x: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    return x if x is not None and x.shape == shape and x.device == device else None


_numbers = count(1)
_memories: WeakValueDictionary[int, Memory] = WeakValueDictionary()

COLD = torch.tensor(0, device="cpu")
"""The ticket of no memory: every call starts anew."""


def memory_of(ticket: Tensor, device: torch.device) -> Memory | None:
    """Return the memory that has a ticket; None for `COLD`, for one that is gone, and while a CUDA graph is captured on `device`.

    A replay would start from what was there at the capture, every time. Not to be traced: called inside of operators.
    """
    return None if capturing(device) else _memories.get(int(ticket))
