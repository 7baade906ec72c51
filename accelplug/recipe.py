"""Recipes: strict per-model YAML that says which patch serves which attention, when, and with which settings."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from accelplug import files, strict_yaml
from accelplug.bounded import Bounded
from accelplug.call import Clock, Kind, Layout, Site
from accelplug.errors import NoMatchError, RecipeError, nearest
from accelplug.registry import patch_class, patch_entry
from accelplug.strict_yaml import Loc, Source
from accelplug.table import Table

if TYPE_CHECKING:
    from rich.text import Text

SCHEMA = 1
MAX_RULES = 256
MAX_LIST = 1024
"""Items that a list of conditions, names or numbers may have."""
MAX_NAME = 256
"""Characters of a name or a pattern of names."""
SHIPPED = Path(__file__).parent / "recipes"

# ---------------------------------------------------------------------------------------------------------- conditions


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
            raise ValueError(f"expected an index like 3 or -1, or a slice like '0:25%', '1:', '-2:', got {_cut(value)}")
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
    def whole(self) -> bool:
        """Whether every index lies inside."""
        return self.start in ("", "0", "0%") and self.stop in ("", "100%")

    def holds(self, index: int, count: int | None) -> bool | None:
        """Say whether `index` of `count` lies inside; None where that hangs on an unknown count."""
        if count is None:
            if self.relative:
                return None
            count = 1 << 62
        first = _place(self.start or "0", count)
        if self.stop is None:
            return index == first
        return max(first, 0) <= index < (_place(self.stop, count) if self.stop else count)


def _place(bound: str, count: int) -> int:
    number = round(float(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
    return count + number if bound.startswith("-") else number


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _few(value: Any) -> list[Any]:
    """A value or a list of values as a list, which must not be endless."""
    if len(items := _listed(value)) > MAX_LIST:
        raise ValueError(f"a list here has at most {MAX_LIST} items, this one has {len(items)}; write spans, '0:20'")
    return items


def _spans(value: Any) -> tuple[Span, ...]:
    if not (items := _few(value)):
        raise ValueError("the list is empty; leave the key out to mean all")
    return tuple(item if isinstance(item, Span) else Span.parse(item) for item in items)


def _names(value: Any) -> tuple[str, ...]:
    items = _few(value)
    if not items or not all(isinstance(item, str) and 0 < len(item) <= MAX_NAME for item in items):
        raise ValueError(f"expected a name or a list of names, of 1 to {MAX_NAME} characters each, got {_cut(value)}")
    return tuple(items)


def _kinds(value: Any) -> tuple[str, ...]:
    for name in (names := _names(value)):
        if name not in get_args(Kind):
            raise ValueError(f"there is no kind {name!r}{nearest(name, get_args(Kind))}; kinds: {', '.join(get_args(Kind))}")
    return names


def _tokens(value: Any) -> str:
    found = re.fullmatch(r"\s*(>=|<=|>|<)\s*([0-9]{1,12})\s*", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"expected a bound like '>=8192' or '<65536', got {_cut(value)}")
    return found[1] + found[2]


def _grid(value: Any) -> str:
    axis = r"([1-9][0-9]{0,8}|\*)"
    if not (isinstance(value, str) and re.fullmatch(rf"{axis}x{axis}x{axis}", value)):
        raise ValueError(f"expected frames x rows x columns of tokens like '21x45x80' or '*x64x64', got {_cut(value)}")
    return value


Spans = Annotated[tuple[Span, ...], BeforeValidator(_spans)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class Where(_Strict):
    """Conditions of a rule; all must hold, and one that is left out always does. A list means any of."""

    steps: Spans | None = None
    layers: Spans | None = None
    kind: Annotated[tuple[str, ...], BeforeValidator(_kinds)] | None = None
    """Self- and joint-attention if left out."""
    denoiser: Names | None = None
    branch: Names | None = None
    module: Names | None = None
    """Globs on the attention module's path, ``blocks.*.attn1``."""
    tokens: Annotated[str, BeforeValidator(_tokens)] | None = None
    """Bound on the number of visual tokens."""
    grid: Annotated[str, BeforeValidator(_grid)] | None = None

    def fits(self, site: Site) -> bool:
        """Whether the conditions on the place hold."""
        return (
            site.kind in (self.kind or ("self", "joint"))
            and (self.denoiser is None or site.denoiser in self.denoiser)
            and (self.module is None or any(fnmatch.fnmatchcase(site.module, glob) for glob in self.module))
            and (
                self.layers is None
                or (site.layer is not None and any(s.holds(site.layer, site.layers) for s in self.layers))
            )
        )

    @property
    def placed(self) -> bool:
        """Whether `fits` decides alone: all conditions are on the place, or hold always."""
        at_all_steps = self.steps is None or any(span.whole for span in self.steps)
        return at_all_steps and self.branch is None and self.tokens in (None, ">=0") and self.grid in (None, "*x*x*")

    def unmet(self, seen: Seen) -> tuple[str, str] | None:
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
        return self.tokens is None or _COMPARE[self.tokens.rstrip("0123456789")](
            layout.visual, int(self.tokens.lstrip("<>="))
        )


_COMPARE = {">=": int.__ge__, "<=": int.__le__, ">": int.__gt__, "<": int.__lt__}

# --------------------------------------------------------------------------------------------------------------- rules


