"""Longer and larger than trained: whole runs of the bundled video model at 2 and 4 times its frames, and above its canvas.

usage: python -m benchmarks.longer run STORE [--size 2x 4x canvas larger redrawn native] [--arms NAME ...] [--captions 8] [--seeds 0]
       python -m benchmarks.longer show [STORE]
       python -m benchmarks.longer time [--size 2x 4x larger] [--arms NAME ...] [--rounds 3]
       python -m benchmarks.longer memory [--size 2x 4x larger] [--arms NAME ...]

`run` makes runs for their quality alone, on any machine: each is one file in STORE as soon as it ends, and is not made again. `show` makes
the table of them, and of earlier ones in the results, as long as they are of the same arm. `time` takes an idle machine: the median time of
a whole run over that of the first arm, made by turns. `memory`: the most of each arm in a process of its own, on any machine. A new arm is
a row of `ARMS`.

Sizes: "2x" and "4x" the trained length, on the smallest canvas. "canvas" is the largest canvas that was trained, "larger" has half as much
again on each side. "redrawn" is how FreeSwim is published: a clip of "canvas" is enlarged, noised again, and denoised at strength 0.7; its
arm "enlarged" leaves it at the first of these.

Plain extrapolation asks the stock model for more than it was trained on. Held against what the caption says, not against another run:

* agreement: whether the detector finds what the caption says, and nothing besides;
* motion, flicker: mean size of the first and of the second difference of frames, in 1/255. Of a clip that `accelplug.zoo.shapes` draws both
  fall with its length, since shapes cross the canvas once;
* low, middle, high: shares of the power over time, its mean taken off, in [0, pi/8], (pi/8, pi/4] and (pi/4, pi], the bands of `freelong`;
* fine: share of the power over rows and columns, their mean taken off, at frequencies of either that "canvas" cannot hold, in 1/1000.

The row "drawn" is of clips that are drawn, of the same captions, as long.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import WanVideoToVideoPipeline
from PIL import Image

from accelplug import files
from accelplug.comparison.environment import environment, revision
from accelplug.comparison.metrics import to_uint8
from accelplug.show import jsonable
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, agreement, render, sample_scene
from benchmarks.common import RESULTS, write_json
from benchmarks.whole_runs import Arm, Runner, clip_of

NATIVE = 17
"""Latent frames that the model was trained on at most: 33 in pixels."""
CANVAS = {"height": 64, "width": 80, "num_inference_steps": 8, "guidance_scale": 3.0}
SIZES: dict[str, dict[str, Any]] = {
    "native": {**CANVAS, "num_frames": 33},
    "2x": {**CANVAS, "num_frames": 65},
    "4x": {**CANVAS, "num_frames": 129},
    "canvas": {**CANVAS, "num_frames": 17, "height": 128, "width": 192},
    "larger": {**CANVAS, "num_frames": 17, "height": 192, "width": 288},
    "redrawn": {**CANVAS, "num_frames": 17, "height": 192, "width": 288, "strength": 0.7},
}
PLAIN, ENLARGED = "plain", "enlarged"
BLOCKS = {"block": 32, "backend": "blocked"}
RIFLEX, INTERPOLATED = ({"kind": kind, "native": NATIVE} for kind in ("riflex", "interpolate"))


def patched(patch: str, **settings: Any) -> dict[str, Any]:
    """A recipe of one patch in all of self-attention."""
    return {"rules": [{"where": {"kind": "self"}, "patch": patch, "with": {**BLOCKS, **settings}}]}


LVSA = patched("lvsa", native=NATIVE, window=3)
WINDOWS = patched("freeswim", native_hw=[16, 24])
DENSE = {"rules": [{"patch": "dense"}]}
ARMS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "riflex": {**DENSE, "positions": RIFLEX},
    "interpolate": {**DENSE, "positions": INTERPOLATED},
    "lvsa": LVSA,
    "lvsa, still anchors": patched("lvsa", native=NATIVE, window=3, rotate=False),
    "lvsa, riflex": {**LVSA, "positions": RIFLEX},
    "lvsa, interpolate": {**LVSA, "positions": INTERPOLATED},
    "freelong": patched("freelong", native=NATIVE),
    "freelong, every 2": patched("freelong", native=NATIVE, every=2),
    "freelong, interpolate": {**patched("freelong", native=NATIVE), "positions": INTERPOLATED},
    "freeswim": WINDOWS,
    "freeswim, second path": {"rules": [*WINDOWS["rules"], {"patch": "second_path"}]},
    ENLARGED: None,
}
OF_SIZE: dict[str, tuple[str, ...]] = {
    "native": (PLAIN,),
    "canvas": (PLAIN,),
    "larger": (PLAIN, "freeswim", "freeswim, second path"),
    "redrawn": (ENLARGED, PLAIN, "freeswim", "freeswim, second path"),
}
"""Arms that a size is tried with; the others, with all that go by frames."""
BY_FRAMES = (PLAIN, *(name for name in ARMS if name not in OF_SIZE["redrawn"]))
FIGURES: dict[str, Callable[[np.ndarray, str], float]] = {
    "agreement": lambda clip, text: float(agreement(clip, text)),
    "motion": lambda clip, text: change(clip, 1),
    "flicker": lambda clip, text: change(clip, 2),
    "low": lambda clip, text: power(clip, 0, 1 / 8),
    "middle": lambda clip, text: power(clip, 1 / 8, 1 / 4),
    "high": lambda clip, text: power(clip, 1 / 4, 1),
    "fine": lambda clip, text: fine(clip),
}
"""Figures of a uint8 clip (F, H, W, 3) and its caption."""


def change(clip: np.ndarray, order: int) -> float:
    """Mean size of a difference of frames."""
    return float(np.abs(np.diff(clip.astype(np.float64), n=order, axis=0)).mean())


def power(clip: np.ndarray, low: float, high: float) -> float:
    """Share of the power over time, its mean taken off, at frequencies above `low` and up to `high`, in units of pi."""
    spectrum = np.abs(np.fft.rfft(clip.astype(np.float64), axis=0)) ** 2
    by_frequency = spectrum[1:].sum(axis=(1, 2, 3))
    at = 2 * np.arange(1, len(spectrum)) / len(clip)
    whole = float(by_frequency.sum())
    return float(by_frequency[(at > low) & (at <= high)].sum()) / whole if whole else 0.0


def fine(clip: np.ndarray) -> float:
    """Share of the power over rows and columns that is above the highest frequency of the trained canvas in either, in 1/1000."""
    height, width = clip.shape[1:3]
    spectrum = (np.abs(np.fft.fft2(clip.astype(np.float64), axes=(1, 2))) ** 2).sum(axis=(0, 3))
    spectrum[0, 0] = 0.0
    rows, columns = (np.abs(np.fft.fftfreq(n)) * n for n in (height, width))
    above = (rows > SIZES["canvas"]["height"] / 2)[:, None] | (columns > SIZES["canvas"]["width"] / 2)
    return 1000 * float(spectrum[above].sum() / spectrum.sum()) if spectrum.any() else 0.0


def arms_of(size: str, names: Sequence[str] = ()) -> list[Arm]:
    """The arms of a size, plain first, or those named."""
    return [Arm(name, "", 0.0, True, ARMS[name], SIZES[size]) for name in names or OF_SIZE.get(size, BY_FRAMES)]


class Drawing:
    """Clips of arms, from noise or from an enlarged clip."""

    def __init__(self) -> None:
        self.first = Runner(1)
        self.again = copy(self.first)  # the same texts
        names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
        self.again.pipe = WanVideoToVideoPipeline(**{name: self.first.pipe.components[name] for name in names})
        self.again.pipe.vae_scale_factor_spatial = (
            self.first.pipe.vae_scale_factor_spatial
        )  # it takes it from what halves time
        self.again.pipe.set_progress_bar_config(disable=True)
        self.small: dict[tuple[int, int], np.ndarray] = {}

    def clip(self, arm: Arm, caption: int, seed: int) -> np.ndarray:
        """Return what an arm shows, uint8 (F, H, W, 3)."""
        if "strength" not in arm.settings:
            return to_uint8(clip_of(self.first.call(arm, caption, seed, output_type="np")))
        if (caption, seed) not in self.small:
            self.small = {(caption, seed): self.clip(arms_of("canvas")[0], caption, seed)}
        to = arm.settings["width"], arm.settings["height"]
        video = [Image.fromarray(frame).resize(to, Image.Resampling.BICUBIC) for frame in self.small[caption, seed]]
        if arm.name == ENLARGED:
            return np.stack([np.asarray(frame) for frame in video])
        settings = {name: value for name, value in arm.settings.items() if name != "num_frames"}  # as many as the clip has
        return to_uint8(
            clip_of(self.again.call(replace(arm, settings=settings), caption, seed, video=video, output_type="np"))
        )


def run(store: Path, size: str, arms: Sequence[Arm], captions: Sequence[int], seeds: Sequence[int]) -> None:
    """Make the runs that are not in the store."""
    drawing, git = Drawing(), revision()
    store.mkdir(parents=True, exist_ok=True)
    for seed, caption, arm in product(seeds, captions, arms):
        file = store / f"{arm.name}, {arm.key(caption, seed)}.json"
        if file.exists():
            continue
        clip, text = drawing.clip(arm, caption, seed), HELD_OUT_CAPTIONS[caption]
        figures = {name: figure(clip, text) for name, figure in FIGURES.items()}
        row = {
            "size": size,
            "arm": arm.name,
            "recipe": arm.recipe,
            "settings": arm.settings,
            "caption": caption,
            "seed": seed,
        }
        files.write(file, json.dumps(jsonable({**row, **figures, "git": git}), indent=1))
        print(f"{time.strftime('%T')} {size} {caption} {seed} {arm.name}: {figures['agreement']:.0f}", flush=True)


def drawn(size: str, captions: Sequence[int]) -> dict[str, float]:
    """Mean figures of clips that are drawn, not generated."""
    settings, found = SIZES[size], []
    for caption in captions:
        text = HELD_OUT_CAPTIONS[caption]
        scene = sample_scene(np.random.default_rng(caption), text)
        clip = render(scene, settings["num_frames"], settings["height"], settings["width"])
        found.append({name: figure(clip, text) for name, figure in FIGURES.items()})
    return {name: statistics.fmean(row[name] for row in found) for name in FIGURES}


def collected(store: Path | None, before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs made before, of arms that are still the same, and those in the store, which take their places."""
    runs: dict[tuple[Any, ...], dict[str, Any]] = {}
    files_of = sorted(store.glob("*.json")) if store else []
    for row in (*before, *(json.loads(path.read_text()) for path in files_of)):
        arm = row["arm"] in ARMS and jsonable([ARMS[row["arm"]], SIZES.get(row["size"])])
        if arm == [row["recipe"], row["settings"]]:
            runs[row["size"], row["arm"], row["caption"], row["seed"]] = row
    return [runs[key] for key in sorted(runs)]


