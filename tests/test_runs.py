"""A run has a beginning and an end: nothing outlives it, its steps are those of the pipeline that runs, and threads do not mix."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import accelplug
from accelplug.errors import FallbackError, NoMatchError, UnsupportedError
from accelplug.hosts.diffusers import TIMESTEPS, DenoiserHost
from accelplug.hosts.models import denoisers
from accelplug.inspection.denoiser import inspect_denoiser
from accelplug.testing.models import Arguments, build_pipeline, noise, sample_of
from accelplug.testing.runs import (
    another_prompt,
    cancel_in_a_callback,
    cancel_in_the_model,
    nothing_of_a_run_is_left,
    other_way_up,
    run_pipeline,
)
from tests import tiny_models, tiny_pipelines
from tests.patch_rows import ROWS

STEPS = 4
EIGHT = {"block": 8, "backend": "reference"}


def rule(patch: str, **config: Any) -> dict[str, Any]:
    return {"rules": [{"patch": patch, "with": {**EIGHT, **config}}]}


STATEFUL = {
    "kmeans": rule("sol", tau=0.5, band=0, order="kmeans", cluster_iterations=4),
    "svg_ear": rule("svg_ear", block_k=8, top_p=0.5, cluster_iterations=4),
    "svg": rule("svg", density=0.3, sink=False, profile_interval=4),
    "tome": {"rules": [{"patch": "tome", "with": {"ratio": 0.5, "interval": 4, "reuse_layers": 2}}]},
    "repair": rule("rows", density=0.3, rows=3, repair="output_query"),
    "guided": {"rules": [{"patch": "headhunter", "with": {"heads": [[1, 0]], "u": 0.5}}]},
}
"""Patches that keep something from step to step. The laws try the others."""

CACHES = {
    "first_block": {"threshold": 0.5},
    "mag": {"threshold": 0.5, "num_inference_steps": STEPS, "mag_ratios": [1.0] * STEPS, "retention_ratio": 0.0},
    "taylorseer": {"cache_interval": 2, "disable_cache_before_step": 1, "use_lite_mode": True},
}
LATER = [{"where": {"layers": "1:"}, "patch": "neighborhood", "with": {**EIGHT, "window": [1, 3, 3]}}]
NEIGHBORHOOD = ROWS["neighborhood"].recipe()
CACHED = {f"cache {kind}": {"rules": LATER, "cache": {"kind": kind, "with": CACHES[kind]}} for kind in CACHES}


STOPS = {"model": cancel_in_the_model, "callback": cancel_in_a_callback}


@pytest.mark.parametrize(("stop", "step"), [("model", 2), ("callback", 0), ("callback", 2)])
@pytest.mark.parametrize(
    ("patch", "name"), [(patch, name) for patch in STATEFUL for name in ("wan", "sd15") if (patch, name) != ("svg", "sd15")]
)  # svg reads everything of a picture
def test_a_cancelled_run_leaves_nothing_in_a_patch(patch: str, name: str, stop: str, step: int) -> None:
    nothing_of_a_run_is_left(lambda: tiny_pipelines.pipeline(name), STATEFUL[patch], STOPS[stop], step)


@pytest.mark.parametrize(("stop", "step"), [("model", 1), ("model", 2), ("callback", 0), ("callback", 2)])
@pytest.mark.parametrize("cache", CACHED)
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_a_cancelled_run_leaves_nothing_in_a_step_cache(name: str, cache: str, stop: str, step: int) -> None:
    nothing_of_a_run_is_left(lambda: tiny_pipelines.pipeline(name), CACHED[cache], STOPS[stop], step)


@pytest.mark.parametrize("name", ["sd3", "z_image", "pixart", "cosmos", "wan22_moe", "qwen_image", "wan_video2video"])
@pytest.mark.parametrize("patch", ["kmeans", "repair"])
def test_a_second_run_is_the_first_again(patch: str, name: str) -> None:
    """Also where no context tells that a run has ended."""
    pipe, inputs = tiny_pipelines.pipeline(name)
    with accelplug.apply(pipe, STATEFUL[patch], gate="off"):
        first = run_pipeline(pipe, inputs)
        assert torch.equal(run_pipeline(pipe, inputs), first)
        cancel_in_the_model(pipe, another_prompt(inputs), 1)
        assert torch.equal(run_pipeline(pipe, inputs), first)


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_a_run_that_begins_late_begins_anew(strength: float) -> None:
    """At a step behind the one at which the last run was cancelled."""
    text, inputs = tiny_pipelines.pipeline("sd15")
    text.unet.register_to_config(sample_size=64)
    picture = diffusers.StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    late = {name: given for name, given in inputs.items() if name not in ("height", "width")}
    late |= {"image": torch.rand(1, 3, 24, 32), "strength": strength}
    with accelplug.apply(text, STATEFUL["kmeans"], gate="off"):
        fresh = run_pipeline(picture, late)
    for first in (text, picture):
        with accelplug.apply(text, STATEFUL["kmeans"], gate="off"):
            cancel_in_a_callback(first, inputs if first is text else {**late, "strength": 1.0}, 0)
            assert torch.equal(run_pipeline(picture, late), fresh)


def test_a_bare_denoiser_that_is_told_its_steps_begins_anew_where_they_do_not_advance() -> None:
    model, inputs = tiny_models.build("wan")
    with accelplug.apply(model, STATEFUL["kmeans"], gate="off") as plug:
        outputs = []
        for step in (0, 1, 2, 1, 2, 0, 1, 2):
            plug.step(step, 8)
            with torch.no_grad():
                outputs.append(model(**{**inputs, "hidden_states": inputs["hidden_states"] * (1 + step)})[0])
    assert torch.equal(outputs[0], outputs[5])
    assert torch.equal(outputs[1], outputs[6])
    assert torch.equal(outputs[2], outputs[7])
    assert torch.equal(outputs[4], outputs[7]) is False  # it began one step later


@pytest.mark.parametrize("patch", [name for name in STATEFUL if name != "guided"])  # whose further forward is a branch
def test_a_loop_by_hand_over_one_schedule_begins_anew_where_it_starts_over(patch: str) -> None:
    """Nothing sets a schedule, nothing raises in the model, and the branches have no names."""
    pipe, _ = tiny_pipelines.pipeline("wan")
    _, given = tiny_models.build("wan")
    given["hidden_states"] = noise(1, 16, 3, 8, 12)
    pipe.scheduler.set_timesteps(STEPS)

    def loop(seed: int, steps: int = STEPS) -> Tensor:
        x = given["hidden_states"] * (1 + seed)
        for t in pipe.scheduler.timesteps[:steps]:
            x = x + 0.1 * run_alone(pipe.transformer, {**given, "hidden_states": x, "timestep": t.expand(1)})
        return x

    with accelplug.apply(pipe, STATEFUL[patch], gate="off"):
        fresh = loop(0)
        for steps in (1, 2):
            loop(1, steps)
            assert torch.equal(loop(0), fresh)


@pytest.mark.parametrize("cache", ["cache first_block", "cache taylorseer"])
def test_a_step_cache_on_a_bare_denoiser_begins_anew_where_timesteps_come_again(cache: str) -> None:
    """Nothing says which step it is; a cache needs no more than to know that it goes on."""
    model, inputs = tiny_models.build("wan")

    def loop(seed: int, timesteps: tuple[int, ...]) -> Tensor:
        x = inputs["hidden_states"] * (1 + seed)
        for t in timesteps:
            with model.cache_context("cond"):
                x = x + 0.1 * run_alone(model, {**inputs, "hidden_states": x, "timestep": torch.tensor([t])})
        return x

    with accelplug.apply(model, CACHED[cache], gate="off") as plug:
        fresh = loop(0, (900, 600, 300, 100))
        assert plug.report().served["neighborhood"] < 4 * 2, "the cache skipped nothing"
        loop(1, (900, 600))
        assert torch.equal(loop(0, (900, 600, 300, 100)), fresh)


# ------------------------------------------------------------------------------------------------------------- steps

STEPPED = {"rules": [{"where": {"steps": "50%:"}, "patch": "neighborhood", "with": {**EIGHT, "window": [1, 3, 3]}}]}


def steps_by_what_was_given(pipe: Any, forwards: list[float]) -> list[int]:
    """Places in the pipeline's own schedule, found without the clock: they come in order, and the last one comes last."""
    schedule, order = pipe.scheduler.timesteps.tolist(), list(dict.fromkeys(forwards))
    if len(set(schedule)) == len(schedule):
        return [len(schedule) - len(order) + order.index(number) for number in forwards]
    return list(range(len(schedule)))  # one forward for each timestep, some of which are equal


