"""What tune() chooses from: patches with their knobs, dense steps and layers, and step caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from typing import Any

from accelplug.call import Layout
from accelplug.errors import AccelplugError, nearest
from accelplug.patches.sparse.template import BlockSparse
from accelplug.recipe import Recipe
from accelplug.registry import list_patches, patch_class
from accelplug.step_caches import CACHES
from accelplug.table import Table
from accelplug.tuning.caches import Cache

WORTH = 1.03
"""A gain below this is not worth a recipe."""

DENSE_STEPS = (0, 10, 25, 40)
"""Shares of the first steps that may stay dense, in percent."""

PYRAMIDS = ((0.4, 0.5, 0.6, 0.8), (0.6, 0.7, 0.8, 0.9))
"""Bounds of levels 1, 2, 4 and 8: the preset of Wan 2.1, and a more careful one."""

BOTH = ("drop", "pool")
"""What may become of the rest: dropped first, which is faster, and which repair mends almost as well."""

PROBES = (0.04, 0.08)
"""Shares of the visual tokens that are exact where the error of a block-sparse arm is repaired."""

FINALISTS = 4
"""Candidates that are put to the proof at most, before a search goes on: pipelines one after the other, the fastest first."""

LADDERS: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "sol": ([{"tau": tau, "order": "morton"} for tau in (0.5, 1.0, 0.0, 1.5)], BOTH),
    "rows": ([{"density": density, "order": "morton"} for density in (0.2, 0.35)], BOTH),
    "svg_ear": ([{"density": density, "order": "morton"} for density in (0.35, 0.25, 0.5)], ("pool",)),
    "psa": ([{"bounds": bounds, "order": "gilbert", "block_k": 32} for bounds in PYRAMIDS], ("pool",)),
    "rectified": ([{"drop_rate": rate, "order": "gilbert"} for rate in (0.75, 0.9, 0.6)], ("pool",)),
    "neighborhood": ([{"share": share} for share in (0.5, 0.75, 0.33)], BOTH),
    "radial": ([{"decay": decay} for decay in (0.2, 1.0)], BOTH),
    "tome": ([{"ratio": ratio} for ratio in (0.5, 0.25)], ()),
}
"""By patch: settings, the likeliest first, and what may become of the rest. ``share`` is a window's share of rows and columns."""


@dataclass(frozen=True)
class Arm:
    """A patch with its settings, without when and where."""

    patch: str
    settings: tuple[tuple[str, Any], ...]

    def but(self, **more: Any) -> Arm:
        """Return it with more settings."""
        return replace(self, settings=(*self.settings, *more.items()))

    def __str__(self) -> str:
        return f"{self.patch} " + " ".join(f"{key}={_short(value)}" for key, value in self.settings if key != "block")


@dataclass(frozen=True)
class Candidate:
    """A whole recipe: an arm, which first steps and which layers stay dense, and a step cache.

    Attributes
    ----------
    arm : None for no patch, a cache alone.
    dense_steps : percent of the first steps without the arm.
    dense_layers : layers without the arm.
    cache : a step cache, or None.
    preset : a shipped recipe as it stands, in place of all that.
    """

    arm: Arm | None
    dense_steps: int = 0
    dense_layers: tuple[int, ...] = ()
    cache: Cache | None = None
    preset: Recipe | None = None

    def rules(self) -> dict[str, Any]:
        """Return it as a recipe: rules, and the cache."""
        if self.preset is not None:
            return self.preset.to_mapping()
        rules: list[dict[str, Any]] = []
        layers = set(self.dense_layers) | (
            {0} if self.cache and CACHES[self.cache.kind].by_first_block and self.arm else set()
        )
        if layers:
            rules.append({"where": {"layers": sorted(layers)}, "patch": "dense"})
        if self.arm is None:
            rules.append({"patch": "dense"})
        else:
            if self.dense_steps:
                rules.append({"where": {"steps": f"0:{self.dense_steps}%"}, "patch": "dense"})
            rules.append({"patch": self.arm.patch, "with": dict(self.arm.settings)})
        recipe: dict[str, Any] = {"rules": rules}
        if self.cache is not None:
            recipe["cache"] = self.cache.rule()
        return recipe

    def __str__(self) -> str:
        parts = [self.preset.name] if self.preset else []
        parts += [str(self.arm)] if self.arm else []
        parts += [f"{self.dense_steps} % of steps dense"] if self.arm and self.dense_steps else []
        parts += [f"layers {', '.join(map(str, self.dense_layers))} dense"] if self.dense_layers else []
        parts += [str(self.cache)] if self.cache else []
        return " + ".join(parts)


