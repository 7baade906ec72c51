"""Quality over density for every sparse patch on the bundled video model, beside random and local block masks.

usage: python -m benchmarks.density_curve [--only layers|runs|tables] [--patch NAME ...] [--rest NAME ...]

Density counts pooled keys, so that a pooled rest and a dropped one stand at equal cost. `layers`: relative L2 error of attention
outputs on the q, k, v of a dense run, mean over layers and steps. `runs`: PSNR and foreground PSNR of whole runs against the dense
one, and caption agreement. A small grid of few steps: 17 frames of 64 x 96, 864 tokens, 8 steps, blocks of 16. Each part writes its
rows and a picture. Nothing is timed. Tables are calibrated on one other caption, for each setting anew.

With `--patch` or `--rest`, rows of settings that were not run are kept as the file has them, and its environment goes under
"earlier". `tables` prints both files, as docs/density.md shows them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from pydantic import Field
from torch.nn.functional import scaled_dot_product_attention

import accelplug
from accelplug import registry, zoo
from accelplug.comparison import metrics
from accelplug.comparison.environment import environment
from accelplug.kernels.orders import Tiles
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.sparse.template import BlockConfig, BlockSparse
from accelplug.table import Table
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, agreement, foreground
from benchmarks.common import RESULTS, write_json
from benchmarks.demo_pareto import Capture, measured

GRID = {"num_frames": 17, "height": 64, "width": 96, "num_inference_steps": 8, "guidance_scale": 3.0}
PROMPTS = HELD_OUT_CAPTIONS[:2]
"""One seed each, its number."""
CALIBRATION_PROMPT = HELD_OUT_CAPTIONS[2]
DENSE_STEPS = 2
PICTURES = Path(__file__).parents[1] / "docs"
BLOCK = {"block": 16, "backend": "blocked"}
DROP_AND_POOL = ("drop", "pool")
WEIGHED = (*DROP_AND_POOL, "pool, calibrated")
TABLE = ("drop, calibrated",)

# (patch, rests, the knob, its values, what else is set). A method takes part by one line.
# "calibrated": with the tables of `accelplug.calibrate`, of the method, or of the weights of pooled blocks for those without.
CURVES: tuple[tuple[str, tuple[str, ...], str, tuple[Any, ...], dict[str, Any]], ...] = (
    ("random", WEIGHED, "density", (0.1, 0.2, 0.3, 0.45), {}),
    ("local", DROP_AND_POOL, "width", (2, 5, 9, 14), {}),
    ("radial", DROP_AND_POOL, "decay", (0.1, 0.2, 0.5, 1.0), {}),
    ("neighborhood", DROP_AND_POOL, "window", ((3, 5, 5), (5, 5, 7), (9, 5, 5), (9, 7, 9)), {"mask": "tile"}),
    ("sol", WEIGHED, "tau", (1.5, 1.0, 0.5, 0.0), {"order": "morton", "band": 0}),
    ("psa", ("drop",), "bounds", ((0.1, 0.2, 0.3, 0.5), (0.3, 0.5, 0.7, 0.8), (0.5, 0.7, 0.8, 0.9)), {"order": "morton"}),
    ("rectified", ("drop", "pool", "rectified"), "drop_rate", (0.9, 0.8, 0.7, 0.55), {"order": "morton", "adjacent": False}),
    ("svg_ear", DROP_AND_POOL, "density", (0.1, 0.2, 0.3, 0.45), {"block_k": 16, "order": "morton"}),
    ("hierarchical", ("tied",), "band", (0, 1, 3, 6), {}),
    (
        "proxy",
        DROP_AND_POOL,
        "window_thw",
        ((1, 2, 3), (1, 4, 4), (3, 4, 4), (3, 8, 6)),
        {"block": 8, "halo_thw": (1, 1, 1)},
    ),
    ("tome", ("merged",), "ratio", (0.7, 0.5, 0.25), {}),
    ("svg", DROP_AND_POOL, "density", (0.1, 0.2, 0.3, 0.45), {}),
    ("vmoba", DROP_AND_POOL, "tau", (0.15, 0.25, 0.4, 0.6), {}),
    ("bilevel", DROP_AND_POOL, "k", (5, 10, 16, 24), {"halo": 0}),
    ("freeswim", DROP_AND_POOL, "native_hw", ((2, 4), (4, 4), (4, 6), (6, 8)), {"mask": "tile", "entropy": False}),
    ("sta", DROP_AND_POOL, "windows", (((3, 3, 1),), ((3, 3, 2),), ((5, 3, 2),)), {}),
    ("sta", TABLE, "density", (0.1, 0.2, 0.3, 0.45), {"windows": "maximal"}),
    ("sparse_vdit", DROP_AND_POOL, "multi_diagonal", (0.1, 0.2, 0.3, 0.45), {"modes": "multi_diagonal"}),
    ("sparse_vdit", TABLE, "diagonal multi_diagonal stripe", (0.1, 0.2, 0.3, 0.45), {}),
    ("paro", DROP_AND_POOL, "density", (0.1, 0.2, 0.3, 0.45), {"order": "twh"}),
    ("paro", TABLE, "density", (0.1, 0.2, 0.3, 0.45), {}),
)


@accelplug.register_patch
class Local(BlockSparse):
    """A window along the sequence: what costs no thought and is no lottery."""

    class Config(BlockConfig):
        width: int = Field(4, ge=1, description="Key blocks to read, those nearest along the sequence.")

    name, cite, summary = "local", "unpublished", "Every query block reads those nearest along the sequence."
    config: Config

    def select(self, tiles: Tiles, **where: Any) -> BlockPlan:
        blocks = torch.arange(len(tiles.lengths(self.config.unit)))
        distance = (blocks[:, None] - blocks).abs()
        return self.plan(distance.argsort(dim=-1, stable=True).argsort(dim=-1) < self.config.width, tiles)


@dataclass(frozen=True)
class Only:
    """Which curves are run; None for all."""

    patches: list[str] | None = None
    rests: list[str] | None = None

    def has(self, patch: str, rest: str) -> bool:
        """Whether a curve is among them."""
        return (self.patches is None or patch in self.patches) and (self.rests is None or rest in self.rests)


def settings(only: Only) -> Iterator[tuple[int, str, str, Any, dict[str, Any]]]:
    """Yield (place on the curve, patch, rest, the knob's value, config)."""
    for patch, rests, knob, values, others in CURVES:
        for rest in (rest for rest in rests if only.has(patch, rest)):
            for place, value in enumerate(values):
                blocks = {} if patch == "tome" else {**BLOCK, "rest": rest.partition(", ")[0]}
                yield place, patch, rest, value, {**blocks, **others, **dict.fromkeys(knob.split(), value)}


def with_tables(pipe: Any, patch: str, rest: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config, with tables where the curve asks for them."""
    if not rest.endswith("calibrated"):
        return config
    runs: dict[str, Any] = {"inputs": GRID, "seed": 100, "dense_steps": None, "progress": False}
    if (own := registry.patch_class(patch).Calibration) is None:
        recipe = {"patch": patch, "with": config}
        few: dict[str, Any] = {"options": {"weights": 6}, "buckets": 2}
        found = accelplug.calibrate(pipe, "rest", CALIBRATION_PROMPT, recipe=recipe, **few, **runs)
    else:
        options = {key: config[key] for key in own.Config.model_fields if key in config}
        found = accelplug.calibrate(pipe, patch, CALIBRATION_PROMPT, config=config, options=options, **runs)
    return dict(found.rules[-1].settings)


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The config for a JSON file: small tables whole, large ones by shape and checksum."""
    short = {k: v.values.tolist() if v.values.numel() < 100 else repr(v) for k, v in config.items() if isinstance(v, Table)}
    return {**config, **short}


def layers(pipe: Any, only: Only) -> list[dict[str, Any]]:
    """One row a setting: density and error of attention outputs, mean over the captured calls, and by layer."""
    Capture.steps = (3, 5, 7)
    with accelplug.apply(pipe, Capture(), gate="off"):
        pipe(prompt=PROMPTS[0], **GRID, generator=torch.Generator().manual_seed(0), output_type="latent")
    exact = {p: scaled_dot_product_attention(c.q, c.k, c.v) for p, c in Capture.calls.items()}
    rows = []
    for _, patch, rest, value, config in settings(only):
        config = with_tables(pipe, patch, rest, config)
        method: Any = registry.patch_class(patch)(config)
        steps = int(GRID["num_inference_steps"])
        found = [(at.layer, *measured(method, call, at, exact[at], steps)) for at, call in Capture.calls.items()]
        by_layer = {n: statistics.fmean(e for layer, _, e in found if layer == n) for n in sorted({f[0] for f in found})}
        row = {"patch": patch, "rest": rest, "knob": value, "config": plain(config)}
        row |= {"density": statistics.fmean(d for _, d, _ in found), "error": statistics.fmean(e for *_, e in found)}
        rows.append({**row, "error_by_layer": list(by_layer.values())})
        print(f"{patch:13s} {rest:16s} {value!s:22s} density {row['density']:.3f}  error {row['error']:.3f}", flush=True)
    return rows


def runs(pipe: Any, only: Only, seconds: float) -> list[dict[str, Any]]:
    """One row a setting: density of the steps with patches, PSNR against the dense run, mean and worst over prompts, agreement.

    After `seconds` no further setting is begun; what was left out is said.
    """
    dense = clips(pipe)
    rows = [{"patch": "dense", "rest": "", "knob": None, "density": 1.0, "agreement": agreeing(dense)}]
    other = clips(pipe, 100)
    rows.append({"patch": "dense, another seed", "rest": "", "knob": None, **quality(other, dense)})
    print(rows[-1])
    start = time.monotonic()
    # The middle of each curve first, so that a run cut short has all of them.
    for _, patch, rest, value, config in sorted(settings(only), key=lambda setting: abs(setting[0] - 1)):
        if time.monotonic() - start > seconds:
            print(f"out of time: {patch} {rest} {value} and what follows it were left out")
            break
        config = with_tables(pipe, patch, rest, config)
        rules = [{"where": {"steps": f"0:{DENSE_STEPS}"}, "patch": "dense"}, {"patch": patch, "with": config}]
        with accelplug.apply(pipe, {"rules": rules}, gate="off") as plug, plug.trace() as events:
            found = clips(pipe)
        density = statistics.fmean(e.density for e in events if e.patch == patch and e.density is not None)
        row = {"patch": patch, "rest": rest, "knob": value, "config": plain(config), "density": density}
        rows.append({**row, **quality(found, dense)})
        print({k: v for k, v in rows[-1].items() if k != "config"}, flush=True)
    return rows


def clips(pipe: Any, first_seed: int = 0) -> np.ndarray:
    """Clips of all prompts in one batch, float32 (prompt, frame, height, width, 3)."""
    seeds = [torch.Generator().manual_seed(first_seed + i) for i in range(len(PROMPTS))]
    return np.asarray(pipe(prompt=list(PROMPTS), **GRID, generator=seeds, output_type="np").frames, dtype=np.float32)


def agreeing(found: np.ndarray) -> float:
    """Share of clips that show what their caption says."""
    pairs = zip(found, PROMPTS, strict=True)
    return statistics.fmean(float(agreement(metrics.to_uint8(clip), text)) for clip, text in pairs)


def quality(found: np.ndarray, dense: np.ndarray) -> dict[str, float]:
    """PSNR and foreground PSNR, mean and worst, in dB; agreement."""
    pairs = list(zip(found, dense, strict=True))
    psnr = [metrics.psnr_db(a, b) for a, b in pairs]
    objects = [metrics.foreground_psnr_db(a, b, foreground) for a, b in pairs]
    return {
        "psnr_db": statistics.fmean(psnr),
        "worst_psnr_db": min(psnr),
        "fg_psnr_db": statistics.fmean(objects),
        "worst_fg_psnr_db": min(objects),
        "agreement": agreeing(found),
    }


COLOURS = {
    "drop": "#c2571a",
    "pool": "#2d6cdf",
    "drop, calibrated": "#e8a33d",
    "pool, calibrated": "#12b3c7",
    "rectified": "#2a8f5b",
    "tied": "#8a3fb8",
    "merged": "#6b6f76",
}


def draw(rows: list[dict[str, Any]], metric: str, label: str, file: Path) -> None:
    """A panel a patch: its curves over density, the random masks' in grey behind."""
    import matplotlib.pyplot as plt  # the bench extra

    drawn = {row["patch"] for row in rows}
    patches = [patch for patch in dict.fromkeys(curve[0] for curve in CURVES) if patch in drawn]
    columns = 6
    lines = -(-len(patches) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(14, 2.7 * lines), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(patches) :]:
        axis.axis("off")
    for axis, patch in zip(axes.flat, patches, strict=False):
        for rest, style in (("drop", "-"), ("pool", "--")):
            axis.plot(
                *_curve(rows, "random", rest, metric), style, color="#a9adb3", lw=1.6, label=f"random, {rest}", zorder=1
            )
        for rest, colour in COLOURS.items():
            x, y = _curve(rows, patch, rest, metric)
            if x:
                axis.plot(x, y, "o-", color=colour, lw=1.8, ms=4.5, label=rest, zorder=2)
        axis.set_title(patch, fontsize=11, loc="left", fontweight="bold")
        axis.grid(color="#ececec")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, 1)
    handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    figure.supxlabel("density: (query, key) pairs computed, pooled keys counted", fontsize=10)
    figure.supylabel(label, fontsize=10)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=110)