def check_steps(plug: accelplug.Plug, pipe: Any, inputs: Arguments) -> None:
    """Run a pipeline, and compare the steps that were seen with those that should have been, forward by forward."""
    forwards: list[float] = []
    seen: list[int | None] = []
    handles = []
    for host in plug.hosts:

        def look(module: Any, args: tuple, kwargs: dict[str, Any], host: Any = host) -> None:
            given = host.signature.bind_partial(module, *args, **kwargs).arguments
            timestep = next(given[name] for name in TIMESTEPS if name in given)
            forwards.append(float(torch.as_tensor(timestep).max()))
            seen.append(host.now.step)

        assert isinstance(host, DenoiserHost)
        handles.append(host.denoiser.register_forward_pre_hook(look, with_kwargs=True))
    with plug.trace() as events:
        run_pipeline(pipe, inputs)
    for handle in handles:
        handle.remove()
    steps = len(pipe.scheduler.timesteps)
    assert seen == steps_by_what_was_given(pipe, forwards)
    assert {event.clock.steps for event in events} == {steps}
    assert {event.clock.step for event in events} == set(seen)
    late = [event for event in events if event.clock.step is not None and event.clock.step >= round(steps / 2)]
    answered = {event.clock.step for event in events if event.patch != "dense"}
    dense = all(event.reason for event in late)  # its mask or its tokens are not understood
    assert answered == (set() if dense else {event.clock.step for event in late})


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_the_step_is_the_place_of_the_timestep_that_was_given(name: str) -> None:
    pipe, inputs = tiny_pipelines.pipeline(name)
    with accelplug.apply(pipe, STEPPED, gate="off") as plug:
        check_steps(plug, pipe, inputs)
        assert not [reason for reason in plug.report().fallbacks if "step" in reason]
        twin = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler), **_settings(pipe)})
        twin.set_progress_bar_config(disable=True)
        check_steps(plug, twin, {**inputs, "num_inference_steps": 6})
        check_steps(plug, pipe, inputs)
        check_steps(plug, twin, {**inputs, "num_inference_steps": 5})
        assert not [reason for reason in plug.report().fallbacks if "step" in reason]


