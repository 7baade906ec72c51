"""Guidance by heads on the bundled video model: does it show more of what its caption says, where classifier-free guidance is low?

usage: python -m benchmarks.guidance hunt STORE [--scale 1] [--u 0.5] [--captions 8]
       python -m benchmarks.guidance run STORE [--captions 24] [--seeds 0] [--seconds 360]
       python -m benchmarks.guidance show STORE

`hunt` chooses heads by the zoo's detector on some of the captions that training held out, without classifier-free guidance. `run` makes
every arm on others of them: a run is a line in STORE as soon as it ends, and is not made again; it stops after some seconds, to be called
again. `show` joins them. Arms have the same captions and seeds, so that differences are paired: intervals hold 95 %, resampled over
captions. A control guides away from the head that scored least. Quality alone: times are not taken.

Runs have 4 steps: in 8 and more the model shows all that it is asked for without any guidance, and nothing can be raised.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

import accelplug
from accelplug import files, zoo
from accelplug.calibration.hunting import sharpness, shown_share
from accelplug.comparison.environment import environment
from accelplug.comparison.evaluators.statistics import paired_bootstrap
from accelplug.hosts.clips import clip_of
from accelplug.recipe import read_file
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS
from benchmarks.common import write_json

SETTINGS: dict[str, Any] = {**zoo.SMALL, "num_inference_steps": 4}
HUNT_SEED = 1000
FIRST_HUNTED = 26
"""Of the held-out captions, the first that heads are hunted on; arms are made on those before. Those of training the model shows anyway."""
LOW = (1.0, 1.5, 3.0)
"""Scales of classifier-free guidance; 1 is none, 3 the model's own."""
Row = dict[str, Any]