class TableRef(_Strict):
    """A table that a calibration made: which file beside the recipe, which bytes, which tensor of it."""

    file: str = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    key: str = Field(min_length=1)

    def path(self, folder: Path | None) -> Path:
        """Where the file is: beside the recipe's; for recipes that are no file, wherever `file` says. ValueError outside."""
        if folder is None:
            return Path(self.file)
        if self.file != Path(self.file).name or self.file == "..":
            raise ValueError(f"tables stand beside the recipe's file: expected a name without folders, got {self.file!r}")
        return folder / self.file


class Ramp(_Strict):
    """A value that moves in a straight line over all steps of a run, or over all layers."""

    first: float = Field(alias="from")
    last: float = Field(alias="to")
    over: Literal["steps", "layers"]

    def at(self, site: Site, clock: Clock) -> float | str:
        """Return the value here and now, or the reason why it is not known."""
        index, count = (clock.step, clock.steps) if self.over == "steps" else (site.layer, site.layers)
        if index is None or count is None:
            cure = "; tell it by plug.step(index, steps)" if self.over == "steps" else ""
            return f"a value ramps over {self.over}, and which of how many this is is not known{cure}"
        return self.value(min(index / (count - 1), 1.0) if count > 1 else 0.0)

    def value(self, way: float) -> float:
        """Return the value at a share of the way, from 0 to 1, in few digits: equal configs share plans and graphs."""
        return float(f"{self.first + (self.last - self.first) * way:.6g}")


def _one_patch(value: Any) -> str:
    names = _names(value)
    entries = []
    for name in names:
        if name == "dense":
            continue
        try:
            entries.append(patch_entry(name))
        except NoMatchError as error:
            raise ValueError(str(error).rstrip(".")) from None
    if len(names) > 1:
        if len(entries) < len(names):
            raise ValueError(f"dense stands alone, got {list(names)}")
        raise ValueError(f"a rule takes one patch, got {len(names)}: {', '.join(names)}; write one rule each")
    return names[0]


class Rule(_Strict):
    """Where the conditions hold, `patch` serves the call with these settings."""

    where: Where = Where()
    patch: Annotated[str, BeforeValidator(_one_patch)]
    settings: dict[str, Any] = Field({}, alias="with")

    @property
    def around(self) -> bool:
        """Whether its patch stands around ``generate``, and so has no site."""
        return self.patch != "dense" and patch_entry(self.patch).family == "generation"

    @model_validator(mode="after")
    def _what_stands_around_has_no_place(self) -> Rule:
        if self.around and self.where != Where():
            raise ValueError(f"{self.patch} stands around generate(), everywhere and always; remove where: {self.where}")
        return self

    @model_validator(mode="after")
    def _dense_has_no_settings(self) -> Rule:
        if self.patch == "dense" and self.settings:
            raise ValueError(f"dense takes no settings; remove with: {{{', '.join(self.settings)}}}")
        for key, value in self.settings.items():
            if isinstance(value, Mapping):
                _varying(key, value)
        return self

    def of_denoisers(self) -> str | None:
        """What of it only denoisers have, by its keys, or None."""
        conditions = [key for key in ("steps", "branch", "tokens", "grid") if getattr(self.where, key) is not None]
        varying = [(key, _varying(key, value)) for key, value in self.settings.items() if isinstance(value, Mapping)]
        ramps = [f"with.{key} over steps" for key, value in varying if isinstance(value, Ramp) and value.over == "steps"]
        return " and ".join([*(f"where.{key}" for key in conditions), *ramps]) or None

    def config(self, site: Site, layout: Layout | None, clock: Clock) -> dict[str, Any] | str:
        """Return the settings with ramps resolved, or the reason why they are not known. Tables stay whole: patches read rows."""
        config = dict(self.settings)
        for key, value in config.items():
            if isinstance(value, Table):
                value.require(site, layout)
                if (reason := value.missing(site, clock)) is not None:
                    return reason
            elif isinstance(value, Mapping) and isinstance(ramp := _varying(key, value), Ramp):
                resolved = ramp.at(site, clock)
                if isinstance(resolved, str):
                    return resolved
                config[key] = resolved
        return config


def _pattern(text: str) -> str:
    """Refuse a regular expression that is none, or could take forever to be held against the name of a module."""
    if "(" in text or len(re.findall(r"[*+{]", text)) > 3 or text.count("?") > 8:
        raise ValueError(f"expected a pattern without groups and with at most three repeats, got {_cut(text)}; list several")
    try:
        re.compile(text)
    except (re.error, OverflowError) as error:
        raise ValueError(f"{_cut(text)} is no regular expression: {error}") from None
    return text


Patterns = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(_pattern)]],
    Field(min_length=1, max_length=64),
]
Steps = Annotated[int, Field(ge=0, le=10_000)]


class _FirstBlock(_Strict):
    threshold: float = Field(0.05, ge=0, le=1e6)


class _Mag(_Strict):
    threshold: float = Field(0.06, ge=0, le=1e6)
    max_skip_steps: Steps = 3
    retention_ratio: float = Field(0.2, ge=0, le=1)
    num_inference_steps: int = Field(28, ge=1, le=10_000)
    mag_ratios: tuple[Annotated[float, Field(ge=0, le=1e6)], ...] = Field(min_length=1, max_length=10_000)