@pytest.mark.parametrize("name", [name for name in tiny_pipelines.PIPELINES if not name.startswith("sd15_")])
def test_inspect_knows_the_grid_that_a_run_has(name: str) -> None:
    """By the sizes that the call is given; where it cannot know, as of several resolutions, it says nothing."""
    pipe, inputs = tiny_pipelines.pipeline(name)
    sizes: dict[str, Any] = {key: inputs[key] for key in ("num_frames", "height", "width") if key in inputs}
    told = {part.name: part.grid for part in inspect_denoiser(pipe, sizes).denoisers}
    with accelplug.apply(pipe, STEPPED, gate="off") as plug:
        pipe(**{**inputs, "num_inference_steps": 2})
        for host in plug.hosts:
            assert isinstance(host, DenoiserHost)
            seen = [region.entered.geometry for region in host.regions if region.entered.geometry]
            assert host.family.status != "layout", "a whole pipeline runs: it is verified"
            assert not seen or told[host.name] in (None, *(geometry.grid_thw for geometry in seen))
    assert (told["transformer" if "transformer" in told else "unet"] is None) == (name in NO_GRID_AHEAD)


WHOLE = (
    *("hunyuan_video_15", "ltx_2", "chronoedit", "anyflow", "motif_video", "easyanimate"),
    *("helios", "kandinsky6", "cosmos3"),
)
"""Pipelines that no other test runs from noise to the end with and without a patch."""


