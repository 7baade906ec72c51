"""plug.where(): what runs where, ahead of a run, in it and behind it."""

from __future__ import annotations

import json

import pytest

import accelplug
from accelplug.call import Layout, Prompt
from accelplug.testing.laws import run_once
from tests import tiny_language_models, tiny_models

RULES = {
    "rules": [
        {"where": {"layers": "1:", "steps": "1:"}, "patch": "radial", "with": {"block": 8, "backend": "reference"}},
        {
            "where": {"layers": 0},
            "patch": "neighborhood",
            "with": {"block": 8, "window": [1, 3, 3], "backend": "reference"},
        },
    ]
}


def test_a_denoiser_says_what_its_rules_say_and_then_what_ran() -> None:
    model, inputs = tiny_models.build("wan")
    with accelplug.apply(model, RULES, gate="off") as plug:
        first, *others = plug.where()
        assert (first.name, first.params, first.layout) == ("neighborhood", None, None)
        assert {row.name for row in others} == {"dense"}
        assert "step" in others[0].reason, "whether a rule of steps holds is not known yet"
        plug.step(1, 2)
        run_once(model, inputs)
        rows = list(plug.where())
    assert [row.site.layer for row in rows] == [0, 1, 2]
    assert [row.name for row in rows] == ["neighborhood", "radial", "radial"]
    assert rows[1].patch is rows[2].patch, "modules with the same settings share an instance"
    assert {row.layout for row in rows} == {Layout((3, 4, 6))}
    assert not any(row.reason for row in rows)
    assert rows[0].density == pytest.approx(float(rows[0].params.plan.density().mean()))
    assert rows[0].config["window"] == [1, 3, 3]


def test_it_prints_by_layers_and_is_plain_data() -> None:
    model, inputs = tiny_models.build("wan")
    with accelplug.apply(model, RULES, gate="off") as plug:
        plug.step(1, 2)
        run_once(model, inputs)
        where = plug.where()
    told = str(where)
    assert "1-2" in told
    assert "neighborhood" in told
    assert len(told.splitlines()) < 10
    rows = json.loads(json.dumps(where.to_dict()))["rows"]
    assert [row["patch"] for row in rows] == ["neighborhood", "radial", "radial"]
    assert rows[0]["site"]["module"] == "blocks.0.attn1"


def test_a_language_model_says_what_stands_for_the_sequence_read_last() -> None:
    model, given = tiny_language_models.build("llava"), tiny_language_models.inputs("llava")
    rule = {"where": {"layers": "1:"}, "patch": "visual_bias", "with": {"image_weight": 6.0}}
    with accelplug.apply(model, rule) as plug:
        assert [row.name for row in plug.where()] == ["dense"] + ["visual_bias"] * (len(plug.where()) - 1)
        assert not any(row.params for row in plug.where())
        out = model(**given, use_cache=True)
        rows = list(plug.where())
        assert rows[0].params is None
        assert all(row.params is not None for row in rows[1:])
        assert isinstance(rows[1].layout, Prompt)
        assert rows[1].layout.visual.any()
        del out
