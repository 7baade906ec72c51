"""Proxy tokens: what is near, what a far window is worth, and the layouts that gain nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

import accelplug
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.errors import RecipeError
from accelplug.hosts.rebind import dense_sdpa
from accelplug.patches.sparse.proxy import Proxy
from accelplug.recipe import ModelFacts, load
from accelplug.testing.laws import run_once
from tests import tiny_models
from tests.test_tome import noise

SITE = Site("blocks.0.attn1", "transformer", "self", 0, 8)


def call_on(layout: Layout, batch: int = 1, seed: int = 0) -> AttentionCall:
    q, k, v = (noise(batch, 2, layout.length, 16, seed=seed + i) for i in range(3))
    return AttentionCall(q, k, v, None, 16**-0.5, dense_sdpa(q, k, v))


def attend(config: dict, layout: Layout, call: AttentionCall) -> torch.Tensor:
    patch = Proxy({"backend": "reference", **config})
    return patch.attend(call, patch.params(layout))


def places(layout: Layout) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(n) for n in layout.grid_thw]).view(-1, 3)


def windows_of(layout: Layout, window: tuple[int, int, int]) -> torch.Tensor:
    """Window number on each axis of each visual token, int64 (V, 3)."""
    return places(layout) // torch.tensor(window)


# ------------------------------------------------------------------------------------------------------------- who reads


@pytest.mark.parametrize(
    ("representative", "text"),
    [("mean", (0, 0)), ("mean", (5, 0)), ("mean", (0, 5)), ("centre", (5, 0)), ("centre_k_mean_v", (0, 5))],
)
@pytest.mark.parametrize(("grid", "window", "halo"), [((1, 9, 14), (1, 4, 4), (0, 1, 1)), ((5, 7, 6), (2, 3, 2), (1, 0, 1))])
def test_against_loops(
    grid: tuple[int, int, int],
    window: tuple[int, int, int],
    halo: tuple[int, int, int],
    text: tuple[int, int],
    representative: str,
) -> None:
    layout = Layout(grid, *text)
    call = call_on(layout, batch=2)
    config = {"window_thw": window, "halo_thw": halo, "block": 8, "representative": representative}
    out = attend(config, layout, call)
    number = windows_of(layout, window)
    visual = torch.arange(text[0], text[0] + layout.visual)
    is_text = torch.ones(layout.length, dtype=torch.bool)
    is_text[visual] = False
    pairs = 0
    exact = call.dense()
    for row in range(layout.length):
        if is_text[row]:
            torch.testing.assert_close(out[..., row, :], exact[..., row, :])
            pairs += layout.length
            continue
        own = number[row - text[0]]
        near = is_text.clone()
        near[visual] = ((number - own).abs() <= torch.tensor(halo)).all(-1)
        keys, values = [call.k[..., near, :]], [call.v[..., near, :]]
        bias = [torch.zeros(int(near.sum()))]
        for far in {tuple(place) for place in number[~near[visual]].tolist()}:
            members = visual[(number == torch.tensor(far)).all(-1)]
            place = places(layout)[members - text[0]].double()
            centre = members[(place - place.mean(0)).square().sum(-1).argmin(keepdim=True)]
            mean_k, mean_v = (x[..., members, :].mean(-2, keepdim=True) for x in (call.k, call.v))
            keys.append(mean_k if representative == "mean" else call.k[..., centre, :])
            values.append(call.v[..., centre, :] if representative == "centre" else mean_v)
            bias.append(torch.tensor([math.log(len(members))]))
        pairs += sum(map(len, bias))
        k, v, b = torch.cat(keys, -2), torch.cat(values, -2), torch.cat(bias)
        expected = scaled_dot_product_attention(call.q[..., row : row + 1, :], k, v, attn_mask=b[None])
        torch.testing.assert_close(out[..., row : row + 1, :], expected)
    patch = Proxy({"window_thw": window, "halo_thw": halo})
    assert patch.cost(layout) == pytest.approx(pairs / layout.length**2)


def test_the_cost_is_what_the_plan_costs() -> None:
    for layout in (Layout((5, 9, 14)), Layout((1, 20, 33), 17)):
        patch = Proxy({"window_thw": (2, 4, 4)})
        density, _ = patch.inspect(call_on(layout), patch.params(layout))
        assert patch.cost(layout) == pytest.approx(density)


# ------------------------------------------------------------------------------------------------------- what far is worth


@pytest.mark.parametrize("extra", [{}, {"variance": True}, {"representative": "centre_k_mean_v"}])
def test_windows_of_one_token_are_dense(extra: dict[str, Any]) -> None:
    layout = Layout((2, 5, 6), 3)
    call = call_on(layout)
    config = {"window_thw": (1, 1, 1), "halo_thw": (0, 0, 0), **extra}
    torch.testing.assert_close(attend(config, layout, call), call.dense())


@pytest.mark.parametrize("extra", [{}, {"variance": True}, {"representative": "centre_k_mean_v"}])
def test_windows_of_equal_keys_are_dense(extra: dict[str, Any]) -> None:
    layout = Layout((2, 8, 12), 0, 4)
    call = call_on(layout)
    number = windows_of(layout, (1, 4, 4))
    for window in number.unique(dim=0):
        members = (number == window).all(-1).nonzero()[:, 0]
        call.k[..., members, :] = call.k[..., members[:1], :].clone()
    torch.testing.assert_close(attend({"window_thw": (1, 4, 4), "halo_thw": (0, 0, 0), **extra}, layout, call), call.dense())


@pytest.mark.parametrize("extra", [{}, {"variance": True}])
def test_weights_sum_to_one_and_far_windows_have_no_order(extra: dict[str, Any]) -> None:
    layout = Layout((1, 16, 16))
    call = call_on(layout)
    config = {"window_thw": (1, 4, 4), "halo_thw": (0, 1, 1), **extra}
    ones = AttentionCall(call.q, call.k, torch.ones_like(call.v), None, call.scale, call.dense)
    torch.testing.assert_close(attend(config, layout, ones), ones.v)
    number = windows_of(layout, (1, 4, 4))
    last = (number == torch.tensor([0, 3, 3])).all(-1).nonzero()[:, 0]
    shuffled = last[torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    k, v = call.k.clone(), call.v.clone()
    k[..., last, :], v[..., last, :] = k[..., shuffled, :].clone(), v[..., shuffled, :].clone()
    moved = AttentionCall(call.q, k, v, None, call.scale, dense_sdpa(call.q, k, v))
    far = (number[:, 1:] < 2).all(-1)
    before, after = (attend(config, layout, x)[..., far, :] for x in (call, moved))
    torch.testing.assert_close(before, after)
    assert not torch.allclose(call.dense()[..., 0, :], before[..., 0, :], atol=1e-3)


@pytest.mark.parametrize("extra", [{}, {"variance": True}])
def test_masked_keys_weigh_nothing(extra: dict[str, Any]) -> None:
    """Masked text is as if it were not there, and a masked far key neither moves its window's proxy nor counts."""
    layout, config = Layout((1, 8, 12), 0, 3), {"window_thw": (1, 4, 4), "halo_thw": (0, 0, 0), **extra}
    call = call_on(layout)
    mask = torch.ones(1, layout.length, dtype=torch.bool)
    mask[:, -3:] = False
    q, k, v = (x[..., :96, :] for x in (call.q, call.k, call.v))
    masked = attend(config, layout, AttentionCall(call.q, call.k, call.v, mask, call.scale, call.dense))
    bare = attend(config, Layout((1, 8, 12)), AttentionCall(q, k, v, None, call.scale, call.dense))
    torch.testing.assert_close(masked[..., :96, :], bare)

    mask = torch.ones(1, 96, dtype=torch.bool)
    mask[:, 95] = False  # of the last window
    before = attend(config, Layout((1, 8, 12)), AttentionCall(q, k, v, mask, call.scale, call.dense))
    k, v = k.clone(), v.clone()
    k[..., 95, :], v[..., 95, :] = 7.0, -7.0
    after = attend(config, Layout((1, 8, 12)), AttentionCall(q, k, v, mask, call.scale, call.dense))
    torch.testing.assert_close(before, after)
    assert not torch.allclose(before, bare, atol=1e-4)


