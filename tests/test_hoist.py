"""Orders that blocks share are applied once: the same results, fewer permutes, nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import accelplug
from accelplug.call import Layout
from accelplug.hosts.diffusers import DenoiserHost
from accelplug.kernels import orders
from accelplug.kernels.orders import tiles
from accelplug.testing.laws import run_once, snapshot_of
from accelplug.testing.models import WAN_CONFIG, noise
from tests import tiny_models

SOL = {"block": 8, "tau": 0.5, "band": 0, "backend": "reference"}
LAYERS = 5


def built(**config: Any) -> tuple[Any, dict[str, Any]]:
    """Five blocks, a batch of two, and 3 x 5 x 7 = 105 tokens: the last block of 8 has one."""
    model = diffusers.WanTransformer3DModel(**WAN_CONFIG, num_layers=LAYERS, in_channels=4, out_channels=4, **config)
    model.eval().requires_grad_(False)
    inputs = {
        "hidden_states": noise(2, 4, 3, 10, 14),
        "timestep": torch.tensor([500, 300]),
        "encoder_hidden_states": noise(2, 12, 16),
    }
    return model, inputs


def recipe(order: str, dense: str | None = None, patch: str = "sol", **config: Any) -> dict[str, Any]:
    common = SOL if patch == "sol" else {"block": 8, "backend": "reference"}
    rules: list[dict[str, Any]] = [{"patch": patch, "with": {**common, "order": order, **config}}]
    return {"rules": [{"where": {"layers": dense}, "patch": "dense"}, *rules] if dense else rules}


def unhoisted(plug: accelplug.Plug) -> None:
    for host in plug.hosts:
        assert isinstance(host, DenoiserHost)
        host.hoist.scheme = None


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what attention calls permute or un-permute."""
    seen: list[tuple[int, ...]] = []
    take = orders.take

    def counting(x: Tensor, index: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return take(x, index)

    monkeypatch.setattr(orders, "take", counting)
    return seen


def both_ways(model: Any, inputs: dict[str, Any], rules: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, int]]:
    with accelplug.apply(model, rules, gate="off") as plug:
        unhoisted(plug)
        plain = run_once(model, inputs)
        assert not plug.report().hoisted
    with accelplug.apply(model, rules, gate="off") as plug:
        hoisted = run_once(model, inputs)
        return plain, hoisted, plug.report().hoisted


