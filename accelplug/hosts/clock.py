"""Which step is it? The place of the timestep that the denoiser was given in the schedule, whoever calls; never a count of calls."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelplug import compat
from accelplug.bounded import Bounded
from accelplug.call import Clock
from accelplug.hosts.run import Moment
from accelplug.hosts.undo import Undo

if TYPE_CHECKING:
    from accelplug.hosts.run import Run

HOOK = "accelplug"
"""Name of our hook in a denoiser's registry."""

SCALES: Mapping[str, Callable[[Any], Tensor]] = {
    "timestep": lambda scheduler: scheduler.timesteps,
    "unit": lambda scheduler: scheduler.timesteps / 1000,
    "inverse": lambda scheduler: 1 - scheduler.timesteps / 1000,
    "sigma": lambda scheduler: scheduler.sigmas[: len(scheduler.timesteps)],
    "sigma_share": lambda scheduler: (lambda sigma: sigma / (sigma + 1))(scheduler.sigmas[: len(scheduler.timesteps)]),
}
"""What a pipeline makes of its scheduler's timesteps before it hands one to the denoiser."""


@dataclass(eq=False)
class _Schedule:
    """The timesteps of a scheduler, and as numbers what denoisers are given for them, by scale."""

    timesteps: Tensor
    used: bool = False
    """Whether a run has gone by them, as far as is known."""
    given: dict[str, list[float]] = field(default_factory=dict)


class _Told(threading.local):
    """What a thread was told: a context around its forwards, a step set by hand."""

    def __init__(self) -> None:
        self.context: Any = None
        self.fixed: tuple[int, int] | None = None


