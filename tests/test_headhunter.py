"""Guidance by heads: one forward more a step, which perturbs what is asked alone, and a shift that stands behind every other guidance."""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import accelplug
from accelplug.calibration import hunting
from accelplug.call import AttentionCall, Clock, Layout, Share, Site
from accelplug.errors import AccelplugError, FallbackError, NoMatchError, RecipeError, UnsupportedError
from accelplug.families import FAMILIES, require_family
from accelplug.hosts.guiding import _some_rows
from accelplug.hosts.models import denoisers
from accelplug.inspection import HeadsInspection
from accelplug.inspection.heads import heads_of
from accelplug.patches.base import Patch
from accelplug.patches.guidance.headhunter import HeadHunter, Params
from accelplug.testing.encoders import ENCODERS_TRIED
from accelplug.testing.laws import run_once
from accelplug.testing.models import batch_of_two, build_denoiser, sample_of
from accelplug.testing.runs import run_pipeline, two_samples
from accelplug.zoo.shapes import render, sample_scene
from tests import tiny_language_models, tiny_models, tiny_modular, tiny_pipelines

HEADS = [[0, 1], [1, 0]]
SCALE = 2.0


def recipe(**more: Any) -> dict[str, Any]:
    return {"rules": [{"patch": "headhunter", "with": {"heads": HEADS, "u": 0.7, "scale": SCALE, **more}}]}


class Perturbed(Patch):
    """The perturbed model itself, by explicit maps in float64."""

    family, speed = "sparse", False

    def __init__(self, u: float) -> None:
        super().__init__()
        self.u = u

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> list[int] | None:
        return [head for layer, head in HEADS if layer == site.layer] or None

    def attend(self, call: AttentionCall, params: list[int]) -> Tensor:
        q, k, v = (x.double() for x in (call.q, call.k, call.v))
        logits = call.scale * q @ k.mT
        if call.mask is not None:
            logits = logits.masked_fill(~call.mask[:, None, None], -torch.inf)
        maps = logits.softmax(-1)
        for head in params:
            maps[:, head] = (1 - self.u) * maps[:, head] + self.u * torch.eye(maps.shape[-1], dtype=maps.dtype)
        return (maps @ v).to(call.v.dtype)


@pytest.mark.parametrize("name", ["wan", "flux", "sd3", "hunyuan_video", "unet_sd15"])
def test_predictions_are_led_away_from_those_of_maps_drawn_to_identity(name: str) -> None:
    model, inputs = tiny_models.build(name)
    stock = run_once(model, inputs)
    with accelplug.apply(model, Perturbed(0.7), gate="off"):
        worse = run_once(model, inputs)
    with accelplug.apply(model, recipe(), gate="off", strict=True) as plug:
        guided = run_once(model, inputs)
        assert "1 further forwards" in str(plug.report())
        assert "beside 1; 2.00x as much" in str(plug.report())
    torch.testing.assert_close(guided, stock + SCALE * (stock - worse), rtol=1e-4, atol=1e-4)


def test_rows_of_text_are_drawn_too_or_left_alone() -> None:
    call_v, out = torch.randn(1, 3, 10, 4), torch.randn(1, 3, 10, 4)
    call = AttentionCall(out, out, call_v, None, 0.5, lambda: out)
    site = Site("a", "transformer", "joint", 2, 4)
    for rows, drawn in (("all", slice(0, 10)), ("image", slice(3, 9))):
        patch = HeadHunter({"heads": [[2, 1], [3, 0], [4, 6]], "u": 0.25, "rows": rows})  # layers of unequally many heads
        params = patch.prepare(site, Layout((1, 2, 3), 3, 1), Clock(), {})
        assert params is not None
        expected = out.clone()
        expected[:, 1, drawn] = 0.75 * out[:, 1, drawn] + 0.25 * call_v[:, 1, drawn]
        torch.testing.assert_close(patch.attend(call, params), expected)


def test_heads_shared_out_over_ranks_are_refused() -> None:
    site = Site("a", "transformer", "joint", 0, 4, heads=Share(1, 2))
    with pytest.raises(UnsupportedError, match="over 2 ranks"):
        HeadHunter({"heads": [[0, 1]]}).prepare(site, Layout((1, 2, 3)), Clock(), {})


