"""Step caches that a search may try: which of them fit a model, and what MagCache must know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from accelplug import compat
from accelplug.errors import UnsupportedError
from accelplug.hosts.caches import StepCaches, obstacle
from accelplug.step_caches import CACHES, CacheKind, CacheLadder

FEW_STEPS = 8
"""Runs of at most so many steps leave a cache nothing to skip: their steps are unlike each other."""


@dataclass(frozen=True)
class Cache:
    """A step cache with its settings, as a recipe has them."""

    kind: str
    settings: tuple[tuple[str, Any], ...]

    @property
    def ladder(self) -> str:
        """Name of its ladder: of those whose fixed settings it has, the most particular."""
        return next(ladder.name for ladder in CACHES[self.kind].ladders[::-1] if set(ladder.fixed) <= set(self.settings))

    def rule(self) -> dict[str, Any]:
        """Return it as it stands in a recipe."""
        return {"kind": self.kind, "with": {k: list(v) if isinstance(v, tuple) else v for k, v in self.settings}}

    def __str__(self) -> str:
        knobs = [f"{key}={value:g}" for key, value in self.settings if key == CACHES[self.kind].knob]
        return " ".join([self.ladder, *knobs])


@dataclass(frozen=True)
class CacheFacts:
    """What a dense run showed of a model that caches depend on.

    Attributes
    ----------
    steps : of the run.
    contexts : names of the cache contexts that the pipeline opened around its denoisers.
    magnitudes : by denoiser and context, the ratios of MagCache's calibration, one for each call.
    """

    steps: int
    contexts: frozenset[str]
    magnitudes: Mapping[str, Mapping[str, Sequence[float]]]


@contextmanager
def magnitudes(parts: Mapping[str, Any]) -> Iterator[dict[str, dict[str, list[float]]]]:
    """Have MagCache calibrate itself on the run inside, which it leaves as it is; empty for denoisers that take no cache."""
    found: dict[str, dict[str, list[float]]] = {}

    def listen(name: str) -> Callable[..., None]:
        return lambda part, args, output: found.update({name: compat.diffusers.mag_ratios(part)})

    with ExitStack() as stack:
        for name, part in parts.items():
            try:
                # Told of more steps than there are, diffusers keeps what it measured, and prints nothing.
                stack.enter_context(StepCaches({name: part}, "mag", {"calibrate": True, "num_inference_steps": 10**6}))
            except UnsupportedError:
                continue
            stack.callback(part.register_forward_hook(listen(name)).remove)
        yield found


def fitting(parts: Mapping[str, Any], seen: CacheFacts) -> tuple[list[list[Cache]], list[str]]:
    """Return ladders of the caches that fit these denoisers, the most careful first, and why others do not."""
    if seen.steps <= FEW_STEPS:
        return [], [f"No step caches: the {seen.steps} steps of a run are too few to skip any."]
    ladders, why_not = [], []
    for cache, ladder in ((kind, ladder) for kind in CACHES.values() for ladder in kind.ladders):
        obstacle = _obstacle(cache, ladder, parts, seen)
        shared = {} if obstacle else cache.for_run(seen.steps, _means(seen) if cache.measured else ())
        made = [] if obstacle else [{cache.knob: rung, **dict(ladder.fixed), **shared} for rung in ladder.rungs]
        if made:
            try:
                with StepCaches(parts, cache.name, made[0]):
                    ladders.append([Cache(cache.name, tuple(settings.items())) for settings in made])
            except UnsupportedError as error:
                obstacle = str(error)
        why_not += [f"No cache {ladder.name}: {obstacle}"] if obstacle else []
    return ladders, why_not


def _obstacle(cache: CacheKind, ladder: CacheLadder, parts: Mapping[str, Any], seen: CacheFacts) -> str | None:
    """Why a cache cannot be tried, as far as diffusers would not say it, or says it in the middle of a run."""
    if (why := obstacle(cache.name, dict(ladder.fixed), parts, shared=len(parts) > 1)) is not None:
        return why
    if cache.by_context and not seen.contexts:
        return "it needs a cache_context around the denoiser, and the pipeline opens none."
    counted = {len(ratios) for by_context in seen.magnitudes.values() for ratios in by_context.values()}
    if cache.measured and counted != {seen.steps}:
        return f"in {seen.steps} steps it counted {' and '.join(map(str, sorted(counted))) or 'none'}."
    return None


def _means(seen: CacheFacts) -> list[float]:
    """The magnitudes of the one denoiser by step, over its contexts."""
    (by_context,) = seen.magnitudes.values()
    return [round(sum(ratios) / len(by_context), 4) for ratios in zip(*by_context.values(), strict=True)]
