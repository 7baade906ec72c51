"""Ranks share a denoiser's heads: two processes on the CPU, with diffusers' context or tensor parallelism, answer as one does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import accelplug
from accelplug import compat
from accelplug.call import Layout, Share
from accelplug.comparison.ranks import working
from accelplug.hosts import rebind
from accelplug.hosts.ulysses import Gathered
from accelplug.kernels.plan import pack_bits
from accelplug.table import Table
from accelplug.testing import models
from accelplug.testing.models import noise, raster_ids, settle
from examples.hunyuan_two_gpus import PLAN
from tests import tiny_models
from tests.two_ranks import together

BLOCK = {"block": 8, "backend": "reference"}
LAYERS, HEADS, BLOCKS = 3, 4, 9
"""Of the tiny Wan; every table has another entry for each of its heads."""


def wan() -> tuple[Any, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, given = models.wan(num_attention_heads=HEADS)
    return settle(model), given


def wan_recipes() -> dict[str, dict[str, Any]]:
    modes = torch.tensor([[[1, 2, 3, 1], [2, 3, 1, 2], [3, 1, 2, 0]]], dtype=torch.uint8)
    masks = torch.rand(1, LAYERS, HEADS, BLOCKS, BLOCKS, generator=torch.Generator().manual_seed(0)) < 0.4
    by_step = ("steps", "layers", "heads")
    order = Table(torch.arange(LAYERS * HEADS, dtype=torch.uint8).view(LAYERS, HEADS) % 6)
    masks_table = Table(pack_bits(masks | torch.eye(BLOCKS, dtype=torch.bool)), by_step)
    weight = Table(torch.linspace(0, 1, LAYERS * HEADS).view(LAYERS, HEADS))
    return {
        "radial": {"patch": "radial", "with": {**BLOCK, "decay": 0.2}},
        "sol": {"patch": "sol", "with": {**BLOCK, "tau": 0.5, "band": 0, "rest": "pool", "rest_weight": weight}},
        "sparse_vdit": {"patch": "sparse_vdit", "with": {**BLOCK, "modes": Table(modes, by_step), "multi_diagonal": 0.4}},
        "paro": {"patch": "paro", "with": {**BLOCK, "order": order, "masks": masks_table}},
        **repaired(),
    }


def repaired() -> dict[str, dict[str, Any]]:
    """From probes of their own, and from the rows that they score by."""
    own = {"tau": 1.5, "band": 0, "repair": "output_query", "probes": 6}
    shared = {"density": 0.3, "repair": "output", "order": "morton"}
    return {
        "sol, repaired": {"patch": "sol", "with": {**BLOCK, **own}},
        "rows, repaired": {"patch": "rows", "with": {**BLOCK, **shared}},
    }


def joint(name: str) -> tuple[Any, dict[str, Any]]:
    model, given = tiny_models.build(name)
    if name in ("flux", "flux2"):  # as much text for either rank
        ids = torch.zeros(8, 3) if name == "flux" else raster_ids(1, 1, 1, 8)[None]
        given = {**given, "encoder_hidden_states": noise(1, 8, 32), "txt_ids": ids}
    return model, given


def joint_recipes(name: str) -> dict[str, dict[str, Any]]:
    layers = {"flux": 4, "flux2": 3, "qwen_image": 2, "hunyuan_video": 3}[name]
    weight = Table(torch.linspace(0, 1, layers * 2).view(layers, 2))
    sol = {**BLOCK, "tau": 0.5, "band": 0, "rest": "pool", "rest_weight": weight}
    return {"sol": {"patch": "sol", "with": sol}, **repaired()}


CASES = {"wan, context": (wan, wan_recipes)} | {
    f"{name}, {kind}": (partial(joint, name), partial(joint_recipes, name))
    for name in ("flux", "flux2", "qwen_image")
    for kind in ("context", "tensor")
}
CASES["hunyuan_video, context"] = (partial(joint, "hunyuan_video"), partial(joint_recipes, "hunyuan_video"))


@torch.no_grad()
def forward(model: Any, given: dict[str, Any]) -> torch.Tensor:
    return model(**given, return_dict=False)[0].clone()


def answers(model: Any, given: dict[str, Any], recipes: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What it gives dense, with every recipe, and dense again."""
    found = {"dense": forward(model, given)}
    for name, recipe in recipes.items():
        with accelplug.apply(model, recipe, gate="off", strict=True) as plug:
            for step in range(2 if "repaired" in name else 1):  # what is learned in one is taken to the next
                plug.step(step, 2)
                found[name] = forward(model, given)
            assert ("repaired" in name) == bool(plug.report().errors)
    return {**found, "after": forward(model, given)}


