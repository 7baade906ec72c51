"""Pictures above the trained size: crops that agree, the structure of the enlarged picture, and words where they look."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import accelplug
from accelplug.call import AttentionCall, Layout
from accelplug.errors import AccelplugError, AlreadyAppliedError, NoMatchError, ShapeError, UnsupportedError
from accelplug.hosts import rebind
from accelplug.patches.guidance.screen import Screen
from accelplug.testing.models import noise
from accelplug.upscaling import Crops, Loop, low_pass
from tests import tiny_pipelines
from tests.test_examples import clip_text, sdxl_text, word_tokenizer

PROMPT = "Yes in there"
FEW: dict[str, Any] = {"num_inference_steps": 4, "strength": 0.8}


def picture(height: int, width: int) -> Image.Image:
    pixels = (noise(height, width, 3) * 50 + 128).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def sdxl() -> tuple[Any, Image.Image]:
    text, _ = tiny_pipelines.pipeline("sdxl")
    text.unet.register_to_config(sample_size=16)
    parts = {**text.components, **sdxl_text(), "vae": tiny_pipelines.decoding("sd15")[0].vae}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, picture(24, 32)


def sd15() -> tuple[Any, Image.Image]:
    """With a solver that remembers a step."""
    text, _ = tiny_pipelines.decoding("sd15")
    text.unet.register_to_config(sample_size=64)
    words = {"text_encoder": clip_text(16).eval(), "tokenizer": word_tokenizer(length=77)}
    solver = diffusers.DPMSolverMultistepScheduler()
    parts = {**text.components, **words, "scheduler": solver}
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, picture(24, 32)


def sd3() -> tuple[Any, Image.Image]:
    """Without its T5."""
    text, _ = tiny_pipelines.pipeline("sd3")
    parts = {**text.components, **sdxl_text(16), "vae": tiny_pipelines.decoding("sd15")[0].vae}
    parts["text_encoder"] = parts["text_encoder_2"]
    parts["vae"].register_to_config(shift_factor=0.06)
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe, picture(24, 32)


def flux() -> tuple[Any, Image.Image]:
    text, _ = tiny_pipelines.decoding("flux")
    t5 = hf.T5EncoderModel(hf.T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    words = {"tokenizer": word_tokenizer(), "tokenizer_2": word_tokenizer()}
    text.register_modules(text_encoder=clip_text(32), text_encoder_2=t5.eval(), **words)
    pipe = diffusers.FluxImg2ImgPipeline(**text.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe, picture(12, 16)


# ----------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    ("canvas", "overlap", "number"), [((8, 12), 0.5, 9), ((10, 9), 0.25, 6), ((6, 7), 0, 4), ((4, 6), 0.5, 1)]
)
def test_crops_cover_the_canvas_and_share_what_they_must(canvas: tuple[int, int], overlap: float, number: int) -> None:
    crops = Crops.over((4, 6), canvas, overlap)
    whole = noise(1, 3, *canvas)
    parts = crops.cut(whole)
    assert len(crops) == number
    assert parts.shape == (number, 3, 4, 6)
    torch.testing.assert_close(crops.join(parts), whole)
    for side, size in enumerate(crops.size):
        starts = sorted({corner[side] for corner in crops.corners})
        assert starts[0] == 0
        assert starts[-1] + size == canvas[side]
        assert all(a + size - b >= int(size * overlap) for a, b in pairwise(starts))
    for (top, left, bottom, right), (y, x) in zip(crops.boxes, crops.corners, strict=True):
        assert (top * canvas[0], left * canvas[1]) == pytest.approx((y, x))
        assert (bottom * canvas[0], right * canvas[1]) == pytest.approx((y + 4, x + 6))


def test_where_crops_overlap_the_nearer_middle_weighs_more() -> None:
    crops = Crops((1, 4), (1, 6), ((0, 0), (0, 2)))
    joined = crops.join(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 1, 4))
    torch.testing.assert_close(joined[0, 0, 0], torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1]))


def test_the_low_pass_keeps_what_is_slow() -> None:
    x = noise(2, 3, 9, 12)
    torch.testing.assert_close(low_pass(x, 1e4), x)
    torch.testing.assert_close(low_pass(x, 1e-3), x.mean((-2, -1), keepdim=True).expand_as(x))
    stripes = torch.tensor([1.0, -1.0]).repeat(6).expand(1, 1, 9, 12)
    torch.testing.assert_close(low_pass(stripes, 0.5), stripes * torch.tensor(-2.0).exp())


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_ends_as_the_method_says(packed: bool) -> None:
    """Held against the formulas, with a whole picture ahead, on DDIM; packed as FLUX packs."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(4)
    pipe = SimpleNamespace(scheduler=scheduler, num_timesteps=4)
    crops = Crops.over((4, 6), (8, 12), 0.5)
    clean = crops.cut(noise(1, 2, 8, 12))
    loop = Loop(crops, torch.cat([noise(1, 2, 4, 6, seed=1), clean]), 1e4, seed=3)
    generator = torch.Generator().manual_seed(3)
    noises = torch.randn(1, 2, 8, 12, generator=generator), torch.randn(1, 2, 4, 6, generator=generator)
    old = noise(10, 2, 4, 6, seed=2)
    pack = diffusers.FluxPipeline._pack_latents
    given = {"latents": pack(old, 10, 2, 4, 6) if packed else old}
    for step, weight in enumerate((1.0, 0.75**3, 0.25**3, 0.0)):
        found = loop(pipe, step, scheduler.timesteps[step], given)["latents"]
        structure, ahead = noise(1, 2, 8, 12), noise(1, 2, 4, 6, seed=1)
        if step < 3:
            after = scheduler.timesteps[step + 1 : step + 2]
            structure = scheduler.add_noise(structure, noises[0], after)
            ahead = scheduler.add_noise(ahead, noises[1], after)
        own = crops.join(old[1:])
        expected = torch.cat([ahead, crops.cut(own + weight * (structure - own))])
        torch.testing.assert_close(found, pack(expected, 10, 2, 4, 6) if packed else expected, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("make", [sd15, sdxl, sd3, flux])
def test_a_picture_is_drawn_larger_and_nothing_is_left(make: Any) -> None:
    pipe, small = make()
    more: dict[str, Any] = {"max_sequence_length": 16} if make is flux else {"negative_prompt": "locker"}
    state = torch.get_rng_state()
    plain = accelplug.upscale(pipe, small, PROMPT, 1.5, **FEW, **more)
    own = set(vars(pipe))  # with what the pipeline's own call leaves
    before = {name: dict(vars(part)) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert plain.size == (small.width * 3 // 2, small.height * 3 // 2)
    assert accelplug.upscale(pipe, small, PROMPT, 1.5, **FEW, **more) == plain
    assert accelplug.upscale(pipe, small, PROMPT, 1.5, seed=1, **FEW, **more) != plain
    seen: list[Image.Image] = []

    def describe(part: Image.Image) -> str:
        seen.append(part)
        return f"w{len(seen)}"

    told = accelplug.upscale(pipe, small, PROMPT, 1.5, regional=describe, **FEW, **more)
    assert told != plain
    if make in (sd15, sdxl):
        assert accelplug.upscale(pipe, small, PROMPT, 1.5, screen=1.0, regional=["w1"] * 4, **FEW, **more) != told
    assert [part.size for part in seen] == [small.size] * 4
    words = [f"w{n + 1}" for n in range(4)]
    assert accelplug.upscale(pipe, small, PROMPT, 1.5, regional=words, **FEW, **more) == told
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(pipe)) == own
    for name, was in before.items():
        assert dict(vars(getattr(pipe, name))) == was, name
    assert accelplug.upscale(pipe, small, PROMPT, 1.5, **FEW, **more) == plain


def test_the_prior_has_its_say_in_a_whole_run() -> None:
    pipe, small = flux()
    more = {**FEW, "max_sequence_length": 16}
    drawn = [np.asarray(accelplug.upscale(pipe, small, PROMPT, 1.5, cutoff=x, **more), float) for x in (1e-3, 1e4)]
    assert not (drawn[0] == drawn[1]).all()


def test_words_are_left_out_where_they_do_not_look() -> None:
    pipe, small = sdxl()
    rows: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    plain = accelplug.upscale(pipe, small, PROMPT, 1.5, **FEW)
    none = accelplug.upscale(pipe, small, PROMPT, 1.5, screen=1e-6, **FEW)
    assert abs(np.asarray(none, int) - np.asarray(plain, int)).max() <= 1, "no word looks that little anywhere"
    assert accelplug.upscale(pipe, small, PROMPT, 1.5, screen=1.0, **FEW) != plain
    assert accelplug.upscale(pipe, small, PROMPT, 1.5, screen=1.0, regional=["w1"] * 4, **FEW) != plain
    assert rows == [8] * 3 + [10] * 9, "two branches of four crops, and the whole picture"
    handle.remove()


# --------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("masked", [False, True])
def test_a_crop_reads_the_words_that_look_there_in_the_whole_picture(masked: bool) -> None:
    boxes = [(0, 0, 0.5, 1), (0.25, 0.3, 1, 0.8)]
    layout = Layout((1, 3, 5), text_after=9, crossed=True, texts=(6, 3))
    q, k, v = (noise(6, 2, n, 8, seed=seed) for seed, n in enumerate((15, 9, 9)))
    valid = torch.ones(6, 9, dtype=torch.bool)
    valid[3:, 4] = not masked
    mask = valid if masked else None
    call = AttentionCall(q * 3, k, v, mask, 8**-0.5, rebind.dense_sdpa(q * 3, k, v, attn_mask=None))
    patch = Screen({"boxes": boxes, "least": 0.9})
    params = patch.prepare(None, layout, None, {})
    reads = patch.reads(call, params)
    scores = (call.q.double() @ k.double().mT * 8**-0.5).masked_fill(~valid[:, None, None], -torch.inf)
    looks = scores.softmax(-1).mean(1)
    for row in range(6):
        for word in range(9):
            expected = True
            if word < 6 and row % 3:
                top, left, bottom, right = boxes[row % 3 - 1]
                share = torch.zeros(3, 5, dtype=torch.double)
                for y in range(3):
                    for x in range(5):
                        down = max(min(bottom, (y + 1) / 3) - max(top, y / 3), 0)
                        share[y, x] = down * max(min(right, (x + 1) / 5) - max(left, x / 5), 0)
                there = looks[row // 3 * 3, :, word]
                expected = bool((share.flatten() / share.sum() * there).sum() >= 0.9 * there.mean())
            assert reads[row, word] == expected, (row, word)
    assert not reads.all()
    kept = (reads & valid)[:, None, None]
    torch.testing.assert_close(
        patch.attend(call, params), torch.nn.functional.scaled_dot_product_attention(call.q, k, v, kept)
    )
    with pytest.raises(ShapeError, match="a whole picture and 2 crops, got one of 4"):
        patch.reads(AttentionCall(q[:4], k[:4], v[:4], None, 1.0, call.dense), params)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scale": 1.0}, "scale must be above 1, got 1.0"),
        ({"overlap": 1.0}, "overlap must be from 0 to below 1"),
        ({"strength": 0.0}, "strength must be above 0"),
        ({"cutoff": float("nan")}, "cutoff must be above 0"),
        ({"screen": 2.0}, "least: input should be less than or equal to 1"),
        ({"generator": None}, "gives the pipeline its generator itself"),
        ({"prompt_three": "w1"}, "neither it nor the pipeline takes prompt_three"),
        ({"seed": "1"}, "seed must be a whole number"),
        ({"regional": ["w1"]}, "a regional prompt for each of 9 crops, got 1"),
        ({"regional": ["w1 | w2"] * 9}, "without '|'"),
        ({"num_inference_steps": 1, "strength": 1.0}, "2 steps or more, got 1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(given: dict[str, Any], words: str) -> None:
    pipe, small = sdxl()
    with pytest.raises(AccelplugError, match=words.replace("|", r"\|")):
        accelplug.upscale(pipe, small, PROMPT, **{"num_inference_steps": 4, **given})


def test_models_that_cannot_are_refused() -> None:
    pipe, small = sdxl()
    with pytest.raises(AccelplugError, match="multiples of 4 pixels, got one of 26"):
        accelplug.upscale(pipe, picture(26, 32), PROMPT)
    with pytest.raises(UnsupportedError, match="StableDiffusionXLPipeline takes no image"):
        accelplug.upscale(tiny_pipelines.pipeline("sdxl")[0], small, PROMPT)
    with accelplug.apply(pipe, {"rules": [{"patch": "tome"}]}, gate="off"), pytest.raises(AlreadyAppliedError):
        accelplug.upscale(pipe, small, PROMPT, screen=0.5)
    pipe.scheduler = diffusers.HeunDiscreteScheduler()
    with pytest.raises(UnsupportedError, match="HeunDiscreteScheduler repeats timesteps"):
        accelplug.upscale(pipe, small, PROMPT, **FEW)
    joint, small = flux()
    with pytest.raises(NoMatchError):
        accelplug.upscale(joint, small, PROMPT, screen=0.5, **FEW)
