"""A pipeline called for pictures or for latents, classic or modular, and when its steps ended."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from accelplug import compat
from accelplug.hosts.clips import decoded
from accelplug.hosts.models import DENOISERS
from accelplug.kernels.timing import synchronise

CALLBACK = "callback_on_step_end"


def latents_of(pipe: Any, given: Mapping[str, Any]) -> Any:
    """Call a pipeline for its final latents; for what it gives instead where these are not to be had."""
    if not compat.diffusers.blocks_of(pipe):
        return pipe(**{"output_type": "latent", **given, "return_dict": False})[0]
    state = pipe(**{"output_type": "pt", **given} if "output_type" in (compat.diffusers.arguments_of(pipe) or {}) else given)
    found = state.get("latents")
    return state.get(decoded(pipe)) if found is None else found


@dataclass
class Marks:
    """When a run's steps ended.

    A classic pipeline says so by its callback. Of others a step ends with the last forward at its timestep, so that the next one bears
    what lies between.

    Attributes
    ----------
    begun : when the first forward began, in seconds; None before.
    ends : when the steps ended.
    latents : after the last step, where the callback is given them.
    """

    device: torch.device
    begun: float | None = None
    ends: list[float] = field(default_factory=list)
    latents: Tensor | None = None
    _timestep: Any = None

    @property
    def step_ms(self) -> list[float]:
        """What each step took."""
        marks = [] if self.begun is None else [self.begun, *self.ends]
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]

    def now(self) -> float:
        """The time, all that was asked of the device being done."""
        synchronise(self.device)
        return time.perf_counter()

    def begins(self, module: nn.Module, args: Any) -> None:
        """A forward begins."""
        if self.begun is None:
            self.begun = time.perf_counter()

    def ended(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A forward has ended, and with it the step so far: it is the last one's again where the timestep is."""
        timestep = kwargs.get("timestep")
        timestep = timestep.unique().tolist() if isinstance(timestep, Tensor) else timestep
        if self.ends and timestep == self._timestep:
            self.ends.pop()
        self.ends.append(self.now())
        self._timestep = timestep

    def callback(self, users: Any) -> Any:
        """Return what a pipeline is given to call at the end of each step; `users`: what else it calls."""

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.ends.append(self.now())
            self.latents = tensors["latents"].detach().clone() if "latents" in tensors else None
            return users(pipe, step, timestep, tensors) if users else tensors

        return on_step_end


@contextmanager
def marked(pipe: Any, given: dict[str, Any], device: torch.device) -> Iterator[Marks]:
    """Watch the steps of the call inside, whose arguments `given` gain a callback where it takes one."""
    marks, called, hooks = Marks(device), _as_called(pipe), []
    tells = CALLBACK in (compat.diffusers.arguments_of(pipe) or {})
    if tells:
        given[CALLBACK] = marks.callback(given.get(CALLBACK))
    else:
        hooks = [part.register_forward_hook(marks.ended, with_kwargs=True) for part in called]
    hooks += [part.register_forward_pre_hook(marks.begins) for part in called]
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()


def _as_called(pipe: Any) -> list[nn.Module]:
    """The denoisers as the pipeline calls them: hooks on a compiled one then run outside its graph."""
    found = (getattr(pipe, name, None) for name in DENOISERS)
    return [part for part in found if isinstance(part, nn.Module)]
