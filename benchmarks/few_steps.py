"""The recipes for any denoiser, by number of steps: quality and time of whole runs of the bundled video model, beside dense.

usage: python -m benchmarks.few_steps [--steps 4 8 20] [--recipes close balanced fast] [--grid middle] [--captions 3] [--seeds 0 1]
       python -m benchmarks.few_steps --variants all --steps 4 --grid small --captions 5 --seeds 0

Every caption and seed is run dense and with each recipe, one after the other in one process, in runs of each number of steps. A run is
held against the dense one of its caption, seed and number of steps, so that differences are paired. Times are of whole runs without the
text encoder, on an idle machine; the gate is off, which would leave some calls dense at small sizes. The model was not distilled: in 4
steps its dense runs seldom show what their caption says, so read how near a run is to dense, not how good it is.

Variants ask where a budget should go: to early or late steps, the first or the last step, the first layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any

import numpy as np

import accelplug
from accelplug.comparison.environment import environment
from accelplug.comparison.evaluators.statistics import paired_bootstrap
from accelplug.comparison.metrics import METRICS, Beside
from accelplug.show import jsonable
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, agreement, foreground
from benchmarks.common import write_json
from benchmarks.whole_runs import BLOCK, CAPTIONS, GRIDS, Arm, Runner, clip_of

SIZES = {**GRIDS, "middle": {**GRIDS["small"], "num_frames": 33}}
"""Grids by name: 1,728, 3,264 and 6,528 tokens for small, middle and demo."""
DENSE = "dense"
DENSE_AT: dict[str, dict[str, Any]] = {"first step": {"steps": 0}, "last step": {"steps": -1}, "first layer": {"layers": 0}}
BOTH = ("first step", "first layer")
VARIANTS: dict[str, tuple[float, float, tuple[str, ...]]] = {
    "falling": (0.2, 0.1, ()),
    "even": (0.15, 0.15, ()),
    "rising": (0.1, 0.2, ()),
    **{f"falling, {place} dense": (0.2, 0.1, (place,)) for place in DENSE_AT},
    "more, falling, first step dense": (0.3, 0.2, BOTH[:1]),
    "more, falling, first step and layer dense": (0.3, 0.2, BOTH),
    "more, even, first step and layer dense": (0.25, 0.25, BOTH),
}
"""By name: share of the key blocks that is read up to half of the run, from there on, and what stays dense."""
Row = dict[str, Any]


def variant(name: str, block: int) -> dict[str, Any]:
    """One of `VARIANTS` as a recipe."""
    settings = {"order": "morton", "block": block, "rest": "pool", "repair": "output_query"}
    early, late, places = VARIANTS[name]
    dense = [{"where": DENSE_AT[place], "patch": "dense"} for place in places]
    first = {"where": {"steps": "0:50%"}, "patch": "rows", "with": {**settings, "density": early}}
    return {"rules": [*dense, first, {"patch": "rows", "with": {**settings, "density": late}}]}


def measured(runner: Runner, recipe: Any, settings: dict[str, Any], caption: int, seed: int) -> tuple[np.ndarray, float]:
    """The clip of a run, and its seconds. `recipe`: None for the stock model."""
    stock = Arm(DENSE, "", 0.0, True, None, settings)
    with nullcontext() if recipe is None else accelplug.apply(runner.pipe, recipe, gate="off"):
        start = time.perf_counter()
        clip = clip_of(runner.call(stock, caption, seed, output_type="np"))
        return clip, time.perf_counter() - start


def rows_of(runner: Runner, recipes: Mapping[str, Any], settings: dict[str, Any], caption: int, seed: int) -> Iterator[Row]:
    """Runs of one caption, seed and number of steps: dense first, then every recipe, held against it."""
    dense, dense_s = measured(runner, None, settings, caption, seed)
    about = {"steps": settings["num_inference_steps"], "caption": caption, "seed": seed}
    alone = Beside(dense, None, None, None, foreground, agreement, HELD_OUT_CAPTIONS[caption])
    yield {**about, "recipe": DENSE, "seconds": dense_s, "agreement": METRICS["agreement"].of(alone)}
    for name, recipe in recipes.items():
        clip, seconds = measured(runner, recipe, settings, caption, seed)
        beside = Beside(clip, dense, None, None, foreground, agreement, HELD_OUT_CAPTIONS[caption])
        scores = {metric.key: metric.of(beside) for metric in METRICS.values() if metric.of is not None}
        yield {**about, "recipe": name, "seconds": seconds, "of_dense": seconds / dense_s, **scores}


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Each number of steps and recipe in Markdown; intervals hold 95 %."""
    yield "| steps | recipe | runs | time of dense | foreground PSNR, dB | worst | SSIM | agreement (dense) |"
    yield "|---|---|---|---|---|---|---|---|"
    for steps, recipe in dict.fromkeys((row["steps"], row["recipe"]) for row in rows):
        if recipe == DENSE:
            continue
        found = [row for row in rows if (row["steps"], row["recipe"]) == (steps, recipe)]
        stock = [row["agreement"] for row in rows if (row["steps"], row["recipe"]) == (steps, DENSE)]
        cells = [str(steps), recipe, str(len(found)), spread(found, "of_dense", 2), spread(found, "fg_psnr_db", 1)]
        cells += [
            f"{min(float(row['fg_psnr_db']) for row in found):.1f}",
            f"{statistics.fmean(row['ssim'] for row in found):.3f}",
        ]
        cells += [f"{statistics.fmean(row['agreement'] for row in found):.2f} ({statistics.fmean(stock):.2f})"]
        yield f"| {' | '.join(cells)} |"


def spread(rows: Sequence[Row], key: str, digits: int) -> str:
    """The mean of a figure with its 95 % interval, resampled over captions."""
    captions = [
        [float(row[key]) for row in rows if row["caption"] == caption] for caption in {row["caption"] for row in rows}
    ]
    mean, low, high = paired_bootstrap(lambda some: statistics.fmean(value for values in some for value in values), captions)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 20])
    parser.add_argument("--recipes", nargs="+", default=["close", "balanced", "fast"], help="names, or files")
    parser.add_argument("--variants", help="in their place the variants whose name holds this text, or all")
    parser.add_argument("--grid", choices=SIZES, default="middle")
    parser.add_argument("--captions", type=int, default=3, help="how many, of those of whole_runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    runner, settings = Runner(options.threads), SIZES[options.grid]
    block, asked = (
        BLOCK.get(options.grid, 64),
        [name for name in VARIANTS if options.variants == "all" or (options.variants and options.variants in name)],
    )
    recipes = {name: variant(name, block) for name in asked} or {name: name for name in options.recipes}
    measured(runner, None, {**settings, "num_inference_steps": 1}, CAPTIONS[0], 0)  # warms up
    facts = {**environment(runner.pipe), "grid": options.grid, "settings": settings, "threads": options.threads}
    rows: list[Row] = []
    for seed, caption in product(options.seeds, CAPTIONS[: options.captions]):
        for steps in options.steps:
            rows += rows_of(runner, recipes, {**settings, "num_inference_steps": steps}, caption, seed)
        write_json(
            f"few_steps_variants_{options.steps[0]}" if asked else "few_steps", {**facts, "rows": jsonable(rows)}
        )  # whatever ends the rest
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
