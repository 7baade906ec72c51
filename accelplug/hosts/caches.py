"""Step caches of diffusers, put on by a recipe and taken off without a trace.

A cache decides *whether* blocks run at a step, a patch how costly their attention is: gains nearly multiply. Two rules hold
them together: state of a patch hangs on the step, never on the number of calls, and the blocks from which a cache predicts the
others stay dense, or its threshold would judge the patch's error (``Recipe`` refuses such a rule).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from accelplug import compat
from accelplug.errors import UnsupportedError
from accelplug.hosts.clock import HOOK
from accelplug.hosts.run import Moment, Run
from accelplug.hosts.undo import Undo
from accelplug.step_caches import CACHES

BREAKS_GRAPHS = "{} is compiled, and its hooks would break the graphs."
"""Why an optional cache is left out."""


class StepCaches:
    """One step cache on each of some denoisers.

    Parameters
    ----------
    parts : denoisers by name.
    kind : a name of `accelplug.step_caches.CACHES`.
    settings : arguments of diffusers' config of that cache.
    for_run : steps that a run takes -> settings in it; None where they are the same in all.
    optional : whether it is left out, and `left_out` says why, where a denoiser takes none or is compiled.
    shared : whether other denoisers run some of the steps.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        kind: str,
        settings: Mapping[str, Any],
        for_run: Callable[[int | None], Mapping[str, Any]] | None = None,
        optional: bool = False,
        shared: bool = False,
    ) -> None:
        self.parts, self.kind, self.settings = dict(parts), kind, dict(settings)
        self.for_run, self.optional, self.shared = for_run, optional, shared or len(parts) > 1
        self.left_out = ""
        """Why an optional one is not on, in words."""
        self.steps: int | None = None
        """Of the latest run, from where it began."""
        self.rests = ""
        """Why one that goes by the length of the run skipped nothing in the latest one, though it is long enough."""
        self._on = Undo()
        self._runs: dict[int, tuple[Run, threading.Thread]] = {}
        self._own = Undo()

    def install(self, undo: Undo) -> None:
        """Enable the cache on every denoiser.

        Raises
        ------
        UnsupportedError
            If a denoiser takes no cache, has one on, or diffusers refuses the settings; and the cache is not optional.
        """
        self._on = Undo(within=undo)
        try:
            self._install(self._on)
        except UnsupportedError as error:
            if not self.optional:
                raise
            self._leave_out(str(error))

    def _leave_out(self, why: str) -> None:
        """Take an optional cache off again."""
        self.left_out = why
        self._on.run()

    def _leave_out_of(self, part: Any, context: Any) -> None:
        """Take an optional cache off at the beginning of a run that it would break: what it lacks was not known at `install`."""
        if context is None and CACHES[self.kind].by_context:
            self._leave_out("It needs a cache_context around the denoiser, and this pipeline opens none.")
        elif compat.torch.is_compiled(part):
            self._leave_out(BREAKS_GRAPHS.format(type(part).__name__))

    def _install(self, undo: Undo) -> None:
        import diffusers

        if self.optional and (why := obstacle(self.kind, self.settings, self.parts, self.shared)) is not None:
            raise UnsupportedError(why)
        for name, part in self.parts.items():
            if self.optional and compat.torch.is_compiled(part):
                raise UnsupportedError(BREAKS_GRAPHS.format(type(part).__name__))
            if not hasattr(part, "enable_cache"):
                raise UnsupportedError(
                    f"{name} ({type(part).__name__}) takes no step cache. Leave cache: out of the recipe."
                )
            if compat.cache_dit.has_cache(part):
                raise UnsupportedError(
                    f"cache-dit has a step cache on {name} already, and two would each skip by what the other made up. Disable it first, "
                    "cache_dit.disable_cache(pipe), or leave cache: out of the recipe: its rules go together with it."
                )
            if part.is_cache_enabled:
                raise UnsupportedError(
                    f"{name} has {type(compat.diffusers.step_cache(part)).__name__} on already, and diffusers allows one cache a model. "
                    "Disable it first: pipe.transformer.disable_cache()."
                )
        try:
            for name, part in self.parts.items():
                hooked, config = (
                    compat.diffusers.hooks_on(part),
                    getattr(diffusers, CACHES[self.kind].config)(**self.settings),
                )
                before = {module: set(vars(module)) for module in part.modules()}
                for module, names in before.items():
                    undo.touch(module, partial(_drop_new, before=names, part=part, config=config))
                undo.add(partial(compat.diffusers.disable_cache, part, config))
                part.enable_cache(config)
                if compat.diffusers.hooks_on(part) == hooked:
                    raise ValueError(f"it finds no module of {name} to hook")
        except (TypeError, ValueError) as error:
            raise UnsupportedError(f"diffusers refuses the cache {self.kind} with {self.settings}: {error}") from error
        undo.add(self._runs.clear)

    def enter(self, part: Any, run: Run, moment: Moment, context: Any) -> None:
        """A forward of `run` begins: what an earlier run left in the cache of `part` is forgotten, in the cache context that is on.

        Raises
        ------
        UnsupportedError
            If runs of two threads take turns: diffusers keeps one state a model. If a run has other than the steps of the settings:
            MagCache counts them, and starts anew at the number it was told; in a longer run it would skip by the wrong ratios. If no
            cache context is on, by which a cache tells guidance branches apart.
        """
        clock = moment.clock
        last, thread = self._runs.get(id(part), (None, threading.current_thread()))
        if self.optional and not self.left_out and last is not run and not (last is not None and last.inside):
            self._leave_out_of(part, context)
        if self.left_out:
            return
        if context is None and CACHES[self.kind].by_context:
            raise UnsupportedError(
                f"The cache {self.kind} keeps what it knows by guidance branch, and this {type(part).__name__} was called without a "
                "cache context, which says what branch runs: this pipeline opens none. Leave cache: out of the recipe, or call the "
                'model yourself inside `with model.cache_context("cond"):`.'
            )
        if last is run:
            return
        busy = last is not None and last.inside and thread is not threading.current_thread() and thread.is_alive()
        if busy or run.begun:
            raise UnsupportedError(
                f"The cache {self.kind} holds the state of one run at a time, and two threads run this {type(part).__name__}. Let one "
                "run end before the next begins, give each thread a pipeline of its own, or leave cache: out of the recipe."
            )
        expected = self.settings.get("num_inference_steps")
        if expected is not None and clock.steps not in (None, expected):
            raise UnsupportedError(
                f"The cache {self.kind} was set for runs of {expected} steps, this one has {clock.steps}. Run with {expected} steps, "
                "or tune again with as many as you need."
            )
        self._runs[id(part)] = run, threading.current_thread()
        self.steps = None if clock.steps is None else clock.steps - (clock.step or 0)
        if self.for_run is not None:
            self.rests = "the scheduler calls the model twice a step" if moment.comes_twice else ""
            compat.diffusers.set_cache(part, self.for_run(None if self.rests else self.steps))
        compat.diffusers.forget_cached(part, HOOK, context)

    def __enter__(self) -> StepCaches:
        with ExitStack() as stack:
            self.install(stack.enter_context(self._own))
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._own.run()


def obstacle(kind: str, settings: Mapping[str, Any], parts: Mapping[str, Any], shared: bool) -> str | None:
    """Return why a cache cannot be on some denoisers, as far as diffusers would not say it, or says it in the middle of a run."""
    if missing := [type(part).__name__ for part in parts.values() if not hasattr(part, "enable_cache")]:
        return f"{missing[0]} takes none."
    if CACHES[kind].counts_steps and shared:
        return "it counts the steps of each denoiser, and several share those of a run."
    for part in parts.values() if settings.get("use_lite_mode") else ():
        ends = [name for name, _ in part.named_children() if "proj_out" in name]
        if ends != ["proj_out"]:
            return f"it extrapolates proj_out alone, and the outputs of {type(part).__name__} are {', '.join(ends) or 'others'}."
    return None


def _drop_new(names: dict[str, Any], before: set[str], part: Any, config: Any) -> None:
    """Take away what diffusers has put into the ``__dict__`` of a module, which had the names `before`; not of a later cache."""
    if compat.diffusers.step_cache(part) is not None and compat.diffusers.step_cache(part) is not config:
        return
    for name in compat.diffusers.left_behind(names):
        if name not in before:
            names.pop(name, None)