def show(store: Path | None) -> None:
    """Print a table for each size, and write it into the results."""
    results = RESULTS / "longer.json"
    runs = collected(store, json.loads(results.read_text())["runs"] if results.exists() else [])
    by_arm: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in runs:
        by_arm[row["size"], row["arm"]].append(row)
    table: list[dict[str, Any]] = []
    for size in SIZES:
        rows = {name: by_arm[size, name] for name in ARMS if by_arm[size, name]}
        if not rows:
            continue
        captions = sorted({row["caption"] for found in rows.values() for row in found})
        table.append({"size": size, "arm": "drawn", "runs": len(captions), **drawn(size, captions)})
        for name, found in rows.items():
            means = {
                figure: statistics.fmean(row[figure] for row in found)
                for figure in FIGURES
                if all(figure in row for row in found)
            }
            gits = sorted({row["git"] for row in found})
            table.append({"size": size, "arm": name, "runs": len(found), "git": ", ".join(gits), **means})
    for row in table:
        figures = "  ".join(f"{name} {row[name]:6.3f}" for name in FIGURES if name in row)
        print(f"{row['size']:8} {row['arm']:24} {row['runs']:3}  {figures}")
    write_json("longer", {"environment": environment(), "table": table, "runs": runs})


def timed(size: str, arms: Sequence[Arm], rounds: int) -> None:
    """Time whole runs by turns on two threads, and write medians over the first arm's."""
    runner = Runner(2)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for number, arm in product(range(rounds + 1), arms):
        start = time.perf_counter()
        runner.call(arm, 0, 0, output_type="latent")
        if number:  # the first of each warms up
            seconds[arm.name].append(time.perf_counter() - start)
    plain, rows = statistics.median(seconds[arms[0].name]), []
    for arm in arms:
        median = statistics.median(seconds[arm.name])
        rows.append({"size": size, "arm": arm.name, "seconds": median, "over_first": median / plain})
        print(f"{size:8} {arm.name:24} {median:7.2f} s  {median / plain:.2f} of {arms[0].name}")
    write_json(f"longer_time_{size}", {"environment": environment(), "rounds": rounds, "rows": rows})


def weighed(size: str, arms: Sequence[Arm]) -> None:
    """Write the most memory of a process that makes one run, for each arm."""
    rows = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as alone:
        for arm in arms:
            rows.append({"size": size, "arm": arm.name, "peak_mib": alone.submit(peak_mib, arm).result()})
            print(f"{size:8} {arm.name:24} {rows[-1]['peak_mib']:.0f} MiB")
    write_json(f"longer_memory_{size}", {"environment": environment(), "rows": rows})


def peak_mib(arm: Arm) -> float:
    """Most memory of a process that makes one run, with the model in it."""
    Runner(1).call(arm, 0, 0, output_type="latent")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "show", "time", "memory"))
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["2x"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[])
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "run" and options.store is None:
        parser.error("run needs the STORE of the runs")
    if options.what in ("time", "memory") and "redrawn" in options.size:
        parser.error(f"{options.what} goes by runs from noise, not by redrawn")
    if options.what == "show":
        show(options.store)
        return
    for size in options.size:
        arms = arms_of(size, options.arms)
        if options.what == "run":
            run(options.store, size, arms, range(options.captions), options.seeds)
        elif options.what == "time":
            timed(size, arms, options.rounds)
        else:
            weighed(size, arms)


if __name__ == "__main__":
    main()