class _TaylorSeer(_Strict):
    cache_interval: int = Field(5, ge=1, le=10_000)
    disable_cache_before_step: Steps = 3
    disable_cache_after_step: Steps | None = None
    max_order: int = Field(1, ge=0, le=16)
    skip_predict_identifiers: Patterns | None = None
    cache_identifiers: Patterns | None = None
    use_lite_mode: bool = False


CACHES: dict[str, type[_Strict]] = {"first_block": _FirstBlock, "mag": _Mag, "taylorseer": _TaylorSeer}
"""Step caches of diffusers that a recipe may put on, and the settings of each, with diffusers' own defaults."""


class StepCache(_Strict):
    """A step cache of diffusers beside the rules: ``cache: {kind: first_block, with: {threshold: 0.1}}``."""

    kind: Literal["first_block", "mag", "taylorseer"]
    settings: dict[str, Any] = Field({}, alias="with")

    @model_validator(mode="after")
    def _settings_are_its_own(self) -> StepCache:
        known = CACHES[self.kind].model_fields
        if unknown := [key for key in self.settings if key not in known]:
            raise ValueError(
                f"the cache {self.kind} has no {unknown[0]!r}{nearest(unknown[0], known)}; it has {', '.join(known)}"
            )
        try:
            CACHES[self.kind].model_validate(self.settings)
        except ValidationError as error:
            raise ValueError(_explain(error, Source(f"cache {self.kind}"), (), lambda _: StepCache)) from None
        return self


def _varying(key: str, value: Mapping[str, Any]) -> Ramp | TableRef:
    """Read a value that is not the same everywhere."""
    is_table = set(value) == {"table"} and isinstance(value["table"], Mapping)
    try:
        return TableRef.model_validate(dict(value["table"])) if is_table else Ramp.model_validate(dict(value))
    except ValidationError:
        raise ValueError(
            f"with.{key}: expected a value, a ramp {{from: number, to: number, over: steps or layers}}, or a table "
            f"{{table: {{file: name, sha256: 64 digits, key: name}}}}, got {_cut(dict(value))}"
        ) from None


@dataclass(frozen=True)
class Seen:
    """What forwards of a denoiser came by: how many steps a run has (None: unknown), guidance branches, layouts."""

    steps: int | None = None
    branches: frozenset[str | None] = frozenset()
    layouts: frozenset[Layout] = frozenset()


@dataclass(frozen=True)
class Decision:
    """What serves a call: `patch` with `config`; or dense, and then `reason` says what could not be decided, if anything."""

    patch: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    rule: int | None = None
    """Number of the rule that says so, from 0."""


DENSE = Decision()

# ---------------------------------------------------------------------------------------------------------------- files


class Spread(_Strict):
    """Quantiles over repeated timings, in milliseconds, or over gains."""

    p20: float = Field(gt=0)
    p50: float = Field(gt=0)
    p80: float = Field(gt=0)


class Quality(_Strict):
    """A score over seeds. Leave it out where it is not finite (identical videos)."""

    mean: float
    worst: float


class Task(_Strict):
    """A figure of answers, of the stock model and with the recipe, on the same questions."""

    dense: float
    value: float


class Measured(_Strict):
    """One measurement on real weights: what ran, on what, how fast, how far from the dense run at the same seed."""

    date: str
    """ISO 8601 day."""
    device: str
    versions: dict[str, str]
    """accelplug, torch, diffusers, ..."""
    git: str | None = None
    weights: str | None = None
    """Which checkpoint, name and revision."""
    inputs: dict[str, str | int | float | bool] = {}
    """height, width, num_frames, num_inference_steps, ..."""
    prompts: list[str] = []
    dtype: str | None = None
    seeds: list[int] = Field(min_length=1)
    baseline: str | None = None
    """Name of the dense attention it is compared with."""
    choices: dict[str, str] = {}
    """Kernel, gate: what was chosen by timing."""
    dense_ms: Spread
    ms: Spread
    speedup: Spread | None = None
    """Gain over dense: of each prompt and seed the fastest dense run's time over the recipe's; of older rows `dense_ms` over `ms`."""
    density: float | None = Field(None, ge=0, le=1)
    """Keys read over all keys, pooled ones counted."""
    peak_mib: float | None = Field(None, ge=0)
    psnr_db: Quality | None = None
    ssim: Quality | None = None
    foreground_psnr_db: Quality | None = None
    floor_psnr_db: Quality | None = None
    """Dense in another backend or dtype against dense."""
    objective: str | None = None
    """Language models: the figure of `task` that the recipe was tuned for."""
    task: dict[str, Task] = {}
    """Language models: accuracy, hallucination, nll ... on questions that `inputs` names; times are milliseconds a question."""

    @property
    def gain(self) -> float:
        """The median gain over dense."""
        if self.speedup is not None:
            return self.speedup.p50
        return self.dense_ms.p50 / self.ms.p50 if self.ms.p50 else float("inf")


class _Entry(_Strict):
    cite: str = ""
    summary: str = ""
    rules: tuple[Rule, ...] = Field(min_length=1, max_length=MAX_RULES)
    cache: StepCache | None = None
    measured: tuple[Measured, ...] = Field((), max_length=MAX_LIST)


class _Pipeline(_Strict):
    has: Names


