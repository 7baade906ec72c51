"""Step caches of diffusers, put on by a recipe and taken off without a trace.

A cache decides *whether* blocks run at a step, a patch how costly their attention is: gains nearly multiply. Two rules hold
them together: state of a patch hangs on the step, never on the number of calls, and the blocks from which a cache foretells the
others stay dense, or its threshold would judge the patch's error (``Recipe`` refuses such a rule).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from accelplug import compat
from accelplug.errors import UnsupportedError
from accelplug.hosts.clock import StepClock
from accelplug.hosts.undo import Undo

CONFIGS = {"first_block": "FirstBlockCacheConfig", "mag": "MagCacheConfig", "taylorseer": "TaylorSeerCacheConfig"}


class StepCaches:
    """One step cache on each of some denoisers.

    Parameters
    ----------
    parts : denoisers by name.
    kind : ``first_block``, ``mag`` or ``taylorseer``.
    settings : arguments of diffusers' config of that cache.
    clock : tells how many steps a run has; None leaves it unchecked whether they are those of the settings.
    """

    def __init__(
        self, parts: Mapping[str, Any], kind: str, settings: Mapping[str, Any], clock: StepClock | None = None
    ) -> None:
        self.parts, self.kind, self.settings, self.clock = dict(parts), kind, dict(settings), clock
        self._own = Undo()

    def install(self, undo: Undo) -> None:
        """Enable the cache on every denoiser.

        Raises
        ------
        UnsupportedError
            If a denoiser takes no cache, has one on, or diffusers refuses the settings.
        """
        import diffusers

        for name, part in self.parts.items():
            if not hasattr(part, "enable_cache"):
                raise UnsupportedError(
                    f"{name} ({type(part).__name__}) takes no step cache. Leave cache: out of the recipe."
                )
            if part.is_cache_enabled:
                raise UnsupportedError(
                    f"{name} has {type(compat.step_cache(part)).__name__} on already, and diffusers allows one cache a model. "
                    "Disable it first: pipe.transformer.disable_cache()."
                )
        try:
            for name, part in self.parts.items():
                hooked, config = compat.hooks_on(part), getattr(diffusers, CONFIGS[self.kind])(**self.settings)
                undo.add(partial(_disable, part, config, {module: set(vars(module)) for module in part.modules()}))
                part.enable_cache(config)
                if compat.hooks_on(part) == hooked:
                    raise ValueError(f"it finds no module of {name} to hook")
        except (TypeError, ValueError) as error:
            raise UnsupportedError(f"diffusers refuses the cache {self.kind} with {self.settings}: {error}") from error
        if self.clock is not None and "num_inference_steps" in self.settings:
            for part in self.parts.values():
                undo.hook(part, "register_forward_pre_hook", self._require_its_steps)

    def _require_its_steps(self, part: Any, args: Any) -> None:
        """MagCache counts steps, and starts anew at the number it was told: in a longer run it would skip by the wrong ratios."""
        steps, expected = self.clock.now().steps if self.clock is not None else None, self.settings["num_inference_steps"]
        if steps not in (None, expected):
            raise UnsupportedError(
                f"The cache {self.kind} was set for runs of {expected} steps, this one has {steps}. Run with {expected} steps, or "
                "tune again with as many as you need."
            )

    def __enter__(self) -> StepCaches:
        with ExitStack() as stack:
            self.install(stack.enter_context(self._own))
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._own.run()


def _disable(part: Any, config: Any, before: Mapping[Any, set[str]]) -> None:
    """Disable a cache that was enabled in full or in part, and take away what diffusers leaves behind."""
    compat.disable_cache(part, config)
    for module, names in before.items():
        for name in compat.left_behind(module):
            if name not in names:
                vars(module).pop(name, None)
