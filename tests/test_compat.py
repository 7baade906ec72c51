"""The private names of host libraries still mean what we rely on, stand in one file, and are missed when they go."""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from accelplug import compat

CONTRACTS = dict(compat.contracts())
ROOT = Path(compat.__file__).parents[1]
SOURCE = Path(compat.__file__).read_text()
PUBLIC = {
    "calibration_ratios", "eager_attention_forward", "get_hook", "get_interface", "get_seq_length", "hooks", "is_sliding",
    "read_index", "rope_deltas", "state_manager", "ulysses_degree",
}  # fmt: skip
"""Names without an underscore that no documentation promises."""


def private(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every private name in some source that is not its own: (line, name)."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr] if node.attr not in own else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("accelplug"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        for name in names:
            if re.fullmatch("_[A-Za-z][A-Za-z0-9_]*", name) and not name.startswith("_accelplug"):
                yield node.lineno, name


NAMES = sorted({name for _, name in private(ast.parse(SOURCE))} | PUBLIC)


@pytest.mark.parametrize("promise", CONTRACTS)
def test_contract(promise):
    assert compat.why_broken(CONTRACTS[promise]) is None


def reached(module: types.ModuleType, check: types.FunctionType) -> set[str]:
    """The functions and constants of a module that a check of it uses, however deep."""
    found: set[str] = set()
    left = [check.__code__]
    while left:
        code = left.pop()
        left += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in set(code.co_names) - found:
            found.add(name)
            value = getattr(vars(module).get(name), "__wrapped__", vars(module).get(name))
            if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
                left.append(value.__code__)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_goes_is_missed(name):
    """That a library renames what we ask for is the same as that we ask for another name: some contract says so, and names it."""
    gone = f"{name}_gone"
    module = types.ModuleType("accelplug.compat_of_another_day")
    source = re.sub(rf"\b{name}\b", gone, SOURCE)
    exec(compile(source, compat.__file__, "exec"), vars(module))
    lines = {line for line, text in enumerate(source.splitlines(), 1) if gone in text}
    users = {
        node.name if isinstance(node, ast.FunctionDef) else node.targets[0].id
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.Assign) and lines & set(range(node.lineno, (node.end_lineno or 0) + 1))
    }
    concerned = [check for _, check in module.contracts() if users & ({check.__name__} | reached(module, check))]
    found = [why for check in concerned if (why := compat.why_broken(check)) is not None]
    assert any(gone in why for why in found), (sorted(users), [check.__name__ for check in concerned], found)


@pytest.mark.parametrize("folder", ["accelplug", "kernels", "patches"])
def test_private_names_of_others_stand_in_compat_alone(folder):
    """What a module reads under a private name is its own: anything else goes through compat."""
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "compat.py" and not path.is_symlink()
        for line, name in private(ast.parse(path.read_text()))
    ]
    assert not found


def test_a_broken_contract_is_told(monkeypatch):
    monkeypatch.setattr(compat, "dispatch_attention_fn", lambda: lambda query, key: None)
    assert "lacks the parameters" in str(compat.why_broken(CONTRACTS["diffusers: dispatch_attention_fn attends as asked"]))


def test_newer_library_warns(monkeypatch):
    monkeypatch.setattr(compat, "installed", lambda package: "99.1.0")
    with pytest.warns(UserWarning, match="tested with diffusers up to"):
        compat.warn_untested("diffusers")
