"""Which step is it: each source alone, and their order."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from accelplug.call import Clock
from accelplug.hosts.clock import HOOK, ContextListener, StepClock
from accelplug.hosts.undo import Undo


class Pipe(SimpleNamespace):
    """Stands in for a pipeline; weakly referable."""


def euler(steps: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


def test_nothing_tells() -> None:
    assert StepClock(Pipe()).now().clock == Clock(None, None, None)


def test_scheduler_tells_from_its_first_step_on() -> None:
    pipe = Pipe(scheduler=euler(4))
    clock = StepClock(pipe)
    seen = []
    for t in pipe.scheduler.timesteps:
        seen.append(clock.now().clock)
        pipe.scheduler.step(torch.zeros(1), t, torch.zeros(1))
    assert seen == [Clock(step, 4) for step in range(4)]


def test_a_late_begin_is_heeded() -> None:
    pipe = Pipe(scheduler=euler(10))
    pipe.scheduler.set_begin_index(6)
    assert StepClock(pipe).now().clock == Clock(6, 10)


def test_cache_context_outranks_the_scheduler_and_names_the_branch() -> None:
    pipe = Pipe(scheduler=euler(4))
    clock = StepClock(pipe)
    clock.on_context(SimpleNamespace(name="uncond", step_index=2, num_inference_steps=8))
    assert clock.now().clock == Clock(2, 8, "uncond")
    clock.on_context(SimpleNamespace(name="cond", step_index=None, num_inference_steps=None))
    assert clock.now().clock == Clock(0, 4, "cond")
    clock.on_context(None)
    assert clock.now().clock == Clock(0, 4)


def test_guider_tells_where_the_scheduler_does_not() -> None:
    pipe = Pipe(scheduler=None, guider=SimpleNamespace(_step=3, _num_inference_steps=9))
    assert StepClock(pipe).now().clock == Clock(3, 9)


def test_timestep_is_looked_up_where_nothing_counts() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    pipe = Pipe(scheduler=scheduler)
    clock = StepClock(pipe)
    assert [clock.now(t.expand(2)).clock.step for t in scheduler.timesteps] == [0, 1, 2, 3, 4]
    assert clock.now(scheduler.timesteps[1] + 7).clock.step is None
    assert clock.now().clock.step is None


def test_what_the_user_says_wins_until_taken_back() -> None:
    pipe = Pipe(scheduler=euler(4))
    clock = StepClock(pipe)
    clock.set(3, 30)
    assert clock.now().clock == Clock(3, 30)
    clock.set(None, None)
    assert clock.now().clock == Clock(0, 4)


def test_two_threads_choose_a_schedule_one_after_the_other() -> None:
    """Else both take the same one for new: each must see what the other has taken."""
    pipe, met = Pipe(scheduler=euler(4)), []
    clock: Any = StepClock(pipe)
    choose, both = clock._places, threading.Barrier(2)

    def choose_beside_the_other(*args: Any) -> Any:
        with contextlib.suppress(threading.BrokenBarrierError):
            met.append(both.wait(timeout=0.5))
        return choose(*args)

    clock._places = choose_beside_the_other
    threads = [threading.Thread(target=clock.now, args=(torch.tensor(1000.0),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not met


def test_a_pipe_that_is_gone_tells_nothing() -> None:
    pipe = Pipe(scheduler=euler(4))
    clock = StepClock(pipe)
    del pipe
    assert clock.now().clock == Clock(None, None, None)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("remove_ours_first", [True, False])
def test_the_listener_lives_with_other_hooks_in_any_order(ours_first: bool, remove_ours_first: bool) -> None:
    from diffusers.hooks.hooks import HookRegistry, ModelHook

    class Double(ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output * 2

    module = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    plain, before = module(x), set(vars(module))
    heard: list[Any] = []
    undo, listener = Undo(), ContextListener(module, heard.append, lambda: heard.append("reset"))
    if ours_first:
        listener.install(undo)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(Double(), "double")
    if not ours_first:
        listener.install(undo)
    assert torch.equal(module(x), 2 * plain)
    registry.reset_stateful_hooks()
    assert heard == ["reset"]
    for remove_ours in (True, False) if remove_ours_first else (False, True):
        undo.run() if remove_ours else registry.remove_hook("double", recurse=False)
    assert torch.equal(module(x), plain)
    assert HOOK not in registry.hooks
    assert set(vars(module)) - before <= {"forward", "_diffusers_hook"}  # diffusers leaves these of its own hook


def test_the_ear_alone_leaves_nothing() -> None:
    module = torch.nn.Linear(2, 2)
    before = set(vars(module))
    with Undo() as undo:
        ContextListener(module, print, print).install(undo)
        assert "_diffusers_hook" in vars(module)
    assert set(vars(module)) == before