class _File(_Strict):
    schema_: int = Field(alias="schema")
    model: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    match: dict[str, Any] = Field(min_length=1)
    default: str
    summary: str = ""
    worth: str = ""
    recipes: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")], _Entry] = Field(min_length=1)

    @model_validator(mode="after")
    def _default_is_there(self) -> _File:
        if self.default not in self.recipes:
            raise ValueError(f"default: {_cut(self.default)} is no recipe of this file; recipes: {', '.join(self.recipes)}")
        return self


@dataclass(frozen=True)
class ModelFacts:
    """What recipes match a model by."""

    class_names: tuple[str, ...]
    """The denoiser's class, then its bases."""
    config: Mapping[str, Any]
    """The denoiser's config."""
    components: frozenset[str] = frozenset()
    """Components of the pipeline that are loaded; empty for a bare denoiser."""

    def value(self, key: str) -> Any:
        """Return what stands for `key` of a match."""
        return self.class_names[0] if key == "class" else self.config.get(key, "<none>")


@dataclass(frozen=True)
class Match:
    """Which models a file is for. A value may be a list: any of."""

    keys: Mapping[str, Any]
    pipeline: tuple[str, ...] = ()

    def fits(self, facts: ModelFacts) -> bool:
        """Whether a model is meant. A bare denoiser cannot show its pipeline, so that part is not asked of it."""
        if facts.components and not facts.components.issuperset(self.pipeline):
            return False
        return all(self._has(facts, key, wanted) for key, wanted in self.keys.items())

    @staticmethod
    def _has(facts: ModelFacts, key: str, wanted: Any) -> bool:
        if key == "class":
            return any(name in facts.class_names for name in _listed(wanted))
        if key not in facts.config:
            return False
        value = facts.config[key]
        if isinstance(value, list | tuple):
            return list(value) == _listed(wanted)
        return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in _listed(wanted))

    def weight(self, facts: ModelFacts) -> int:
        """Number of keys that fitted: the file with most wins."""
        return len(self.keys) + (len(self.pipeline) if facts.components else 0)

    def __str__(self) -> str:
        pipeline = f", a pipeline with {', '.join(self.pipeline)}" if self.pipeline else ""
        return ", ".join(f"{key}: {value}" for key, value in self.keys.items()) + pipeline