def share(model: Any, kind: str) -> None:
    """What ``enable_parallelism`` does, which asks for an accelerator."""
    from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig
    from diffusers.hooks import apply_context_parallel, tensor_parallel

    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)  # this process is the test's own
    context, tensors = ContextParallelConfig(ulysses_degree=2), TensorParallelConfig(tp_degree=2)
    config = ParallelConfig(**{f"{kind}_parallel_config": context if kind == "context" else tensors})
    shape, names = ((1, 2), ("ring", "ulysses")) if kind == "context" else ((2,), ("tp",))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
    config.setup(torch.distributed.get_rank(), 2, torch.device("cpu"), mesh=mesh)
    model._parallel_config = config
    if kind == "tensor":
        tensor_parallel.apply_tensor_parallel(model, tensors, model._tp_plan)
        return
    set_on_processors(model, config)
    apply_context_parallel(model, context, model._cp_plan or PLAN)  # diffusers has no plan for HunyuanVideo


def set_on_processors(model: Any, config: Any) -> None:
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config


def work(rank: int, folder: str) -> dict:
    found = {}
    for name, (make, recipes) in CASES.items():
        model, given = make()
        share(model, name.split(", ")[1])
        with working(model) as ranks:
            assert (ranks.joined, ranks.gather(rank)) == (True, [0])
        found[name] = answers(model, given, recipes())
    model, given = wan()
    with accelplug.apply(model, wan_recipes()["radial"], gate="off", strict=True) as plug:
        share(model, "context")
        late = forward(model, given)
        assert {site.heads for site in plug.sites} == {Share(rank, 2)}
    found["late"] = {"radial": late, "after": forward(model, given)}
    return found


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no distributed package")
def test_two_ranks_answer_as_one(tmp_path: Path) -> None:
    expected = {name: answers(*make(), recipes()) for name, (make, recipes) in CASES.items()}
    expected["late"] = {name: expected["wan, context"][name] for name in ("radial", "after")}
    for found in together(work, tmp_path):
        for case, wanted in expected.items():
            exact = case in ("wan, context", "late")  # the joint models' projections round otherwise, dense too
            for name, tensor in wanted.items():
                torch.testing.assert_close(found[case][name], tensor, rtol=0, atol=0 if exact else 2e-6)
                if name not in ("dense", "after"):
                    assert (tensor - wanted["after"]).abs().max() > 1e-2, (case, name)
            assert torch.equal(found[case]["after"], found[case].get("dense", found[case]["after"]))


def test_ranks_hand_over_text_and_grid_side_by_side() -> None:
    layout = Layout((1, 2, 3), text_before=3)
    gathered = Gathered.of(layout, 2)
    assert gathered.token.tolist() == [0, 1, 3, 4, 5, 2, 6, 7, 8]
    x = torch.randn(1, 9, 2, 4)
    assert torch.equal(gathered.in_order(x[:, gathered.token]), x)
    assert torch.equal(gathered.as_gathered(x), x[:, gathered.token])
    rows = torch.rand(1, 1, 9, 9)
    assert torch.equal(gathered.mask_in_order(rows[..., gathered.token, :][..., gathered.token]), rows)
    assert torch.equal(gathered.mask_in_order(rows[0, 0, :1, gathered.token]), rows[0, 0, :1])
    assert Gathered.of(Layout((1, 2, 3)), 2) is None


def test_a_share_of_the_heads() -> None:
    assert [list(Share(rank, 2).of(5)) for rank in range(2)] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("name", "ring", "reason"),
    [("wan", 2, "that do not exchange"), ("hunyuan_video_15", 1, "not understood under context parallelism")],
)
def test_what_is_not_known_runs_dense_and_is_counted(
    monkeypatch: pytest.MonkeyPatch, name: str, ring: int, reason: str
) -> None:
    """Ring attention reads a part of the keys at a time; how the texts and the grid of HunyuanVideo 1.5 would be split, nobody says."""
    model, given = tiny_models.build(name)
    wanted = forward(model, given)
    context = SimpleNamespace(ring_degree=ring, ulysses_degree=3 - ring, _ulysses_local_rank=0)
    model._parallel_config = SimpleNamespace(context_parallel_config=context)
    set_on_processors(model, model._parallel_config)
    stock = rebind._stock_dispatch  # one process: it exchanges with nobody

    def exchange(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scale: float,
        forward_op: Callable[..., torch.Tensor],
        backward_op: object,
        _parallel_config: object,
    ) -> torch.Tensor:
        return forward_op(None, q, k, v, mask)

    monkeypatch.setattr(rebind, "_stock_dispatch", lambda *args, parallel_config=None, **more: stock(*args, **more))
    monkeypatch.setattr(compat.diffusers, "context_parallel_attention", lambda: exchange)
    with accelplug.apply(model, wan_recipes()["radial"], gate="off") as plug:
        assert torch.equal(forward(model, given), wanted)
    assert any(reason in what for what in plug.report().fallbacks)
