"""YAML for files from strangers: data only, bounded in size, without aliases, and every value knows its line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from accelplug.errors import RecipeError

MAX_BYTES = 1 << 20
"""Largest file that is read at all; a shipped recipe file has a few KiB."""

Loc = tuple[str | int, ...]
"""Where a value stands: keys and list indices from the root."""


@dataclass(frozen=True)
class Source:
    """Where data came from, for error messages."""

    name: str
    lines: Mapping[Loc, int] = field(default_factory=dict, repr=False)
    """1-based line of the key of every value, or of a list's item."""

    def at(self, loc: Loc) -> str:
        """Return ``file.yaml, line 7: recipes.radial.rules[0]``, or without the line where it is not known."""
        known = next((self.lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in self.lines), None)
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
        return self.name + (f", line {known}" if known else "") + (f": {path}" if path else "")


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases, with the scalars of YAML 1.2 only.

    YAML 1.1, which PyYAML speaks, reads ``layers: 1:30`` as ninety (base sixty) and ``branch: no`` as false.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor}: aliases are not allowed, since a short file could stand for a huge one; "
                "write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("null", r"~|null|", "~n"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), [*_first, *([""] if _tag == "null" else [])]
    )


def read(path: Path) -> str:
    """Return the text of a file, refusing by its size before reading any of it.

    Raises
    ------
    RecipeError
        If it is missing, no regular file, too large, or not UTF-8.
    """
    try:
        if not path.is_file():
            raise RecipeError(
                f"{path}: there is no such file. Give the path of a recipe file, or the name of a shipped recipe."
            )
        if (size := path.stat().st_size) > MAX_BYTES:
            raise RecipeError(
                f"{path}: a recipe file has at most {MAX_BYTES} bytes, this one has {size}. Is it the right file?"
            )
        with path.open(encoding="utf-8", newline="") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def compose(text: str, name: str) -> yaml.Node:
    """Return the tree of nodes of a YAML document.

    Raises
    ------
    RecipeError
        If it is not one well-formed document without aliases.
    """
    try:
        node = yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{name}{line}: not valid YAML: {error.problem or error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{name}: not valid YAML: {type(error).__name__}: {error}") from error
    if node is None:
        raise RecipeError(f"{name}: the file is empty; expected a mapping that starts with schema: 1.")
    return node


def parse(text: str, name: str) -> tuple[Any, Source]:
    """Return the plain data of a YAML document and the lines of its values.

    Raises
    ------
    RecipeError
        If it has aliases, tags, duplicate keys, keys that are not text, or numbers that are not finite.
    """
    lines: dict[Loc, int] = {}
    source = Source(name, lines)
    root = compose(text, name)
    try:
        return _build(root, (), source, lines), source
    except RecursionError as error:
        raise RecipeError(f"{name}: lists and mappings are nested too deeply.") from error


def _build(node: yaml.Node, loc: Loc, source: Source, lines: dict[Loc, int]) -> Any:
    lines.setdefault(loc, node.start_mark.line + 1)
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode) and kind == "map":
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise RecipeError(f"{source.at(loc)}: keys are text; quote the one in line {line}: {key!r}.")
            if key in mapping:
                raise RecipeError(
                    f"{source.name}, line {line}: key {key!r} is there twice, first in line {lines[(*loc, key)]}."
                )
            lines[(*loc, key)] = line
            mapping[key] = _build(value_node, (*loc, key), source, lines)
        return mapping
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_build(item, (*loc, i), source, lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
        try:
            value = _SCALARS[kind](node.value)
        except (ValueError, KeyError) as error:
            raise RecipeError(f"{source.at(loc)}: {node.value!r} is no {kind}.") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{source.at(loc)}: numbers must be finite, got {node.value}.")
        return value
    raise RecipeError(f"{source.at(loc)}: tags such as {node.tag} are not allowed; recipes are plain data.")


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": _float,
    "bool": {"true": True, "false": False}.__getitem__,
    "null": lambda _: None,
}