def test_heads_that_share_values_are_drawn_to_those() -> None:
    out, v = torch.randn(1, 4, 5, 3), torch.randn(1, 2, 5, 3)
    call = AttentionCall(out, v, v, None, 0.5, lambda: out)
    found = HeadHunter({"heads": "all"}).attend(call, Params(None, 0, 5))
    torch.testing.assert_close(found, v.repeat_interleave(2, 1))


# ------------------------------------------------------------------------------------------------- around other guidance


def forwards(pipe: Any, inputs: dict[str, Any], run: Any, rule: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], Any]:
    """All predictions of a run, further ones among them, as the model makes them and as they leave it; and the report."""
    made: list[Tensor] = []
    left: list[Tensor] = []

    def keep(kept: list[Tensor]) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            kept.append(torch.stack(output[0]) if isinstance(output[0], list) else output[0].clone())

        return hook

    parts = denoisers(pipe).values()
    hooks = [part.register_forward_hook(keep(made)) for part in parts]
    with accelplug.apply(pipe, rule, gate="off", strict=True) as plug:
        hooks += [part.register_forward_hook(keep(left)) for part in parts]
        run(pipe, inputs)
        report = plug.report()
    for hook in hooks:
        hook.remove()
    return made, left, report


# pipeline: how many predictions a step has in one forward, and in how many forwards; which half of a batch is conditional
WAYS: dict[str, tuple[int, int, slice]] = {
    "wan": (1, 2, slice(None)),  # in contexts
    "wan22_moe": (1, 2, slice(None)),  # by two denoisers
    "wan_video2video": (1, 2, slice(None)),  # without names
    "hunyuan_video_15": (1, 2, slice(None)),  # by a guider
    "flux": (1, 1, slice(None)),  # guidance is embedded
    "sd15": (2, 1, slice(1, None)),
    "sd3": (2, 1, slice(1, None)),
    "cogvideox": (2, 1, slice(1, None)),
    "z_image": (2, 1, slice(0, 1)),
}


@pytest.mark.parametrize(("name", "samples"), [*product(WAYS, [1]), ("wan22_moe", 2), ("sd15", 2), ("flux", 2)])
def test_every_prediction_of_a_step_gains_the_same(name: str, samples: int) -> None:
    rows, apart, conditional = WAYS[name]
    if rows == 2:
        conditional = slice(conditional.start * samples, None if conditional.stop is None else conditional.stop * samples)
    pipe, inputs = tiny_pipelines.pipeline(name)
    raw, got, report = forwards(pipe, two_samples(inputs) if samples == 2 else inputs, run_pipeline, recipe())
    assert report.served["headhunter"]
    parts = len(denoisers(pipe))
    assert len(report.guided) == parts
    assert all(f"beside {len(raw) * apart // (apart + 1) // parts}; " in said for said in report.guided)
    assert all(f"{1 + 1 / (rows * apart):.2f}x as much" in said for said in report.guided)
    for step in range(0, len(raw), apart + 1):
        # Behind the hooks of the pipeline's forward the further one comes first.
        stock, worse, *others = raw[step : step + apart + 1]
        good = stock[conditional] if rows == 2 else stock
        shift = SCALE * (good - worse)
        further, first, *rest = got[step : step + apart + 1]
        torch.testing.assert_close(further, worse, rtol=0, atol=0)
        torch.testing.assert_close(first, stock + torch.cat([shift] * rows), rtol=1e-4, atol=1e-5)
        for other, shifted in zip(others, rest, strict=True):
            torch.testing.assert_close(shifted, other + shift, rtol=1e-4, atol=1e-5)


def test_what_a_pipeline_predicts_of_other_rows_at_the_same_step_gains_the_same() -> None:
    """SD3's own skip-layer guidance, of the conditional half alone."""
    pipe, inputs = tiny_pipelines.pipeline("sd3")
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.3}
    raw, got, report = forwards(pipe, {**inputs, **skip}, run_pipeline, recipe())
    assert "4 further forwards of transformer beside 5" in report.guided[0]
    skipped = next(place for place in range(2, len(raw)) if len(raw[place - 1]) == len(raw[place]) == 1)
    both, worse, other = raw[skipped - 2 : skipped + 1]
    torch.testing.assert_close(got[skipped], other + SCALE * (both[1:] - worse), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["unet_svd", "unet_sd15"])
