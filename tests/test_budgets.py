"""Budgets by layer, head and step: tables of how much a selector reads, and the search for them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import accelplug
from accelplug.call import Clock
from accelplug.errors import RecipeError, UnsupportedError
from accelplug.patches.sparse.budgets import allocate
from accelplug.patches.sparse.template import BlockSparse
from accelplug.registry import list_patches, patch_class
from accelplug.table import Table
from tests import tiny_pipelines
from tests.test_repair_laws import LAYOUT, SITE, VIDEO, asked, call_of

CLASSES = {entry.name: patch_class(entry.name) for entry in list_patches()}
BUDGETED = {name: cls for name, cls in CLASSES.items() if issubclass(cls, BlockSparse) and cls.knob}
RASTER: dict[str, dict[str, Any]] = {
    "svg_ear": {"block_k": 8, "order": "raster"},
    "rectified": {"adjacent": False, "p": 0.0},
    "sol": {"band": 0},
}

every_knob = pytest.mark.parametrize("name", BUDGETED)


def patch_of(name: str, value: Any, **config: Any) -> BlockSparse:
    cls = BUDGETED[name]
    return cls({"block": 8, "backend": "reference", **RASTER.get(name, {}), cls.knob: value, **config})


def few_and_many(name: str) -> tuple[float, float]:
    """Values with which little is read, and much."""
    rungs = BUDGETED[name].rungs
    return rungs[2], rungs[-4]


def test_these_have_budgets() -> None:
    assert {"sol", "rows", "rectified", "psa", "svg_ear"} <= set(BUDGETED)


@every_knob
def test_each_head_reads_what_its_layer_and_step_have(name: str) -> None:
    few, many = few_and_many(name)
    values = torch.full((2, SITE.layers, 2), few)
    values[1, SITE.layer] = torch.tensor([few, many])
    call, patch = call_of(), patch_of(name, Table(values, ("steps", "layers", "heads")))
    early, late = (patch.attend(call, patch.prepare(SITE, LAYOUT, Clock(step, 4), {})) for step in (0, 3))
    little, much = (
        one.attend(call, one.prepare(SITE, LAYOUT, Clock(0, 4), {})) for one in (patch_of(name, v) for v in (few, many))
    )
    assert not torch.equal(little, much)
    torch.testing.assert_close(early, little)
    torch.testing.assert_close(late[:, 0], little[:, 0])
    torch.testing.assert_close(late[:, 1], much[:, 1])


@every_knob
def test_the_cost_rises_rung_by_rung(name: str) -> None:
    call, costs = call_of(), []
    for value in BUDGETED[name].rungs:
        patch = patch_of(name, Table(torch.full((SITE.layers, 2), value)))
        costs.append(patch.inspect(call, patch.prepare(SITE, LAYOUT, Clock(0, 4), {}))[0])
    assert costs == sorted(costs)
    assert costs[-1] > 2 * costs[0]


@every_knob
def test_layers_with_budgets_of_their_own_share_a_graph(name: str) -> None:
    torch._dynamo.reset()
    few, many = few_and_many(name)
    rows = torch.tensor([[few, many], [many, few], [many, many], [few, few]])
    counter, patch, call = CompileCounter(), patch_of(name, Table(rows)), call_of(VIDEO)

    @torch.compile(fullgraph=True, backend=counter)
    def attend(q: Any, k: Any, v: Any, params: Any) -> Any:
        return patch.attend(asked(q, k, v), params)

    for layer in range(4):
        params = patch.prepare(SITE.__class__("b", "transformer", "self", layer, 4), VIDEO, Clock(0, 4), {})
        torch.testing.assert_close(attend(call.q, call.k, call.v, params), patch.attend(call, params), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@every_knob
def test_a_budget_out_of_bounds_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=BUDGETED[name].knob):
        patch_of(name, Table(torch.full((4, 2), float("nan"))))


def test_the_allocation_is_the_best_at_its_cost() -> None:
    """Against all there are: with equal steps to the last, else but for one step. An infinite error is not taken."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        steps = torch.rand(4, 4, generator=generator, dtype=torch.float64)
        cost = (torch.ones_like(steps) if trial % 2 else steps).cumsum(-1)
        falls = torch.rand(4, 4, generator=generator, dtype=torch.float64)
        falls = falls.sort(-1, descending=True).values if trial % 2 else falls
        error = 5 - falls.cumsum(-1)
        error[0, 3] = torch.inf
        allowed = float(cost[:, 1].sum()) + 1e-9

        def of(x: torch.Tensor, choice: Any) -> float:
            return float(x.gather(-1, torch.as_tensor(choice)[:, None]).sum())

        choice = allocate(error, cost, allowed)
        assert of(cost, choice) <= allowed
        fitting = (other for other in product(range(4), repeat=4) if of(cost, other) <= allowed)
        best = min(of(error, other) for other in fitting)
        assert of(error, choice) <= best + (1e-9 if trial % 2 else float(falls.sum(-1).max()))


