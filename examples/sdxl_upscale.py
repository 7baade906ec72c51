"""SDXL at 2048 x 2048: a picture of the trained size, drawn anew crop by crop, each with words of its own.

    python examples/sdxl_upscale.py

A small vision-language model says what is in each crop; words of the prompt that do not look there are left out. Writes `small.png` and
`large.png`. The weights take 15 GB.

Not run on a GPU yet. `tests/test_examples.py` runs it on a tiny SDXL, with words that are given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoPipelineForImage2Image, StableDiffusionXLPipeline
from PIL import Image

import accelplug
from accelplug.upscaling import Regional

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
EYE = "Qwen/Qwen2.5-VL-3B-Instruct"
PROMPT = "A market square in the rain, a red tram, people with umbrellas, an old clock tower."
ASK = "This is a part of a larger picture. Say what it shows, in one sentence of at most thirty words."
SMALL = {"height": 1024, "width": 1024, "num_inference_steps": 30}
LARGE = {"scale": 2.0, "screen": 0.5, "strength": 0.6, "num_inference_steps": 50}


def describer(model: str = EYE, device: str = "cuda") -> Regional:
    """Return what says in words what a picture shows."""
    eye = transformers.pipeline("image-text-to-text", model=model, device=device, dtype=torch.bfloat16)

    def describe(picture: Image.Image) -> str:
        asked = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": ASK}]}]
        said = eye(text=asked, max_new_tokens=60, return_full_text=False)[0]["generated_text"]
        return str(said).replace("|", ",")  # a bar would begin another prompt

    return describe


def main(
    model: str | Path = MODEL,
    regional: Regional | None = None,
    small: dict[str, Any] = SMALL,
    large: dict[str, Any] = LARGE,
    device: str = "cuda",
    folder: Path = Path(),
) -> Image.Image:
    """Draw a picture, and the same at twice the size. `regional`: words for crops; None: the prompt alone."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.bfloat16).to(device)
    first = pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(0), **small).images[0]
    first.save(folder / "small.png")

    again = AutoPipelineForImage2Image.from_pipe(pipe)
    again.vae.enable_slicing()  # crops are decoded one by one
    drawn = accelplug.upscale(again, first, PROMPT, regional=regional, **large)
    drawn.save(folder / "large.png")
    return drawn


if __name__ == "__main__":
    main(regional=describer())
