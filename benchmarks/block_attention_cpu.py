"""How near block attention comes to its ideal on a CPU: time over dense time, against the density of the plan.

usage: python -m benchmarks.block_attention_cpu

Dense is torch's SDPA (CPU flash), the best there is here. Ideal is the density for rest=drop, density + pooled keys for
rest=pool. Runs are interleaved; medians with 20/80 % quantiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from accelplug.comparison.environment import environment
from accelplug.comparison.rows import Quantiles
from accelplug.kernels.attention import Backend, block_attention
from accelplug.kernels.rest import Drop, Pool
from benchmarks.common import random_plan, write_json

HEADS, DIM = 2, 64
TOKENS = (6528, 8192)
DENSITIES = (0.1, 0.2, 0.3, 0.5)
BLOCKS = (64, 128)
BACKENDS: tuple[Backend, ...] = ("flex", "blocked")
REPEATS = 7


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    torch.set_num_threads(2)
    rows = []
    for tokens in TOKENS:
        q, k, v = (torch.randn(1, HEADS, tokens, DIM) for _ in range(3))
        dense: partial[Any] = partial(F.scaled_dot_product_attention, q, k, v)
        runs: dict[tuple[str, int, float, str], partial[Any]] = {("dense", 0, 1.0, "drop"): dense}
        ideals = {}
        for block in BLOCKS:
            for target in DENSITIES:
                plan = random_plan(tokens, block, target)
                density = float(plan.density())
                for rest in (Drop(), Pool()):
                    kind = "drop" if isinstance(rest, Drop) else "pool"
                    for backend in BACKENDS:
                        key = (backend, block, target, kind)
                        ideals[key] = density + (0 if kind == "drop" else (1 - density) / block)
                        runs[key] = partial(block_attention, q, k, v, plan, rest=rest, backend=backend)
        times: dict[tuple, list[float]] = {key: [] for key in runs}
        for run in runs.values():
            run()  # compiles
        for _ in range(REPEATS):
            for cell, run in runs.items():
                times[cell].append(milliseconds(run))
        whole = Quantiles.of(times["dense", 0, 1.0, "drop"])
        for (backend, block, target, kind), values in times.items():
            if backend == "dense":
                continue
            spread = Quantiles.of(values)
            ideal = ideals[backend, block, target, kind]
            achieved = ideal * whole.p50 / spread.p50
            rows.append(
                {
                    "tokens": tokens,
                    "heads": HEADS,
                    "head_dim": DIM,
                    "dtype": "float32",
                    "backend": backend,
                    "block": block,
                    "density": target,
                    "rest": kind,
                    "dense_ms": asdict(whole),
                    "ms": asdict(spread),
                    "ideal": ideal,
                    "achieved_over_ideal": achieved,
                }
            )
            what = f"S={tokens} {backend:8s} block {block:3d} {kind} density {target:.2f}"
            print(f"{what}: {spread.p50:6.1f} ms of {whole.p50:.1f}, {achieved:.2f} of ideal")
    write_json("block_attention_cpu", {**environment(), "rows": rows})


if __name__ == "__main__":
    with torch.no_grad():
        main()