def known_ladders() -> dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]]:
    """Return `LADDERS`, and beside them what patches of other packages bring as their ``ladder``."""
    others = {entry.name: entry.registered for entry in list_patches() if entry.registered is not None}
    brought = {
        name: ([dict(step) for step in cls.ladder], BOTH if issubclass(cls, BlockSparse) else ())
        for name, cls in others.items()
        if cls.ladder
    }
    return LADDERS | brought


def require_ladders(patches: Sequence[str] | None, ladders: Iterable[str], what: str) -> None:
    """Refuse patches that have no ladder for `what`, a kind of model.

    Raises
    ------
    AccelplugError
        If a patch has none.
    """
    for name in patches or ():
        if name not in ladders:
            raise AccelplugError(
                f"tune knows no settings to try for {name!r} on {what}{nearest(name, ladders)}; it knows {', '.join(ladders)}."
            )


def arms(layout: Layout, patches: Sequence[str] | None = None) -> list[Arm]:
    """Return the arms for a layout, rest dropped and pooled, without those that read everything there.

    Raises
    ------
    AccelplugError
        If a patch has no ladder here.
    """
    require_ladders(patches, known_ladders(), "a diffusers pipeline")
    ladders = [list(_ladder(name, layout)) for name in patches or LADDERS]
    # One of each patch before the second of any: where time for probing is short, each has been seen.
    return [arm for rung in zip_longest(*ladders) for arm in rung if arm is not None]


def _ladder(name: str, layout: Layout) -> Iterator[Arm]:
    """Yield the arms of one patch, the likeliest first with every rest."""
    _, rows, columns = layout.grid_thw
    cls, (steps, rests) = patch_class(name), known_ladders()[name]
    for step, rest in product(steps, rests or (None,)):
        settings = step if rest is None else {"block": 64, **step, "rest": rest}
        if "share" in settings:
            share, settings = settings["share"], {key: value for key, value in settings.items() if key != "share"}
            window = ("full", max(1, round(share * rows)), max(1, round(share * columns)))
            settings |= {"window": window, "mask": "tile"}
        if not (rest and cls(settings).neutral(layout)):  # type: ignore[attr-defined]
            yield Arm(name, tuple(settings.items()))


def repaired(arm: Arm, layout: Layout) -> list[Arm]:
    """Return an arm with its error repaired, from each share of exact rows, or from those that the patch has of its own.

    None for a patch without blocks.
    """
    probes = patch_class(arm.patch).Config.model_fields.get("probes")
    if probes is None or "repair" in dict(arm.settings):
        return []
    mended = arm.but(repair="output_query")
    if probes.default is None:
        return [mended]
    return [mended.but(probes=round(share * layout.visual)) for share in PROBES if share * layout.visual >= 2]


def variants(arm: Arm, sensitive_layers: Sequence[int], steps: int) -> Iterator[Candidate]:
    """Yield an arm with every share of `steps` dense, and with none, one or two of the most sensitive layers dense.

    Two layers at least stay patched: a cache may want one of them.
    """
    by_steps = {round(percent * steps / 100): percent for percent in reversed(DENSE_STEPS)}  # few steps make shares equal
    for percent in sorted(by_steps.values()):
        for number in range(max(min(2, len(sensitive_layers) - 2), 0) + 1):
            yield Candidate(arm, percent, tuple(sorted(sensitive_layers[:number])))


def cached(candidate: Candidate, caches: Iterable[Cache]) -> list[Candidate]:
    """Return a candidate with each step cache."""
    return [replace(candidate, cache=cache) for cache in caches]


def _short(value: Any) -> str:
    if isinstance(value, Table):
        return "calibrated"
    if isinstance(value, list | tuple):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
