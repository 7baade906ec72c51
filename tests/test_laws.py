"""The laws every patch obeys on every host: one suite, parametrised over (patch, model)."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import torch
from torch import nn

import accelplug
from accelplug import compat
from accelplug.errors import AccelplugError, AlreadyAppliedError, FallbackError, NoMatchError, UnsupportedError
from accelplug.hosts.models import processor_owners
from accelplug.patches.sparse.template import BlockParams
from accelplug.testing.models import batch_of_two, sample_of
from tests import tiny_models
from tests.patch_rows import ROWS, Row

REFUSED = ("sana",)
UNKNOWN = ("stable_audio",)
MODELS = tuple(name for name in tiny_models.MODELS if name not in REFUSED + UNKNOWN)

rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
models = pytest.mark.parametrize("name", MODELS)
DENSE = {"rules": [{"patch": "dense"}]}


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return sample_of(model(**copy.deepcopy(inputs)))


def alive(kind: type) -> int:
    """How many objects of a kind are held by anything."""
    gc.collect()
    return sum(type(x) is kind for x in gc.get_objects())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a plug could leave behind, but for parameters' values."""
    return {
        "vars": {path: set(vars(module)) for path, module in model.named_modules()},
        "classes": {path: type(module) for path, module in model.named_modules()},
        "processors": {path: (id(module.processor), type(module.processor)) for path, module in processor_owners(model)},
        "hooks": {
            path: (list(module._forward_hooks), list(module._forward_pre_hooks), list(module._forward_pre_hooks_with_kwargs))
            for path, module in model.named_modules()
        },
        "state": {key: value.data_ptr() for key, value in model.state_dict().items()},
        "registry": dict(compat.diffusers.processor_metadata()),
        "sdpa": torch.nn.functional.scaled_dot_product_attention,
        "dispatch": compat.diffusers.dispatch_attention_fn(),
        "rng": torch.get_rng_state().tolist(),
    }


@models
@rows
def test_neutral_is_exact(row: Row, name: str) -> None:
    model, inputs = tiny_models.build(name)
    dense = run(model, inputs)
    with accelplug.apply(model, row.recipe(row.neutral), gate="off"):
        assert torch.equal(run(model, inputs), dense)


@models
@rows
def test_it_does_something_and_undoes_it(row: Row, name: str) -> None:
    model, inputs = tiny_models.build(name)
    dense, before = run(model, inputs), snapshot(model)
    plug = accelplug.apply(model, row.recipe(), gate="off")
    with plug.trace(plans=True) as events:
        patched = run(model, inputs)
    assert torch.isfinite(patched).all()
    ran = [event for event in events if event.patch == row.patch]
    if row.video_only and not any(placed.params for placed in plug.where()):
        grids = {placed.layout.grid_thw for placed in plug.where() if placed.layout}
        assert grids, "no layout was understood"
        assert all(frames <= 2 for frames, _, _ in grids)
        assert torch.equal(patched, dense)
        plug.remove()
        return
    assert ran, f"{row.patch} ran nowhere: {plug.report()}"
    for event in ran if row.blocks else ():
        assert event.plan.members.any(-1).all(), "a query block without a key block"
        exact = float(event.plan.density().mean())
        assert event.density > exact if row.pools and exact < 1 else event.density == pytest.approx(exact, abs=1e-6)
    if any(event.density < 0.999 or (event.plan is not None and event.plan.box is not None) for event in ran):
        assert not torch.equal(patched, dense)
    else:  # a grid on which this window reads everything
        torch.testing.assert_close(patched, dense, rtol=1e-3, atol=1e-4)
    plug.remove()
    assert snapshot(model) == before
    assert torch.equal(run(model, inputs), dense)


@models
def test_the_kernel_at_density_one_is_dense(name: str) -> None:
    row = ROWS["sol"]
    model, inputs = tiny_models.build(name)
    dense = run(model, inputs)
    with accelplug.apply(model, row.recipe(row.everything), gate="off") as plug, plug.trace() as events:
        forced = run(model, inputs)
    assert any(event.patch == row.patch and event.density == 1.0 for event in events)
    torch.testing.assert_close(forced, dense, rtol=1e-3, atol=2e-5 * float(dense.abs().max()) + 1e-6)


@pytest.mark.parametrize("rest", ["drop", "pool"])
@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan_video", "flux", "sd3"])
@rows
def test_batch_two_is_two_batches_of_one(row: Row, name: str, rest: str) -> None:
    model, inputs = tiny_models.build(name)
    both, singles = batch_of_two(inputs)
    config = {**row.working, "rest": rest} if row.blocks else row.working
    with accelplug.apply(model, row.recipe(config), gate="off"):
        together = run(model, both)
        apart = torch.cat([run(model, single) for single in singles])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@models
