"""Which recipe is meant: by name, by path, as a mapping, or by the model that it is for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelplug.call import Site
from accelplug.errors import NoMatchError, RecipeError, nearest, worded
from accelplug.recipe import strict_yaml
from accelplug.recipe.explaining import shortened
from accelplug.recipe.matching import ModelFacts
from accelplug.recipe.reading import Entry, RecipeFile, file_from, read_file, shipped_files, validated
from accelplug.recipe.recipe import Recipe
from accelplug.recipe.rules import Rule, instance_name
from accelplug.recipe.strict_yaml import Source

if TYPE_CHECKING:
    from rich.text import Text

    from accelplug.patches.base import Patch


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
    repairs: bool
    """Whether a rule has its patch take its own error off."""
    path: Path


def list_recipes() -> list[RecipeInfo]:
    """Return all recipes that come with the package."""
    files = [(path, read_file(path)) for path in shipped_files().values()]
    return [
        RecipeInfo(file.model, name, r.cite, r.summary, name == file.default, len(r.measured), r.repairs, path)
        for path, file in files
        for name, r in file.recipes.items()
    ]


def matching_files(facts: ModelFacts) -> list[RecipeFile]:
    """Return the shipped files that fit a model best: one, none, or several that fit equally well."""
    files = _fitting(facts)
    best = max((file.match.weight(facts) for file in files), default=0)
    return [file for file in files if file.match.weight(facts) == best]


def _fitting(facts: ModelFacts) -> list[RecipeFile]:
    return [file for file in map(read_file, shipped_files().values()) if file.match.fits(facts)]


def recipes_of(facts: ModelFacts) -> dict[str, Recipe]:
    """Return the shipped recipes that a model takes by their short names, by full name.

    They are those of the files that fit best, and, under names that these leave free, those of the file for all models of its kind.
    """
    own = matching_files(facts)
    taken = {name for file in own for name in file.recipes}
    found = {recipe.name: recipe for file in own for recipe in file.recipes.values()}
    return found | {
        recipe.name: recipe for file in _for_all(facts) for name, recipe in file.recipes.items() if name not in taken
    }


def presets(facts: ModelFacts) -> list[Recipe]:
    """Return the recipes that all models of a kind have, the default first; a model's own take the place of those of the same name."""
    names = [name for file in _for_all(facts) for name in sorted(file.recipes, key=lambda name: name != file.default)]
    return [_by_short_name(facts, name) for name in names]


def _for_all(facts: ModelFacts) -> list[RecipeFile]:
    """The file for all models of a kind, or none."""
    return [file for file in _fitting(facts) if not file.match.weight(facts)]


