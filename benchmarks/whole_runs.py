"""Approximate and mend, in whole runs of the bundled video model: quality over time of every selector, plain and repaired.

usage: python -m benchmarks.whole_runs run STORE [--grid small|demo] [--only TEXT ...] [--main] [--captions 8] [--seeds 0 1]
       python -m benchmarks.whole_runs time [--grid small|demo] [--only TEXT ...] [--main] [--measured] [--rounds 2]
       python -m benchmarks.whole_runs show [STORE]

Quality does not depend on what else a machine does, time does. So `run` makes whole runs for their quality alone, in the background if
need be: each is one file in STORE as soon as it ends, and is not made again. `time` takes an idle machine for some minutes. `show` joins
what both left (STORE: runs made since) into tables, as docs/performance.md has them, and a picture.

Beside the selectors stand what they must beat at equal time: random blocks, step caches, and dense runs of fewer steps. All are held
against the dense run of their caption and seed. Half of the captions served choices of settings, the other half none; both are reported.
A patch answers all layers from a quarter of the steps on. `tome` merges keys: nothing of it is repaired.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

import accelplug
from accelplug import files, zoo
from accelplug.comparison.environment import environment, revision
from accelplug.comparison.evaluators.statistics import paired_bootstrap
from accelplug.comparison.metrics import METRICS, Beside
from accelplug.show import jsonable
from accelplug.step_caches import CACHES
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, agreement, foreground
from benchmarks.common import RESULTS, write_json
from benchmarks.demo_pareto import Random

CAPTIONS = (0, 10, 1, 11, 2, 12, 3, 13)
"""Of the held-out ones: settings were chosen on 0 to 3, and nothing was run on the others before."""
CHOSEN_ON = (0, 1, 2, 3)
GRIDS: dict[str, dict[str, Any]] = {
    "small": {"num_frames": 17, "height": 96, "width": 128, "num_inference_steps": 12, "guidance_scale": 3.0},
    "demo": {**zoo.DEMO, "num_inference_steps": 8},  # half of the demo's steps, for their time
}
TOKENS = {"small": 1728, "demo": 6528}
BLOCK = {"small": 32, "demo": 64}
PROBES = (0.0, 0.08, 0.04, 0.15)
"""Exact rows of each head, as a share; given as a number, since a share means twice as many as there are features at least."""
PICTURE = Path(__file__).parents[1] / "docs" / "whole_runs.png"

# method: (patch, the knob, its values, the main one first, what else is set)
METHODS: dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any]]] = {
    "sol": ("sol", "tau", (1.0, 1.5, 0.5), {"order": "gilbert"}),
    "rows": ("rows", "density", (0.2, 0.1, 0.4), {"order": "gilbert"}),
    "radial": ("radial", "sink", (True, False), {}),
    "svg_ear": ("svg_ear", "density", (0.2, 0.1), {"order": "gilbert"}),
    "random": (Random.name, "density", (0.2, 0.4), {}),
    "neighborhood": ("neighborhood", "window", (("full", 5, 5), ("full", 7, 9), ("full", 3, 3)), {"mask": "tile"}),
    "psa": ("psa", "bounds", ((0.5, 0.7, 0.8, 0.9), (0.4, 0.5, 0.6, 0.8)), {"order": "gilbert", "rest": "drop"}),
    "rectified": ("rectified", "drop_rate", (0.8, 0.9), {"order": "gilbert", "adjacent": False, "rest": "rectified"}),
    "tome": ("tome", "ratio", (0.5, 0.7), {"cell_thw": [4, 1, 1], "tile_thw": [8, 4, 4]}),
}
# name: (kind, values of its knob, what else is set)
CACHED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "FirstBlockCache": ("first_block", (0.2, 0.3), {}),
    "TaylorSeer lite": ("taylorseer", (2, 3), {"use_lite_mode": True}),
}
FEWER = (0.75, 0.6, 0.5)
"""Shares of the steps."""
MARKS = {"fewer steps": "x", "FirstBlockCache": "s", "TaylorSeer lite": "D"}


@dataclass(frozen=True)
class Arm:
    """One way to run: a method at a setting, with so many exact rows.

    Attributes
    ----------
    main : whether it is the method's main setting.
    recipe : None for the stock model.
    settings : of the pipeline's call.
    """

    method: str
    setting: str
    probes: float
    main: bool
    recipe: dict[str, Any] | None
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """For tables."""
        return ", ".join(filter(None, (self.method, self.setting, self.probes and f"{self.probes:.0%} probes")))

    def key(self, caption: int, seed: int) -> str:
        """Names the file of a run: whatever it depends on but the code."""
        given = json.dumps([self.recipe, self.settings, HELD_OUT_CAPTIONS[caption], seed], sort_keys=True)
        return hashlib.sha256(given.encode()).hexdigest()[:16]


def arms(grid: str) -> Iterator[Arm]:
    """Yield dense, what is no patch, and all methods."""
    settings = GRIDS[grid]
    steps = settings["num_inference_steps"]
    yield Arm("dense", "", 0.0, True, None, settings)
    for share in FEWER:
        yield Arm("fewer steps", f"{share:g}", 0.0, True, None, {**settings, "num_inference_steps": round(share * steps)})
    for name, (kind, values, others) in CACHED.items():
        for place, value in enumerate(values):
            cache = {"kind": kind, "with": {CACHES[kind].knob: value, **CACHES[kind].for_run(steps, ()), **others}}
            yield Arm(name, f"{value}", 0.0, place == 0, {"rules": [{"patch": "dense"}], "cache": cache}, settings)
    for method, (patch, knob, values, others) in METHODS.items():
        block = BLOCK[grid]
        sizes = {"block": block, "block_k": block // 2 if method == "psa" else block}  # as in the recipes of this model
        common = {} if method == "tome" else {**sizes, "rest": "pool", "backend": "blocked"}
        for (place, value), probes in product(enumerate(values), PROBES[: 1 if method == "tome" else None]):
            if place and probes not in PROBES[:2]:
                continue  # few and many probes at the main setting only
            repair = {"repair": "output_query", "probes": round(probes * TOKENS[grid])} if probes else {}
            config = {**common, **others, knob: value, **repair}
            recipe = {"rules": [{"where": {"steps": "0:25%"}, "patch": "dense"}, {"patch": patch, "with": config}]}
            setting = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
            yield Arm(method, f"{knob} {setting}", probes, place == 0, recipe, settings)


class Runner:
    """The pipeline, and the text encoder's output for each caption."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.pipe = WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.texts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def call(self, arm: Arm, caption: int, seed: int, **others: Any) -> Any:
        """Run an arm once."""
        if caption not in self.texts:
            self.texts[caption] = self.pipe.encode_prompt(HELD_OUT_CAPTIONS[caption])
        prompt, negative = self.texts[caption]
        given = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, **arm.settings, **others}
        with nullcontext() if arm.recipe is None else accelplug.apply(self.pipe, arm.recipe, gate="off"):
            return self.pipe(**given, generator=torch.Generator().manual_seed(seed)).frames


