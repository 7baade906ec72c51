"""Step caches of diffusers: what recipes may say of them, what the host must know to put one on, and what a search tries.

A new cache is a row of `CACHES`. Nothing here imports diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

WARM_UP = 0.2
"""Share of the first steps that a search has computed: MagCache's own default, kept for all."""


def _pattern(text: str) -> str:
    """Refuse a regular expression that is none, or could take forever to be held against the name of a module."""
    if "(" in text or len(re.findall(r"[*+{]", text)) > 3 or text.count("?") > 8:
        raise ValueError(
            f"expected a pattern without groups and with at most three repeats, got {text[:80]!r}; list several"
        )
    try:
        re.compile(text)
    except (re.error, OverflowError) as error:
        raise ValueError(f"{text[:80]!r} is not a regular expression: {error}") from None
    return text


Patterns = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_pattern)]],
    Field(min_length=1, max_length=64),
]
StepNumber = Annotated[int, Field(ge=0, le=10_000)]


def _place(value: int | str) -> int | str:
    """Refuse what is not a step of a run."""
    if isinstance(value, str) and re.fullmatch(r"([0-9]{1,2}|100)%", value) is None:
        raise ValueError(f"expected a step, 3, one from the end, -1, or a share of the run, 25%, got {value[:80]!r}")
    return value


StepPlace = Annotated[Annotated[int, Field(ge=-10_000, le=10_000)] | str, AfterValidator(_place)]
"""A step of the run: its number, from the end below 0, or a share of the run."""


def is_relative(place: Any) -> bool:
    """Whether a place hangs on how many steps a run has."""
    return isinstance(place, str) or (isinstance(place, int) and place < 0)


def step_at(place: int | str, steps: int) -> int:
    """Return the step, 0-based, that a place is in a run of so many."""
    if isinstance(place, str):
        return max(round(float(place[:-1]) * steps / 100), 1)  # the first step is always computed
    return max(steps + place, 0) if place < 0 else place


class CacheSettings(BaseModel):
    """Settings of a step cache, with diffusers' own defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FirstBlockSettings(CacheSettings):
    """``diffusers.FirstBlockCacheConfig``."""

    threshold: float = Field(0.05, ge=0, le=1e6)


class MagSettings(CacheSettings):
    """``diffusers.MagCacheConfig``."""

    threshold: float = Field(0.06, ge=0, le=1e6)
    max_skip_steps: StepNumber = 3
    retention_ratio: float = Field(0.2, ge=0, le=1)
    num_inference_steps: int = Field(28, ge=1, le=10_000)
    mag_ratios: tuple[Annotated[float, Field(ge=0, le=1e6)], ...] = Field(min_length=1, max_length=10_000)


class TaylorSeerSettings(CacheSettings):
    """``diffusers.TaylorSeerCacheConfig``."""

    cache_interval: int = Field(5, ge=1, le=10_000)
    disable_cache_before_step: StepPlace = 3
    disable_cache_after_step: StepPlace | None = None
    max_order: int = Field(1, ge=0, le=16)
    skip_predict_identifiers: Patterns | None = None
    cache_identifiers: Patterns | None = None
    use_lite_mode: bool = False


@dataclass(frozen=True)
class CacheLadder:
    """What a search tries of a cache.

    Attributes
    ----------
    name : of the cache, and of its mode.
    rungs : values of the cache's knob, the most careful first.
    fixed : settings that all rungs share.
    """

    name: str
    rungs: tuple[float, ...]
    fixed: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class CacheKind:
    """One step cache.

    Attributes
    ----------
    name : what recipes call it.
    config : name of diffusers' config class.
    settings : what a recipe may set of it.
    knob : the setting that trades speed for quality.
    ladders : what a search tries.
    cite : where it was published; empty if nowhere.
    for_run : ``(steps of a run, magnitudes of the model by step) -> settings`` that a search gives to every rung. The first fifth of
        a run and its last step are always computed.
    by_context : it cannot run outside of a cache context, by which it tells guidance branches apart.
    by_first_block : it predicts a step from the first block, which must be dense, or the error of a patch would pass for change.
    counts_steps : it counts the steps of each denoiser, so that denoisers cannot share those of a run.
    measured : it must be told the model's magnitudes, which a dense run shows.
    places : settings that are steps of a run, which may be told from its end or as shares of it.
    resting : settings with which it computes every step; empty where there are none.
    computed : ``(settings, steps of a run) -> steps that are computed``, as far as that can be told ahead.
    """

    name: str
    config: str
    settings: type[CacheSettings]
    knob: str
    ladders: tuple[CacheLadder, ...]
    cite: str = ""
    for_run: Callable[[int, Sequence[float]], dict[str, Any]] = lambda steps, magnitudes: {}
    by_context: bool = False
    by_first_block: bool = False
    counts_steps: bool = False
    measured: bool = False
    places: tuple[str, ...] = ()
    resting: tuple[tuple[str, Any], ...] = ()
    computed: Callable[[Mapping[str, Any], int], int] | None = None

    def by_run(self, settings: Mapping[str, Any]) -> bool:
        """Whether settings hang on how many steps a run has."""
        return any(is_relative(settings.get(name)) for name in self.places)

    def at_steps(self, settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
        """Return settings as they are in a run of so many steps."""
        places = {key: step_at(settings[key], steps) for key in self.places if settings.get(key) is not None}
        return {**settings, **places}

    def at_rest(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings with which it computes every step."""
        kept = {key: value for key, value in settings.items() if not (key in self.places and is_relative(value))}
        return {**kept, **dict(self.resting)}


