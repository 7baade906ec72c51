"""Whole pipelines of image models: neutral settings are exact, sparse ones answer the grid, and removal gives the model back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import PIL.Image
import pytest
import torch
from torch import Tensor

import accelplug
from accelplug.call import Layout
from accelplug.testing.models import Built, build_denoiser, noise, valid_first
from accelplug.testing.runs import run_pipeline
from tests import tiny_models, tiny_pipelines

EIGHT = {"block": 8, "backend": "reference"}
NEUTRAL = {"rules": [{"patch": "sol", "with": {**EIGHT, "tau": "dense"}}]}
SPARSE = {"rules": [{"patch": "sol", "with": {**EIGHT, "tau": 0.5, "band": 0}}]}


def check(pipe: Any, run: Callable[[], Tensor], *parts: str) -> None:
    """Run a pipeline without a patch, with one that reads everything, with one that does not, and without one again."""
    dense = run()
    with accelplug.apply(pipe, NEUTRAL, gate="off", strict=True):
        assert torch.equal(run(), dense)
    with accelplug.apply(pipe, SPARSE, gate="off", strict=True) as plug, plug.trace() as events:
        sparse = run()
    assert torch.isfinite(sparse).all()
    assert not torch.equal(sparse, dense)
    assert {event.patch for event in events} == {"sol"}, {event.reason for event in events}
    assert max(event.density for event in events) < 1
    assert {event.clock.step for event in events} == set(range(4))
    assert {event.site.denoiser for event in events} == set(parts or ("transformer",))
    assert torch.equal(run(), dense)


@pytest.mark.parametrize("name", ["qwen_image_21", "hunyuan_image", "auraflow", "cogview4", "lumina2"])
def test_classic_pipelines(name: str) -> None:
    pipe, inputs = tiny_pipelines.pipeline(name)
    check(pipe, lambda: run_pipeline(pipe, inputs))


def modular(blocks: Any, **parts: Any) -> Any:
    """A modular pipeline of some blocks."""
    pipe = blocks.init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(**parts, scheduler=tiny_pipelines.euler())
    return pipe


def run_modular(pipe: Any, inputs: dict[str, Any]) -> Tensor:
    return pipe(**inputs, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output="latents")


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_qwen_image_21_by_modular_blocks(edit: bool, cache: bool) -> None:
    """References stand among the text: their keys are exact, and what they read too."""
    from diffusers.modular_pipelines.qwenimage21 import modular_blocks_qwenimage21 as blocks

    transformer, _ = tiny_models.build("qwen_image_21")
    kind = blocks.QwenImage21ImageConditionedCoreDenoiseStep if edit else blocks.QwenImage21CoreDenoiseStep
    pipe = modular(kind(), transformer=transformer)
    slots = [False] * 3 + [True] * 6 * edit + [False] * 4
    inputs = {
        "prompt_embeds": noise(1, len(slots), 16),
        "prompt_embeds_mask": valid_first(len(slots), len(slots) - 2).bool(),
        "image_pad_mask": torch.tensor([slots]),
        "height": 96,
        "width": 128,
        "use_kv_cache": cache,
        **({"image_latents": [noise(1, 4, 1, 4, 6)]} if edit else {}),
    }
    check(pipe, lambda: run_modular(pipe, inputs))


def test_ideogram_by_modular_blocks() -> None:
    """One model reads the prompt, the other none."""
    from diffusers.modular_pipelines.ideogram4.modular_blocks_ideogram4 import Ideogram4CoreDenoiseStep

    with_prompt, without = (tiny_models.build("ideogram4", seed)[0] for seed in (0, 1))
    pipe = modular(Ideogram4CoreDenoiseStep(), transformer=with_prompt, unconditional_transformer=without)
    inputs = {
        "text_features": noise(1, 7, 16),
        "text_lengths": [5],
        "height": 96,
        "width": 128,
        "guidance_schedule": [7.0, 7.0, 7.0, 3.0],
    }
    check(pipe, lambda: run_modular(pipe, inputs), "transformer", "unconditional_transformer")


class Pictures(tiny_pipelines.NoVae):
    """Takes pictures for latents."""

    config = SimpleNamespace(z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    temperal_downsample = (False, True, True)

    def encode(self, image: Tensor) -> Any:
        return SimpleNamespace(latents=image[:, [0, 1, 2, 0], :, ::8, ::8])

    def decode(self, latents: Tensor, **_: Any) -> tuple[Tensor]:
        return (latents[:, :3],)


def layered() -> Built:
    config = {name: value for name, value in tiny_models.build("qwen_image")[0].config.items() if name[0] != "_"}
    config |= {"use_layer3d_rope": True, "use_additional_t_cond": True}
    return diffusers.QwenImageTransformer2DModel(**config), {}


@pytest.mark.parametrize("name", ["Edit", "EditPlus", "Layered"])
def test_qwen_image_with_reference_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tokens stand behind the image's, or behind those of all layers."""
    cls = getattr(diffusers, f"QwenImage{name}Pipeline")
    small = (96, 64, None) if name == "Edit" else (96, 64)
    monkeypatch.setattr(sys.modules[cls.__module__], "calculate_dimensions", lambda *_: small)
    transformer, _ = build_denoiser(layered) if name == "Layered" else tiny_models.build("qwen_image")
    parts = {"vae": Pictures(), "text_encoder": tiny_pipelines.NoVae(), "tokenizer": None, "processor": None}
    pipe = cls(transformer=transformer, scheduler=tiny_pipelines.euler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    embeds = ("prompt_embeds", 16, 8), ("prompt_embeds_mask", None, valid_first(8, 6))
    more = {"layers": 2, "prompt": "a cat"} if name == "Layered" else {}
    sizes = {} if name == "Layered" else {"height": 96, "width": 128}
    inputs = {**tiny_pipelines.guided(*embeds, height=0, width=0), **more, "image": PIL.Image.new("RGB", (48, 32))}
    inputs = {key: given for key, given in inputs.items() if key not in ("height", "width")} | sizes
    # Layers come as a list of pictures, and its pipeline has no way to hand out latents.
    check(pipe, lambda: torch.stack(list(run_pipeline(pipe, {**inputs, "num_inference_steps": 4, "output_type": "pt"}))))
    with accelplug.apply(pipe, SPARSE, gate="off") as plug:
        run_pipeline(pipe, {**inputs, "num_inference_steps": 1, "output_type": "pt"})
        (layout,) = {row.layout for row in plug.where()}
    assert layout == (Layout((3, 4, 6), 8, 24) if name == "Layered" else Layout((1, 6, 8), 8, 24))