@pytest.mark.parametrize("name", [name for name in WHOLE if name in tiny_pipelines.PIPELINES])
def test_a_whole_run_is_exact_where_nothing_is_left_out_and_sparse_where_something_is(name: str) -> None:
    pipe, inputs = tiny_pipelines.pipeline(name)
    stock = run_pipeline(pipe, inputs)
    with accelplug.apply(pipe, ROWS["neighborhood"].recipe(ROWS["neighborhood"].neutral), gate="off"):
        assert torch.equal(run_pipeline(pipe, inputs), stock)
    with accelplug.apply(pipe, NEIGHBORHOOD, gate="off", strict=True) as plug:
        assert not torch.equal(run_pipeline(pipe, inputs), stock)
        assert set(plug.report().served) == {"neighborhood"}
    assert torch.equal(run_pipeline(pipe, inputs), stock)


@pytest.mark.skipif("anyflow_far" not in tiny_models.MODELS, reason="not in this diffusers")
def test_chunks_behind_cached_keys_are_sparse_and_filling_the_cache_is_dense_and_counted() -> None:
    pipe, inputs = build_pipeline(tiny_pipelines.anyflow_far)
    pipe.set_progress_bar_config(disable=True)
    inputs["output_type"] = "latent"
    stock = run_pipeline(pipe, inputs)
    with accelplug.apply(pipe, ROWS["neighborhood"].recipe(ROWS["neighborhood"].neutral), gate="off"):
        assert torch.equal(run_pipeline(pipe, inputs), stock)
    with accelplug.apply(pipe, NEIGHBORHOOD, gate="off") as plug:
        assert not torch.equal(run_pipeline(pipe, inputs), stock)
        report = plug.report()
    assert report.served == {"neighborhood": 3 * STEPS * 2, "dense": 2 * 2}, "three chunks and two fillings, at two layers"
    assert all("layout is not understood" in reason for reason in report.fallbacks)
    assert torch.equal(run_pipeline(pipe, inputs), stock)


NO_GRID_AHEAD = {
    *("sd15", "sdxl", "animatediff", "animatediff_video2video", "modelscope"),  # several resolutions
    *("wan_video2video", "cogvideox_video2video", "cosmos_2"),  # the video that is given says how many frames, or nobody
    *("helios", "chronoedit"),  # a chunk of what is asked for, or two frames
    *("latte", "allegro"),  # a grid for each frame; frames are rounded up to odd numbers
}


def _settings(pipe: Any) -> dict[str, Any]:
    """What a pipeline was made with beside its parts."""
    return {
        name: pipe.config[name]
        for name in ("boundary_ratio", "requires_safety_checker", "enable_safety_checker")
        if name in pipe.config
    }


def test_timesteps_that_the_user_chose_are_a_schedule_too() -> None:
    """DDPM then knows no number of steps."""
    pipe, inputs = tiny_pipelines.sd15_by(diffusers.DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    with accelplug.apply(pipe, STEPPED, gate="off", strict=True) as plug:
        check_steps(plug, pipe, {**inputs, "timesteps": [900, 700, 500, 200], "output_type": "latent"})


@pytest.mark.parametrize("name", ["wan", "flux", "sd15", "sd3"])
def test_another_pipeline_may_be_the_first_to_run(name: str) -> None:
    pipe, inputs = tiny_pipelines.pipeline(name)
    with accelplug.apply(pipe, STEPPED, gate="off", strict=True) as plug:
        for steps in (5, 8):  # a new one for each run, as servers make them
            twin = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler), **_settings(pipe)})
            twin.set_progress_bar_config(disable=True)
            check_steps(plug, twin, {**inputs, "num_inference_steps": steps})
            del twin
            gc.collect()


