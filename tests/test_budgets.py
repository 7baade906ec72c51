"""Budgets by layer, head and step: tables of how much a selector reads, and the search for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from accelplug.call import Clock
from accelplug.errors import RecipeError
from accelplug.patches.sparse.template import BlockSparse
from accelplug.registry import list_patches, patch_class
from accelplug.table import Table
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
