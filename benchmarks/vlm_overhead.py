"""What each patch costs: prefill and decoded token, beside the stock model, interleaved in one run.

``python -m benchmarks.vlm_overhead``: the bundled model and a wider one with random weights, on this machine; ``--rounds 6`` for a
short run. With ``--large`` on a GPU: the architectures of LLaVA-1.5-7B and Qwen2.5-VL-7B with random weights in bf16, batch 1 and
8; weights do not change times.

Ratios are the figure: each round times every row beside the stock model, in an order of its own, and their median is given, so that
what else the machine does cancels. Milliseconds are of a machine that may have been busy.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import transformers

import accelplug
from accelplug import compat
from accelplug.comparison.environment import environment
from accelplug.kernels.timing import synchronise
from accelplug.zoo import path
from benchmarks.common import write_json

ROUNDS = 15
STEPS = 8
SYSTEM, QUESTION = 24, 48
"""Tokens of text ahead of the image and behind it."""
RECIPES: dict[str, dict[str, Any]] = {
    "visual_bias": {"patch": "visual_bias"},
    "vhr": {"patch": "vhr", "where": {"layers": [1, "-44%:"]}},
    "var": {
        "patch": "var",
        "with": {"sink_dims": [46, 49, 71, 83], "sink_threshold": 2.0, "min_visual_mass": 0.0, "min_nonsink_ratio": 0.0},
    },
    "gift": {"patch": "gift", "with": {"saliency_layer": 1, "enhance": [2, 4]}},
    "pai": {"patch": "pai", "where": {"layers": "2:"}},
}
"""Every layer that a shipped recipe would touch, thresholds low, so that every head and row is worked on. There are no
sinks here: ``var`` is told to take four dimensions, in which some tokens happen to be large."""


def bundled(device: str) -> Any:
    """The bundled model."""
    return transformers.AutoModelForImageTextToText.from_pretrained(path("llava-scenes")).eval().to(device)


def wide(device: str) -> Any:
    """A LLaVA with CLIP-L's 576 tokens and four layers of width 1,024; its vision tower is next to nothing."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=1, image_size=336, patch_size=14
    )
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
    text = transformers.LlamaConfig(**sizes, num_key_value_heads=16, vocab_size=1000)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=999, image_seq_length=576)
    return transformers.LlavaForConditionalGeneration(config).eval().to(device)


def llava_7b(device: str) -> Any:
    """LLaVA-1.5-7B's architecture, random weights."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    text = transformers.LlamaConfig(vocab_size=32064)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, image_seq_length=576)
    with torch.device(device):
        return transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()


def qwen_7b(device: str) -> Any:
    """Qwen2.5-VL-7B's architecture, random weights."""
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {**sizes, "num_key_value_heads": 4, "vocab_size": 152064, "rope_parameters": rope}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config={"out_hidden_size": 3584})
    with torch.device(device):
        return transformers.Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16).eval()


