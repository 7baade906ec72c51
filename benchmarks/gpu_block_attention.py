"""Block-sparse attention on a GPU at the lengths of real videos, beside the best dense attention and FlexAttention.

usage: python -m benchmarks.gpu_block_attention [--only KERNEL ...] [--resume] [--seconds 480] [--smoke]

Correctness against the float32 reference comes first; a kernel that fails it is not timed, and the row says so. One row per (shape,
density, kernel): milliseconds with 20/80 % quantiles, TFLOP/s on visited tiles, and the ratio to the fastest dense attention, which
takes turns with the kernels. The tiers of the Triton kernel are those of `triton_block.Tier`. "in 8 bits" leaves out the rounding.

FlexAttention is tuned anew for each shape, and comes last. After `--seconds` nothing is begun, and what was left out is said;
`--resume` keeps what the file has of the same device and versions and runs the rest, `--only` keeps the other kernels' rows.
`--smoke` runs the whole script at toy sizes on whatever device there is; on a CPU it wants TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from accelplug.comparison.environment import environment
from accelplug.kernels.attention import Backend, available_backends, block_attention
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.precision import Precision, ValuePrecision, quantised, shared_key
from accelplug.kernels.rest import Drop, Pool
from benchmarks.common import RESULTS, random_plan, write_json

if TYPE_CHECKING:
    from accelplug.kernels.triton_block import Tier

Run = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """One attention call: tokens, heads, head dimension; slots per block."""

    tokens: int
    heads: int
    dim: int
    block: int = 128


# Wan at 480p and 720p, HunyuanVideo at 720p with 129 frames; the work of 12 heads of 128 at both dimensions.
SHAPES = tuple(Shape(tokens, 1536 // dim, dim) for tokens in (75_600, 32_760, 119_056) for dim in (128, 64))
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
SMOKE = (Shape(100, 1, 32, 32),)
SMOKE_DENSITIES = (0.5,)


@dataclass(frozen=True)
class Kernel:
    """A way to attend to a plan: what it makes of q, k, v and the plan, and what the reference must do alike."""

    make: Callable[[Tensor, Tensor, Tensor, BlockPlan], Run]
    rest: Drop | Pool = Drop()  # noqa: RUF009  # it holds nothing
    precision: Precision = "native"
    values: ValuePrecision = "native"


def ours(
    backend: Backend,
    rest: Drop | Pool = Drop(),  # noqa: B008
    precision: Precision = "native",
    values: ValuePrecision = "native",
) -> Kernel:
    """`block_attention` as anyone calls it."""

    def make(*call: Any) -> Run:
        return partial(block_attention, *call, rest=rest, precision=precision, values=values, backend=backend)

    return Kernel(make, rest, precision, values)


def tiered(tier: Tier | None, precision: Precision = "native") -> Kernel:
    """The Triton kernel alone, of a tier, with queries and keys rounded beforehand."""
    from accelplug.kernels import triton_block

    def make(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Run:
        eight = None
        if precision != "native":
            eight = quantised(q, k, shared_key(k, plan, None), plan, precision, None)
        return lambda: triton_block.attend(q, k, v, plan, Drop(), q.shape[-1] ** -0.5, None, False, eight, tier=tier)[0]

    return Kernel(make, Drop(), precision)


def tuned_flex(smoke: bool) -> Kernel:
    """FlexAttention with max-autotune; compiled without it in a smoke run."""
    run = torch.compile(flex_attention, dynamic=False, mode=None if smoke else "max-autotune-no-cudagraphs")

    def make(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Run:
        padded = [F.pad(x, (0, 0, 0, plan.key_slots - x.shape[-2])) for x in (q, k, v)]
        call = partial(run, *padded, block_mask=plan.block_mask())  # type: ignore[misc,arg-type]  # three tensors
        return lambda: call()[..., : q.shape[-2], :]

    return Kernel(make)


def kernels(smoke: bool, device: torch.device) -> dict[str, Kernel]:
    """What is timed, by name, in this order."""
    found = {
        "triton": ours("triton"),
        "triton pool": ours("triton", Pool()),
        **{f"triton {tier}": tiered(tier) for tier in ("pointers", "keys", "whole")},
        **{f"triton {eight}": ours("triton", precision=eight) for eight in ("int8", "fp8")},
        "triton int8, values int8": ours("triton", precision="int8", values="int8"),
        **{f"triton in 8 bits, {eight}": tiered(None, eight) for eight in ("int8", "fp8")},
    }
    missing = available_backends(device)
    others: tuple[Backend, ...] = ("flash", "cudnn")
    found |= {name: ours(name) for name in others if missing[name] is None}
    return {**found, "flex max-autotune": tuned_flex(smoke)}


LAST = "flex max-autotune"
WHOLE = ("triton", "triton whole", LAST)
"""Kernels that are timed at density 1 too."""


def error(kernel: Kernel, device: torch.device, dtype: torch.dtype, smoke: bool) -> float:
    """Return the largest error against the reference over ragged calls; the reference rounds where the kernel does."""
    worst = 0.0
    for dim in (32,) if smoke else (64, 128):
        tokens, block = (70, 32) if smoke else (1000, 128)
        q, k, v = (torch.randn(1, 2, tokens, dim, device=device, dtype=dtype) for _ in range(3))
        plan = random_plan(tokens, block, 0.4).to(device)
        how: dict[str, Any] = {"rest": kernel.rest, "precision": kernel.precision, "values": kernel.values}
        expected = block_attention(q, k, v, plan, **how, backend="reference")
        worst = max(worst, float((kernel.make(q, k, v, plan)().float() - expected.float()).abs().max()))
    return worst


def turns(runs: Mapping[str, Run], device: torch.device, repeats: int, warm: int = 2) -> dict[str, list[float]]:
    """Milliseconds of each, taken in turns, after `warm` turns that do not count."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm + repeats):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if turn >= warm:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Median and 20/80 % quantiles."""
    if len(times) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), times[0])
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
    return {"p20": low, "p50": statistics.median(times), "p80": high}