def test_a_batch_of_both_branches_is_known_by_what_is_predicted_and_one_of_three_is_left_alone(name: str) -> None:
    """SVD's unconditional half has another picture beside the same latents."""
    model, inputs = tiny_models.build(name)
    both, _ = batch_of_two(inputs)
    if name == "unet_svd":
        latents = both["sample"]
        latents[1], latents[1, :, 4:] = latents[0], 1.5
        with accelplug.apply(model, recipe(), gate="off", strict=True) as plug:
            run_once(model, both)
            assert "1.50x as much" in str(plug.report())
    else:
        three = {key: torch.cat([x] * 3) if isinstance(x, Tensor) and x.ndim > 1 else x for key, x in inputs.items()}
        stock = run_once(model, three)
        with accelplug.apply(model, recipe(), gate="off") as plug:
            assert torch.equal(run_once(model, three), stock)
            assert "three parts of a batch" in str(plug.report())


GUIDERS = {
    "cfg": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=5.0),
    "zero": lambda: diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=1),
    "projected": lambda: diffusers.AdaptiveProjectedGuidance(guidance_scale=5.0),
    "skip_layer": lambda: diffusers.SkipLayerGuidance(
        guidance_scale=5.0,
        skip_layer_config=diffusers.LayerSkipConfig(indices=[1], fqn="blocks"),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    ),
}


