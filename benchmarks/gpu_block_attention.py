"""Block-sparse attention on a GPU at the shapes of real models, against the best dense attention and FlexAttention.

usage: python -m benchmarks.gpu_block_attention [--smoke]

Correctness against the float32 reference comes first; a kernel that fails it is not timed. One row per (shape, density, kernel):
milliseconds with 20/80 % quantiles, TFLOP/s on visited tiles, and the ratio to cuDNN and flash SDPA of the same run.
`--smoke` runs the whole script at toy sizes on whatever device there is.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from accelplug.comparison.environment import environment
from accelplug.kernels.attention import available_backends, block_attention
from accelplug.kernels.rest import Drop, Pool
from benchmarks.common import random_plan, write_json


@dataclass(frozen=True)
class Shape:
    """One attention call: heads, tokens, head dimension."""

    name: str
    heads: int
    tokens: int
    dim: int


SHAPES = (
    Shape("Wan2.1-14B 720p 81f", 40, 75_600, 128),
    Shape("CogVideoX1.5-5B 768p 81f", 48, 45_106, 64),
    Shape("HunyuanVideo 720p 129f", 24, 119_056, 128),
    Shape("FLUX 4096 x 4096", 24, 66_048, 128),
)
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
SMOKE = (Shape("smoke", 2, 300, 32),)
BLOCK = 128


def check(device: torch.device, dtype: torch.dtype, backend: str) -> float:
    """Return the largest error against the reference over ragged, grouped, pooled cases; raise where it is too large."""
    worst = 0.0
    for dim in (64, 80, 128):
        q, k, v = (torch.randn(2, heads, 1000, dim, device=device, dtype=dtype) for heads in (4, 2, 2))
        plan = random_plan(1000, BLOCK, 0.4).to(device)
        for rest in (Drop(), Pool()):
            expected = block_attention(q, k, v, plan, rest=rest, backend="reference").float()
            error = (block_attention(q, k, v, plan, rest=rest, backend=backend).float() - expected).abs().max()
            worst = max(worst, float(error))
    if not worst < 0.02:
        raise SystemExit(f"{backend} is off by {worst:.3f} from the reference at {dtype}; not timed.")
    return worst


def timed(run: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Median and 20/80 % quantiles in milliseconds, after two calls to warm up."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    run(), run()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
    return {"p20": low, "p50": statistics.median(times), "p80": high}


def dense_kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The dense kernels of torch that run here, by name."""

    def sdpa(kernel: SDPBackend) -> Callable[[], Any]:
        def run() -> torch.Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    found = {}
    for name, kernel in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            sdpa(kernel)()
        except RuntimeError as error:
            print(f"dense {name} does not run here: {str(error).splitlines()[0]}")
            continue
        found[name] = sdpa(kernel)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type == "cpu" and not options.smoke:
        raise SystemExit("There is no GPU here; try --smoke.")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    backends = [name for name in ("triton", "flex", "blocked") if available_backends(device)[name] is None]
    ours = backends[0]
    errors = {ours: check(device, dtype, ours)}
    print("largest error against the reference:", errors)

    rows = []
    for shape in SMOKE if options.smoke else SHAPES:
        q, k, v = (torch.randn(1, shape.heads, shape.tokens, shape.dim, device=device, dtype=dtype) for _ in range(3))
        flops = 4 * shape.tokens**2 * shape.dim * shape.heads
        dense = {name: timed(run, device, 3 if options.smoke else 7) for name, run in dense_kernels(q, k, v).items()}
        best = min((ms["p50"] for ms in dense.values()), default=math.nan)
        for name, ms in dense.items():
            rows.append(
                {"shape": shape.name, "kernel": f"dense {name}", "density": 1.0, "ms": ms, "tflops": flops / ms["p50"] / 1e9}
            )
        tuned = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
        for target in DENSITIES:
            plan = random_plan(shape.tokens, BLOCK, target).to(device)
            density = float(plan.density())
            mask = plan.block_mask()
            runs: dict[tuple[str, str], Callable[[], Any]] = {
                (ours, kind): partial(block_attention, q, k, v, plan, rest=rest, backend=ours)
                for kind, rest in (("drop", Drop()), ("pool", Pool()))
            }
            if device.type == "cuda":
                pad = (0, 0, 0, plan.key_slots - shape.tokens)
                padded = [F.pad(x, pad) for x in (q, k, v)]
                runs["flex max-autotune", "drop"] = partial(tuned, *padded, block_mask=mask)
            for (name, kind), run in runs.items():
                ms = timed(run, device, 3 if options.smoke else 7)
                rows.append(
                    {
                        "shape": shape.name,
                        "kernel": name,
                        "rest": kind,
                        "density": density,
                        "ms": ms,
                        "tflops": density * flops / ms["p50"] / 1e9,
                        "speedup_over_best_dense": best / ms["p50"],
                    }
                )
                print(
                    f"{shape.name:26s} {name:18s} {kind} {density:.2f}: {ms['p50']:8.2f} ms, {rows[-1]['tflops']:6.1f} TFLOP/s"
                )
        if not options.smoke:  # after each shape, so that a run cut short leaves what it has
            write_json("gpu_block_attention", {**environment(), "block": BLOCK, "errors": errors, "rows": rows})


if __name__ == "__main__":
    with torch.no_grad():
        main()