def test_text_stays_dense_and_cross_attention_is_untouched(name: str) -> None:
    model, inputs = tiny_models.build(name)
    row = ROWS["neighborhood"]
    with accelplug.apply(model, row.recipe(), gate="off") as plug, plug.trace(plans=True) as events:
        run(model, inputs)
    assert {event.site.kind for event in events} <= {"self", "joint", "temporal"}
    for event in (event for event in events if event.site.kind == "joint" and event.plan is not None):
        blocks = event.plan.members
        text = next(placed for placed in plug.where() if placed.site == event.site).params.tiles.is_text(8)
        assert text.any()
        assert blocks[..., text, :].all(), "a text row does not read every block"
        assert blocks[..., :, text].all(), "a row does not read all text"


@rows
def test_other_instances_and_threads_notice_nothing(row: Row) -> None:
    patched, inputs = tiny_models.build("wan")
    stock, _ = tiny_models.build("wan")
    dense = run(stock, inputs)
    found: list[torch.Tensor] = []
    with accelplug.apply(patched, row.recipe(), gate="off"):
        thread = threading.Thread(target=lambda: found.extend(run(stock, inputs) for _ in range(20)))
        thread.start()
        different = [not torch.equal(run(patched, inputs), dense) for _ in range(20)]
        thread.join()
    assert all(different)
    assert len(found) == 20
    assert all(torch.equal(out, dense) for out in found)


def test_exception_in_the_middle_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build("wan")
    dense, before = run(model, inputs), snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.blocks[1].ffn), "forward", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError), accelplug.apply(model, ROWS["radial"].recipe(), gate="off"):
            run(model, inputs)
    assert snapshot(model) == before
    assert torch.equal(run(model, inputs), dense)


def test_apply_twice_names_what_is_on() -> None:
    model, _ = tiny_models.build("wan")
    with accelplug.apply(model, DENSE) as plug:
        with pytest.raises(AlreadyAppliedError, match="already"):
            accelplug.apply(model, DENSE)
        assert plug.active
        accelplug.remove(model)
        assert not plug.active
    with pytest.raises(NoMatchError, match="nothing to remove"):
        accelplug.remove(model)


def test_only_what_is_still_ours_is_restored() -> None:
    model, inputs = tiny_models.build("wan")
    plug = accelplug.apply(model, DENSE)
    theirs = type(model.blocks[0].attn1.processor).stock()
    model.blocks[0].attn1.processor = theirs
    plug.remove()
    assert model.blocks[0].attn1.processor is theirs
    assert torch.isfinite(run(model, inputs)).all()


def test_a_replaced_processor_is_counted_and_an_error_under_strict() -> None:
    model, inputs = tiny_models.build("wan")
    for strict in (False, True):
        plug = accelplug.apply(model, ROWS["radial"].recipe(), gate="off", strict=strict)
        run(model, inputs)
        model.blocks[0].attn1.processor = type(model.blocks[0].attn1.processor).stock()
        if strict:
            with pytest.raises(FallbackError, match="replaced"):
                run(model, inputs)
        else:
            run(model, inputs)
            assert any("replaced" in reason for reason in plug.report().fallbacks)
        plug.remove()


def test_nothing_matched_says_what_is_there() -> None:
    model, _ = tiny_models.build("wan")
    before = snapshot(model)
    with pytest.raises(NoMatchError, match=r"No rule .* fits any attention .* 3 of kind self|No rule"):
        accelplug.apply(model, ROWS["radial"].recipe(layers="90:"))
    with pytest.raises(NoMatchError, match="neither denoiser nor decoder"):
        accelplug.apply(object(), DENSE)
    assert snapshot(model) == before


