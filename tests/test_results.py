"""Every result prints as a table, never as its data, writes JSON that is read again, and a page, and says where."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import accelplug
from accelplug.comparison import Exam, Walks, metrics, outcome
from accelplug.comparison.evaluators import EVALUATORS
from accelplug.comparison.evaluators.evaluator import Asked, Figure, Said
from accelplug.comparison.outcome import Outcome, hold_against_stock
from accelplug.comparison.rows import STOCK_ROW
from accelplug.comparison.vlm import VlmComparison
from accelplug.demo import Answers, Clips
from accelplug.hosts.host import model_facts
from accelplug.recipe import load, named
from accelplug.show import Shown
from accelplug.testing.encoders import dinov2
from accelplug.testing.models import build_denoiser
from accelplug.tuning.budget import parse_budget
from accelplug.tuning.language import Answered
from accelplug.tuning.result import Point, Tuned
from accelplug.tuning.verification import Verification, Verified
from accelplug.weights import available
from accelplug.zoo.geometry import VGGT
from tests import tiny_language_models, tiny_pipelines
from tests.patch_rows import ROWS
from tests.test_comparison import small
from tests.test_report import comparison, row
from tests.test_texts import LETTERS, SMALL, llama

OWN = "accelplug."
"""Results of tests and of other packages are not asked for here."""


def examined() -> VlmComparison:
    exam = Exam.scenes(3)
    right = {split: ["yes" if question.answer else "no" for question in exam.of(split)] for split in exam.splits}
    pairs = [("yes", "no")] * len(exam.pairs)
    said = Said(
        right, {split: [0.0] * len(asked) for split, asked in right.items()}, pairs, dict.fromkeys(exam.pictures, "A")
    )
    rows = [Outcome(STOCK_ROW, STOCK_ROW, said), Outcome("vhr", "recipe", said, alarms=["It says less."], notes=["a note"])]
    for one in rows:
        one.score(exam)
    hold_against_stock(rows, exam)
    return VlmComparison("A model", exam, rows, {"device": "a CPU"})


def tuned(kind: type[Tuned] = Tuned, **more: Any) -> Tuned:
    pipe, _ = tiny_pipelines.decoding("wan")
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
    pipe, inputs = tiny_pipelines.decoding("wan")
    with accelplug.apply(pipe, {"rules": [{"patch": "radial"}]}, gate="off") as plug:
        pipe(**inputs)
        report, where = plug.report(), plug.where()
    given = {key: value for key, value in inputs.items() if key != "output_type"}
    return [report, where, accelplug.inspect(pipe), accelplug.inspect(pipe, given, heads={"layers": [1]})]


def looked() -> list[Shown]:
    model = tiny_language_models.build("llava")
    text = tiny_language_models.build("llama")
    told = accelplug.inspect(text, {"input_ids": torch.arange(3, 40)[None]})
    return [accelplug.inspect(model), accelplug.inspect(model, tiny_language_models.inputs("llava")), told]


def demonstrated() -> list[Shown]:
    looks: Any = accelplug.inspect(tiny_language_models.build("llava"), tiny_language_models.inputs("llava"))
    return [Clips(comparison(row("slow", 0.8, 30.0, 28.0)), {"slow": True}), Answers(looks, ["Is it?"], {"stock": ["yes"]})]


def encoded() -> list[Shown]:
    model, _ = build_denoiser(dinov2)
    pictures = accelplug.Pictures(size=48)
    return [
        accelplug.compare(model, {"patch": "rows", "with": {"block": 8, "backend": "reference"}}, pictures, progress=False),
        accelplug.inspect(model),
    ]


def walked() -> list[Shown]:
    model = VGGT(embed_dim=32, depth=2, num_heads=2, layers=(0, 1)).eval()
    walks = Walks(frames=(2, 3), rooms=1, size=(28, 42))
    return [accelplug.compare(model, {"patch": "avggt"}, walks, progress=False)]


MAKERS: dict[str, Callable[[], list[Shown]]] = {
    "comparison": lambda: [comparison(row("slow", 0.8, 30.0, 28.0))],
    "examined": lambda: [examined()],
    "texts": lambda: [accelplug.compare(llama(), {"patch": "stream"}, SMALL, processor=LETTERS, progress=False)],
    "tuned": lambda: [tuned(), tuned(Answered, objective="accuracy")],
    "verified": lambda: [Verification("file.yaml", (Verified("file/a", "2026-01-01", "drifted", "1.1x"),))],
    "plugged": plugged,
    "looked": looked,
    "demonstrated": demonstrated,
    "recipe": lambda: [named("wan2.1-t2v-14b/radial")],
    "encoders": encoded,
    "walks": walked,
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


def test_the_page_of_answers_needs_no_script_and_shows_what_changed() -> None:
    found = examined()
    stock, vhr = found.rows
    asked = found.exam.of("adversarial")
    vhr.said = replace(stock.said, replies={**stock.said.replies, "adversarial": ["no"] * len(asked)})
    vhr.said.replies["adversarial"][0] = "No, <b>nothing</b>"
    vhr.score(found.exam)
    hold_against_stock(found.rows, found.exam)
    page = found.page()
    assert "<script" not in page
    assert "vhr: 0 righted" in page
    assert page.count('class="card broken"') == 3  # a picture each
    assert "No, &lt;b&gt;nothing&lt;/b&gt;" in page
    assert asked[0].text in page
    assert "hallucinates, adversarial questions" in page
    for one in found.rows:
        for figure in one.drawn():
            assert str(figure) in page
            assert math.isnan(figure.value) or figure.interval[0] <= figure.value <= figure.interval[1]


class Length:
    """An evaluator in one class: how long descriptions are."""

    name, title = "length", "length of descriptions"

    def score(self, asked: Asked, said: Said) -> float | None:
        return sum(map(len, said.descriptions.values())) / len(said.descriptions) if said.descriptions else None

    def hold(self, asked: Asked, stock: Said, said: Said, before: float, figures: float) -> dict[str, float]:
        return {"length": 0.04 if before != figures else 1.0}

    def columns(self, figures: float, holm: Mapping[str, float]) -> dict[str, str]:
        return {"letters": f"{figures:.0f} (p {holm['length']:.2f})" if holm else f"{figures:.0f}"}

    def drawn(self, figures: float) -> list[Figure]:
        return [Figure("letters", figures, share=False)]

    def summary(self, figures: float | None, p: Mapping[str, float], holm: Mapping[str, float]) -> dict[str, Any]:
        return {"letters": figures}


def test_an_evaluator_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "EVALUATORS", (*EVALUATORS, Length()))
    found = examined()
    assert "letters" in str(found)
    assert "1 (p 1.00)" in str(found)
    assert "<h3>letters" in found.page()
    assert [row["letters"] for row in found.to_dict()["rows"]] == [1.0, 1.0]


def test_a_metric_is_one_line_and_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def error(run: metrics.Beside) -> float | None:
        return None if run.dense is None else float(abs(run.clip - run.dense).mean())

    metric = metrics.ClipMetric("mae", "<=", "mean error", digits=2, of=error)
    monkeypatch.setitem(metrics.METRICS, "mae", metric)
    monkeypatch.setitem(metrics.BY_KEY, "mae", metric)
    pipe, inputs = small()
    found = accelplug.compare(pipe, {"radial": ROWS["radial"].recipe()}, inputs, floors=False, progress=False)
    (value,) = found.row("radial").values("mae")
    assert value > 0
    assert found.cells(found.row("radial"))[found.headings().index("mean error")] == f"{value:.2f}"
    assert "mean error" in found.page()
    (bound,) = parse_budget("mae<=0.5")
    assert bound.value(found.row("radial").samples[0], np.zeros(1), np.zeros(1)) == value