def dense_kernels(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Run]:
    """The dense kernels of torch that run here, by name."""

    def sdpa(kernel: SDPBackend) -> Run:
        def run() -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    found = {}
    for name, kernel in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            sdpa(kernel)()
        except RuntimeError as reason:
            print(f"dense {name} does not run here: {str(reason).splitlines()[0]}")
            continue
        found[f"dense {name}"] = sdpa(kernel)
    return found


class Bench:
    """The rows, and what is still to be run."""

    def __init__(self, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        self.options, self.device, self.dtype = options, device, dtype
        self.facts = environment()
        self.kernels = {k: x for k, x in kernels(options.smoke, device).items() if not options.only or k in options.only}
        self.repeats, self.warm = (1, 0) if options.smoke else (7, 2)
        self.start, self.errors = time.monotonic(), dict[str, float]()
        self.rows = self._kept() if options.resume or options.only else []
        if not options.resume:
            self.rows = [
                row for row in self.rows if row["kernel"] not in self.kernels and not row["kernel"].startswith("dense")
            ]

    def _kept(self) -> list[dict[str, Any]]:
        """The file's rows, if they are of this device and these versions."""
        path = RESULTS / "gpu_block_attention.json"
        there = json.loads(path.read_text()) if path.exists() and not self.options.smoke else {}
        return there["rows"] if all(there.get(key) == self.facts[key] for key in ("device", "versions")) else []

    def check(self) -> None:
        """Leave out kernels that are wrong or do not run, with a row that says why."""
        for name, kernel in list(self.kernels.items()):
            try:
                self.errors[name] = error(kernel, self.device, self.dtype, self.options.smoke)
                reason = None if self.errors[name] < 0.03 else f"off by {self.errors[name]:.3f} from the reference"
            except Exception as failure:  # a compiler, a driver: whatever it is, the others go on
                reason = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
            if reason is not None:
                print(f"{name} is not timed: {reason}", flush=True)
                self.rows.append({"kernel": name, "failed": reason})
                del self.kernels[name]
        print("largest error against the reference:", {name: f"{x:.1e}" for name, x in self.errors.items()}, flush=True)

    def run(self, shape: Shape, last: bool) -> None:
        """Time one shape: FlexAttention if `last`, all others if not."""
        wanted = [name for name in self.kernels if (name == LAST) == last]
        done = {_key(row) for row in self.rows}
        densities = SMOKE_DENSITIES if self.options.smoke else DENSITIES
        sized = (1, shape.heads, shape.tokens, shape.dim)
        q, k, v = (torch.randn(sized, device=self.device, dtype=self.dtype) for _ in range(3))
        dense = dense_kernels(q, k, v)
        for target in (*densities, 1.0):
            names = [name for name in wanted if (target < 1 or name in WHOLE)]
            names = [name for name in names if (shape.tokens, shape.dim, name, target) not in done]
            if not names:
                continue
            if time.monotonic() - self.start > self.options.seconds:
                print(f"out of time: {shape} at density {target} was left out: {', '.join(names)}", flush=True)
                continue
            plan = random_plan(shape.tokens, shape.block, target).to(self.device)
            runs = {**dense, **{name: self.kernels[name].make(q, k, v, plan) for name in names}}
            times = turns(runs, self.device, self.repeats, self.warm)
            if best := min(dense, key=lambda name: statistics.median(times[name]), default=None):
                dense = {best: dense[best]}  # the others have been timed once
            for name, ms in times.items():
                density = 1.0 if name in runs and name.startswith("dense") else float(plan.density())
                row = {**vars(shape), "kernel": name, "target": target, "density": density, "ms": spread(ms)}
                row["tflops"] = density * 4 * shape.tokens**2 * shape.dim * shape.heads / row["ms"]["p50"] / 1e9
                if best:
                    row |= {
                        "dense": best,
                        "over_dense": statistics.median(b / a for a, b in zip(ms, times[best], strict=True)),
                    }
                key = (row["tokens"], row["dim"], name, target)
                self.rows = [old for old in self.rows if _key(old) != key] + [row]
                over = f", {row['over_dense']:.2f}x of {best}" if best else ""
                print(
                    f"{shape.tokens:7d} x {shape.heads:2d} x {shape.dim:3d} {name:24s} {density:.2f}: {row['ms']['p50']:8.2f} ms, "
                    f"{row['tflops']:6.1f} TFLOP/s{over}",
                    flush=True,
                )

    def write(self) -> None:
        """Write what there is, so that a run cut short leaves it."""
        if not self.options.smoke:
            write_json("gpu_block_attention", {**self.facts, "errors": self.errors, "rows": self.rows})


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row.get("tokens"), row.get("dim"), row["kernel"], row.get("target")


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="a kernel by name; repeat for several")
    parser.add_argument("--resume", action="store_true", help="keep what the file has, and run the rest")
    parser.add_argument("--seconds", type=float, default=480, help="begin nothing after so many (default 480)")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, nothing written")
    options = parser.parse_args(arguments)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type == "cpu" and not options.smoke:
        raise SystemExit("There is no GPU here; try --smoke.")
    if (reason := available_backends(device)["triton"]) is not None:
        raise SystemExit(f"The Triton kernel cannot run: {reason}.")
    known = kernels(options.smoke, device)
    if unknown := set(options.only or ()) - set(known):
        raise SystemExit(f"There is no kernel {', '.join(sorted(unknown))}. There are: {', '.join(known)}.")
    bench = Bench(options, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    with torch.no_grad():
        bench.check()
        for last in (False, True):
            for shape in SMOKE if options.smoke else SHAPES:
                bench.run(shape, last)
                bench.write()
    return bench.rows


if __name__ == "__main__":
    main()
