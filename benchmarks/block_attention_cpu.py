"""How near block attention comes to its ideal on a CPU: time over dense time, against the density of the plan.

usage: python -m benchmarks.block_attention_cpu [--tokens N ...] [--dtype NAME ...] [--backend NAME ...] [--part]

Dense is torch's SDPA in the same dtype (CPU flash), the best there is here. Ideal is the density for rest=drop, density + pooled keys
for rest=pool. Runs are interleaved; medians with 20/80 % quantiles. The sizes are the bundled model's: 2 heads of 64, tokens of its small
grid and of its demo's. With ``--part``, rows of other sizes, dtypes and backends stay in the file as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from accelplug.comparison.environment import environment
from accelplug.comparison.rows import Quantiles
from accelplug.kernels.attention import block_attention
from accelplug.kernels.rest import Drop, Pool
from benchmarks.common import RESULTS, random_plan, write_json

NAME = "block_attention_cpu"
HEADS, DIM = 2, 64
TOKENS = (1728, 6528)
DTYPES = ("float32", "bfloat16")
DENSITIES = (0.1, 0.2, 0.3)
BLOCKS = (32, 64, 128)
BACKENDS = ("blocked", "flex")
REPEATS = 9


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def measured(tokens: int, dtype: str, backends: list[str]) -> list[dict[str, Any]]:
    """All blocks, densities and rests at one size and dtype."""
    q, k, v = (torch.randn(1, HEADS, tokens, DIM).to(getattr(torch, dtype)) for _ in range(3))
    dense: partial[Any] = partial(F.scaled_dot_product_attention, q, k, v)
    runs: dict[tuple[str, int, float, str], partial[Any]] = {("dense", 0, 1.0, "drop"): dense}
    ideals = {}
    for block in BLOCKS:
        for target in DENSITIES:
            plan = random_plan(tokens, block, target)
            density = float(plan.density())
            for rest in (Drop(), Pool()):
                kind = "drop" if isinstance(rest, Drop) else "pool"
                for backend in backends:
                    key = (backend, block, target, kind)
                    ideals[key] = density + (0 if kind == "drop" else (1 - density) / block)
                    runs[key] = partial(block_attention, q, k, v, plan, rest=rest, backend=backend)  # type: ignore[arg-type]
    times: dict[tuple, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()  # compiles
    for _ in range(REPEATS):
        for cell, run in runs.items():
            times[cell].append(milliseconds(run))
    whole = Quantiles.of(times.pop(("dense", 0, 1.0, "drop")))
    rows = []
    for (backend, block, target, kind), values in times.items():
        spread, ideal = Quantiles.of(values), ideals[backend, block, target, kind]
        achieved = ideal * whole.p50 / spread.p50
        rows.append(
            {
                "tokens": tokens,
                "heads": HEADS,
                "head_dim": DIM,
                "dtype": dtype,
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
        what = f"S={tokens} {dtype} {backend:8s} block {block:3d} {kind} density {target:.2f}"
        print(f"{what}: {spread.p50:6.1f} ms of {whole.p50:.1f}, {achieved:.2f} of ideal")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--part", action="store_true", help="keep what the file has of others")
    options = parser.parse_args()
    torch.set_num_threads(2)
    kept = []
    if options.part:
        for row in json.loads((RESULTS / f"{NAME}.json").read_text())["rows"]:
            if (
                row["tokens"] not in options.tokens
                or row["dtype"] not in options.dtype
                or row["backend"] not in options.backend
            ):
                kept.append(row)
    rows = [row for tokens in options.tokens for dtype in options.dtype for row in measured(tokens, dtype, options.backend)]
    write_json(NAME, {**environment(), "rows": kept + rows})


if __name__ == "__main__":
    with torch.no_grad():
        main()
