"""Patches that are given what enters attention modules: merged ahead of the projections, and undone behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import accelplug
from accelplug.hosts.models import attends
from accelplug.kernels.merge import match, merge, partition, slot_sizes, unmerge
from accelplug.testing.encoders import dinov2
from accelplug.testing.laws import (
    batch_two_is_two_batches_of_one,
    copies_are_stock,
    it_does_something_and_undoes_it,
    low_precision_stays_finite,
    neutral_is_exact,
    other_instances_and_threads_notice_nothing,
    run_once,
)
from accelplug.testing.models import Built, batch_of_two, build_denoiser, unet_sd15
from tests import tiny_models
from tests.patch_rows import ROWS

INPUT = {"mode": "input", "destination": "first"}
SUBJECT = replace(ROWS["tome"], working={**INPUT, "ratio": 0.5})
PLAIN: dict[str, Callable[[], Built]] = {"dinov2": dinov2, "unet_sd15": unet_sd15}
"""Models whose attention is given tokens alone."""


def modules(model: nn.Module) -> list[Any]:
    """The self-attention of a UNet or of an encoder."""
    return [m for name, m in model.named_modules() if attends(m) or name.endswith("attn1")]


def applied(model: Any, **config: Any) -> accelplug.Plug:
    return accelplug.apply(model, {"patch": "tome", "with": config}, gate="off")


def merged_by_hand(module: Any, grid: tuple[int, int, int], special: int) -> Callable[..., Any]:
    """The module's forward in plain torch, on half of its tokens; `special` tokens ahead of the grid are not merged."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj") if hasattr(module, "q_proj") else ("to_q", "to_k", "to_v", "to_out")
    to_q, to_k, to_v, to_out = (getattr(module, name) for name in names)
    to_out = to_out[0] if isinstance(to_out, nn.ModuleList) else to_out
    heads = getattr(module, "heads", None) or module.num_attention_heads

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        ahead, visual = hidden_states[:, :special], hidden_states[:, special:]
        drawn = partition(grid, seed=None)
        slots = visual.shape[1] - visual.shape[1] // 2
        slot = match(visual, drawn, visual.shape[1] // 2)
        x = torch.cat([ahead, merge(visual[:, None], slot, slots)[:, 0]], 1)
        q, k, v = (project(x).unflatten(-1, (heads, -1)).transpose(1, 2) for project in (to_q, to_k, to_v))
        bias = torch.cat([torch.zeros(len(x), special), slot_sizes(slot, slots).log()], -1)[:, None, None]
        out = to_out(sdpa(q, k, v, attn_mask=bias.to(q.dtype)).transpose(1, 2).flatten(2))
        out = torch.cat([out[:, :special], unmerge(out[:, None, special:], slot)[:, 0]], 1)
        return out if hasattr(module, "to_q") else (out, None)

    return forward


@pytest.mark.parametrize("name", PLAIN)
def test_whole_models_against_modules_written_by_hand(name: str) -> None:
    model, inputs = build_denoiser(PLAIN[name])
    both, _ = batch_of_two(inputs)
    with applied(model, **INPUT) as plug:
        found = run_once(model, both)
        assert plug.report().served == {"tome": len(modules(model))}
        assert not plug.report().fallbacks
    grids = {48: (1, 6, 8), 49: (1, 6, 8), 192: (1, 12, 16)}
    sizes: dict[int, int] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: sizes.update({id(m): (args[0] if args else kwargs["hidden_states"]).shape[1]}),
            with_kwargs=True,
        )
        for module in modules(model)
    ]
    run_once(model, inputs)
    for handle, module in zip(handles, modules(model), strict=True):
        handle.remove()
        tokens = sizes[id(module)]
        module.forward = merged_by_hand(module, grids[tokens], tokens % 2)
    torch.testing.assert_close(found, run_once(model, both), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_projections_are_given_fewer_tokens(name: str) -> None:
    model, inputs = build_denoiser(PLAIN[name])
    seen: list[tuple[int, int]] = []
    for module in modules(model):
        query = module.to_q if hasattr(module, "to_q") else module.q_proj
        out = module.to_out[0] if hasattr(module, "to_out") else module.o_proj
        query.register_forward_pre_hook(lambda _, args: seen.append((args[0].shape[1], 0)))
        out.register_forward_pre_hook(lambda _, args: seen.append((0, args[0].shape[1])))
    run_once(model, inputs)
    whole = [sum(pair) for pair in seen]
    seen.clear()
    with applied(model, **INPUT):
        run_once(model, inputs)
    assert [sum(pair) for pair in seen] == [tokens // 2 + tokens % 2 for tokens in whole]


@pytest.mark.parametrize(
    "law",
    [
        neutral_is_exact,
        it_does_something_and_undoes_it,
        other_instances_and_threads_notice_nothing,
        low_precision_stays_finite,
        copies_are_stock,
        batch_two_is_two_batches_of_one,
    ],
)
@pytest.mark.parametrize("name", PLAIN)
def test_laws(name: str, law: Callable[..., None]) -> None:
    law(SUBJECT, PLAIN[name])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("wan", "given beside the tokens"), ("unet2d", "what enters is of shape"), ("flux", "given beside the tokens")],
)
def test_where_fewer_tokens_cannot_enter_it_is_dense_and_counted(name: str, reason: str) -> None:
    model, inputs = tiny_models.build(name)
    dense = run_once(model, inputs)
    with applied(model, **INPUT) as plug:
        assert torch.equal(run_once(model, inputs), dense)
        assert "tome" not in plug.report().served
        assert any(reason in said for said in plug.report().fallbacks)


def test_what_enters_may_be_looked_at_where_it_cannot_be_changed() -> None:
    model, inputs = tiny_models.build("wan")
    by_keys: list[Tensor] = []
    by_input: list[Tensor] = []
    for found, metric in ((by_keys, "keys"), (by_input, "input")):
        with applied(model, metric=metric) as plug:
            found.append(run_once(model, inputs))
            assert set(plug.report().served) == {"tome"}
    assert not torch.equal(by_keys[0], by_input[0])


def test_an_error_inside_leaves_a_module_that_goes_on() -> None:
    model, inputs = build_denoiser(dinov2)
    dense = run_once(model, inputs)
    out = modules(model)[0].o_proj
    with applied(model, **INPUT):
        found = run_once(model, inputs)
        handle = out.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            run_once(model, inputs)
        handle.remove()
        assert torch.equal(run_once(model, inputs), found)
    assert torch.equal(run_once(model, inputs), dense)


def test_no_hook_stands_where_no_patch_is_given_what_enters() -> None:
    model, _ = build_denoiser(dinov2)
    with applied(model):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules(model))
    with applied(model, **INPUT):
        assert all(module._forward_pre_hooks and module._forward_hooks for module in modules(model))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules(model))


def test_settings_that_grow_over_steps_may_be_given_what_enters() -> None:
    model, inputs = build_denoiser(unet_sd15)
    ratio = {"from": 0.2, "to": 0.6, "over": "steps"}
    with applied(model, **INPUT, ratio=ratio) as plug:
        plug.step(3, 4)
        run_once(model, inputs)
        assert set(plug.report().served) == {"tome"}
