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
    return _Fitting.to(facts).best


@dataclass(frozen=True)
class _Fitting:
    """The shipped files that fit a model.

    Attributes
    ----------
    best : those that fit it best, equally well.
    for_all : recipes by short name that all models of its kind have, the default first.
    """

    best: list[RecipeFile]
    for_all: dict[str, Recipe]

    @classmethod
    def to(cls, facts: ModelFacts) -> _Fitting:
        found = [file for file in map(read_file, shipped_files().values()) if file.match.fits(facts)]
        weights = {file.model: file.match.weight(facts) for file in found}
        for_all: dict[str, Recipe] = {}
        for file in found:
            if not weights[file.model]:
                for_all |= {file.default: file.recipe(), **file.recipes}
        return cls([file for file in found if weights[file.model] == max(weights.values())], for_all)

    def takes(self, name: str) -> bool:
        """Whether a name is that of a recipe for all, and no file that fits better has it."""
        return name in self.for_all and not any(name in file.recipes for file in self.best)

    def recipes(self) -> dict[str, Recipe]:
        """All that the model takes by short names, by full name."""
        own = {recipe.name: recipe for file in self.best for recipe in file.recipes.values()}
        return own | {recipe.name: recipe for name, recipe in self.for_all.items() if self.takes(name)}


def recipes_of(facts: ModelFacts) -> dict[str, Recipe]:
    """Return the shipped recipes that a model takes by their short names, by full name.

    They are those of the files that fit best, and, under names that these leave free, those of the file for all models of its kind.
    """
    return _Fitting.to(facts).recipes()


def presets(facts: ModelFacts) -> list[Recipe]:
    """Return the recipes that all models of a kind have, the default first; a model's own take the place of those of the same name."""
    fitting = _Fitting.to(facts)
    own = {name: recipe for file in fitting.best for name, recipe in file.recipes.items()}
    return [own.get(name, recipe) for name, recipe in fitting.for_all.items()]


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
    parts = [facts] if facts.tower is None else [facts, facts.tower]
    if found.match is not None and not any(map(found.match.fits, parts)):
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
        return _of_model(facts)
    if not isinstance(recipe, str):
        return _everywhere(recipe)
    if "/" in recipe or recipe in shipped_files():
        return named(recipe)
    return _of_model(facts, _require_name(recipe))


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


def _of_model(facts: ModelFacts, name: str | None = None) -> Recipe:
    """A recipe of the file that fits best, or of the one for all models of the kind."""
    fitting = _Fitting.to(facts)
    files, wanted = fitting.best, f"/{name}" if name else ""
    if name is not None and fitting.takes(name):
        return fitting.for_all[name]
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
    return files[0].recipe(name, beside=fitting.for_all)


def _inline(data: Mapping[str, Any]) -> Recipe:
    source = Source("<mapping>")
    data = strict_yaml.bounded_copy(data, source)
    if "recipes" in data or "schema" in data:
        return file_from(data, source).recipe()
    if "rules" in data:
        entry, loc = validated(Entry, dict(data), source), ()
        about = entry.cite, entry.summary, entry.measured, entry.cache
        return Recipe("custom", "custom", entry.rules, *about, source=source, loc=loc, positions=entry.positions)
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
    fitting = _Fitting.to(facts)
    defaults = {f"{file.model}/{file.default}" for file in fitting.best}
    recipes = {}
    for name, recipe in fitting.recipes().items():
        touched = sum(recipe.may_touch(site) for site in sites)
        said = [f"{touched} of {len(sites)} sites"] if touched or not recipe.around() else []
        said += ["generate()"] if recipe.around() else []
        said += ["repaired"] if recipe.repairs else []
        recipes[name] = ", ".join([*said, *(["default"] if name in defaults else [])])
    return recipes