@dataclass(frozen=True, eq=False)
class Recipe:
    """Rules for one model. The first that fits a call serves it; what none fits stays dense."""

    name: str
    """Full name, ``wan2.1-t2v-14b/radial``."""
    model: str
    rules: tuple[Rule, ...]
    cite: str = ""
    summary: str = ""
    measured: tuple[Measured, ...] = ()
    cache: StepCache | None = None
    """The step cache that goes on with the rules."""
    match: Match | None = None
    """None: for any model."""
    path: Path | None = None
    """The file it came from."""
    source: Source = field(default=Source("<recipe>"), repr=False)
    loc: Loc = field(default=(), repr=False)
    """Where it stands in its source."""
    _by_site: Bounded[Site, tuple[int, ...]] = field(default_factory=lambda: Bounded(4096), init=False, repr=False)

    def decide(self, site: Site, layout: Layout | None, clock: Clock) -> Decision:
        """Return what serves a call at `site`, with tokens lying as `layout` says (None: not known), at `clock`."""
        for number in self._rules_at(site):
            rule = self.rules[number]
            holds = rule.where.holds(layout, clock)
            if isinstance(holds, str):
                return Decision(reason=holds)
            if not holds:
                continue
            if rule.patch == "dense":
                return Decision(rule=number)
            config = rule.config(site, layout, clock)
            if isinstance(config, str):
                return Decision(reason=config, rule=number)
            return Decision(rule.patch, config, rule=number)
        return DENSE

    def may_touch(self, site: Site) -> bool:
        """Whether a patch may serve calls at `site` at some time; for a recipe without any patch, whether a rule fits."""
        return bool(self._rules_at(site)) or (not self.patches() and any(rule.where.fits(site) for rule in self.rules))

    def _rules_at(self, site: Site) -> tuple[int, ...]:
        """Numbers of the rules that time and layout choose among at `site`; the last has a patch, so that being undecided matters."""

        def make() -> tuple[int, ...]:
            fitting: list[int] = []
            for number, rule in enumerate(self.rules):
                if rule.where.fits(site) and not rule.around:
                    fitting.append(number)
                    if rule.where.placed:
                        break
            while fitting and self.rules[fitting[-1]].patch == "dense":
                fitting.pop()
            return tuple(fitting)

        return self._by_site.get(site, make)

    def around(self) -> tuple[Rule, ...]:
        """Return the rules whose patches stand around ``generate``, outermost first; they have no site."""
        return tuple(rule for rule in self.rules if rule.around)

    def require_rules_for(self, sites: Sequence[Site], elsewhere: Collection[str] = ()) -> None:
        """Refuse rules that can never hold in a model with these sites. `elsewhere`: denoisers of it that are not here, maybe.

        Raises
        ------
        RecipeError
            If a rule's layers, kind, module and denoiser fit none of them, or earlier rules take all that it names.
        """
        reached, behind = set(), {}
        for site in sites:
            first = None
            for number, rule in enumerate(self.rules):
                if rule.around or not rule.where.fits(site):
                    continue
                if first is None:
                    reached.add(number)
                    first = number if rule.where.placed else None
                else:
                    behind[number] = first
        for number, rule in enumerate(self.rules):
            if rule.around or number in reached or set(rule.where.denoiser or ()) & set(elsewhere):
                continue
            if number in behind:
                raise RecipeError(
                    f"{self.named(number)} can never hold: {self.named(behind[number])} stands ahead of it and takes what it "
                    "names, since the first rule that fits wins. Put it first, or leave it out."
                )
            kinds = ", ".join(f"{n} of kind {kind}" for kind, n in Counter(site.kind for site in sites).items())
            raise RecipeError(
                f"{self.named(number)} fits no attention of this model, which has {kinds} in {sites[0].layers} layers. "
                "Mend its where: (layers, kind, module, denoiser), or leave the rule out."
            )

    def named(self, number: int) -> str:
        """Name a rule in words, counted from 1."""
        rule = self.rules[number]
        where = "everywhere" if rule.where == Where() else f"where {rule.where}"
        return f"Rule {number + 1} of {self.name} ({rule.patch} {where})"

    def chosen_among(self, sites: Iterable[Site]) -> list[int]:
        """Return the numbers of the rules that may hold at some of these sites."""
        return sorted({number for site in sites for number in self._rules_at(site)})

    def patches(self) -> tuple[str, ...]:
        """Names of the patches that its rules use, each once."""
        return tuple(dict.fromkeys(rule.patch for rule in self.rules if rule.patch != "dense"))

    def with_tables(self, facts: ModelFacts | None = None) -> Recipe:
        """Return the recipe with the tables that it names read from their files, and fit for a model, where one is given.

        Raises
        ------
        RecipeError
            If a table cannot be read, or was made for another model.
        """
        if not any(isinstance(value, Mapping | Table) for rule in self.rules for value in rule.settings.values()):
            return self
        rules = []
        for i, rule in enumerate(self.rules):
            settings = {}
            for key, value in rule.settings.items():
                where = self.source.at((*self.loc, "rules", i, "with", key))
                try:
                    settings[key] = _read_table(key, value, self.path and self.path.parent, facts)
                except ValueError as error:
                    raise RecipeError(f"{where}: {error}") from error
            rules.append(rule.model_copy(update={"settings": settings}))
        return replace(self, rules=tuple(rules))

    def require_tables_for(self, heads: Mapping[Site, int | None]) -> None:
        """Refuse tables that have no row for a layer or a head that they are to serve; `heads` by site, None where not known.

        Raises
        ------
        RecipeError
            If one has as many layers or heads as another model.
        """
        for site, known in heads.items():
            for number in self._rules_at(site):
                for table in self.rules[number].settings.values():
                    if isinstance(table, Table) and site.layer is not None:
                        table.require(site, None, known)

    def check(self) -> None:
        """Validate every rule's settings against its patch. Imports the patches, and torch with them; see `with_tables`.

        Raises
        ------
        RecipeError
            If a setting is unknown or has a value that the patch refuses.
        """
        for i, rule in enumerate(self.with_tables().rules):
            if rule.patch == "dense":
                continue
            varying = {key: _varying(key, value) for key, value in rule.settings.items() if isinstance(value, Mapping)}
            ramps = {key: value for key, value in varying.items() if isinstance(value, Ramp)}
            model = patch_class(rule.patch).Config
            for key in ramps:
                if rule in self.around():
                    where = self.source.at((*self.loc, "rules", i, "with", key))
                    raise RecipeError(
                        f"{where}: {rule.patch} stands around generate, where there is no step and no layer to ramp over."
                    )
                if key in model.model_fields and float not in model.kinds(key):
                    where = self.source.at((*self.loc, "rules", i, "with", key))
                    raise RecipeError(
                        f"{where}: only real numbers ramp, and {key} of {rule.patch} is none; write a rule for each value, with "
                        "where: {steps: ...} or {layers: ...}."
                    )
            for way in (0.0, 1.0) if ramps else (0.0,):  # the ends of a straight line are its extremes
                config = {**rule.settings, **{key: ramp.value(way) for key, ramp in ramps.items()}}
                try:
                    model.model_validate(config)
                except ValidationError as error:
                    loc = (*self.loc, "rules", i, "with")
                    raise RecipeError(_explain(error, self.source, loc, lambda _, model=model: model)) from error

    def with_cache(self, kind: str, **settings: Any) -> Recipe:
        """Return the recipe with a step cache beside its rules, the first layer dense where the cache looks at it."""
        cache = StepCache.model_validate({"kind": kind, "with": settings})
        dense_first = Rule.model_validate({"where": {"layers": 0}, "patch": "dense"})
        rules = (dense_first, *self.rules) if kind == "first_block" else self.rules
        return replace(self, rules=rules, cache=cache, measured=())

    def describe(self) -> str:
        """Return the recipe as text for people."""
        lines = [f"{self.name}  {self.cite}".rstrip(), *([f"  {self.summary}"] if self.summary else [])]
        for rule in self.rules:
            settings = ", ".join(f"{key}: {_shown(value)}" for key, value in rule.settings.items())
            lines.append(f"  {rule.where}: {rule.patch}" + (f" ({settings})" if settings else ""))
        lines.append("  elsewhere: dense")
        if self.cache is not None:
            settings = ", ".join(f"{key}: {value}" for key, value in self.cache.settings.items())
            lines.append(f"  step cache: {self.cache.kind}" + (f" ({settings})" if settings else ""))
        for row in self.measured:
            psnr = f", PSNR {row.psnr_db.mean:.1f} dB (worst {row.psnr_db.worst:.1f})" if row.psnr_db else ""
            lines.append(f"  measured {row.date} on {row.device}: {row.gain:.2f}x{psnr}, {len(row.seeds)} seeds")
        return "\n".join(lines)


