"""Who gave how much: a recipe taken apart into patches, step cache, positions and compilation; each alone, all but each, and together.

A part that is taken out leaves dense rules in its place, so that no other rule comes to serve its calls. With g_i the gain of part i
alone, all gains against runs without any part of the same prompt and seed, and G that of all together: parts that do not get into each
other's way multiply, ``G = prod g_i``. What is lost between them is ``1 - G / prod g_i``; below 0, they help each other. What a part still
adds to the others is its gain over runs with all but it. Ours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from accelplug.comparison.rows import DENSE_ROW, Quantiles, Row, Variant
from accelplug.errors import AccelplugError, worded
from accelplug.recipe import Recipe, Rule
from accelplug.show import table

if TYPE_CHECKING:
    from rich.table import Table


COMPILED = "compilation"
"""The part that torch.compile is."""
EAGER_ROW = "dense, not compiled"
"""What the row of a compiled pipeline is called on which no part is on."""


@dataclass(frozen=True)
class RecipePart:
    """A part of a recipe: the row on which it alone is on, and the one on which all others are."""

    name: str
    alone: str
    others: str


@dataclass(frozen=True)
class Stack:
    """A recipe taken apart, by names of rows: `together` all parts are on, `bare` none."""

    together: str
    bare: str
    parts: tuple[RecipePart, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stack:
        """Read what `StackGains.to_dict` gave."""
        return cls(data["together"], data["bare"], tuple(RecipePart(**share["part"]) for share in data["parts"]))


def parts_of(recipe: Recipe | None, compiled: bool) -> tuple[str, ...]:
    """Name the parts of a recipe on a pipeline that is `compiled`, or not: its patches, its step cache, its positions, compilation."""
    if recipe is None:
        return ()
    patches = dict.fromkeys(rule.name for rule in recipe.rules if rule.patch != "dense")
    caches = [] if recipe.cache is None else [f"cache {recipe.cache.kind}"]
    positions = [] if recipe.positions is None else [f"positions {recipe.positions.kind}"]
    return (*patches, *caches, *positions, *([COMPILED] if compiled else []))


def taken_apart(variants: Sequence[Variant], compiled: bool) -> tuple[list[Variant], list[Stack]]:
    """Return the runs that tell the parts of these variants apart, beside their own, and how they belong together.

    Raises
    ------
    AccelplugError
        If none of them has two parts.
    """
    made: list[Variant] = []
    stacks = []
    for variant in variants:
        parts = parts_of(variant.recipe, compiled)
        if len(parts) < 2:
            continue
        rows = {frozenset(parts): variant.name}
        for kept in (*([part] for part in parts), [], *([p for p in parts if p != part] for part in parts)):
            if (key := frozenset(kept)) not in rows:
                arm = _arm(variant, parts, kept)
                rows[key] = arm.name
                made += [arm] if arm.name != DENSE_ROW and arm.name not in {other.name for other in made} else []
        every = frozenset(parts)
        own = tuple(RecipePart(part, rows[frozenset([part])], rows[every - {part}]) for part in parts)
        stacks.append(Stack(variant.name, rows[frozenset()], own))
    if not stacks:
        raise AccelplugError(
            f"{worded('parts=True', '--parts')} asks which part of a recipe gave how much, and none here has two: a second patch, a step "
            f"cache beside it, or a pipeline that is compiled. {worded('Leave parts out.', 'Leave it out.')}"
        )
    return made, stacks


def _arm(variant: Variant, parts: Sequence[str], kept: Sequence[str]) -> Variant:
    """The run of a variant on which only some of its parts are on."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    if COMPILED in parts and COMPILED not in kept:
        around = partial(torch.compiler.set_stance, "force_eager")
    patches = [part for part in kept if part != COMPILED]
    if not patches:
        return Variant(DENSE_ROW if COMPILED in kept or COMPILED not in parts else EAGER_ROW, None, "part", around=around)
    many = len(kept) > 1
    missing = ", ".join(part for part in parts if part not in kept)
    name = f"{variant.name} without {missing}" if many else f"{kept[0]} of {variant.name}"
    return Variant(name, without(variant.recipe, [part for part in parts if part not in kept]), "part", around=around)


def without(recipe: Recipe, parts: Sequence[str]) -> Recipe:
    """Return a recipe that lacks some of its parts: dense rules stand where their rules stood."""

    def rule(one: Rule) -> Rule:
        return one.model_copy(update={"patch": "dense", "settings": {}}) if one.name in parts else one

    cache = None if recipe.cache is None or f"cache {recipe.cache.kind}" in parts else recipe.cache
    positions = None if recipe.positions is None or f"positions {recipe.positions.kind}" in parts else recipe.positions
    return replace(recipe, rules=tuple(map(rule, recipe.rules)), cache=cache, positions=positions, measured=(), path=None)


# ------------------------------------------------------------------------------------------------------------ figures


