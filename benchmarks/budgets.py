"""What budgets by layer, head and span of steps bring, and plans that several steps share: whole runs of the bundled video model.

usage: python -m benchmarks.budgets calibrate|calls|runs|tables [--only NAME ...] [--captions 0 1 2 3] [--seeds 0 1]

`calibrate` makes tables for each selector on two other captions, one of which chooses, and predicts; `runs` compares whole runs with
the dense one, paired by caption and seed; `calls` compares svg_ear's two budgets on captured calls, and times calls that make a plan beside
such that recall one; `tables` prints it all. Every part adds to the file of results, so that a run may be done in pieces. 1,728 tokens,
12 steps, a quarter of them dense, blocks of 32, the rest pooled. One tiny model of coloured shapes: it shows the direction of an effect.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor

import accelplug
from accelplug import zoo
from accelplug.calibration.effects import weigh
from accelplug.calibration.tally import Tally
from accelplug.calibration.target import Target
from accelplug.call import Clock, Site
from accelplug.comparison import metrics
from accelplug.comparison.environment import environment
from accelplug.comparison.ranks import Ranks
from accelplug.hosts.host import model_facts
from accelplug.patches.sparse.budgets import Budgets
from accelplug.recipe import load
from accelplug.registry import patch_class
from accelplug.table import AXES, Table
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, agreement, foreground
from benchmarks.common import RESULTS, write_json
from benchmarks.demo_pareto import Capture

GRID = {"num_frames": 17, "height": 96, "width": 128, "num_inference_steps": 12, "guidance_scale": 3.0}
COMMON = {"block": 32, "rest": "pool", "backend": "blocked"}
SELECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "rows": ("rows", {"density": 0.1}),
    "rows, repaired": ("rows", {"density": 0.1, "repair": "output_query", "probes": 128}),
    "sol": ("sol", {"tau": 1.5, "band": 1}),
    "svg_ear": ("svg_ear", {"block_k": 32, "density": 0.1, "order": "raster"}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "layers": {"over": ["layers"]},
    "layers, heads": {"over": ["layers", "heads"]},
    "steps": {"over": ["steps"]},
    "all": {"over": ["steps", "layers", "heads"]},
    "all, not weighed": {"over": ["steps", "layers", "heads"], "sensitivity": []},
}
REUSED = (2, 3)
"""Steps that share a plan."""
EAR: dict[str, dict[str, Any]] = {
    **{f"density {value}": {"density": value} for value in (0.1, 0.2, 0.3)},
    **{
        f"top_p {p}, min_ratio {least}": {"top_p": p, "min_ratio": least}
        for p, least in ((0.3, 0.02), (0.5, 0.05), (0.7, 0.1))
    },
}
"""svg_ear by its two budgets, in raster order."""
CALIBRATION = HELD_OUT_CAPTIONS[6:8]
FILE = "budgets"


def stored() -> dict[str, Any]:
    """What the file of results has."""
    path = RESULTS / f"{FILE}.json"
    return (
        json.loads(path.read_text())
        if path.exists()
        else {"calibrations": {}, "runs": [], "svg_ear_calls": [], "plan_times": []}
    )


def rules(patch: str, config: dict[str, Any]) -> dict[str, Any]:
    """A recipe with a quarter of the steps dense."""
    return {"rules": [{"where": {"steps": "0:25%"}, "patch": "dense"}, {"patch": patch, "with": {**COMMON, **config}}]}


def run(pipe: Any, caption: str, seed: int, kind: str = "latent") -> Any:
    """Run the pipeline: latents, or float32 frames."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt=caption, **GRID, generator=generator, output_type=kind, return_dict=False)[0]