@pytest.mark.parametrize(("name", "model"), [*product(GUIDERS, ["wan"]), ("cfg", "wan_22")])
def test_beside_guiders_of_modular_pipelines(name: str, model: str) -> None:
    """What the guider makes of shifted predictions is what it made of them, shifted: exactly where it has fixed weights."""
    pipe, given = tiny_modular.pipeline(model)
    numbers = ("", "_2")[: len(denoisers(pipe))]
    guiders = [GUIDERS[name]() for _ in numbers]
    pipe.update_components(**{f"guider{number}": guider for number, guider in zip(numbers, guiders, strict=True)})
    made: list[tuple[dict[str, Tensor], Tensor]] = []
    forward = type(guiders[0]).forward

    def heard(guider: Any, **predicted: Tensor) -> Any:
        out = forward(guider, **predicted)
        made.append((predicted, out.pred))
        return out

    for guider in guiders:
        guider.forward = partial(heard, guider)
    raw, _, report = forwards(pipe, given, tiny_modular.run, recipe())
    assert report.served["headhunter"]
    assert len(made) == 4
    branches = [len(predicted) for predicted, _ in made]
    assert branches == [2, 3, 3, 3] if name == "skip_layer" else [2, 2, 2, 2]
    place = 0
    for step, (predicted, pred) in enumerate(made):
        own = [raw[place], *raw[place + 2 : place + 1 + len(predicted)]]
        shift = SCALE * (raw[place] - raw[place + 1])
        place += 1 + len(predicted)
        for stock, shifted in zip(own, predicted.values(), strict=True):
            torch.testing.assert_close(shifted, stock + shift, rtol=1e-4, atol=1e-5)
        if name in ("cfg", "skip_layer"):
            guiders[0].set_state(step, len(made), None)
            unshifted = forward(guiders[0], **dict(zip(predicted, own, strict=True))).pred
            torch.testing.assert_close(pred, unshifted + shift, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(pred).all()


def test_a_batch_of_both_branches_is_perturbed_by_its_conditional_half_on_every_model_that_says_its_rows() -> None:
    for name in ("sd3", "unet_sdxl", "cogvideox", "pixart", "ltx", "mochi", "hunyuan_video", "latte"):
        model, inputs = tiny_models.build(name)
        both, _ = batch_of_two(inputs)
        half = _some_rows(both, slice(1, None), 2, listed=False)
        assert half is not None, name
        with torch.no_grad():
            torch.testing.assert_close(sample_of(model(**half)), sample_of(model(**both))[1:], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- where it begins

CHAINED = (
    *("wan", "wan_vace", "skyreels", "sd3", "flux", "flux2", "chroma", "qwen_image", "hunyuan_video", "hunyuan_video_15"),
    *("hunyuan_image", "ltx", "cogvideox", "consisid", "mochi", "auraflow"),
)


def test_a_further_forward_begins_at_the_first_perturbed_block_and_predicts_the_same() -> None:
    """Bitwise that of a whole one, which runs where somebody looks into the blocks ahead."""
    tried = set()
    for name in CHAINED:
        model, inputs = tiny_models.build(name)
        family = require_family(model)
        tried.add(family.name)
        blocks = [block for chain in family.chain for block in getattr(model, chain)]
        last = {"heads": [[len(blocks) - 1, 0]]}
        found = []
        for looked_into in (True, False):
            handle = blocks[0].register_forward_hook(lambda *_: None) if looked_into else None
            with accelplug.apply(model, recipe(**last), gate="off", strict=True) as plug:
                found.append(run_once(model, inputs))
                said = str(plug.report())
                again = run_once(model, inputs)
            assert (f"block {len(blocks) - 1} of {len(blocks)}" in said) is not looked_into, name
            assert torch.equal(again, found[-1]), name
            if handle is not None:
                handle.remove()
        assert torch.equal(*found), name
        assert not any(block._forward_hooks for block in blocks), name
    assert tried == {family.name for family in FAMILIES if family.chained}


@pytest.mark.parametrize("name", ["wan22_moe", "sd3", "flux"])
def test_whole_runs_begin_there_too(name: str) -> None:
    """Of a batch with both branches, half of what was kept is taken; what is added between blocks is added in both forwards."""
    pipe, inputs = tiny_pipelines.pipeline(name)
    if name == "flux":
        residuals = [torch.randn(1, 48, 32, generator=torch.Generator().manual_seed(1))]
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, given: (args, {**given, "controlnet_block_samples": residuals}), with_kwargs=True
        )
    block = next(iter(denoisers(pipe).values())).get_submodule(
        f"{'blocks' if name == 'wan22_moe' else 'transformer_blocks'}.0"
    )
    found = []
    for looked_into in (True, False):
        handle = block.register_forward_hook(lambda *_: None) if looked_into else None
        with accelplug.apply(pipe, recipe(heads=[[1, 0]]), gate="off", strict=True) as plug:
            found.append(run_pipeline(pipe, inputs))
            assert ("from block 1" in plug.report().guided[0]) is not looked_into
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- beside all else


def test_beside_a_sparse_patch_and_a_step_cache() -> None:
    """Both forwards have the patch; the cache keeps the further one for itself, and the run without it is the same again."""
    pipe, inputs = tiny_pipelines.pipeline("wan")
    stock = run_pipeline(pipe, inputs)
    sparse = {"patch": "sol", "with": {"tau": 0.5, "band": 0, "block": 8, "backend": "reference"}, "where": {"layers": "1:"}}
    rules = {**recipe(), "cache": {"kind": "first_block", "with": {"threshold": 0.0}}}
    rules["rules"] = [sparse, *rules["rules"]]
    without = {"rules": rules["rules"]}
    found = []
    for wanted in (without, rules):
        with accelplug.apply(pipe, wanted, gate="off", strict=True) as plug, plug.trace() as events:
            found.append(run_pipeline(pipe, inputs))
        assert {event.clock.branch for event in events if event.patch == "headhunter"} == {"perturbed"}
        assert {event.clock.branch for event in events if event.patch == "sol"} == {"cond", "uncond", "perturbed"}
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    assert torch.equal(run_pipeline(pipe, inputs), stock)


def test_steps_without_guidance_have_no_further_forward() -> None:
    pipe, inputs = tiny_pipelines.pipeline("wan")
    early = recipe()
    early["rules"][0]["where"] = {"steps": "0:50%"}
    with accelplug.apply(pipe, early, gate="off", strict=True) as plug, plug.trace() as events:
        run_pipeline(pipe, inputs)
        assert "2 further forwards of transformer beside 8; 1.25x as much" in str(plug.report())
        assert {row.name for row in plug.where()} == {"dense"}
    assert {event.clock.step for event in events if event.patch == "headhunter"} == {0, 1}
    with accelplug.apply(
        pipe, {"rules": [{"patch": "dense", "where": {"steps": "50%:"}}, *recipe()["rules"]]}, gate="off"
    ) as plug:
        run_pipeline(pipe, inputs)
        assert "2 further forwards" in str(plug.report())
        assert not plug.report().idle


def test_compiled_blocks_are_guided_and_a_compiled_model_is_refused() -> None:
    model, inputs = tiny_models.build("wan")
    stock = run_once(model, inputs)
    with accelplug.apply(model, recipe(), gate="off"):
        guided = run_once(model, inputs)
        for block in model.blocks:
            block.compile(backend="eager")
        torch.testing.assert_close(run_once(model, inputs), guided, rtol=1e-4, atol=1e-5)
    assert torch.equal(run_once(model, inputs), stock)
    whole, inputs = tiny_models.build("wan")
    with accelplug.apply(whole, recipe(), gate="off"), pytest.raises(Exception, match="Compile its blocks instead"):
        torch.compile(whole, backend="eager")(**inputs)
    torch.compiler.reset()


def test_a_batch_of_the_same_latents_without_guidance_is_left_alone() -> None:
    """Two prompts from the same noise look like both branches of one."""
    pipe, inputs = tiny_pipelines.pipeline("sd15")
    two = {key: torch.cat([x, x.flip(-1)]) if isinstance(x, Tensor) else x for key, x in inputs.items()}
    latents = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    with accelplug.apply(pipe, recipe(), gate="off") as plug:
        run_pipeline(pipe, {**two, "latents": latents, "guidance_scale": 1.0, "num_inference_steps": 1})
        assert "says that it has no classifier-free guidance" in str(plug.report())


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"heads": [[9, 0]]}, RecipeError, r"\[9, 0\] is not in the model: it has layers 0 to 2"),
        ({"heads": [[1, 5]]}, RecipeError, r"its layer 1 has 2 heads"),
        ({"heads": []}, RecipeError, "heads"),
        ({"u": 1.5}, RecipeError, "u"),
    ],
)
def test_heads_that_are_not_there_are_refused_ahead_of_any_run(settings: Any, error: type[Exception], match: str) -> None:
    model, _ = tiny_models.build("wan")
    with pytest.raises(error, match=match):
        accelplug.apply(model, recipe(**settings), gate="off")


