"""Modular pipelines: applied to, compared, calibrated, tuned and inspected like classic ones."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import accelplug
from accelplug import compat, loading
from accelplug.errors import AccelplugError, UnsupportedError
from accelplug.hosts.diffusers import DenoiserHost
from accelplug.inspection.denoiser import inspect_denoiser
from accelplug.testing.laws import batch_two_is_two_batches_of_one, snapshot_of
from accelplug.testing.models import Arguments, wan_pipeline
from accelplug.testing.runs import cancel_in_the_model, nothing_of_a_run_is_left, run_pipeline
from tests import tiny_models, tiny_modular
from tests.patch_rows import ROWS

SPARSE = ROWS["sol"].recipe({"tau": 0.5, "band": 0, "rest": "drop"})
NEUTRAL = ROWS["sol"].recipe(ROWS["sol"].neutral)
KMEANS = ROWS["sol"].recipe({"tau": 0.5, "band": 0, "order": "kmeans", "cluster_iterations": 4})
STEPS = 4


def latents(state: Any) -> Tensor:
    """What a run gives, before it is decoded where it leaves that."""
    found = state.get("latents")
    return torch.as_tensor(np.asarray(state.get("videos"))) if found is None else found


@pytest.mark.parametrize("name", tiny_modular.PIPELINES)
def test_whole_pipelines(name: str) -> None:
    """Neutral settings change nothing, sparse ones something in every step, and all is undone; also what is decoded is other."""
    pipe, given = tiny_modular.pipeline(name)
    denoiser = pipe.transformer_ref if name == "minimax_h3_references" else pipe.transformer
    before = snapshot_of(denoiser)
    stock = tiny_modular.run(pipe, given)
    with accelplug.apply(pipe, NEUTRAL, gate="off", strict="animate" not in name):
        assert torch.equal(latents(tiny_modular.run(pipe, given)), latents(stock))
    with accelplug.apply(pipe, SPARSE, gate="off", strict="animate" not in name) as plug, plug.trace() as events:
        sparse = tiny_modular.run(pipe, given)
        assert "sol" in str(plug.report())
        assert plug.report().served["sol"] > 0
    assert not torch.equal(latents(sparse), latents(stock))
    thinned = [event for event in events if event.patch == "sol"]
    assert thinned
    assert all(event.density < 1 for event in thinned)
    assert {event.clock.steps for event in events} == {STEPS}
    steps = {event.clock.step for event in thinned}
    assert steps == ({0} if name == "wan_animate_2" else set(range(STEPS)))
    branches = {event.clock.branch for event in events}
    assert branches == ({None} if "h3" in name else {"cond", "uncond"} | ({None} if "animate" in name else set()))
    after = snapshot_of(denoiser)
    assert {key: after[key] for key in after if key != "rng"} == {key: before[key] for key in before if key != "rng"}
    assert torch.equal(latents(tiny_modular.run(pipe, given)), latents(stock))


@pytest.mark.parametrize(
    "name", ["minimax_h3", "minimax_h3_first_last", "minimax_h3_references", "flux3", "krea2", "wan_animate_2"]
)
def test_two_samples_have_no_say_in_each_other(name: str) -> None:
    batch_two_is_two_batches_of_one(ROWS["sol"], tiny_models.MODELS[name])


@pytest.mark.parametrize("name", ["flux3", "krea2"])
def test_two_pictures_at_once_are_those_one_by_one(name: str) -> None:
    pipe, given = tiny_modular.pipeline(name)
    with accelplug.apply(pipe, SPARSE, gate="off", strict=True), compat.diffusers.quiet(pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        both = pipe(**given, num_images_per_prompt=2, generator=generators).get("images")
        apart = torch.cat([torch.as_tensor(tiny_modular.run(pipe, given, seed).get("images")) for seed in (0, 1)])
    torch.testing.assert_close(torch.as_tensor(both), apart, rtol=1e-3, atol=1e-4)


def test_frames_of_h3_are_at_the_step_of_the_picture_whatever_the_sound_is_at() -> None:
    """Its sound has a schedule of its own, ahead of the picture's, and conditions are nearly clean."""
    pipe, given = tiny_modular.pipeline("minimax_h3_first_last")
    with accelplug.apply(pipe, SPARSE, gate="off") as plug, plug.trace() as events:
        tiny_modular.run(pipe, given, num_inference_steps=9)
        pipe.audio_scheduler.set_shift(40.0)  # now it is behind
        tiny_modular.run(pipe, given, num_inference_steps=9)
    steps = [event.clock.step for event in events if event.site.layer == 0]
    assert steps == [*range(8), *range(8)]