def calibrate(pipe: Any, name: str) -> dict[str, Any]:
    """Observe once, and share out in every way."""
    patch, config = SELECTORS[name]
    base = load(rules(patch, config), model_facts(pipe))
    tally = Tally(Target("budget", {}, {"sensitivity": ["steps", "layers"]}, base), len(CALIBRATION), 4, 0, "")
    with accelplug.apply(pipe, tally.watcher, gate="off"):
        for turn in range(tally.turns):
            tally.round(turn, 1)
            run(pipe, CALIBRATION[tally.start(turn, lambda done, now="": None)], 100 + turn)
            tally.add_up(Ranks())
    weigh(pipe, tally, lambda: run(pipe, CALIBRATION[0], 100), Ranks(), False)
    (budgets,) = tally.calibrations.values()
    assert isinstance(budgets, Budgets)
    found: dict[str, Any] = {f"final {axis}": budgets.state[f"final {axis}"].tolist() for axis in ("steps", "layers")}
    for variant, options in VARIANTS.items():
        budgets.config = Budgets.Config.model_validate({"sensitivity": ["steps", "layers"], **options})
        found[variant] = {"told": budgets.told(), "values": budgets.tables()[budgets.method.knob].tolist()}
        print(name, variant, found[variant]["told"], flush=True)
    return found


def variants(name: str, calibrated: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each variant of a selector, and its recipe."""
    patch, config = SELECTORS[name]
    yield "uniform", rules(patch, config)
    for variant in VARIANTS:
        if variant in calibrated:
            table = Table(torch.tensor(calibrated[variant]["values"]), AXES)
            yield variant, rules(patch, {**config, "tau" if patch == "sol" else "density": table})
    if name == "rows":
        for steps in REUSED:
            yield f"reuse_steps {steps}", rules(patch, {**config, "reuse_steps": steps})


def measured(pipe: Any, recipe: dict[str, Any], caption: str, seed: int, dense: Any) -> dict[str, float]:
    """Run under a recipe, held against the dense clip."""
    with accelplug.apply(pipe, recipe, gate="off") as plug, plug.trace() as events:
        clip = run(pipe, caption, seed, "np")[0]
    read = [event.density for event in events if event.patch != "dense"]
    return {
        "density": statistics.fmean(read),
        "psnr_db": metrics.psnr_db(clip, dense),
        "foreground_psnr_db": metrics.foreground_psnr_db(clip, dense, foreground),
        "agreement": float(agreement(metrics.to_uint8(clip), caption)),
    }


def runs(pipe: Any, names: list[str], captions: list[int], seeds: list[int], ear: bool) -> None:
    """Add whole runs to the file; what is there already is kept."""
    for caption in captions:
        for seed in seeds:
            data = stored()
            done = {(row["selector"], row["variant"], row["caption"], row["seed"]) for row in data["runs"]}
            todo = [
                (name, variant, recipe)
                for name in names
                for variant, recipe in variants(name, data["calibrations"].get(name, {}))
                if (name, variant, caption, seed) not in done
            ]
            if ear:
                todo += [
                    ("svg_ear", variant, rules("svg_ear", {"block_k": 32, "order": "raster", **config}))
                    for variant, config in EAR.items()
                    if ("svg_ear", variant, caption, seed) not in done
                ]
            text = HELD_OUT_CAPTIONS[caption]
            dense = run(pipe, text, seed, "np")[0] if todo else None
            for name, variant, recipe in todo:
                row: dict[str, Any] = {"selector": name, "variant": variant, "caption": caption, "seed": seed}
                row |= measured(pipe, recipe, text, seed, dense)
                print(*row.values(), flush=True)
                data = stored()  # others may have added to it
                write_json(FILE, {**data, "runs": [*data["runs"], row], **environment(pipe)})


def calls(pipe: Any) -> None:
    """Relative L2 error of svg_ear's outputs by either budget, on the calls of two steps of one clip."""
    Capture.steps = (4, 6, 8)
    with accelplug.apply(pipe, Capture(), gate="off"):
        run(pipe, HELD_OUT_CAPTIONS[0], 0)
    rows = []
    for variant, config in EAR.items():
        patch = patch_class("svg_ear")({**COMMON, "block_k": 32, "order": "raster", **config})
        errors, costs = [], []
        for place, call in Capture.calls.items():
            exact: Tensor = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)
            params = patch.prepare(Site("", "transformer", "self", place.layer, 6), place.layout, Clock(place.step), {})
            errors.append(float((patch.attend(call, params) - exact).norm() / exact.norm()))
            costs.append(patch.inspect(call, params)[0])
        rows.append({"variant": variant, "density": statistics.fmean(costs), "error": statistics.fmean(errors)})
        print(rows[-1], flush=True)
    timed = [plan_times(name) for name in ("rows", "sol", "svg_ear")]
    write_json(FILE, {**stored(), "svg_ear_calls": rows, "plan_times": timed, **environment(pipe)})


