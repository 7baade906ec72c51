"""calibrate(): a method's tables, measured on dense runs of a pipeline, and a recipe that uses them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from accelplug import compat, files, show
from accelplug.bounded import Bounded
from accelplug.call import ALL_HEADS, AttentionCall, Clock, Layout, Site
from accelplug.comparison import arguments
from accelplug.comparison.environment import environment
from accelplug.comparison.ranks import Ranks, working
from accelplug.errors import AccelplugError, NoMatchError, UnsupportedError, nearest
from accelplug.hosts.host import model_facts, require_ability
from accelplug.patches.base import Patch
from accelplug.patches.calibration import Calibration, Seen
from accelplug.patches.sparse.rest_weights import RestWeights
from accelplug.patches.sparse.template import WEIGHTED_RESTS, BlockSparse
from accelplug.plug import apply
from accelplug.recipe import DENSE, ModelFacts, Recipe, load, match_for, matching_files, read_file, strict_yaml, write_recipe
from accelplug.registry import list_patches, patch_class, patch_entry
from accelplug.table import Origin, Table, bucket, write_tables


def calibrate(
    pipe: Any,
    patch: str,
    prompts: str | Sequence[str | Mapping[str, Any]],
    *,
    path: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    recipe: Any = None,
    inputs: Mapping[str, Any] | None = None,
    seed: int = 0,
    buckets: int = 4,
    dense_steps: str | None = "0:25%",
    progress: bool = True,
) -> Recipe:
    """Run a pipeline dense on some prompts, measure what a method's tables hold, and return a recipe that uses them.

    Several processes (`accelerate launch`, torchrun) share the prompts, each with a pipeline of its own; all get the recipe, the first
    one writes files. The tables are the same to the bit, and a calibration that was cut off goes on with any number of processes.

    One attention call per layer, guidance branch and bucket is looked at, at the step in the bucket's middle, on sampled
    queries; everything else runs as it always does. The pipeline is left as it was. Sums are kept on the CPU.

    Parameters
    ----------
    pipe : a diffusers pipeline.
    patch : ``sparse_vdit``, ``paro``, ``sta``: what is calibrated; or ``rest``, the weights of pooled blocks for the selectors
        of `recipe`.
    prompts : one or several, or arguments of the pipeline's call each; one run of `seed` plus its index each.
    path : where the recipe goes, ``my.yaml``; tables go to ``my.safetensors`` beside it. Until then ``my.partial.safetensors`` is
        written after every run, and taken up again by a call with the same arguments. None: nothing is written.
    config : settings of the patch, as in a recipe.
    options : knobs of the calibration; see the patch's ``Calibration.Config``.
    recipe : what ``rest`` is for; anything that `accelplug.apply` takes.
    inputs : further arguments of the pipeline's call: size, frames, steps, guidance.
    buckets : spans of equal length that a run's steps fall into; tables with an axis of steps have one row each.
    dense_steps : steps that the written recipe leaves dense; None for none. They are measured all the same.
    progress : show a progress bar.

    Raises
    ------
    NoMatchError
        If there is no such patch, or it has nothing to calibrate, or no attention was seen.
    AccelplugError
        If `path` is there already, a partial file holds something else, or a knob is unknown.
    UnsupportedError
        If the model is not a pipeline, or its attention runs on several grids.
    """
    require_ability(pipe, "calibrate")
    arguments.require_whole(buckets, "calibrate, buckets", 1)
    arguments.require_whole(seed, "calibrate, seed", 0, 2**62)
    given = [prompts] if isinstance(prompts, str | Mapping) else prompts
    if isinstance(given, Sequence):
        given = [{"prompt": item} if isinstance(item, str) else item for item in given]
    runs = arguments.calls(pipe, given, "calibrate")
    arguments.calls(pipe, [inputs or {}], "calibrate")
    for name, settings in {"config": config, "options": options}.items():
        if not isinstance(settings, Mapping | None):
            raise AccelplugError(f"calibrate, {name}: expected a mapping of settings, got {settings!r}.")
    facts = model_facts(pipe)
    base = load(recipe, facts) if patch == "rest" else None
    if base is not None:
        base.to_mapping()  # a rule that cannot be written is refused before anything runs
    target = Target(patch, dict(config or {}), dict(options or {}), base)
    target.make()  # a wrong knob is refused before anything runs
    if dense_steps is not None:
        load({"rules": [{"where": {"steps": dense_steps}, "patch": "dense"}]}, facts)
    place = None if path is None else Files(files.output(path, "calibrate writes a recipe", (".yaml", ".yml")))
    if place is not None and (there := place.in_the_way()):
        raise AccelplugError(f"{there} is there already. Give another name, or move it away.")
    settings = {
        "patch": patch,
        "config": target.config,
        "options": target.options,
        "recipe": base.describe() if base else None,
        "runs": [{key: repr(value) for key, value in {**run, **(inputs or {})}.items()} for run in runs],
        "seed": seed,
        "buckets": buckets,
        "model": target.model(facts),
    }
    tally = Tally(target, len(runs), buckets, seed, json.dumps(settings, sort_keys=True))
    done = tally.resume(place.partial) if place is not None else 0
    with (
        working(pipe) as ranks,
        apply(pipe, tally.watcher, gate="off", deterministic=True) as plug,
        show.progress("calibrating", tally.turns, progress and ranks.first) as tell,
        compat.diffusers.quiet(pipe),
        torch.no_grad(),
    ):
        while done < tally.turns:
            turns = tally.round(done, ranks.parts)
            for turn in ranks.share(turns):
                index = tally.start(turn, tell)
                generator = torch.Generator("cpu").manual_seed(seed + index)
                with arguments.refusals(pipe, started=lambda: tally.steps):
                    pipe(**{"output_type": "latent", **runs[index], **(inputs or {}), "generator": generator})
            tally.add_up(ranks)
            done = turns.stop
            if place is not None and ranks.first:
                tally.save(place.partial, done)
        why_not = "; ".join(plug.report().fallbacks)
    if not tally.calibrations:
        raise NoMatchError(f"No attention of {type(pipe).__name__} was observed. {why_not or 'Does a rule fit any?'}")
    origin = Origin(
        model=target.model(facts),
        grid_thw=tally.grid_thw,
        steps=tally.steps,
        patch=patch,
        versions=environment(pipe)["versions"],
        git=environment(pipe)["git"],
        notes={"prompts": len(runs), "seed": seed, "buckets": buckets, **target.options},
    )
    tables, axes = tally.tables()
    origin = replace(origin, axes=axes)
    if place is None:
        made = {key: Table(values, axes[key], key=key, origin=origin) for key, values in tables.items()}
        return load({"rules": target.rules(tally, made, dense_steps)}, facts)
    summary = f"Calibrated on {len(runs)} prompts, {tally.steps} steps, {'x'.join(map(str, tally.grid_thw or ()))} tokens."
    with working(pipe) as ranks:
        if ranks.first:
            refs = write_tables(place.tables, tables, origin)
            rules = target.rules(tally, refs, dense_steps)
            shipped = matching_files(facts)
            match = shipped[0].match.to_mapping() if len(shipped) == 1 else match_for(facts)
            cite = base.cite if base is not None else patch_entry(patch).cite
            write_recipe(place.recipe, match, patch, {"cite": cite, "summary": summary, "rules": rules, "measured": []})
            place.partial.unlink(missing_ok=True)
        ranks.gather(None)  # it is there for all
    return load(read_file(place.recipe).recipe(), facts)


def split_settings(patch: str, settings: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what ``key=value`` texts set of the patch, and what of its calibration; a key that both have sets both."""
    cls = RestWeights if patch == "rest" else _calibration(patch)
    knobs, fields = cls.Config.model_fields, {} if patch == "rest" else patch_class(patch).Config.model_fields
    config, options = {}, {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not {key} & (set(fields) | set(knobs)):
            raise AccelplugError(
                f"--set takes key=value, of {', '.join(sorted({*fields, *knobs}))}{nearest(key, [*fields, *knobs])}."
            )
        parsed, _ = strict_yaml.parse_yaml(f"value: {value}", f"--set {text}")
        if key in fields:
            config[key] = parsed["value"]
        if key in knobs:
            options[key] = parsed["value"]
    return config, options


def _calibration(patch: str) -> type[Calibration]:
    if (found := patch_class(patch).Calibration) is not None:
        return found
    known = [entry.name for entry in list_patches() if entry.family == "sparse" and patch_class(entry.name).Calibration]
    raise NoMatchError(f"{patch} has nothing to calibrate. These have: rest, {', '.join(known)}.")


@dataclass(frozen=True)
class Files:
    """What a calibration writes."""

    recipe: Path

    @property
    def tables(self) -> Path:
        return self.recipe.with_suffix(".safetensors")

    @property
    def partial(self) -> Path:
        return self.recipe.with_suffix(".partial.safetensors")

    def in_the_way(self) -> Path | None:
        """A file that would be lost. Tables beside a partial file are this calibration's own, written when it was cut off."""
        mine = (self.recipe,) if self.partial.exists() else (self.recipe, self.tables)
        return next((path for path in mine if path.exists()), None)


@dataclass(frozen=True)
class Target:
    """What is calibrated: a method, or the weights of pooled blocks for the selectors of a recipe."""

    patch: str
    config: dict[str, Any]
    options: dict[str, Any]
    base: Recipe | None
    selectors: Bounded[tuple[str, str], Any] = field(default_factory=lambda: Bounded(64))

    def make(self) -> Calibration:
        """Return a fresh calibration.

        Raises
        ------
        NoMatchError, AccelplugError
            If there is none, or a knob is unknown or out of range.
        """
        if self.patch == "rest":
            return RestWeights(self.selector, self.options)
        cls = patch_class(self.patch)
        return _calibration(self.patch)(cls(self.config), self.options)

    def selector(self, site: Site, layout: Layout, clock: Clock) -> Any:
        """Return the block-sparse patch that the base recipe has answer there and then, or None."""
        decision = self.base.decide(site, layout, clock) if self.base is not None else DENSE
        if decision.patch is None:
            return None
        name, config = decision.patch, decision.config
        patch = self.selectors.get((name, repr(sorted(config.items()))), lambda: patch_class(name)(config))
        return patch if isinstance(patch, BlockSparse) else None

    @staticmethod
    def model(facts: ModelFacts) -> dict[str, Any]:
        """What the tables are for, as JSON gives it back."""
        plain = json.loads(json.dumps({k: v for k, v in facts.config.items() if not k.startswith("_")}, default=str))
        return {"class": facts.class_names[0], **plain}

    def rules(self, tally: Tally, tables: Mapping[str, Any], dense_steps: str | None) -> list[dict[str, Any]]:
        """Return the rules of the recipe, as plain data but for the tables."""
        if self.base is not None:
            return [rule for found in self.base.rules for rule in self._weighted(found, tally, tables)]
        rules: list[dict[str, Any]] = (
            [{"where": {"steps": dense_steps}, "patch": "dense"}] if dense_steps is not None else []
        )
        for denoiser, calibration in tally.calibrations.items():
            where = {"denoiser": denoiser} if len(tally.calibrations) > 1 else {}
            mine = {key: tables[tally.key(denoiser, key)] for key in calibration.axes}
            rules.append(
                {"where": {"kind": sorted(tally.kinds), **where}, "patch": self.patch, "with": {**self.config, **mine}}
            )
        return rules

    def _weighted(self, rule: Any, tally: Tally, tables: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """A rule of the base recipe; where its patch pools, one per denoiser, with the weights."""
        plain = {"where": {}, **rule.to_mapping()}
        pools = (
            rule.patch != "dense"
            and getattr(patch_class(rule.patch)(_constants(rule.settings)).config, "rest", "") in WEIGHTED_RESTS
        )
        if not pools:
            yield plain
            return
        for denoiser in tally.calibrations:
            where = {"denoiser": denoiser} if len(tally.calibrations) > 1 else {}
            weights = {"rest_weight": tables[tally.key(denoiser, "rest_weight")]}
            yield {**plain, "where": {**plain["where"], **where}, "with": {**plain.get("with", {}), **weights}}


def _constants(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings but for ramps, whose values do not matter here."""
    return {key: value for key, value in settings.items() if not isinstance(value, Mapping)}


@dataclass
class Tally:
    """The runs of one calibration, and what they gave so far."""

    target: Target
    prompts: int
    buckets: int
    seed: int
    settings: str
    """All that the result depends on, as JSON: a partial file must agree."""
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    """By denoiser, those that saw a call."""
    grid_thw: tuple[int, int, int] | None = None
    steps: int | None = None
    kinds: set[str] = field(default_factory=set)
    turn: int = 0
    settled: dict[str, list[str]] = field(default_factory=dict)
    """By denoiser, names of the sums that earlier parts made."""
    before: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By denoiser, the sums of this part up to the present round."""

    def __post_init__(self) -> None:
        self.watcher = Watcher(self)
        self.turns = self.target.make().parts * self.prompts
        self._tell: show.Tell = lambda done, now="": None

    def start(self, turn: int, tell: show.Tell) -> int:
        """Begin a run of the pipeline; return which prompt it is for."""
        self.turn, self._tell = turn, tell
        return turn % self.prompts

    def round(self, done: int, number: int) -> range:
        """Begin a round: the next runs, `number` at most, all of one part. Each is summed for itself."""
        if done % self.prompts == 0:
            self.settled = {name: list(one.state) for name, one in self.calibrations.items()}
        self.before = self._pop_sums()
        return range(done, min(done + number, (done // self.prompts + 1) * self.prompts))

    def add_up(self, ranks: Ranks) -> None:
        """End a round: add to the sums, in the order of the runs, what every process saw."""
        found = ranks.gather((self._pop_sums(), self.grid_thw, self.steps, self.kinds))
        for sums in (self.before, *(part[0] for part in found)):
            for name, tensors in sums.items():
                state = self.calibrations.setdefault(name, self.target.make()).state
                for key, x in tensors.items():
                    state[key] = state[key] + x if key in state else x
        for _, grid_thw, steps, kinds in found:
            self._on(grid_thw, "the denoiser")
            self.steps = steps if self.steps is None else self.steps
            self.kinds |= kinds

    def _pop_sums(self) -> dict[str, dict[str, Tensor]]:
        """Take this part's sums out of the calibrations."""
        return {
            name: {key: one.state.pop(key) for key in list(one.state) if key not in self.settled.get(name, ())}
            for name, one in self.calibrations.items()
        }

    def _on(self, grid_thw: tuple[int, int, int] | None, denoiser: str) -> None:
        """Take note of the grid of a call."""
        if None not in (self.grid_thw, grid_thw) and self.grid_thw != grid_thw:
            raise UnsupportedError(
                f"calibrate knows one grid per model, {denoiser} attends on {self.grid_thw} and {grid_thw} tokens."
            )
        self.grid_thw = grid_thw or self.grid_thw

    def due(self, site: Site, layout: Layout, clock: Clock) -> int | None:
        """Which bucket a call is looked at for, if at all: the step in its middle stands for it."""
        if site.heads != ALL_HEADS:
            raise UnsupportedError(
                f"calibrate looks at all heads of a layer, and {site.denoiser} has them shared out over {site.heads.ranks} ranks. "
                "Calibrate without tensor or context parallelism."
            )
        if clock.step is None or clock.steps is None:
            raise UnsupportedError("calibrate must know the diffusion step, and this pipeline's scheduler does not say it.")
        self._tell(self.turn + (clock.step + 1) / clock.steps, f"run {self.turn + 1} of {self.turns}")
        found = bucket(clock, buckets := min(self.buckets, clock.steps))
        steps = [step for step in range(clock.steps) if bucket(Clock(step, clock.steps), buckets) == found]
        return found if site.layer is not None and clock.step == steps[len(steps) // 2] else None

    def observe(self, place: Due, call: AttentionCall, out: Tensor) -> None:
        """Hand a dense call to the denoiser's calibration."""
        site, layout, clock = place.site, place.layout, place.clock
        self._on(layout.grid_thw, site.denoiser)
        self.steps = clock.steps
        self.kinds.add(site.kind)
        text = f"{self.seed} {self.turn} {site.denoiser} {site.module} {clock.step} {clock.branch}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
        generator = torch.Generator().manual_seed(number)
        if site.denoiser not in self.calibrations:
            self.calibrations[site.denoiser] = self.target.make()
        buckets = min(self.buckets, clock.steps or 1)
        seen = Seen(call, out, site, layout, clock, place.bucket, buckets, generator)
        self.calibrations[site.denoiser].observe(seen, self.turn // self.prompts)

    # --------------------------------------------------------------------------------------------------- results

    def key(self, denoiser: str, key: str) -> str:
        """Name of a table in the file."""
        return f"{denoiser}.{key}" if len(self.calibrations) > 1 else key

    def tables(self) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
        """Return all tables and their axes."""
        tables, axes = {}, {}
        for denoiser, calibration in self.calibrations.items():
            for key, values in calibration.tables().items():
                tables[self.key(denoiser, key)] = values.contiguous()
                axes[self.key(denoiser, key)] = calibration.axes[key]
        return tables, axes

    def save(self, path: Path, turns: int) -> None:
        """Write the state after `turns` runs."""
        facts = asdict(Partial(self.settings, turns, self.grid_thw, self.steps, sorted(self.kinds), self.settled))
        tensors = {f"{name}/{key}": x for name, one in self.calibrations.items() for key, x in one.state.items()}
        files.write(path, save(tensors, {"partial": json.dumps(facts)}))

    def resume(self, path: Path) -> int:
        """Take up what `path` holds, if it is there; return how many runs it holds."""
        if not path.exists():
            return 0
        try:
            with safe_open(path, "pt") as file:
                facts = TypeAdapter(Partial).validate_json((file.metadata() or {})["partial"])
                tensors = {tuple(key.split("/", 1)): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise AccelplugError(f"{path}: no partial calibration: {error}. Delete it to start anew.") from error
        if facts.settings != self.settings or not 0 <= facts.turns <= self.turns:
            raise AccelplugError(
                f"{path} holds a calibration with other prompts, knobs or sizes, or of another model. "
                "Delete it to start anew, or give another path."
            )
        for (denoiser, *name), value in tensors.items():
            self.calibrations.setdefault(denoiser, self.target.make()).state["/".join(name)] = value
        self.grid_thw, self.steps = facts.grid_thw, facts.steps
        self.kinds, self.settled = set(facts.kinds), facts.settled
        return facts.turns


@dataclass(frozen=True)
class Partial:
    """What a partial file says of its sums: see `Tally`. `turns` are the runs that are in them."""

    settings: str
    turns: int
    grid_thw: tuple[int, int, int] | None
    steps: int | None
    kinds: list[str]
    settled: dict[str, list[str]]


@dataclass(frozen=True)
class Due:
    """Where and when a call is that is looked at."""

    site: Site
    layout: Layout
    clock: Clock
    bucket: int

    def to(self, device: Any) -> Due:
        """Nothing here lies on a device."""
        return self


class Watcher(Patch):
    """Runs dense, and shows what is due to a tally."""

    name, family = "watch", "sparse"
    speed = False

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Due | None:
        due = self._tally.due(site, layout, clock) if site.kind in ("self", "joint") else None
        return None if due is None else Due(site, layout, clock, due)

    def attend(self, call: AttentionCall, params: Due) -> Tensor:
        out = call.dense()
        self._show(params, call, out)
        return out

    @torch.compiler.disable
    def _show(self, place: Due, call: AttentionCall, out: Tensor) -> None:
        self._tally.observe(place, call, out)