# ------------------------------------------------------------------------------------------------------------------- run


def run(store: Path, grid: str, chosen: Sequence[Arm], captions: Sequence[int], seeds: Sequence[int]) -> None:
    """Make the runs that are not in the store, seed by seed and caption by caption, each against its dense one."""
    runner, git = Runner(1), revision()
    dense = next(arms(grid))
    store.mkdir(parents=True, exist_ok=True)
    for seed, caption in product(seeds, captions):
        reference = store / f"{dense.key(caption, seed)}.npy"
        if not reference.exists():
            half = store / f"{os.getpid()}.npy"
            np.save(half, clip_of(runner.call(dense, caption, seed, output_type="np")))
            half.rename(reference)
        for arm in (dense, *chosen):
            file = store / f"{arm.key(caption, seed)}.json"
            if file.exists():
                continue
            expected, text = np.load(reference), HELD_OUT_CAPTIONS[caption]
            clip = expected if arm == dense else clip_of(runner.call(arm, caption, seed, output_type="np"))
            beside = Beside(clip, expected, None, None, foreground, agreement, text)
            scores = {metric.key: metric.of(beside) for metric in METRICS.values()}
            row = {"grid": grid, "arm": arm.name, "recipe": arm.recipe, "settings": arm.settings, "caption": caption}
            files.write(file, json.dumps(jsonable({**row, "seed": seed, "scores": scores, "git": git}), indent=1))
            print(f"{time.strftime('%T')} {grid} {caption} {seed} {arm.name}: {scores['fg_psnr_db']:.1f} dB", flush=True)


