"""Approximate and mend, in whole runs of the bundled video model: quality over time of every selector, plain and repaired.

usage: python -m benchmarks.whole_runs run STORE [--grid small|demo] [--only TEXT ...] [--main] [--captions 8] [--seeds 0 1]
       python -m benchmarks.whole_runs time [--grid small|demo] [--only TEXT ...] [--main] [--rounds 2]
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    "small": {
        "num_frames": 17,
        "height": 96,
        "width": 128,
        "num_inference_steps": 12,
        "guidance_scale": 3.0,
    },  # 1,728 tokens
    "demo": {**zoo.DEMO, "num_inference_steps": 8},  # 6,528 tokens; half of the demo's steps, for their time
}
BLOCK = {"small": 32, "demo": 64}
PROBES = (0.0, 0.08, 0.04, 0.15)
"""Exact rows of each head, as a share; given as a number, since a share means twice as many as there are features at least."""
TOKENS = {"small": 1728, "demo": 6528}
RUNS, TIME = "whole_runs", "whole_runs_time"
"""Names of results."""
SCORES = {"psnr_db": 1, "ssim": 3, "agreement": 2, "flicker": 2}
"""With the digits shown, beside foreground PSNR."""
PICTURE = Path(__file__).parents[1] / "docs" / "whole_runs.png"

# method: (patch, the knob, its values, the main one first, what else is set)
METHODS: dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any]]] = {
    "sol": ("sol", "tau", (1.0, 1.5, 0.5), {"order": "gilbert"}),
    "rows": ("rows", "density", (0.2, 0.1, 0.4), {"order": "gilbert"}),
    "radial": ("radial", "sink", (True, False), {}),
    "svg_ear": ("svg_ear", "density", (0.2, 0.1), {"order": "gilbert"}),
    "random": (Random.name, "density", (0.2, 0.4), {}),
    "neighborhood": ("neighborhood", "window", (("full", 5, 5), ("full", 7, 9)), {"mask": "tile"}),
    "psa": ("psa", "bounds", ((0.5, 0.7, 0.8, 0.9), (0.4, 0.5, 0.6, 0.8)), {"order": "gilbert", "rest": "drop"}),
    "rectified": ("rectified", "drop_rate", (0.8, 0.9), {"order": "gilbert", "adjacent": False, "rest": "rectified"}),
    "tome": ("tome", "ratio", (0.5, 0.7), {"cell_thw": [4, 1, 1], "tile_thw": [8, 4, 4]}),
}
LITE = {"use_lite_mode": True}
CACHED: tuple[
    tuple[str, str, tuple[Any, ...], dict[str, Any]], ...
] = (  # (name, kind, values of its knob, what else is set)
    ("FirstBlockCache", "first_block", (0.2, 0.3), {}),
    ("TaylorSeer lite", "taylorseer", (2, 3), LITE),
)
FEWER = (0.75, 0.6, 0.5)
"""Shares of the steps."""


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
    for name, kind, values, others in CACHED:
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
        call = lambda: self.pipe(**given, generator=torch.Generator().manual_seed(seed)).frames  # noqa: E731
        if arm.recipe is None:
            return call()
        with accelplug.apply(self.pipe, arm.recipe, gate="off"):
            return call()


# ------------------------------------------------------------------------------------------------------------------- run


def run(store: Path, grid: str, chosen: Sequence[Arm], captions: Sequence[int], seeds: Sequence[int]) -> None:
    """Make the runs that are not in the store, seed by seed and caption by caption, each against its dense one."""
    runner, git = Runner(1), revision()
    (dense,) = (arm for arm in arms(grid) if arm.method == "dense")
    store.mkdir(parents=True, exist_ok=True)
    for seed, caption in product(seeds, captions):
        reference = store / f"{dense.key(caption, seed)}.npy"
        if not reference.exists():
            half = store / f"{os.getpid()}.npy"
            np.save(half, clip_of(runner.call(dense, caption, seed, output_type="np")))
            half.rename(reference)
        for arm in chosen:
            file = store / f"{arm.key(caption, seed)}.json"
            if file.exists():
                continue
            start, text = time.perf_counter(), HELD_OUT_CAPTIONS[caption]
            expected = np.load(reference)
            clip = expected if arm is dense else clip_of(runner.call(arm, caption, seed, output_type="np"))
            beside = Beside(clip, expected, None, None, foreground, agreement, text)
            scores = {metric.key: metric.of(beside) for metric in METRICS.values() if metric.of is not None}
            row = {"grid": grid, "arm": arm.name, "method": arm.method, "setting": arm.setting, "probes": arm.probes}
            row |= {"caption": caption, "seed": seed, "recipe": arm.recipe, "settings": arm.settings, "scores": scores}
            row |= {"git": git, "loaded_seconds": time.perf_counter() - start}
            files.write(file, json.dumps(jsonable(row), indent=1))
            print(
                f"{time.strftime('%H:%M:%S')} {grid} {caption} {seed} {arm.name}: {scores['fg_psnr_db']:.1f} dB", flush=True
            )


def clip_of(frames: Any) -> np.ndarray:
    """The only clip of a call, float32 (F, H, W, 3)."""
    return np.asarray(frames[0], dtype=np.float32)


# ------------------------------------------------------------------------------------------------------------------ time


def timed(grid: str, chosen: Sequence[Arm], rounds: int) -> dict[str, float]:
    """Seconds of a whole run by arm, the fastest of some rounds; a patch's from those of its first step and of a later one.

    Steps of a patch are alike, so two of them tell the rest. Step caches differ by step and are run whole.
    """
    runner, steps = Runner(2), GRIDS[grid]["num_inference_steps"]
    dense_steps = round(0.25 * steps)
    dense = next(arms(grid))
    best: dict[str, list[float]] = {}
    around = 0.0

    def note(name: str, seconds: Sequence[float]) -> None:
        best[name] = [min(pair) for pair in zip(seconds, best.get(name, seconds), strict=True)]

    for turn in range(rounds):
        start = time.perf_counter()
        seconds = by_step(runner, dense, steps, output_type="np")
        whole = time.perf_counter() - start - sum(seconds)
        around = whole if turn == 0 else min(whole, around)
        note(dense.name, [min(seconds)])
        for arm in (arm for arm in chosen if arm.recipe is not None):
            if "cache" in arm.recipe:
                note(arm.name, [sum(by_step(runner, arm, steps))])
            else:
                at_work = Arm(**{**vars(arm), "recipe": {"rules": arm.recipe["rules"][1:]}})
                note(arm.name, by_step(runner, at_work, 2))
            note(dense.name, by_step(runner, dense, 1))
            print(arm.name, *(f"{x:.2f}" for x in best[arm.name]), f"dense {best[dense.name][0]:.2f}", flush=True)
    (step,) = best[dense.name]
    found = {dense.name: around + steps * step}
    for arm in chosen:
        if arm.method == "fewer steps":
            found[arm.name] = around + arm.settings["num_inference_steps"] * step
        elif arm.name in best and arm.method != "dense":
            first, *later = best[arm.name]
            found[arm.name] = around + (
                first if not later else dense_steps * step + first + (steps - dense_steps - 1) * later[0]
            )
    return found


def by_step(runner: Runner, arm: Arm, steps: int, output_type: str = "latent") -> list[float]:
    """Seconds of each step of a run of so many."""
    marks = [0.0]

    def begin(module: Any, given: Any) -> None:
        marks[0] = marks[0] or time.perf_counter()

    def end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        marks.append(time.perf_counter())
        return tensors

    few = Arm(**{**vars(arm), "settings": {**arm.settings, "num_inference_steps": steps}})
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
    "all": lambda pair: True,
    "chosen on": lambda pair: pair[0] in CHOSEN_ON,
    "held out": lambda pair: pair[0] not in CHOSEN_ON,
}
EQUAL_TIMES = (1.0, 0.75, 0.6)
LOOKS = dict(zip(METHODS, ("C0", "C1", "C2", "C3", "0.6", "C4", "C5", "C6", "C8"), strict=True))


@dataclass
class Shown:
    """An arm with its runs: the scores by caption and seed, and its time over dense's, None if it was not timed."""

    arm: Arm
    runs: dict[Pair, dict[str, float]]
    time: float | None

    def mean(self, score: str, pairs: Iterable[Pair]) -> float:
        """Mean of a score."""
        return statistics.fmean(float(self.runs[pair][score]) for pair in pairs)