def test_a_modular_pipeline_and_a_classic_one_on_one_denoiser() -> None:
    """The modular one names no branches and opens no context."""
    classic, inputs = tiny_pipelines.pipeline("wan")
    modular = tiny_pipelines.modular_wan(classic)
    classic.scheduler = copy.deepcopy(classic.scheduler)
    given = {key: inputs[key] for key in ("prompt_embeds", "negative_prompt_embeds", "height", "width", "num_frames")}

    def make(steps: int) -> Tensor:
        return modular(**given, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output="latents")

    with accelplug.apply(modular, STEPPED, gate="off", strict=True) as plug:
        for one, steps in (
            (make, 4),
            (lambda steps: run_pipeline(classic, inputs, num_inference_steps=steps), 5),
            (make, 6),
        ):
            with plug.trace() as events:
                one(steps)
            assert {(event.clock.step, event.clock.steps) for event in events} == {(step, steps) for step in range(steps)}
    with accelplug.apply(modular, STATEFUL["kmeans"], gate="off"):
        assert torch.equal(make(4), make(4))


@pytest.mark.parametrize("name", ["flux", "hunyuan_video", "wan"])
def test_rounded_timesteps_are_still_told_apart(name: str) -> None:
    """In bfloat16 many of 24 steps under a shift of 12 are the same number."""
    pipe, inputs = tiny_pipelines.pipeline(name)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=12.0)
    pipe.transformer.to(torch.bfloat16)
    inputs = {
        key: given.bfloat16() if isinstance(given, Tensor) and given.is_floating_point() else given
        for key, given in inputs.items()
    }
    with accelplug.apply(pipe, STEPPED, gate="off", strict=True) as plug, plug.trace() as events:
        run_pipeline(pipe, {**inputs, "num_inference_steps": 24})
    steps = [event.clock.step for event in events]
    assert steps == sorted(steps)
    assert set(steps) == set(range(24))


def test_a_timestep_in_no_schedule_is_unknown_and_counted() -> None:
    pipe, inputs = tiny_pipelines.pipeline("flux")
    _, given = tiny_models.build("flux")
    with accelplug.apply(pipe, STEPPED, gate="off") as plug:
        run_pipeline(pipe, inputs)
        assert not plug.report().fallbacks
        guidance = {"guidance": torch.tensor([1.0])}
        with torch.no_grad():
            pipe.transformer(**{**given, **guidance, "timestep": torch.tensor([0.123])})
        assert any("step" in reason for reason in plug.report().fallbacks)
    with accelplug.apply(pipe, STEPPED, gate="off", strict=True), pytest.raises(FallbackError, match="step"):
        pipe.transformer(**{**given, **guidance, "timestep": torch.tensor([0.123])})


def test_compiled_whole_it_goes_by_the_pipeline_that_counts() -> None:
    """A compiled forward's timestep cannot be read; the contexts around it are heard."""
    torch._dynamo.reset()
    pipe, inputs = tiny_pipelines.pipeline("hunyuan_video")

    def twin() -> Any:
        other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
        other.set_progress_bar_config(disable=True)
        return other

    with accelplug.apply(pipe, STEPPED, gate="off"):
        expected = [
            run_pipeline(one, inputs, num_inference_steps=steps) for one, steps in ((twin(), 5), (pipe, 4), (twin(), 3))
        ]
    pipe.transformer, seen = torch.compile(pipe.transformer, backend="eager"), []
    with accelplug.apply(pipe, STEPPED, gate="off") as plug:
        for one, steps, out in zip((twin(), pipe, twin()), (5, 4, 3), expected, strict=True):
            torch.testing.assert_close(run_pipeline(one, inputs, num_inference_steps=steps), out, rtol=1e-4, atol=1e-5)
            seen.append((plug.hosts[0].now.step, plug.hosts[0].now.steps))
    assert seen == [(4, 5), (3, 4), (2, 3)]
    assert not plug.report().fallbacks
    torch._dynamo.reset()


