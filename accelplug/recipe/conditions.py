"""Where a rule holds: conditions on the place, the time and the size of an attention call."""

from __future__ import annotations

import fnmatch
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict

from accelplug.call import Clock, Kind, Layout, Site
from accelplug.errors import nearest
from accelplug.recipe.explaining import shortened

MAX_LIST = 1024
"""Items that a list of conditions, names or numbers may have."""
MAX_NAME = 256
"""Characters of a name or a pattern of names."""


@dataclass(frozen=True)
class Span:
    """A run of 0-based indices, half-open: ``2:10``, ``:25%``, ``-1:``; or a single one, ``3``, ``-1``."""

    text: str
    start: str
    stop: str | None
    """None for a single index."""

    @classmethod
    def parse(cls, value: Any) -> Span:
        """Read an index or a slice of whole numbers and percents; negatives count from the end."""
        text = str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""
        if re.fullmatch(r"-?[0-9]{1,9}", text):
            return cls(text, text, None)
        bound = r"(-?[0-9]{1,9}|-?[0-9]{1,9}(?:\.[0-9]{1,9})?%|)"
        found = re.fullmatch(rf"{bound}:{bound}", text)
        if found is None:
            raise ValueError(f"expected an index like 3 or -1, or a slice like '0:25%', '1:', '-2:', got {shortened(value)}")
        start, stop = found.groups()
        if any(abs(float(end[:-1])) > 100 for end in (start, stop) if end.endswith("%")):
            raise ValueError(f"percents go from 0% to 100%, got {value!r}")
        one_end = start.startswith("-") == stop.startswith("-") and start.endswith("%") == stop.endswith("%")
        if start and stop and one_end and float(start.rstrip("%")) >= float(stop.rstrip("%")):
            raise ValueError(f"slice {value!r} is empty; it runs from the first number up to, not including, the second")
        return cls(text, start, stop)

    @property
    def relative(self) -> bool:
        """Whether it depends on how many indices there are."""
        return any(end.startswith("-") or end.endswith("%") for end in (self.start, self.stop or ""))

    @property
    def is_share(self) -> bool:
        """Whether its ends are told in percent."""
        return any(end.endswith("%") for end in (self.start, self.stop or ""))

    @property
    def whole(self) -> bool:
        """Whether every index lies inside."""
        return self.start in ("", "0", "0%") and self.stop in ("", "100%")

    def holds(self, index: int, count: int | None) -> bool | None:
        """Say whether `index` of `count` lies inside; None where that hangs on an unknown count."""
        if count is None:
            if self.relative:
                return None
            count = 1 << 62
        first = index_of(self.start or "0", count)
        if self.stop is None:
            return index == first
        return max(first, 0) <= index < (index_of(self.stop, count) if self.stop else count)