def calibrated(pipe: Any, inputs: dict[str, Any], recipe: Any, path: Path | None = None, **options: Any) -> Any:
    given = {key: value for key, value in inputs.items() if key != "output_type"}
    prompts = [given, given]  # with a seed of its own each
    return accelplug.calibrate(pipe, "budget", prompts, recipe=recipe, path=path, buckets=2, options=options, progress=False)


@every_knob
def test_a_recipe_with_budgets_costs_what_it_did(name: str, tmp_path: Path) -> None:
    """And is told on prompts that had no say; one that is repaired is judged repaired."""
    pipe, inputs = tiny_pipelines.decoding("wan")
    repair = {"repair": "output_query", "probes": 8} if name == "rows" else {}
    few, many = few_and_many(name)
    rule = {
        "patch": name,
        "with": {
            "block": 8,
            "backend": "reference",
            **RASTER.get(name, {}),
            BUDGETED[name].knob: (few + many) / 2,
            **repair,
        },
    }
    base = {"rules": [{"where": {"steps": "0:1"}, "patch": "dense"}, rule]}
    recipe = calibrated(pipe, inputs, base, tmp_path / "my.yaml", sensitivity=["steps", "layers"] if name == "sol" else [])
    assert "on held-out prompts" in recipe.summary
    values = recipe.rules[-1].settings[BUDGETED[name].knob]
    assert values.values.shape == (2, 2, 2)
    read = []
    for given in (base, recipe):
        with accelplug.apply(pipe, given, gate="off", strict=True) as plug, plug.trace() as events:
            pipe(**inputs)
        read.append(sum(event.density for event in events if event.patch == name))
    assert read[1] == pytest.approx(read[0], rel=0.15)  # plans differ by prompt, and along the run


@pytest.mark.parametrize("over", [("layers",), ("steps", "heads"), ("steps", "layers")])
def test_what_budgets_do_not_differ_by_is_shared(over: tuple[str, ...]) -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    rule = {"patch": "rows", "with": {"block": 8, "backend": "reference", "density": 0.3}}
    recipe = calibrated(pipe, inputs, rule, over=over, sensitivity=[])
    values = recipe.rules[0].settings["density"].values
    for axis, name in enumerate(("steps", "layers", "heads")):
        if name not in over:
            assert torch.equal(values, values.narrow(axis, 0, 1).expand_as(values))


def test_spans_that_are_dense_have_the_budgets_of_the_next() -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    rule = {"patch": "rows", "with": {"block": 8, "backend": "reference", "density": 0.3}}
    base = {"rules": [{"where": {"steps": "0:50%"}, "patch": "dense"}, rule]}
    values = calibrated(pipe, inputs, base, sensitivity=[]).rules[-1].settings["density"].values
    assert torch.equal(values[0], values[1])


@pytest.mark.parametrize("recipe", [{"patch": "dense"}, {"patch": "radial"}])
def test_a_recipe_without_budgets_is_refused(recipe: dict[str, Any]) -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    with pytest.raises(UnsupportedError, match="sol, rows"):
        calibrated(pipe, inputs, recipe)