def _any(value: str | tuple[str | Span, ...]) -> str:
    items = (value,) if isinstance(value, str) else value
    return " or ".join(item.text if isinstance(item, Span) else item for item in items)


def _read_table(key: str, value: Any, folder: Path | None, facts: ModelFacts | None) -> Any:
    """Return the table that a setting refers to, or the setting as it is."""
    if isinstance(value, Mapping) and isinstance(ref := _varying(key, value), TableRef):
        value = Table.read(ref.path(folder), ref.sha256, ref.key)
    if isinstance(value, Table) and facts is not None:
        differs = [
            f"{name} {facts.value(name)!r} where the table has {wanted!r}"
            for name, wanted in value.origin.model.items()
            if (wanted not in facts.class_names if name == "class" else _plainly(facts.value(name)) != wanted)
        ]
        if differs:
            raise ValueError(
                f"{value!r} was made for another model: this one has {', '.join(differs)}. Calibrate for this one."
            )
    return value


def _plainly(value: Any) -> Any:
    """A config's value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if isinstance(value, Table):
        return repr(value)
    if isinstance(value, Mapping) and "table" in value:
        return f"table {value['table']['key']} of {value['table']['file']}"
    if isinstance(value, Mapping):
        return f"{value['from']} to {value['to']} over {value['over']}"
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@dataclass(frozen=True, eq=False)
class RecipeFile:
    """The recipes for one model."""

    model: str
    match: Match
    default: str
    recipes: Mapping[str, Recipe]
    """By short name."""
    summary: str = ""
    worth: str = ""
    """Where the recipes pay, and where they do not."""
    path: Path | None = None

    def recipe(self, name: str | None = None) -> Recipe:
        """Return a recipe by its short name, or the default."""
        if name is None:
            return self.recipes[self.default]
        if name not in self.recipes:
            raise NoMatchError(
                f"{self.model} has no recipe {name!r}{nearest(name, self.recipes)}. It has: {', '.join(self.recipes)}."
            )
        return self.recipes[name]

    def describe(self) -> str:
        """Return the file as text for people."""
        head = [self.model, self.summary, self.worth, f"for: {self.match}", f"default: {self.default}"]
        return "\n".join(line for line in head if line) + "\n\n" + "\n\n".join(r.describe() for r in self.recipes.values())


# -------------------------------------------------------------------------------------------------------------- reading


def model_name(path: Path) -> str:
    """Return what the recipes of a file may be called, by the file's name: ``tuned (1).yaml`` -> ``tuned-1``."""
    return re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-._") or "mine"


def read_file(path: Path) -> RecipeFile:
    """Read a recipe file. Patches' settings are checked later, by `load` or `Recipe.check`, since that imports torch.

    Raises
    ------
    RecipeError
        If the file cannot be read or does not follow the schema; the message gives the line.
    """
    data, source = strict_yaml.parse(strict_yaml.read(path), str(path))
    return _file(data, source, path)


def _file(data: Any, source: Source, path: Path | None = None) -> RecipeFile:
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if isinstance(schema, int) and schema != SCHEMA:
        cure = "upgrade it: pip install --upgrade accelplug" if schema > SCHEMA else "the first schema is 1"
        raise RecipeError(f"{source.at(('schema',))}: this accelplug reads schema {SCHEMA}, the file has {schema}; {cure}.")
    parsed = _validated(_File, data, source)
    match = _match(parsed.match, source)
    recipes = {
        name: Recipe(
            f"{parsed.model}/{name}",
            parsed.model,
            entry.rules,
            entry.cite,
            entry.summary,
            entry.measured,
            entry.cache,
            match,
            path,
            source,
            ("recipes", name),
        )
        for name, entry in parsed.recipes.items()
    }
    return RecipeFile(parsed.model, match, parsed.default, recipes, parsed.summary, parsed.worth, path)


def _match(keys: Mapping[str, Any], source: Source) -> Match:
    keys = dict(keys)
    pipeline: tuple[str, ...] = ()
    if "pipeline" in keys:
        pipeline = _validated(_Pipeline, keys.pop("pipeline"), source, ("match", "pipeline")).has
    if "class" not in keys:
        raise RecipeError(
            f"{source.at(('match',))}: expected the key class, the denoiser's class name, got {', '.join(keys)}."
        )
    for key, value in keys.items():
        if any(isinstance(item, Mapping | list | tuple) for item in _listed(value)):
            raise RecipeError(f"{source.at(('match', key))}: expected a value or a list of values, got {_cut(value)}.")
    return Match(keys, pipeline)


_MODELS = {"rules": Rule, "where": Where, "pipeline": _Pipeline, "measured": Measured, "recipes": _Entry}
_MODELS |= dict.fromkeys(("dense_ms", "ms", "speedup"), Spread) | {"cache": StepCache}


