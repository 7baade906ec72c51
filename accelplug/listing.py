"""What there is to apply, on one screen: by model, by patch, or all about one word.

Models and patches are listed from tables and files; torch is imported for the settings of one patch alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from textwrap import wrap
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD

from accelplug.errors import NoMatchError, nearest
from accelplug.recipe import Recipe, RecipeInfo, list_recipes, read_file
from accelplug.registry import PatchEntry, list_patches, patch_class
from accelplug.show import table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

MARKS = "+ its error is repaired, ° measured: `accelplug show MODEL/RECIPE`"

KINDS = ("llm", "vlm")
"""Files whose recipes many models have, and a few of their own."""
AUDIENCES = {
    "pipelines and image encoders": ("sparse", "tokens", "bias"),
    "geometry transformers": ("geometry",),
    "pipelines": ("texts", "guidance"),
    "language models": ("heads", "prefill", "decode", "memory", "generation"),
}
"""Which families of patches are for which models; what other packages add stands with the first that has its family."""


def models() -> Table:
    """Return the shipped recipes, a row for the models that have the same.

    What all models of a kind have, as `llm` and `vlm`, is not told again in the rows of those that have it and more.
    """
    listed: dict[str, tuple[str, ...]] = {}
    for model, group in groupby(list_recipes(), key=lambda info: info.model):
        listed[model] = tuple(_marked(info) for info in sorted(group, key=lambda info: not info.default))
    alike: dict[str, list[str]] = {}
    for model, names in listed.items():
        alike.setdefault(", ".join(_by_kind(names, listed)), []).append(model)
    found = table("", "model", "recipes (the first: default)", caption=MARKS, box=SIMPLE_HEAD, show_edge=False)
    width = max(map(len, listed))
    for recipes, those in alike.items():
        found.add_row("\n".join(wrap(", ".join(those), width, break_on_hyphens=False)), recipes)
    return found


def _by_kind(names: tuple[str, ...], listed: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return a model's recipes, those of a whole kind by its name: the kind whose recipes, and more, they are, and most of them."""
    kinds = [kind for kind in KINDS if set(listed[kind]) < set(names)]
    if not kinds:
        return names
    kind = max(kinds, key=lambda kind: len(listed[kind]))
    first = () if names[0] == listed[kind][0] else names[:1]
    rest = (name for name in names if name not in {*listed[kind], *first})
    return *first, f"all of {kind}", *rest


def patches(chosen: Iterable[PatchEntry] = ()) -> RenderableType:
    """Return the patches, or those that are chosen, for pipelines and for language models apart."""
    from rich.console import Group

    tables = []
    for audience, families in AUDIENCES.items():
        rows = [entry for entry in tuple(chosen) or list_patches() if entry.family in families]
        if rows:
            found = table(f"patches for {audience}", "patch", "what it does")
            for entry in rows:
                found.add_row(entry.name, entry.summary)
            tables.append(found)
    return Group(*tables)


def about(word: str) -> RenderableType:
    """Return all that a word names: one patch with its settings, or the recipes and patches whose names hold the word.

    Raises
    ------
    NoMatchError
        If no model, recipe or patch has it in its name.
    """
    from rich.console import Group

    exact = [entry for entry in list_patches() if entry.name == word]
    recipes = [info for info in list_recipes() if word in f"{info.model}/{info.name}" or (exact and _uses(info, word))]
    found = exact or [entry for entry in list_patches() if word in entry.name]
    if not recipes and not found:
        known = [*(info.model for info in list_recipes()), *(entry.name for entry in list_patches())]
        raise NoMatchError(
            f"Nothing is called {word!r}{nearest(word, known)}: expected models, patches, or a part of a model's or a patch's name. "
            "Run `accelplug list` or `accelplug list patches`."
        )
    parts: list[RenderableType] = [_settings(exact[0])] if exact else [patches(found)] if found else []
    if recipes:
        lines = table("recipes", "recipe", "what it is", "source")
        for info in recipes:
            name = f"{info.model}/{_marked(info)}" + (" *" if info.default else "")
            lines.add_row(name, "\n".join(filter(None, (info.summary, _recipe(info).outlook()))), info.cite)
        parts += [lines, f"* the model's default, {MARKS}"]
    return Group(*parts)


def _marked(info: RecipeInfo) -> str:
    """Return a recipe's name with its marks."""
    return info.name + "+" * info.repairs + "°" * bool(info.measured)


def _recipe(info: RecipeInfo) -> Recipe:
    return read_file(info.path).recipes[info.name]


def _uses(info: RecipeInfo, patch: str) -> bool:
    return any(rule.name == patch for rule in _recipe(info).rules)


def _settings(entry: PatchEntry) -> RenderableType:
    """Return what a patch does, and each of its settings."""
    from rich.console import Group

    lines = table("", "setting", "default", "what it says")
    for name, field in patch_class(entry.name).Config.model_fields.items():
        default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
        lines.add_row(name, default, field.description or "")
    return Group(f"{entry.name}: {entry.summary} {entry.cite}", lines)
