"""The bundled model and the scenes it was trained on."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from accelplug import zoo
from accelplug.errors import NoMatchError
from accelplug.zoo.shapes import (
    HELD_OUT_CAPTIONS,
    SHAPES,
    Body,
    Scene,
    Shape,
    agreement,
    detect,
    foreground,
    parse,
    render,
    sample_caption,
    sample_scene,
)
from benchmarks.zoo.evaluate import digest

SIZES = [(9, 64, 80), (7, 57, 91), (5, 48, 49), (13, 96, 64), (25, 160, 192)]  # frames, height, width


@pytest.mark.parametrize(("frames", "height", "width"), SIZES)
def test_the_detector_reads_every_rendered_clip(frames: int, height: int, width: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(12):
        scene = sample_scene(rng)
        clip = render(scene, frames, height, width)
        assert clip.shape == (frames, height, width, 3)
        assert clip.dtype == np.uint8
        assert detect(clip) == tuple(sorted(parse(scene.caption)))


def test_the_detector_is_not_fooled_by_one_wrong_word_or_a_shape_too_many() -> None:
    rng = np.random.default_rng(4)
    clip = render(sample_scene(rng, "a red square moves left, a blue circle moves up"), 9, 64, 80)
    assert agreement(clip, "a blue circle moves up, a red square moves left")
    for wrong in (
        "a red square moves left, a green circle moves up",
        "a red circle moves left, a blue circle moves up",
        "a red square moves right, a blue circle moves up",
        "a red square moves left",
    ):
        assert not agreement(clip, wrong)
    twins = render(sample_scene(rng, "a red square moves left, a red circle moves up"), 9, 64, 80)
    assert detect(twins) == (Shape("red", "circle", "up"), Shape("red", "square", "left"))


def test_nothing_is_found_on_an_empty_canvas_or_where_nothing_moves() -> None:
    assert detect(render(Scene(()), 5, 48, 64)) == ()
    still = Body(Shape("red", "square", "left"), size=0.3, travel=0.0, y=0.5, x=0.5)
    assert detect(render(Scene((still,)), 5, 48, 64)) == ()


def test_shapes_stay_inside_and_apart_on_any_canvas() -> None:
    rng = np.random.default_rng(5)
    for height, width in [(64, 80), (48, 48), (50, 120), (120, 50)]:
        scene = sample_scene(rng, "a red square moves left, a blue square moves right", size=(0.4, 0.4))
        seen = foreground(render(scene, 9, height, width)).sum(axis=(1, 2))
        assert seen == pytest.approx(np.full(9, 2 * (0.4 * min(height, 0.8 * width)) ** 2), rel=0.15)


def test_a_caption_says_what_its_scene_holds() -> None:
    for text in HELD_OUT_CAPTIONS:
        assert sample_scene(np.random.default_rng(0), text).caption == text
    for wrong in ("a red square", "a pink square moves left", "the red square moves left"):
        with pytest.raises(ValueError, match=r"caption of shapes|unknown word"):
            parse(wrong)


def test_training_never_sees_a_held_out_pair() -> None:
    held_out = {frozenset(parse(text)) for text in HELD_OUT_CAPTIONS}
    assert len(held_out) == 50
    rng = np.random.default_rng(6)
    seen = {frozenset(parse(sample_caption(rng, singles=0.1))) for _ in range(20_000)}
    assert not seen & held_out
    # Nearly every other pair comes up: it is not by luck that these do not.
    assert len({pair for pair in seen if len(pair) == 2}) > 0.99 * (48 * 36 // 2 - 50)
    assert {shape for pair in seen for shape in pair} == set(SHAPES)


def test_looking_for_the_bundled_model_loads_no_framework() -> None:
    code = "import sys, accelplug.zoo as zoo; zoo.path(); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["wan-shape", "", None, 3])
def test_a_model_that_is_not_bundled_is_told(name: int | str | None) -> None:
    with pytest.raises(NoMatchError, match="Known: wan-shapes, llava-scenes"):
        zoo.path(name)


def test_the_bundled_model_is_small_and_holds_no_pickles() -> None:
    files = [file for file in zoo.path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12_000_000
    assert {file.suffix for file in files} <= {".json", ".md", ".safetensors"}


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_bundled_model_draws_what_it_is_asked_for(pipeline: WanPipeline) -> None:
    agreeing = 0
    for seed, text in enumerate(HELD_OUT_CAPTIONS[:5]):
        generator = torch.Generator().manual_seed(seed)
        frames = pipeline(prompt=text, generator=generator, output_type="np", **zoo.SMALL).frames[0]
        assert frames.shape == (zoo.SMALL["num_frames"], zoo.SMALL["height"], zoo.SMALL["width"], 3)
        agreeing += agreement(np.rint(frames * 255).astype(np.uint8), text)
    assert agreeing >= 4


@pytest.mark.parametrize("name", ["zoo_detector", "zoo_detector_small"])
def test_the_published_figure_is_of_these_weights(pipeline: WanPipeline, name: str) -> None:
    result = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / f"{name}.json").read_text())
    assert result["sha256_of_transformer_weights"] == digest(pipeline.transformer)
    assert [clip["caption"] for clip in result["clips"]] == list(HELD_OUT_CAPTIONS)
    assert result["agreeing"] == sum(clip["agrees"] for clip in result["clips"])
    assert result["agreeing"] >= 0.8 * result["of"]


def test_the_demo_grid_differs_in_all_three_axes() -> None:
    frames, height, width = (zoo.DEMO["num_frames"] + 1) // 2, zoo.DEMO["height"] // 8, zoo.DEMO["width"] // 8
    assert len({frames, height, width}) == 3
    assert 6100 <= frames * height * width <= 6900


def test_a_deprecated_argument_of_diffusers_is_an_error_in_tests() -> None:
    with pytest.raises(FutureWarning, match="torch_dtype"):
        WanPipeline.from_pretrained(zoo.path(), torch_dtype=torch.float32)