def load(recipe: str | Path | Mapping[str, Any] | Recipe | Patch | None, facts: ModelFacts) -> Recipe:
    """Return the recipe that is meant, checked in full and fitting the model.

    Parameters
    ----------
    recipe : None for the default of the shipped file that matches; ``radial``, a recipe of that file; ``wan2.1-t2v-14b`` or
        ``wan2.1-t2v-14b/radial``, by full name; a path (a `Path`, or text that ends in .yaml or .yml), its default; a mapping
        like a file, like one recipe ``{rules: [...]}``, or like one rule ``{patch: radial, with: {...}}``; a `Recipe`; or an
        instance of a patch, for every self- and joint-attention. The rule of a mapping may hold an instance as its patch, too.
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
            "Take a recipe for this model, or copy the rules into a "
            + worded("mapping {rules: [...]} to try them on it.", "file of your own to try them on it.")
        )
    found = found.with_tables(facts)
    found.check()
    return found


def _find(recipe: str | Path | Mapping[str, Any] | Patch | None, facts: ModelFacts) -> Recipe:
    if isinstance(recipe, Mapping):
        return _inline(recipe)
    if isinstance(recipe, Path) or (isinstance(recipe, str) and recipe.endswith((".yaml", ".yml"))):
        return read_file(Path(recipe)).recipe()
    if recipe is None:
        return _matching_file(facts).recipe()
    if not isinstance(recipe, str):
        return _everywhere(recipe)
    if "/" in recipe or recipe in shipped_files():
        return named(recipe)
    return _by_short_name(facts, _require_name(recipe))


def _everywhere(patch: Any) -> Recipe:
    if isinstance(patch, int | float | list | tuple):
        kinds = "a name, a path, a mapping, a Recipe or an instance of a patch"
        raise RecipeError(f"A recipe is {kinds}, got {shortened(patch)}.")
    rule = validated(Rule, {"patch": patch}, Source("<instance>"))
    return Recipe(instance_name(rule.patch), "custom", (rule,))


def named(name: str) -> Recipe:
    """Return a shipped recipe by full name, ``wan2.1-t2v-14b/radial``, or a file's default by the model's name."""
    model, _, short = _require_name(name).partition("/")
    return _shipped(model).recipe(short or None)


def _require_name(name: str) -> str:
    """Refuse names that could be taken for paths; names are only ever looked up in the list of shipped files."""
    if ".." in name or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?", name):
        raise RecipeError(
            f"{shortened(name)} is not a recipe name: expected 'radial' or 'wan2.1-t2v-14b/radial'. "
            f"For a file of your own give its path, {worded('as a Path or ', '')}ending in .yaml."
        )
    return name


def _shipped(model: str) -> RecipeFile:
    files = shipped_files()
    if model not in files:
        raise NoMatchError(f"There is no recipe file {model!r}{nearest(model, files)}. Shipped: {', '.join(files)}.")
    return read_file(files[model])


def _by_short_name(facts: ModelFacts, name: str) -> Recipe:
    """A recipe of the file that fits best, or else of the one for all models of the kind."""
    for_all = {short: recipe for file in _for_all(facts) for short, recipe in file.recipes.items()}
    if name in for_all and not any(name in file.recipes for file in matching_files(facts)):
        return for_all[name]
    return _matching_file(facts, name).recipe(name, beside=for_all)


def _matching_file(facts: ModelFacts, name: str | None = None) -> RecipeFile:
    files = matching_files(facts)
    wanted = f"/{name}" if name else ""
    if not files:
        raise NoMatchError(
            f"No shipped recipe file is for this {facts.class_names[0]}. Shipped: {', '.join(shipped_files())}. "
            + worded(
                "Give a path or a mapping, such as {'patch': 'sol', 'with': {'tau': 1.0}}.",
                "Give a file of your own: --recipe FILE.yaml.",
            )
        )
    if len(files) > 1:
        names = " or ".join(f"{file.model}{wanted or '/' + file.default}" for file in files)
        raise RecipeError(f"This {facts.class_names[0]} fits several recipe files equally well. Name one: {names}.")
    return files[0]


def _inline(data: Mapping[str, Any]) -> Recipe:
    source = Source("<mapping>")
    data = strict_yaml.bounded_copy(data, source)
    if "recipes" in data or "schema" in data:
        return file_from(data, source).recipe()
    if "rules" in data:
        entry, loc = validated(Entry, dict(data), source), ()
        about = entry.cite, entry.summary, entry.measured, entry.cache
        return Recipe("custom", "custom", entry.rules, *about, source=source, loc=loc)
    if "patch" in data:
        return Recipe("custom", "custom", (validated(Rule, dict(data), source),), source=source)
    raise RecipeError(
        f"A recipe mapping has the keys of a file (schema, model, match, default, recipes), of one recipe (rules), or of one "
        f"rule (patch, with, where), got: {', '.join(map(str, data)) or 'nothing'}."
    )


def describe(recipe: str | Path) -> Text:
    """Return a shipped file, a shipped recipe or a file of your own as text for people."""
    from rich.text import Text  # so that reading recipes does not bring the terminal along

    if isinstance(recipe, Path) or recipe.endswith((".yaml", ".yml")):
        return Text(read_file(Path(recipe)).describe())
    return Text(named(recipe).describe() if "/" in recipe else _shipped(_require_name(recipe)).describe())


def recipes_for(facts: ModelFacts, sites: Sequence[Site]) -> dict[str, str]:
    """Return the shipped recipes that a model takes by name, by full name, with what each would touch of its `sites`."""
    defaults = {f"{file.model}/{file.default}" for file in matching_files(facts)}
    recipes = {}
    for name, recipe in recipes_of(facts).items():
        touched = sum(recipe.may_touch(site) for site in sites)
        around = "around generate(), " if recipe.around() else ""
        said = [f"{around}{touched} of {len(sites)} sites"]
        said += ["repaired"] if recipe.repairs else []
        recipes[name] = ", ".join([*said, *(["default"] if name in defaults else [])])
    return recipes
