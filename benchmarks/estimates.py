"""Whether what repair estimates of its error, and what a few denoiser calls show, puts whole runs in the order of their PSNR.

usage: python -m benchmarks.estimates [--frames 17] [--seeds 0] [--threads 2]

The first settings of four ladders of `tune`, rest dropped and pooled, as they are and repaired from 4 and 8 % of the rows (`rows`: from
those that it samples). Each is tried on a few denoiser calls of a dense run (snapshots), as `tune` does, and run whole; then the best
repaired and the others as they are beside a step cache. Written to `benchmarks/results/estimates.json`:

* `ranks`: rank correlation (Spearman) of PSNR with the error of the denoiser's output at the snapshots, with the median estimate of the
  attention's error there, and with that of the whole run; the last two of repaired recipes alone.
* `slope`: dB that PSNR falls where the error at the snapshots grows tenfold, and how far runs lie from that line (root mean square).
* `together`: PSNR of patch and cache together, and what the sum of both noises predicts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

from accelplug import zoo
from accelplug.comparison.environment import environment
from accelplug.comparison.rows import DENSE_ROW, Row, Variant
from accelplug.comparison.study import Study
from accelplug.compat.diffusers import quiet
from accelplug.hosts.host import model_facts
from accelplug.hosts.models import denoisers
from accelplug.recipe import load
from accelplug.show import jsonable
from accelplug.tuning.caches import Cache, CacheFacts, fitting
from accelplug.tuning.prediction import Predictor, Trajectory, margin_of_both
from accelplug.tuning.space import Arm, Candidate, arms, repaired
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, foreground
from benchmarks.common import rank_correlation, write_json

PATCHES = ("sol", "rows", "neighborhood", "radial")
CACHE = "taylorseer lite"
KAPPA = 2.0
"""How fast errors of early steps count for less, as `tune` takes it before whole runs say better."""


def first_rungs(trajectory: Trajectory) -> list[list[Arm]]:
    """The first settings of each patch and rest, each as it is and repaired."""
    first: dict[tuple[Any, ...], Arm] = {}
    for arm in arms(trajectory.layout, PATCHES):
        first.setdefault((arm.patch, dict(arm.settings)["rest"]), arm)
    return [[arm, *repaired(arm, trajectory.layout)] for arm in first.values()]


def line(x: list[float], y: list[float]) -> dict[str, float]:
    """Slope of the least-squares line, and the root mean square of what is off it."""
    (slope, _), (residual, *_), *_ = np.polyfit(x, y, 1, full=True)
    return {"slope": slope, "off": math.sqrt(residual / len(x))}


def ranks(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Rank correlation of PSNR with what was known of the repaired recipes, and of all."""

    def of(those: list[dict[str, Any]], *names: str) -> dict[str, float]:
        psnr = [run["psnr_db"] for run in those]
        return {"recipes": len(those), **{name: rank_correlation([run[name] for run in those], psnr) for name in names}}

    mended = [run for run in found if run["run_estimate"] is not None]
    return {
        "repaired": of(mended, "snapshot_error", "snapshot_estimate", "run_estimate"),
        "all": of(found, "snapshot_error"),
    }


def measured(pipe: Any, study: Study) -> dict[str, Any]:
    """Probe and run all recipes."""
    trajectory = Trajectory.record(study, 0, study.seeds[0])
    predictor = Predictor(trajectory, (), 1.0, 0.0)
    facts = model_facts(pipe)

    def run(name: str, rules: Any, kind: str = "recipe") -> Row:
        variant = Variant(name, None if rules is None else load(rules, facts), kind)
        row = study.rows.setdefault(name, study.new_row(variant))
        for seed in study.seeds:
            study.time(variant, 0, seed)
        print(f"{name}: {row.mean('psnr_db')}", flush=True)
        return row

    run(DENSE_ROW, None, "dense")
    found: list[dict[str, Any]] = []
    groups = first_rungs(trajectory)
    for arm in (arm for group in groups for arm in group):
        probe = predictor.probes[arm] = trajectory.probe(pipe, Candidate(arm).rules())
        row = run(str(arm), Candidate(arm).rules())
        if not math.isfinite(psnr := row.mean("psnr_db") or math.nan):
            continue  # it reads everything
        error = predictor.predicted_error(Candidate(arm), KAPPA)
        told = {"snapshot_error": error, "snapshot_estimate": probe.estimate, "run_estimate": row.error and row.error.median}
        found.append({"name": str(arm), "psnr_db": psnr, "fg_psnr_db": row.mean("fg_psnr_db"), **told})
    logs = [math.log10(one["snapshot_error"]) for one in found]
    slope = line(logs, [one["psnr_db"] for one in found])
    beside = [arm for group in groups for arm in (group[0], group[-1])]
    return {
        "runs": found,
        "ranks": ranks(found),
        "slope": slope,
        "together": _together(run, _cache(pipe, trajectory), beside, found),
    }


def _cache(pipe: Any, trajectory: Trajectory) -> Cache:
    ladders, _ = fitting(denoisers(pipe), CacheFacts(trajectory.steps, trajectory.contexts, trajectory.magnitudes))
    return next(ladder[0] for ladder in ladders if ladder[0].ladder == CACHE)


def _together(run: Callable[..., Row], cache: Cache, beside: list[Arm], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    alone = {one["name"]: one["psnr_db"] for one in found}
    cache_db = run(str(cache), Candidate(None, cache=cache).rules(), "cache").mean("psnr_db") or math.nan
    told = []
    for arm in (arm for arm in beside if str(arm) in alone):
        candidate, patch_db = Candidate(arm, cache=cache), alone[str(arm)]
        both = run(str(candidate), candidate.rules()).mean("psnr_db")
        predicted = margin_of_both(patch_db, cache_db, in_db=True)
        told.append(
            {"name": str(arm), "patch_db": patch_db, "cache_db": cache_db, "both_db": both, "predicted_db": predicted}
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--frames", type=int, default=17, help="of 96 x 128 pixels (default 17: 1,728 tokens with the first)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--name", default="estimates", help="of the result file (default estimates)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32)
    settings = {"num_frames": options.frames, "height": 96, "width": 128, "num_inference_steps": 12, "guidance_scale": 3.0}
    study = Study(pipe, [{"prompt": HELD_OUT_CAPTIONS[0], **settings}], options.seeds, foreground, None)
    with quiet(pipe):
        data = measured(pipe, study)
    print(data["ranks"], data["slope"])
    for one in data["together"]:
        print(f"{one['name']}: both {one['both_db']:.1f} dB, predicted {one['predicted_db']:.1f}")
    write_json(options.name, jsonable({**environment(pipe), "settings": settings, "seeds": options.seeds, **data}))


if __name__ == "__main__":
    main()
