"""Wan 2.1 above its size, as FreeSwim does it: a clip enlarged, and drawn anew with windows and a second path.

    python examples/freeswim_v2v.py

Writes `small.webp` and `large.webp` (a browser plays them). The weights take 28 GB; at 1920x1088 what the second path keeps takes 16 GB
of the GPU's memory.

Not run on a GPU yet. `tests/test_examples.py` runs it on a tiny Wan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanVideoToVideoPipeline
from PIL import Image

import accelplug

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
PROMPT = "A lighthouse on a cliff in a storm, waves break far below, seen from the air."
SMALL = {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}
LARGE = {"height": 1088, "width": 1920, "num_inference_steps": 50, "guidance_scale": 5.0, "strength": 0.7}
FLOW_SHIFT = 9.0  # as released


def recipe(rows: int, columns: int, **settings: Any) -> dict[str, Any]:
    """Windows of the training size in tokens, and the text of the second path."""
    windows = {"where": {"kind": "self"}, "patch": "freeswim", "with": {"native_hw": [rows, columns], **settings}}
    return {"rules": [windows, {"patch": "second_path"}]}


def write(clip: np.ndarray, path: Path) -> list[Image.Image]:
    """Write a clip (F, H, W, 3) of numbers from 0 to 1, and return its frames."""
    frames = [Image.fromarray(frame) for frame in (clip * 255).round().astype(np.uint8)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // 16)
    return frames


def main(
    model: str | Path = MODEL,
    rules: dict[str, Any] | None = None,
    small: dict[str, Any] = SMALL,
    large: dict[str, Any] = LARGE,
    device: str = "cuda",
    gate: str = "auto",
    folder: Path = Path(),
) -> accelplug.Plug:
    """Draw a clip twice; `rules`: other ones than those for 480x832."""
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", dtype=torch.float32)  # in bfloat16 it loses detail
    pipe = WanPipeline.from_pretrained(model, vae=vae, dtype=torch.bfloat16).to(device)
    first = write(pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(0), **small).frames[0], folder / "small.webp")

    parts = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "transformer", "vae")}
    shifted = type(pipe.scheduler).from_config({**pipe.scheduler.config, "flow_shift": FLOW_SHIFT, "shift": FLOW_SHIFT})
    again = WanVideoToVideoPipeline(**parts, scheduler=shifted)
    text, negative = pipe.encode_prompt(PROMPT)  # not by the second pipeline, which would need ftfy
    given = {"prompt_embeds": text, "negative_prompt_embeds": negative, **large}
    enlarged = [frame.resize((large["width"], large["height"]), Image.Resampling.BICUBIC) for frame in first]
    with accelplug.apply(again, rules or recipe(30, 52), gate=gate) as plug:
        clip = again(enlarged, generator=torch.Generator("cpu").manual_seed(0), **given).frames[0]
        print(plug.report())
    write(clip, folder / "large.webp")
    return plug


if __name__ == "__main__":
    main()
