"""Recipes: strict per-model YAML that says which patch serves which attention, when, and with which settings."""

from accelplug.recipe.conditions import RunFacts, Span, Where
from accelplug.recipe.expecting import LENGTHS, Expected
from accelplug.recipe.finding import (
    RecipeInfo,
    describe,
    list_recipes,
    load,
    matching_files,
    named,
    presets,
    recipes_for,
    recipes_of,
)
from accelplug.recipe.matching import Match, ModelFacts, match_for
from accelplug.recipe.measured import Measured
from accelplug.recipe.positions import Positions
from accelplug.recipe.reading import SCHEMA, SHIPPED, RecipeFile, model_name, read_file, shipped_files
from accelplug.recipe.recipe import Recipe
from accelplug.recipe.recording import record_measurement, write_recipe
from accelplug.recipe.rules import DENSE, Decision, Rule, StepCache
from accelplug.recipe.settings import at_depth

__all__ = [
    "DENSE",
    "LENGTHS",
    "SCHEMA",
    "SHIPPED",
    "Decision",
    "Expected",
    "Match",
    "Measured",
    "ModelFacts",
    "Positions",
    "Recipe",
    "RecipeFile",
    "RecipeInfo",
    "Rule",
    "RunFacts",
    "Span",
    "StepCache",
    "Where",
    "at_depth",
    "describe",
    "list_recipes",
    "load",
    "match_for",
    "matching_files",
    "model_name",
    "named",
    "presets",
    "read_file",
    "recipes_for",
    "recipes_of",
    "record_measurement",
    "shipped_files",
    "write_recipe",
]
