"""What a plug costs apart from attention: applying it, each call through it, and building plans.

usage: python -m benchmarks.overhead
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel

import accelplug
from accelplug.call import Layout
from accelplug.comparison.environment import environment
from accelplug.registry import patch_class
from benchmarks.common import write_json

LAYERS = 40
GRIDS_THW = {
    "bundled demo": (17, 16, 24),
    "wan 480p 81f": (21, 30, 52),
    "wan 720p 81f": (21, 45, 80),
    "hunyuan 720p 129f": (33, 45, 80),
}


def milliseconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Wall times of `run` in milliseconds, sorted."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)


def quantiles(times: list[float]) -> dict[str, float]:
    """Median and 20/80 % quantiles."""
    low, *_, high = statistics.quantiles(times, n=5)
    return {"median": statistics.median(times), "q20": low, "q80": high}


def forty_layers() -> tuple[WanTransformer3DModel, dict[str, torch.Tensor]]:
    """A 40-layer Wan, so narrow that what is timed is overhead."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=1,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=16,
        num_layers=LAYERS,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
    }
    return model.eval().requires_grad_(False), inputs


def _prepared_anew(name: str, layout: Layout) -> Any:
    patch: Any = patch_class(name)()
    return patch.prepare(None, layout, None, {})


def main() -> None:
    torch.set_num_threads(2)
    model, inputs = forty_layers()
    dense = {"rules": [{"patch": "dense"}]}
    applying, removing = [], []
    for _ in range(10):
        applying += milliseconds(lambda: accelplug.apply(model, dense), 1)
        removing += milliseconds(lambda: accelplug.remove(model), 1)

    stock, plugged = [], []
    for _ in range(60):  # interleaved
        stock += milliseconds(lambda: model(**inputs), 1)
        with accelplug.apply(model, dense):
            model(**inputs)
            plugged += milliseconds(lambda: model(**inputs), 1)
    calls = 2 * LAYERS  # self and cross
    overhead_us = 1e3 * (statistics.median(plugged) - statistics.median(stock)) / calls

    plans = []
    for name in ("radial", "neighborhood"):
        for grid, grid_thw in GRIDS_THW.items():
            times = milliseconds(partial(_prepared_anew, name, Layout(grid_thw)), 3)
            plans.append({"patch": name, "grid": grid, "grid_thw": grid_thw, "build_ms": statistics.median(times)})
    write_json(
        "overhead",
        {
            **environment(),
            "layers": LAYERS,
            "apply_ms": quantiles(applying),
            "remove_ms": quantiles(removing),
            "forward_stock_ms": quantiles(stock),
            "forward_plugged_ms": quantiles(plugged),
            "overhead_us_per_call": overhead_us,
            "plan_building": plans,
        },
    )
    print(f"apply {statistics.median(applying):.1f} ms, remove {statistics.median(removing):.1f} ms on {LAYERS} layers")
    print(f"overhead {overhead_us:.1f} us per attention call")
    for row in plans:
        print(f"{row['patch']:13s} {row['grid']:18s} plan in {row['build_ms']:.0f} ms, once per layout")


if __name__ == "__main__":
    with torch.no_grad():
        main()