def _curve(rows: list[dict[str, Any]], patch: str, rest: str, metric: str) -> tuple[list[float], list[float]]:
    points = sorted((r["density"], r[metric]) for r in rows if (r["patch"], r["rest"]) == (patch, rest))
    return [x for x, _ in points], [y for _, y in points]


def table(rows: list[dict[str, Any]], metrics: dict[str, str]) -> str:
    """Rows in Markdown; `metrics`: heading by key. The first metric also as the patch has it with the rest dropped, and random."""
    first = next(iter(metrics))
    lines = [f"| patch | rest | knob | density | {' | '.join(metrics.values())} | drop there | random there |"]
    lines.append("|---" * (6 + len(metrics)) + "|")
    order, rests = [curve[0] for curve in CURVES], list(COLOURS)
    found = [row for row in rows if row.get("config")]
    for row in sorted(found, key=lambda row: (order.index(row["patch"]), rests.index(row["rest"]), row["density"])):
        beside = [_at(rows, patch, row["density"], first) for patch in (row["patch"], "random")]
        if row["rest"] == "drop":
            beside[0] = None
        knob = str(row["knob"]).replace(", ", "x").replace(",", "").strip("[]()")
        values = [row["patch"], row["rest"], knob, f"{row['density']:.3f}", *(_short(key, row) for key in metrics)]
        values += ["" if x is None else _short(first, {first: x}) for x in beside]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def _short(key: str, row: dict[str, Any]) -> str:
    worst = f" ({row[f'worst_{key}']:.1f})" if key == "fg_psnr_db" and f"worst_{key}" in row else ""
    return f"{row[key]:.{3 if key == 'error' else 1}f}{worst}"