def test_what_cannot_be_guided_says_so() -> None:
    pipe, inputs = tiny_pipelines.pipeline("wan")
    two = [
        {"patch": "headhunter", "where": {"layers": layer}, "with": {"heads": "all", "scale": layer + 1}} for layer in (0, 1)
    ]
    with accelplug.apply(pipe, {"rules": two}, gate="off"), pytest.raises(RecipeError, match=r"one scale, got 1\.0, 2\.0"):
        run_pipeline(pipe, inputs)
    model, given = tiny_models.build("wan")
    with accelplug.apply(model, recipe(), gate="off", strict=True) as plug:
        plug.step(1, 4)
        with model.cache_context("uncond"):
            run_once(model, given)
        with model.cache_context("cond"), pytest.raises(FallbackError, match="before the cond"):
            run_once(model, given)
    type(pipe).do_perturbed_attention_guidance = True
    try:
        with accelplug.apply(pipe, recipe(), gate="off"), pytest.raises(UnsupportedError, match="pag_scale=0"):
            run_pipeline(pipe, inputs)
    finally:
        del type(pipe).do_perturbed_attention_guidance
    encoder, _ = build_denoiser(ENCODERS_TRIED["dinov2"])
    with pytest.raises(UnsupportedError, match="family guidance"):
        accelplug.apply(encoder, recipe(), gate="off")


# ------------------------------------------------------------------------------------------------------------ the hunt


