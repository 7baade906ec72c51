"""torch.compile and a plug, in either order: right results, one graph a policy, and no word with stock models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import accelplug
from accelplug.testing.laws import Subject, run_once
from tests import tiny_models
from tests.patch_rows import DENOISING, ROWS


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, kind: str, counter: CompileCounter) -> Any:
    if kind == "regional":
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        return model
    return torch.compile(model, fullgraph=True, backend=counter)


EVERY_WAY = ("radial", "sol", "tome", "vmoba")
"""Rows for every way of compiling: one by layout, one by scores, one without blocks, and one with a graph for each kind of layer."""
WAYS = [
    pytest.param(row, kind, first, id=f"{row.patch}-{kind}-{first}-first")
    for row in DENOISING.values()
    for kind in ("regional", "whole")
    for first in ("apply", "compile")
    if row.patch in EVERY_WAY or (kind, first) == ("regional", "apply")
]


@pytest.mark.parametrize(("row", "kind", "first"), WAYS)
def test_compiled_equals_eager_with_a_graph_a_policy(row: Subject, kind: str, first: str) -> None:
    model, inputs = tiny_models.build("wan")
    dense = run_once(model, inputs)
    recipe = row.recipe(steps="1:")
    eager = []
    with accelplug.apply(model, recipe, gate="off") as plug:
        for step in range(4):
            plug.step(step, 4)
            eager.append(run_once(model, inputs))
    assert torch.equal(eager[0], dense)
    assert not torch.equal(eager[1], dense)
    counter = CompileCounter()
    forward = compiled(model, kind, counter) if first == "compile" else model
    plug = accelplug.apply(model, recipe, gate="off")
    forward = compiled(model, kind, counter) if first == "apply" else forward
    for step in range(4):
        plug.step(step, 4)
        with model.cache_context("cond"):
            out = run_once(forward, inputs)
        torch.testing.assert_close(out, eager[step], rtol=1e-4, atol=1e-5)
    assert 2 <= counter.frame_count <= 1 + row.graphs, "more graphs than policies (dense, sparse)"
    plug.remove()
    torch.testing.assert_close(run_once(forward, inputs), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan_video", "qwen_image", "cosmos3", "minimax_h3"])
def test_many_layers_share_a_graph(name: str) -> None:
    model, inputs = tiny_models.build(name)
    counter = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    run_once(model, inputs)
    stock = counter.frame_count
    with accelplug.apply(model, ROWS["radial"].recipe(), gate="off") as plug:
        run_once(model, inputs)
        assert not plug.report().fallbacks
    assert counter.frame_count <= 2 * stock


def test_the_first_patched_call_of_a_thread_may_be_compiled() -> None:
    """What a thread knows of the processor that runs is there before Dynamo guards on it."""
    model, inputs = tiny_models.build("wan")
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    eager, _ = tiny_models.build("wan")
    recipe = ROWS["radial"].recipe()
    with accelplug.apply(model, recipe, gate="off"), ThreadPoolExecutor(1) as thread:
        there = thread.submit(run_once, model, inputs).result()
    with accelplug.apply(eager, recipe, gate="off"):
        torch.testing.assert_close(there, run_once(eager, inputs), rtol=1e-4, atol=1e-5)


def test_a_unet_compiled_whole_is_dense_and_counted() -> None:
    """The grids of its levels come from hooks that a whole graph does not run."""
    model, inputs = tiny_models.build("unet_sd15")
    dense = run_once(model, inputs)
    with accelplug.apply(model, ROWS["neighborhood"].recipe(), gate="off") as plug:
        torch.testing.assert_close(run_once(torch.compile(model, backend="eager"), inputs), dense, rtol=1e-4, atol=1e-5)
        assert plug.report().fallbacks


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("name", ["sd3", "cogvideox"])
def test_stock_and_patched_compiled_in_one_process(name: str, patched_first: bool) -> None:
    """Processors that never read ``self``, with a graph break inside, must not run each other's frames."""
    stock, inputs = tiny_models.build(name)
    patched, _ = tiny_models.build(name)
    dense = run_once(stock, inputs)
    recipe = ROWS["neighborhood"].recipe()
    with accelplug.apply(patched, recipe, gate="off"):
        sparse = run_once(patched, inputs)
        assert not torch.equal(dense, sparse)
        pairs = [(patched, sparse), (stock, dense)]
        for model, expected in pairs if patched_first else pairs[::-1]:
            for attention in (m for m in model.modules() if hasattr(m, "norm_q") and m.norm_q is not None):
                attention.norm_q.register_forward_hook(_break_the_graph)
            forward = torch.compile(model, backend="eager")
            for _ in range(2):
                torch.testing.assert_close(run_once(forward, inputs), expected, rtol=1e-4, atol=1e-5)


def _break_the_graph(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    torch._dynamo.graph_break()
    return output


@pytest.mark.parametrize("kind", ["regional", "whole", "in place"])
def test_a_recipe_that_goes_on_again_is_on_in_what_was_compiled(kind: str) -> None:
    """Dynamo guards no hooks: graphs of an earlier plug must not serve a later one."""
    model, inputs = tiny_models.build("wan")
    recipe, dense = ROWS["radial"].recipe(), run_once(model, inputs)
    with accelplug.apply(model, recipe, gate="off"):
        eager = run_once(model, inputs)
    if kind == "in place":
        model.compile(backend="eager")
    called = model if kind == "in place" else compiled(model, kind, CompileCounter())
    for _ in range(2):
        with accelplug.apply(model, recipe, gate="off", strict=True):
            torch.testing.assert_close(run_once(called, inputs), eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run_once(called, inputs), dense, rtol=1e-4, atol=1e-5)


def test_a_deep_copy_of_a_patched_model_is_stock() -> None:
    model, inputs = tiny_models.build("wan")
    dense = run_once(model, inputs)
    with accelplug.apply(model, ROWS["radial"].recipe(), gate="off") as plug:
        twin = copy.deepcopy(model)
        assert torch.equal(run_once(twin, inputs), dense)
        assert all(type(a) is type(a).__mro__[0] and not hasattr(type(a), "stock") for a in twin.attn_processors.values())
        with accelplug.apply(twin, ROWS["radial"].recipe(), gate="off"):
            assert not torch.equal(run_once(twin, inputs), dense)
        assert plug.active
    assert torch.equal(run_once(twin, inputs), dense)


def test_the_gate_judges_compiled_blocks_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelplug.hosts import gate

    model, inputs = tiny_models.build("wan")
    dense = run_once(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    state = torch.get_rng_state()
    for dense_ms, sparse_ms, pays in ((1.0, 2.0, False), (2.0, 1.0, True)):
        ms = iter([dense_ms, sparse_ms] * 10)
        monkeypatch.setattr(gate, "median_ms", lambda run, device: next(ms))  # noqa: B023
        with accelplug.apply(model, ROWS["radial"].recipe()) as plug:
            out = run_once(model, inputs)
            assert [verdict["pays"] for verdict in plug.choices["verdicts"]] == [pays]
        assert torch.allclose(out, dense, rtol=1e-4, atol=1e-5) is not pays
    assert torch.equal(torch.get_rng_state(), state)