def _validated(model: Any, data: Any, source: Source, loc: Loc = ()) -> Any:
    def at(part: Loc) -> Any:
        # The model whose key is wrong is told by the last name on the way to it: rules[0], recipes.radial, where.
        if len(part) == 2 and part[0] == "recipes":
            return _Entry
        names = [name for name in part if isinstance(name, str)]
        if "task" in names[:-1]:
            return Task
        return _MODELS.get(names[-1], Quality) if names else model

    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error, source, loc, at)) from error


def _explain(error: ValidationError, source: Source, loc: Loc, model_at: Any) -> str:
    """Say in our words what pydantic found: file, line, key, what was expected, what was got."""
    lines = []
    problems = error.errors(include_url=False)
    # A list whose items are wrong also counts as too short; the items say more.
    inner = [p for p in problems if not (p["type"] == "too_short" and p["input"])]
    for problem in (inner or problems)[:5]:
        part = tuple(problem["loc"])
        where = source.at((*loc, *part))
        key = str(part[-1]) if part else ""
        if problem["type"] == "extra_forbidden" and key == "heads":
            lines.append(f"{where}: choosing heads is not built for block-sparse patches; remove the key.")
        elif problem["type"] == "extra_forbidden":
            fields = model_at(part[:-1]).model_fields
            known = [info.alias or name for name, info in fields.items()]
            lines.append(f"{where}: there is no key {key!r}{nearest(key, known)}. Known: {', '.join(known)}.")
        elif problem["type"] == "missing":
            lines.append(f"{where}: the key {key!r} is missing; add it.")
        else:
            message = problem["msg"].removeprefix("Value error, ").rstrip(".")
            got = "" if problem["type"] == "value_error" else f", got {_cut(problem['input'])}"
            lines.append(f"{where}: {message[:1].lower()}{message[1:]}{got}.")
    return "\n".join(lines)