class StepClock:
    """The clock of one pipeline's denoisers, for each thread its own. Sources, best first:

    1. what the user set by `set`;
    2. the place of the forward's timestep among the timesteps of a scheduler: that of the pipeline given to `apply`, or of another
       one that holds the denoiser;
    3. ``cache_context(name, step_index, num_inference_steps)`` around the forward, which also names the branch;
    4. the guider's step (modular pipelines, HunyuanVideo 1.5), which names the branch where no context does.

    With none of them the step is unknown, and rules that ask for steps run dense, counted. Steps are places in the whole schedule:
    an image-to-image pipeline of strength 0.6 begins at step 4 of 10. They count calls of the model: Heun and KDPM2 have two for each
    of the pipeline's steps but one, PNDM one more in all. Tokens may have timesteps of their own (a given first frame, diffusion
    forcing, sound): the noisiest tells, which is the largest, or the least where a schedule grows.

    Parameters
    ----------
    pipe : what was given to `apply`, a pipeline or a denoiser.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._bare = isinstance(pipe, torch.nn.Module)
        self._others: list[weakref.ref[Any]] = []
        self._holders = 0
        self._looking, self._taking = threading.Lock(), threading.Lock()
        self._thread = _Told()
        # Schedules are kept, small as they are, so that an id stays theirs.
        self._schedules: Bounded[int, _Schedule] = Bounded(64)
        for scheduler in self._schedulers():
            self._schedule(scheduler).used = True  # by a run before

    def set(self, step: int | None, steps: int | None) -> None:
        """Fix the step of this thread by hand, or, with None, let the sources speak again."""
        self._thread.fixed = None if step is None or steps is None else (step, steps)

    def on_context(self, context: Any) -> None:
        """Take note of a cache context: a name, a ``CacheContext``, or None at its end."""
        self._thread.context = context

    @property
    def fused(self) -> tuple[str, ...]:
        """Names of the LoRAs that the pipeline has fused into weights."""
        return tuple(sorted(getattr(self._pipe(), "fused_loras", ())))

    @property
    def perturbs(self) -> bool:
        """Whether the pipeline makes a perturbed prediction of its own: those with perturbed-attention guidance."""
        return bool(getattr(self._pipe(), "do_perturbed_attention_guidance", False))

    @property
    def guides(self) -> bool | None:
        """Whether the pipeline has classifier-free guidance on; None where it does not say."""
        return getattr(self._pipe(), "do_classifier_free_guidance", None)

    @property
    def context(self) -> Any:
        """The cache context that is on in this thread, as it was told."""
        return self._thread.context

    def now(
        self,
        timestep: Any = None,
        denoiser: Any = None,
        run: Run | None = None,
        scales: tuple[str, ...] = ("timestep", "unit"),
    ) -> Moment:
        """Return the present time.

        Parameters
        ----------
        timestep : what the denoiser was given; None where that cannot be read (in compiled code): then the schedulers' own counts
            are believed.
        denoiser : whose other pipelines are looked for, where no schedule that is known has the timestep.
        run : of this thread so far.
        scales : keys of `SCALES`, what timesteps may have been made into, the likeliest first.
        """
        context = self._thread.context
        branch = getattr(context, "name", context)
        if self._thread.fixed is not None:
            return Moment(Clock(*self._thread.fixed, branch))
        timestep = getattr(context, "timestep", None) if timestep is None else timestep
        given = _Given.of(timestep)
        with self._taking:  # two threads that begin at once must not take one schedule for new
            if given is not None:
                places = self._places(given, denoiser, run, scales)
            else:
                places = self._counted(denoiser, run, branch) if self._told() is None else []
            schedules = tuple(schedule for schedule, _ in places)
            if len(schedules) == 1:
                self._schedules.get(id(schedules[0]), lambda: _Schedule(schedules[0])).used = True
        if places:
            first, step = places[0]
            return Moment(Clock(step, len(first), self._guided(first, step) if branch is None else branch), schedules)
        told = self._told()
        clock = Clock(None, None, branch) if told is None else Clock(*told, branch)
        return Moment(clock, (), given.number if given is not None else None)

    # ------------------------------------------------------------------------------------------- in which schedule

    def _places(self, given: _Given, denoiser: Any, run: Run | None, scales: tuple[str, ...]) -> list[tuple[Tensor, int]]:
        """Return the schedules that hold what was given, and where: those of the run if it goes on, else new ones, else old ones."""
        for scheduler in self._schedulers():
            if (place := given.place_in(scheduler.timesteps)) is not None:
                return [(scheduler.timesteps, place)]
        found = self._found(given, run, scales)
        if run is not None and (same := [place for place in found if run.may_go_on(*place)]):
            return same
        if not (new := self._new(found)):  # an old schedule may hold it by chance
            self._look_for_others(denoiser)
            found = self._found(given, run, scales)
            new = self._new(found)
        return new or found

    def _new(self, places: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
        """Those of which no run is known to have gone by them."""
        old = {id(schedule.timesteps) for schedule in self._schedules.values() if schedule.used}
        return [place for place in places if id(place[0]) not in old]

    def _found(self, given: _Given, run: Run | None, scales: tuple[str, ...]) -> list[tuple[Tensor, int]]:
        places = []
        for scheduler in self._schedulers():
            last = run.reached(scheduler.timesteps) if run is not None else None
            exact = given.place_in(scheduler.timesteps)
            if (step := exact if exact is not None else self._step(scheduler, given, scales, last)) is not None:
                places.append((scheduler.timesteps, step))
        return places

    def _step(self, scheduler: Any, given: _Given, scales: tuple[str, ...], last: int | None) -> int | None:
        """Return where in a scheduler's timesteps the given one is, `last` being the place of the one before."""
        schedule = self._schedule(scheduler)
        counted = getattr(scheduler, "step_index", None)
        begun = counted if counted is not None else getattr(scheduler, "begin_index", None)
        for scale in scales:
            if scale not in schedule.given:
                schedule.given[scale] = SCALES[scale](scheduler).tolist() if _has(scheduler, scale) else []
        for rank in range(len(given.numbers)):
            for scale in scales:
                made = schedule.given[scale]
                noisiest_is_least = len(made) > 1 and made[0] < made[-1]
                number = given.numbers[-1 - rank if noisiest_is_least else rank]
                distances = {i: abs(t - number) for i, t in enumerate(made)}
                near = [i for i, distance in distances.items() if distance <= given.tolerance * max(abs(number), 1e-3)]
                if not near or (counted is not None and counted not in near):
                    continue
                if begun in near:
                    return begun
                # Of timesteps that are equal (PNDM), or that rounding makes equal, the next one after the last.
                return next((i for i in near if last is not None and i > last), min(near, key=distances.__getitem__))
        return None

    def _schedule(self, scheduler: Any) -> _Schedule:
        timesteps = scheduler.timesteps
        # Some schedulers are made with as many timesteps as there were in training: hardly those of a run.
        trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
        return self._schedules.get(id(timesteps), lambda: _Schedule(timesteps, used=len(timesteps) == trained))

    def _schedulers(self) -> Iterator[Any]:
        """Schedulers whose timesteps were set: that of the pipeline given to `apply`, then others that were seen."""
        others = [scheduler for other in self._others if (scheduler := other()) is not None]
        for scheduler in (getattr(self._pipe(), "scheduler", None), *others):
            # DDPM knows no number of steps where it was given the timesteps themselves.
            is_set = getattr(scheduler, "num_inference_steps", None) is not None or getattr(
                scheduler, "custom_timesteps", False
            )
            if is_set and isinstance(getattr(scheduler, "timesteps", None), Tensor):
                yield scheduler

    def _look_for_others(self, denoiser: Any) -> None:
        """Take note of the schedulers of all pipelines that hold a denoiser.

        Pipelines leave no trace in their parts, so whatever refers to the denoiser is asked: at the first step of a run that goes by
        no schedule known, and not again while as many objects hold it. Of a denoiser that was patched by itself nobody is asked.
        """
        if denoiser is None or self._bare:
            return
        with self._looking:
            if sys.getrefcount(denoiser) == self._holders:
                return
            parts = getattr(self._pipe(), "__dict__", {})
            compiled = [part for part in parts.values() if compat.torch.is_wrapped(part, denoiser)]
            own = parts.get("scheduler")
            found = known = [scheduler for other in self._others if (scheduler := other()) is not None]
            for holder in gc.get_referrers(denoiser, *compiled):
                members = holder if isinstance(holder, dict) else getattr(holder, "__dict__", None)
                scheduler = members.get("scheduler") if isinstance(members, dict) else None
                if hasattr(scheduler, "set_timesteps") and all(scheduler is not one for one in (own, *found)):
                    found = [*found, scheduler]
            self._others = [weakref.ref(scheduler) for scheduler in found]
            self._holders = sys.getrefcount(denoiser) if found is known else 0

    # ------------------------------------------------------------------------------------------------ told otherwise

    def _told(self) -> tuple[int, int] | None:
        """What the context around the forward says, or the guider."""
        step, steps = (getattr(self._thread.context, name, None) for name in ("step_index", "num_inference_steps"))
        if step is not None and steps is not None:
            return int(step), int(steps)
        told = [step for guider in self._guiders() if (step := compat.diffusers.guider_step(guider)) is not None]
        return told[0] if len(told) == 1 else None  # of two, one may speak of steps that are over

    def _guiders(self) -> list[Any]:
        """The guiders of the pipeline: one for each of its denoisers that take turns."""
        pipe = self._pipe()
        return [guider for name in compat.diffusers.GUIDERS if (guider := getattr(pipe, name, None)) is not None]

    def _guided(self, schedule: Tensor, step: int) -> str | None:
        """The branch that a guider has prepared, if it was told this very step."""
        for guider in self._guiders():
            prepared = compat.diffusers.guider_branch(guider)
            told = None if prepared is None else _Given.of(prepared[1])
            if prepared is not None and told is not None and told.place_in(schedule) == step:
                return prepared[0]
        return None

    def _counted(self, denoiser: Any, run: Run | None, branch: str | None) -> list[tuple[Tensor, int]]:
        """What schedulers count, where no context tells and no timestep can be read: of those that are in a run the first new one."""
        for look in (lambda: None, lambda: self._look_for_others(denoiser)):
            look()
            places = [
                place
                for scheduler in self._schedulers()
                if (place := _count(scheduler)) is not None and not (run is not None and run.stands_at(*place, branch))
            ]
            if new := self._new(places):
                return new[:1]
            if run is not None and (same := [place for place in places if run.may_go_on(*place)]):
                return same[:1]
        return places[:1]


