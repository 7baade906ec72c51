"""calibrate() of language models: what is measured by name, and the recipe that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelplug import compat, show
from accelplug.calibration.heads import Knobs, score_heads
from accelplug.calibration.layers import LayerKnobs, choose_layers
from accelplug.calibration.target import Target
from accelplug.chat import tokenizer_of
from accelplug.comparison import arguments
from accelplug.comparison.environment import environment
from accelplug.errors import AccelplugError, NoMatchError, nearest, worded
from accelplug.hosts.host import model_facts
from accelplug.hosts.models import unwrapped
from accelplug.patches.base import Config
from accelplug.recipe import Recipe, load, match_for, read_file, write_recipe
from accelplug.registry import patch_class, patch_entry
from accelplug.table import Origin, Table, write_tables


@dataclass(frozen=True)
class LanguageRun:
    """What is calibrated, on what.

    Attributes
    ----------
    model, tokenizer : the language model, out of its wrappers; its tokenizer, or None.
    text : that is read.
    config, options : settings of the patch, and knobs of the calibration.
    seed : of random draws.
    tell : told how far it is.
    """

    model: Any
    tokenizer: Any
    text: str
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    seed: int
    tell: show.Tell


@dataclass(frozen=True)
class Found:
    """What a calibration gives.

    Attributes
    ----------
    rules : of the recipe, as plain data; a setting that is the name of one of `tables`, in `TableName`, becomes that table.
    tables : float32 (layers, heads), by name.
    summary : what there is to say, in sentences.
    """

    rules: list[dict[str, Any]]
    tables: dict[str, Tensor]
    summary: str


@dataclass(frozen=True)
class TableName:
    """Stands for a table in a rule's settings."""

    name: str


@dataclass(frozen=True)
class Measure:
    """One thing that can be calibrated: what it does, its knobs, the patch that its recipe uses, and how much there is to do.

    `steps` are told by the knobs, the text and the number of layers.
    """

    run: Callable[[LanguageRun], Found]
    knobs: type[Config]
    patch: str
    steps: Callable[[Any, str, int], int]


def heads(asked: LanguageRun) -> Found:
    """Score all heads; the recipe has `duo` go by one of the scores."""
    knobs = Knobs.read(asked.options, "Options of calibrate heads")
    scores = score_heads(asked.model, asked.tokenizer, asked.text, knobs, asked.seed, asked.tell)
    if knobs.by not in scores.tables:
        have = ", ".join(scores.tables)
        raise AccelplugError(
            f"calibrate heads, by: there is no score {knobs.by!r} without a text, or of this model; there are: {have}."
        )
    rule = {"patch": "duo", "with": {**asked.config, "scores": TableName(knobs.by)}}
    return Found([rule], scores.tables, scores.told())


def layers(asked: LanguageRun) -> Found:
    """Choose by layer how a prompt is read."""
    if not asked.text:
        raise AccelplugError(
            "calibrate layers reads prompts out of a text, and got none. "
            + worded("Pass one as prompts.", "Give one: --prompts FILE.")
        )
    ids = torch.tensor(asked.tokenizer(asked.text).input_ids)
    knobs = LayerKnobs.read(asked.options, "Options of calibrate layers")
    chosen = choose_layers(asked.model, ids, knobs, {"prefill_rows": asked.config}, asked.tell)
    return Found(chosen.rules, {}, chosen.told)


OF_LANGUAGE_MODELS: dict[str, Measure] = {
    "heads": Measure(heads, Knobs, "duo", lambda knobs, text, depth: knobs.needles if text else 1),
    "layers": Measure(layers, LayerKnobs, "prefill_rows", lambda knobs, text, depth: knobs.trials(depth)),
}
"""What is calibrated on language models, by name."""


def measure_of(what: Any) -> Measure:
    """Return what is calibrated on language models under a name.

    Raises
    ------
    NoMatchError
        If there is nothing.
    """
    if isinstance(what, str) and what in OF_LANGUAGE_MODELS:
        return OF_LANGUAGE_MODELS[what]
    known = ", ".join(OF_LANGUAGE_MODELS)
    raise NoMatchError(
        f"{what!r} is nothing that is calibrated on language models{nearest(str(what), OF_LANGUAGE_MODELS)}: {known}."
    )


def calibrate_language(
    model: Any,
    what: str,
    text: Any,
    *,
    processor: Any = None,
    path: Path | None,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    seed: int,
    progress: bool,
) -> Recipe:
    """Measure something of a language model and return a recipe that uses it; see `accelplug.calibrate`."""
    measure, (model, processor) = measure_of(what), unwrapped(model, processor)
    text = text if isinstance(text, str) else "\n".join(text or ())
    if text:
        arguments.require_processor(processor, f"calibrate {what}")
    knobs = measure.knobs.read(options, f"Options of calibrate {what}")  # a wrong knob is refused before anything runs
    patch_class(measure.patch)(dict(config))
    facts = model_facts(model)
    steps = measure.steps(knobs, text, compat.transformers.number_of_layers(model.get_decoder()))
    with show.progress("calibrating", steps, progress) as tell:
        found = measure.run(LanguageRun(model, tokenizer_of(processor) if text else None, text, config, options, seed, tell))
    made = environment(model)
    origin = Origin(
        model={
            key: value for key, value in Target.model(facts).items() if key.split(".")[-1] != "dtype"
        },  # heads are the same
        patch=what,
        axes=dict.fromkeys(found.tables, ("layers", "heads")),
        versions=made["versions"],
        git=made["git"],
        notes={"seed": seed, **options},
    )
    if path is None:
        held: Mapping[str, Any] = {
            name: Table(x, ("layers", "heads"), key=name, origin=origin) for name, x in found.tables.items()
        }
        return load({"rules": _settled_rules(found.rules, held), "summary": found.summary}, facts)
    tables = write_tables(path.with_suffix(".safetensors"), found.tables, origin) if found.tables else {}
    rules = _settled_rules(found.rules, tables)
    cite = patch_entry(measure.patch).cite
    write_recipe(path, match_for(facts), what, {"cite": cite, "summary": found.summary, "rules": rules, "measured": []})
    return load(read_file(path).recipe(), facts)


def _settled_rules(rules: list[dict[str, Any]], tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rules with their tables in place."""

    def settled(value: Any) -> Any:
        return tables[value.name] if isinstance(value, TableName) else value

    return [{**rule, "with": {key: settled(value) for key, value in rule.get("with", {}).items()}} for rule in rules]
