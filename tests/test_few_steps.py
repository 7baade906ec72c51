"""Runs of few steps: recipes for any denoiser by the length of the run, distilled and second-order schedules, adapters on and off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch

import accelplug
from accelplug import recipe as recipes
from accelplug.call import Clock, Layout, Site
from accelplug.cli import main
from accelplug.errors import NoMatchError, RecipeError
from accelplug.hosts.forecast import Forecast
from accelplug.hosts.host import model_facts
from accelplug.hosts.models import denoisers
from accelplug.recipe import LENGTHS, Expected, ModelFacts, Recipe, load, reading, recipes_of
from accelplug.testing.laws import snapshot_of
from tests import tiny_models, tiny_pipelines
from tests.test_recipe import FILE, WAN_14B, write

ANY = ModelFacts(("NewTransformer", "ModelMixin"), {"num_layers": 7}, denoiser=True)
PRESETS = ("close", "balanced", "fast")
DENSE_STEPS = {
    "close": {4: [0], 8: [0, 1], 20: list(range(5)), 50: list(range(12))},
    "balanced": {4: [0], 8: [0], 20: [0, 1, 2], 50: list(range(8))},
    "fast": {4: [], 8: [0], 20: [0, 1], 50: list(range(5))},
}
SITE = Site("blocks.3.attn1", "transformer", "self", 3, 7)


@functools.cache
def preset(name: str) -> Recipe:
    return load(name, ANY)


def density(name: str, step: int, steps: int) -> float:
    decision = preset(name).decide(SITE, Layout((3, 4, 6)), Clock(step, steps))
    return 1.0 if decision.patch is None else decision.config["density"]


# ------------------------------------------------------------------------------------------------------------ by their names


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("name", PRESETS)
def test_dense_steps_go_by_the_length_of_the_run_and_budgets_fall(name: str, steps: int) -> None:
    read = [density(name, step, steps) for step in range(steps)]
    assert [step for step in range(steps) if read[step] == 1.0] == DENSE_STEPS[name][steps]
    sparse = [share for share in read if share < 1.0]
    assert sparse == sorted(sparse, reverse=True)
    assert sparse[0] > sparse[-1], "what comes first reads more"
    run = preset(name).expected(steps)
    assert run is not None
    layers = 0.95  # of 20 the first is dense
    assert run.sparse_steps == len(sparse)
    assert run.density == pytest.approx(1 - layers * (1 - sum(read) / steps))
    assert run.calls == pytest.approx(layers * len(sparse) / steps)
    assert run.ceiling == pytest.approx(1 / (1 - run.calls))


def test_each_reads_less_than_the_one_before() -> None:
    for steps in LENGTHS:
        shares = [preset(name).expected(steps).density for name in PRESETS]
        assert shares == sorted(shares, reverse=True)
        assert len(set(shares)) == len(shares)


def test_every_denoiser_takes_them_and_its_own_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(None, ANY).name == "denoiser/balanced"
    assert load("fast", ANY).name == "denoiser/fast"
    wan = ModelFacts(("WanTransformer3DModel",), WAN_14B, denoiser=True)  # bare: two files fit it equally well
    assert load("fast", wan).name == "denoiser/fast"
    with pytest.raises(RecipeError, match="several"):
        load("radial", wan)
    with pytest.raises(NoMatchError, match="nearest: fast"):
        load("fats", ANY)
    with pytest.raises(NoMatchError):
        load("fast", ModelFacts(("LlamaForCausalLM",), {}, llm=True))
    monkeypatch.setattr(reading, "SHIPPED", tmp_path)
    write(
        tmp_path,
        FILE.replace("AnyTransformer", "NewTransformer").replace("  a:", "  fast:").replace("default: a", "default: fast"),
    )
    (tmp_path / "denoiser.yaml").write_text((recipes.SHIPPED / "denoiser.yaml").read_text())
    assert load("fast", ANY).name == "mine/fast"
    assert load("close", ANY).name == "denoiser/close"
    assert [name for name in recipes_of(ANY) if name.endswith("/fast")] == ["mine/fast"]


def test_they_are_listed_shown_and_inspected_with_what_they_come_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # no heading is broken
    assert main(["list", "denoiser"]) == 0
    assert "of 4, 8, 20, 50 steps 1, 1, 3, 8 dense" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert main(["show", "denoiser/fast"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "of 4, 8, 20, 50 steps 0, 1, 2, 5 dense; 0.19, 0.29" in told
    assert "gain of attention at most 20.0x, 5.9x, 6.9x, 6.9x" in told
    assert "of 4, 8, 20, 50 steps it computes 4, 8, 13, 31" in told
    assert main(["inspect", "wan-shapes", "--steps", "4"]) == 0
    told = capsys.readouterr().out
    assert "denoiser/fast" in told
    assert "at most, 4 steps" in told


# ------------------------------------------------------------------------------------------------------------------ whole runs


def left_of(pipe: Any) -> list[dict[str, Any]]:
    """All that a plug could leave behind in the denoisers."""
    return [snapshot_of(part) for part in denoisers(pipe).values()]


def run(pipe: Any, inputs: dict[str, Any], steps: int, **more: Any) -> torch.Tensor:
    generator = torch.manual_seed(0)  # schedulers of distilled models draw noise from it too
    out = pipe(**{**inputs, "num_inference_steps": steps, "generator": generator, "output_type": "latent", **more})[0]
    return out if isinstance(out, torch.Tensor) else torch.as_tensor(out)


SCHEDULED = {
    "wan": 1,  # two named branches
    "wan_heun": 2,
    "wan_lcm": 1,
    "wan22_moe": 1,
    "flux": 1,
    "sd15_lcm": 1,
    "sd15_heun": 2,
    "sd15_kdpm2": 2,
    "hunyuan_video": 1,
}
"""Pipelines, and how often a step calls the denoiser, but for the last one."""
SCHEDULERS: dict[str, Any] = {
    "wan_heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "wan_lcm": diffusers.FlowMatchLCMScheduler,
}


@pytest.mark.parametrize(
    ("name", "steps"), [*((name, 4) for name in SCHEDULED), ("wan", 8), ("wan_heun", 8), ("sd15_heun", 8)]
)
def test_runs_of_few_steps(name: str, steps: int) -> None:
    pipe, inputs = tiny_pipelines.pipeline("wan" if name in SCHEDULERS else name)
    if name in SCHEDULERS:
        pipe.scheduler = SCHEDULERS[name]()
    stock, before = run(pipe, inputs, steps), left_of(pipe)
    with accelplug.apply(pipe, "balanced", gate="off", strict=True) as plug:
        assert "of 4, 8, 20, 50 steps 1, 1, 3, 8 dense" in str(plug.report())
        with plug.trace() as events:
            out = run(pipe, inputs, steps)
        report = plug.report()
    calls = {event.clock.steps for event in events}
    assert calls == {SCHEDULED[name] * steps - SCHEDULED[name] + 1}
    (length,) = calls
    assert {event.clock.step for event in events} == set(range(length)), "no step is skipped in so short a run"
    sparse = {step for step in range(length) if density("balanced", step, length) < 1.0}
    assert {event.clock.step for event in events if event.patch == "rows"} == sparse
    assert f"{length - len(sparse)} of {length} steps dense" in report.expected
    assert (name, steps) != ("wan_heun", 8) or "the scheduler calls the model twice a step" in str(report)
    assert torch.isfinite(out).all()
    assert not torch.equal(out, stock)
    assert left_of(pipe) == before
    assert torch.equal(run(pipe, inputs, steps), stock)


def test_compare_takes_them_by_name() -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    pipe.vae.decode = lambda latents, return_dict: (latents[:, :3],)
    given = {**inputs, "height": 48, "width": 64, "num_inference_steps": 2}
    given.pop("output_type")
    found = accelplug.compare(pipe, list(PRESETS), given, [0], caches=True, progress=False)
    assert {row.name for row in found.rows} >= {*PRESETS, *(f"FirstBlockCache + {name}" for name in PRESETS)}


def test_a_modular_pipeline_takes_them() -> None:
    classic, inputs = tiny_pipelines.pipeline("wan")
    modular = tiny_pipelines.modular_wan(classic)
    given = {key: inputs[key] for key in ("prompt_embeds", "negative_prompt_embeds", "height", "width", "num_frames")}
    with accelplug.apply(modular, "fast", gate="off", strict=True) as plug, plug.trace() as events:
        modular(**given, num_inference_steps=8, generator=torch.Generator().manual_seed(0), output="latents")
    assert {event.clock.step for event in events if event.patch == "rows"} == set(range(1, 8))
    assert "1 of 8 steps dense" in plug.report().expected


@pytest.mark.parametrize("name", PRESETS)
def test_a_bare_denoiser_takes_them_step_by_step(name: str) -> None:
    model, inputs = tiny_models.build("flux")
    with accelplug.apply(model, name, gate="off", strict=True) as plug, plug.trace() as events, torch.no_grad():
        for step in range(4):
            plug.step(step, 4)
            model(**inputs)
    assert {event.clock.step for event in events if event.patch == "rows"} == set(range(4)) - set(DENSE_STEPS[name][4])
    assert name == "close" or "left out of transformer: It needs a cache_context" in str(plug.report())


def test_a_long_run_extrapolates_where_the_model_takes_a_cache() -> None:
    pipe, inputs = tiny_pipelines.pipeline("wan")
    run(pipe, inputs, 4)
    before = left_of(pipe)
    with accelplug.apply(pipe, "balanced", gate="off", strict=True) as plug:
        for steps, computed in ((12, [0, 1, 2, 4, 6, 8, 10, 11]), (4, [0, 1, 2, 3]), (16, [*range(4), 5, 7, 9, 11, 13, 15])):
            with plug.trace() as events:
                run(pipe, inputs, steps)
            assert sorted({event.clock.step for event in events}) == computed
            said = f"computed {len(computed)} of {steps} steps" if steps > 4 else "computed every step: the run had 4"
            assert said in str(plug.report())
    assert left_of(pipe) == before
    unet, inputs = tiny_pipelines.pipeline("sd15")
    with accelplug.apply(unet, "balanced", gate="off", strict=True) as plug, plug.trace() as events:
        run(unet, inputs, 12)
    assert {event.clock.step for event in events} == set(range(12))
    assert "taylorseer left out of unet: UNet2DConditionModel takes none" in str(plug.report())


@pytest.mark.parametrize("compiled_first", [True, False])
def test_blocks_that_are_compiled_keep_their_graphs(compiled_first: bool) -> None:
    pipe, inputs = tiny_pipelines.pipeline("wan")
    run(pipe, inputs, 2)
    if compiled_first:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with accelplug.apply(pipe, "balanced", gate="off") as plug:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        run(pipe, inputs, 4)
        assert "WanTransformer3DModel is compiled" in str(plug.report())


def test_a_run_that_begins_late_counts_the_steps_that_it_takes() -> None:
    model, inputs = tiny_models.build("wan")
    with accelplug.apply(model, "balanced", gate="off") as plug, torch.no_grad(), model.cache_context("cond"):
        plug.step(5, 12)
        model(**inputs)
        assert "the run had 7, and it is for runs of >=12" in str(plug.report())
        assert "0 of 7 steps dense" in plug.report().expected


def test_one_dense_step_is_told_by_what_it_costs() -> None:
    assert str(Expected(4, 3, 0.75, 0.4)).endswith("at most 4.0x as fast, without bound with one dense step fewer")
    assert str(Expected(8, 6, 0.6)).endswith(
        "60% of the attention calls sparse: its attention is at most 2.5x as fast, 3.3x with one dense step fewer"
    )
    told = Forecast(
        "transformer", (1,), None, 10.0, 0.8, forward_gain=2.0, run_gain=4 / (1 + 3 / 2), sparse_steps=3, steps=4
    )
    assert told.with_one_dense_step_fewer == pytest.approx(2.0)
    assert str(told).endswith("1.60x for the run, 3 of whose 4 steps have them (2.00x with one dense step fewer)")
    assert Forecast("transformer", (1,), None, 10.0, 0.8, 2.0, 2.0, 4, 4).with_one_dense_step_fewer is None


# ------------------------------------------------------------------------------------------------------------------- adapters


def lora(model: Any, name: str = "turbo") -> None:
    torch.manual_seed(1)
    model.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), adapter_name=name
    )


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "loaded": (lambda model: None, lora),
    "off": (lora, lambda model: model.disable_adapters()),
    "weighed": (lora, lambda model: model.set_adapters("turbo", weights=0.25)),
    "fused": (lora, lambda model: model.fuse_lora(adapter_names=["turbo"])),
    "unfused": (
        lambda model: (lora(model), model.fuse_lora(adapter_names=["turbo"])),
        lambda model: (model.unfuse_lora(), model.disable_adapters()),
    ),
    "deleted": (lora, lambda model: model.delete_adapters("turbo")),
}
KEEPS: dict[str, dict[str, Any]] = {
    "plans": {"rules": [{"patch": "rows", "with": {"block": 8, "reuse_steps": 4, "repair": "output_query"}}]},
    "cache": {
        "rules": [{"patch": "dense"}],
        "cache": {
            "kind": "taylorseer",
            "with": {"cache_interval": 4, "use_lite_mode": True, "disable_cache_before_step": 1},
        },
    },
}


@pytest.mark.parametrize("kept", KEEPS)
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_of_other_adapters_is_recalled(change: str, kept: str) -> None:
    """Behind a change in the middle of a run all is as in a plug that saw no step before it."""
    before, after = CHANGES[change]
    model, inputs = tiny_models.build("wan")
    before(model)

    def step(plug: Any, index: int) -> torch.Tensor:
        plug.step(index, 4)
        with torch.no_grad(), model.cache_context("cond") if kept == "cache" else nullcontext():
            return model(**{**inputs, "hidden_states": (1 - 0.1 * index) * inputs["hidden_states"]}).sample

    with accelplug.apply(model, KEEPS[kept], gate="off", strict=True) as plug:
        seen = [step(plug, 0), step(plug, 1)]
        after(model)
        found = step(plug, 2), step(plug, 3)
        assert {said.clock.step for said in plug.estimates} <= {2, 3}
    with accelplug.apply(model, KEEPS[kept], gate="off", strict=True) as plug:
        assert torch.equal(found[0], step(plug, 2))
        assert torch.equal(found[1], step(plug, 3))
    assert all(torch.isfinite(out).all() for out in seen)


def test_a_pipeline_whose_lora_is_switched_off_mid_way_ends_as_it_should() -> None:
    pipe, inputs = tiny_pipelines.pipeline("wan")
    lora(pipe.transformer)
    stock, before = run(pipe, inputs, 4), left_of(pipe)

    def switch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.transformer.disable_adapters() if step == 1 else pipe.transformer.enable_adapters()
        return tensors

    plain = run(pipe, inputs, 4, callback_on_step_end=switch)
    pipe.transformer.enable_adapters()
    with accelplug.apply(pipe, {"rules": [{"patch": "dense"}]}, gate="off"):
        assert torch.equal(run(pipe, inputs, 4, callback_on_step_end=switch), plain)
    pipe.transformer.enable_adapters()
    with accelplug.apply(pipe, "fast", gate="off", strict=True) as plug:
        first = run(pipe, inputs, 4, callback_on_step_end=switch)
        pipe.transformer.enable_adapters()
        assert torch.equal(run(pipe, inputs, 4, callback_on_step_end=switch), first)
        assert "0 of 4 steps dense" in str(plug.report())
    pipe.transformer.enable_adapters()
    assert left_of(pipe) == before
    assert torch.equal(run(pipe, inputs, 4), stock)


def test_facts_say_what_a_model_is() -> None:
    assert model_facts(tiny_models.build("wan")[0]).denoiser
