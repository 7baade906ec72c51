"""Errors speak to who asked: of arguments to who wrote Python, of options to who typed a command; and nothing printed is cut."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from accelplug import cli
from accelplug.cli import main

PACKAGE = Path(cli.__file__).parent
ROOMS = (
    "comparison",
    "tuning",
    "calibration",
    "recipe",
    "inspection",
    "weights",
    "zoo",
    "loading.py",
    "chat.py",
    "files.py",
)
"""Where errors are raised that a command may end with."""
ARGUMENT = re.compile(r"\b[a-z_]+=[\[({'\"A-Z]|\b(Exam|Bound)[.(]|\baccelplug\.\w+\(|\bmapping \{")
"""What only Python has."""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
CODE = re.compile(r"`[^`]*`|--set \S+")
"""A command that is told of as such, and what stands behind --set."""
NOT_OF_COMMANDS = {
    "calls": "commands give a mapping each",
    "seeds_of": "and numbers",
    "require_processor": "commands load the processor",
    "scenes": "commands ask for the test split",
    "compare_vlm": "and it has questions",
    "items": "questions are read from a file, or are of an exam",
    "questions": "and so they are a list",
    "parse_budget": "a command's budget is text",
    "calibrate": "settings are read from --set",
    "build": "the exam has counted its pictures before",
    "_everywhere": "commands name recipes",
    "_inline": "commands name recipes",
    "to_mapping": "files hold no instances",
    "explain": "of recipe files",
    "_require_inputs": "commands have the processor make them",
    "split_settings": "it is a command's own",
}
"""Functions whose errors no command ends with, and why."""


def options() -> dict[str, set[str]]:
    """The options of each command."""
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {name: {o for action in p._actions for o in action.option_strings} for name, p in commands.choices.items()}


def texts(node: ast.AST, typed: bool) -> Iterator[str]:
    """The literals of an expression, as they are told to who typed a command, or to who wrote Python."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "worded":
        yield from texts(node.args[typed], typed)
    elif isinstance(node, ast.Constant):
        yield str(node.value)
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts(child, typed)


def errors() -> Iterator[tuple[str, str, str]]:
    """(function, to who typed, to who wrote Python) of each error that is made."""
    files = [
        path for room in ROOMS for path in ([PACKAGE / room] if room.endswith(".py") else (PACKAGE / room).rglob("*.py"))
    ]
    for path in files:
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error"):
                    yield function.name, " ".join(texts(node, True)), " ".join(texts(node, False))


def test_errors_name_options_to_commands_and_arguments_to_python() -> None:
    known = set().union(*options().values())
    for function, typed, written in errors():
        assert set(OPTION.findall(typed)) <= known, typed
        if function not in NOT_OF_COMMANDS:
            assert not ARGUMENT.search(CODE.sub("", typed)), (
                f"{function} tells who typed a command of {ARGUMENT.search(typed)}: {typed}"
            )
            assert not OPTION.search(CODE.sub("", written)), f"{function} tells who wrote Python of an option: {written}"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["tune", "wan-shapes", "--time", "-1"], "--time"),
        (["tune", "wan-shapes", "--objective", "nll"], "--objective"),
        (["tune", "wan-shapes", "--budget", "fg_psnr>=26"], "Tune from Python"),
        (["tune", "llava-scenes", "--no-caches"], "--no-caches"),
        (["compare", "llava-scenes", "--caches"], "--caches"),
        (["compare", "llava-scenes", "--frames", "9"], "--frames"),
        (["compare", "llava-scenes", "--resume", "night"], "--resume"),
        (["compare", "llava-scenes", "--floors", "all"], "--floors"),
        (["compare", "wan-shapes", "--pictures", "9"], "--pictures"),
        (["compare", "wan-shapes", "--prompts", "999"], "--prompts"),
        (["tune", "wan-shapes", "--budget", "psnr>=sed+9"], "nearest: seed"),
        (["compare", "wan-shapes", "--prompt", "a", "--recipe", "nobody"], "nobody"),
        (["inspect", "wan-shapes", "--image", "PICTURE"], "--image"),
    ],
)
def test_a_mistake_is_told_by_its_option(
    command: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    (tmp_path / "prompts.txt").write_text("a red square\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    own = {
        "tune": ["-o", str(tmp_path / "o.yaml"), *(["--prompts", str(tmp_path / "prompts.txt")] * ("wan-shapes" in command))]
    }
    assert (
        main([*(str(tmp_path / "a.png") if word == "PICTURE" else word for word in command), *own.get(command[0], [])]) == 2
    )
    told = capsys.readouterr().err
    assert said in told
    assert set(OPTION.findall(told)) <= options()[command[0]]


@pytest.mark.parametrize(
    "command",
    [
        "list",
        "list patches",
        "list sol",
        "list wan",
        "show wan2.1-t2v-14b",
        "inspect wan-shapes",
        "inspect llava-scenes",
        "fetch --list",
    ],
)
@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_is_cut_in_a_terminal(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "\u2026" not in out
    assert max(map(len, out.splitlines())) <= columns
