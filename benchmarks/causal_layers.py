"""What repair does to a language model's causal attention: error of the output by layer on SmolLM2-135M's q, k, v, over density.

usage: python -m benchmarks.causal_layers TEXT [--tokens 2048] [--layers 0 5 10 15 20 25]

Needs `accelplug fetch smollm2-135m`. Past blocks of 64 keys are read whole, pooled or dropped; the diagonal one is read by token. A query
block reads so large a share of those behind it: the likeliest by the scores of means, by four sampled rows of it, or at random; the first
and the last always. Density counts the pairs that are read, means too, of those that are behind. The exact rows of a repair tell rows ahead
of them of what comes later, which a model that writes on may not know: this says what it would bring, and no patch has it.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from accelplug import zoo
from accelplug.comparison.environment import environment
from accelplug.kernels.attention import block_attention
from accelplug.kernels.plan import BlockPlan, pool
from accelplug.kernels.repair import Probes, probe_rows, repair_
from accelplug.kernels.rest import Drop, Pool
from benchmarks.common import write_json

BLOCK = 64
DENSITIES = (0.1, 0.2, 0.4)
PROBES = (0, 128, 256)


def scores(selector: str, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return what a query block thinks of each key block, (1, H, N, N); those behind it count."""
    blocks = q.shape[-2] // BLOCK
    lengths = torch.full((blocks,), BLOCK)
    if selector == "random":
        return torch.rand(1, q.shape[1], blocks, blocks, generator=torch.Generator().manual_seed(0))
    if selector == "means":
        return pool(q, lengths, BLOCK)[0] @ pool(k, lengths, BLOCK)[0].mT
    rows = torch.arange(blocks)[:, None] * BLOCK + torch.tensor([7, 23, 39, 55])
    logits = scale * q[:, :, rows.flatten()] @ k.mT
    logits = logits.masked_fill(rows.flatten()[:, None] < torch.arange(q.shape[-2]), -torch.inf)
    mass = logits.softmax(-1).unflatten(-1, (blocks, BLOCK)).sum(-1)
    return mass.unflatten(-2, (blocks, 4)).mean(-2)


def planned(score: Tensor, density: float) -> BlockPlan:
    """Return the plan that reads so large a share of the blocks behind each, its own, the one before and the first."""
    blocks = score.shape[-1]
    behind = torch.ones(blocks, blocks, dtype=torch.bool).tril(-1)
    number = (density * torch.arange(blocks)).ceil()[:, None]
    rank = score.masked_fill(~behind, -torch.inf).argsort(-1, descending=True).argsort(-1)
    near = torch.eye(blocks, dtype=torch.bool) | torch.eye(blocks, dtype=torch.bool).roll(1, 1).T
    members = (rank < number) & behind | near | (torch.arange(blocks) == 0)
    lengths = torch.full((blocks,), BLOCK, dtype=torch.int32)
    return BlockPlan.from_members(members, lengths, lengths, BLOCK, BLOCK, causal=0)


def measured(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[dict[str, Any]]:
    """One row a selector, rest, density and number of exact rows."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    exact = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    found = []
    for selector, density in product(("means", "rows", "random"), DENSITIES):
        plan = planned(scores(selector, q, k, scale), density)
        for rest in (Pool(), Drop()):
            out = block_attention(q, k, v, plan, rest=rest, scale=scale, backend="blocked")
            for probes in PROBES:
                mended = out
                if probes:
                    rows = probe_rows(0, q.shape[-2], probes)
                    mended = out.clone()
                    repair_(mended, q, Probes(rows, exact[..., rows, :]))
                error = float((mended - exact).norm() / exact.norm())
                read = float(plan.density(rest=isinstance(rest, Pool)).mean())
                row = {"layer": layer, "selector": selector, "rest": type(rest).__name__.lower(), "share": density}
                found.append({**row, "density": round(read, 4), "probes": probes, "error": round(error, 4)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--tokens", type=int, default=2048, help="of its beginning, a multiple of 64 (default 2048)")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 5, 10, 15, 20, 25], help="of 30")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(zoo.path("smollm2-135m"), dtype=torch.float32).eval()
    found: list[dict[str, Any]] = []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        if module.layer_idx in options.layers:
            found.extend(measured(module.layer_idx, q, k, v, scaling))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("benchmark", attend)
    model.set_attn_implementation("benchmark")
    ids = AutoTokenizer.from_pretrained(zoo.path("smollm2-135m"))(options.text.read_text()[: 8 * options.tokens]).input_ids
    with torch.no_grad():
        model(torch.tensor([ids[: options.tokens]]))
    write_json("causal_layers", {**environment(), "tokens": options.tokens, "text": options.text.name, "rows": found})
    print("| selector | rest | density | " + " | ".join(f"{probes} exact rows" for probes in PROBES) + " |")
    print("|---" * (3 + len(PROBES)) + "|")
    for selector, rest, share in product(("means", "rows", "random"), ("pool", "drop"), DENSITIES):
        mine = [row for row in found if (row["selector"], row["rest"], row["share"]) == (selector, rest, share)]
        errors = (statistics.fmean(row["error"] for row in mine if row["probes"] == probes) for probes in PROBES)
        cells = [selector, rest, *(f"{x:.3f}" for x in (statistics.fmean(row["density"] for row in mine), *errors))]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
