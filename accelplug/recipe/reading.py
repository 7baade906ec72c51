"""The schema of a recipe file, and the recipes that stand in one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from accelplug.errors import NoMatchError, RecipeError, nearest
from accelplug.recipe import strict_yaml
from accelplug.recipe.conditions import MAX_LIST, Names, Strict, Where, as_list
from accelplug.recipe.explaining import explain, shortened
from accelplug.recipe.matching import MODEL_KINDS, Match
from accelplug.recipe.measured import Measured, Quality, Spread, Task
from accelplug.recipe.positions import Positions
from accelplug.recipe.recipe import Recipe
from accelplug.recipe.rules import Rule, StepCache
from accelplug.recipe.strict_yaml import Loc, Source

SHIPPED = Path(__file__).parents[1] / "recipes"
SCHEMA = 1
MAX_RULES = 256


_NAME = r"^[a-z0-9][a-z0-9._-]*$"


class Entry(Strict):
    cite: str = ""
    summary: str = ""
    rules: tuple[Rule, ...] = Field(min_length=1, max_length=MAX_RULES)
    cache: StepCache | None = None
    positions: Positions | None = None
    measured: tuple[Measured, ...] = Field((), max_length=MAX_LIST)


class _Pipeline(Strict):
    has: Names


class _File(Strict):
    schema_: int = Field(alias="schema")
    model: str = Field(pattern=_NAME)
    base: str | None = Field(None, pattern=_NAME)
    """A shipped file that has what this one lacks: recipes, a default, what they are worth."""
    match: dict[str, Any] = Field(min_length=1)
    default: str | None = None
    summary: str = ""
    worth: str = ""
    recipes: dict[Annotated[str, Field(pattern=_NAME)], Entry] = Field(min_length=1)

    @model_validator(mode="after")
    def _default_is_said(self) -> _File:
        if self.default is None and self.base is None:
            raise ValueError(f"the key 'default' is missing; add it. Recipes: {', '.join(self.recipes)}")
        return self


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

    def recipe(self, name: str | None = None, beside: Iterable[str] = ()) -> Recipe:
        """Return a recipe by its short name, or the default. `beside`: names that other files have for the same models."""
        if name is None:
            return self.recipes[self.default]
        if name not in self.recipes:
            known = dict.fromkeys([*self.recipes, *beside])
            raise NoMatchError(f"{self.model} has no recipe {name!r}{nearest(name, known)}. It has: {', '.join(known)}.")
        return self.recipes[name]

    def describe(self) -> str:
        """Return the file as text for people."""
        head = [self.model, self.summary, self.worth, f"for: {self.match}", f"default: {self.default}"]
        return "\n".join(line for line in head if line) + "\n\n" + "\n\n".join(r.describe() for r in self.recipes.values())


def shipped_files() -> dict[str, Path]:
    """Return the recipe files that come with the package, by model name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


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
    data, source = strict_yaml.parse_yaml(strict_yaml.yaml_text(path), str(path))
    return file_from(data, source, path)


def file_from(data: Any, source: Source, path: Path | None = None) -> RecipeFile:
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if isinstance(schema, int) and schema != SCHEMA:
        cure = "upgrade it: pip install --upgrade accelplug" if schema > SCHEMA else "the first schema is 1"
        raise RecipeError(f"{source.at(('schema',))}: this accelplug reads schema {SCHEMA}, the file has {schema}; {cure}.")
    parsed = validated(_File, data, source)
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
            entry.positions,
        )
        for name, entry in parsed.recipes.items()
    }
    default, worth = parsed.default, parsed.worth
    if parsed.base is not None:
        base = _base(parsed.base, source)
        lacking = {
            name: replace(recipe, name=f"{parsed.model}/{name}", model=parsed.model, match=match)
            for name, recipe in base.recipes.items()
        }
        recipes, default, worth = lacking | recipes, default or base.default, worth or base.worth
    if default not in recipes:
        where = source.at(("default",))
        raise RecipeError(f"{where}: {shortened(default)} is not a recipe of this file; recipes: {', '.join(recipes)}.")
    return RecipeFile(parsed.model, match, default, recipes, parsed.summary, worth, path)


def _base(name: str, source: Source) -> RecipeFile:
    """The file that another one starts from, by name."""
    files = shipped_files()
    if name not in files:
        raise RecipeError(
            f"{source.at(('base',))}: there is no recipe file {name!r}{nearest(name, files)}. Shipped: {', '.join(files)}."
        )
    return read_file(files[name])


def _match(keys: Mapping[str, Any], source: Source) -> Match:
    keys = dict(keys)
    pipeline: tuple[str, ...] = ()
    if "pipeline" in keys:
        pipeline = validated(_Pipeline, keys.pop("pipeline"), source, ("match", "pipeline")).has
    if "class" not in keys and not any(keys.get(kind) is True for kind in MODEL_KINDS):
        raise RecipeError(
            f"{source.at(('match',))}: expected the key class, the model's class name, or vlm: true, for every vision-language model "
            f"that is known, llm: true, for every other model with a decoder, denoiser: true, for every denoiser, or encoder: true, for "
            f"every image encoder, got {', '.join(keys) or 'pipeline alone'}."
        )
    for key, value in keys.items():
        if any(isinstance(item, Mapping | list | tuple) for item in as_list(value)):
            raise RecipeError(f"{source.at(('match', key))}: expected a value or a list of values, got {shortened(value)}.")
    return Match(keys, pipeline)


_MODELS = {"rules": Rule, "where": Where, "pipeline": _Pipeline, "measured": Measured, "recipes": Entry}
_MODELS |= dict.fromkeys(("dense_ms", "ms", "speedup"), Spread) | {"cache": StepCache, "positions": Positions}


def validated(model: Any, data: Any, source: Source, loc: Loc = ()) -> Any:
    """Return `data` as a pydantic model; RecipeError, in our words, where it is none."""

    def at(part: Loc) -> Any:
        # The model whose key is wrong is told by the last name on the way to it: rules[0], recipes.radial, where.
        if len(part) == 2 and part[0] == "recipes":
            return Entry
        names = [name for name in part if isinstance(name, str)]
        if "task" in names[:-1]:
            return Task
        return _MODELS.get(names[-1], Quality) if names else model

    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RecipeError(explain(error, source, loc, at)) from error