def test_a_grid_that_compiled_code_cannot_read_is_counted() -> None:
    """Flux's tokens come packed, their grid stands in the values of img_ids."""
    torch._dynamo.reset()
    pipe, inputs = tiny_pipelines.pipeline("flux")
    pipe.transformer.compile(backend="eager")
    with accelplug.apply(pipe, STEPPED, gate="off") as plug:
        run_pipeline(pipe, inputs)
    assert any("layout is not understood" in reason for reason in plug.report().fallbacks)
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------------------- threads


def side_by_side(pipe: Any, kinds: list[Arguments]) -> list[Tensor]:
    """Run a pipeline in as many threads, each forward beginning in all of them before it goes on in any."""
    meet = threading.Barrier(len(kinds), timeout=60)
    found: dict[int, Tensor] = {}
    failed: list[BaseException] = []

    def one(number: int) -> None:
        try:
            view = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler), **_settings(pipe)})
            view.set_progress_bar_config(disable=True)
            found[number] = run_pipeline(view, kinds[number], seed=number)
        except BaseException as error:
            failed.append(error)
            meet.abort()

    denoiser = next(iter(denoisers(pipe).values()))

    def wait(*_: Any) -> None:
        meet.wait()

    handle = denoiser.register_forward_pre_hook(wait)
    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    if failed:
        raise failed[0]
    return [found[number] for number in range(len(kinds))]


HOISTED = {"rules": [{"patch": "sol", "with": {**EIGHT, "tau": 0.5, "band": 0, "order": "morton"}}]}


