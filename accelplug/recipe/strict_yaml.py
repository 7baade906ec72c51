"""YAML for files from strangers: data only, bounded in size, without aliases, and every value knows its line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from accelplug import files
from accelplug.errors import AccelplugError, RecipeError

MAX_FILE = 128 << 10
"""Largest file that is read at all; a shipped recipe file has a few KiB."""
MAX_VALUES = 20_000
"""Keys, values and list items that a recipe may have."""
MAX_DEPTH = 32
"""Lists and mappings that may stand in each other."""
MAX_KEY = 256
"""Characters of a key."""
MAX_INTEGER = (1 << 63) - 1
"""Largest size of a whole number: what tensors hold."""

TOO_MUCH = f"it has more than {MAX_VALUES} values, or is nested more than {MAX_DEPTH} deep"

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
    values = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.values += 1
        if self.values > MAX_VALUES or self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=TOO_MUCH, problem_mark=self.peek_event().start_mark)
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor}: aliases are not allowed, since a short file could stand for a huge one; "
                "write the value out",
                problem_mark=event.start_mark,
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("null", r"~|null|", "~n"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), [*_first, *([""] if _tag == "null" else [])]
    )


def yaml_text(path: Path) -> str:
    """Return the text of a file, refusing by its size before reading any of it.

    Raises
    ------
    RecipeError
        If it is missing, not a regular file, too large, or not UTF-8.
    """
    try:
        return files.read(path, "A recipe file", MAX_FILE)
    except AccelplugError as error:
        raise RecipeError(f"{error} Give the path of a recipe file, or the name of a shipped recipe.") from error


def compose_yaml(text: str, name: str) -> yaml.Node:
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
    except RecursionError as error:
        raise RecipeError(f"{name}: not valid YAML: lists and mappings are nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{name}: not valid YAML: {type(error).__name__}: {error}") from error
    if node is None:
        raise RecipeError(f"{name}: the file is empty; expected a mapping that starts with schema: 1.")
    return node


def parse_yaml(text: str, name: str) -> tuple[Any, Source]:
    """Return the plain data of a YAML document and the lines of its values.

    Raises
    ------
    RecipeError
        If it has aliases, tags, duplicate keys, keys that are not text, or numbers that are not finite.
    """
    lines: dict[Loc, int] = {}
    source = Source(name, lines)
    return _build(compose_yaml(text, name), (), source, lines), source


def bounded_copy(data: Any, source: Source) -> Any:
    """Return a copy of a recipe given as a mapping, held to a file's bounds: keys that are text, size, depth, numbers.

    Raises
    ------
    RecipeError
        If it is not within them.
    """
    left = MAX_VALUES

    def copy(value: Any, loc: Loc) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or len(loc) > MAX_DEPTH:
            raise RecipeError(f"{source.at(loc[:3])}: {TOO_MUCH}.")
        if isinstance(value, Mapping):
            for key in value:
                _require_key(key, source, loc)
            return {key: copy(item, (*loc, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [copy(item, (*loc, i)) for i, item in enumerate(value)]
            return tuple(items) if isinstance(value, tuple) else items
        return _within(value, source, loc)

    return copy(data, ())


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def _require_key(key: Any, source: Source, loc: Loc) -> None:
    if not isinstance(key, str) or len(key) > MAX_KEY:
        got = f"{len(key)} characters" if isinstance(key, str) else type(key).__name__
        raise RecipeError(f"{source.at(loc)}: a key is text of at most {MAX_KEY} characters, got {got}.")
    _within(key, source, loc)


def _within(value: Any, source: Source, loc: Loc) -> Any:
    """Return a value, unless it is a number beyond all bounds or a text longer than a file."""
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise RecipeError(f"{source.at(loc)}: whole numbers go to {MAX_INTEGER}, this one has {value.bit_length()} bits.")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{source.at(loc)}: numbers must be finite, got {value}.")
    if isinstance(value, str) and len(value) > MAX_FILE:
        raise RecipeError(f"{source.at(loc)}: a text has at most {MAX_FILE} characters, this one has {len(value)}.")
    if isinstance(value, str) and (found := _CONTROL.search(value)):  # they would steer the terminal that shows them
        raise RecipeError(f"{source.at(loc)}: a text holds no control characters, this one has {found[0]!r}.")
    return value


def _build(node: yaml.Node, loc: Loc, source: Source, lines: dict[Loc, int]) -> Any:
    lines.setdefault(loc, node.start_mark.line + 1)
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode) and kind == "map":
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise RecipeError(f"{source.at(loc)}: keys are text; quote the one in line {line}: {str(key)[:40]!r}.")
            _require_key(key, source, loc)
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
            raise RecipeError(
                f"{source.at(loc)}: {node.value[:40]!r} is not a valid {kind}, or has too many digits."
            ) from error
        return _within(value, source, loc)
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
