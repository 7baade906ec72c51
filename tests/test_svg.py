"""Sparse VideoGen: the band's width, both masks token by token, and heads that are known to be one or the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import accelplug
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.static import band, band_width
from accelplug.patches.sparse.svg import SPATIAL, TEMPORAL, Svg
from accelplug.testing.laws import run_once
from tests import tiny_models

SITE = Site("blocks.1.attn1", "transformer", "self", 1, 4)
LAYOUT = Layout((6, 4, 5), text_before=3, text_after=2)
B, D = 2, 16


def call_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> AttentionCall:
    def dense(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
        keep = None if mask is None else mask[:, None, None]
        return scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=q.shape[1] != k.shape[1])

    return AttentionCall(q, k, v, mask, q.shape[-1] ** -0.5, dense)


def two_kinds(layout: Layout, sharp: float = 6.0) -> AttentionCall:
    """Head 0 attends inside frames, head 1 inside places: queries and keys are one-hot in the frame, or in the place."""
    token = torch.arange(layout.length) - layout.text_before
    visual = (token >= 0) & (token < layout.visual)
    per_frame = math.prod(layout.grid_thw[1:])
    kinds = []
    for place in (token.clamp(min=0) // per_frame, token.clamp(min=0) % per_frame):
        code = torch.nn.functional.one_hot(place.clamp(max=31), 32).float() * visual[:, None]
        kinds.append(code)
    key = torch.stack(kinds)[None].expand(B, -1, -1, -1).contiguous()
    return call_of(key * sharp * 32**0.5, key, torch.randn(B, 2, layout.length, D))


def mask_of(method: Svg, layout: Layout, mode: int) -> torch.Tensor:
    """Which tokens read which, bool (S, S), from the definition: blocks whose middles are at most w apart in that order."""
    config = method.config
    token = torch.arange(layout.visual).view(layout.grid_thw)
    order = (token if mode == SPATIAL else token.permute(1, 2, 0)).flatten()
    slot = torch.empty(layout.visual, dtype=torch.int64)
    slot[order] = torch.arange(layout.visual)
    width = method.width(layout)
    at = slot // config.block
    visual = (at[:, None] - at).abs() * config.block <= width
    if config.sink:  # as many tokens as a frame has, the first ones of the order
        visual[:, at <= (math.prod(layout.grid_thw[1:]) - 1) // config.block] = True
    reads = torch.ones(layout.length, layout.length, dtype=torch.bool)
    inside = slice(layout.text_before, layout.text_before + layout.visual)
    reads[inside, inside] = visual
    return reads


def test_the_published_width() -> None:
    method = Svg({"density": 0.3})
    assert method.width(Layout((10, 20, 50))) == pytest.approx(1633, abs=1)
    assert method.width(Layout((10, 19, 50), text_after=500)) == pytest.approx(10_000 * (1 - math.sqrt(0.8)))
    assert method.width(Layout((2, 20, 20), text_before=200)) == 0


@pytest.mark.parametrize(("density", "blocks"), [(0.3, 590), (0.25, 256), (0.1, 300)])
def test_whole_blocks_read_the_density_asked_for(density: float, blocks: int) -> None:
    near = band(blocks * 128, 128, 128, band_width(blocks * 128, density))
    assert float(near.double().mean()) == pytest.approx(density, abs=1.5 / blocks)


@pytest.mark.parametrize(("block", "block_k"), [(16, 8), (8, 16), (8, 8)])
def test_every_block_reads_itself_however_narrow_the_band(block: int, block_k: int) -> None:
    near = band(96, block, block_k, 0.0)
    own = (torch.arange(96) // block)[:, None] == torch.arange(96) // block
    wanted = own.unflatten(1, (-1, block_k)).any(-1).unflatten(0, (-1, block)).any(1)
    assert torch.equal(near, wanted)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("layout", [LAYOUT, Layout((5, 3, 7)), Layout((4, 4, 4), text_after=9)])
def test_heads_find_their_kind_and_read_its_mask(layout: Layout, sink: bool) -> None:
    method, call = Svg({"density": 0.35, "sink": sink, "block": 8, "backend": "reference"}), two_kinds(layout)
    params: Any = method.prepare(SITE, layout, Clock(), {})
    assert method.modes(call, params.masks).tolist() == [[SPATIAL, TEMPORAL]] * B
    masks = torch.stack([mask_of(method, layout, mode) for mode in (SPATIAL, TEMPORAL)])
    expected = scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=masks[None])
    torch.testing.assert_close(method.attend(call, params), expected)
    for mode, reads in enumerate(params.masks.reads):
        assert torch.equal(reads, masks[mode][params.masks.rows])


def test_the_choice_is_the_one_with_the_smaller_error_on_the_rows_drawn() -> None:
    method = Svg({"density": 0.4, "block": 8, "rows": 16, "backend": "reference"})
    q, k, v = (torch.randn(B, heads, LAYOUT.length, D) for heads in (4, 2, 2))
    valid = torch.ones(B, LAYOUT.length, dtype=torch.bool)
    valid[1, -2:] = valid[0, 0] = False
    call = call_of(q, k, v, valid)
    params: Any = method.prepare(SITE, LAYOUT, Clock(), {})
    rows, errors = params.masks.rows, []
    assert len(rows.unique()) == 16
    assert ((rows >= LAYOUT.text_before) & (rows < LAYOUT.text_before + LAYOUT.visual)).all()
    every_k, every_v = (x.repeat_interleave(2, 1) for x in (k, v))
    exact = scaled_dot_product_attention(q, every_k, every_v, attn_mask=valid[:, None, None])
    for mode in (SPATIAL, TEMPORAL):
        masked = scaled_dot_product_attention(
            q, every_k, every_v, attn_mask=mask_of(method, LAYOUT, mode) & valid[:, None, None]
        )
        errors.append((masked - exact)[:, :, rows].square().mean((-2, -1)))
    assert torch.equal(method.modes(call, params.masks), (errors[1] < errors[0]).long())


@pytest.mark.parametrize("rest", ["drop", "pool", "rectified"])
def test_masked_text_in_orders_by_head(rest: str) -> None:
    """Keys that may not be read change nothing, whatever stands there."""
    method, call = Svg({"density": 0.35, "block": 8, "backend": "reference", "rest": rest}), two_kinds(LAYOUT)
    valid = torch.ones(B, LAYOUT.length, dtype=torch.bool)
    valid[0, 1:3] = valid[1, 40] = False  # text, and a visual token, which lies elsewhere in every order
    params: Any = method.prepare(SITE, LAYOUT, Clock(), {})
    outs = []
    for junk in (1e3, -1e3):
        k, v = (torch.where(valid[:, None, :, None], x, junk) for x in (call.k, call.v))
        outs.append(method.attend(call_of(call.q, k, v, valid), params))
    torch.testing.assert_close(outs[0], outs[1])
    assert outs[0].abs().max() < 10


def test_a_choice_is_kept_for_so_many_steps() -> None:
    method = Svg({"density": 0.35, "block": 8, "backend": "reference", "profile_interval": 3})
    state: dict[str, Any] = {}
    tried: list[bool] = []
    call = two_kinds(LAYOUT)
    for step in range(5, 12):
        params: Any = method.prepare(SITE, LAYOUT, Clock(step, 20), state)
        tried.append(params.modes is None)
        method.attend(call, params)
    assert tried == [True, False, False, True, False, False, True]
    assert method.prepare(SITE, LAYOUT, Clock(0, 20), state).modes is None  # another run
    smaller = AttentionCall(call.q[:1], call.k[:1], call.v[:1], None, call.scale, call.dense)
    kept: Any = method.prepare(SITE, LAYOUT, Clock(11, 20), {"svg": method.prepare(SITE, LAYOUT, Clock(11, 20), state).kept})
    assert method.attend(smaller, kept).shape[0] == 1


def test_a_kept_choice_in_compiled_code() -> None:
    model, inputs = tiny_models.build("wan")
    settings = {"density": 0.3, "block": 8, "backend": "reference", "profile_interval": 2}
    recipe = {"rules": [{"patch": "svg", "with": settings}]}

    def runs(forward: Callable[..., Any]) -> list[torch.Tensor]:
        outs = []
        with accelplug.apply(model, recipe, gate="off") as plug:
            for step in range(4):
                plug.step(step, 4)
                with model.cache_context("cond"):
                    outs.append(run_once(forward, inputs))
        return outs

    eager = runs(model)
    torch._dynamo.reset()
    for out, expected in zip(runs(torch.compile(model, backend="eager", fullgraph=True)), eager, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_images_and_density_one_run_dense() -> None:
    assert Svg({"block": 8}).prepare(SITE, Layout((1, 8, 8)), Clock(), {}) is None
    assert Svg({"block": 8}).prepare(SITE, Layout((8, 1, 1)), Clock(), {}) is None
    assert Svg({"block": 8, "density": 1.0}).prepare(SITE, LAYOUT, Clock(), {}) is None
