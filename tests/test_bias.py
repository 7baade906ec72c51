"""FlashBias: the factored bias against the bias written out, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import accelplug
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.errors import UnsupportedError
from accelplug.patches.heads.bias import Bias, balanced, low_rank
from accelplug.testing.laws import run_once, snapshot_of
from tests import tiny_models

SITE = Site("blocks.1.attn1", "transformer", "self", 1, 4)
B, H, D, DV = 2, 3, 12, 10
LAYOUTS = [Layout((4, 5, 3)), Layout((3, 4, 5), text_before=3, text_after=4), Layout((1, 6, 7), text_after=2)]


def make_call(layout: Layout, dtype: torch.dtype, scale: float | None = 0.4) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, H, layout.length, D, generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(B, H, layout.length, DV, generator=generator).to(dtype)
    scale = D**-0.5 if scale is None else scale

    def dense(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, scale=scale)

    return AttentionCall(q, k, v, None, scale, dense)


def written_out(
    layout: Layout, form: str, strength: float, axes: tuple[float, ...] | str, heads: str = "equal"
) -> torch.Tensor:
    """The bias of all pairs, float64 (H, S, S), from the definition."""
    grid = [x.flatten().double() for x in torch.meshgrid(*(torch.arange(n) for n in layout.grid_thw), indexing="ij")]
    if axes == "token":
        grid, axes = [torch.arange(layout.visual).double()], (1.0,)
    of = {"linear": lambda d: d, "square": lambda d: -d.square(), "absolute": lambda d: -d.abs()}[form]
    visual = sum(weight * of(at - at[:, None]) for weight, at in zip(axes, grid, strict=True)) * strength
    bias = torch.zeros(H, layout.length, layout.length, dtype=torch.float64)
    inside = slice(layout.text_before, layout.text_before + layout.visual)
    slopes = [2 ** (-8 * h / H) if heads == "alibi" else 1.0 for h in range(1, H + 1)]
    for head, slope in enumerate(slopes):
        bias[head, inside, inside] = slope * visual
    return bias


def attended(call: AttentionCall, bias: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    return (q @ k.mT * call.scale + bias).softmax(-1) @ v


FORMS = [
    {"form": "linear", "strength": 0.05, "axes": (1.0, 0.5, 2.0)},
    {"form": "linear", "strength": 0.02, "axes": "token"},
    {"form": "square", "strength": 0.1, "axes": (1.0, 1.0, 0.5), "heads": "alibi"},
    {"form": "square", "strength": 0.01, "axes": "token"},
    {"form": "square", "strength": -0.05, "axes": (0.0, 1.0, 0.0)},
    {"form": "absolute", "strength": 0.3, "axes": (1.0, 0.5, 2.0), "energy": 1.0},
    {"form": "absolute", "strength": 0.3, "axes": (1.0, 0.0, 0.0), "heads": "alibi", "energy": 1.0},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["video", "text-both", "image-text-after"])
@pytest.mark.parametrize("config", FORMS, ids=lambda c: f"{c['form']}-{c['axes']}")
def test_equals_the_bias_written_out(config: dict[str, Any], layout: Layout) -> None:
    patch, call = Bias(config), make_call(layout, torch.float64)
    params = patch.prepare(SITE, layout, Clock(), {})
    settings = {key: value for key, value in config.items() if key != "energy"}
    bias = written_out(layout, **settings)
    if params is None:  # the only weighted axis has one position
        assert not bias.any()
        return
    torch.testing.assert_close(patch.attend(call, params), attended(call, bias), rtol=0, atol=2e-6)  # factors are float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", FORMS[:5], ids=lambda c: f"{c['form']}-{c['axes']}")
def test_loses_no_more_than_the_dtype_does(config: dict[str, Any], dtype: torch.dtype) -> None:
    layout = Layout((4, 6, 8), text_after=3)
    call, patch = make_call(layout, dtype), Bias(config)
    bias = written_out(layout, **config)
    plain = (call.dense().double() - attended(call, 0 * bias)).abs().max()
    params = patch.prepare(SITE, layout, Clock(), {})
    out = patch.attend(call, params)
    assert out.dtype == dtype
    assert out.shape == (B, H, layout.length, DV)
    # A difference of squares cancels: what is lost goes by the terms, not by what is left of them.
    terms = float((params.rows[:, None].abs() * params.columns.abs()).sum(-1).max())
    lost = terms * (2**-23 if dtype == torch.float32 else 2**-16)
    assert (out.double() - attended(call, bias)).abs().max() <= 2 * plain + lost * call.v.abs().max()


def test_kernels_see_one_aligned_head_dimension() -> None:
    seen = []
    layout = Layout((4, 6, 8))
    call = make_call(layout, torch.bfloat16)
    spy = AttentionCall(
        call.q, call.k, call.v, None, call.scale, lambda q, k, v: seen.append((q, k, v)) or call.dense(q, k, v)
    )
    patch = Bias({"form": "square", "strength": 0.1})
    patch.attend(spy, patch.prepare(SITE, layout, Clock(), {}))
    (shapes,) = [[x.shape[-1] for x in tensors] for tensors in seen]
    assert shapes == [32, 32, 32]  # 12, and three times rank 5, up to a multiple of 8


@pytest.mark.parametrize("form", ["linear", "square", "absolute"])
def test_strength_zero_is_dense(form: str) -> None:
    assert Bias({"form": form, "strength": 0.0}).prepare(SITE, LAYOUTS[1], Clock(), {}) is None


@pytest.mark.parametrize("length", [5, 17, 45, 80])
def test_absolute_distances_nearly_have_rank_four(length: int) -> None:
    at = torch.arange(length).double()
    table = -(at[:, None] - at).abs()
    rows, columns = low_rank(table, 0.995)
    assert rows.shape == columns.shape == (length, 4)
    assert 0 < (rows @ columns.mT - table).norm() <= 0.005**0.5 * table.norm()
    exact = low_rank(table, 1.0)
    torch.testing.assert_close(exact[0] @ exact[1].mT, table, rtol=0, atol=1e-9)


def test_balancing_changes_nothing_but_the_sizes() -> None:
    rows, columns = torch.randn(9, 4).double() * torch.tensor([1e3, 1.0, 1e-4, 5.0]), torch.randn(9, 4).double()
    even_rows, even_columns = balanced(rows, columns)
    torch.testing.assert_close(even_rows @ even_columns.mT, rows @ columns.mT)
    torch.testing.assert_close(even_rows.abs().amax(0), even_columns.abs().amax(0))


def test_above_rank_16_is_refused() -> None:
    patch = Bias({"strength": 0.1, "energy": 0.9999})
    with pytest.raises(UnsupportedError, match=r"rank 3\d on a grid of \(21, 45, 80\).*more than 16.*Lower energy"):
        patch.prepare(SITE, Layout((21, 45, 80)), Clock(), {})


@pytest.mark.parametrize("config", [{}, {"strength": 1.0, "axes": "token"}, {"strength": 1.0, "axes": (1, 2)}])
def test_settings_that_make_no_sense_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"strength|axes"):
        Bias(config)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "flux", "unet_sd15"])
def test_on_a_model_it_acts_at_the_model_s_scale_and_undoes_itself(name: str) -> None:
    model, inputs = tiny_models.build(name)
    dense, before = run_once(model, inputs), snapshot_of(model)

    def patched(strength: float) -> torch.Tensor:
        config = {"strength": strength, "form": "square"}
        with accelplug.apply(model, {"rules": [{"patch": "bias", "with": config}]}) as plug:  # gate on: it is no speed patch
            out = run_once(model, inputs)
            assert ("bias" in plug.report().served) == (strength != 0)
            assert not plug.report().gated
        return out

    assert torch.equal(patched(0.0), dense)
    torch.testing.assert_close(patched(1e-7), dense, rtol=1e-3, atol=1e-4)  # a wrong scale would show
    assert (patched(0.3) - dense).abs().max() > 1e-3 * dense.abs().max()
    assert snapshot_of(model) == before
    assert torch.equal(run_once(model, inputs), dense)


def test_compiled_equals_eager() -> None:
    model, inputs = tiny_models.build("wan")
    with accelplug.apply(model, {"rules": [{"patch": "bias", "with": {"strength": 0.2, "heads": "alibi"}}]}):
        eager = run_once(model, inputs)
        torch._dynamo.reset()
        torch.testing.assert_close(
            run_once(torch.compile(model, backend="eager", fullgraph=True), inputs), eager, rtol=1e-4, atol=1e-5
        )
        torch._dynamo.reset()
