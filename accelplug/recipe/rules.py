"""Rules: where which patch serves, with which settings; the step cache beside them; and what they come to for a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from accelplug.call import Clock, Layout, Site
from accelplug.errors import AccelplugError, NoMatchError, RecipeError, nearest
from accelplug.recipe.conditions import Strict, Where, name_list, number_bound, within, written
from accelplug.recipe.explaining import explain, shortened
from accelplug.recipe.settings import Ramp, at_depth, read_varying, shown
from accelplug.recipe.strict_yaml import Source
from accelplug.registry import PatchEntry, Stage, entry_of, patch_entry, stage_of
from accelplug.step_caches import CACHES
from accelplug.table import Table

if TYPE_CHECKING:
    from accelplug.patches.base import Patch


def _one_patch(value: Any) -> Any:
    if not (value is None or isinstance(value, str | int | float | list | tuple | Mapping)):
        return _instance(value)
    names = name_list(value)
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


def _instance(value: Any) -> Patch:
    if isinstance(value, type):
        raise ValueError(
            f"expected a patch's name or an instance, got the class {value.__name__}; call it: {value.__name__}()"
        )
    try:
        entry_of(value)
    except AccelplugError as error:
        raise ValueError(str(error).rstrip(".")) from None
    return value


class Rule(Strict):
    """Where the conditions hold, `patch` serves the call with these settings."""

    where: Where = Where()
    patch: Annotated[Any, BeforeValidator(_one_patch)]
    """Name of a patch, ``dense``, or an instance of a patch, which has its settings."""
    settings: dict[str, Any] = Field({}, alias="with")

    @property
    def entry(self) -> PatchEntry | None:
        """What the registry says of its patch; None for dense."""
        return None if self.patch == "dense" else entry_of(self.patch)

    @property
    def name(self) -> str:
        """Name of its patch, or ``dense``."""
        return "dense" if self.entry is None else self.entry.name

    @property
    def instance(self) -> Patch | None:
        """Its patch, where it holds one and not a name."""
        return None if isinstance(self.patch, str) else self.patch

    @property
    def around(self) -> bool:
        """Whether its patch stands around ``generate``, and so has no site."""
        return self.entry is not None and self.entry.family == "generation"

    @property
    def stage(self) -> Stage | None:
        """What it is about; None for dense, which is about all."""
        return None if self.entry is None else stage_of(self.entry.family)

    @property
    def values(self) -> dict[str, Any]:
        """The settings that were given, those of an instance too."""
        return self.settings if isinstance(self.patch, str) else given_settings(self.patch)

    def __str__(self) -> str:
        if isinstance(self.patch, str):
            settings = ", ".join(f"{key}: {shown(value)}" for key, value in self.settings.items())
            return f"{self.patch} ({settings})" if settings else self.patch
        return instance_name(self.patch)

    def to_mapping(self) -> dict[str, Any]:
        """Return it as it stands in a file, tables as they are.

        Raises
        ------
        RecipeError
            If it holds an instance of a patch.
        """
        if not isinstance(self.patch, str):
            raise RecipeError(
                f"A rule holds an instance, {self}, which no file can hold. Register its class with accelplug.register_patch and "
                "write the rule as {patch: name, with: {...}}."
            )
        where = self.where.to_mapping()
        settings = {"with": {key: written(value) for key, value in self.settings.items()}} if self.settings else {}
        return {**({"where": where} if where else {}), "patch": self.patch, **settings}

    @model_validator(mode="after")
    def _what_stands_around_has_no_place(self) -> Rule:
        if self.around and self.where != Where():
            raise ValueError(f"{self.name} stands around generate(), everywhere and always; remove where: {self.where}")
        return self

    @model_validator(mode="after")
    def _cross_attention_is_for_those_that_ask(self) -> Rule:
        if self.entry is not None and "cross" in (self.where.kind or ()) and "cross" not in self.entry.kinds:
            raise ValueError(f"{self.name} does not answer cross-attention; its kinds are {', '.join(self.entry.kinds)}")
        return self

    @model_validator(mode="after")
    def _settings_are_its_own(self) -> Rule:
        if not isinstance(self.patch, str) and self.settings:
            raise ValueError(
                f"the patch is an instance, {self}, and has its settings; remove with: {{{', '.join(self.settings)}}}"
            )
        if self.patch == "dense" and self.settings:
            raise ValueError(f"dense takes no settings; remove with: {{{', '.join(self.settings)}}}")
        for key, value in self.settings.items():
            if isinstance(value, Mapping):
                read_varying(key, value)
        return self

    def fits(self, site: Site) -> bool:
        """Whether it is for a site: its conditions on the place hold, and what stands there takes such patches."""
        takes = not site.takes or self.entry is None or self.entry.family in site.takes
        return takes and self.where.fits(site, ("self", "joint", "cross") if self.entry is None else self.entry.kinds)

    def of_denoisers(self, gridded: bool = False) -> str | None:
        """What of it only denoisers have, by its keys, or None. `gridded`: others have a grid of tokens too."""
        keys = ("steps", "branch", *(() if gridded else ("tokens", "grid")))
        conditions = [key for key in keys if getattr(self.where, key) is not None]
        varying = [(key, read_varying(key, value)) for key, value in self.settings.items() if isinstance(value, Mapping)]
        ramps = [f"with.{key} over steps" for key, value in varying if isinstance(value, Ramp) and value.over == "steps"]
        return " and ".join([*(f"where.{key}" for key in conditions), *ramps]) or None

    def config(self, site: Site, layout: Layout | None, clock: Clock) -> dict[str, Any] | str:
        """Return the settings here and now, or the reason why they are not known: values of ramps, and layers told in percent.

        Tables stay whole: patches read rows.
        """
        config = at_depth(self.values, site.layers)
        for key, value in config.items():
            if isinstance(value, Table):
                value.require(site, layout)
                if (reason := value.missing(site, clock)) is not None:
                    return reason
            elif key in self.settings and isinstance(value, Mapping) and isinstance(ramp := read_varying(key, value), Ramp):
                resolved = ramp.at(site, clock)
                if isinstance(resolved, str):
                    return resolved
                config[key] = resolved
        return config


def _cache_kind(value: Any) -> str:
    if not isinstance(value, str) or value not in CACHES:
        known = f"{nearest(str(value), CACHES)}; kinds: {', '.join(CACHES)}"
        raise ValueError(f"there is no step cache {shortened(value)}{known}")
    return value


class StepCache(Strict):
    """A step cache of diffusers beside the rules: ``cache: {kind: first_block, with: {threshold: 0.1}}``."""

    kind: Annotated[str, BeforeValidator(_cache_kind)]
    run: Annotated[str, BeforeValidator(number_bound)] | None = None
    """Bound on the steps of a run; in others every step is computed."""
    optional: bool = False
    """Whether it is left out of a model that takes none, which is reported; else such a model is refused."""
    settings: dict[str, Any] = Field({}, alias="with")

    @property
    def by_run(self) -> bool:
        """Whether what it does hangs on how many steps a run has."""
        return self.run is not None or CACHES[self.kind].by_run(self.settings)

    def serves(self, steps: int | None) -> bool:
        """Whether it skips anything in a run of so many steps (None: unknown)."""
        return not self.by_run or (steps is not None and (self.run is None or within(self.run, steps)))

    def settings_for(self, steps: int | None) -> dict[str, Any]:
        """Return its settings in a run of so many steps; where it does not serve, those that compute every step."""
        cache = CACHES[self.kind]
        if not self.serves(steps):
            return cache.at_rest(self.settings)
        return dict(self.settings) if steps is None else cache.at_steps(self.settings, steps)

    def computed(self, steps: int) -> int | None:
        """Return how many of so many steps it computes; None where that cannot be told ahead."""
        computed = CACHES[self.kind].computed
        return steps if not self.serves(steps) else None if computed is None else computed(self.settings, steps)

    def to_mapping(self) -> dict[str, Any]:
        """Return it as it stands in a file."""
        run = {} if self.run is None else {"run": self.run}
        return {"kind": self.kind, **run, **({"optional": True} if self.optional else {}), "with": dict(self.settings)}

    def __str__(self) -> str:
        settings = ", ".join(f"{key}: {value}" for key, value in self.settings.items())
        said = self.kind + (f" ({settings})" if settings else "")
        said += "" if self.run is None else f", in runs of {self.run} steps"
        return said + (", where the model takes one" if self.optional else "")

    @model_validator(mode="after")
    def _only_some_can_rest(self) -> StepCache:
        if self.run is not None and not CACHES[self.kind].resting:
            able = ", ".join(name for name, cache in CACHES.items() if cache.resting)
            raise ValueError(
                f"the cache {self.kind} cannot be told to rest in some runs: remove run: {self.run}; {able} can"
            )
        return self

    @model_validator(mode="after")
    def _settings_are_its_own(self) -> StepCache:
        settings = CACHES[self.kind].settings
        known = settings.model_fields
        if unknown := [key for key in self.settings if key not in known]:
            raise ValueError(
                f"the cache {self.kind} has no {unknown[0]!r}{nearest(unknown[0], known)}; it has {', '.join(known)}"
            )
        try:
            settings.model_validate(self.settings)
        except ValidationError as error:
            raise ValueError(explain(error, Source(f"cache {self.kind}"), (), lambda _: StepCache)) from None
        return self


@dataclass(frozen=True)
class Decision:
    """What serves a call: `patch` with `config`; or dense, and then `reason` says what could not be decided, if anything."""

    patch: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    rule: int | None = None
    """Number of the rule that says so, from 0."""
    instance: Patch | None = None
    """The patch itself, where the rule holds one."""


DENSE = Decision()


def given_settings(patch: Patch) -> dict[str, Any]:
    """Return the settings that a patch was made with."""
    return {key: value for key, value in patch.config if key in patch.config.model_fields_set}


def instance_name(patch: Patch) -> str:
    """Return the class and the settings of a patch: ``Radial(decay=0.5)``."""
    settings = given_settings(patch)
    return f"{type(patch).__name__}({', '.join(f'{key}={shown(value)}' for key, value in settings.items())})"
