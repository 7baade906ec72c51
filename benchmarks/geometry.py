"""Geometry transformers: what each patch gains on walks of 10 to 200 frames, and what it does to poses, depth and points.

usage: python -m benchmarks.geometry run [--frames 10 25 50 100 200] [--rooms 2] [--only NAME ...] [--repeats 1] [--random]
       python -m benchmarks.geometry show

`run` takes an idle machine, and adds its rows to results/geometry.json: one of each (frames, arm), which a later run replaces. Every arm is
timed between dense forwards of the same process, on rooms that the model never saw. `--random` measures time alone, by random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from accelplug.comparison import Walks, compare_walks
from accelplug.comparison.walks import FIGURES, WalkComparison
from accelplug.hosts.host import model_facts
from accelplug.recipe import load
from accelplug.show import as_text, jsonable, table
from accelplug.zoo.geometry import VGGT
from benchmarks.common import RESULTS, write_json
from benchmarks.zoo.train_geometry import SIZE, TARGET

NAME = "geometry"


def _arm(patch: str, **settings: Any) -> dict[str, Any]:
    return {"patch": patch, "with": settings}


ARMS: dict[str, Any] = {
    "avggt 1 x 2": _arm("avggt", window_hw=[1, 2]),
    "avggt 2 x 2": _arm("avggt", window_hw=[2, 2]),
    "avggt 3 x 3": _arm("avggt", window_hw=[3, 3]),
    "avggt 2 x 2, counted once": _arm("avggt", window_hw=[2, 2], count="none"),
    "avggt 2 x 2, windows alone": _arm("avggt", window_hw=[2, 2], own_key=False, mean_key=False),
    "fastvggt": _arm("fastvggt"),
    "fastvggt, counted once": _arm("fastvggt", count=False),
    "spark3r": _arm("spark3r"),
    "flashvggt 2": _arm("flashvggt", factor=2),
    "flashvggt 4": _arm("flashvggt", factor=4),
    "rows .2, pooled": _arm("rows", density=0.2, rest="pool", block=64),
    "sol": _arm("sol", tau=1.0, block=64),
    "tome .5": _arm("tome", ratio=0.5),
}
"""What is tried, by the names of rows."""


def run(frames: list[int], rooms: int, only: list[str] | None, repeats: int, random: bool) -> None:
    """Measure arms at each number of frames."""
    torch.manual_seed(0)
    model = VGGT().eval().requires_grad_(False) if random else VGGT.from_pretrained(TARGET)
    facts = model_facts(model)
    arms = {name: load(recipe, facts) for name, recipe in ARMS.items() if only is None or name in only}
    held = {(row["frames"], row["name"]): row for row in _stored()}
    for count in frames:
        found = compare_walks(model, arms, Walks(frames=[count], rooms=rooms, degrees=120.0, size=SIZE), repeats=repeats)
        print(found)
        shared = {"frames": count, "rooms": rooms, "repeats": repeats, "random": random, "environment": found.environment}
        held |= {(count, row["name"]): {**shared, **row} for row in _rows(found)}
    write_json(NAME, jsonable(sorted(held.values(), key=lambda row: (row["frames"], row["name"]))))


def _rows(found: WalkComparison) -> list[dict[str, Any]]:
    told = found.to_dict()["rows"]
    means = (
        {f"{of}_{name}": row.mean(of, name) for of in ("to_dense", "to_truth") for name in FIGURES} for row in found.rows
    )
    return [{**row, **mean} for row, mean in zip(told, means, strict=True)]


def _stored() -> list[dict[str, Any]]:
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text()) if path.is_file() else []


def show() -> None:
    """Print a table for each number of frames."""
    rows = _stored()
    for frames in sorted({row["frames"] for row in rows}):
        lines = table(f"{frames} frames", "arm", "ms", "speed-up", "density", *FIGURES.values(), "rotation °, truth")
        for row in (row for row in rows if row["frames"] == frames):
            ms = statistics.median(statistics.median(one["ms"]) for one in row["on"])
            density = "" if row["density"] is None else f"{row['density']:.3f}"
            far = [f"{row[f'to_dense_{name}']:.3f}" for name in FIGURES]
            lines.add_row(
                row["name"], f"{ms:.0f}", f"{row['gain']:.2f}x", density, *far, f"{row['to_truth_rotation_deg']:.2f}"
            )
        print(as_text(lines))


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run")
    command.add_argument("--frames", type=int, nargs="+", default=[10, 25, 50, 100, 200])
    command.add_argument("--rooms", type=int, default=2)
    command.add_argument("--only", nargs="+", choices=list(ARMS))
    command.add_argument("--repeats", type=int, default=1)
    command.add_argument("--random", action="store_true", help="random weights: times alone mean something")
    commands.add_parser("show")
    options = parser.parse_args()
    if options.command == "show":
        show()
    else:
        run(options.frames, options.rooms, options.only, options.repeats, options.random)


if __name__ == "__main__":
    main()
