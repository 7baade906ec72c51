"""The laws every patch obeys on every host: one suite, parametrised over (patch, model)."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import nn

import accelplug
from accelplug.call import AttentionCall, Clock, Prompt, Site
from accelplug.errors import AccelplugError, AlreadyAppliedError, FallbackError, NoMatchError, UnsupportedError
from accelplug.patches.base import Config, Patch
from accelplug.patches.generation import GenerationPatch
from accelplug.patches.sparse.template import BlockParams
from accelplug.registry import list_patches, patch_class
from accelplug.testing.encoders import ENCODERS_TRIED
from accelplug.testing.geometry import GEOMETRY_TRIED
from accelplug.testing.language_models import LANGUAGE_MODELS_TRIED
from accelplug.testing.laws import (
    Law,
    Subject,
    laws,
    run_once,
    snapshot_of,
    text_stays_dense,
    the_kernel_at_density_one_is_dense,
)
from accelplug.testing.models import DENOISERS_TRIED, Built
from tests import tiny_language_models, tiny_models, tiny_pipelines
from tests.patch_rows import ROWS

REFUSED = ("sana",)
MODELS = tuple(name for name in tiny_models.MODELS if name not in REFUSED)
SORTS = (
    *("wan", "wan_5b", "wan_i2v", "wan_vace", "skyreels", "hunyuan_video", "hunyuan_video_15", "cogvideox", "cogvideox_15"),
    *("mochi", "ltx", "ltx2", "cosmos", "allegro", "kandinsky5", "latte", "flux", "flux2", "chroma", "sd3", "qwen_image"),
    *("z_image", "pixart", "unet_sd15", "unet_sdxl", "animatediff", "flux3", "qwen_image_21", "nucleus_image"),
)
"""Models of every sort, on which each patch is tried; on the others two are."""

models = pytest.mark.parametrize("name", MODELS)
DENSE = {"rules": [{"patch": "dense"}]}
LACKING = tiny_models.BUILDERS.keys() - tiny_models.MODELS.keys()  # of which an older diffusers has no class
MAKERS = {name: tiny_models.MODELS[name] for name in SORTS if name not in LACKING} | DENOISERS_TRIED | ENCODERS_TRIED


def models_for(row: Subject) -> Mapping[str, Callable[[], Built]]:
    """Of denoisers and vision-language models one of each sort; what stands around ``generate`` takes one picture a row."""
    if row.of_geometry:
        return GEOMETRY_TRIED
    if not row.of_language_models:
        return MAKERS
    return LANGUAGE_MODELS_TRIED if issubclass(patch_class(row.patch), GenerationPatch) else tiny_language_models.BUILT


@pytest.mark.parametrize("law", [law for row in ROWS.values() for law in laws(row, models=models_for(row))], ids=str)
def test_law(law: Law) -> None:
    law()


BESIDE_OTHERS = {"second_path"}
"""What changes nothing alone, by what it is; tests/test_second_path.py holds it beside windows."""


def test_every_patch_has_a_row() -> None:
    assert {entry.name for entry in list_patches() if entry.registered is None} - BESIDE_OTHERS == ROWS.keys()


@models
def test_two_laws_on_every_model(name: str) -> None:
    the_kernel_at_density_one_is_dense(ROWS["sol"], tiny_models.MODELS[name])
    text_stays_dense(ROWS["neighborhood"], tiny_models.MODELS[name])


class Gain(Patch):
    """Attention's answers weigh more, in every head."""

    class Config(Config):
        gain: float = Field(2.0, ge=0, description="Factor.")

    name, cite, family, summary = "gain", "unpublished", "heads", "Every head weighs more."
    config: Config
    speed = False

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> float | None:
        return self.config.gain if self.config.gain != 1 else None

    def attend(self, call: AttentionCall, params: float) -> torch.Tensor:
        return call.dense() * params


class Batchwise(Gain):
    """It takes the gain from all rows at once."""

    name = "batchwise"

    def attend(self, call: AttentionCall, params: float) -> torch.Tensor:
        return call.dense() * (1 + params * call.q.mean())


def test_a_head_patch_of_another_package_obeys_the_laws_or_is_told_which_it_breaks() -> None:
    for law in laws(Gain, {"gain": 1.5}, neutral={"gain": 1.0}, faint={"gain": 1 + 1e-7}):
        law()
    (law,) = [law for law in laws(Batchwise, {"gain": 1.5}) if "its_rows" in str(law)]
    with pytest.raises(AssertionError, match="batchwise on llava, a padded batch is its rows"):
        law()


def alive(kind: type) -> int:
    """How many objects of a kind are held by anything."""
    gc.collect()
    return sum(type(x) is kind for x in gc.get_objects())


def test_exception_in_the_middle_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build("wan")
    dense, before = run_once(model, inputs), snapshot_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.blocks[1].ffn), "forward", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError), accelplug.apply(model, ROWS["radial"].recipe(), gate="off"):
            run_once(model, inputs)
    assert snapshot_of(model) == before
    assert torch.equal(run_once(model, inputs), dense)


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
    assert torch.isfinite(run_once(model, inputs)).all()


def test_a_replaced_processor_is_counted_and_an_error_under_strict() -> None:
    model, inputs = tiny_models.build("wan")
    for strict in (False, True):
        plug = accelplug.apply(model, ROWS["radial"].recipe(), gate="off", strict=strict)
        run_once(model, inputs)
        model.blocks[0].attn1.processor = type(model.blocks[0].attn1.processor).stock()
        if strict:
            with pytest.raises(FallbackError, match="replaced"):
                run_once(model, inputs)
        else:
            run_once(model, inputs)
            assert any("replaced" in reason for reason in plug.report().fallbacks)
        plug.remove()