def clip_of(frames: Any) -> np.ndarray:
    """The only clip of a call, float32 (F, H, W, 3)."""
    return np.asarray(frames[0], dtype=np.float32)


# ------------------------------------------------------------------------------------------------------------------ time


def timed(grid: str, chosen: Sequence[Arm], rounds: int) -> dict[str, float]:
    """Time of a whole run over a dense one's, by arm: the median of some rounds, each beside dense steps of its own.

    A patch's steps are alike, so its first one and the faster of two later ones tell the rest, as the faster of two tells dense ones.
    Step caches are run whole. The text encoder (some hundredths of a second) is left out on both sides.
    """
    runner, steps = Runner(2), GRIDS[grid]["num_inference_steps"]
    dense, dense_steps = next(arms(grid)), round(0.25 * steps)
    by_step(runner, dense, 1, output_type="np")  # warms up
    start = time.perf_counter()
    around = -sum(by_step(runner, dense, steps, output_type="np")) + time.perf_counter() - start
    ratios: dict[str, list[float]] = defaultdict(list)
    for arm in (arm for _ in range(rounds) for arm in chosen):
        step = min(by_step(runner, dense, 2))
        if arm.recipe is None:
            took = arm.settings["num_inference_steps"] * step
        elif "cache" in arm.recipe:
            took = sum(by_step(runner, arm, steps))
        else:
            first, *later = by_step(runner, replace(arm, recipe={"rules": arm.recipe["rules"][1:]}), 3)
            took = dense_steps * step + first + (steps - dense_steps - 1) * min(later)
        ratios[arm.name].append((around + took) / (around + steps * step))
        print(f"{arm.name}: {ratios[arm.name][-1]:.3f} of {around + steps * step:.2f} s", flush=True)
    return {name: round(statistics.median(found), 4) for name, found in ratios.items()}


def by_step(runner: Runner, arm: Arm, steps: int, output_type: str = "latent") -> list[float]:
    """Seconds of each step of a run of so many."""
    marks = [0.0]

    def begin(module: Any, given: Any) -> None:
        marks[0] = marks[0] or time.perf_counter()

    def end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        marks.append(time.perf_counter())
        return tensors

    few = replace(arm, settings={**arm.settings, "num_inference_steps": steps})
    hook = runner.pipe.transformer.register_forward_pre_hook(begin)
    try:
        runner.call(few, CAPTIONS[0], 0, output_type=output_type, callback_on_step_end=end)
    finally:
        hook.remove()
    return [later - earlier for earlier, later in pairwise(marks)]


# ------------------------------------------------------------------------------------------------------------------ show

Pair = tuple[int, int]
"""Caption and seed."""
SETS: dict[str, Callable[[Pair], bool]] = {
    "chosen on": lambda pair: pair[0] in CHOSEN_ON,
    "held out": lambda pair: pair[0] not in CHOSEN_ON,
}
EQUAL_TIMES = (1.0, 0.75, 0.6)
FOREGROUND = "fg_psnr_db"
OTHERS = {"psnr_db": 1, "ssim": 3, "agreement": 2, "flicker": 2}
"""Scores that tables show too, with their digits."""


@dataclass
class Shown:
    """An arm with its scores by caption and seed, and its time over dense's, None if it was not timed."""

    arm: Arm
    runs: dict[Pair, dict[str, float]]
    time: float | None

    def mean(self, pairs: Sequence[Pair], score: str = FOREGROUND) -> float:
        """Mean of a score."""
        return statistics.fmean(float(self.runs[pair][score]) for pair in pairs)


def collect(store: Path | None) -> dict[str, Any]:
    """Return the scores of all runs, those of the results file and those in the store, and keep them in that file."""
    file = RESULTS / "whole_runs.json"
    runs = json.loads(file.read_text())["runs"] if file.exists() else {grid: {} for grid in GRIDS}
    if store is not None:
        found = [json.loads(path.read_text()) for path in sorted(store.glob("*.json"))]
        for row in found:
            scores = {key: float(f"{float(value):.5g}") for key, value in row["scores"].items() if value is not None}
            runs[row["grid"]].setdefault(row["arm"], {})[f"{row['caption']}, {row['seed']}"] = jsonable(scores)
        facts = {"git": ", ".join(sorted({row["git"] for row in found})), "chosen_on": CHOSEN_ON, "grids": GRIDS}
        captions = {number: HELD_OUT_CAPTIONS[number] for number in CAPTIONS}
        write_json("whole_runs", {**environment(), **facts, "captions": captions, "runs": runs})
    return runs