def _at(rows: list[dict[str, Any]], patch: str, density: float, metric: str) -> float | None:
    """Read off a patch's curve with the rest dropped, by straight lines; None outside of what was measured."""
    x, y = _curve(rows, patch, "drop", metric)
    return float(np.interp(density, x, y)) if x and x[0] <= density <= x[-1] else None


def publish(name: str, rows: list[dict[str, Any]], facts: dict[str, Any], only: Only) -> None:
    """Write rows, and beside them those that the file has of other settings, if not all were run."""
    if only != Only():
        kept = json.loads((RESULTS / f"{name}.json").read_text())
        facts = {**facts, "earlier": [*kept.pop("earlier", []), {key: kept[key] for key in facts if key in kept}]}
        run = {_setting(row) for row in rows}
        rows = [row for row in kept["rows"] if _setting(row) not in run] + rows
    write_json(name, {**facts, "rows": rows})


def _setting(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["patch"], row["rest"], json.dumps(row["knob"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("layers", "runs", "tables"))
    parser.add_argument("--patch", action="append", choices=[curve[0] for curve in CURVES], help="only these; see above")
    parser.add_argument("--rest", action="append", choices=COLOURS, help="only these; see above")
    parser.add_argument("--seconds", type=float, default=900, help="begin no run after so many (default 900)")
    options = parser.parse_args()
    if options.only == "tables":
        show()
        return
    pipe = WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    facts = {**environment(pipe), "grid": GRID, "prompts": list(PROMPTS), "calibration_prompt": CALIBRATION_PROMPT}
    facts["dense_steps"] = DENSE_STEPS
    only = Only(options.patch, options.rest)
    if options.only != "runs":
        publish("density_layers", layers(pipe, only), facts, only)
    if options.only != "layers":
        publish("density_runs", runs(pipe, only, options.seconds), facts, only)
    show()


def show() -> None:
    """Draw both files, and print their rows in Markdown."""
    for name, shown, label in (
        ("density_layers", {"error": "error"}, "relative L2 error of the attention output"),
        (
            "density_runs",
            {"fg_psnr_db": "foreground dB", "psnr_db": "PSNR dB", "agreement": "agreement"},
            "foreground PSNR to the dense run, dB",
        ),
    ):
        rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        draw(rows, next(iter(shown)), label, PICTURES / f"{name}.png")
        print(f"\n{table(rows, shown)}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