@pytest.mark.parametrize("name", ["wan", "flux", "sd15"])
@pytest.mark.parametrize(
    "recipe", [NEIGHBORHOOD, STATEFUL["kmeans"], STATEFUL["tome"], STATEFUL["repair"], STATEFUL["guided"], HOISTED, STEPPED]
)
def test_two_threads_are_each_as_alone(name: str, recipe: dict[str, Any]) -> None:
    pipe, inputs = tiny_pipelines.pipeline(name)
    kinds = [inputs, other_way_up(another_prompt(inputs))]
    alone = []
    for number, kind in enumerate(kinds):
        with accelplug.apply(pipe, recipe, gate="off"):
            alone.append(run_pipeline(pipe, kind, seed=number))
    with accelplug.apply(pipe, recipe, gate="off", strict=True) as plug:
        together = side_by_side(pipe, kinds)
        assert not plug.report().fallbacks
        assert not plug.report().unrouted
    for left, right in zip(together, alone, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("recipe", [STATEFUL["repair"], STEPPED])
def test_two_threads_are_each_as_alone_in_compiled_blocks(recipe: dict[str, Any]) -> None:
    torch._dynamo.reset()
    pipe, inputs = tiny_pipelines.pipeline("wan")
    kinds = [inputs, other_way_up(another_prompt(inputs))]
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    alone = []
    for number, kind in enumerate(kinds):
        with accelplug.apply(pipe, recipe, gate="off"):
            alone.append(run_pipeline(pipe, kind, seed=number))
    with accelplug.apply(pipe, recipe, gate="off", strict=True):
        for left, right in zip(side_by_side(pipe, kinds), alone, strict=True):
            assert torch.equal(left, right)
    torch._dynamo.reset()


def test_a_step_cache_in_two_threads_is_refused() -> None:
    pipe, inputs = tiny_pipelines.pipeline("wan")
    with accelplug.apply(pipe, CACHED["cache first_block"], gate="off"):
        alone = run_pipeline(pipe, inputs)
        with pytest.raises(UnsupportedError, match="one run at a time"):
            side_by_side(pipe, [inputs, inputs])
        assert torch.equal(run_pipeline(pipe, inputs), alone)
        thread_found: list[Tensor] = []
        thread = threading.Thread(
            target=lambda: thread_found.append(run_pipeline(pipe, inputs))
        )  # one after the other is fine
        thread.start()
        thread.join()
        assert torch.equal(thread_found[0], alone)


def test_attention_called_where_its_denoiser_was_not_is_counted() -> None:
    model, inputs = tiny_models.build("wan")
    with accelplug.apply(model, NEIGHBORHOOD, gate="off") as plug:
        run_alone(model, inputs)
        assert not plug.report().fallbacks
        thread = threading.Thread(target=torch.no_grad()(model.blocks[0].attn1), args=(torch.randn(1, 72, 24),))
        thread.start()
        thread.join()
    assert any("was not called in this thread" in reason for reason in plug.report().fallbacks)


def run_alone(model: Any, inputs: Arguments) -> Tensor:
    with torch.no_grad():
        return sample_of(model(**copy.deepcopy(inputs)))


# ---------------------------------------------------------------------------------------------- another denoiser


def test_a_denoiser_that_was_replaced_is_reported_and_the_plug_still_found() -> None:
    pipe, inputs = tiny_pipelines.pipeline("wan")
    ours, stock = pipe.transformer, run_pipeline(pipe, inputs)
    accelplug.apply(pipe, NEIGHBORHOOD, gate="off")
    pipe.transformer = copy.deepcopy(ours)
    assert torch.equal(run_pipeline(pipe, inputs), stock)
    accelplug.remove(pipe)
    pipe.transformer = ours
    assert torch.equal(run_pipeline(pipe, inputs), stock)
    with pytest.raises(NoMatchError):
        accelplug.remove(pipe)


def test_a_denoiser_that_was_replaced_is_an_error_under_strict() -> None:
    pipe, inputs = tiny_pipelines.pipeline("wan")
    ours = pipe.transformer
    for strict in (False, True):
        plug = accelplug.apply(pipe, NEIGHBORHOOD, gate="off", strict=strict)
        assert not plug.report().fallbacks
        pipe.transformer = copy.deepcopy(ours)
        if strict:
            with pytest.raises(FallbackError, match="another transformer"):
                plug.report()
            with pytest.raises(FallbackError, match="another transformer"):
                plug.warmup(**inputs)
        else:
            assert any("another transformer" in reason for reason in plug.report().fallbacks)
        plug.remove()
        pipe.transformer = ours


def test_a_block_that_was_replaced_is_counted() -> None:
    model, inputs = tiny_models.build("wan")
    with accelplug.apply(model, NEIGHBORHOOD, gate="off") as plug:
        run_alone(model, inputs)
        assert not plug.report().fallbacks
        ours, model.blocks[1] = model.blocks[1], copy.deepcopy(model.blocks[1])
        run_alone(model, inputs)
        reasons = {module for module in plug.report().fallbacks if "was replaced" in module}
    assert reasons == {"blocks.1.attn1: the module was replaced since apply(); remove and apply again"}
    model.blocks[1] = ours


def test_traces_that_overlap_have_all_calls_of_their_own_time() -> None:
    model, inputs = tiny_models.build("wan")
    with accelplug.apply(model, {"patch": "tome"}, gate="off") as plug, torch.no_grad():
        first, second = plug.trace(), plug.trace(timed=True)
        early = first.__enter__()
        model(**inputs)
        late = second.__enter__()
        model(**inputs)
        first.__exit__(None, None, None)  # not the one that was opened last
        model(**inputs)
        second.__exit__(None, None, None)
        model(**inputs)
        calls = len(plug.sites)
        assert [len(early), len(late)] == [2 * calls, 2 * calls]
        assert [event.ms is None for event in early] == [True] * calls + [False] * calls
        assert plug.report().served == {"tome": 4 * calls}
