"""When a forward happens, and of which run: its beginning and end are noticed here, and what it kept does not outlive it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from accelplug.call import Clock

State = dict[tuple[str | None, str | None], dict[str, Any]]
"""What patches keep, by (attention module, guidance branch); module None is shared by all of the branch."""


@dataclass(frozen=True, eq=False)
class Moment:
    """When a forward happens.

    Attributes
    ----------
    clock : step, steps and branch, as far as they are known.
    schedules : the tensors of timesteps that it may go by, of which every call of a pipeline makes one; several where pipelines run
        side by side by equal ones, none where none is known.
    given : the timestep as a number, where it had to be read and is in no schedule.
    weights : what adapters are at work, see `compat.diffusers.adapters_at_work`.
    """

    clock: Clock
    schedules: tuple[Tensor, ...] = ()
    given: float | None = None
    weights: Any = ()

    @property
    def comes_twice(self) -> bool:
        """Whether a scheduler of second order calls the denoiser more than once at some timesteps."""
        return any(len(schedule.unique()) < len(schedule) for schedule in self.schedules[:1])


@dataclass(eq=False)
class Run:
    """One way from noise to a picture, through one denoiser, in one thread.

    Attributes
    ----------
    state : what patches keep from step to step.
    shift : what guidance adds to the predictions of a step, and which step that is.
    inside : whether a forward of it is being run.
    broken : whether its last forward has not come to its end.
    turn : how many forwards of the same step and branch came before the last one.
    """

    state: State = field(default_factory=dict)
    shift: tuple[int | None, Any] | None = None
    inside: bool = False
    broken: bool = False
    turn: int = 0
    _schedules: tuple[Tensor, ...] = ()
    _step: int | None = None
    _came: set[str | None] = field(default_factory=set)
    _given: set[tuple[str | None, float]] = field(default_factory=set)
    _sizes: dict[str | None, Any] = field(default_factory=dict)
    _weights: Any = ()

    def goes_on(self, moment: Moment, sizes: Any = None) -> bool:
        """Whether a forward at `moment`, on latents of `sizes` (None: unknown), is a further one of this run.

        A callback that raises, or an interrupt between two forwards, leaves no trace in the denoiser. So the surest sign is the
        schedule: every call of a pipeline sets a new tensor of timesteps. Where there is none, a guidance branch that does not
        advance has begun anew. Where adapters come, go or change their weight, what was kept is another model's.
        """
        branch, step = moment.clock.branch, moment.clock.step
        if self.begun and moment.weights != self._weights:
            return False
        if self.broken or bool(moment.schedules) != bool(self._schedules):
            return False
        if moment.schedules and not self._shared(moment):
            return False
        if sizes is not None and self._sizes.get(branch, sizes) != sizes:
            return False
        if step is None or self._step is None:
            return step is self._step and moment.given is not None and (branch, moment.given) not in self._given
        if step == self._step and branch in self._came:
            # Pipelines that name no branches call several times a step.
            return branch is None and bool(moment.schedules)
        return step >= self._step

    @property
    def begun(self) -> bool:
        """Whether it had a forward already."""
        return bool(self._came)

    def has_been_at(self, moment: Moment) -> bool:
        """Whether its last forward was at the step of `moment`, of the same call of a pipeline, though it may have been of other sizes."""
        clock = moment.clock
        if not self.begun or self.broken or clock.step != self._step:
            return False
        return bool(self._shared(moment)) if moment.schedules else clock.branch not in self._came

    def is_at(self, moment: Moment) -> bool:
        """Whether the last forward that was noted is that of `moment`."""
        return moment.clock.step == self._step and moment.clock.branch in self._came

    def take(self, moment: Moment, sizes: Any = None) -> None:
        """Note a forward of this run."""
        branch, step = moment.clock.branch, moment.clock.step
        if step != self._step:
            self._came.clear()
        self.turn = self.turn + 1 if branch in self._came else 0
        self._schedules = self._shared(moment) or moment.schedules
        self._step, self._weights = step, moment.weights
        self._came.add(branch)
        if sizes is not None:
            self._sizes[branch] = sizes
        if step is None and moment.given is not None:
            self._given.add((branch, moment.given))

    def reached(self, schedule: Tensor) -> int | None:
        """Return the last step, if the run may go by `schedule`."""
        return self._step if any(schedule is ours for ours in self._schedules) else None

    def may_go_on(self, schedule: Tensor, step: int) -> bool:
        """Whether a forward at a step of `schedule` may be a further one."""
        last = self.reached(schedule)
        return last is not None and step >= last

    def stands_at(self, schedule: Tensor, step: int, branch: str | None) -> bool:
        """Whether its last forward was at a step of `schedule`, and one of `branch` too."""
        return self.reached(schedule) == step and branch in self._came

    def _shared(self, moment: Moment) -> tuple[Tensor, ...]:
        return tuple(schedule for schedule in moment.schedules if any(schedule is ours for ours in self._schedules))


@dataclass(eq=False)
class Passed:
    """When the forwards of a denoiser were, in all threads, since its recipe is on.

    Attributes
    ----------
    latest : the last one.
    branches : of guidance, all that came by.
    steps : that came by, of runs with as many steps as the latest.
    """

    latest: Clock = field(default_factory=Clock)
    branches: set[str | None] = field(default_factory=set)
    steps: set[int] = field(default_factory=set)

    def note(self, now: Clock) -> None:
        """Note a forward."""
        if now.steps != self.latest.steps:
            self.steps.clear()
        self.latest = now
        self.branches.add(now.branch)
        if now.step is not None:
            self.steps.add(now.step)