def test_the_variance_term_compiles() -> None:
    model, inputs = tiny_models.build("wan")
    recipe = {"patch": "proxy", "with": {"window_thw": [1, 2, 4], "halo_thw": [0, 0, 0], "variance": True}}
    with accelplug.apply(model, recipe, gate="off"):
        eager = run_once(model, inputs)
    torch._dynamo.reset()
    with accelplug.apply(model, recipe, gate="off"):
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(run_once(model, inputs), eager, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def smooth(*shape: int, sigma: float, seed: int) -> torch.Tensor:
    """White noise on a 32 x 32 grid under a Gaussian of `sigma` tokens: (1, 1, 1024, D)."""
    x = noise(1, shape[-1], 32, 32, seed=seed)
    frequency = torch.fft.fftfreq(32)
    kernel = torch.exp(-2 * (math.pi * sigma) ** 2 * (frequency[:, None] ** 2 + frequency**2))
    return torch.fft.ifft2(torch.fft.fft2(x) * kernel).real.flatten(2).transpose(1, 2)[:, None]


def rotated(x: torch.Tensor) -> torch.Tensor:
    """2-D rotary embedding, base 100, half of the channels for rows and half for columns."""
    width = x.shape[-1] // 2
    places = torch.cartesian_prod(torch.arange(32.0), torch.arange(32.0))
    parts = []
    for axis in range(2):
        part = x[..., axis * width : (axis + 1) * width]
        angle = places[:, axis : axis + 1] * 100 ** (-torch.arange(0, width, 2) / width)
        even, odd = part[..., 0::2], part[..., 1::2]
        parts += [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()]
    return torch.cat(parts, -1)


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_each_part_of_the_far_term_helps_on_smooth_fields(sigma: float) -> None:
    """The toy of the far term: 4 x 4 windows, 3 x 3 of them exact, q and k of unit variance, 2-D RoPE."""
    q, k, v = (smooth(1, 32, sigma=sigma, seed=seed) for seed in range(3))
    q, k = (rotated(normalize(x, dim=-1) * math.sqrt(32)) for x in (q, k))
    call = AttentionCall(q, k, v, None, 32**-0.5, dense_sdpa(q, k, v))
    exact = call.dense()

    def error(**config: Any) -> float:
        out = attend({"window_thw": (1, 4, 4), "halo_thw": (0, 1, 1), **config}, Layout((1, 32, 32)), call)
        return float((out - exact).norm() / exact.norm())

    errors = [error(rest="drop"), error(rest_weight=0.0), error(), error(variance=True)]
    assert errors == sorted(errors, reverse=True), errors
    assert error(representative="centre_k_mean_v") < error(rest_weight=0.0)


# --------------------------------------------------------------------------------------------------------- what is refused


def test_a_layout_without_gain_stays_dense_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    layout = Layout((1, 8, 12))
    patch = Proxy({"window_thw": (1, 4, 4)})  # 2 x 3 windows: nearly all are near
    assert 0.7 < patch.cost(layout) < 0.9
    assert patch.prepare(SITE, layout, Clock(), {}) is not None
    patch = Proxy({"window_thw": (1, 4, 2), "halo_thw": (0, 1, 4)})
    assert 0.9 < patch.cost(layout) < 1
    with caplog.at_level("WARNING"):
        assert patch.prepare(SITE, layout, Clock(), {}) is None
        assert patch.prepare(SITE, layout, Clock(), {}) is None
    assert len(caplog.records) == 1
    assert "left dense" in caplog.text
    assert Proxy({"halo_thw": (9, 9, 9)}).cost(Layout((3, 20, 20))) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"window_thw": [1, 8, 8], "block_k": 32},
        {"block": 96},
        {"variance": True, "rest": "drop"},
        {"variance": True, "representative": "centre"},
        {"window_thw": [0, 8, 8]},
        {"window_thw": "wide"},
        {"window_thw": 8},
    ],
)
def test_settings_that_do_not_fit_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        load({"patch": "proxy", "with": bad}, ModelFacts(("WanTransformer3DModel",), {}))


def test_blocks_follow_windows() -> None:
    for window, block, block_k in (((1, 8, 8), 64, 64), ((4, 6, 10), 128, 256), ((4, 4, 7), 128, 128), ((1, 1, 1), 8, 8)):
        config = Proxy({"window_thw": window}).config
        assert (config.block, config.key_block) == (block, block_k)
