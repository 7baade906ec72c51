"""What 8 bits cost: error of attention on DINOv2's q, k, v by layer, with queries and keys, values and probabilities rounded.

usage: python -m benchmarks.eight_bits PICTURE... [--pixels 448]

Needs `accelplug fetch dinov2-small`. Relative L2 error of the output over all patches, every key read, blocks of 64. Beside
`values: int8`, whose probabilities have a step a row and tile, two coarser steps, written out here: PAROAttention's, one a tile of 64 x 64,
and its release's, a 127th of what the online softmax has seen as a row's largest so far.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from accelplug.call import AttentionCall
from accelplug.comparison.environment import environment
from accelplug.kernels.attention import block_attention
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.precision import TILE
from benchmarks.common import write_json
from benchmarks.repair_layers import PATCH, Model, squared

HOW: dict[str, dict[str, Any]] = {
    "precision int8": {"precision": "int8"},
    "precision fp8": {"precision": "fp8"},
    "values int8": {"values": "int8"},
    "both int8": {"precision": "int8", "values": "int8"},
}
COARSER = ("values int8, a step a tile", "values int8, 127ths of the largest so far")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--pixels", type=int, default=448, help=f"a multiple of {8 * PATCH}")
    asked = parser.parse_args()
    model, errors = Model(), {name: [list[float]() for _ in asked.pictures] for name in (*HOW, *COARSER)}
    with torch.inference_mode():
        for number, picture in enumerate(asked.pictures):

            def answer(layer: int, call: AttentionCall, number: int = number) -> Tensor:
                for name, error in measured(call).items():
                    errors[name][number].append(round(error, 5))
                return call.dense()

            model.features(squared(picture, asked.pixels), answer)
    for name, pictures in errors.items():
        print(f"{name:45s} {'  '.join(f'{fmean(layers):.4f}' for layers in pictures)}")
    write_json("eight_bits", {"environment": environment(), "pixels": asked.pixels, "errors": errors})


def measured(call: AttentionCall) -> dict[str, float]:
    """Relative errors of one call, the class token left out."""
    q, k, v = (x[:, :, 1:].contiguous() for x in (call.q, call.k, call.v))
    blocks = q.shape[-2] // TILE
    lengths = torch.full((blocks,), TILE, dtype=torch.int32)
    plan = BlockPlan.from_members(torch.ones(blocks, blocks, dtype=torch.bool), lengths, lengths, TILE, TILE)
    logits = call.scale * q @ k.mT
    exact = logits.softmax(-1) @ v
    found = {name: block_attention(q, k, v, plan, scale=call.scale, backend="reference", **how) for name, how in HOW.items()}
    step = v.abs().amax(-2, keepdim=True) / 127
    values = (v / step).round() * step
    tiles = logits.unflatten(-1, (-1, TILE))  # [B, H, S, N, 64]
    top = tiles.amax(-1, keepdim=True).cummax(-2).values  # of a row so far
    share, weight = (tiles - top).exp(), (top - logits.logsumexp(-1)[..., None, None]).exp()
    of_tile = share.unflatten(2, (-1, TILE)).amax((3, 5)).repeat_interleave(TILE, 2)[..., None]  # [B, H, S, N, 1]
    for name, largest in zip(COARSER, (of_tile, torch.ones_like(of_tile)), strict=True):
        rounded = (share / largest * 127).round() / 127 * largest * weight
        found[name] = rounded.flatten(-2) @ values
    return {name: float((out - exact).norm() / exact.norm()) for name, out in found.items()}


if __name__ == "__main__":
    main()