def _count(scheduler: Any) -> tuple[Tensor, int] | None:
    """Where a scheduler says it is, if it counts and is not at its end."""
    if not hasattr(scheduler, "step_index"):
        return None
    # None before the first step, and where an img2img pipeline starts late, begin_index says where.
    step = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index or 0
    return (scheduler.timesteps, step) if step < len(scheduler.timesteps) else None


def _has(scheduler: Any, scale: str) -> bool:
    return not scale.startswith("sigma") or isinstance(getattr(scheduler, "sigmas", None), Tensor)


@dataclass(frozen=True, eq=False)
class _Given:
    """A timestep as a denoiser was given it.

    Attributes
    ----------
    tensor : it, where it is a tensor.
    tolerance : relative error of its dtype.
    """

    tensor: Any
    tolerance: float

    @classmethod
    def of(cls, timestep: Any) -> _Given | None:
        """Return what can be read; None of no timestep, and while a CUDA graph is captured."""
        if not isinstance(timestep, Tensor):
            return None if timestep is None else cls(torch.tensor(float(timestep), dtype=torch.float64), 1e-6)
        if timestep.numel() == 0 or (timestep.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        return cls(timestep, torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 1e-6)

    @cached_property
    def numbers(self) -> list[float]:
        """What stands in it, each once, the largest first: several where tokens have timesteps of their own."""
        if self._is_one:
            return [float(self.tensor.flatten()[0])]
        return [float(number) for number in self.tensor.unique().flip(0).tolist()]

    @property
    def _is_one(self) -> bool:
        """Whether it is one number in memory, however often."""
        return not any(size > 1 and stride for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))

    @property
    def number(self) -> float:
        """The largest timestep in it."""
        return self.numbers[0]

    def place_in(self, timesteps: Tensor) -> int | None:
        """Return where in `timesteps` it is taken from, if it is a view of them: no device is waited for then."""
        one, many = self.tensor, timesteps
        if type(one) is not Tensor or type(many) is not Tensor or many.ndim != 1 or not many.is_contiguous():
            return None
        if one.dtype != many.dtype or one.device != many.device or one.device.type == "meta":
            return None
        if not self._is_one or one.untyped_storage().data_ptr() != many.untyped_storage().data_ptr():
            return None
        place = int(one.storage_offset() - many.storage_offset())
        return place if 0 <= place < len(many) else None


class ContextListener:
    """Listens for cache contexts and for the end of a run, in the denoiser's own hook registry, without wrapping ``forward``."""

    def __init__(self, denoiser: Any, on_context: Any, on_reset: Any) -> None:
        self._registry_type, hook_type, manager_type, state_type = compat.diffusers.hook_types()

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
        if compat.diffusers.REGISTRY not in vars(self._denoiser):
            brought = self._registry_type(self._denoiser)
            undo.touch(self._denoiser, partial(_drop_empty, registry=brought))
            vars(self._denoiser)[compat.diffusers.REGISTRY] = brought
        registry = vars(self._denoiser)[compat.diffusers.REGISTRY]
        undo.touch(registry, partial(compat.diffusers.stop_listening, name=HOOK))
        compat.diffusers.listen_first(registry, HOOK, self._hook)


def _drop_empty(names: dict[str, Any], registry: Any) -> None:
    if not set(registry.hooks) - {HOOK} and names.get(compat.diffusers.REGISTRY) is registry:
        del names[compat.diffusers.REGISTRY]
