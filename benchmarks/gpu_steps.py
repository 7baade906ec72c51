"""One forward of whole denoisers at real shapes with random weights: dense, recipes with static plans, and injected densities.

usage: python -m benchmarks.gpu_steps [--model NAME ...] [--smoke]

Random weights say what a plan costs, never what it does to a picture, and nothing of plans made from scores: for those stand random
plans of a given density. Rows: milliseconds with 20/80 % quantiles, gain over the faster of two dense runs (the kernel that torch
picks, and cuDNN ahead of it), under whose choice of kernels all others run, and attention's share. With `--model` the file keeps its
rows of the others, if of the same device and versions: Wan and HunyuanVideo take some minutes each.
`--smoke` runs the whole script at toy sizes on whatever device there is. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch.nn.attention import SDPBackend, sdpa_kernel

import accelplug
from accelplug.comparison.environment import environment
from accelplug.errors import AccelplugError
from benchmarks.common import RESULTS, write_json
from benchmarks.demo_pareto import Random
from benchmarks.gpu_block_attention import spread, turns

INJECTED = (0.2, 0.3)
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@contextmanager
def cudnn_first() -> Iterator[None]:
    """Let torch take cuDNN's attention wherever it serves."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        yield


DENSE: dict[str, Callable[[], Any]] = {"dense": nullcontext, "dense, cudnn first": cudnn_first}


@dataclass(frozen=True)
class Model:
    """A denoiser: its class, its config at full size and as a toy, the latents (T, H, W) of both, its inputs, static recipes."""

    cls: Any
    config: Mapping[str, Any]
    toy: Mapping[str, Any]
    latents_thw: tuple[int, int, int]
    toy_thw: tuple[int, int, int]
    inputs: Callable[[Any, tuple[int, int, int], Callable[..., Any]], dict[str, Any]]
    recipes: tuple[str, ...]


def wan(config: Any, thw: tuple[int, int, int], draw: Callable[..., Any]) -> dict[str, Any]:
    text = draw(1, 512, config.text_dim)
    return {
        "hidden_states": draw(1, 16, *thw),
        "timestep": torch.tensor([500], device=text.device),
        "encoder_hidden_states": text,
    }


def hunyuan(config: Any, thw: tuple[int, int, int], draw: Callable[..., Any]) -> dict[str, Any]:
    text = draw(1, 256, config.text_embed_dim)
    return {
        "hidden_states": draw(1, config.in_channels, *thw),
        "timestep": torch.tensor([500], device=text.device),
        "encoder_hidden_states": text,
        "encoder_attention_mask": torch.ones(1, 256, device=text.device, dtype=torch.long),
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0], device=text.device, dtype=text.dtype),
    }