def brightness_of_the_left(frames: np.ndarray, prompt: str) -> float:
    return float(frames[:, :, : frames.shape[2] // 2].mean())


def hunted(path: Path | None, objective: Any = brightness_of_the_left, **more: Any) -> Any:
    pipe, inputs = tiny_pipelines.decoding("wan")
    inputs = {key: value for key, value in inputs.items() if key != "output_type"}
    given = {"config": {"scale": 3.0}, "options": {"add": 2}, "progress": False, **more}
    return accelplug.calibrate(pipe, "headhunter", [inputs, inputs], objective=objective, path=path, **given)


def test_a_hunt_finds_heads_that_raise_the_objective_and_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    found = hunted(tmp_path / "whole.yaml", options={"add": 1, "rounds": 2})
    (rule,) = found.rules
    assert rule.patch == "headhunter"
    assert 1 <= len(rule.settings["heads"]) <= 2
    assert {path.name for path in tmp_path.iterdir()} == {"whole.yaml", "whole.safetensors"}
    assert "hunted for on 2 pictures" in found.summary
    calls = []

    def cut(frames: np.ndarray, prompt: str) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return brightness_of_the_left(frames, prompt)

    cut.__module__, cut.__qualname__ = brightness_of_the_left.__module__, brightness_of_the_left.__qualname__
    with pytest.raises(KeyboardInterrupt):
        hunted(tmp_path / "cut.yaml", cut, options={"add": 1, "rounds": 2})
    held = json.loads((tmp_path / "cut.partial.json").read_text())
    assert sum(map(len, held["scores"].values())) == 3
    with pytest.raises(AccelplugError, match="another objective, prompts, knobs"):
        hunted(tmp_path / "cut.yaml", seed=1)
    again = hunted(tmp_path / "cut.yaml", options={"add": 1, "rounds": 2})
    assert again.rules == found.rules
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_hunt_takes_objectives_by_name_and_refuses_others() -> None:
    assert hunting.objective_of("sharpness")(np.zeros((1, 4, 4, 3), np.float32), "") == 0
    assert hunting.objective_of("accelplug.calibration.hunting:sharpness") is hunting.sharpness
    for wrong in ("sharp", "accelplug.nothing:f", "accelplug:nothing", None, 3):
        with pytest.raises(AccelplugError, match="objective"):
            hunting.objective_of(wrong)
    with pytest.raises(NoMatchError, match="None of 4 heads raises"):
        hunted(None, lambda frames, prompt: 0.0)
    with pytest.raises(AccelplugError, match="finite number"):
        hunted(None, lambda frames, prompt: float("nan"))


def test_agreement_is_the_share_of_a_caption_that_is_there() -> None:
    text = "a red square moves left, a blue circle moves up"
    clip = render(sample_scene(np.random.default_rng(0), text), 9, 64, 80).astype(np.float32) / 255
    assert hunting.shown_share(clip, text) == 1
    assert hunting.shown_share(clip, "a red square moves left, a green circle moves up") == pytest.approx(1 / 3)
    assert hunting.shown_share(np.zeros_like(clip), text) == 0


# ------------------------------------------------------------------------------------------------------------- the page


def test_heads_of_denoisers_that_take_turns_are_tried_in_both() -> None:
    pipe, _ = tiny_pipelines.pipeline("wan22_moe")
    assert heads_of(pipe) == {0: 2, 1: 2}
    pipe.register_modules(transformer_2=tiny_models.build("wan")[0])
    with pytest.raises(UnsupportedError, match="whose heads are not the same"):
        heads_of(pipe)


def test_inspect_makes_a_picture_guided_away_from_each_head(tmp_path: Path) -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    given = {key: value for key, value in inputs.items() if key != "output_type"}
    found = accelplug.inspect(pipe, given, heads={"scale": 2.0, "u": 0.5, "layers": [1]})
    assert isinstance(found, HeadsInspection)
    assert found.heads == ((1, 0), (1, 1))
    assert (found.moved > 0).all()
    assert len(found.pictures) == 2
    assert all(picture.shape == found.picture.shape for picture in found.pictures)
    assert found.page().count("<figure>") == 3
    assert "layer 1, head 1" in found.page()
    assert found.to_png(tmp_path / "heads.png").stat().st_size > 0
    assert not pipe.transformer._forward_hooks
    for wrong, match in (({"layers": [7]}, "none of"), ({"u": 3}, "u")):
        with pytest.raises(AccelplugError, match=match):
            accelplug.inspect(pipe, given, heads=wrong)
    for model in (pipe.transformer, tiny_language_models.build("llama")):
        with pytest.raises(UnsupportedError, match="whole pipeline"):
            accelplug.inspect(model, given, heads={})
