"""What becomes of unread blocks, seven ways, on the q, k, v of a real run of the bundled model, beside random blocks.

usage: python -m benchmarks.rest_layers [--grid demo|small] [--steps 9] [--setting NAME ...] [--block 64] [--carry]

Relative L2 error of the attention output (conditional branch), for each selector and each rest, as it is and repaired by 128 probes on
output and query; one table by layer, means over steps. Random blocks have the selector's order, block sizes, density, rest and repair. One
exact pass serves all rests of a plan. At the demo's grid one step is six calls, and about four minutes on two idle cores; the figures that
patches quote are of steps 5 and 13. The small grid has 1,728 tokens and 12 steps; blocks of 32 there are as large a share as 128 at the
demo's. The file is written after each setting.

With `--carry` it is what a repair gains from the steps before: calls of steps that follow each other (`--steps 3 4 5 6 7 8 9`), the rest
pooled, the error in the last of them by number of probes and by what the last step's count (`carry`), and the error that they estimate.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import torch
from diffusers import WanPipeline
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import accelplug
from accelplug import registry, zoo
from accelplug.call import AttentionCall, Clock, Site
from accelplug.comparison.environment import environment
from accelplug.kernels.attention import block_attention
from accelplug.kernels.linear import first_order
from accelplug.kernels.memory import Memory
from accelplug.kernels.plan import BlockPlan, Threshold, counted, pool
from accelplug.kernels.rectify import rectify
from accelplug.kernels.rest import Linear, Rectified, Slope, rectified, tied
from accelplug.patches.sparse.template import Blocks, Scored, ScoredConfig
from benchmarks.common import write_json
from benchmarks.demo_pareto import PROMPT, Capture, Place

COMMON = {"block": 64, "order": "gilbert", "rest": "drop"}
NARROW = {**COMMON, "block_k": 32}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "rectified 0.75": ("rectified", {**COMMON, "drop_rate": 0.75}),
    "rectified 0.9": ("rectified", {**COMMON, "drop_rate": 0.9}),
    "rectified 0.9, no neighbours": ("rectified", {**COMMON, "drop_rate": 0.9, "adjacent": False}),
    "psa": ("psa", NARROW),
    "psa, more exact": ("psa", {**NARROW, "bounds": [0.5, 0.6, 0.6, 0.8]}),
    "psa, topk 0.05": ("psa", {**NARROW, "rule": "topk", "bounds": [0.05, 0.1, 0.15, 0.25]}),
    "psa, topk 0.1": ("psa", {**NARROW, "rule": "topk", "bounds": [0.1, 0.15, 0.15, 0.35]}),
    "hierarchical": ("hierarchical", COMMON),
    "hierarchical, band 2": ("hierarchical", {**COMMON, "band": 2}),
    "sol": ("sol", COMMON),
    "sol, tau 1.5": ("sol", {**COMMON, "tau": 1.5}),
    "sol, least 3": ("sol", {**COMMON, "least": 3}),
    "sol, tau 1.5, least 3": ("sol", {**COMMON, "tau": 1.5, "least": 3}),
    "sol, subblock": ("sol", {**COMMON, "statistic": "subblock"}),
    "sol, subblock, tau 1.5": ("sol", {**COMMON, "statistic": "subblock", "tau": 1.5}),
    "rows 0.05": ("rows", {**COMMON, "density": 0.05}),
    "rows 0.1": ("rows", {**COMMON, "density": 0.1}),
    "rows 0.2": ("rows", {**COMMON, "density": 0.2}),
    "rows 0.1, 8 rows": ("rows", {**COMMON, "density": 0.1, "rows": 8}),
    "svg_ear": ("svg_ear", {"block": 64, "rest": "drop"}),
    "svg_ear, a budget for each head": ("svg_ear", {"block": 64, "rest": "drop", "density": 0.39}),
}


GRIDS: dict[str, dict[str, int]] = {
    "demo": {},
    "small": {"num_frames": 17, "height": 96, "width": 128, "num_inference_steps": 12},
}
REPAIR = {"repair": "output_query", "probes": 128}


class RandomConfig(ScoredConfig):
    """Knobs of `Random`."""

    density: float = 0.3


class Random(Scored):
    """Its own block and as many random ones as the density asks for, drawn for each head."""

    Config = RandomConfig
    config: RandomConfig

    def route(self, blocks: Blocks, **where: Any) -> BlockPlan:
        rows, keys = len(blocks.query_lengths), len(blocks.key_lengths)
        row = torch.arange(rows)[:, None] * blocks.block
        key = torch.arange(keys) * blocks.block_k
        own = (key < row + blocks.block) & (key + blocks.block_k > row)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(1, blocks.q.shape[1], rows, keys, generator=generator).masked_fill(own, 2.0)
        rank = drawn.argsort(-1, descending=True).argsort(-1)
        # A whole number of blocks for each row, right on average.
        number = torch.rand(1, blocks.q.shape[1], rows, 1, generator=generator) + self.config.density * keys
        return blocks.plan((rank < number.floor()) | own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", choices=GRIDS, default="demo", help="frames, height and width of the clip (default demo)")
    parser.add_argument("--steps", type=int, nargs="+", default=[9], help="diffusion steps, of 16, small 12 (default 9)")
    parser.add_argument("--block", type=int, default=64, help="slots per query block, and most per key block (default 64)")
    parser.add_argument("--carry", action="store_true", help="what a repair gains from the steps before")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="only these; repeat for several")
    options = parser.parse_args()
    torch.set_num_threads(2)
    Capture.steps = tuple(options.steps)
    pipe = WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        with accelplug.apply(pipe, Capture(), gate="off"):
            arguments = {**zoo.DEMO, **GRIDS[options.grid]}
            pipe(prompt=PROMPT, **arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
        where = {"grid": options.grid, "steps": options.steps, "block": options.block}
        facts, rows = {**environment(pipe), "prompt": PROMPT, **where}, []
        for name in options.setting or SETTINGS:
            patch, config = SETTINGS[name]
            sizes = {"block": options.block, "block_k": min(config.get("block_k", options.block), options.block)}
            rows += (carried if options.carry else errors)(name, patch, {**config, **sizes})
            file = "_".join(
                ["carry_layers" if options.carry else "rest_layers", *(["small"] if options.grid == "small" else [])]
            )
            write_json(file, {**facts, "rows": rows})
    if not options.carry:
        print_table(rows)


def carried(name: str, patch: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a layer, number of probes and carry: error of the last captured step, and its estimate.

    `rows` also has as many as it samples of blocks of 32, and these themselves (probes: None).
    """
    kind: Any = registry.patch_class(patch)
    config = {**config, "rest": "pool"}
    plain, answered = kind(config), []
    for place, call in sorted(Capture.calls.items(), key=lambda item: (item[0].layer, item[0].step)):
        params = plain.prepare(Site("", "transformer", "self", place.layer, 6), place.layout, Clock(place.step), {})
        exact = scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)
        answered.append((place, call, params, plain.attend(call, params), exact))
    rows: list[dict[str, Any]] = []
    for probes, carry in product((32, 64, 128, *((216, None) if patch == "rows" else ())), (0.0, 0.3, 0.5, 0.7)):
        method = kind({**config, **REPAIR, "probes": probes, "carry": carry})
        memories: dict[int, Memory] = defaultdict(Memory)
        last: dict[int, dict[str, Any]] = {}
        for place, call, params, out, exact in answered:
            memory, estimate = memories[place.layer], torch.zeros(())
            memory.advance(place.step)
            known = replace(call, error=estimate, ticket=memory.ticket)
            shared = probes is None
            mended = method.attend(known, params) if shared else method.repaired(out.clone(), known, params.tiles)
            error = float((mended - exact).norm() / exact.norm())
            where = {"setting": name, "layer": place.layer, "step": place.step, "probes": probes, "carry": carry}
            last[place.layer] = {**where, "error": error, "estimate": float(estimate)}
        rows += last.values()
        error, estimated = (statistics.fmean(row[key] for row in last.values()) for key in ("error", "estimate"))
        print(f"{name}: {probes} probes, carry {carry}: error {error:.4f}, estimate {estimated:.4f}", flush=True)
    return rows