def _mag_for_run(steps: int, magnitudes: Sequence[float]) -> dict[str, Any]:
    # MagCache knows no last step, but a magnitude of 0 says that nothing of the step before is left, and it computes.
    ratios = (*magnitudes[:-1], 0.0)
    return {"max_skip_steps": 3, "retention_ratio": WARM_UP, "num_inference_steps": steps, "mag_ratios": ratios}


def _taylorseer_for_run(steps: int, magnitudes: Sequence[float]) -> dict[str, Any]:
    first = max(3, round(WARM_UP * steps))
    return {"disable_cache_before_step": first, "disable_cache_after_step": steps - 1, "max_order": 1}


def _taylorseer_computes(settings: Mapping[str, Any], steps: int) -> int:
    told = TaylorSeerSettings.model_validate(settings)
    first, last = step_at(told.disable_cache_before_step, steps), told.disable_cache_after_step
    end = steps if last is None else step_at(last, steps)
    return sum(i < first or i >= end or (i - first - 1) % told.cache_interval == 0 for i in range(steps))


CACHES = {
    cache.name: cache
    for cache in (
        CacheKind(
            name="first_block",
            config="FirstBlockCacheConfig",
            settings=FirstBlockSettings,
            knob="threshold",
            ladders=(CacheLadder("first_block", (0.03, 0.08, 0.15)),),
            by_context=True,
            by_first_block=True,
        ),
        CacheKind(
            name="mag",
            config="MagCacheConfig",
            settings=MagSettings,
            knob="threshold",
            ladders=(CacheLadder("mag", (0.03, 0.06, 0.12)),),
            cite="arXiv 2506.09045",
            for_run=_mag_for_run,
            counts_steps=True,
            measured=True,
        ),
        CacheKind(
            name="taylorseer",
            config="TaylorSeerCacheConfig",
            settings=TaylorSeerSettings,
            knob="cache_interval",
            ladders=(  # it extrapolates each attention, in its lite mode the last projection of the model
                CacheLadder("taylorseer", (3, 5)),
                CacheLadder("taylorseer lite", (2, 3), (("use_lite_mode", True),)),
            ),
            cite="arXiv 2503.06923",
            for_run=_taylorseer_for_run,
            by_context=True,
            counts_steps=True,
            places=("disable_cache_before_step", "disable_cache_after_step"),
            resting=(("disable_cache_before_step", 10_000),),
            computed=_taylorseer_computes,
        ),
    )
}
"""By the name that recipes use."""
