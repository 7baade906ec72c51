"""Which step is it? Told by the host library where it says so, never by counting attention calls."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from accelplug import compat
from accelplug.call import Clock
from accelplug.hosts.undo import Undo

HOOK = "accelplug"
"""Name of our hook in a denoiser's registry."""


class StepClock:
    """The clock of one pipeline's denoisers. Sources, best first:

    1. what the user set by `set`;
    2. ``cache_context(name, step_index, num_inference_steps)`` around the denoiser call, which also names the branch;
    3. ``scheduler.step_index``;
    4. the guider's step (modular pipelines, HunyuanVideo 1.5);
    5. the place of the call's timestep in ``scheduler.timesteps`` (DDIM and other schedulers that count nothing).

    With none of them the step is unknown, and rules that ask for steps run dense, counted.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._said: Any = None
        self._fixed: tuple[int, int] | None = None

    def set(self, step: int | None, steps: int | None) -> None:
        """Fix the step by hand, or, with None, let the sources speak again."""
        self._fixed = None if step is None or steps is None else (step, steps)

    def hear(self, context: Any) -> None:
        """Take note of a cache context: a name, a ``CacheContext``, or None at its end."""
        self._said = context

    def now(self, timestep: Any = None) -> Clock:
        """Return the present time. `timestep`: what the denoiser was given, read only where nothing else tells."""
        branch = getattr(self._said, "name", self._said)
        step, steps = self._fixed or self._from_context() or self._from_pipe(timestep) or (None, None)
        return Clock(step, steps, branch)

    def _from_context(self) -> tuple[int, int] | None:
        step = getattr(self._said, "step_index", None)
        steps = getattr(self._said, "num_inference_steps", None) or self._scheduled_steps()
        return None if step is None or steps is None else (int(step), int(steps))

    def _from_pipe(self, timestep: Any) -> tuple[int, int] | None:
        pipe: Any = self._pipe()
        scheduler: Any = getattr(pipe, "scheduler", None)
        steps = self._scheduled_steps()
        if hasattr(scheduler, "step_index") and steps is not None:
            # None before the first step, and where an img2img pipeline starts late, begin_index says where.
            step = scheduler.step_index
            return (step if step is not None else scheduler.begin_index or 0), steps
        guider: Any = getattr(pipe, "guider", None)
        if (told := compat.guider_step(guider)) is not None:
            return told
        if timestep is None or steps is None:
            return None
        value = float(timestep.flatten()[0]) if hasattr(timestep, "flatten") else float(timestep)
        distances = [abs(float(t) - value) for t in scheduler.timesteps]
        nearest = min(range(steps), key=distances.__getitem__)
        return (nearest, steps) if distances[nearest] < 0.5 else None

    def _scheduled_steps(self) -> int | None:
        timesteps = getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None)
        return None if timesteps is None else len(timesteps)


class Ear:
    """Listens for cache contexts and for the end of a run, in the denoiser's own hook registry, without wrapping ``forward``."""

    def __init__(self, denoiser: Any, on_context: Any, on_reset: Any) -> None:
        self._registry_type, hook_type, manager_type, state_type = compat.hook_types()

        class Manager(manager_type):  # type: ignore[misc, valid-type]
            def set_context(self, context: Any) -> None:
                on_context(context)

        class Hook(hook_type):  # type: ignore[misc, valid-type]
            _is_stateful = True

            def __init__(self) -> None:
                super().__init__()
                self.manager = Manager(state_type)

            def reset_state(self, module: Any) -> Any:
                on_reset()
                return module

        self._denoiser, self._hook = denoiser, Hook()

    def install(self, undo: Undo) -> None:
        """Begin to listen. A registry that was not there before goes with us, unless others have come to use it."""
        if compat.REGISTRY not in vars(self._denoiser):
            brought = self._registry_type(self._denoiser)
            undo.touch(self._denoiser, partial(_drop_empty, registry=brought))
            vars(self._denoiser)[compat.REGISTRY] = brought
        registry = vars(self._denoiser)[compat.REGISTRY]
        undo.touch(registry, partial(compat.stop_listening, name=HOOK))
        compat.listen_first(registry, HOOK, self._hook)


def _drop_empty(names: dict[str, Any], registry: Any) -> None:
    if not set(registry.hooks) - {HOOK} and names.get(compat.REGISTRY) is registry:
        del names[compat.REGISTRY]
