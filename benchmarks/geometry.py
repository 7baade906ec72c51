"""Geometry transformers: what each patch gains on walks of 10 to 200 frames, and what it does to poses, depth and points.

usage: python -m benchmarks.geometry quality [--frames 10 25 50 100 200] [--rooms 3] [--only NAME ...]
       python -m benchmarks.geometry time [--frames 10 25 50 100 200] [--only NAME ...] [--random]
       python -m benchmarks.geometry show

Rooms are such as the model never saw; the camera goes a third of a turn. `quality` may run on a busy machine; `time` takes an idle
one: every arm is timed between dense forwards of the same process, and beside them a forward in which global attention hands its
values on, below whose time no patch can go. Each adds to results/geometry.json, one row of each (frames, arm), which a later run
replaces. `--random` times random weights. `show` prints tables, the growth of time with frames, and how far an arm's errors are above
dense ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from math import log
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

import accelplug
from accelplug import zoo
from accelplug.comparison import Walks, compare_walks
from accelplug.comparison.walks import FIGURES, Walk, deviation_of, reconstruction_of
from accelplug.hosts.host import model_facts
from accelplug.kernels.timing import timed_ms
from accelplug.recipe import load
from accelplug.show import as_text, jsonable, table
from accelplug.zoo.geometry import VGGT
from accelplug.zoo.rooms import rays
from benchmarks.common import RESULTS, write_json
from benchmarks.zoo.train_geometry import SIZE

NAME, DENSE, SKIPPED = "geometry", "dense", "no global attention"
FRAMES, ARC = (10, 25, 50, 100, 200), 120.0


def _arm(patch: str, **settings: Any) -> dict[str, Any]:
    return {"patch": patch, "with": settings}


ARMS: dict[str, Any] = {
    "avggt 1 x 2": _arm("avggt", window_hw=[1, 2]),
    "avggt 2 x 2": _arm("avggt", window_hw=[2, 2]),
    "avggt 2 x 2, mean counted once": _arm("avggt", window_hw=[2, 2], count="none"),
    "avggt 2 x 2, all layers": _arm("avggt", window_hw=[2, 2], frame_layers=0, dense_layers=0),
    "avggt 3 x 3, all layers": _arm("avggt", window_hw=[3, 3], frame_layers=0, dense_layers=0),
    "fastvggt": _arm("fastvggt"),
    "fastvggt, one match for 3 layers": _arm("fastvggt", reuse_layers=3),
    "spark3r": _arm("spark3r"),
    "spark3r, all queries": _arm("spark3r", query_ratio=0.0),
    "flashvggt 2": _arm("flashvggt", factor=2),
    "flashvggt 3": _arm("flashvggt", factor=3),
    "flashvggt 3, own frame": _arm("flashvggt", factor=3, own=True),
    "rows .2, pooled": _arm("rows", density=0.2, rest="pool", block=64),
    "tome .5": _arm("tome", ratio=0.5),
}
"""What is tried, by the names of rows."""


def _model(random: bool) -> VGGT:
    torch.manual_seed(0)
    return VGGT().eval().requires_grad_(False) if random else VGGT.from_pretrained(zoo.path("vggt-boxes"))


@torch.no_grad()
def quality(frames: list[int], rooms: int, only: list[str] | None) -> None:
    """Tell how far each arm is from dense, and from the truth, mean over rooms."""
    model, known = _model(False), rays(*SIZE).view(*SIZE, 3)
    for count in frames:
        far: dict[str, list[dict[str, float]]] = {}
        for walk in Walks(frames=[count], rooms=rooms, degrees=ARC, size=SIZE).walks:
            assert walk.truth is not None
            dense = reconstruction_of(model(walk.pictures[None]), known)
            for name, arm in {DENSE: None, **_chosen(only)}.items():
                with nullcontext() if arm is None else accelplug.apply(model, {"rules": [arm]}, gate="off", strict=True):
                    found = reconstruction_of(model(walk.pictures[None]), known)
                told = {"to_dense": asdict(deviation_of(found, dense)), "to_truth": asdict(deviation_of(found, walk.truth))}
                far.setdefault(name, []).append({f"{of}_{k}": v for of, each in told.items() for k, v in each.items()})
        means = {name: {key: statistics.fmean(one[key] for one in each) for key in each[0]} for name, each in far.items()}
        _keep({(count, name): {"rooms": rooms, **mean} for name, mean in means.items()})
    show()


def time(frames: list[int], only: list[str] | None, random: bool) -> None:
    """Time arms at each number of frames, and a forward without global attention."""
    model = _model(random)
    facts = model_facts(model)
    arms = {name: load(arm, facts) for name, arm in _chosen(only).items()}
    for count in frames:
        walks, repeats = Walks(frames=[count], rooms=1, degrees=ARC, size=SIZE), 1 if count > 100 else 3
        found = compare_walks(model, arms, walks, repeats=repeats)
        print(found)
        shared = {"repeats": repeats, "random": random, "environment": found.environment}
        rows: dict[str, dict[str, Any]] = {
            row.name: {"ms": row.on[0].ms, "dense_ms": row.on[0].dense_ms, "gain": row.gain, "density": row.density}
            | {"peak_mib": row.peak_mib, "notes": row.notes}
            for row in found.rows
        }
        ms = _without_global(model, walks.walks[0], repeats)
        rows[SKIPPED] = {"ms": ms, "gain": statistics.median(rows[DENSE]["ms"]) / statistics.median(ms), "density": 0.0}
        _keep({(count, name): {**shared, **row} for name, row in rows.items()})
    show()


def _chosen(only: list[str] | None) -> dict[str, Any]:
    return {name: arm for name, arm in ARMS.items() if only is None or name in only}


@torch.no_grad()
def _without_global(model: VGGT, walk: Walk, repeats: int) -> list[float]:
    """Milliseconds of forwards in which global attention hands its values on."""
    with _values_handed_on(model):
        return [timed_ms(lambda: model(walk.pictures[None]), torch.device("cpu"))[1] for _ in range(1 + repeats)][1:]


@contextmanager
def _values_handed_on(model: VGGT) -> Iterator[None]:
    """Have global blocks take values for what attention would give."""

    class HandedOn(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            return args[2] if func is scaled_dot_product_attention else func(*args, **(kwargs or {}))

    def skipping(attn: Any) -> Any:
        stock = attn.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with HandedOn():
                return stock(*args, **kwargs)

        return forward

    modules: list[Any] = [block.attn for block in model.aggregator.global_blocks]
    for attn in modules:
        attn.forward = skipping(attn)
    try:
        yield
    finally:
        for attn in modules:
            del attn.forward


# --------------------------------------------------------------------------------------------------------------- results


def _stored() -> dict[tuple[int, str], dict[str, Any]]:
    path = RESULTS / f"{NAME}.json"
    return {(row["frames"], row["name"]): row for row in json.loads(path.read_text())} if path.is_file() else {}


def _keep(found: dict[tuple[int, str], dict[str, Any]]) -> None:
    """Add what was found to the rows that are there."""
    rows = _stored()
    for (frames, name), row in found.items():
        rows[frames, name] = {"frames": frames, "name": name, **rows.get((frames, name), {}), **row}
    write_json(NAME, jsonable([rows[key] for key in sorted(rows)]))


def show() -> None:
    """Print a table for each number of frames, and the growth of time."""
    rows = _stored()
    for frames in sorted({frames for frames, _ in rows}):
        here = {name: row for (count, name), row in rows.items() if count == frames}
        truth = [f"{heading}, truth" for heading in FIGURES.values()]
        lines = table(
            f"{frames} frames", "arm", "ms", "speed-up", "density", "peak MiB", *FIGURES.values(), *truth, "poses / dense"
        )
        for name, row in here.items():
            ms = f"{statistics.median(row['ms']):.0f}" if "ms" in row else ""
            far = [row.get(f"{of}_{key}") for of in ("to_dense", "to_truth") for key in FIGURES]
            lines.add_row(
                name,
                ms,
                _told(row.get("gain"), ".2f"),
                _told(row.get("density"), ".3f"),
                _told(row.get("peak_mib"), ".0f"),
                *(_told(value, ".3f") for value in far),
                _told(above_dense(row, here.get(DENSE, {})), ".2f"),
            )
        print(as_text(lines))
    print(
        "\n".join(f"{name}: time grows as frames^{growth_of(rows, name):.2f}" for name in {name: None for _, name in rows})
    )


def _told(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def above_dense(row: dict[str, Any], dense: dict[str, Any]) -> float | None:
    """Pose error against the truth over that of the dense model, the larger of rotation and direction."""
    keys = [f"to_truth_{key}" for key in ("rotation_deg", "direction_deg")]
    if not all(key in each for each in (row, dense) for key in keys):
        return None
    return max(row[key] / dense[key] for key in keys)


def growth_of(rows: dict[tuple[int, str], dict[str, Any]], arm: str) -> float:
    """Exponent p of time that grows as frames^p, by least squares over what was timed; NaN for fewer than two numbers of frames."""
    timed = [
        (log(frames), log(statistics.median(row["ms"])))
        for (frames, name), row in rows.items()
        if name == arm and "ms" in row
    ]
    return statistics.linear_regression(*zip(*timed, strict=True)).slope if len(timed) > 1 else float("nan")


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for called in ("quality", "time"):
        command = commands.add_parser(called)
        command.add_argument("--frames", type=int, nargs="+", default=list(FRAMES))
        command.add_argument("--only", nargs="+", choices=list(ARMS))
        if called == "quality":
            command.add_argument("--rooms", type=int, default=3)
        else:
            command.add_argument("--random", action="store_true", help="random weights: times alone mean something")
    commands.add_parser("show")
    options = parser.parse_args()
    if options.command == "quality":
        quality(options.frames, options.rooms, options.only)
    elif options.command == "time":
        time(options.frames, options.only, options.random)
    else:
        show()


if __name__ == "__main__":
    main()
