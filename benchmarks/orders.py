"""What orders cost beside attention: permuting q, k, v and un-permuting the output, and k-means cold and warm.

Times are interleaved; a ratio is the median over repeats of one repeat's own ratio to dense attention.

usage: python -m benchmarks.orders
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from accelplug.call import Layout
from accelplug.comparison.environment import environment
from accelplug.kernels import curves
from accelplug.kernels.clusters import cluster_order
from accelplug.kernels.memory import COLD, Memory
from accelplug.kernels.orders import Order, Tiles, tiles
from benchmarks.common import write_json

CELLS = (  # grid, heads, head dimension, repeats, whether dense attention and k-means run too
    ((17, 16, 24), 2, 64, 15, True),  # the bundled model
    ((21, 30, 52), 12, 128, 5, False),  # Wan 2.1 1.3B at 480p: tokens moved only
)
GRIDS_THW = ((17, 16, 24), (21, 30, 52), (21, 45, 80), (33, 45, 80))
AXES: tuple[Order, ...] = ("thw", "twh", "hwt", "htw", "wht", "wth")


def milliseconds(run: Callable[[], object]) -> float:
    """Wall time of `run` in milliseconds."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def gather_take(x: Tensor, index: Tensor) -> Tensor:
    """Another way to pick by head than that of `Tiles`: torch.gather."""
    return x.gather(-2, index[None, ..., None].expand(-1, -1, -1, x.shape[-1]))


def there_and_back(order: Tiles, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Permute q, k and v, and un-permute one output."""
    slots = [order.permute(x) for x in (q, k, v)]
    return order.unpermute(slots[0])


def gather_there_and_back(order: Tiles, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same through `gather_take`."""
    slots = [gather_take(x, order.gather) for x in (q, k, v)]
    return gather_take(slots[0], order.scatter)


def cell(grid_thw: tuple[int, int, int], heads: int, dim: int, repeats: int, whole: bool) -> dict:
    """Time one shape, float32."""
    layout = Layout(grid_thw)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, layout.length, dim, generator=generator) for _ in range(3))
    shared, per_head = tiles(layout, "gilbert", 128), Tiles.per_head([tiles(layout, AXES[h % 6], 128) for h in range(heads)])
    runs: dict[str, Callable[[], object]] = {
        "shared": lambda: there_and_back(shared, q, k, v),
        "per_head": lambda: there_and_back(per_head, q, k, v),
        "per_head_by_gather": lambda: gather_there_and_back(per_head, q, k, v),
    }
    if whole:
        clusters = max(round(layout.visual / 252), 2), max(round(layout.visual / 75.6), 2)
        memories = Memory(), Memory()

        def kmeans(tickets: tuple[Tensor, Tensor]) -> None:
            for x, number, ticket in zip((q, k), clusters, tickets, strict=True):
                cluster_order(x, None, 0, layout.visual, number, 50, 2, ticket)

        warm = memories[0].ticket, memories[1].ticket
        kmeans(warm)
        for memory in memories:
            memory.advance(1)
        runs["kmeans_cold_50"] = lambda: kmeans((COLD, COLD))
        runs["kmeans_warm_2"] = lambda: kmeans(warm)
        runs["dense"] = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for run in runs.values():
        run()
    times = [{name: milliseconds(run) for name, run in runs.items()} for _ in range(repeats)]
    row = {"grid_thw": grid_thw, "tokens": layout.length, "heads": heads, "dim": dim, "dtype": "float32", "repeats": repeats}
    row["ms"] = {name: statistics.median(one[name] for one in times) for name in runs}
    baseline = "dense" if whole else "shared"
    row[f"of_{baseline}"] = {name: statistics.median(one[name] / one[baseline] for one in times) for name in runs}
    return row


def making(grid_thw: tuple[int, int, int]) -> dict:
    """Time the making of each curve, once per layout in use."""
    names = ("morton", "hilbert", "gilbert")
    times = {name: [milliseconds(partial(getattr(curves, name), grid_thw)) for _ in range(5)] for name in names}
    return {"grid_thw": grid_thw, "ms": {name: statistics.median(of) for name, of in times.items()}}


def main() -> None:
    torch.set_num_threads(2)
    rows = [cell(*shape) for shape in CELLS]
    made = [making(grid_thw) for grid_thw in GRIDS_THW]
    load = os.getloadavg()[0]  # more than the threads: others were at work, and times count for little
    write_json("orders", {**environment(), "threads": 2, "load": load, "moving": rows, "making": made})
    print(f"load {load:.1f} on {torch.get_num_threads()} threads")
    for row in rows:
        ratios = row.get("of_dense") or row.get("of_shared")
        for name, ms in row["ms"].items():
            print(f"{row['tokens']:6d} x {row['heads']:2d} x {row['dim']:3d}  {name:27s} {ms:9.1f} ms  {ratios[name]:7.3f}")
    for row in made:
        print(row["grid_thw"], {name: f"{ms:.0f} ms" for name, ms in row["ms"].items()})


if __name__ == "__main__":
    with torch.no_grad():
        main()
