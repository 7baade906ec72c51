"""The private names of host libraries still mean what we rely on, stand in one file, and are missed when they go."""

from __future__ import annotations

import ast
import re
import tomllib
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import accelplug
from accelplug import compat
from accelplug.errors import UnsupportedError
from tests import tiny_language_models, tiny_models

CONTRACTS = dict(compat.versions.contracts())
ROOT = Path(compat.__file__).parents[2]
PUBLIC = {
    "torch": set(),
    "diffusers": {"calibration_ratios", "get_hook", "hooks", "state_manager", "ulysses_degree"},
    "transformers": {
        "eager_attention_forward", "get_interface", "get_seq_length", "is_sliding", "read_index", "rope_deltas",
    },
}  # fmt: skip
"""By library, names without an underscore that no documentation promises."""


def private(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every private name in some source that is not its own: (line, name)."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    }
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        names = []
        if id(node) in parts:  # "_token" of f"{kind}_token"
            continue
        if isinstance(node, ast.Attribute):
            names = [node.attr] if node.attr not in own else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("accelplug"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        for name in names:
            if re.fullmatch("_[A-Za-z][A-Za-z0-9_]*", name) and not name.startswith("_accelplug"):
                yield vars(node)["lineno"], name


SOURCES = {library: Path(getattr(compat, library).__file__) for library in PUBLIC}
NAMES = [
    (library, name)
    for library, path in SOURCES.items()
    for name in sorted({name for _, name in private(ast.parse(path.read_text()))} | PUBLIC[library])
]


@pytest.mark.parametrize("promise", CONTRACTS)
def test_contract(promise: str) -> None:
    assert compat.contracts.why_broken(CONTRACTS[promise]) is None


def reached(module: types.ModuleType, check: Callable[..., Any]) -> set[str]:
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


@pytest.mark.parametrize(("library", "name"), NAMES)
def test_a_name_that_goes_is_missed(library: str, name: str) -> None:
    """That a library renames what we ask for is the same as that we ask for another name: some contract says so, and names it."""
    gone = f"{name}_gone"
    module = types.ModuleType("accelplug.compat_of_another_day")
    source = re.sub(rf"\b{name}\b", gone, SOURCES[library].read_text())
    exec(compile(source, str(SOURCES[library]), "exec"), vars(module))
    lines = {line for line, text in enumerate(source.splitlines(), 1) if gone in text}
    users = {
        node.name if isinstance(node, ast.FunctionDef) else ast.unparse(node.targets[0])
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.Assign) and lines & set(range(node.lineno, (node.end_lineno or 0) + 1))
    }
    concerned = [
        check for _, check in compat.contracts.contracts_of(module) if users & ({check.__name__} | reached(module, check))
    ]
    found = [why for check in concerned if (why := compat.contracts.why_broken(check)) is not None]
    assert any(gone in why for why in found), (sorted(users), [check.__name__ for check in concerned], found)


@pytest.mark.parametrize("folder", ["accelplug", "kernels", "patches"])
def test_private_names_of_others_stand_in_compat_alone(folder: str) -> None:
    """What a module reads under a private name is its own: anything else goes through compat."""
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.parent.name != "compat" and not path.is_symlink()
        for line, name in private(ast.parse(path.read_text()))
    ]
    assert not found


def test_a_call_that_a_library_is_about_to_drop_is_an_error() -> None:
    """By the filters of pyproject.toml: ours, and a keyword of a model that goes."""
    with pytest.raises(FutureWarning):
        warnings.warn("ours", FutureWarning, stacklevel=1)
    if compat.transformers.CACHE_NAMES[0] == compat.transformers.cache_keyword(transformers.LlamaForCausalLM.forward):
        model = tiny_language_models.build("llama")
        with pytest.raises(FutureWarning, match="past_key_values"):
            model(torch.tensor([[1, 2]]), past_key_values=transformers.DynamicCache())


