"""Every result prints as a table, never as its data, writes JSON that is read again, and a page, and says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import accelplug
from accelplug.comparison import Exam
from accelplug.comparison.evaluators.evaluator import Said
from accelplug.comparison.outcome import Outcome, hold_against_dense
from accelplug.comparison.rows import DENSE_ROW
from accelplug.comparison.vlm import VlmComparison
from accelplug.hosts.host import model_facts
from accelplug.recipe import load
from accelplug.show import Shown
from accelplug.tuning.budget import parse_budget
from accelplug.tuning.language import Answered
from accelplug.tuning.result import Point, Tuned
from accelplug.tuning.verification import Verification, Verified
from accelplug.weights import available
from tests import tiny_language_models, tiny_models
from tests.test_report import comparison, row

OWN = "accelplug."
"""Results of tests and of other packages are not asked for here."""


def examined() -> VlmComparison:
    exam = Exam.scenes(3)
    right = {split: ["yes" if question.answer else "no" for question in exam.of(split)] for split in exam.splits}
    pairs = [("yes", "no")] * len(exam.pairs)
    said = Said(
        right, {split: [0.0] * len(asked) for split, asked in right.items()}, pairs, dict.fromkeys(exam.pictures, "A")
    )
    rows = [Outcome(DENSE_ROW, "dense", said), Outcome("vhr", "recipe", said, alarms=["It says less."], notes=["a note"])]
    for one in rows:
        one.score(exam)
    hold_against_dense(rows, exam)
    return VlmComparison("A model", exam, rows, {"device": "a CPU"})


def tuned(kind: type[Tuned] = Tuned, **more: Any) -> Tuned:
    pipe, _ = tiny_models.pipeline("wan")
    rules = load({"rules": [{"patch": "dense"}]}, model_facts(pipe)).rules
    lines = [row("proven", 0.5, 27.0, 26.5), row("beaten", 0.8, 26.2)]
    points = tuple(
        Point(line.name, {"rules": [{"patch": "sol"}]}, 1, 2.0, {"psnr": 26.2}, 0.2, verdict)
        for line, verdict in zip(lines, ("proven", "tried"), strict=True)
    )
    found = kind(
        "tuned", "tuned", rules, why="why", bounds=parse_budget("psnr>=26"), points=points, seconds={"all": 9.0}, **more
    )
    object.__setattr__(found, "comparison", comparison(*lines))
    return found


def plugged() -> list[Shown]:
    pipe, inputs = tiny_models.pipeline("wan")
    with accelplug.apply(pipe, {"rules": [{"patch": "radial"}]}, gate="off") as plug:
        pipe(**inputs)
        return [plug.report(), plug.where(), accelplug.inspect(pipe)]


def looked() -> list[Shown]:
    model = tiny_language_models.build("llava")
    return [accelplug.inspect(model), accelplug.inspect(model, tiny_language_models.inputs("llava"))]


MAKERS: dict[str, Callable[[], list[Shown]]] = {
    "comparison": lambda: [comparison(row("slow", 0.8, 30.0, 28.0))],
    "examined": lambda: [examined()],
    "tuned": lambda: [tuned(), tuned(Answered, objective="accuracy")],
    "verified": lambda: [Verification("file.yaml", (Verified("file/a", "2026-01-01", "drifted", "1.1x"),))],
    "plugged": plugged,
    "looked": looked,
    "available": lambda: [available()],
}


def kinds(base: type[Shown]) -> set[str]:
    found = {kind.__qualname__ for kind in base.__subclasses__() if kind.__module__.startswith(OWN)}
    return found.union(*(kinds(kind) for kind in base.__subclasses__()))


@pytest.fixture(scope="module")
def results() -> dict[str, list[Shown]]:
    return {name: make() for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_a_result_is_shown_written_and_read_again(name: str, results: dict[str, list[Shown]], tmp_path: Path) -> None:
    for result in results[name]:
        for text in (str(result), repr(result)):
            assert 0 < len(text.encode()) < 6000
            assert "PIL" not in text
            assert "object at 0x" not in text
            assert not text.startswith(f"{type(result).__name__}(")
        assert "<" in result._repr_html_()
        path = tmp_path / "a.json"
        assert result.to_json(path) == path
        assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(result.to_dict()))
        page = tmp_path / "a.html"
        assert result.to_html(page) == page
        assert page.read_text(encoding="utf-8").lower().startswith("<!doctype html>")


def test_no_kind_of_result_is_left_out(results: dict[str, list[Shown]]) -> None:
    assert kinds(Shown) == {type(result).__qualname__ for found in results.values() for result in found}