@pytest.mark.parametrize("order", ["morton", "hilbert", "wht"])
@pytest.mark.parametrize("dense", [None, "0", "2", "4"])
def test_hoisted_is_unhoisted(order: str, dense: str | None) -> None:
    model, inputs = built()
    stock = run_once(model, inputs)
    plain, hoisted, where = both_ways(model, inputs, recipe(order, dense))
    assert not torch.allclose(plain, stock, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(hoisted, plain, rtol=1e-4, atol=1e-5)
    runs = {None: ["0 to 4"], "0": ["1 to 4"], "2": ["0 to 1", "3 to 4"], "4": ["0 to 3"]}[dense]
    expected = [f"once for blocks.{first} to blocks.{last}" for first, _, last in map(str.split, runs)]
    assert where == dict.fromkeys(expected, 1)


@pytest.mark.parametrize(
    ("patch", "config"),
    [
        ("rectified", {"drop_rate": 0.8}),  # whether blocks touch
        ("psa", {"bounds": [0.2, 0.3, 0.5, 0.8]}),
        ("sol", {"rest": "rectified"}),
        ("sol", {"rest": "tied"}),
        ("sol", {"rest": "linear"}),
        ("sol", {"statistic": "subblock", "least": 2}),
    ],
)
def test_methods_that_ask_where_tokens_are_are_told(patch: str, config: dict[str, Any]) -> None:
    model, inputs = built()
    plain, hoisted, where = both_ways(model, inputs, recipe("morton", None, patch, **config))
    assert where
    torch.testing.assert_close(hoisted, plain, rtol=1e-4, atol=1e-5)


def test_a_static_plan_in_tiles_that_fill_blocks() -> None:
    model, inputs = built()
    inputs["hidden_states"] = noise(2, 4, 4, 8, 16)  # 4 x 4 x 8 tokens
    rule = {
        "patch": "neighborhood",
        "with": {"block": 8, "window": [1, 3, 3], "tile_thw": [1, 2, 4], "backend": "reference"},
    }
    plain, hoisted, where = both_ways(model, inputs, {"rules": [rule]})
    assert where
    torch.testing.assert_close(hoisted, plain, rtol=1e-4, atol=1e-5)


def test_modulation_by_token_and_image_conditions() -> None:
    model, inputs = built()
    timestep = torch.full((2, 105), 500)
    timestep[:, :35] = 0
    plain, hoisted, where = both_ways(model, inputs | {"timestep": timestep}, recipe("morton"))
    assert where
    torch.testing.assert_close(hoisted, plain, rtol=1e-4, atol=1e-5)

    model, inputs = tiny_models.build("wan_i2v")
    plain, hoisted, where = both_ways(model, inputs, recipe("morton"))
    assert where
    torch.testing.assert_close(hoisted, plain, rtol=1e-4, atol=1e-5)


def test_attention_permutes_nothing_inside_a_run(moved: list[tuple[int, ...]]) -> None:
    model, inputs = built()
    with accelplug.apply(model, recipe("morton", "2"), gate="off") as plug:
        run_once(model, inputs)
        assert moved == []
        unhoisted(plug)
        run_once(model, inputs)
        assert len(moved) == 4 * (LAYERS - 1)


def test_a_call_that_runs_dense_inside_a_run_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an obstacle is met in the call itself: self-attention permutes with its tokens."""
    monkeypatch.setattr(DenoiserHost, "_obstacle", lambda self, record, *_: "as told" if record.site.layer == 2 else None)
    model, inputs = built()
    outputs = []
    for hoists in (False, True):
        with accelplug.apply(model, recipe("morton"), gate="off") as plug:
            if not hoists:
                unhoisted(plug)
            outputs.append(run_once(model, inputs))
            assert plug.report().fallbacks == {"blocks.2.attn1: as told": 1}
            assert bool(plug.report().hoisted) is hoists
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_dense_steps_and_neutral_configs_are_dense_to_the_bit() -> None:
    model, inputs = built()
    dense = run_once(model, inputs)
    rules = {"rules": [{"where": {"steps": "1:"}, "patch": "sol", "with": {**SOL, "order": "morton"}}]}
    with accelplug.apply(model, rules, gate="off") as plug:
        for step, forwards in ((0, 0), (1, 1), (0, 1), (2, 2)):
            plug.step(step, 3)
            assert torch.equal(run_once(model, inputs), dense) is (step == 0)
            assert sum(plug.report().hoisted.values()) == forwards
    with accelplug.apply(model, recipe("morton", tau="dense"), gate="off") as plug:
        assert torch.equal(run_once(model, inputs), dense)
        assert not plug.report().hoisted


def test_orders_that_differ_or_are_raster_or_pad_inside_are_not_hoisted() -> None:
    model, inputs = built()
    alternate = [
        {"where": {"layers": [0, 2, 4]}, "patch": "sol", "with": {**SOL, "order": "morton"}},
        *recipe("hilbert")["rules"],
    ]
    for rules in ({"rules": alternate}, recipe("raster"), recipe("tile", tile_thw=[1, 2, 3])):
        with accelplug.apply(model, rules, gate="off") as plug:
            run_once(model, inputs)
            assert plug.report().served == {"sol": LAYERS}
            assert not plug.report().hoisted


def test_what_can_be_applied() -> None:
    odd, even = Layout((3, 5, 7)), Layout((4, 4, 8))
    assert tiles(odd, "morton", 8).can_be_applied
    assert not tiles(odd, "raster", 8).can_be_applied
    assert not tiles(odd, "tile", 8, (1, 2, 4)).can_be_applied
    assert tiles(even, "tile", 8, (1, 2, 4)).can_be_applied
    assert not tiles(Layout((3, 5, 7), text_before=5), "morton", 8).can_be_applied


def test_the_gate_judges_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelplug.hosts import gate

    model, inputs = built()
    dense = run_once(model, inputs)
    for dense_ms, sparse_ms, pays in ((1.0, 2.0, False), (2.0, 1.0, True)):
        ms = iter([dense_ms, sparse_ms] * 10)
        monkeypatch.setattr(gate, "median_ms", lambda run, device: next(ms))  # noqa: B023
        with accelplug.apply(model, recipe("morton")) as plug:
            run_once(model, inputs)
            assert not plug.report().hoisted
            assert torch.equal(run_once(model, inputs), dense) is not pays
            assert bool(plug.report().hoisted) is pays


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = built()
    dense, before = run_once(model, inputs), snapshot_of(model)
    plug = accelplug.apply(model, recipe("morton"), gate="off")
    on = snapshot_of(model)
    sparse = run_once(model, inputs)
    assert snapshot_of(model) == on, "a forward leaves something on the model"
    with monkeypatch.context() as patch:
        patch.setattr(type(model.blocks[2].ffn), "forward", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_once(model, inputs)
    assert snapshot_of(model) == on, "an interrupted forward leaves something on the model"
    assert not any(record.params.tiles.applied for record in plug.hosts[0].records if record.params)
    assert torch.equal(run_once(model, inputs), sparse)
    plug.remove()
    assert snapshot_of(model) == before
    assert torch.equal(run_once(model, inputs), dense)


def test_a_deep_copy_made_in_the_middle_of_a_forward_is_stock() -> None:
    model, inputs = built()
    dense = run_once(model, inputs)
    twins = []
    handle = model.condition_embedder.register_forward_hook(lambda *_: twins.append(copy.deepcopy(model)))
    with accelplug.apply(model, recipe("morton"), gate="off") as plug:
        run_once(model, inputs)
        assert plug.report().hoisted
    handle.remove()
    twins[0].condition_embedder._forward_hooks.clear()
    assert torch.equal(run_once(twins[0], inputs), dense)


def test_blocks_that_others_look_into_end_a_run() -> None:
    model, inputs = built()
    seen: dict[Any, Any] = {}
    with accelplug.apply(model, recipe("morton"), gate="off") as plug:
        unhoisted(plug)
        handle = model.blocks[2].register_forward_hook(lambda module, args, output: seen.update(plain=output))
        run_once(model, inputs)
    handle.remove()
    with accelplug.apply(model, recipe("morton"), gate="off") as plug:
        handle = model.blocks[2].register_forward_hook(lambda module, args, output: seen.update(hoisted=output))
        run_once(model, inputs)
        assert set(plug.report().hoisted) == {
            "once for blocks.0 to blocks.1",
            "once for blocks.3 to blocks.4",
            "by every call, because others look into blocks",
        }
    handle.remove()
    torch.testing.assert_close(seen["hoisted"], seen["plain"], rtol=1e-4, atol=1e-5)


def test_a_step_cache_sees_tokens_in_their_own_order() -> None:
    model, inputs = built()
    with accelplug.apply(model, recipe("morton", "0"), gate="off") as plug:
        expected = run_once(model, inputs)
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
        with model.cache_context("cond"):
            torch.testing.assert_close(run_once(model, inputs), expected, rtol=1e-4, atol=1e-5)
            again = run_once(model, inputs)  # the cache answers: the first block and the residual of the others
        model.disable_cache()
        assert plug.report().hoisted["by every call, because others look into blocks"] >= 1
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["wan_vace", "skyreels"])
def test_models_between_whose_blocks_more_happens_are_left_alone(name: str) -> None:
    model, inputs = tiny_models.build(name)
    with accelplug.apply(model, recipe("morton"), gate="off") as plug:
        run_once(model, inputs)
        assert plug.report().served["sol"]
        assert not plug.report().hoisted


@pytest.mark.parametrize("kind", ["regional", "whole"])
def test_compiled_blocks_permute_themselves(kind: str) -> None:
    torch._dynamo.reset()
    model, inputs = built()
    with accelplug.apply(model, recipe("morton"), gate="off") as plug:
        hoisted = run_once(model, inputs)  # eager, then compiled, then eager again: nothing of one is left to the other
        counter = CompileCounter()
        if kind == "regional":
            model.compile_repeated_blocks(fullgraph=True, backend=counter)
        forward = model if kind == "regional" else torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(2):
            torch.testing.assert_close(run_once(forward, inputs), hoisted, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1
        said = plug.report().hoisted
        assert said.get("by every call, because blocks are compiled", 0) == (2 if kind == "regional" else 0)
        for block in model.blocks:
            block._compiled_call_impl = None
        assert torch.equal(run_once(model, inputs), hoisted)
    torch._dynamo.reset()