@pytest.mark.parametrize("promise", CONTRACTS)
def test_a_contract_is_checked_apart_from_what_a_process_is_set_to(promise: str) -> None:
    """As a user's script may be set: another dtype, another device, no gradients; and it is set so behind it, too."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"), torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            assert compat.contracts.why_broken(CONTRACTS[promise]) is None
            assert torch.equal(torch.get_rng_state(), before)
            assert torch.get_default_dtype() == torch.bfloat16
            assert torch.empty(1).is_meta
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_broken_contract_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.diffusers, "dispatch_attention_fn", lambda: lambda query, key: None)
    assert "lacks the parameters" in str(
        compat.contracts.why_broken(CONTRACTS["diffusers: dispatch_attention_fn attends as asked"])
    )


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A diffusers that is newer than all that was tested, and the contracts that were checked since."""
    checked: list[str] = []
    of_today, why_broken = compat.versions.installed, compat.contracts.why_broken
    monkeypatch.setattr(
        compat.versions, "installed", lambda package: "99.1.0" if package == "diffusers" else of_today(package)
    )
    monkeypatch.setattr(compat.versions, "why_broken", lambda check: (checked.append(check.__name__), why_broken(check))[1])
    monkeypatch.setattr(compat.versions, "_HELD", set())
    monkeypatch.delenv("ACCELPLUG_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return checked


def test_an_untested_version_warns_and_is_checked_once(tomorrow: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=r"tested with .*diffusers 0.41.*, found .*diffusers 99.1.0"):
        compat.versions.require("diffusers")
    assert {"_listening", "_dynamo_globals"} <= set(tomorrow)
    assert "_lookup" not in tomorrow, "nobody asked for transformers"
    once = len(tomorrow)
    monkeypatch.setattr(compat.versions, "_HELD", set())  # as in another process
    with pytest.warns(UserWarning, match="found .*diffusers 99.1.0"):
        compat.versions.require("diffusers")
    assert len(tomorrow) == once
    compat.versions.require("transformers")  # of a version that was tested: neither warned nor checked
    assert len(tomorrow) == once


def test_where_the_cache_folder_cannot_be_written_a_process_checks_once(
    tomorrow: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        with pytest.warns(UserWarning, match="found .*diffusers 99.1.0"):
            compat.versions.require("diffusers")
    assert len(tomorrow) == len(set(tomorrow)) > 1


def test_a_broken_contract_is_refused_at_apply(tomorrow: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    promise = "diffusers: a hook of ours hears contexts and the end of a run, and is taken away"
    monkeypatch.setattr(compat.diffusers, "listen_first", lambda registry, name, hook: registry._hook_list)
    model, _ = tiny_models.build("wan")
    before = [set(vars(module)) for module in model.modules()]
    wrong = pytest.raises(UnsupportedError, match=f"diffusers 99.1.0 no longer keeps.*{promise}: AttributeError.*_hook_list")
    with pytest.warns(UserWarning, match="found .*diffusers 99.1.0"), wrong:
        accelplug.apply(model, {"patch": "radial"}, gate="off")
    assert [set(vars(module)) for module in model.modules()] == before


def test_a_name_that_went_from_a_tested_version_is_told_at_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions say nothing here; what goes wrong in the middle of apply does, and nothing of it is left."""
    promise = "diffusers: a hook of ours hears contexts and the end of a run, and is taken away"
    monkeypatch.setattr(compat.diffusers, "listen_first", lambda registry, name, hook: registry._hook_list)
    model, _ = tiny_models.build("wan")
    before = [set(vars(module)) for module in model.modules()]
    with pytest.raises(UnsupportedError, match=f"no longer keeps what accelplug relies on. {promise}: .*_hook_list"):
        accelplug.apply(model, {"patch": "radial"}, gate="off")
    assert [set(vars(module)) for module in model.modules()] == before


def test_the_tested_versions_are_those_of_the_suite() -> None:
    """What is promised is what runs: pyproject's bounds are the oldest set, the newest one is what this runs on or the oldest."""
    bounds = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.M))
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lower = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(dependencies), re.M))
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for package, bound in lower.items():
        assert bounds[package].startswith(bound), package
    for package, minor in compat.versions.OLDEST.items():
        assert lower[package].startswith(minor), package
        assert pinned[package].startswith(compat.versions.TESTED[package] + "."), package