@pytest.mark.parametrize("name", ["wan", "flux3"])
def test_a_cancelled_run_leaves_nothing(name: str) -> None:
    nothing_of_a_run_is_left(lambda: tiny_modular.pipeline(name), KMEANS, cancel_in_the_model, 2)


# --------------------------------------------------------------------------------------- beside classic ones, one denoiser


def classic_and_modular() -> tuple[tuple[Any, Arguments], tuple[Any, Arguments]]:
    """Two pipelines of one denoiser, VAE and scheduler settings."""
    modular, given = tiny_modular.pipeline("wan")
    classic, inputs = wan_pipeline()
    for name in ("transformer", "vae"):
        setattr(classic, name, getattr(modular, name))
    classic.scheduler = copy.deepcopy(modular.scheduler)
    left_out = {"output_type": None}.keys()
    shared = {"num_inference_steps": STEPS}
    return (classic, {**inputs, **shared}), (modular, {key: value for key, value in given.items() if key not in left_out})


def test_a_classic_and_a_modular_pipeline_give_the_same_comparison() -> None:
    found = []
    for pipe, given in classic_and_modular():
        compared = accelplug.compare(pipe, {"kmeans": KMEANS}, given, seeds=[0, 1], caches=True, progress=False)
        found.append({row.name: row for row in compared.rows})
        assert "kmeans" in str(compared)
    classic, modular = found
    assert list(classic) == list(modular)
    assert {"kmeans", "FirstBlockCache", "FirstBlockCache + kmeans"} <= set(classic)
    for name, row in classic.items():
        other = modular[name]
        assert other.density == row.density
        assert [len(sample.step_ms) for sample in other.samples] == [STEPS] * len(row.samples)
        for one, two in zip(row.samples, other.samples, strict=True):
            assert one.scores.keys() == two.scores.keys()
            for key, score in one.scores.items():
                assert math.isclose(score, two.scores[key], rel_tol=1e-3), (name, key)


def test_a_classic_and_a_modular_pipeline_are_calibrated_alike(tmp_path: Any) -> None:
    tables = []
    for kind, (pipe, given) in zip(("classic", "modular"), classic_and_modular(), strict=True):
        path = tmp_path / f"{kind}.yaml"
        accelplug.calibrate(pipe, "rest", [given], path=path, recipe=KMEANS, buckets=2, progress=False)
        tables.append(path.with_suffix(".safetensors"))
    from safetensors.torch import load_file

    one, two = (load_file(path) for path in tables)
    assert one.keys() == two.keys()
    for key, values in one.items():
        torch.testing.assert_close(two[key], values)


def test_a_modular_pipeline_is_tuned() -> None:
    _, (pipe, given) = classic_and_modular()
    tuned = accelplug.tune(pipe, given, "psnr>=1", seeds=2, time_budget_s=1.0, patches=["radial"], progress=False)
    assert tuned.why
    assert tuned.comparison.rows


@pytest.mark.parametrize("name", tiny_modular.PIPELINES)
def test_inspect_knows_the_grid_that_a_run_has(name: str) -> None:
    pipe, given = tiny_modular.pipeline(name)
    sizes: Arguments = {key: given[key] for key in ("num_frames", "height", "width") if key in given}
    told, *_ = inspect_denoiser(pipe, sizes).denoisers
    with accelplug.apply(pipe, SPARSE, gate="off") as plug:
        tiny_modular.run(pipe, given, num_inference_steps=2)
        host, *_ = plug.hosts
    assert isinstance(host, DenoiserHost)
    geometry = host.regions[0].entered.geometry
    assert told.grid == (None if name == "wan_animate_2" else geometry.grid_thw)


