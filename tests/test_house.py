"""The house is kept: one word has one meaning, in the field's language, and tests come in by the front door."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("accelplug", "kernels", "patches") for path in sorted((ROOT / folder).rglob("*.py"))]

SHARED = {
    "logger": "the package's logger",
    "__getattr__": "what a module makes when it is asked for",
    "attend": "a kernel backend's answer to block_attention",
    "missing": "why a kernel backend cannot be used on this machine",
    "unsupported": "why a kernel backend cannot answer a call",
    "score": "an evaluator's figures of what was said",
    "Params": "what a patch's prepare gives its attend",
    "Scene": "a generated dataset: one picture or clip, by its numbers",
    "KINDS": "a generated dataset: what its objects can be",
    "COLOURS": "a generated dataset: what colours they can have",
    "render": "a generated dataset: numbers to pixels",
    "_coverage": "a generated dataset: which share of each pixel an object covers",
}
"""Names that several modules define, with one meaning: what stands in for one another has one name."""

PRIVATE_WORDS = {
    r"foret(?:ell|old)\w*": "predict, predicted",
    r"hunch\w*": "tie-break",
    r"\bspoils?\b": "predicted error",
    r"\bof yours\b": "your own",
    r"(?<!there )\b(?:is|are|was) no (?!longer|more|better|dog)\w+": "is not a",
}
"""Patterns of words that no reader knows, or that are no English, and what to say in their place."""


def defined(tree: ast.Module) -> Iterator[str]:
    """The names that a module defines at its top."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name) and not part.id.startswith("__"))


def test_a_name_has_one_meaning() -> None:
    places = defaultdict(set)
    for path in SOURCES:
        for name in defined(ast.parse(path.read_text(encoding="utf-8"))):
            places[name].add(str(path.relative_to(ROOT)))
    twice = {name: sorted(where) for name, where in places.items() if len(where) > 1 and name not in SHARED}
    assert not twice
    assert not {name for name in SHARED if len(places[name]) < 2}, "shared no more: take it out of the table"


@pytest.mark.parametrize("words", PRIVATE_WORDS)
def test_words_are_the_fields(words: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}, say {PRIVATE_WORDS[words]!r}"
        for path in [*SOURCES, *sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in re.finditer(words, line, re.IGNORECASE)
    ]
    assert not found


def test_tests_come_in_by_the_front_door() -> None:
    """No test, benchmark or example reads a private attribute of a plug, a host, a patch, a recipe or a record."""
    private = re.compile(r"\b(?:plug|hosts?(?:\[\d\])?|patch|recipe|record|row|gate|ledger)\._(?!repr_html_)[a-z]\w*")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for folder in ("tests", "benchmarks", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in private.finditer(line)
    ]
    assert not found