def errors(name: str, patch: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a captured call and rest, and a printed line for each rest."""
    method = registry.patch_class(patch)({**config, **REPAIR})
    sizes = {key: config[key] for key in ("block", "block_k", "order") if key in config}
    rows: list[dict[str, Any]] = []
    for place, call in Capture.calls.items():
        exact = scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)
        density, mine = measured(method, call, place, exact)
        _, theirs = measured(Random({**sizes, **REPAIR, "density": density}), call, place, exact)
        where = {"setting": name, "layer": place.layer, "step": place.step, "density": density}
        rows += [
            {
                **where,
                "rest": rest,
                "error": plain,
                "repaired_error": repaired,
                "random_error": theirs[rest][0],
                "random_repaired_error": theirs[rest][1],
            }
            for rest, (plain, repaired) in mine.items()
        ]
    print(f"{name}: density {statistics.fmean(row['density'] for row in rows):.3f}")
    for rest in dict.fromkeys(row["rest"] for row in rows):
        part = [row for row in rows if row["rest"] == rest]
        error, random = (statistics.fmean(row[key] for row in part) for key in ("error", "random_error"))
        better = sum(row["error"] < row["random_error"] for row in part)
        print(f"  {rest:20s} error {error:.3f}  random {random:.3f}  better in {better} of {len(part)} calls", flush=True)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Error, and behind a stroke that after repair, by setting, rest and layer, and their means."""
    layers = sorted({row["layer"] for row in rows})
    print(f"{'setting':32s} {'rest':18s} density {'  '.join(f'layer {layer:<5d}' for layer in layers)}  mean")
    for setting, rest in dict.fromkeys((row["setting"], row["rest"]) for row in rows):
        part = [row for row in rows if (row["setting"], row["rest"]) == (setting, rest)]
        cells = []
        for some in (*([row for row in part if row["layer"] == layer] for layer in layers), part):
            cells.append(
                " / ".join(f"{statistics.fmean(row[key] for row in some):.3f}" for key in ("error", "repaired_error"))
            )
        print(f"{setting:32s} {rest:18s} {statistics.fmean(row['density'] for row in part):.3f}   {'  '.join(cells)}")


def measured(patch: Any, call: AttentionCall, place: Place, exact: Tensor) -> tuple[float, dict[str, tuple[float, float]]]:
    """Density of what is read, a mean counted as one key, and by rest the relative L2 errors, as it is and repaired."""
    params = patch.prepare(Site("", "transformer", "self", place.layer, 6), place.layout, Clock(place.step), {})
    blocks, plan = patch.laid_out(call, params)
    if isinstance(plan, Threshold):
        plan = plan.lower(blocks.q_pool, blocks.k_pool, blocks.scale)
    found = {}
    for rest, out in outputs(blocks, plan):
        out = blocks.q_tiles.unpermute(out)
        both = out, patch.repaired(out.clone(), call, blocks.q_tiles, plan)
        plain, repaired = (float((x - exact).norm() / exact.norm()) for x in both)
        found[rest] = plain, repaired
    return float(plan.density().mean()), found


def outputs(blocks: Blocks, plan: BlockPlan) -> Iterator[tuple[str, Tensor]]:
    """Attention with each rest, by name, from one exact pass."""
    q, k, v, scale = blocks.q, blocks.k, blocks.v, blocks.scale
    out, lse = block_attention(q, k, v, plan, scale=scale, backend="blocked", return_lse=True)
    yield "drop", out
    (k_pool, _), (v_pool, _) = (pool(x, plan.k_len, plan.block_k) for x in (k, v))
    far = scale * q @ k_pool.mT + counted(plan.k_len, plan.block_k).log()[:, :, None]
    far = far.masked_fill(~plan.at(0).repeat_interleave(plan.block_q, -2)[..., : q.shape[-2], :], -torch.inf)
    total = torch.logaddexp(lse, far.logsumexp(-1))[..., None]
    pooled = (lse[..., None] - total).exp() * out + (far - total).exp() @ v_pool
    yield "pool", pooled
    for slope in get_args(Slope):
        yield (
            f"linear, by {slope}",
            first_order(pooled.clone(), total[..., 0], q, k, v, plan, Linear(slope=slope), scale, None),
        )
    for rest, gain in (("rectified", True), ("rectified, no gain", False)):
        weighed = Rectified(*rectify(q, k, plan, blocks.k_tiles.visual_slots, scale, gain=gain))
        yield rest, rectified(weighed, out.clone(), v, plan, None)  # both write over the exact output
    yield "tied", tied(out, lse, q, k, v, plan, scale, None)


if __name__ == "__main__":
    main()