def test_inspect_knows_the_canvas_that_h3_makes_by_itself() -> None:
    pipe, _ = tiny_modular.pipeline("minimax_h3")
    pipe.update_components(canvas_short_edge=768, canvas_max_pixels=768 * 1344)
    (told,) = inspect_denoiser(pipe).denoisers
    assert told.grid == (37, 760 // 8, 1352 // 8)  # on a multiple of 8 pixels here, of 32 in the released model
    assert told.family == "minimax_h3"


# --------------------------------------------------------------------------------------------------------- how it is called


def test_bars_are_silenced_in_blocks_within_blocks_and_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    pipe, given = tiny_modular.pipeline("minimax_h3")
    blocks = compat.diffusers.blocks_of(pipe)
    before = [vars(block).copy() for block in blocks]
    with compat.diffusers.quiet(pipe):
        pipe(**given)
    assert "it/s" not in capfd.readouterr().err
    assert [vars(block) for block in blocks] == before


def test_an_argument_that_no_block_takes_is_refused() -> None:
    pipe, given = tiny_modular.pipeline("wan")
    with pytest.raises(AccelplugError, match="Its guider has it"):
        accelplug.compare(pipe, SPARSE, {**given, "guidance_scale": 9.0}, progress=False)
    with pytest.raises(AccelplugError, match=r"takes no argument 'num_frame' \(nearest: num_frames\)"):
        accelplug.compare(pipe, SPARSE, {**given, "num_frame": 9}, progress=False)
    with pytest.raises(AccelplugError, match="expected arguments of the call"):
        inspect_denoiser(pipe, {"frames": 9})
    with pytest.raises(AccelplugError, match="does not take these inputs"):
        accelplug.compare(pipe, SPARSE, {"height": 64}, progress=False)


def test_a_pipeline_that_decodes_nothing_is_not_compared_and_may_be_calibrated() -> None:
    pipe, given = tiny_modular.pipeline("wan")
    blocks = pipe.blocks
    blocks.sub_blocks.pop("decode")
    bare = blocks.init_pipeline()
    bare.update_components(**{name: part for name, part in pipe.components.items() if name in bare.components})
    given = {key: value for key, value in given.items() if key != "output_type"}
    with pytest.raises(UnsupportedError, match="expected videos or images"):
        accelplug.compare(bare, SPARSE, given, progress=False)
    recipe = accelplug.calibrate(bare, "rest", [given], recipe=KMEANS, buckets=1, progress=False)
    assert recipe.rules


def test_a_run_that_is_no_modular_one_has_its_own_branch_names() -> None:
    """A guider that another pipeline used last does not name them."""
    (classic, inputs), (modular, given) = classic_and_modular()
    with accelplug.apply(modular, SPARSE, gate="off") as plug, plug.trace() as events:
        tiny_modular.run(modular, given)
        inputs = {**inputs, "guidance_scale": 1.0, "output_type": "latent"}
        with compat.diffusers.quiet(classic):
            run_pipeline(classic, inputs)
    branches = [event.clock.branch for event in events if event.site.layer == 0]
    assert branches == ["cond", "uncond"] * STEPS + ["cond"] * STEPS


def test_h3_is_compared_step_by_step() -> None:
    pipe, given = tiny_modular.pipeline("minimax_h3_first_last")
    compared = accelplug.compare(pipe, {"sparse": SPARSE}, given, seeds=[0], floors=False, progress=False)
    (dense, sparse) = compared.rows
    assert [len(sample.step_ms) for row in (dense, sparse) for sample in row.samples] == [STEPS, STEPS]
    assert 0 < sparse.mean_density < 1 == dense.mean_density
    assert math.isfinite(sparse.mean("psnr_db"))


def test_the_command_line_loads_a_saved_one(tmp_path: Path) -> None:
    pipe, _ = tiny_modular.pipeline("wan")
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    loaded = loading.pipeline(tmp_path, device="cpu")
    assert type(loaded) is type(pipe)
    for name in ("transformer", "vae"):
        weights = getattr(loaded, name).state_dict()
        assert all(torch.equal(weights[key], value) for key, value in getattr(pipe, name).state_dict().items())
    for file in (tmp_path / "transformer").iterdir():
        file.unlink()
    with pytest.raises(UnsupportedError, match="it has no denoiser that can be loaded from there"):
        loading.pipeline(tmp_path, device="cpu")
