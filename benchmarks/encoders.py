"""Image encoders: what each patch gains in a forward of DINOv2-small, and what it does to the features, by the size of the picture.

usage: python -m benchmarks.encoders run [--size 1008] [--images FILE ...] [--only NAME ...] [--repeats 2] [--no-matching]
       python -m benchmarks.encoders cosines [the same]
       python -m benchmarks.encoders show

`run` takes an idle machine, and adds its rows to results/encoders.json: one of each (size, arm), which a later run replaces. Every arm is
timed between dense forwards of the same process. `cosines` tells no times, for a busy machine, in results/encoder_cosines.json. `show`
prints what was measured as tables, and draws docs/encoders.png (by matplotlib, of the bench extra). The weights come by `accelplug fetch
dinov2-small`. Without --images the pictures are drawn scenes, on which features differ less.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import Dinov2Model

from accelplug import zoo
from accelplug.comparison import Pictures, compare_features
from accelplug.hosts.host import model_facts
from accelplug.recipe import load
from accelplug.show import as_text, jsonable, table
from benchmarks.common import RESULTS, write_json

NAME = "encoders"
COSINES = "encoder_cosines"
UNTIMED = ("name", "density", "cosine", "worst_picture", "worst_patch", "matched")
"""What a row of a busy machine tells."""
PICTURE = Path(__file__).parents[1] / "docs" / "encoders.png"
TILED = {"block": 64, "order": "tile", "tile_thw": [1, 8, 8]}


def _arm(patch: str, **settings: Any) -> dict[str, Any]:
    return {"patch": patch, "with": settings}


ARMS: dict[str, Any] = {
    "close": "encoder/close",
    "balanced": "encoder/balanced",
    "fast": "encoder/fast",
    "rows .2, tiles, pooled": _arm("rows", density=0.2, rest="pool", **TILED),
    "rows .2, tiles, dropped": _arm("rows", density=0.2, rest="drop", **TILED),
    "rows .2, raster, pooled": _arm("rows", density=0.2, rest="pool", block=64),
    "rows .1, tiles, pooled, repaired": _arm("rows", density=0.1, rest="pool", repair="output_query", **TILED),
    "rows .05, tiles, pooled, repaired": _arm("rows", density=0.05, rest="pool", repair="output_query", **TILED),
    "sol, tiles": _arm("sol", tau=1.0, **TILED),
    "bilevel, tiles": _arm("bilevel", p=0.2, **TILED),
    "psa, tiles": _arm("psa", **TILED),
    "proxy": _arm("proxy", window_thw=[1, 8, 8], halo_thw=[0, 8, 8]),
    "neighborhood": _arm("neighborhood", window=[1, 25, 25], tile_thw=[1, 8, 8], block=64),
    "tome .5": _arm("tome", ratio=0.5),
    "tome .65": _arm("tome", ratio=0.65),
    "tome .75": _arm("tome", ratio=0.75),
    "tome .9": _arm("tome", ratio=0.9, cell_thw=[1, 4, 4]),
    "tome .5, queries too": _arm("tome", ratio=0.5, mode="qkv"),
    "tome .6, queries too": _arm("tome", ratio=0.6, mode="qkv"),
    "tome .75, queries too": _arm("tome", ratio=0.75, mode="qkv"),
    "tome .5, ahead of the projections": _arm("tome", ratio=0.5, mode="input"),
    "tome .5, pruned": _arm("tome", ratio=0.5, merging="prune"),
    "tome .5, one match for all layers": _arm("tome", ratio=0.5, reuse_layers=12),
    "toma .5": _arm("toma", ratio=0.5),
    "toma .5, keys alone": _arm("toma", ratio=0.5, mode="kv"),
    "toma .5, one match for 4 layers": _arm("toma", ratio=0.5, reuse_layers=4),
    "todo 2 x 2": _arm("todo"),
    "todo 2 x 2, means": _arm("todo", representative="mean"),
    "agent 4 x 4": _arm("agent"),
    "agent 4 x 4, unscaled, no shortcut": _arm("agent", k_scale=1.0, shortcut=0.0),
    "ptdit 8 x 8": _arm("ptdit"),
}
"""What is tried, by the names of rows: the shipped recipes, then patches everywhere."""


def run(size: int, images: list[Path] | None, only: list[str] | None, repeats: int, matching: bool) -> None:
    """Measure arms at one size."""
    model = Dinov2Model.from_pretrained(zoo.path("dinov2-small")).eval()
    facts = model_facts(model)
    arms = {name: load(recipe, facts) for name, recipe in ARMS.items() if only is None or name in only}
    found = compare_features(model, arms, Pictures(images, size), repeats=repeats, matching=matching)
    print(found)
    told = found.to_dict()
    shared = {"size": size, "environment": told["environment"], "generated": told["generated"], "repeats": repeats}
    held = {(row["size"], row["name"]): row for row in _stored()}
    held |= {(size, row["name"]): {**shared, **row} for row in told["rows"]}
    write_json(NAME, jsonable(sorted(held.values(), key=lambda row: (row["size"], row["name"]))))


def cosines(size: int, images: list[Path] | None, only: list[str] | None, matching: bool) -> None:
    """Measure what arms do to features at one size, and no times."""
    model = Dinov2Model.from_pretrained(zoo.path("dinov2-small")).eval()
    facts = model_facts(model)
    arms = {name: load(recipe, facts) for name, recipe in ARMS.items() if only is None or name in only}
    told = compare_features(model, arms, Pictures(images, size), repeats=1, matching=matching).to_dict()
    shared = {"size": size, "environment": told["environment"], "generated": told["generated"]}
    held = {(row["size"], row["name"]): row for row in _stored(COSINES)}
    for row in (row for row in told["rows"] if row["kind"] == "recipe"):
        pictures = [one["picture"] for one in row["on"]]
        held[size, row["name"]] = {**shared, "pictures": pictures, **{key: row[key] for key in UNTIMED}}
        print(f"{row['name']:36s} " + "  ".join(f"{key} {row[key]:.4f}" for key in UNTIMED[1:] if row[key] is not None))
    write_json(COSINES, jsonable(sorted(held.values(), key=lambda row: (row["size"], row["name"]))))


def _stored(name: str = NAME) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else []


def show() -> None:
    """Print tables by size, and draw gain over cosine."""
    rows = _stored()
    for size in sorted({row["size"] for row in rows}):
        lines = table(
            f"DINOv2-small at {size} px", "arm", "speed-up", "density", "cosine", "worst picture", "worst patch", "matched"
        )
        for row in (row for row in rows if row["size"] == size):
            density = "" if row["density"] is None else f"{row['density']:.3f}"
            matched = "" if row["matched"] is None else f"{row['matched']:.1%}"
            cosines = (f"{row[name]:.4f}" for name in ("cosine", "worst_picture", "worst_patch"))
            lines.add_row(row["name"], f"{row['gain']['p50']:.2f}x", density, *cosines, matched)
        print(as_text(lines))
    _draw([row for row in rows if row["kind"] == "recipe"])


def _draw(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({row["size"] for row in rows})
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(5.4 * len(sizes), 4.8), layout="constrained", sharey=True)
    for size, axes in zip(sizes, panels, strict=True):
        for number, row in enumerate(row for row in rows if row["size"] == size and row["density"] < 1):
            axes.plot(
                row["gain"]["p50"], 1 - row["cosine"], "osD^v"[number // 10], color=f"C{number % 10}", label=row["name"]
            )
        axes.axhline(0.01, color="grey", linewidth=0.8, linestyle="--")
        axes.axvline(1.0, color="grey", linewidth=0.8, linestyle="--")
        axes.set(title=f"{size:,} px", xlabel="a forward, times as fast as dense SDPA", yscale="log")
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
    panels[0].set_ylabel("1 - cosine of patch features, mean")
    panels[0].invert_yaxis()
    figure.savefig(PICTURE, dpi=110)
    print(f"drew {PICTURE.name}")


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "cosines"):
        command = commands.add_parser(name)
        command.add_argument("--size", type=int, default=1008)
        command.add_argument("--images", type=Path, nargs="+")
        command.add_argument("--only", nargs="+", choices=list(ARMS))
        command.add_argument("--repeats", type=int, default=2)
        command.add_argument("--no-matching", action="store_true")
    commands.add_parser("show")
    options = parser.parse_args()
    if options.command == "show":
        show()
        return
    torch.set_grad_enabled(False)
    if options.command == "cosines":
        cosines(options.size, options.images, options.only, not options.no_matching)
        return
    run(options.size, options.images, options.only, options.repeats, not options.no_matching)


if __name__ == "__main__":
    main()