def shown(grid: str, runs: dict[str, Any]) -> list[Shown]:
    """The arms that have runs, dense first."""
    file = RESULTS / f"whole_runs_time_{grid}.json"
    times = json.loads(file.read_text())["of_dense"] if file.exists() else {}
    rows = []
    for arm in arms(grid):
        found = runs[grid].get(arm.name, {}).items()
        by_pair = {(int(caption), int(seed)): scores for key, scores in found for caption, seed in [key.split(", ")]}
        rows.append(Shown(arm, by_pair, times.get(arm.name)))
    return [row for row in rows if row.runs]


def complete(rows: Sequence[Shown]) -> list[Shown]:
    """Those that have a run at the first seed for every caption that dense has."""
    wanted = {pair for pair in rows[0].runs if pair[1] == 0}
    return [row for row in rows if wanted <= row.runs.keys()]


def common(rows: Sequence[Shown], of: str | None = None) -> list[Pair]:
    """Captions and seeds that all rows ran, of a set."""
    pairs = set.intersection(*(set(row.runs) for row in rows))
    return sorted(pair for pair in pairs if of is None or SETS[of](pair))


def spread(row: Shown, pairs: Sequence[Pair], above: Shown | None = None) -> str:
    """Mean foreground PSNR with its 95 % interval over captions, or how much of it a row has above another on the same runs."""
    captions = [[pair for pair in pairs if pair[0] == caption] for caption in sorted({pair[0] for pair in pairs})]

    def figure(some: Sequence[Sequence[Pair]]) -> float:
        flat = [pair for group in some for pair in group]
        return row.mean(flat) - (above.mean(flat) if above else 0.0)

    sign = "+" if above else ""
    return "{0:{3}.1f} ({1:{3}.1f} to {2:{3}.1f})".format(*paired_bootstrap(figure, captions), sign) if captions else ""


def table(rows: Sequence[Shown]) -> Iterator[str]:
    """All arms in Markdown, each over its own runs; what repair brings over the runs of both."""
    headings = ["arm", "runs", "time of dense", *(f"foreground PSNR, dB: {of}" for of in SETS), "worst"]
    headings += [METRICS[key.removesuffix("_db")].heading for key in OTHERS] + [f"repair brings, dB: {of}" for of in SETS]
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    for row in rows[1:]:
        plain = next(r for r in rows if (r.arm.method, r.arm.setting) == (row.arm.method, row.arm.setting))
        cells = [row.arm.name, str(len(row.runs)), f"{row.time:.2f}" if row.time else ""]
        cells += [spread(row, common([row], of)) for of in SETS]
        cells += [f"{min(float(scores[FOREGROUND]) for scores in row.runs.values()):.1f}"]
        cells += [f"{row.mean(common([row]), key):.{digits}f}" for key, digits in OTHERS.items()]
        cells += [spread(row, common([row, plain], of), plain) if row is not plain else "" for of in SETS]
        yield f"| {' | '.join(cells)} |"


def curves(rows: Sequence[Shown], pairs: Sequence[Pair]) -> dict[tuple[str, bool], list[tuple[float, float]]]:
    """By method, and whether it is repaired: times over dense's with foreground PSNR, from the fastest on."""
    found: dict[tuple[str, bool], list[tuple[float, float]]] = defaultdict(list)
    for row in rows[1:]:
        if row.time is not None:
            found[row.arm.method, row.arm.probes > 0].append((row.time, row.mean(pairs)))
    return {key: sorted(points) for key, points in found.items()}


def within(points: Sequence[tuple[float, float]], limit: float) -> float | None:
    """The best quality within a time, between two settings by a straight line; None where all take longer."""
    if not points or points[0][0] > limit:
        return None
    best = np.maximum.accumulate([quality for _, quality in points])
    return float(np.interp(limit, [seconds for seconds, _ in points], best))


