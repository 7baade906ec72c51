"""Whole runs of the bundled video model with and without repair: quality against the dense run, and time, paired by caption and seed.

usage: python -m benchmarks.repair_runs [--captions 5] [--seeds 0 1] [--grid small|demo] [--only NAME ...]

Every selector runs as it is, and repaired from so many exact rows of each head; beside them random blocks. All layers are sparse from a
quarter of the steps on. One tiny model of coloured shapes: it shows the direction of an effect.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import WanPipeline

import accelplug
from accelplug import zoo
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, agreement, foreground
from benchmarks.common import write_json
from benchmarks.demo_pareto import Random

GRIDS: dict[str, dict[str, Any]] = {
    "small": {
        "num_frames": 17,
        "height": 96,
        "width": 128,
        "num_inference_steps": 12,
        "guidance_scale": 3.0,
    },  # 1,728 tokens
    "demo": zoo.DEMO,  # 6,528 tokens
}
COMMON = {"block": 32, "rest": "pool", "backend": "blocked"}
SELECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "sol, tau 1": ("sol", {"tau": 1.0, "band": 1}),
    "sol, tau 1.5": ("sol", {"tau": 1.5, "band": 1}),
    "rows, .1": ("rows", {"density": 0.1}),
    "rows, .2": ("rows", {"density": 0.2}),
    "svg_ear, .2": ("svg_ear", {"block_k": 32, "density": 0.2, "order": "raster"}),
    "radial": ("radial", {}),
    "random, .2": (str(Random.name), {"density": 0.2}),
}
PROBES = {"small": (0, 64, 128), "demo": (0, 240, 480)}
"""Exact rows of each head: none, 3.7 % and 7.4 % of them."""

DRAWN = ("plans", "density", "errors", "choices")
"""What a page draws, and a file of figures does not need."""


def recipes(names: list[str], grid: str) -> dict[str, dict[str, Any]]:
    """By row: the selector's recipe, without repair and with each number of probes."""
    found = {}
    for name in names:
        patch, own = SELECTORS[name]
        for probes in PROBES[grid]:
            repair = {"repair": "output_query", "probes": probes} if probes else {}
            config = {**COMMON, **own, **repair}
            row = f"{name}, {probes} probes" if probes else name
            found[row] = {"rules": [{"where": {"steps": "0:25%"}, "patch": "dense"}, {"patch": patch, "with": config}]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--captions", type=int, default=5, help="of the held-out ones (default 5)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--grid", choices=GRIDS, default="small")
    parser.add_argument("--only", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    options = parser.parse_args()
    torch.set_num_threads(2)
    pipe = WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32)
    inputs = [{"prompt": caption, **GRIDS[options.grid]} for caption in HELD_OUT_CAPTIONS[: options.captions]]
    rows = recipes(options.only, options.grid)
    result = accelplug.compare(pipe, rows, inputs, options.seeds, foreground=foreground, detect=agreement, floors=False)
    print(result)
    data = result.to_dict()
    data["rows"] = [{key: value for key, value in row.items() if key not in DRAWN} for row in data["rows"]]
    write_json(f"repair_runs_{options.grid}", data)


if __name__ == "__main__":
    main()