def collect(store: Path | None) -> dict[str, Any]:
    """Return all runs, those of the results file and those in the store, and keep them in that file, scores by arm and run."""
    file = RESULTS / f"{RUNS}.json"
    data: dict[str, Any] = (
        json.loads(file.read_text()) if file.exists() else {"git": [], "runs": {grid: {} for grid in GRIDS}}
    )
    if store is None:
        return data
    for row in (json.loads(path.read_text()) for path in sorted(store.glob("*.json"))):
        scores = {key: float(f"{float(value):.5g}") for key, value in row["scores"].items() if value is not None}
        data["runs"][row["grid"]].setdefault(row["arm"], {})[f"{row['caption']}, {row['seed']}"] = jsonable(scores)
        data["git"] = sorted({*data["git"], row["git"]})
    facts = {"captions": {number: HELD_OUT_CAPTIONS[number] for number in CAPTIONS}, "chosen_on": CHOSEN_ON, "grids": GRIDS}
    write_json(RUNS, {**facts, **data})
    return data


def shown(grid: str, runs: dict[str, Any]) -> list[Shown]:
    """The arms that have a run for every caption that dense has, at the first seed at least."""
    file = RESULTS / f"{TIME}_{grid}.json"
    seconds = json.loads(file.read_text())["seconds"] if file.exists() else {}
    rows = []
    for arm in arms(grid):
        found = {pair_of(key): scores for key, scores in runs.get(arm.name, {}).items()}
        rows.append(Shown(arm, found, seconds[arm.name] / seconds["dense"] if arm.name in seconds else None))
    wanted = {pair for pair in rows[0].runs if pair[1] == 0}
    return [row for row in rows if row.runs and wanted <= row.runs.keys()]


