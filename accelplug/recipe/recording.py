"""Writing recipe files: a new one, or a measured row into one, with every other character as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from accelplug import files
from accelplug.errors import RecipeError
from accelplug.recipe import strict_yaml
from accelplug.recipe.measured import Measured
from accelplug.recipe.reading import SCHEMA, model_name, read_file, validated
from accelplug.recipe.strict_yaml import Source
from accelplug.show import jsonable


def write_recipe(path: Path, match: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> Path:
    """Write a recipe file with one recipe, which is also the default.

    Parameters
    ----------
    path : the file; the model is called by its name.
    match : keys that a model must have, see `match_for`.
    name : of the recipe.
    entry : the recipe as it stands in a file: ``rules``, ``cite``, ``summary``, ``measured`` ...

    Raises
    ------
    AccelplugError
        If it cannot be written.
    """
    data = {"schema": SCHEMA, "model": model_name(path), "match": match, "default": name, "recipes": {name: entry}}
    return files.write(
        path, yaml.safe_dump(jsonable(data), sort_keys=False, width=120, default_flow_style=None, allow_unicode=True)
    )


def record_measurement(path: Path, recipe: str, row: Mapping[str, Any]) -> None:
    """Append a `measured` row to a recipe of a file; every other character of the file stays.

    Parameters
    ----------
    path : the recipe file.
    recipe : short name of the recipe.
    row : keys of `Measured`.

    Raises
    ------
    RecipeError
        If the row or the file does not follow the schema, or the file's style leaves no place for the row; the file is then
        as before.
    NoMatchError
        If the file has no such recipe.
    """
    source = Source("<measured row>")
    measured = validated(Measured, strict_yaml.bounded_copy(row, source), source)
    plain = measured.model_dump(exclude_defaults=True)
    text = strict_yaml.yaml_text(path)
    before = read_file(path)
    if (stands := before.recipe(recipe).path) != path:
        raise RecipeError(
            f"{path}: {recipe!r} stands in {stands}, its base; copy it into this file, and the row can be added."
        )
    after = _with_row(text, str(path), recipe, plain)
    new, _ = strict_yaml.parse_yaml(after, str(path))
    old, _ = strict_yaml.parse_yaml(text, str(path))
    old["recipes"][recipe]["measured"] = [*(old["recipes"][recipe].get("measured") or []), plain]
    if new != old:
        raise RecipeError(f"{path}: the row cannot be added without changing the rest; write measured: as a block list.")
    files.write(path, after)


def _with_row(text: str, name: str, recipe: str, row: Mapping[str, Any]) -> str:
    node = _child(_child(strict_yaml.compose_yaml(text, name), "recipes"), recipe)
    if node.flow_style:
        raise RecipeError(f"{name}: write recipe {recipe!r} as a block, one key a line, so that a row can be added.")
    newline = "\r\n" if "\r\n" in text else "\n"
    item = "- {" + ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in row.items()) + "}"
    indent = " " * node.start_mark.column
    measured = _child(node, "measured")
    if measured is None or not measured.value:
        key = f"{indent}measured:{newline}" if measured is None else ""
        if measured is None:
            at = _line_end(text, _last(node).end_mark.index)
            return f"{text[:at]}{newline}{key}{indent}  {item}{text[at:]}"
        start, end = measured.start_mark.index, measured.end_mark.index
        rest = _line_end(text, end)  # a comment behind [] stays on the line of its key
        return f"{text[:start].rstrip(' ')}{text[end:rest]}{newline}{indent}  {item}{text[rest:]}"
    if measured.flow_style:
        end = measured.end_mark.index - 1
        return f"{text[:end].rstrip()}, {item[2:]}{text[end:]}"
    at = _line_end(text, _last(measured).end_mark.index)
    return f"{text[:at]}{newline}{' ' * measured.start_mark.column}{item}{text[at:]}"


def _child(node: Any, key: str) -> Any:
    return next((value for name, value in node.value if name.value == key), None)


def _last(node: yaml.Node) -> yaml.Node:
    """Return the last leaf: the end of a block collection lies behind the comments that follow it."""
    while isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    return node


def _line_end(text: str, index: int) -> int:
    end = text.find("\n", index)
    end = len(text) if end < 0 else end
    return end - 1 if text[:end].endswith("\r") else end
