"""What each patch costs: prefill and decoded token, beside the stock model, interleaved in one run.

``python -m benchmarks.vlm_overhead``: the bundled model and a wider one with random weights, on this machine. With ``--large`` on a
GPU: the architectures of LLaVA-1.5-7B and Qwen2.5-VL-7B with random weights in bf16, batch 1 and 8; weights do not change times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import transformers

import accelplug
from accelplug.comparison.environment import environment
from accelplug.hosts.gate import synchronise
from accelplug.zoo import path
from benchmarks.common import write_json

ROUNDS = 15
STEPS = 16
RECIPES: dict[str, dict[str, Any]] = {
    "visual_bias": {"patch": "visual_bias"},
    "vhr": {"patch": "vhr", "where": {"layers": [1, "-44%:"]}},
    "var": {"patch": "var", "with": {"sink_threshold": 3.0, "min_visual_mass": 0.0, "min_nonsink_ratio": 0.0}},
    "gift": {"patch": "gift", "with": {"saliency_layer": 2, "enhance": [3, 6]}},
    "pai": {"patch": "pai", "where": {"layers": "2:"}},
}
"""Every layer that a shipped recipe would touch, thresholds low, so that every head and row is worked on."""


def bundled(device: str) -> Any:
    """The bundled model."""
    return transformers.AutoModelForImageTextToText.from_pretrained(path("llava-scenes")).eval().to(device)


def wide(device: str) -> Any:
    """A LLaVA with CLIP-L's 576 tokens and eight layers of width 1,024."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=1, image_size=336, patch_size=14
    )
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
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


def prompt(model: Any, batch: int, text: int = 48) -> dict[str, torch.Tensor]:
    """An image and a question for every row, without the work of the vision tower."""
    config = model.config
    tokens = getattr(config, "image_seq_length", None) or 1024
    if isinstance(model, transformers.LlavaForConditionalGeneration):
        side = config.vision_config.image_size
        tokens = (side // config.vision_config.patch_size) ** 2
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(3, min(vocabulary, 90), (batch, 24 + tokens + text))
    ids[:, 24 : 24 + tokens] = config.image_token_id
    return {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start)


def _decode(model: Any, step: torch.Tensor, cache: Any) -> None:
    for _ in range(STEPS):
        model.base_model(input_ids=step, past_key_values=cache)


@torch.no_grad()
def measure(model: Any, batch: int, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Median milliseconds of prefill and of a decoded token, and their ratios to the stock model's, all interleaved."""
    given = prompt(model, batch)
    step = given["input_ids"][:, -1:]
    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "token": []} for name in ("stock", *RECIPES)}
    for turn in range(rounds + 2):
        for name, found in times.items():
            with nullcontext() if name == "stock" else accelplug.apply(model, RECIPES[name], gate="off"):
                cache = transformers.DynamicCache(config=model.config.get_text_config())
                prefill = timed(partial(model.base_model, **given, past_key_values=cache), model.device)
                token = timed(partial(_decode, model, step, cache), model.device) / STEPS
            if turn > 1:
                found["prefill"].append(prefill)
                found["token"].append(token)
    stock = times["stock"]
    result = {}
    for name, found in times.items():
        result[name] = {f"{what}_ms": round(statistics.median(values), 3) for what, values in found.items()}
        for what, values in found.items():  # round by round, so that what slows all of them down cancels
            ratios = [a / b for a, b in zip(values, stock[what], strict=True)]
            result[name][f"{what}_ratio"] = round(statistics.median(ratios), 3)
            result[name][f"{what}_ratio_20_80"] = [round(x, 3) for x in statistics.quantiles(ratios, n=5)[::3]]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="7B architectures, on a GPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    makers = (llava_7b, qwen_7b) if options.large else (bundled, wide)
    rows = []
    for make in makers:
        model = make(device)
        for batch in (1, 8):
            found = measure(model, batch, options.rounds)
            rows.append({"model": make.__name__, "batch": batch, "dtype": str(model.dtype), "times": found})
            for name, row in found.items():
                print(f"{make.__name__:10s} batch {batch}  {name:12s} {row}", flush=True)
        del model
    write_json("vlm_overhead_large" if options.large else "vlm_overhead", {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