def _cut(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


# -------------------------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class RecipeInfo:
    """A line of `list_recipes`."""

    model: str
    name: str
    cite: str
    summary: str
    default: bool
    measured: int
    """Number of measured rows."""
    path: Path


def shipped_files() -> dict[str, Path]:
    """Return the recipe files that come with the package, by model name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def list_recipes() -> list[RecipeInfo]:
    """Return all recipes that come with the package."""
    files = [(path, read_file(path)) for path in shipped_files().values()]
    return [
        RecipeInfo(file.model, name, r.cite, r.summary, name == file.default, len(r.measured), path)
        for path, file in files
        for name, r in file.recipes.items()
    ]


def matching_files(facts: ModelFacts) -> list[RecipeFile]:
    """Return the shipped files that fit a model best: one, none, or several that fit equally well."""
    files = [file for file in map(read_file, shipped_files().values()) if file.match.fits(facts)]
    best = max((file.match.weight(facts) for file in files), default=0)
    return [file for file in files if file.match.weight(facts) == best]


def load(recipe: str | Path | Mapping[str, Any] | Recipe | None, facts: ModelFacts) -> Recipe:
    """Return the recipe that is meant, checked in full and fitting the model.

    Parameters
    ----------
    recipe : None for the default of the shipped file that matches; ``radial``, a recipe of that file; ``wan2.1-t2v-14b`` or
        ``wan2.1-t2v-14b/radial``, by full name; a path (a `Path`, or text that ends in .yaml or .yml), its default; a mapping
        like a file, like one recipe ``{rules: [...]}``, or like one rule ``{patch: radial, with: {...}}``; or a `Recipe`.
    facts : the model.

    Raises
    ------
    RecipeError
        If it cannot be read, is wrong, was made for another model, or if several files fit the model equally well.
    NoMatchError
        If there is no such recipe, or none for this model.
    """
    found = recipe if isinstance(recipe, Recipe) else _find(recipe, facts)
    if found.match is not None and not found.match.fits(facts):
        is_there = ", ".join(f"{key}: {facts.value(key)}" for key in found.match.keys)
        with_parts = f", a pipeline with {', '.join(sorted(facts.components))}" if found.match.pipeline else ""
        raise RecipeError(
            f"{found.name} is for {found.match}; this model has {is_there}{with_parts}. "
            "Take a recipe for this model, or copy the rules into a mapping {rules: [...]} to try them on it."
        )
    found = found.with_tables(facts)
    found.check()
    return found


def _find(recipe: str | Path | Mapping[str, Any] | None, facts: ModelFacts) -> Recipe:
    if isinstance(recipe, Mapping):
        return _inline(recipe)
    if isinstance(recipe, Path) or (isinstance(recipe, str) and recipe.endswith((".yaml", ".yml"))):
        return read_file(Path(recipe)).recipe()
    if recipe is None:
        return _matching_file(facts).recipe()
    if not isinstance(recipe, str):
        raise RecipeError(f"A recipe is a name, a path, a mapping or a Recipe, got {type(recipe).__name__}.")
    if "/" in recipe or recipe in shipped_files():
        return named(recipe)
    return _matching_file(facts, _plain(recipe)).recipe(recipe)


def named(name: str) -> Recipe:
    """Return a shipped recipe by full name, ``wan2.1-t2v-14b/radial``, or a file's default by the model's name."""
    model, _, short = _plain(name).partition("/")
    return _shipped(model).recipe(short or None)


def _plain(name: str) -> str:
    """Refuse names that could be taken for paths; names are only ever looked up in the list of shipped files."""
    if ".." in name or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?", name):
        raise RecipeError(
            f"{_cut(name)} is no recipe name: expected 'radial' or 'wan2.1-t2v-14b/radial'. "
            "For a file of your own give its path, as a Path or ending in .yaml."
        )
    return name


def _shipped(model: str) -> RecipeFile:
    files = shipped_files()
    if model not in files:
        raise NoMatchError(f"There is no recipe file {model!r}{nearest(model, files)}. Shipped: {', '.join(files)}.")
    return read_file(files[model])


def _matching_file(facts: ModelFacts, name: str | None = None) -> RecipeFile:
    files = matching_files(facts)
    wanted = f"/{name}" if name else ""
    if not files:
        raise NoMatchError(
            f"No shipped recipe file is for this {facts.class_names[0]}. Shipped: {', '.join(shipped_files())}. "
            "Give a path or a mapping, such as {'patch': 'sol', 'with': {'tau': 1.0}}."
        )
    if len(files) > 1:
        names = " or ".join(f"{file.model}{wanted or '/' + file.default}" for file in files)
        raise RecipeError(f"This {facts.class_names[0]} fits several recipe files equally well. Name one: {names}.")
    return files[0]


def _inline(data: Mapping[str, Any]) -> Recipe:
    source = Source("<mapping>")
    data = strict_yaml.plain(data, source)
    if "recipes" in data or "schema" in data:
        return _file(data, source).recipe()
    if "rules" in data:
        entry, loc = _validated(_Entry, dict(data), source), ()
        about = entry.cite, entry.summary, entry.measured, entry.cache
        return Recipe("custom", "custom", entry.rules, *about, source=source, loc=loc)
    if "patch" in data:
        return Recipe("custom", "custom", (_validated(Rule, dict(data), source),), source=source)
    raise RecipeError(
        f"A recipe mapping has the keys of a file (schema, model, match, default, recipes), of one recipe (rules), or of one "
        f"rule (patch, with, where), got: {', '.join(map(str, data)) or 'nothing'}."
    )


def describe(recipe: str | Path) -> Text:
    """Return a shipped file, a shipped recipe or a file of yours as text for people."""
    from rich.text import Text  # so that reading recipes does not bring the terminal along

    if isinstance(recipe, Path) or recipe.endswith((".yaml", ".yml")):
        return Text(read_file(Path(recipe)).describe())
    return Text(named(recipe).describe() if "/" in recipe else _shipped(_plain(recipe)).describe())


# ------------------------------------------------------------------------------------------------------------ recording


def record_measurement(path: Path, recipe: str, row: Mapping[str, Any]) -> None:
    """Append a `measured` row to a recipe of a file; every other character of the file stays.

    Parameters
    ----------
    path : the recipe file.
    recipe : short name of the recipe.
    row : keys of `Measured`.

    Raises
    ------
    RecipeError
        If the row or the file does not follow the schema, or the file's style leaves no place for the row; the file is then
        as before.
    NoMatchError
        If the file has no such recipe.
    """
    source = Source("<measured row>")
    measured = _validated(Measured, strict_yaml.plain(row, source), source)
    plain = measured.model_dump(exclude_defaults=True)
    text = strict_yaml.read(path)
    before = read_file(path)
    before.recipe(recipe)
    after = _with_row(text, str(path), recipe, plain)
    new, _ = strict_yaml.parse(after, str(path))
    old, _ = strict_yaml.parse(text, str(path))
    old["recipes"][recipe]["measured"] = [*(old["recipes"][recipe].get("measured") or []), plain]
    if new != old:
        raise RecipeError(f"{path}: the row cannot be added without changing the rest; write measured: as a block list.")
    files.write(path, after)


def _with_row(text: str, name: str, recipe: str, row: Mapping[str, Any]) -> str:
    node = _child(_child(strict_yaml.compose(text, name), "recipes"), recipe)
    if node.flow_style:
        raise RecipeError(f"{name}: write recipe {recipe!r} as a block, one key a line, so that a row can be added.")
    newline = "\r\n" if "\r\n" in text else "\n"
    item = "- {" + ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in row.items()) + "}"
    indent = " " * node.start_mark.column
    measured = _child(node, "measured")
    if measured is None or not measured.value:
        key = f"{indent}measured:{newline}" if measured is None else ""
        if measured is None:
            at = _line_end(text, _last(node).end_mark.index)
            return f"{text[:at]}{newline}{key}{indent}  {item}{text[at:]}"
        start, end = measured.start_mark.index, measured.end_mark.index
        rest = _line_end(text, end)  # a comment behind [] stays on the line of its key
        return f"{text[:start].rstrip(' ')}{text[end:rest]}{newline}{indent}  {item}{text[rest:]}"
    if measured.flow_style:
        end = measured.end_mark.index - 1
        return f"{text[:end].rstrip()}, {item[2:]}{text[end:]}"
    at = _line_end(text, _last(measured).end_mark.index)
    return f"{text[:at]}{newline}{' ' * measured.start_mark.column}{item}{text[at:]}"


def _child(node: Any, key: str) -> Any:
    return next((value for name, value in node.value if name.value == key), None)


def _last(node: yaml.Node) -> yaml.Node:
    """Return the last leaf: the end of a block collection lies behind the comments that follow it."""
    while isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    return node


def _line_end(text: str, index: int) -> int:
    end = text.find("\n", index)
    end = len(text) if end < 0 else end
    return end - 1 if text[:end].endswith("\r") else end