def test_linear_attention_is_refused() -> None:
    model, _ = tiny_models.build("sana")
    with pytest.raises(UnsupportedError, match="linear"):
        accelplug.apply(model, DENSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_mask_that_is_more_than_key_padding_is_dense_and_counted(dtype: torch.dtype) -> None:
    """Chroma multiplies its mask with itself; as a float, as its pipeline passes it, it is even added to the scores."""
    model, inputs = tiny_models.build("chroma")
    tokens = inputs["encoder_hidden_states"].shape[1] + inputs["hidden_states"].shape[1]
    inputs["attention_mask"] = torch.ones(1, tokens, dtype=dtype)
    dense = run(model, inputs)
    with accelplug.apply(model, ROWS["neighborhood"].recipe(), gate="off") as plug:
        assert torch.equal(run(model, inputs), dense)
        assert len(plug.report().fallbacks) == 4
        assert all("more than key padding" in reason for reason in plug.report().fallbacks)


def test_a_rule_that_names_attention_without_a_grid_is_counted() -> None:
    """Motion modules attend over the frames of one place."""
    model, inputs = tiny_models.build("animatediff")
    dense = run(model, inputs)
    with accelplug.apply(model, ROWS["neighborhood"].recipe(kind="temporal"), gate="off") as plug:
        assert torch.equal(run(model, inputs), dense)
        assert plug.report().fallbacks
        assert all("layout is not understood" in reason for reason in plug.report().fallbacks)


def test_attention_that_never_comes_by_is_counted_and_an_error_under_strict() -> None:
    model, inputs = tiny_models.build("wan")
    recipe = ROWS["radial"].recipe()
    for strict in (False, True):
        skipped = model.blocks[1].attn1
        skipped.forward = lambda hidden_states, *args, **kwargs: hidden_states
        plug = accelplug.apply(model, recipe, gate="off", strict=strict)
        run(model, inputs)
        assert plug.report().unrouted == ["blocks.1.attn1"]
        if strict:
            with pytest.raises(FallbackError, match="never came by"):
                run(model, inputs)
        else:
            run(model, inputs)
            run(model, inputs)
            assert plug.report().fallbacks == {"blocks.1.attn1: its attention never came by in the first forward": 1}
        plug.remove()
        del skipped.forward


def test_unknown_denoiser_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Linear"):
        accelplug.apply(nn.Linear(2, 2), DENSE)


def test_training_with_gradients_is_refused_and_removable() -> None:
    model, inputs = tiny_models.build("wan")
    dense = run(model, inputs)
    model.train().requires_grad_(True)
    plug = accelplug.apply(model, ROWS["radial"].recipe(), gate="off")
    with pytest.raises(UnsupportedError, match="training mode"):
        model(**copy.deepcopy(inputs))
    plug.remove()
    assert torch.equal(run(model.eval(), inputs), dense)


def test_unknown_step_is_dense_counted_or_told() -> None:
    model, inputs = tiny_models.build("wan")
    dense = run(model, inputs)
    recipe = ROWS["radial"].recipe(steps="50%:")
    with accelplug.apply(model, recipe, gate="off") as plug:
        assert torch.equal(run(model, inputs), dense)
        assert any("step" in reason for reason in plug.report().fallbacks)
        plug.step(0, 10)
        assert torch.equal(run(model, inputs), dense)
        plug.step(5, 10)
        assert not torch.equal(run(model, inputs), dense)
    with accelplug.apply(model, recipe, gate="off", strict=True), pytest.raises(FallbackError, match="step"):
        run(model, inputs)


def test_the_gate_leaves_dense_what_would_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build("wan")
    dense = run(model, inputs)
    from accelplug.hosts import gate

    ms = iter([1.0, 2.0] * 100)
    monkeypatch.setattr(gate, "median_ms", lambda run, device: next(ms))
    with accelplug.apply(model, ROWS["radial"].recipe()) as plug:
        assert torch.equal(run(model, inputs), dense)
        assert any("would not pay" in reason for reason in plug.report().gated)
        assert not plug.report().fallbacks
        assert plug.choices["verdicts"][0]["pays"] is False
    ms = iter([2.0, 1.0] * 100)
    with accelplug.apply(model, ROWS["radial"].recipe()) as plug:
        assert not torch.equal(run(model, inputs), dense)
        assert plug.report().gains["radial"] == 2.0


def test_warmup_settles_the_gate_and_puts_random_states_back() -> None:
    pipe, inputs = tiny_models.pipeline("wan")
    generator = torch.Generator().manual_seed(3)
    states = torch.get_rng_state(), generator.get_state()
    with accelplug.apply(pipe, {"patch": "radial", "with": {"block": 8}}) as plug:
        assert not plug.choices["verdicts"]
        report = plug.warmup(**{**inputs, "generator": generator})
        verdicts = plug.choices["verdicts"]
        assert verdicts
        assert sum(report.served.values()) > 0
        assert torch.equal(torch.get_rng_state(), states[0])
        assert torch.equal(generator.get_state(), states[1])
        pipe(**inputs)
        assert plug.choices["verdicts"] == verdicts


def test_many_resolutions_leave_bounded_caches() -> None:
    model, _ = tiny_models.build("wan")
    before = alive(BlockParams)
    with accelplug.apply(model, ROWS["radial"].recipe(), gate="off") as plug:
        for height in range(4, 64, 2):
            inputs = {
                "hidden_states": torch.randn(1, 4, 2, height, 8),
                "timestep": torch.tensor([500]),
                "encoder_hidden_states": torch.randn(1, 12, 16),
            }
            run(model, inputs)
        assert alive(BlockParams) - before <= 16
        assert not plug.report().fallbacks


def test_global_rng_is_untouched() -> None:
    model, inputs = tiny_models.build("wan")
    state = torch.get_rng_state()
    with accelplug.apply(model, ROWS["sol"].recipe()):
        run(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_error_is_ours() -> None:
    model, _ = tiny_models.build("wan")
    for recipe in (
        "nonsense",
        {"rules": [{"patch": "radail"}]},
        {"rules": [{"patch": "radial", "with": {"decay": float("nan")}}]},
    ):
        with pytest.raises(AccelplugError):
            accelplug.apply(model, recipe)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_recipe_may_ask_for_eight_bits(precision: str) -> None:
    model, inputs = tiny_models.build("wan")
    row = ROWS["sol"]
    with accelplug.apply(model, row.recipe(), gate="off"):
        native = run(model, inputs)
    with accelplug.apply(model, row.recipe({**row.working, "precision": precision}), gate="off"):
        rounded = run(model, inputs)
    assert not torch.equal(rounded, native)
    torch.testing.assert_close(rounded, native, rtol=0.05, atol=0.05 * float(native.abs().max()))
