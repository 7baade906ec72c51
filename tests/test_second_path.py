"""FreeSwim's second path: cross-attention of a dense forward in one with windows."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accelplug
from accelplug.patches.sparse.freeswim import FreeSwim
from accelplug.testing.models import build_denoiser, build_pipeline, wan, wan_pipeline

WINDOWS = {"patch": "freeswim", "with": {"native_hw": [2, 3], "tile_thw": [1, 2, 4], "block": 8, "backend": "reference"}}
BOTH = {"rules": [{"where": {"kind": "self"}, **WINDOWS}, {"patch": "second_path"}]}


def forward(
    model: nn.Module, plug: accelplug.Plug | None, inputs: dict[str, Any], step: int = 0, branch: str = "cond"
) -> Tensor:
    if plug is not None:
        plug.step(step, 4)
    with torch.no_grad(), model.cache_context(branch):  # type: ignore[operator]
        return model(**inputs).sample


def texts_of(model: nn.Module, inputs: dict[str, Any], plug: accelplug.Plug | None) -> list[Tensor]:
    """What leaves each block's cross-attention."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for block in model.blocks:  # type: ignore[union-attr]
            handle = block.attn2.register_forward_hook(lambda module, args, out: found.append(out))
            stack.callback(handle.remove)
        forward(model, plug, inputs)
    return found


@pytest.mark.parametrize("entropy", [False, True])
def test_the_text_is_that_of_the_dense_path(entropy: bool) -> None:
    model, inputs = build_denoiser(wan)
    rule = {"where": {"kind": "self"}, "patch": "freeswim", "with": {**WINDOWS["with"], "entropy": entropy}}  # type: ignore[dict-item]
    sharpening = FreeSwim({"native_hw": (2, 3)}).sharpening if entropy else 1.0
    scaled = [module.norm_q for block in model.blocks for module in (block.attn1,)]
    for norm in scaled:  # rotations keep a factor on queries
        norm.weight.mul_(sharpening)
    dense = texts_of(model, inputs, None)
    for norm in scaled:
        norm.weight.div_(sharpening)
    with accelplug.apply(model, {"rules": [rule]}, gate="off") as plug, ExitStack() as stack:
        for block, text in zip(model.blocks, dense, strict=True):
            handle = block.attn2.register_forward_hook(lambda module, args, out, text=text: text)
            stack.callback(handle.remove)
        expected = forward(model, plug, inputs)
    with accelplug.apply(model, {"rules": [rule, {"patch": "second_path"}]}, gate="off", strict=True) as plug:
        both = forward(model, plug, inputs)
        assert not torch.equal(forward(model, plug, inputs, branch="uncond"), both)
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-4)
    with accelplug.apply(model, {"rules": [rule]}, gate="off") as plug:
        assert not torch.allclose(forward(model, plug, inputs), both, atol=1e-4)


@pytest.mark.parametrize(("every", "ahead"), [(1, 4), (2, 2), (3, 2)])
def test_the_second_path_is_run_in_every_so_many_steps_of_the_conditional_branch(every: int, ahead: int) -> None:
    pipe, inputs = build_pipeline(wan_pipeline)
    recipe = {"rules": [{"where": {"kind": "self"}, **WINDOWS}, {"patch": "second_path", "with": {"every": every}}]}
    forwards: list[int] = []
    handle = pipe.transformer.blocks[0].register_forward_hook(lambda *given: forwards.append(1))
    stock = pipe(**inputs, generator=torch.Generator().manual_seed(0)).frames
    assert len(forwards) == 8
    with accelplug.apply(pipe, recipe, gate="off", strict=True) as plug:
        runs = [pipe(**inputs, generator=torch.Generator().manual_seed(0)).frames for _ in range(2)]
        assert plug.report().served["second_path"]
    assert len(forwards) == 8 + 2 * (8 + ahead)
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], stock)
    handle.remove()


def test_without_named_branches_the_first_forward_of_a_step_is_the_conditional_one() -> None:
    pipe, inputs = build_pipeline(wan_pipeline)
    inputs = {**inputs, "output_type": "latent"}
    with accelplug.apply(pipe, BOTH, gate="off", strict=True):
        named = pipe(**inputs, generator=torch.Generator().manual_seed(0)).frames
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipe.transformer, "cache_context", lambda *name, **step: nullcontext())
            assert torch.equal(pipe(**inputs, generator=torch.Generator().manual_seed(0)).frames, named)


def test_where_no_forward_can_be_run_ahead_cross_attention_is_as_ever() -> None:
    model, inputs = build_denoiser(wan)
    with torch.no_grad():
        stock = model(**inputs).sample
        with accelplug.apply(model, {"rules": [{"patch": "second_path"}]}, gate="off") as plug:
            assert torch.equal(model(**inputs).sample, stock)
            assert any("no forward was run ahead" in reason for reason in plug.report().fallbacks)
