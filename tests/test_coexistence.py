"""Living together with what diffusers itself does to a pipeline, in either order of installing."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_group_offloading

import accelplug
from accelplug import step_caches
from accelplug.errors import RecipeError, UnsupportedError
from accelplug.testing.laws import run_once, snapshot_of
from tests import tiny_models, tiny_pipelines
from tests.patch_rows import ROWS

RECIPE = ROWS["radial"].recipe()


def generate(pipe: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return pipe(**inputs, generator=torch.Generator().manual_seed(0)).frames


def caches(pipe: Any) -> dict:
    return {
        "first_block": FirstBlockCacheConfig(threshold=0.02),
        "taylorseer": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
        "pyramid": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 950),
            current_timestep_callback=lambda: pipe._current_timestep,
        ),
        "faster": FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 900),
            attention_weight_callback=lambda _: 0.3,
            current_timestep_callback=lambda: pipe._current_timestep,
            tensor_format="BCFHW",
            is_guidance_distilled=True,
        ),
    }


@pytest.mark.parametrize("name", ["first_block", "taylorseer", "pyramid", "faster"])
def test_caches_in_either_order(name: str) -> None:
    def make() -> tuple[Any, dict[str, Any], Any]:
        pipe, inputs = tiny_pipelines.decoding("wan")
        return pipe, inputs, caches(pipe)[name]

    pipe, inputs, config = make()
    stock = generate(pipe, inputs)
    before = snapshot_of(pipe.transformer)
    pipe.transformer.enable_cache(config)
    cached = generate(pipe, inputs)
    pipe.transformer.disable_cache()
    outs = []
    for plug_first in (True, False):
        pipe, inputs, config = make()
        if plug_first:
            plug = accelplug.apply(pipe, RECIPE, gate="off")
        pipe.transformer.enable_cache(config)
        if not plug_first:
            plug = accelplug.apply(pipe, RECIPE, gate="off")
        outs.append(generate(pipe, inputs))
        if plug_first:  # taken off in the order of installing, not in reverse
            plug.remove()
            assert torch.equal(generate(pipe, inputs), cached)
            pipe.transformer.disable_cache()
        else:
            pipe.transformer.disable_cache()
            assert not torch.equal(generate(pipe, inputs), stock)
            plug.remove()
        assert torch.equal(generate(pipe, inputs), stock)
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], cached)
    assert before["processors"]


def test_group_offload_in_either_order() -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    with accelplug.apply(pipe, RECIPE, gate="off"):
        expected = generate(pipe, inputs)
    for plug_first in (True, False):
        pipe, inputs = tiny_pipelines.decoding("wan")
        plug = accelplug.apply(pipe, RECIPE, gate="off") if plug_first else None
        apply_group_offloading(
            pipe.transformer,
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
        )
        plug = plug or accelplug.apply(pipe, RECIPE, gate="off")
        assert torch.equal(generate(pipe, inputs), expected)
        plug.remove()


def test_layerwise_casting_and_dtype_change() -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    with accelplug.apply(pipe, RECIPE, gate="off", strict=True) as plug:
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        assert torch.isfinite(generate(pipe, inputs)).all()
        assert plug.report().served["radial"]
    pipe, inputs = tiny_pipelines.decoding("wan")
    with accelplug.apply(pipe, RECIPE, gate="off", strict=True) as plug:
        pipe.to(torch.bfloat16)
        inputs = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        assert torch.isfinite(generate(pipe, inputs)).all()
        assert plug.report().served["radial"]


def test_lora_load_and_unload_while_on() -> None:
    from peft import LoraConfig

    pipe, inputs = tiny_pipelines.decoding("wan")
    stock = generate(pipe, inputs)
    with accelplug.apply(pipe, RECIPE, gate="off", strict=True):
        plain = generate(pipe, inputs)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        assert not torch.equal(generate(pipe, inputs), plain)
        pipe.transformer.delete_adapters("default")
        assert torch.equal(generate(pipe, inputs), plain)
    assert torch.equal(generate(pipe, inputs), stock)


def test_fused_projections_new_style_keeps_working() -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    with accelplug.apply(pipe, RECIPE, gate="off", strict=True):
        plain = generate(pipe, inputs)
        pipe.transformer.fuse_qkv_projections()
        torch.testing.assert_close(generate(pipe, inputs), plain, rtol=1e-3, atol=1e-4)


def test_fused_projections_old_style_is_counted() -> None:
    model, inputs = tiny_models.build("cogvideox")
    dense = run_once(model, inputs)
    with accelplug.apply(model, RECIPE, gate="off") as plug:
        run_once(model, inputs)
        model.fuse_qkv_projections()
        torch.testing.assert_close(run_once(model, inputs), dense, rtol=1e-4, atol=1e-5)
        assert any("replaced" in reason for reason in plug.report().fallbacks)
        model.unfuse_qkv_projections()
        assert not torch.allclose(run_once(model, inputs), dense, rtol=1e-4, atol=1e-5)
    assert torch.equal(run_once(model, inputs), dense)


def test_attention_backend_set_after_apply_is_used() -> None:
    model, inputs = tiny_models.build("wan")
    with accelplug.apply(model, RECIPE, gate="off") as plug:
        patched = run_once(model, inputs)
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(
            run_once(model, inputs), patched, rtol=1e-4, atol=1e-5
        )  # cross-attention runs the other kernel
        assert plug.report().served["radial"]
        assert not plug.report().fallbacks
        model.reset_attention_backend()
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    _AttentionBackendRegistry.set_active_backend("native")


def test_perturbed_attention_guidance_keeps_its_meaning() -> None:
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    outs = []
    for plugged in (False, True):
        model, inputs = tiny_models.build("pixart")
        # A window on layers that are not skipped would differ by itself: only layer 0 is named here.
        plug = accelplug.apply(model, ROWS["neighborhood"].recipe(layers=0), gate="off") if plugged else None
        skip = LayerSkipConfig(
            indices=[0],
            fqn="transformer_blocks",
            skip_attention=False,
            skip_ff=False,
            skip_attention_scores=True,
            dropout=1.0,
        )
        apply_layer_skip(model, skip)
        outs.append(run_once(model, inputs))
        if plug:
            assert any("perturbed" in reason for reason in plug.report().fallbacks)
    assert torch.equal(*outs)


def test_two_experts_share_a_clock_and_split_the_steps() -> None:
    pipe, inputs = tiny_pipelines.decoding("wan22_moe")
    stock = generate(pipe, inputs)
    recipe = ROWS["radial"].recipe(denoiser="transformer_2")
    with accelplug.apply(pipe, recipe, gate="off", strict=True) as plug, plug.trace() as events:
        assert not torch.equal(generate(pipe, inputs), stock)
    by_denoiser = {
        name: {e.clock.step for e in events if e.site.denoiser == name} for name in ("transformer", "transformer_2")
    }
    assert all(by_denoiser.values())
    assert max(by_denoiser["transformer"]) < min(by_denoiser["transformer_2"])
    assert {e.patch for e in events if e.site.denoiser == "transformer"} == {"dense"}
    assert {e.clock.branch for e in events} == {"cond", "uncond"}
    assert torch.equal(generate(pipe, inputs), stock)


@pytest.mark.parametrize("name", tiny_pipelines.DECODING)
def test_every_pipeline_tells_its_steps(name: str) -> None:
    pipe, inputs = tiny_pipelines.decoding(name)
    pipe.set_progress_bar_config(disable=True)
    make = lambda: pipe(**inputs, generator=torch.Generator().manual_seed(0))[0]  # noqa: E731
    stock = make()
    recipe = ROWS["neighborhood"].recipe(steps="50%:")
    with accelplug.apply(pipe, recipe, gate="off", strict=True) as plug, plug.trace() as events:
        patched = make()
    steps = inputs["num_inference_steps"]
    assert {event.clock.steps for event in events} == {steps}
    assert {event.clock.step for event in events} == set(range(steps))
    assert {e.patch for e in events if e.clock.step < steps / 2} == {"dense"}
    assert "neighborhood" in {e.patch for e in events if e.clock.step >= steps / 2}
    assert not torch.equal(patched, stock)
    assert torch.equal(make(), stock)


def test_a_second_run_starts_afresh() -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    with accelplug.apply(pipe, RECIPE, gate="off"):
        assert torch.equal(generate(pipe, inputs), generate(pipe, inputs))


def test_save_and_load_give_a_stock_pipe(tmp_path: Path) -> None:
    model, inputs = tiny_models.build("wan")
    dense = run_once(model, inputs)
    with accelplug.apply(model, RECIPE, gate="off"):
        model.save_pretrained(tmp_path)
        processor = pickle.loads(pickle.dumps(model.blocks[0].attn1.processor))
    assert type(processor).__name__ == "WanAttnProcessor"
    assert not hasattr(type(processor), "stock")
    assert torch.equal(run_once(type(model).from_pretrained(tmp_path).eval(), inputs), dense)


CACHES = {
    "first_block": {"threshold": 0.5},
    "mag": {"threshold": 0.5, "num_inference_steps": 4, "mag_ratios": [1.0] * 4, "retention_ratio": 0.0},
    "taylorseer": {"cache_interval": 2, "disable_cache_before_step": 1, "use_lite_mode": True},
}


@pytest.mark.parametrize("cache", step_caches.CACHES.values(), ids=lambda cache: cache.name)
def test_the_table_of_step_caches_says_what_diffusers_does(cache: step_caches.CacheKind) -> None:
    own = {field.name: field.default for field in dataclasses.fields(getattr(diffusers, cache.config))}
    for name, setting in cache.settings.model_fields.items():
        assert name in own
        assert setting.is_required() or setting.default == own[name], name
    for ladder in cache.ladders:
        for rung in ladder.rungs:
            settings = {cache.knob: rung, **dict(ladder.fixed), **cache.for_run(20, [1.0] * 20)}
            cache.settings.model_validate(settings)


@pytest.mark.parametrize("kind", CACHES)
def test_a_recipe_brings_its_step_cache_and_takes_it_away(kind: str) -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    inputs["num_inference_steps"] = 4
    stock, before = generate(pipe, inputs), snapshot_of(pipe.transformer)
    rules = [{"where": {"layers": "1:"}, "patch": "neighborhood", "with": {"block": 8, "window": [1, 3, 3]}}]
    with accelplug.apply(pipe, {"rules": rules}, gate="off") as plug:
        alone, calls = generate(pipe, inputs), sum(plug.report().served.values())
    with accelplug.apply(pipe, {"rules": rules, "cache": {"kind": kind, "with": CACHES[kind]}}, gate="off") as plug:
        both, fewer = generate(pipe, inputs), sum(plug.report().served.values())
    assert fewer < calls, "the cache skipped nothing"
    assert not torch.equal(both, alone)
    assert snapshot_of(pipe.transformer) == before
    assert torch.equal(generate(pipe, inputs), stock)


def test_a_cache_that_the_user_puts_in_its_place_stays() -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    cached = {"rules": [{"patch": "dense"}], "cache": {"kind": "mag", "with": CACHES["mag"]}}
    before = snapshot_of(pipe.transformer)
    pipe.transformer.enable_cache(caches(pipe)["first_block"])
    expected = generate(pipe, inputs)
    pipe.transformer.disable_cache()
    with accelplug.apply(pipe, cached, gate="off"):
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(caches(pipe)["first_block"])
    assert pipe.transformer.is_cache_enabled
    assert torch.equal(generate(pipe, inputs), expected)
    pipe.transformer.disable_cache()
    assert snapshot_of(pipe.transformer)["processors"] == before["processors"]


def test_magcache_is_refused_in_runs_of_other_lengths() -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    generate(pipe, inputs)
    before = snapshot_of(pipe.transformer)
    with (
        accelplug.apply(pipe, {"rules": [{"patch": "dense"}], "cache": {"kind": "mag", "with": CACHES["mag"]}}),
        pytest.raises(UnsupportedError, match="for runs of 4 steps, this one has 5"),
    ):
        generate(pipe, {**inputs, "num_inference_steps": 5})
    assert snapshot_of(pipe.transformer) == before


def test_a_step_cache_that_cannot_be_had_is_refused_and_leaves_nothing() -> None:
    pipe, _ = tiny_pipelines.decoding("wan")
    before = snapshot_of(pipe.transformer)
    cached = {"rules": [{"patch": "dense"}], "cache": {"kind": "taylorseer"}}
    pipe.transformer.enable_cache(caches(pipe)["first_block"])
    with pytest.raises(UnsupportedError, match="FirstBlockCacheConfig on already"):
        accelplug.apply(pipe, cached)
    pipe.transformer.disable_cache()
    sparse_everywhere = {"rules": [{"patch": "radial"}], "cache": {"kind": "first_block"}}
    with pytest.raises(RecipeError, match="predicts a step from its first block"):
        accelplug.apply(pipe, sparse_everywhere)
    with pytest.raises(RecipeError, match="mag_ratios"):
        accelplug.apply(pipe, {"rules": [{"patch": "dense"}], "cache": {"kind": "mag"}})
    with pytest.raises(UnsupportedError, match="no module of transformer to hook"):  # its patterns do not fit Wan's names
        accelplug.apply(pipe, cached)
    with pytest.raises(RecipeError, match="has no 'treshold'"):
        accelplug.apply(pipe, {"rules": [{"patch": "dense"}], "cache": {"kind": "first_block", "with": {"treshold": 1}}})
    assert snapshot_of(pipe.transformer)["processors"] == before["processors"]