def prompt(model: Any, batch: int) -> dict[str, torch.Tensor]:
    """An image of noise and a question for every row."""
    config, vision = model.config, model.config.vision_config
    vocabulary = config.get_text_config().vocab_size
    if isinstance(model, transformers.LlavaForConditionalGeneration):
        tokens = (vision.image_size // vision.patch_size) ** 2
        pixels: dict[str, torch.Tensor] = {"pixel_values": torch.randn(batch, 3, vision.image_size, vision.image_size)}
    else:
        side, tokens = 64, 1024  # patches a side, four of which make a token
        pixels = {
            "pixel_values": torch.randn(batch * side * side, 3 * vision.temporal_patch_size * vision.patch_size**2),
            "image_grid_thw": torch.tensor([[1, side, side]] * batch),
        }
    ids = torch.randint(8, min(vocabulary, 90), (batch, SYSTEM + tokens + QUESTION))
    ids[:, SYSTEM : SYSTEM + tokens] = config.image_token_id
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if "image_grid_thw" in given:
        given["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return {name: x.to(model.device, model.dtype if x.is_floating_point() else None) for name, x in given.items()}


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Milliseconds of one call: by the wall, and of this process's CPU time, which nobody else's work is in."""
    synchronise(device)
    wall, busy = time.perf_counter(), time.process_time()
    call()
    synchronise(device)
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - busy)


def _decode(model: Any, step: torch.Tensor, cache: Any) -> None:
    for _ in range(STEPS):
        model.base_model(input_ids=step, **{compat.transformers.cache_keyword(model.base_model.forward): cache})


@torch.no_grad()
def measure(model: Any, batch: int, rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Medians over rounds: milliseconds of prefill and of a decoded token, and their ratios to the stock model's.

    ``_cpu_ratio`` is that of CPU time: on a busy machine it is steadier than the wall's, but what runs in one thread weighs less in it.
    """
    given = prompt(model, batch)
    step = given["input_ids"][:, -1:]
    rows = ["stock", *RECIPES]
    times: dict[str, dict[str, list[tuple[float, float]]]] = {name: {"prefill": [], "token": []} for name in rows}
    read: dict[str, torch.Tensor] = {}
    order = random.Random(0)
    for turn in range(rounds + 1):
        order.shuffle(rows)
        for name in rows:
            with nullcontext() if name == "stock" else accelplug.apply(model, RECIPES[name], strict=True):
                cache = transformers.DynamicCache(config=model.config.get_text_config())
                held = {compat.transformers.cache_keyword(model.base_model.forward): cache}
                prefill = timed(partial(model.base_model, **given, **held), model.device)
                token = timed(partial(_decode, model, step, cache), model.device)
            if turn:
                times[name]["prefill"].append(prefill)
                times[name]["token"].append(token)
            else:  # warms up
                read[name] = torch.cat([layer.values for layer in cache.layers])
    result: dict[str, dict[str, Any]] = {}
    for name, found in times.items():
        result[name] = {
            "prefill_ms": round(statistics.median(wall for wall, _ in found["prefill"]), 2),
            "token_ms": round(statistics.median(wall for wall, _ in found["token"]) / STEPS, 3),
        }
        if name == "stock":
            continue
        for what, values in found.items():
            stock = times["stock"][what]
            wall, busy = ([a[i] / b[i] for a, b in zip(values, stock, strict=True)] for i in (0, 1))
            result[name][f"{what}_ratio"] = round(statistics.median(wall), 3)
            result[name][f"{what}_ratio_20_80"] = [round(x, 3) for x in statistics.quantiles(wall, n=5)[::3]]
            result[name][f"{what}_cpu_ratio"] = round(statistics.median(busy), 3)
            result[name][f"{what}_cpu_ratio_20_80"] = [round(x, 3) for x in statistics.quantiles(busy, n=5)[::3]]
        if torch.equal(read[name], read["stock"]):
            raise SystemExit(f"{name} changed nothing on this model: its time would be that of nothing")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="7B architectures, on a GPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    makers = (llava_7b, qwen_7b) if options.large else (bundled, wide)
    rows = []
    for make in makers:
        model = make(device)
        for batch in (1, 8):
            rounds = options.rounds if batch == 1 else max(3, options.rounds // 2)
            found = measure(model, batch, rounds)
            dtype, tokens = str(model.dtype), prompt(model, batch)["input_ids"].shape[1]
            rows.append(
                {"model": make.__name__, "batch": batch, "tokens": tokens, "dtype": dtype, "rounds": rounds, "times": found}
            )
            for name, row in found.items():
                print(f"{make.__name__:10s} batch {batch}  {name:12s} {row}", flush=True)
        del model
    note = "interleaved; the ratios are the figure, the machine was shared"
    data = {"environment": environment(), "note": note, "rows": rows}
    write_json("vlm_overhead_large" if options.large else "vlm_overhead", data)


if __name__ == "__main__":
    main()