@dataclass(frozen=True)
class PartGain:
    """What a part gave.

    Attributes
    ----------
    part : its name and its rows.
    alone, added : gain over dense, and over all other parts.
    quality, cost : mean of the metric alone, and what it takes off that of all other parts; None where runs are alike to the last bit.
    peak_mib : most memory, alone.
    """

    part: RecipePart
    alone: Quantiles
    added: Quantiles
    quality: float | None
    cost: float | None
    peak_mib: float | None


@dataclass(frozen=True)
class StackGains:
    """A recipe's gain and what its parts gave of it.

    Attributes
    ----------
    together : gain of all parts.
    product : of their gains alone, paired by prompt and seed.
    lost : ``1 - together / product``, paired.
    """

    stack: Stack
    shares: tuple[PartGain, ...]
    together: Quantiles
    product: Quantiles
    lost: Quantiles

    @classmethod
    def of(cls, stack: Stack, row: Callable[[str], Row], metric: str) -> StackGains:
        """Put together what rows, by their names, say; `metric` is the key of the quality that counts."""
        bare, all_on = row(stack.bare), row(stack.together)
        alone = [_ratios(bare, row(part.alone)) for part in stack.parts]
        together = _ratios(bare, all_on)
        pairs = [pair for pair in together if all(pair in gains for gains in alone)]
        product = [math.prod(gains[pair] for gains in alone) for pair in pairs]
        shares = tuple(
            PartGain(
                part,
                Quantiles.of([gains[pair] for pair in pairs]),
                Quantiles.of(list(_ratios(row(part.others), all_on).values())),
                _finite_mean(row(part.alone), metric),
                _cost(row(part.others), all_on, metric),
                row(part.alone).peak_mib,
            )
            for part, gains in zip(stack.parts, alone, strict=True)
        )
        lost = [1 - together[pair] / whole for pair, whole in zip(pairs, product, strict=True)]
        gained = [together[pair] for pair in pairs]
        return cls(stack, shares, Quantiles.of(gained), Quantiles.of(product), Quantiles.of(lost))

    @property
    def verdict(self) -> str:
        """What came of it in a sentence."""
        lost = self.lost.p50
        between = f"{lost:.0%} of it is lost between them" if lost >= 0 else f"they help each other by {-lost:.0%}"
        spread = f" ({self.lost.p20:.0%} to {self.lost.p80:.0%})" if self.lost.p20 != self.lost.p80 else ""
        return (
            f"{self.stack.together}: {self.together.p50:.2f}x together; {self.product.p50:.2f}x if its parts did not get into "
            f"each other's way, {between}{spread}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        figures = {"gain": self.together, "product": self.product, "lost": self.lost, "parts": self.shares}
        return {"together": self.stack.together, "bare": self.stack.bare, **figures}

    def headings(self, metric: str, memory: str) -> list[str]:
        """Column headings of its table; `metric` is the quality that counts, `memory` what peak memory is called."""
        return ["part", "alone", "added to the others", f"{metric} alone", "it costs the others", memory]

    def lines(self) -> list[list[str]]:
        """A line a part, and one for all together."""
        return [
            [
                share.part.name,
                _gain_text(share.alone),
                _gain_text(share.added),
                "same" if share.quality is None else f"{share.quality:.1f}",
                "" if share.cost is None else f"{share.cost:.1f}",
                f"{share.peak_mib:.0f}" if share.peak_mib else "",
            ]
            for share in self.shares
        ]

    def table(self, metric: str, memory: str) -> Table:
        """Return it as a rich table."""
        made = table(self.verdict, *self.headings(metric, memory))
        for column in made.columns[1:]:
            column.justify = "right"
        for line in self.lines():
            made.add_row(*line)
        return made


def _ratios(slow: Row, fast: Row) -> dict[tuple[int, int], float]:
    """How much faster one row ran than another, by prompt and seed; 1 where what is on changed nothing, to the last bit."""
    nothing = fast.kind != "dense" and fast.is_dense and slow.is_dense
    return {
        pair: 1.0 if nothing else slow.fastest_ms[pair] / ms
        for pair, ms in fast.fastest_ms.items()
        if pair in slow.fastest_ms
    }


def _scores(row: Row, metric: str) -> dict[tuple[int, int], float]:
    """Finite values of a metric by prompt and seed."""
    found = {(sample.prompt, sample.seed): sample.scores.get(metric, math.nan) for sample in row.samples}
    return {pair: value for pair, value in found.items() if math.isfinite(value)}


def _finite_mean(row: Row, metric: str) -> float | None:
    found = _scores(row, metric)
    return statistics.fmean(found.values()) if found else None


def _cost(others: Row, together: Row, metric: str) -> float | None:
    """Mean of what a metric falls by from one row to another, paired by prompt and seed."""
    before, after = _scores(others, metric), _scores(together, metric)
    falls = [before[pair] - value for pair, value in after.items() if pair in before]
    return statistics.fmean(falls) if falls else None


def _gain_text(gain: Quantiles) -> str:
    return f"{gain.p50:.2f}x" + (f" ({gain.p20:.2f}-{gain.p80:.2f})" if gain.p20 != gain.p80 else "")