def test_nothing_matched_says_what_is_there() -> None:
    model, _ = tiny_models.build("wan")
    before = snapshot_of(model)
    with pytest.raises(NoMatchError, match=r"No rule .* fits any attention .* 3 of kind self|No rule"):
        accelplug.apply(model, ROWS["radial"].recipe(layers="90:"))
    with pytest.raises(
        NoMatchError,
        match="neither a denoiser nor a geometry transformer nor a language model nor an image encoder: expected a diffusers pipeline",
    ):
        accelplug.apply(object(), DENSE)
    assert snapshot_of(model) == before


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
    dense = run_once(model, inputs)
    with accelplug.apply(model, ROWS["neighborhood"].recipe(), gate="off") as plug:
        assert torch.equal(run_once(model, inputs), dense)
        assert len(plug.report().fallbacks) == 4
        assert all("more than key padding" in reason for reason in plug.report().fallbacks)


def test_a_rule_that_names_attention_without_a_grid_is_counted() -> None:
    """Motion modules attend over the frames of one place."""
    model, inputs = tiny_models.build("animatediff")
    dense = run_once(model, inputs)
    with accelplug.apply(model, ROWS["neighborhood"].recipe(kind="temporal"), gate="off") as plug:
        assert torch.equal(run_once(model, inputs), dense)
        assert plug.report().fallbacks
        assert all("layout is not understood" in reason for reason in plug.report().fallbacks)


def test_attention_that_never_comes_by_is_counted_and_an_error_under_strict() -> None:
    model, inputs = tiny_models.build("wan")
    recipe = ROWS["radial"].recipe()
    for strict in (False, True):
        skipped = model.blocks[1].attn1
        skipped.forward = lambda hidden_states, *args, **kwargs: hidden_states
        plug = accelplug.apply(model, recipe, gate="off", strict=strict)
        run_once(model, inputs)
        assert plug.report().unrouted == ["blocks.1.attn1"]
        if strict:
            with pytest.raises(FallbackError, match="never came by"):
                run_once(model, inputs)
        else:
            run_once(model, inputs)
            run_once(model, inputs)
            assert plug.report().fallbacks == {"blocks.1.attn1: its attention never came by in the first forward": 1}
        plug.remove()
        del skipped.forward


def test_unknown_denoiser_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Linear"):
        accelplug.apply(nn.Linear(2, 2), DENSE)


def test_training_with_gradients_is_refused_and_removable() -> None:
    model, inputs = tiny_models.build("wan")
    dense = run_once(model, inputs)
    model.train().requires_grad_(True)
    plug = accelplug.apply(model, ROWS["radial"].recipe(), gate="off")
    with pytest.raises(UnsupportedError, match="training mode"):
        model(**copy.deepcopy(inputs))
    plug.remove()
    assert torch.equal(run_once(model.eval(), inputs), dense)


def test_unknown_step_is_dense_counted_or_told() -> None:
    model, inputs = tiny_models.build("wan")
    dense = run_once(model, inputs)
    recipe = ROWS["radial"].recipe(steps="50%:")
    with accelplug.apply(model, recipe, gate="off") as plug:
        assert torch.equal(run_once(model, inputs), dense)
        assert any("step" in reason for reason in plug.report().fallbacks)
        plug.step(0, 10)
        assert torch.equal(run_once(model, inputs), dense)
        plug.step(5, 10)
        assert not torch.equal(run_once(model, inputs), dense)
    with accelplug.apply(model, recipe, gate="off", strict=True), pytest.raises(FallbackError, match="step"):
        run_once(model, inputs)


def test_the_gate_leaves_dense_what_would_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.build("wan")
    dense = run_once(model, inputs)
    from accelplug.hosts import gate

    ms = iter([1.0, 2.0] * 100)
    monkeypatch.setattr(gate, "median_ms", lambda run, device: next(ms))
    with accelplug.apply(model, ROWS["radial"].recipe()) as plug:
        assert torch.equal(run_once(model, inputs), dense)
        assert any("would not pay" in reason for reason in plug.report().gated)
        assert not plug.report().fallbacks
        assert plug.choices["verdicts"][0]["pays"] is False
    ms = iter([2.0, 1.0] * 100)
    with accelplug.apply(model, ROWS["radial"].recipe()) as plug:
        assert not torch.equal(run_once(model, inputs), dense)
        assert plug.report().gains["radial"] == 2.0


def test_warmup_settles_the_gate_and_puts_random_states_back() -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
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
            run_once(model, inputs)
        assert alive(BlockParams) - before <= 16
        assert not plug.report().fallbacks


def test_global_rng_is_untouched() -> None:
    model, inputs = tiny_models.build("wan")
    state = torch.get_rng_state()
    with accelplug.apply(model, ROWS["sol"].recipe()):
        run_once(model, inputs)
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


@pytest.mark.parametrize("eight", [{"precision": "int8"}, {"precision": "fp8"}, {"precision": "int8", "values": "int8"}])
def test_a_recipe_may_ask_for_eight_bits(eight: dict[str, str]) -> None:
    model, inputs = tiny_models.build("wan")
    row = ROWS["sol"]
    with accelplug.apply(model, row.recipe(), gate="off"):
        native = run_once(model, inputs)
    with accelplug.apply(model, row.recipe({**row.working, **eight}), gate="off"):
        rounded = run_once(model, inputs)
    assert not torch.equal(rounded, native)
    torch.testing.assert_close(rounded, native, rtol=0.05, atol=0.05 * float(native.abs().max()))
