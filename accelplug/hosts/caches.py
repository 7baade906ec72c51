"""Step caches of diffusers, put on by a recipe and taken off without a trace.

A cache decides *whether* blocks run at a step, a patch how costly their attention is: gains nearly multiply. Two rules hold
them together: state of a patch hangs on the step, never on the number of calls, and the blocks from which a cache foretells the
others stay dense, or its threshold would judge the patch's error (``Recipe`` refuses such a rule).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelplug.errors import UnsupportedError

CONFIGS = {"first_block": "FirstBlockCacheConfig", "mag": "MagCacheConfig", "taylorseer": "TaylorSeerCacheConfig"}
LEFT_BEHIND = ("forward", "_diffusers_hook", "_cache_config")
"""Attributes that diffusers leaves on modules when a cache is disabled."""


class StepCaches:
    """One step cache on each of some denoisers.

    Parameters
    ----------
    parts : denoisers by name.
    kind : ``first_block``, ``mag`` or ``taylorseer``.
    settings : arguments of diffusers' config of that cache.
    """

    def __init__(self, parts: Mapping[str, Any], kind: str, settings: Mapping[str, Any]) -> None:
        self.parts, self.kind, self.settings = dict(parts), kind, dict(settings)
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
                    f"{name} has {type(part._cache_config).__name__} on already, and diffusers allows one cache a model. "
                    "Disable it first: pipe.transformer.disable_cache()."
                )
        self._before = {module: set(vars(module)) for part in self.parts.values() for module in part.modules()}
        try:
            for name, part in self.parts.items():
                hooked = _hooks(part)
                part.enable_cache(getattr(diffusers, CONFIGS[self.kind])(**self.settings))
                if _hooks(part) == hooked:
                    raise ValueError(f"it finds no module of {name} to hook")
        except (TypeError, ValueError) as error:
            self.remove()
            raise UnsupportedError(f"diffusers refuses the cache {self.kind} with {self.settings}: {error}") from error

    def remove(self) -> None:
        """Disable it, and take away what diffusers leaves behind. A second call does nothing."""
        for part in self.parts.values():
            if self._before and part.is_cache_enabled:
                part.disable_cache()
        for module, names in self._before.items():
            for name in LEFT_BEHIND:
                if name not in names:
                    vars(module).pop(name, None)
        self._before = {}

    def __enter__(self) -> StepCaches:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _hooks(part: Any) -> int:
    """How many hooks of diffusers are on the modules of a denoiser."""
    return sum(len(module._diffusers_hook.hooks) for module in part.modules() if hasattr(module, "_diffusers_hook"))