def index_of(bound: str, count: int) -> int:
    """Return which of `count` indices a bound names: ``3``, ``25%``, ``-1``."""
    number = round(float(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
    return count + number if bound.startswith("-") else number


def as_list(value: Any) -> list[Any]:
    """Return a value or a list of values as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def written(value: Any) -> Any:
    """Return a value as YAML and JSON have it: lists for tuples, spans as text."""
    if isinstance(value, list | tuple):
        return [written(item) for item in value]
    return value.text if isinstance(value, Span) else value


def _few(value: Any) -> list[Any]:
    """A value or a list of values as a list, which must not be endless."""
    if len(items := as_list(value)) > MAX_LIST:
        raise ValueError(f"a list here has at most {MAX_LIST} items, this one has {len(items)}; write spans, '0:20'")
    return items


def _spans(value: Any) -> tuple[Span, ...]:
    if not (items := _few(value)):
        raise ValueError("the list is empty; leave the key out to mean all")
    return tuple(item if isinstance(item, Span) else Span.parse(item) for item in items)


def name_list(value: Any) -> tuple[str, ...]:
    """Return a name or a list of names as names. ValueError where they are not."""
    items = _few(value)
    if not items or not all(isinstance(item, str) and 0 < len(item) <= MAX_NAME for item in items):
        raise ValueError(f"expected a name or a list of names, of 1 to {MAX_NAME} characters each, got {shortened(value)}")
    return tuple(items)


def _kinds(value: Any) -> tuple[str, ...]:
    for name in (names := name_list(value)):
        if name not in get_args(Kind):
            raise ValueError(f"there is no kind {name!r}{nearest(name, get_args(Kind))}; kinds: {', '.join(get_args(Kind))}")
    return names


def number_bound(value: Any) -> str:
    """Return a bound without spaces. ValueError where it is none."""
    found = re.fullmatch(r"\s*(>=|<=|>|<)\s*([0-9]{1,12})\s*", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"expected a bound like '>=8192' or '<65536', got {shortened(value)}")
    return found[1] + found[2]


def _grid(value: Any) -> str:
    axis = r"([1-9][0-9]{0,8}|\*)"
    if not (isinstance(value, str) and re.fullmatch(rf"{axis}x{axis}x{axis}", value)):
        raise ValueError(f"expected frames x rows x columns of tokens like '21x45x80' or '*x64x64', got {shortened(value)}")
    return value


Spans = Annotated[tuple[Span, ...], BeforeValidator(_spans)]
Names = Annotated[tuple[str, ...], BeforeValidator(name_list)]


class Strict(BaseModel):
    """Base of all that a recipe is made of: unknown keys are errors, and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class Where(Strict):
    """Conditions of a rule; all must hold, and one that is left out always does. A list means any of."""

    steps: Spans | None = None
    layers: Spans | None = None
    kind: Annotated[tuple[str, ...], BeforeValidator(_kinds)] | None = None
    """Those that the patch is for if left out: self- and joint-attention for most."""
    denoiser: Names | None = None
    branch: Names | None = None
    module: Names | None = None
    """Globs on the attention module's path, ``blocks.*.attn1``."""
    tokens: Annotated[str, BeforeValidator(number_bound)] | None = None
    """Bound on the number of visual tokens."""
    grid: Annotated[str, BeforeValidator(_grid)] | None = None

    def to_mapping(self) -> dict[str, Any]:
        """Return it as it stands in a file."""
        return {key: written(value) for key, value in self if value is not None}

    def fits(self, site: Site, kinds: tuple[str, ...] = ("self", "joint")) -> bool:
        """Whether the conditions on the place hold; `kinds`: those that are meant where none is named."""
        return (
            site.kind in (self.kind or kinds)
            and (self.denoiser is None or site.denoiser in self.denoiser)
            and (self.module is None or any(fnmatch.fnmatchcase(site.module, glob) for glob in self.module))
            and (self.layers is None or (site.layer is not None and self._layer_holds(site.layer, site.layers)))
        )

    def layers_of(self, depth: int) -> tuple[int, ...]:
        """Return the layers, 0-based, that it is for in a model of `depth`."""
        return tuple(layer for layer in range(depth) if self._layer_holds(layer, depth))

    def _layer_holds(self, layer: int, depth: int) -> bool:
        return self.layers is None or any(span.holds(layer, depth) for span in self.layers)

    @property
    def placed(self) -> bool:
        """Whether `fits` decides alone: all conditions are on the place, or hold always."""
        at_all_steps = self.steps is None or any(span.whole for span in self.steps)
        return at_all_steps and self.branch is None and self.tokens in (None, ">=0") and self.grid in (None, "*x*x*")

    def rounds_away(self, steps: int | None) -> bool:
        """Whether the steps that it names are shares of a run, and come to none in one of so few."""
        shares = self.steps is not None and all(span.is_share for span in self.steps)
        return shares and steps is not None and not any(s.holds(i, steps) for s in self.steps or () for i in range(steps))

    def unmet(self, seen: RunFacts) -> tuple[str, str] | None:
        """The key of a condition that nothing seen so far meets, and in words why; None where each was met by something."""
        run = range(seen.steps or 0)
        if self.steps is not None and run and not any(s.holds(step, len(run)) for s in self.steps for step in run):
            return "steps", f"a run has {len(run)} steps"
        branches = sorted(branch for branch in seen.branches if branch is not None)
        if self.branch is not None and branches and not set(self.branch) & set(branches):
            return "branch", f"the branches are {' and '.join(branches)}{nearest(self.branch[0], branches)}"
        if seen.layouts and not any(self._layout_holds(layout) is True for layout in seen.layouts):
            grids = sorted({layout.grid_thw for layout in seen.layouts})
            return "tokens", "the grids are " + ", ".join(f"{'x'.join(map(str, g))} ({math.prod(g)} tokens)" for g in grids)
        return None

    def __str__(self) -> str:
        return ", ".join(f"{key} {_any(value)}" for key, value in self if value is not None) or "everywhere"

    def holds(self, layout: Layout | None, clock: Clock) -> bool | str:
        """Whether the conditions on layout and time hold, or the reason why nobody can know. One that fails decides."""
        verdicts = [self._step_holds(clock), self._branch_holds(clock), self._layout_holds(layout)]
        if False in verdicts:
            return False
        return next((verdict for verdict in verdicts if isinstance(verdict, str)), True)

    def _step_holds(self, clock: Clock) -> bool | str:
        if self.steps is None:
            return True
        if clock.step is None:
            return "the diffusion step is not known; tell it by plug.step(index, steps)"
        verdicts = [span.holds(clock.step, clock.steps) for span in self.steps]
        if True in verdicts:
            return True
        return (
            "the number of diffusion steps is not known; tell it by plug.step(index, steps)" if None in verdicts else False
        )

    def _branch_holds(self, clock: Clock) -> bool | str:
        if self.branch is None:
            return True
        if clock.branch is None:
            return "a rule names a guidance branch, and the pipeline does not say which one runs"
        return clock.branch in self.branch

    def _layout_holds(self, layout: Layout | None) -> bool | str:
        if self.tokens is None and self.grid is None:
            return True
        if layout is None:
            return "a rule depends on the token grid, and it is not known here"
        if self.grid is not None:
            wanted = zip(self.grid.split("x"), layout.grid_thw, strict=True)
            if any(axis not in ("*", str(length)) for axis, length in wanted):
                return False
        return self.tokens is None or within(self.tokens, layout.visual)


_COMPARE = {">=": int.__ge__, "<=": int.__le__, ">": int.__gt__, "<": int.__lt__}


def within(bound: str, number: int) -> bool:
    """Whether a number keeps a bound, ``>=8192``."""
    return _COMPARE[bound.rstrip("0123456789")](number, int(bound.lstrip("<>=")))


@dataclass(frozen=True)
class RunFacts:
    """What forwards of a denoiser came by: how many steps a run has (None: unknown), guidance branches, layouts, the first step."""

    steps: int | None = None
    branches: frozenset[str | None] = frozenset()
    layouts: frozenset[Layout] = frozenset()
    first: int = 0


def _any(value: str | tuple[str | Span, ...]) -> str:
    items = (value,) if isinstance(value, str) else value
    return " or ".join(item.text if isinstance(item, Span) else item for item in items)
