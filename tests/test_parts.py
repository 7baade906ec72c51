"""compare(parts=True): who gave how much, and what is lost between the parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import accelplug
from accelplug.comparison import study
from accelplug.comparison.parts import COMPILED, EAGER_ROW, RecipePart, Stack, StackGains, parts_of, taken_apart
from accelplug.comparison.result import Comparison
from accelplug.comparison.rows import DENSE_ROW, Row, Sample, Variant
from accelplug.errors import AccelplugError
from accelplug.hosts.host import model_facts
from accelplug.recipe import ModelFacts, Recipe, load
from accelplug.show import as_text
from accelplug.testing.laws import snapshot_of
from tests.test_comparison import small

MANY: dict[str, Any] = {
    "rules": [
        {"where": {"steps": 0}, "patch": "dense"},
        {"where": {"layers": 1, "steps": "1:3"}, "patch": "sol", "with": {"block": 8}},
        {
            "where": {"layers": "1:"},
            "patch": "neighborhood",
            "with": {"block": 8, "window": [1, 3, 3], "backend": "reference"},
        },
    ],
    "cache": {"kind": "first_block", "with": {"threshold": 0.5}},
}


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return model_facts(small()[0])


@pytest.fixture
def many(facts: ModelFacts) -> Recipe:
    return load(MANY, facts)


def test_a_recipe_is_taken_apart_into_patches_cache_and_compilation(many: Recipe) -> None:
    assert parts_of(many, compiled=True) == ("sol", "neighborhood", "cache first_block", COMPILED)
    made, (stack,) = taken_apart([Variant(DENSE_ROW, kind="dense"), Variant("mine", many)], compiled=False)
    arms = {arm.name: arm.recipe for arm in made}
    assert (stack.together, stack.bare) == ("mine", DENSE_ROW)
    assert [part.name for part in stack.parts] == ["sol", "neighborhood", "cache first_block"]
    assert set(arms) == {row for part in stack.parts for row in (part.alone, part.others)}
    assert len(arms) == 6
    sol = arms["sol of mine"]
    assert [rule.name for rule in sol.rules] == ["dense", "sol", "dense"], "another rule would serve its calls"
    assert sol.cache is None
    assert str(sol.rules[2].where) == str(many.rules[2].where)
    others = arms["mine without sol"]
    assert [rule.name for rule in others.rules] == ["dense", "dense", "neighborhood"]
    assert others.cache == many.cache


def test_two_parts_need_no_runs_but_their_own(facts: ModelFacts) -> None:
    made, (stack,) = taken_apart([Variant("mine", load({"rules": MANY["rules"][2:], "cache": MANY["cache"]}, facts))], False)
    assert [arm.name for arm in made] == ["neighborhood of mine", "cache first_block of mine"]
    assert [part.others for part in stack.parts] == [part.alone for part in stack.parts][::-1]


def test_a_compiled_pipeline_has_runs_that_are_not(facts: ModelFacts) -> None:
    rules = load({"rules": MANY["rules"][2:]}, facts)
    made, (stack,) = taken_apart([Variant("mine", rules)], compiled=True)
    assert stack == Stack(
        "mine",
        EAGER_ROW,
        (
            RecipePart("neighborhood", "neighborhood of mine", DENSE_ROW),
            RecipePart(COMPILED, DENSE_ROW, "neighborhood of mine"),
        ),
    )
    assert [arm.name for arm in made] == ["neighborhood of mine", EAGER_ROW]
    graphs = []
    twice = torch.compile(lambda x: 2 * x, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for arm in made:
        with arm.around():
            twice(torch.ones(2))
    assert not graphs


def test_what_is_compiled_is_warmed_up_as_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traced run compiles graphs of its own, and the first timed one would compile anew."""
    warmed: list[str] = []
    monkeypatch.setattr(study, "runs_compiled", lambda pipe: True)
    monkeypatch.setattr(study.Study, "warm_up", lambda self, variant, *_: warmed.append(variant.name))
    pipe, inputs = small()
    accelplug.compare(pipe, {"same": {"rules": [{"patch": "dense"}]}}, inputs, [0, 1], floors=False, progress=False)
    assert warmed == ["dense", "same"]