def pipeline() -> Any:
    pipe = WanPipeline.from_pretrained(zoo.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recipe_file(store: Path, scale: float, u: float) -> Path:
    return store / f"scale_{scale:g}_u_{u:g}.yaml"


def hunt(store: Path, scale: float, u: float, captions: int) -> None:
    """Choose heads, resumably."""
    asked = list(HELD_OUT_CAPTIONS[FIRST_HUNTED : FIRST_HUNTED + captions])
    found = accelplug.calibrate(
        pipeline(),
        "headhunter",
        asked,
        objective="agreement",
        path=recipe_file(store, scale, u),
        config={"scale": scale, "u": u},
        options={"rounds": 1, "add": 3},
        inputs={**SETTINGS, "guidance_scale": 1.0},
        seed=HUNT_SEED,
    )
    print(found.describe())


def ranked(path: Path) -> list[list[int]]:
    """Heads by the objective with each alone, the best first."""
    scores = load_file(path.with_suffix(".safetensors"))["round 1"]
    return [
        [index // scores.shape[1], index % scores.shape[1]]
        for index in scores.flatten().argsort(descending=True, stable=True).tolist()
    ]


def arms(store: Path) -> dict[str, tuple[float, Any]]:
    """By name: classifier-free guidance, and the recipe beside it."""
    found: dict[str, tuple[float, Any]] = {f"cfg {g:g}": (g, None) for g in LOW}
    for path in sorted(store.glob("scale_*_u_*.yaml")):
        (rule,), name, heads = read_file(path).recipe().rules, path.stem.replace("_", " "), ranked(path)

        def guided(some: list[list[int]], rule: Any = rule) -> dict[str, Any]:
            return {"rules": [{"patch": rule.patch, "with": {**rule.settings, "heads": some}}]}

        found |= {f"cfg {g:g}, best head, {name}": (g, guided(heads[:1])) for g in LOW[:2]}
        found[f"cfg 1, three best, {name}"] = 1.0, guided(heads[:3])
        found[f"cfg 1, last head, {name}"] = 1.0, guided(heads[-1:])
    return found


def rows_of(store: Path) -> list[Row]:
    path = store / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(store: Path, captions: int, seeds: Sequence[int], seconds: float) -> None:
    """Make what is not there yet."""
    begun, pipe, done = time.monotonic(), pipeline(), {(row["arm"], row["caption"], row["seed"]) for row in rows_of(store)}
    for seed, caption in product(seeds, range(captions)):
        for name, (cfg, recipe) in arms(store).items():
            if (name, caption, seed) in done:
                continue
            if time.monotonic() - begun > seconds:
                return
            given = {**SETTINGS, "guidance_scale": cfg, "prompt": HELD_OUT_CAPTIONS[caption]}
            with nullcontext() if recipe is None else accelplug.apply(pipe, recipe, gate="off"), torch.no_grad():
                clip, _ = clip_of(pipe, {**given, "generator": torch.Generator().manual_seed(seed)})
            share = shown_share(clip, HELD_OUT_CAPTIONS[caption])
            row = {
                "arm": name,
                "caption": caption,
                "seed": seed,
                "agreement": share == 1,
                "share": share,
                "sharpness": sharpness(clip),
            }
            files.append(store / "rows.jsonl", f"{json.dumps(row)}\n")
    print("all runs are made")


def paired(rows: Sequence[Row], arm: str, beside: str, key: str) -> dict[str, float]:
    """Mean difference of a figure between two arms on the same captions and seeds, with its 95 % interval."""
    by = {(row["arm"], row["caption"], row["seed"]): float(row[key]) for row in rows}
    places = sorted({(c, s) for a, c, s in by if a == arm} & {(c, s) for a, c, s in by if a == beside})
    captions = [
        [by[arm, c, s] - by[beside, c, s] for c, s in places if c == caption] for caption in sorted({c for c, _ in places})
    ]
    mean, low, high = paired_bootstrap(lambda some: statistics.fmean(x for values in some for x in values), captions)
    return {"pairs": len(places), "mean": mean, "low": low, "high": high}


def summary(rows: Sequence[Row]) -> Iterator[Row]:
    """Each arm: its means, and what it differs by from the same guidance without the patch."""
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        said: Row = {"arm": arm, "runs": len(own)}
        said |= {key: statistics.fmean(float(row[key]) for row in own) for key in ("agreement", "share", "sharpness")}
        if (beside := arm.split(",")[0]) != arm:
            said |= {f"{key} beside {beside}": paired(rows, arm, beside, key) for key in ("agreement", "share", "sharpness")}
        yield said


def table(said: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The arms in Markdown."""
    yield "| arm | runs | agreement | share of the caption | sharpness | agreement beside the same guidance |"
    yield "|---|---|---|---|---|---|"
    for row in said:
        against = next((value for key, value in row.items() if key.startswith("agreement beside")), None)
        cell = "" if against is None else f"{against['mean']:+.2f} ({against['low']:+.2f} to {against['high']:+.2f})"
        figures = [f"{row['agreement']:.2f}", f"{row['share']:.2f}", f"{row['sharpness']:.4f}"]
        yield f"| {' | '.join([row['arm'], str(row['runs']), *figures, cell])} |"


def show(store: Path) -> None:
    """Write the result file."""
    rows = rows_of(store)
    paths = sorted(store.glob("scale_*_u_*.safetensors"))
    hunted = {path.stem: load_file(path)["round 1"].tolist() for path in paths}
    facts = {
        **environment(pipeline()),
        "settings": SETTINGS,
        "hunted on": list(HELD_OUT_CAPTIONS[FIRST_HUNTED : FIRST_HUNTED + 8]),
        "each head alone, by layer": hunted,
    }
    said = list(summary(rows))
    write_json("guidance", {**facts, "arms": said, "rows": rows})
    print(*table(said), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["hunt", "run", "show"])
    parser.add_argument("store", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--u", type=float, default=0.5)
    parser.add_argument("--captions", type=int, default=24, help="at most 24: on the others heads are hunted")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.store.mkdir(parents=True, exist_ok=True)
    if options.what == "hunt":
        hunt(options.store, options.scale, options.u, options.captions)
    elif options.what == "run":
        run(options.store, options.captions, options.seeds, options.seconds)
    else:
        show(options.store)


if __name__ == "__main__":
    main()
