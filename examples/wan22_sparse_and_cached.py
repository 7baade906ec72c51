"""Wan 2.2 with sparse attention and a step cache: what each of them brings, and both together, beside the dense run.

    python examples/wan22_sparse_and_cached.py

It runs the pipeline eight times, prints a table, and writes `dense.webp`, `both.webp` (a browser plays them) and `wan22.html`, a page
with every clip. The weights take 69 GB; on a smaller GPU say `pipe.enable_model_cpu_offload()`
in place of `.to(device)`.

Not run on a GPU yet. `tests/test_examples.py` runs it on the bundled Wan, with a second expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image

import accelplug

MODEL = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
PROMPT = "Two anthropomorphic cats in boxing gear fight on a stage, under a spotlight."
SETTINGS = {
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "num_inference_steps": 40,
    "guidance_scale": 4.0,
    "guidance_scale_2": 3.0,
}


def main(
    model: str | Path = MODEL,
    recipe: Any = "sol",
    settings: dict[str, Any] = SETTINGS,
    device: str = "cuda",
    folder: Path = Path(),
) -> accelplug.Comparison:
    """Compare, and keep the first and the last clip.

    `recipe`: a name of recipes/wan2.2-t2v-a14b.yaml, or what `accelplug tune` wrote for your prompts, "tuned.yaml".
    """
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", dtype=torch.float32)  # in bfloat16 it loses detail
    pipe = WanPipeline.from_pretrained(model, vae=vae, dtype=torch.bfloat16).to(device)

    # Rows: dense, the recipe, FirstBlockCache, and both.
    result = accelplug.compare(pipe, recipe, {"prompt": PROMPT, **settings}, seeds=[0], caches=True, floors=False)
    print(result)
    result.to_html(folder / "wan22.html")
    for row, name in ((result.rows[0], "dense"), (result.rows[-1], "both")):
        first, *others = map(Image.fromarray, result.clips[row.name, 0, 0])
        first.save(folder / f"{name}.webp", save_all=True, append_images=others, duration=1000 // 16)
    return result


if __name__ == "__main__":
    main()