def at_equal_time(rows: Sequence[Shown]) -> Iterator[str]:
    """Foreground PSNR of each method at equal times, without and with repair, in Markdown; all over the same runs."""
    by_set = [curves(rows, pairs) for of in SETS if (pairs := common(rows, of))]
    yield f"| method | {' | '.join(f'within {limit:g} of dense: plain | repaired' for limit in EQUAL_TIMES)} |"
    yield "|---" * (1 + 2 * len(EQUAL_TIMES)) + "|"
    for method in dict.fromkeys(row.arm.method for row in rows[1:]):
        cells = []
        for limit, mended in product(EQUAL_TIMES, (False, True)):
            values = [within(found.get((method, mended), []), limit) for found in by_set]
            cells.append(", ".join(f"{value:.1f}" for value in values if value is not None))
        yield f"| {method} | {' | '.join(cells)} |"


def draw(grids: dict[str, list[Shown]]) -> None:
    """A panel a grid: foreground PSNR over time; dashed and hollow as it is, filled with repair."""
    import matplotlib.pyplot as plt  # the bench extra

    figure, axes = plt.subplots(1, len(grids), figsize=(13, 5.5), layout="constrained", squeeze=False)
    for axis, (grid, rows) in zip(axes[0], grids.items(), strict=True):
        pairs = common(rows)
        for (method, mended), points in curves(rows, pairs).items():
            colour = "k" if method not in METHODS else "0.6" if method == "random" else f"C{list(METHODS).index(method)}"
            filled = mended or method not in METHODS
            look = {"marker": MARKS.get(method, "o"), "mfc": colour if filled else "w", "color": colour}
            label = f"{method}, repaired" if mended else method
            axis.plot(*zip(*points, strict=True), "-" if filled else "--", **look, label=label)
        axis.axvline(1.0, color="0.8", zorder=0)
        axis.set_title(f"{TOKENS[grid]:,} tokens, {GRIDS[grid]['num_inference_steps']} steps, {len(pairs)} runs", loc="left")
        axis.set_xlabel("time of a whole run, of dense")
        axis.grid(color="#ececec")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("foreground PSNR to the dense run, dB")
    lines = {
        line.get_label(): line for axis in axes[0] for line in axis.get_lines() if not str(line.get_label()).startswith("_")
    }
    figure.legend(lines.values(), lines.keys(), fontsize=8, frameon=False, loc="outside right center")
    figure.savefig(PICTURE, dpi=110)


def show(store: Path | None) -> None:
    """Print the tables of both grids, and draw them."""
    runs = collect(store)
    grids = {grid: rows for grid in GRIDS if len(rows := shown(grid, runs)) > 1}
    for grid, rows in grids.items():
        print(f"\n## {TOKENS[grid]:,} tokens\n", *table(rows), sep="\n")
        print(f"\nAgreement of the dense runs: {rows[0].mean(common(rows[:1]), 'agreement'):.2f}.")
        rows = complete(rows)
        of = " and ".join(f"{len(common(rows, name))} {name}" for name in SETS)
        print(f"\nAt equal time, runs {of}:\n", *at_equal_time(rows), sep="\n")
    draw({grid: complete(rows) for grid, rows in grids.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("show").add_argument("store", type=Path, nargs="?", help="folder of runs made since")
    for name in ("run", "time"):
        part = parts.add_parser(name)
        part.add_argument("--grid", choices=GRIDS, default="small")
        part.add_argument("--only", nargs="+", help="arms whose name holds one of these")
        part.add_argument("--main", action="store_true", help="the main setting of each method only")
        part.add_argument("--measured", action="store_true", help="arms only of which the results file has runs")
        if name == "run":
            part.add_argument("store", type=Path, help="folder of runs")
            part.add_argument("--captions", type=int, default=len(CAPTIONS), help="how many (default all 8)")
            part.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
        else:
            part.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if options.part == "show":
        show(options.store)
        return
    chosen = list(arms(options.grid))
    if options.measured:
        chosen = [arm for arm in chosen if arm.name in collect(None)[options.grid]]
    if options.main:
        chosen = [arm for arm in chosen if arm.main]
    if options.only:
        chosen = [arm for arm in chosen if any(text in arm.name for text in options.only)]
    if options.part == "run":
        run(options.store, options.grid, chosen, CAPTIONS[: options.captions], options.seeds)
    else:
        times = timed(options.grid, chosen, options.rounds)
        facts = {**environment(), "grid": options.grid, "settings": GRIDS[options.grid], "rounds": options.rounds}
        write_json(f"whole_runs_time_{options.grid}", {**facts, "of_dense": times})


if __name__ == "__main__":
    main()
