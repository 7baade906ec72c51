"""Step caches of diffusers, put on by a recipe and taken off without a trace.

A cache decides *whether* blocks run at a step, a patch how costly their attention is: gains nearly multiply. Two rules hold
them together: state of a patch hangs on the step, never on the number of calls, and the blocks from which a cache foretells the
others stay dense, or its threshold would judge the patch's error (``Recipe`` refuses such a rule).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelplug import compat
from accelplug.errors import UnsupportedError
from accelplug.hosts.clock import StepClock

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
        self._handles: list[Any] = []
        self._before: dict[Any, set[str]] = {}

    def install(self) -> None:
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
        self._before = {module: set(vars(module)) for part in self.parts.values() for module in part.modules()}
        try:
            for name, part in self.parts.items():
                hooked = compat.hooks_on(part)
                part.enable_cache(getattr(diffusers, CONFIGS[self.kind])(**self.settings))
                if compat.hooks_on(part) == hooked:
                    raise ValueError(f"it finds no module of {name} to hook")
        except (TypeError, ValueError) as error:
            self.remove()
            raise UnsupportedError(f"diffusers refuses the cache {self.kind} with {self.settings}: {error}") from error
        if self.clock is not None and "num_inference_steps" in self.settings:
            self._handles = [part.register_forward_pre_hook(self._require_its_steps) for part in self.parts.values()]

    def _require_its_steps(self, part: Any, args: Any) -> None:
        """MagCache counts steps, and starts anew at the number it was told: in a longer run it would skip by the wrong ratios."""
        steps, expected = self.clock.now().steps if self.clock is not None else None, self.settings["num_inference_steps"]
        if steps not in (None, expected):
            raise UnsupportedError(
                f"The cache {self.kind} was set for runs of {expected} steps, this one has {steps}. Run with {expected} steps, or "
                "tune again with as many as you need."
            )

    def remove(self) -> None:
        """Disable it, and take away what diffusers leaves behind. A second call does nothing."""
        for part in self.parts.values():
            if self._before and part.is_cache_enabled:
                part.disable_cache()
        for module, names in self._before.items():
            for name in compat.LEFT_BEHIND:
                if name not in names:
                    vars(module).pop(name, None)
        self._before = {}
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> StepCaches:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
