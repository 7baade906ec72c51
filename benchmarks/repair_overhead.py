"""What repair and the choice of blocks by sampled rows cost, as a share of dense attention, by size.

usage: python -m benchmarks.repair_overhead

Times of `rows` choosing key blocks (4 rows of each block of 64), of that with the same rows as repair's probes, and of repair with probes
of its own: computing them, the fit and the update, on output and query; beside them the fit and the update alone. Each run is held
against dense attention, torch's SDPA, of the same round; medians of these ratios with 20/80 % quantiles. Made-up queries, keys and
values, as hosts hand them in: (B, S, H, D) seen as (B, H, S, D).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.comparison.environment import environment
from accelplug.comparison.rows import Quantiles
from accelplug.kernels.repair import Probes, probe_rows, repair_
from accelplug.patches.sparse.rows import SampledRows
from benchmarks.common import write_json

GRIDS = {1728: (9, 12, 16), 6528: (17, 16, 24), 16320: (17, 24, 40)}
WIDTHS = (64, 128)
CHANNELS = {1728: 256, 6528: 256, 16320: 128}
"""Of all heads together, by tokens."""
PROBES = (64, 128, 256)
ROUNDS = 9
SITE = Site("blocks.0.attn1", "transformer", "self", 0, 1)


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def call_of(tokens: int, width: int) -> AttentionCall:
    """A call of made-up tensors."""
    heads = CHANNELS[tokens] // width
    q, k, v = (torch.randn(1, tokens, heads, width).transpose(1, 2) for _ in range(3))

    def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v, attn_mask: Tensor | None = None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask)

    return AttentionCall(q, k, v, None, width**-0.5, dense)


def runs_of(tokens: int, width: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    call, layout = call_of(tokens, width), Layout(GRIDS[tokens])
    out = call.dense()
    repaired = {"repair": "output_query"}
    plain, shared = SampledRows({}), SampledRows(repaired)
    params: Any = plain.prepare(SITE, layout, Clock(), {})

    def both() -> None:
        blocks, plan = shared.laid_out(call, params)
        shared.repaired(out, call, params.tiles, plan, *blocks.probes)

    runs: dict[str, Callable[[], object]] = {
        "dense": call.dense,
        "rows": partial(plain.laid_out, call, params),
        "rows, repair by the same": both,
    }
    for number in PROBES:
        rows = probe_rows(0, tokens, number)
        probes = Probes(rows, call.dense(call.q[..., rows, :]))
        runs[f"repair, {number} probes"] = partial(
            SampledRows({**repaired, "probes": number}).repaired, out, call, params.tiles
        )
        runs[f"repair, {number} probes that are known"] = partial(repair_, out, call.q, probes)
    runs["repair, 128 probes that are known, on output alone"] = partial(
        repair_, out, call.q, Probes(probe_rows(0, tokens, 128), out[..., :128, :].clone()), on_query=False
    )
    return runs


def main() -> None:
    torch.set_num_threads(2)
    rows = []
    for tokens in GRIDS:
        for width in WIDTHS:
            runs = runs_of(tokens, width)
            times: dict[str, list[float]] = {name: [] for name in runs}
            for run in runs.values():
                run()
            for _ in range(ROUNDS):
                for name, run in runs.items():
                    times[name].append(milliseconds(run))
            dense = times.pop("dense")
            where = {"tokens": tokens, "heads": CHANNELS[tokens] // width, "head_dim": width, "dtype": "float32"}
            print(f"{tokens} tokens, {where['heads']} heads of {width}: dense {Quantiles.of(dense).p50:.1f} ms", flush=True)
            for name, values in times.items():
                share = Quantiles.of([ms / whole for ms, whole in zip(values, dense, strict=True)])
                ms = Quantiles.of(values).p50
                rows.append({**where, "what": name, "ms": ms, "dense_ms": Quantiles.of(dense).p50, "share": asdict(share)})
                print(
                    f"  {name:52s} {100 * share.p50:5.1f} %  ({100 * share.p20:.1f} to {100 * share.p80:.1f}), {ms:.2f} ms"
                )
    write_json("repair_overhead", {**environment(), "rounds": ROUNDS, "rows": rows})


if __name__ == "__main__":
    with torch.no_grad():
        main()