def plan_times(name: str) -> dict[str, Any]:
    """Time one captured call by a selector that makes a plan, and by one that recalls it: ms, the median of 15 in turns."""
    patch_name, config = SELECTORS[name]
    patch = patch_class(patch_name)({**COMMON, **config, "reuse_steps": 2})
    place, call = next(iter(Capture.calls.items()))
    site, state = Site("", "transformer", "self", place.layer, 6), dict[str, Any]()
    makes = patch.prepare(site, place.layout, Clock(4, 12, "cond"), state)
    patch.attend(call, makes)
    recalls = patch.prepare(site, place.layout, Clock(5, 12, "cond"), state)
    ways = {"dense": call.dense, "makes": lambda: patch.attend(call, makes), "recalls": lambda: patch.attend(call, recalls)}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(15):
        for way, answer in ways.items():
            started = time.perf_counter()
            answer()
            times[way].append(1e3 * (time.perf_counter() - started))
    row = {"selector": name, **{way: round(statistics.median(found), 3) for way, found in times.items()}}
    print(row, flush=True)
    return row


def tables(data: dict[str, Any]) -> None:
    """Print means, the worst run, and the gain over the uniform density in the same run with its standard error."""
    for row in (*data["svg_ear_calls"], *data["plan_times"]):
        print(row)
    by = {(row["selector"], row["variant"], row["caption"], row["seed"]): row for row in data["runs"]}
    for name, variant in dict.fromkeys(key[:2] for key in by):
        part = {key[2:]: row for key, row in by.items() if key[:2] == (name, variant)}
        scores = [row["foreground_psnr_db"] for row in part.values()]
        pairs = [
            row["foreground_psnr_db"] - by[name, "uniform", *key]["foreground_psnr_db"]
            for key, row in part.items()
            if (name, "uniform", *key) in by
        ]
        error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
        density, psnr = (statistics.fmean(row[key] for row in part.values()) for key in ("density", "psnr_db"))
        print(
            f"{name:16s} {variant:24s} density {density:.3f}  foreground {statistics.fmean(scores):5.2f} (worst {min(scores):5.2f})  "
            f"over uniform {statistics.fmean(pairs) if pairs else float('nan'):+.2f} +- {error:.2f}  psnr {psnr:.2f}  "
            f"{len(part)} runs"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["calibrate", "calls", "runs", "tables"])
    parser.add_argument("--only", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    parser.add_argument("--captions", type=int, nargs="+", default=[0, 1, 2, 3], help="of the held-out ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ear", action="store_true", help="runs: svg_ear by its two budgets, too")
    options = parser.parse_args()
    if options.part == "tables":
        tables(stored())
        return
    pipe = WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        if options.part == "calls":
            calls(pipe)
        elif options.part == "runs":
            runs(pipe, options.only, options.captions, options.seeds, options.ear)
        else:
            for name in options.only:
                made = calibrate(pipe, name)
                data = stored()
                write_json(FILE, {**data, "calibrations": {**data["calibrations"], name: made}, **environment(pipe)})


if __name__ == "__main__":
    main()