def pair_of(key: str) -> Pair:
    """Caption and seed of a key in the results file."""
    caption, seed = map(int, key.split(", "))
    return caption, seed


def common(rows: Sequence[Shown], of: str) -> list[Pair]:
    """Captions and seeds that all rows ran, of a set."""
    return sorted(pair for pair in set.intersection(*(set(row.runs) for row in rows)) if SETS[of](pair))


def gain(plain: Shown, mended: Shown, of: str) -> str:
    """What one has above the other in foreground PSNR, paired, with the 95 % interval over captions."""
    pairs = common([plain, mended], of)
    captions = [[pair for pair in pairs if pair[0] == caption] for caption in sorted({pair[0] for pair in pairs})]

    def difference(some: Sequence[Sequence[Pair]]) -> float:
        flat = [pair for group in some for pair in group]
        return mended.mean("fg_psnr_db", flat) - plain.mean("fg_psnr_db", flat)

    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*paired_bootstrap(difference, captions)) if captions else ""


def table(rows: Sequence[Shown]) -> Iterator[str]:
    """All arms in Markdown, each over its own runs, what repair brings paired."""
    quality = " | ".join(METRICS[key.removesuffix("_db")].heading for key in SCORES)
    yield f"| arm | runs | time of dense | foreground PSNR, dB (worst) | {quality} | repair brings, dB: chosen on | held out |"
    yield "|---" * (6 + len(SCORES)) + "|"
    for row in rows:
        if row.arm.method == "dense":
            continue
        plain = next((r for r in rows if (r.arm.method, r.arm.setting) == (row.arm.method, row.arm.setting)), row)
        sets = [[pair for pair in row.runs if SETS[of](pair)] for of in ("chosen on", "held out")]
        worst = min(float(scores["fg_psnr_db"]) for scores in row.runs.values())
        cells = [
            row.arm.name,
            str(len(row.runs)),
            f"{row.time:.2f}" if row.time else "",
            ", ".join(f"{row.mean('fg_psnr_db', pairs):.1f}" for pairs in sets if pairs) + f" ({worst:.1f})",
            *(f"{row.mean(key, row.runs):.{digits}f}" for key, digits in SCORES.items()),
            *(gain(plain, row, of) if row is not plain else "" for of in ("chosen on", "held out")),
        ]
        yield f"| {' | '.join(cells)} |"


def at(points: Sequence[tuple[float, float]], limit: float) -> float | None:
    """The best quality within a time, between two settings by a straight line; None where all take longer."""
    points = sorted(points)
    if not points or points[0][0] > limit:
        return None
    best = np.maximum.accumulate([quality for _, quality in points])
    return float(np.interp(limit, [seconds for seconds, _ in points], best))


