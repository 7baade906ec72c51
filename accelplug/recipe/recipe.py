"""A recipe: the rules for one model, what they decide, and whether they can hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from accelplug.bounded import Bounded
from accelplug.call import Clock, Layout, Site
from accelplug.errors import RecipeError
from accelplug.recipe.conditions import Where
from accelplug.recipe.expecting import LENGTHS, Expected, expected, layers_of, summed_up
from accelplug.recipe.explaining import explain
from accelplug.recipe.matching import Match, ModelFacts
from accelplug.recipe.measured import Measured
from accelplug.recipe.positions import Positions
from accelplug.recipe.rules import DENSE, Decision, Rule, StepCache
from accelplug.recipe.settings import Ramp, at_depth, in_percent, read_varying, table_for
from accelplug.recipe.strict_yaml import Loc, Source
from accelplug.registry import STAGES, PatchEntry, Stage, patch_class
from accelplug.show import Shown
from accelplug.step_caches import CACHES
from accelplug.table import Table

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, eq=False, repr=False)
class Recipe(Shown):
    """Rules for one model. The first that fits a call serves it; what none fits stays dense. Prints as text for people."""

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
    positions: Positions | None = None
    """How frames beyond the trained length are told apart."""
    _by_site: Bounded[tuple[Site, Stage], tuple[int, ...]] = field(
        default_factory=lambda: Bounded(4096), init=False, repr=False
    )

    def decide(self, site: Site, layout: Layout | None, clock: Clock, *, stage: Stage = "attention") -> Decision:
        """Return what serves a call at `site`, with tokens lying as `layout` says (None: not known), at `clock`, in a stage."""
        for number in self._rules_at(site, stage):
            rule = self.rules[number]
            holds = rule.where.holds(layout, clock)
            if isinstance(holds, str):
                return Decision(reason=holds)
            if not holds:
                continue
            if (entry := rule.entry) is None:
                return Decision(rule=number)
            config = rule.config(site, layout, clock)
            if isinstance(config, str):
                return Decision(reason=config, rule=number)
            return Decision(entry.name, config, rule=number, instance=rule.instance)
        return DENSE

    def may_touch(self, site: Site) -> bool:
        """Whether a patch may serve calls at `site` at some time; for a recipe without any patch, whether a rule fits."""
        return bool(self.chosen_among([site])) or (not self.patches() and any(rule.fits(site) for rule in self.rules))

    def may_answer(self, site: Site) -> bool:
        """Whether a patch may answer at `site` in the forwards that a model makes without the recipe."""
        return any(self._rules_at(site, stage) for stage in self.stages if stage != "guidance")

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What its rules are about, each chosen for itself."""
        found = {rule.stage for rule in self.rules if not rule.around}
        return tuple(stage for stage in STAGES if stage in found) or STAGES[:1]

    def _stages_of(self, rule: Rule) -> tuple[Stage, ...]:
        """For which of them a rule is: a dense one is for all."""
        return self.stages if rule.stage is None else (rule.stage,)

    def _rules_at(self, site: Site, stage: Stage) -> tuple[int, ...]:
        """Numbers of the rules of a stage that time and layout choose among at `site`; the last has a patch: being undecided matters."""

        def make() -> tuple[int, ...]:
            fitting: list[int] = []
            for number, rule in enumerate(self.rules):
                if rule.fits(site) and not rule.around and stage in self._stages_of(rule):
                    fitting.append(number)
                    if rule.where.placed:
                        break
            while fitting and self.rules[fitting[-1]].patch == "dense":
                fitting.pop()
            return tuple(fitting)

        return self._by_site.get((site, stage), make)

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
            first: dict[Stage, int] = {}  # by stage, the rule that takes all that is left
            for number, rule in enumerate(self.rules):
                if rule.around or not rule.fits(site):
                    continue
                if left := [stage for stage in self._stages_of(rule) if stage not in first]:
                    reached.add(number)
                    first |= dict.fromkeys(left, number) if rule.where.placed else {}
                else:
                    behind[number] = first[self._stages_of(rule)[0]]
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
        return f"Rule {number + 1} of {self.name} ({rule.name} {where})"

    def guided_by(self) -> tuple[Rule, ...]:
        """Return the rules about a forward to be guided by."""
        return tuple(rule for rule in self.rules if rule.stage == "guidance")

    def chosen_among(self, sites: Iterable[Site]) -> list[int]:
        """Return the numbers of the rules that may hold at some of these sites."""
        return sorted({number for site in sites for stage in self.stages for number in self._rules_at(site, stage)})

    def patches(self) -> tuple[PatchEntry, ...]:
        """What the registry says of the patches that its rules use, each once."""
        return tuple(dict.fromkeys(rule.entry for rule in self.rules if rule.entry is not None))

    def to_mapping(self) -> dict[str, Any]:
        """Return its rules, its step cache and its positions as they stand in a file, tables as they are.

        Raises
        ------
        RecipeError
            If a rule holds an instance of a patch.
        """
        cache = {} if self.cache is None else {"cache": self.cache.to_mapping()}
        positions = {} if self.positions is None else {"positions": self.positions.to_mapping()}
        return {"rules": [rule.to_mapping() for rule in self.rules], **cache, **positions}

    def with_tables(self, facts: ModelFacts | None = None) -> Recipe:
        """Return the recipe with the tables that it names read from their files, and fit for a model, where one is given.

        Raises
        ------
        RecipeError
            If a table cannot be read, or was made for another model.
        """
        if not any(isinstance(value, Mapping | Table) for rule in self.rules for value in rule.values.values()):
            return self
        rules = []
        for i, rule in enumerate(self.rules):
            settings = {}
            for key, value in rule.values.items():
                where = self.source.at((*self.loc, "rules", i, "with", key))
                try:
                    settings[key] = table_for(key, value, self.path and self.path.parent, facts)
                except ValueError as error:
                    raise RecipeError(f"{where}: {error}") from error
            rules.append(rule.model_copy(update={"settings": settings}) if isinstance(rule.patch, str) else rule)
        return replace(self, rules=tuple(rules))

    def require_tables_for(self, heads: Mapping[Site, int | None]) -> None:
        """Refuse tables that have no row for a layer or a head that they are to serve; `heads` by site, None where not known.

        Raises
        ------
        RecipeError
            If one has as many layers or heads as another model.
        """
        for site, known in heads.items():
            for number in self.chosen_among([site]):
                for table in self.rules[number].values.values():
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
            if rule.patch != "dense" and rule.instance is None:  # an instance has been checked when it was made
                self._check_settings(rule, (*self.loc, "rules", i, "with"))

    def _check_settings(self, rule: Rule, loc: Loc) -> None:
        model = patch_class(rule.patch).Config
        varying = {key: read_varying(key, value) for key, value in rule.settings.items() if isinstance(value, Mapping)}
        ramps = {key: value for key, value in varying.items() if isinstance(value, Ramp)}
        for key, value in rule.settings.items():
            if (why := _misplaced(rule, key, value, model)) is not None:
                raise RecipeError(f"{self.source.at((*loc, key))}: {why}")
        constant = at_depth(rule.settings, 100)  # the order of what is told in percent is the same at any depth
        for way in (0.0, 1.0) if ramps else (0.0,):  # the ends of a straight line are its extremes
            try:
                model.model_validate({**constant, **{key: ramp.value(way) for key, ramp in ramps.items()}})
            except ValidationError as error:
                raise RecipeError(explain(error, self.source, loc, lambda _: model)) from error

    def with_cache(self, kind: str, **settings: Any) -> Recipe:
        """Return the recipe with a step cache beside its rules, the first layer dense where the cache looks at it."""
        cache = StepCache.model_validate({"kind": kind, "with": settings})
        dense_first = Rule.model_validate({"where": {"layers": 0}, "patch": "dense"})
        others = tuple(rule for rule in self.rules if rule != dense_first)
        rules = (dense_first, *others) if CACHES[kind].by_first_block else self.rules
        return replace(self, rules=rules, cache=cache, measured=())

    def expected(
        self, steps: int, sites: Sequence[Site] = (), layout: Layout | None = None, first: int = 0
    ) -> Expected | None:
        """Return what it comes to in a run of `steps`, by its rules alone; see `recipe.expecting.expected`.

        `sites`: attention modules of a model; of one of some layers, all of the kind that the rules name, if left out.
        """
        kinds = next((rule.where.kind for rule in self.rules if rule.entry is not None), None) or ("self",)
        return expected(self.decide, steps, sites or layers_of(kinds[0]), layout, first)

    @property
    def by_steps(self) -> bool:
        """Whether what it does goes by the step."""
        return any(rule.where.steps is not None for rule in self.rules)

    def outlook(self) -> str:
        """Return what it comes to in runs of some lengths, in words; empty where it does not go by the step, or not by that alone."""
        tables = any(isinstance(value, Table) for rule in self.rules for value in rule.settings.values())
        if tables or not self.by_steps:  # tables are for the layers of one model
            return ""
        runs = [run for steps in LENGTHS if (run := self.expected(steps)) is not None and run.sparse_steps]
        return summed_up(runs) if runs else ""

    def _computed(self) -> str:
        """How many steps a cache computes that goes by the length of the run."""
        if self.cache is None or not self.cache.by_run:
            return ""
        lengths, computed = (", ".join(map(str, found)) for found in (LENGTHS, map(self.cache.computed, LENGTHS)))
        return f"; of {lengths} steps it computes {computed}"

    @property
    def repairs(self) -> bool:
        """Whether a rule has its patch take its own error off (`repair`)."""
        return any(rule.values.get("repair", "none") != "none" for rule in self.rules)

    def describe(self) -> str:
        """Return the recipe as text for people."""
        lines = [f"{self.name}  {self.cite}".rstrip(), *([f"  {self.summary}"] if self.summary else [])]
        for rule in self.rules:
            lines.append(f"  {rule.where}: {rule}")
        lines.append("  elsewhere: dense")
        lines += [f"  expected: {said}"] if (said := self.outlook()) else []
        if self.repairs:
            lines.append("  its error is repaired, and estimated at run time: plug.report()")
        if self.cache is not None:
            lines.append(f"  step cache: {self.cache}" + self._computed())
        if self.positions is not None:
            lines.append(f"  positions: {self.positions}")
        for row in self.measured:
            psnr = f", PSNR {row.psnr_db.mean:.1f} dB (worst {row.psnr_db.worst:.1f})" if row.psnr_db else ""
            lines.append(f"  measured {row.date} on {row.device}: {row.gain:.2f}x{psnr}, {len(row.seeds)} seeds")
        return "\n".join(lines)

    def __rich__(self) -> RenderableType:
        from rich.text import Text

        return Text(self.describe())

    def to_dict(self) -> dict[str, Any]:
        """Return what it says as plain data; rules as text for people."""
        own = {name: getattr(self, name) for name in ("name", "model", "cite", "summary")}
        cache = None if self.cache is None else self.cache.model_dump(mode="json")
        positions = None if self.positions is None else self.positions.to_mapping()
        rows = [row.model_dump(mode="json", exclude_defaults=True) for row in self.measured]
        rules = [f"{rule.where}: {rule}" for rule in self.rules]
        return own | {"rules": rules, "cache": cache, "positions": positions, "measured": rows}


def _misplaced(rule: Rule, key: str, value: Any, model: Any) -> str | None:
    """Why a setting cannot vary as it does, or None."""
    if key in model.model_fields and in_percent(value) and key not in model.layer_numbers:
        return f"only layers are told in percent of the depth, and {key} of {rule.patch} is not one; write a number."
    if not (isinstance(value, Mapping) and isinstance(read_varying(key, value), Ramp)):
        return None
    if rule.around:
        return f"{rule.patch} stands around generate, where there is no step and no layer to ramp over."
    if key in model.model_fields and float not in model.kinds(key):
        return (
            f"only real numbers ramp, and {key} of {rule.patch} is not one; write a rule for each value, with "
            "where: {steps: ...} or {layers: ...}."
        )
    return None
