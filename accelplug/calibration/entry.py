"""calibrate(): what a method or a recipe leaves to be measured, found on dense runs of a pipeline, and a recipe that has it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from accelplug import compat, files, show
from accelplug.calibration import hunting
from accelplug.calibration.effects import weigh
from accelplug.calibration.language import OF_LANGUAGE_MODELS, calibrate_language
from accelplug.calibration.rules import rules_with
from accelplug.calibration.tally import Tally
from accelplug.calibration.target import OF_RECIPES, Target, calibration_of
from accelplug.comparison import arguments, calling
from accelplug.comparison.environment import environment
from accelplug.comparison.ranks import working
from accelplug.errors import AccelplugError, NoMatchError, nearest
from accelplug.hosts.host import model_facts, require_ability
from accelplug.plug import apply
from accelplug.recipe import Recipe, load, match_for, matching_files, read_file, strict_yaml, write_recipe
from accelplug.registry import patch_class, patch_entry
from accelplug.table import Origin, Table, write_tables


def calibrate(
    pipe: Any,
    patch: str,
    prompts: str | Sequence[str | Mapping[str, Any]] | None = None,
    *,
    path: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    recipe: Any = None,
    inputs: Mapping[str, Any] | None = None,
    processor: Any = None,
    objective: Any = None,
    seed: int = 0,
    buckets: int = 4,
    dense_steps: str | None = "0:25%",
    progress: bool = True,
) -> Recipe:
    """Run a model dense on some prompts, measure what a method's tables hold, and return a recipe that uses them.

    Several processes (`accelerate launch`, torchrun) share the prompts, each with a pipeline of its own; all get the recipe, the first
    one writes files. The tables are the same to the bit, and a calibration that was cut off goes on with any number of processes.

    One attention call per layer, guidance branch and bucket is looked at, at the step in the bucket's middle, on sampled
    queries; everything else runs as it always does. The pipeline is left as it was. Sums are kept on the CPU.

    Parameters
    ----------
    pipe : a diffusers pipeline, or a language model.
    patch : ``sparse_vdit``, ``paro``, ``sta``: what is calibrated; ``headhunter``: the heads that are guided by; or for the selectors of
        `recipe` ``rest``, the weights of their pooled blocks, or ``budget``, how much each layer, head and span of steps reads at the cost
        of the recipe as it is. Of a language model ``heads``: what its heads are there for (`HeadScores`), by which `duo` chooses; or
        ``layers``: how each reads a long prompt (`LayerKnobs`).
    prompts : one or several, or arguments of the pipeline's call each; one run of `seed` plus its index each. Of a language model a text
        in which needles are hidden, or None: then heads are told by random tokens alone.
    path : where the recipe goes, ``my.yaml``; tables go to ``my.safetensors`` beside it. Until then ``my.partial.safetensors`` is
        written after every run, and taken up again by a call with the same arguments. None: nothing is written.
    config : settings of the patch, as in a recipe.
    options : knobs of the calibration; see the patch's ``Calibration.Config``.
    recipe : what ``rest`` and ``budget`` are for; anything that `accelplug.apply` takes.
    inputs : further arguments of the pipeline's call: size, frames, steps, guidance.
    processor : a language model's, or its tokenizer.
    objective : of ``headhunter``, what its heads are hunted for by: ``sharpness``; ``agreement``, the bundled video model's with its
        caption; ``module:function`` or a function, given frames, float32 (F, H, W, 3) in [0, 1], and the prompt; more is better. It takes
        a run of every prompt for every head: choose few steps, small sizes, or `options` layers. No step of its recipe is left dense.
    buckets : spans of equal length that a run's steps fall into; tables with an axis of steps have one row each.
    dense_steps : steps that the written recipe leaves dense; None for none. They are measured all the same. `recipe` has its own.
    progress : show a progress bar.

    Raises
    ------
    NoMatchError
        If there is no such patch, or it has nothing to calibrate, or no attention was seen.
    AccelplugError
        If `path` is there already, a partial file holds something else, or a knob is unknown.
    UnsupportedError
        If the model is of another kind, or its attention runs on several grids.
    """
    host = require_ability(pipe, "calibrate")
    arguments.require_whole(buckets, "calibrate, buckets", 1)
    arguments.require_whole(seed, "calibrate, seed", 0, 2**62)
    for name, settings in {"config": config, "options": options}.items():
        if not isinstance(settings, Mapping | None):
            raise AccelplugError(f"calibrate, {name}: expected a mapping of settings, got {settings!r}.")
    place = None if path is None else Files(files.output(path, "calibrate writes a recipe", (".yaml", ".yml")))
    if place is not None and (there := place.in_the_way()):
        raise AccelplugError(f"{there} is there already. Give another name, or move it away.")
    if host.gives == "answers":
        return calibrate_language(
            pipe,
            patch,
            prompts,
            processor=processor,
            path=None if place is None else place.recipe,
            config=config or {},
            options=options or {},
            seed=seed,
            progress=progress,
        )
    given = [prompts] if isinstance(prompts, str | Mapping) else prompts
    if isinstance(given, Sequence):
        given = [{"prompt": item} if isinstance(item, str) else item for item in given]
    runs = arguments.calls(pipe, given, "calibrate")
    arguments.calls(pipe, [inputs or {}], "calibrate")
    if patch == hunting.HUNTED:
        return _hunted(pipe, [{**run, **(inputs or {})} for run in runs], objective, config, options, seed, place, progress)
    if objective is not None:
        raise AccelplugError(
            f"calibrate, objective: {patch} is measured by its own error; {hunting.HUNTED} takes an objective."
        )
    calibration_of(patch)  # a wrong name is refused before anything runs
    facts = model_facts(pipe)
    base = load(recipe, facts) if patch in OF_RECIPES else None
    if base is not None:
        base.to_mapping()  # a rule that cannot be written is refused before anything runs
    target = Target(patch, dict(config or {}), dict(options or {}), base)
    target.make()  # a wrong knob is refused before anything runs
    if dense_steps is not None:
        load({"rules": [{"where": {"steps": dense_steps}, "patch": "dense"}]}, facts)
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

    def run(index: int) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed + index)
        with arguments.refusals(pipe, started=lambda: tally.steps):
            return calling.latents_of(pipe, {**runs[index], **(inputs or {}), "generator": generator})

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
                run(index)
            tally.add_up(ranks)
            done = turns.stop
            if place is not None and ranks.first:
                tally.save(place.partial, done)
        why_not = "; ".join(plug.report().fallbacks)
    if not tally.calibrations:
        raise NoMatchError(f"No attention of {type(pipe).__name__} was observed. {why_not or 'Does a rule fit any?'}")
    with working(pipe) as ranks, compat.diffusers.quiet(pipe), torch.no_grad():
        weigh(pipe, tally, lambda: run(0), ranks, progress and ranks.first)
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
    told = [one.told() for one in tally.calibrations.values()]
    grid = "x".join(map(str, tally.grid_thw or ()))
    summary = " ".join([f"Calibrated on {len(runs)} prompts, {tally.steps} steps, {grid} tokens.", *filter(None, told)])
    origin = replace(origin, axes=axes)
    if place is None:
        made = {key: Table(values, axes[key], key=key, origin=origin) for key, values in tables.items()}
        return load({"rules": rules_with(tally, made, dense_steps), "summary": summary}, facts)
    with working(pipe) as ranks:
        if ranks.first:
            refs = write_tables(place.tables, tables, origin)
            rules = rules_with(tally, refs, dense_steps)
            own = [file.match for file in matching_files(facts) if file.match.weight(facts)]
            match = own[0].to_mapping() if len(own) == 1 else match_for(facts)
            cite = base.cite if base is not None else patch_entry(patch).cite
            write_recipe(place.recipe, match, patch, {"cite": cite, "summary": summary, "rules": rules, "measured": []})
            place.partial.unlink(missing_ok=True)
        ranks.gather(None)  # it is there for all
    return load(read_file(place.recipe).recipe(), facts)


def _hunted(
    pipe: Any,
    runs: list[dict[str, Any]],
    objective: Any,
    config: Mapping[str, Any] | None,
    options: Mapping[str, Any] | None,
    seed: int,
    place: Files | None,
    progress: bool,
) -> Recipe:
    """Hunt for heads to guide away from, and return a recipe of them; the scores go beside it."""
    score, facts = hunting.objective_of(objective), model_facts(pipe)
    knobs = hunting.HuntKnobs.read(options, f"Options of calibrate {hunting.HUNTED}")
    fixed = {"heads": "all", **(config or {})}
    patch_class(hunting.HUNTED)(fixed)  # a wrong setting is refused before anything runs
    load({"rules": hunting.recipe_of([(0, 0)], config or {}, knobs)}, facts)
    settings = {
        "objective": objective if isinstance(objective, str) else f"{score.__module__}:{score.__qualname__}",
        "config": dict(config or {}),
        "options": knobs.model_dump(mode="json"),
        "runs": [{key: repr(value) for key, value in run.items()} for run in runs],
        "seed": seed,
        "model": Target.model(facts),
    }
    partial = None if place is None else place.partial.with_suffix(".json")
    found = hunting.hunt(
        pipe, score, runs, config or {}, knobs, seed, json.dumps(settings, sort_keys=True), partial, progress
    )
    rules, told, cite = (
        hunting.recipe_of(found.heads, config or {}, knobs),
        found.told(len(runs)),
        patch_entry(hunting.HUNTED).cite,
    )
    if place is not None and partial is not None:
        made = environment(pipe)
        notes = {"objective": settings["objective"], "prompts": len(runs), "seed": seed, "without guidance": found.before}
        origin = Origin(
            Target.model(facts), patch=hunting.HUNTED, axes=dict.fromkeys(found.tables, ("layers", "heads")), versions=made["versions"],
            git=made["git"], notes=notes,
        )  # fmt: skip
        write_tables(place.tables, found.tables, origin)
        entry = {"cite": cite, "summary": told, "rules": rules, "measured": []}
        write_recipe(place.recipe, match_for(facts), hunting.HUNTED, entry)
        partial.unlink(missing_ok=True)
        return load(read_file(place.recipe).recipe(), facts)
    return load({"rules": rules, "summary": told}, facts)


def split_settings(patch: str, settings: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what ``key=value`` texts set of the patch, and what of its calibration; a key that both have sets both."""
    if patch in OF_LANGUAGE_MODELS:
        measure = OF_LANGUAGE_MODELS[patch]
        knobs, fields = measure.knobs.model_fields, patch_class(measure.patch).Config.model_fields
    elif patch == hunting.HUNTED:
        knobs, fields = hunting.HuntKnobs.model_fields, patch_class(patch).Config.model_fields
    else:
        knobs = calibration_of(patch).Config.model_fields
        fields = {} if patch in OF_RECIPES else patch_class(patch).Config.model_fields
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
        cut_off = self.partial.exists() or self.partial.with_suffix(".json").exists()
        mine = (self.recipe,) if cut_off else (self.recipe, self.tables)
        return next((path for path in mine if path.exists()), None)