def cogvideox(config: Any, thw: tuple[int, int, int], draw: Callable[..., Any]) -> dict[str, Any]:
    frames, rows, columns = thw
    text = draw(1, config.max_text_seq_length, config.text_embed_dim)
    side = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    cosines, sines = get_3d_rotary_pos_embed(
        config.attention_head_dim,
        None,
        (rows // config.patch_size, columns // config.patch_size),
        frames // config.patch_size_t,
        grid_type="slice",
        max_size=side,
        device=text.device,
    )
    return {
        "hidden_states": draw(1, frames, config.in_channels, rows, columns),
        "timestep": torch.tensor([500], device=text.device),
        "encoder_hidden_states": text,
        "image_rotary_emb": (cosines, sines),
    }


def flux(config: Any, thw: tuple[int, int, int], draw: Callable[..., Any]) -> dict[str, Any]:
    _, rows, columns = thw
    text = draw(1, 512, config.joint_attention_dim)
    places = torch.zeros(rows, columns, 3, device=text.device)
    places[..., 1] += torch.arange(rows, device=text.device)[:, None]
    places[..., 2] += torch.arange(columns, device=text.device)
    return {
        "hidden_states": draw(1, rows * columns, config.in_channels),
        "timestep": torch.tensor([0.5], device=text.device, dtype=text.dtype),
        "encoder_hidden_states": text,
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "guidance": torch.tensor([3.5], device=text.device, dtype=text.dtype),
        "img_ids": places.reshape(-1, 3),
        "txt_ids": torch.zeros(512, 3, device=text.device),
    }


SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32}
MODELS = {
    "Wan2.1-14B 720p 81f": Model(
        WanTransformer3DModel, {}, {**SMALL, "ffn_dim": 64, "text_dim": 32}, (21, 90, 160), (3, 16, 16), wan,
        ("wan2.1-t2v-14b/radial", "wan2.1-t2v-14b/neighborhood"),
    ),
    "CogVideoX1.5-5B 768p 81f": Model(
        CogVideoXTransformer3DModel,
        {"num_layers": 42, "num_attention_heads": 48, "patch_size_t": 2, "patch_bias": False, "sample_height": 300,
         "sample_width": 300, "sample_frames": 81, "use_rotary_positional_embeddings": True},
        {**SMALL, "patch_size_t": 2, "patch_bias": False, "time_embed_dim": 16, "text_embed_dim": 32, "sample_height": 32,
         "sample_width": 32, "max_text_seq_length": 16, "use_rotary_positional_embeddings": True},
        (22, 96, 170), (4, 16, 16), cogvideox, ("cogvideox1.5-5b/radial", "cogvideox1.5-5b/neighborhood"),
    ),
    "HunyuanVideo 720p 129f": Model(
        HunyuanVideoTransformer3DModel,
        {"guidance_embeds": True},
        {**SMALL, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 16,
         "rope_axes_dim": (8, 12, 12), "guidance_embeds": True},
        (33, 90, 160), (3, 16, 16), hunyuan,
        ("hunyuanvideo/radial", "hunyuanvideo/neighborhood", "hunyuanvideo/neighborhood-wide"),
    ),
    "FLUX.1-dev 4096 x 4096": Model(
        FluxTransformer2DModel,
        {"guidance_embeds": True},
        {**SMALL, "num_single_layers": 1, "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (8, 12, 12),
         "guidance_embeds": True},
        (1, 256, 256), (1, 16, 16), flux, ("flux.1-dev/neighborhood",),
    ),
}  # fmt: skip


def rows_of(name: str, smoke: bool, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Dense first, then the recipes, then the injected densities."""
    spec = MODELS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = spec.cls(**(spec.toy if smoke else spec.config)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    inputs = spec.inputs(model.config, spec.toy_thw if smoke else spec.latents_thw, draw)
    block = 32 if smoke else 128
    recipes: dict[str, Any] = {} if smoke else {recipe.split("/")[1]: recipe for recipe in spec.recipes}
    recipes |= {f"random, density {d}": {"patch": Random.name, "with": {"block": block, "density": d}} for d in INJECTED}

    def run() -> dict[str, float]:
        return spread(turns({"": lambda: model(**inputs)}, device, 1 if smoke else 3, 1)[""])

    rows: list[dict[str, Any]] = []
    for label, context in DENSE.items():
        with context():
            rows.append({"model": name, "recipe": label, "ms": run()})
        print(f"{name:24s} {label:22s} {rows[-1]['ms']['p50']:9.1f} ms", flush=True)
    best = min(rows, key=lambda row: row["ms"]["p50"])
    for label, recipe in recipes.items():
        try:
            with DENSE[best["recipe"]](), accelplug.apply(model, recipe, gate="report") as plug:
                plug.step(49, 50)  # past the dense steps of every recipe
                ms = run()
                forecasts = plug.choices["forecasts"]
        except AccelplugError as error:
            rows.append({"model": name, "recipe": label, "failed": str(error)})
            continue
        row = {"model": name, "recipe": label, "ms": ms, "gain": best["ms"]["p50"] / ms["p50"], "over": best["recipe"]}
        rows.append({**row, "forecasts": forecasts})
        print(f"{name:24s} {label:22s} {ms['p50']:9.1f} ms, {row['gain']:.2f}x of {best['recipe']}", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type == "cpu" and not options.smoke:
        raise SystemExit("There is no GPU here; try --smoke.")
    facts = environment()
    names, path = options.model or list(MODELS), RESULTS / "gpu_steps.json"
    kept = json.loads(path.read_text()) if options.model and path.exists() and not options.smoke else {}
    alike = all(kept.get(key) == facts[key] for key in ("device", "versions"))
    rows = [row for row in kept["rows"] if row["model"] not in names] if alike else []
    with torch.no_grad():
        for name in names:
            try:
                rows += rows_of(name, options.smoke, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
            except torch.OutOfMemoryError:
                rows.append({"model": name, "failed": "out of memory at full depth"})
            if not options.smoke:  # after each model, so that a run cut short leaves what it has
                write_json("gpu_steps", {**facts, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
