"""Merged and proxy tokens on the q, k, v of a real run of the bundled model, beside random block masks of equal cost.

usage: python -m benchmarks.token_layers [--steps 5 9 13]

Relative L2 error of the attention output, mean over layers and steps (conditional branch); cost is the share of (query, key)
pairs that is computed, a pooled key counted as one. Random masks read blocks of 64, and drop or pool the others.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from diffusers import WanPipeline
from torch.nn.functional import scaled_dot_product_attention

import accelplug
from accelplug import registry, zoo
from accelplug.comparison.environment import environment
from benchmarks.common import write_json
from benchmarks.demo_pareto import PROMPT, Capture, Random, measured

BLOCK = 64
TIME_CELLS = {"ratio": 0.5, "cell_thw": [4, 1, 1], "tile_thw": [8, 4, 4]}
WINDOWS = {"4x2x3": [4, 2, 3], "4x4x4": [4, 4, 4], "1x8x8": [1, 8, 8]}
PROXIES: dict[str, dict[str, Any]] = {
    "drop": {"rest": "drop"},
    "mean": {},
    "centre": {"representative": "centre"},
    "centre_k_mean_v": {"representative": "centre_k_mean_v"},
    "variance": {"variance": True},
}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"tome {ratio}": ("tome", {"ratio": ratio}) for ratio in (0.25, 0.5, 0.7)},
    **{f"tome {ratio}, not counted": ("tome", {"ratio": ratio, "proportional": False}) for ratio in (0.25, 0.5, 0.7)},
    "tome 0.5, tiles of 4x8x8": ("tome", {"ratio": 0.5, "tile_thw": [4, 8, 8]}),
    "tome 0.5, cells along time": ("tome", TIME_CELLS),
    "tome 0.5, qkv": ("tome", {"ratio": 0.5, "mode": "qkv"}),
    **{
        f"proxy {name}, {what}": ("proxy", {"window_thw": window, "backend": "blocked", **config})
        for name, window in WINDOWS.items()
        for what, config in PROXIES.items()
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 9, 13], help="diffusion steps, of 16")
    options = parser.parse_args()
    torch.set_num_threads(2)
    Capture.steps = tuple(options.steps)
    pipe = WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        with accelplug.apply(pipe, Capture(), gate="off"):
            pipe(prompt=PROMPT, **zoo.DEMO, generator=torch.Generator().manual_seed(0), output_type="latent")
        rows = [row for name, setting in SETTINGS.items() for row in errors(name, *setting)]
    write_json("token_layers", {**environment(pipe), "prompt": PROMPT, "grid": "demo", "rows": rows})


def errors(name: str, patch: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a captured call, and a printed line for all."""
    method: Any = registry.patch_class(patch)(config)
    rows = []
    for place, call in Capture.calls.items():
        exact = scaled_dot_product_attention(call.q, call.k, call.v)
        cost, error = measured(method, call, place, exact)
        row: dict[str, Any] = {"setting": name, "layer": place.layer, "step": place.step, "cost": cost, "error": error}
        blocks = -(-place.layout.length // BLOCK)
        for rest, density in (("drop", cost), ("pool", max(cost - 1 / BLOCK, 1 / blocks))):
            mask = Random({"block": BLOCK, "density": density, "rest": rest, "backend": "blocked"})
            _, row[f"random_{rest}"] = measured(mask, call, place, exact)
        rows.append(row)
    mean = {key: statistics.fmean(row[key] for row in rows) for key in ("cost", "error", "random_drop", "random_pool")}
    wins = sum(row["error"] < min(row["random_drop"], row["random_pool"]) for row in rows)
    print(
        f"{name:28s} cost {mean['cost']:.3f}  error {mean['error']:.3f}  random {mean['random_drop']:.3f} dropping, "
        f"{mean['random_pool']:.3f} pooling  best of the three in {wins} of {len(rows)} calls",
        flush=True,
    )
    return rows


if __name__ == "__main__":
    main()
