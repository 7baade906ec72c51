"""Step caches that a search may try: which of them fit a model, and what MagCache must know of it.

Where a cache may skip is settled here: the first fifth of a run and its last step are always computed. MagCache knows no last step,
but a magnitude of 0 says that nothing of the step before is left, and it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from accelplug import compat
from accelplug.errors import UnsupportedError
from accelplug.hosts.caches import StepCaches

FEW_STEPS = 8
"""Runs of at most so many steps leave a cache nothing to skip: their steps are unlike each other."""

WARM_UP = 0.2
"""Share of the first steps that are computed: MagCache's own default, kept for all."""

RUNGS: dict[str, tuple[dict[str, Any], ...]] = {
    "first_block": tuple({"threshold": threshold} for threshold in (0.03, 0.08, 0.15)),
    "mag": tuple({"threshold": threshold} for threshold in (0.03, 0.06, 0.12)),
    "taylorseer": tuple({"cache_interval": interval} for interval in (3, 5)),
    "taylorseer lite": tuple({"cache_interval": interval, "use_lite_mode": True} for interval in (2, 3)),
}
"""By name, the most careful first. TaylorSeer extrapolates each attention, in its lite mode the last projection of the model."""


@dataclass(frozen=True)
class Cache:
    """A step cache with its settings, as a recipe has them."""

    kind: str
    settings: tuple[tuple[str, Any], ...]

    @property
    def ladder(self) -> str:
        """Name of its ladder in `RUNGS`."""
        return f"{self.kind} lite" if ("use_lite_mode", True) in self.settings else self.kind

    def rule(self) -> dict[str, Any]:
        """Return it as it stands in a recipe."""
        return {"kind": self.kind, "with": {k: list(v) if isinstance(v, tuple) else v for k, v in self.settings}}

    def __str__(self) -> str:
        knobs = [f"{key}={value:g}" for key, value in self.settings if key in ("threshold", "cache_interval")]
        return " ".join([self.ladder, *knobs])


@dataclass(frozen=True)
class Seen:
    """What a dense run showed of a model that caches hang on.

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


def fitting(parts: Mapping[str, Any], seen: Seen) -> tuple[list[list[Cache]], list[str]]:
    """Return ladders of the caches that fit these denoisers, the most careful first, and why others do not."""
    if seen.steps <= FEW_STEPS:
        return [], [f"No step caches: the {seen.steps} steps of a run are too few to skip any."]
    ladders, why_not = [], []
    for name, rungs in RUNGS.items():
        kind = name.split()[0]
        obstacle = _obstacle(name, parts, seen)
        made = [] if obstacle else [{**rung, **_settings(kind, seen)} for rung in rungs]
        if made:
            try:
                with StepCaches(parts, kind, made[0]):
                    ladders.append([Cache(kind, tuple(settings.items())) for settings in made])
            except UnsupportedError as error:
                obstacle = str(error)
        why_not += [f"No cache {name}: {obstacle}"] if obstacle else []
    return ladders, why_not


def _obstacle(name: str, parts: Mapping[str, Any], seen: Seen) -> str | None:
    """Why a cache cannot be tried, as far as diffusers would not say it, or says it in the middle of a run."""
    kind, steps = name.split()[0], seen.steps
    if missing := [type(part).__name__ for part in parts.values() if not hasattr(part, "enable_cache")]:
        return f"{missing[0]} takes none."
    if kind != "mag" and not seen.contexts:
        return "it needs a cache_context around the denoiser, and the pipeline opens none."
    if kind != "first_block" and len(parts) > 1:
        return f"it counts the steps of each denoiser, and {' and '.join(parts)} share those of a run."
    counted = {len(ratios) for by_context in seen.magnitudes.values() for ratios in by_context.values()}
    if kind == "mag" and counted != {steps}:
        return f"in {steps} steps it counted {' and '.join(map(str, sorted(counted))) or 'none'}."
    if name == "taylorseer lite" and not all(hasattr(part, "proj_out") for part in parts.values()):
        return "it extrapolates proj_out, and there is none."
    return None


def _settings(kind: str, seen: Seen) -> dict[str, Any]:
    """What all rungs of a cache share: which steps are computed, and for MagCache the model's magnitudes."""
    first = max(3, round(WARM_UP * seen.steps))
    if kind == "taylorseer":
        return {"disable_cache_before_step": first, "disable_cache_after_step": seen.steps - 1, "max_order": 1}
    if kind == "mag":
        (by_context,) = seen.magnitudes.values()
        means = [round(sum(ratios) / len(by_context), 4) for ratios in zip(*by_context.values(), strict=True)]
        return {
            "max_skip_steps": 3,
            "retention_ratio": WARM_UP,
            "num_inference_steps": seen.steps,
            "mag_ratios": (*means[:-1], 0.0),
        }
    return {}
