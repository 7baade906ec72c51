"""Patches say how large their error is: in traces and reports, eager and compiled, and a bound on it leaves calls dense."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import accelplug
from accelplug.errors import AccelplugError, FallbackError, UnsupportedError
from accelplug.testing.laws import run_once
from tests import tiny_models
from tests.patch_rows import ROWS

MENDED = {**ROWS["sol"].working, "tau": 1.5, "repair": "output_query", "probes": 30}
RECIPE = ROWS["sol"].recipe(MENDED)
MODULES = [f"blocks.{layer}.attn1" for layer in range(3)]
ABOVE = "its estimated error is above max_error"


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def wan() -> tuple[Any, dict[str, Any]]:
    return tiny_models.build("wan")


def steps(plug: accelplug.Plug, model: Any, inputs: dict[str, Any], number: int = 3, forward: Any = None) -> list[Tensor]:
    outs = []
    for step in range(number):
        plug.step(step, number)
        with model.cache_context("cond"):
            outs.append(run_once(model if forward is None else forward, inputs))
    return outs


def test_events_and_reports_have_the_estimate(wan: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = wan
    with accelplug.apply(model, RECIPE, gate="off") as plug, plug.trace() as events:
        steps(plug, model, inputs)
        ours = [event for event in events if event.patch == "sol"]
        assert len(ours) == 9
        assert all(event.error is not None and 0 < event.error < 2 for event in ours)
        report = plug.report()
        assert not report.errors_by_layer, "only if asked for"
        spread = report.errors["sol"]
        worst = max(ours, key=lambda event: event.error or 0)
        assert (spread.worst, spread.module, spread.step) == (worst.error, worst.site.module, worst.clock.step)
        assert sorted(event.error or 0 for event in ours)[4] == spread.median
        assert f"estimated error of sol: median {spread.median:.3f}, worst {spread.worst:.3f}" in str(report)
        by_layer = plug.report(by_layer=True)
        assert list(by_layer.errors_by_layer) == [f"transformer.{module}" for module in MODULES]
        assert "estimated error at transformer.blocks.0.attn1: median" in str(by_layer)
        json.dumps(by_layer.to_dict())


def test_where_tells_the_repair_and_the_last_estimate(wan: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = wan
    with accelplug.apply(model, RECIPE, gate="off") as plug:
        assert {(row.repairs, row.error) for row in plug.where()} == {("output_query, 30 rows exact, carry 0.5", None)}
        steps(plug, model, inputs)
        last = {said.site.module: said.error for said in plug.estimates if said.clock.step == 2}
        assert {row.site.module: row.error for row in plug.where()} == last
        worst = max(last, key=lambda module: last[module])
        assert f"{last[worst]:.3f}" in str(plug.where())
        assert "estimated" in str(plug.where())
    with accelplug.apply(model, ROWS["sol"].recipe(), gate="off") as plug:
        assert {(row.repairs, row.error) for row in plug.where()} == {("", None)}
        assert "estimated" not in str(plug.where())


def test_estimates_are_those_of_the_latest_run(wan: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = wan
    with accelplug.apply(model, RECIPE, gate="off") as plug:
        steps(plug, model, inputs, 3)
        assert {said.clock.step for said in plug.estimates} == {0, 1, 2}
        steps(plug, model, inputs, 2)
        assert {said.clock.step for said in plug.estimates} == {0, 1}, "step 2 was the run's before"


def test_the_estimate_is_that_of_the_call(wan: tuple[Any, dict[str, Any]]) -> None:
    """Held-back rows say about what all rows would."""
    model, inputs = wan
    plug = accelplug.apply(model, RECIPE, gate="off")
    (patch,) = {row.patch for row in plug.where()}
    assert patch is not None
    found, attend = [], type(patch).attend

    def heard(call: Any, params: Any) -> Tensor:
        out, dense = attend(patch, call, params), call.dense()
        found.append((float(call.error), float((out - dense).norm() / dense.norm())))
        return out

    vars(patch)["attend"] = heard
    run_once(model, inputs)
    assert len(found) == 3
    assert all(0.4 < said / true < 2.5 for said, true in found), found


def test_a_step_learns_from_the_last_one(wan: tuple[Any, dict[str, Any]]) -> None:
    """In one run; its first step stands alone."""
    model, inputs = wan
    with accelplug.apply(model, RECIPE, gate="off") as plug:
        carried = steps(plug, model, inputs)
    with accelplug.apply(model, ROWS["sol"].recipe({**MENDED, "carry": 0.0}), gate="off") as plug:
        alone = steps(plug, model, inputs)
    assert torch.equal(carried[0], alone[0])
    assert all(torch.equal(out, alone[0]) for out in alone), "nothing moves"
    assert not torch.equal(carried[1], alone[1])
    assert not torch.equal(carried[2], carried[1])


def test_without_repair_there_is_no_estimate(wan: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = wan
    with accelplug.apply(model, ROWS["sol"].recipe(), gate="off") as plug, plug.trace() as events:
        run_once(model, inputs)
        assert all(event.error is None for event in events)
        assert not plug.report().errors


@pytest.mark.parametrize("kind", ["regional", "whole"])
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_code_says_what_eager_code_says(wan: tuple[Any, dict[str, Any]], kind: str, backend: str) -> None:
    model, inputs = wan
    with accelplug.apply(model, RECIPE, gate="off") as plug:
        steps(plug, model, inputs)
        eager = plug.report(by_layer=True)
    if kind == "regional":
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    forward = model if kind == "regional" else torch.compile(model, fullgraph=True, backend=backend)
    with accelplug.apply(model, RECIPE, gate="off") as plug:
        steps(plug, model, inputs, forward=forward)
        report = plug.report(by_layer=True)
        assert set(report.errors_by_layer) == set(eager.errors_by_layer)
        for module, spread in report.errors_by_layer.items():
            assert spread.worst == pytest.approx(eager.errors_by_layer[module].worst, rel=1e-3)
            assert spread.median == pytest.approx(eager.errors_by_layer[module].median, rel=1e-3)


def test_calls_above_the_bound_are_dense_and_counted(wan: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = wan
    dense = run_once(model, inputs)
    with accelplug.apply(model, RECIPE, gate="quality", max_error=1e-6) as plug, plug.trace() as events:
        assert torch.equal(run_once(model, inputs), dense)
        assert plug.report().fallbacks == {f"{module}: {ABOVE}=1e-06": 1 for module in MODULES}
        assert {(event.patch, event.reason, event.density) for event in events} == {("dense", f"{ABOVE}=1e-06", 1.0)}
        assert all(event.error for event in events), "the estimate that was too high"
        assert plug.report().served == {"dense": 3}
    with accelplug.apply(model, RECIPE, gate="off") as plug, plug.trace() as events:
        free = run_once(model, inputs)
    with accelplug.apply(model, RECIPE, gate="quality", max_error=10.0) as plug:
        assert torch.equal(run_once(model, inputs), free)
        assert not plug.report().fallbacks
    middle = sorted(event.error or 0 for event in events)[1]
    with accelplug.apply(model, RECIPE, gate="quality", max_error=middle) as plug, plug.trace() as events:
        run_once(model, inputs)
        for event in events:
            assert (event.patch == "sol") == ((event.error or 0) <= middle)
    with (
        accelplug.apply(model, RECIPE, gate="quality", max_error=1e-6, strict=True),
        pytest.raises(FallbackError, match=ABOVE),
    ):
        run_once(model, inputs)


def test_too_few_tokens_to_probe_are_told(wan: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = wan
    with accelplug.apply(model, ROWS["sol"].recipe({**MENDED, "probes": 0.1}), gate="off") as plug:
        steps(plug, model, inputs)
        report = plug.report()
        assert (report.unestimated, report.errors) == ({"sol": 9}, {})
        assert "not repaired by sol: 9 calls of the last run: too few tokens to probe" in str(report)
    with accelplug.apply(model, RECIPE, gate="off") as plug:
        steps(plug, model, inputs)
        assert not plug.report().unestimated


def test_without_enough_probes_for_an_estimate_a_bound_leaves_calls_dense(wan: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = wan
    dense = run_once(model, inputs)
    with accelplug.apply(model, ROWS["sol"].recipe({**MENDED, "probes": 1000}), gate="quality", max_error=10.0) as plug:
        assert torch.equal(run_once(model, inputs), dense)
        assert len(plug.report().fallbacks) == 3


@pytest.mark.parametrize("kind", ["regional", "whole"])
def test_compiled_code_is_judged_a_step_late(wan: tuple[Any, dict[str, Any]], kind: str) -> None:
    """A site whose estimate was above the bound is dense in the next step, and tries again in the one after."""
    model, inputs = wan
    dense = run_once(model, inputs)
    if kind == "regional":
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    forward = model if kind == "regional" else torch.compile(model, fullgraph=True, backend="eager")
    with accelplug.apply(model, RECIPE, gate="quality", max_error=1e-6) as plug:
        outs = steps(plug, model, inputs, 4, forward)
        is_dense = [torch.allclose(out, dense, rtol=1e-4, atol=1e-5) for out in outs]
        assert is_dense == [False, True, False, True]
        assert {f"{module}: {ABOVE}=1e-06, in the step before" for module in MODULES} <= set(plug.report().fallbacks)
    with accelplug.apply(model, RECIPE, gate="quality", max_error=10.0) as plug:
        steps(plug, model, inputs, 3, forward)
        assert not plug.report().fallbacks


def test_choices_hold_the_bound(wan: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = wan
    dense = run_once(model, inputs)
    with accelplug.apply(model, RECIPE, gate="quality", max_error=1e-6) as plug:
        choices = json.loads(json.dumps(plug.choices))
    with accelplug.apply(model, RECIPE, choices=choices) as plug:
        assert torch.equal(run_once(model, inputs), dense)
        assert plug.choices == choices


@pytest.mark.parametrize(
    "given",
    [
        {"gate": "quality"},
        {"max_error": 0.1},
        *({"gate": "quality", "max_error": bad} for bad in (0, -1, True, "0.1", float("nan"))),
    ],
)
def test_a_bound_and_its_gate_go_together(wan: tuple[Any, dict[str, Any]], given: dict[str, Any]) -> None:
    with pytest.raises(AccelplugError, match="max_error"):
        accelplug.apply(wan[0], RECIPE, **given)


def test_a_bound_needs_patches_that_estimate(wan: tuple[Any, dict[str, Any]]) -> None:
    recipe = {"rules": [{"where": {"layers": 0}, "patch": "dense"}, {"patch": "radial", "with": {"block": 8}}]}
    with pytest.raises(UnsupportedError, match="radial without one"):
        accelplug.apply(wan[0], recipe, gate="quality", max_error=0.1)
    assert not wan[0]._forward_pre_hooks