def at_equal_time(rows: Sequence[Shown]) -> Iterator[str]:
    """Foreground PSNR of each method at equal times, without and with repair, in Markdown; all over the same runs."""
    yield "| method | " + " | ".join(f"{limit:g} of dense: plain | repaired" for limit in EQUAL_TIMES) + " |"
    yield "|---" * (1 + 2 * len(EQUAL_TIMES)) + "|"
    for method in dict.fromkeys(row.arm.method for row in rows[1:]):
        cells = []
        for limit, mended in product(EQUAL_TIMES, (False, True)):
            mine = [r for r in rows if r.arm.method == method and (r.arm.probes > 0) is mended and r.time is not None]
            found = [
                at([(row.time, row.mean("fg_psnr_db", common(rows, of))) for row in mine if row.time], limit)
                for of in ("chosen on", "held out")
            ]
            cells.append(", ".join(f"{value:.1f}" for value in found if value is not None))
        yield f"| {method} | {' | '.join(cells)} |"


def draw(found: dict[str, list[Shown]]) -> None:
    """A panel a grid: foreground PSNR over time; dashed and hollow as it is, filled with repair."""
    import matplotlib.pyplot as plt  # the bench extra

    figure, axes = plt.subplots(1, len(found), figsize=(13, 5.5), layout="constrained", squeeze=False)
    for axis, (grid, rows) in zip(axes[0], found.items(), strict=True):
        pairs = common(rows, "all")
        for method in dict.fromkeys(row.arm.method for row in rows[1:]):
            for mended in (False, True):
                timed_rows = [r for r in rows if r.arm.method == method and (r.arm.probes > 0) is mended and r.time]
                points = sorted((row.time, row.mean("fg_psnr_db", pairs)) for row in timed_rows)
                if points:
                    colour, line = LOOKS.get(method, "k"), "-" if mended or method not in METHODS else "--"
                    look = {"marker": "o" if method in METHODS else "D", "mfc": colour if mended else "w", "color": colour}
                    label = f"{method}, repaired" if mended else method
                    axis.plot(*zip(*points, strict=True), line, **look, label=label)
        axis.axvline(1.0, color="0.8", zorder=0)
        axis.set_title(f"{TOKENS[grid]:,} tokens, {GRIDS[grid]['num_inference_steps']} steps, {len(pairs)} runs", loc="left")
        axis.set_xlabel("time of a whole run, of dense")
        axis.grid(color="#ececec")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("foreground PSNR to the dense run, dB")
    axes[0][-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(PICTURE, dpi=110)


def show(store: Path | None) -> None:
    """Print the tables of both grids, and draw them."""
    runs = collect(store)["runs"]
    found = {grid: rows for grid in GRIDS if len(rows := shown(grid, runs[grid])) > 1}
    for grid, rows in found.items():
        of = [len(common(rows, name)) for name in ("chosen on", "held out")]
        print(f"\n## {TOKENS[grid]:,} tokens\n", *table(rows), "", sep="\n")
        print(f"At equal time, on {of[0]} and {of[1]} runs:\n", *at_equal_time(rows), sep="\n")
    draw(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("show").add_argument("store", type=Path, nargs="?", help="folder of runs made since")
    for name in ("run", "time"):
        part = parts.add_parser(name)
        part.add_argument("--grid", choices=GRIDS, default="small")
        part.add_argument("--only", nargs="+", help="arms whose name holds one of these")
        part.add_argument("--main", action="store_true", help="the main setting of each method only")
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
    chosen = [
        arm
        for arm in arms(options.grid)
        if (arm.main or not options.main) and (not options.only or any(text in arm.name for text in options.only))
    ]
    if options.part == "run":
        run(options.store, options.grid, chosen, CAPTIONS[: options.captions], options.seeds)
    else:
        seconds = timed(options.grid, chosen, options.rounds)
        facts = {**environment(), "grid": options.grid, "settings": GRIDS[options.grid], "rounds": options.rounds}
        write_json(f"{TIME}_{options.grid}", {**facts, "seconds": seconds})


if __name__ == "__main__":
    main()
