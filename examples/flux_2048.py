"""FLUX.1-dev at 2048 x 2048: the same picture with dense and with sparse attention, and the time of each.

    python examples/flux_2048.py

At 1024 x 1024 attention is a fifth of the work, and nothing is gained; at 2048 x 2048 it is about half. Writes `flux_2048.png`, dense
on the left. The weights take 34 GB.

Not run on a GPU yet. `tests/test_examples.py` runs it on a tiny FLUX.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from PIL import Image

import accelplug

MODEL = "black-forest-labs/FLUX.1-dev"
PROMPT = "A cutaway drawing of a lighthouse, every room furnished, ink and watercolour."
SETTINGS = {"height": 2048, "width": 2048, "num_inference_steps": 28, "guidance_scale": 3.5}


def draw(pipe: Any, inputs: dict[str, Any]) -> tuple[Image.Image, float]:
    """Return the picture of one seed, and the seconds that it took."""
    start = time.perf_counter()
    picture = pipe(**inputs, generator=torch.Generator("cpu").manual_seed(0)).images[0]  # on the CPU: the GPU is done
    return picture, time.perf_counter() - start


def main(
    model: str | Path = MODEL,
    recipe: Any = "neighborhood",
    settings: dict[str, Any] = SETTINGS,
    device: str = "cuda",
    gate: str = "auto",
    out: Path = Path("flux_2048.png"),
) -> accelplug.Plug:
    """Draw twice. With ``gate="auto"`` calls that would not be faster stay dense, and the report says so."""
    pipe = FluxPipeline.from_pretrained(model, dtype=torch.bfloat16).to(device)
    inputs = {"prompt": PROMPT, **settings}
    draw(pipe, inputs)  # the first run of a process is slower
    dense, dense_s = draw(pipe, inputs)

    with accelplug.apply(pipe, recipe, gate=gate) as plug:
        print(plug.warmup(**inputs))  # kernels are compiled, and timed against dense attention
        print(plug.where())
        sparse, sparse_s = draw(pipe, inputs)
    print(f"dense {dense_s:.1f} s, {plug.recipe.name} {sparse_s:.1f} s: {dense_s / sparse_s:.2f}x as fast")

    both = Image.new("RGB", (dense.width + sparse.width, dense.height))
    both.paste(dense, (0, 0))
    both.paste(sparse, (dense.width, 0))
    both.save(out)
    return plug


if __name__ == "__main__":
    main()