def test_what_has_one_part_cannot_be_taken_apart() -> None:
    pipe, inputs = small()
    with pytest.raises(AccelplugError, match="parts=True asks which part of a recipe gave how much, and none here has two"):
        accelplug.compare(pipe, {"rules": [{"patch": "radial"}]}, inputs, parts=True, progress=False)


def row(name: str, kind: str, *ms: float, db: float = 30.0) -> Row:
    samples = [Sample(0, seed, time, time, scores={"psnr_db": db - seed}) for seed, time in enumerate(ms)]
    return Row(name, kind, samples=samples, peak_mib=100.0 + ms[0])


@pytest.fixture
def told() -> Comparison:
    """Two seeds: parts of 2x and 1.25x, and 1.6x and 1.25x; together 2x and 2x."""
    rows = [
        Row(DENSE_ROW, "dense", samples=[Sample(0, 0, 100.0, 1.0), Sample(0, 1, 80.0, 1.0)]),
        row("mine", "recipe", 50.0, 40.0, db=25.0),
        row("a of mine", "part", 50.0, 50.0, db=28.0),
        row("b of mine", "part", 80.0, 64.0, db=33.0),
    ]
    parts = (RecipePart("a", "a of mine", "b of mine"), RecipePart("b", "b of mine", "a of mine"))
    return Comparison("", [""], [0, 1], {}, "", {"memory": "resident"}, rows, stacks=[Stack("mine", DENSE_ROW, parts)])


def test_gains_and_losses_by_hand(told: Comparison) -> None:
    (shares,) = told.shares
    a, b = shares.shares
    assert (a.alone.p50, b.alone.p50) == pytest.approx((1.8, 1.25))
    assert (a.added.p50, b.added.p50) == pytest.approx((1.6, 1.125))  # 80/50 and 64/40; 50/50 and 50/40
    assert shares.together.p50 == pytest.approx(2.0)
    assert shares.product.p50 == pytest.approx((2.5 + 2.0) / 2)
    assert shares.lost.p50 == pytest.approx((1 - 2 / 2.5 + 0.0) / 2)
    assert (a.quality, a.cost) == pytest.approx((27.5, 8.0))
    assert (b.quality, b.cost, b.peak_mib) == pytest.approx((32.5, 3.0, 180.0))
    assert "10% of it is lost between them" in shares.verdict


def test_parts_that_help_each_other(told: Comparison) -> None:
    told.rows[1] = row("mine", "recipe", 20.0, 20.0)
    assert "they help each other by" in told.shares[0].verdict


def test_a_part_that_changes_nothing_gave_nothing(told: Comparison) -> None:
    told.rows[2] = Row(
        "a of mine", "part", samples=[Sample(0, s, 50.0, 1.0, scores={"psnr_db": float("inf")}) for s in (0, 1)]
    )
    (shares,) = told.shares
    assert shares.shares[0].alone.p50 == 1.0
    assert shares.shares[0].quality is None


def test_it_prints_and_is_written(told: Comparison, tmp_path: Path) -> None:
    text = as_text(told)
    assert "peak MiB, resident" in text
    assert "added to the others" in text
    path = told.to_json(tmp_path / "r.json")
    (data,) = json.loads(path.read_text())["parts"]
    assert data["parts"][1]["cost"] == pytest.approx(3.0)
    again = Comparison.from_json(path)
    assert again.stacks == told.stacks
    assert again.shares == told.shares
    assert "added to the others" in told.page()
    assert Comparison.from_json(Comparison("", [""], [0], {}, "", {}, told.rows).to_json(tmp_path / "s.json")).shares == []


def test_a_run_says_who_gave_how_much() -> None:
    pipe, inputs = small()
    before = snapshot_of(pipe.transformer)
    sparse = {"rules": MANY["rules"][2:], "cache": {"kind": "first_block", "with": {"threshold": 0.5}}}
    result = accelplug.compare(pipe, {"mine": sparse}, inputs, parts=True, floors=False, progress=False)
    assert [r.name for r in result.rows] == ["dense", "mine", "neighborhood of mine", "cache first_block of mine"]
    (shares,) = result.shares
    assert isinstance(shares, StackGains)
    assert all(share.alone.p50 > 0 and share.quality is not None for share in shares.shares)
    assert result.best is None or result.best.name == "mine", "parts are no candidates"
    after = snapshot_of(pipe.transformer)
    assert (after["processors"], after["hooks"]) == (before["processors"], before["hooks"])
