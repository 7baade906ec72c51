"""What tune() finds on the bundled video model, held against shipped recipes, random search, and other splits of seeds.

usage: python -m benchmarks.tune [--time 600] [--budget "psnr>=26" ...] [--grid middle] [--parts ...] [--pairs 6] [--limit 2040] [--smoke]

Five parts, each written to `benchmarks/results/tune.json` as soon as it is done:

* `tune`: one search: time by phase, probes, whole runs, the winner and its proof, and how far forecasts were off. Under every further
  budget another one, `tune, BUDGET`, with the probes of the first.
* `random`: candidates drawn at random from the same space for as long, each run whole, with the same proof.
* `held_out`: on the proof's prompt and seeds, both winners, every recipe shipped for the model, and the best patch alone, the
  best cache alone, and the two together.
* `finds`: whether the winner is at least as fast there as the fastest shipped recipe that keeps the budget.
* `splits`: the search's fastest candidates run on prompts and seeds that no search saw. For every way to choose two of them
  to search on and two to prove with, the fastest that holds on the first two is asked to hold on the others, then the next.

In the last three parts every run stands directly beside a dense one, whose time it is divided by.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

from accelplug import zoo
from accelplug.comparison.environment import environment
from accelplug.comparison.journal import Journal
from accelplug.comparison.result import jsonable
from accelplug.comparison.rows import DENSE_ROW, Variant, gains
from accelplug.comparison.study import Study
from accelplug.compat.diffusers import quiet
from accelplug.hosts.host import model_facts
from accelplug.recipe import load, matching_files
from accelplug.tuning.budget import Bound, parse_budget
from accelplug.tuning.prediction import Probe
from accelplug.tuning.result import Point, Tuned
from accelplug.tuning.search import Search
from accelplug.tuning.space import FINALISTS, WORTH, Arm, Candidate, cached, repaired
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, foreground
from benchmarks.common import write_json

GRIDS = {  # frames, height, width, steps
    "tiny": (9, 32, 32, 9),  # 5 x 4 x 4 = 80 tokens
    "small": (9, 64, 80, 9),  # 5 x 8 x 10 = 400 tokens
    "middle": (33, 96, 128, 12),  # 17 x 12 x 16 = 3,264 tokens
    "demo": (33, 128, 192, 16),  # 17 x 16 x 24 = 6,528 tokens
}
SEARCHED, PROVEN, FRESH = HELD_OUT_CAPTIONS[0], HELD_OUT_CAPTIONS[1], HELD_OUT_CAPTIONS[2:]
PARTS = ("random", "held_out", "splits")
SIDE = 2
"""Prompts and seeds on each side of a split."""

Pair = tuple[int, int]
Run = dict[str, float]


class RandomSearch(Search):
    """The same space, the same time and the same proof, with nothing foretold: what to run is drawn."""

    seed = 0

    def _probe(self, found: Sequence[Arm]) -> None:
        assert self.predictor is not None
        self.draw = random.Random(self.seed)
        layout = self.predictor.trajectory.layout
        every = [each for arm in found for each in (arm, *repaired(arm, layout))]
        self.predictor.probes = {arm: Probe({0: 1.0}, 0.5) for arm in every}  # every arm is kept, and nothing is known of it
        self.predictor.layer_share = {layer: self.draw.random() for layer in range(self.predictor.trajectory.layers)}

    def _weigh(self) -> bool:
        return False

    def _run_caches(self) -> None:
        caches = [cache for ladder in self.ladders for cache in ladder]
        alone = [Candidate(None, cache=cache) for cache in caches]
        self.space = [*alone, *(c for patched in self.candidates for c in (patched, *cached(patched, caches)))]

    def _next(self) -> Candidate | None:
        left = [candidate for candidate in self.space if candidate not in self.points]
        return self.draw.choice(left) if left else None

    def _predicted(self, candidate: Candidate) -> dict[str, float | None]:
        return {}


def searched(
    kind: type[Search],
    pipe: Any,
    settings: dict[str, Any],
    seeds: int,
    bounds: tuple[Bound, ...],
    seconds: float,
    journal: Journal,
    patches: Sequence[str] | None = None,
) -> Search:
    """Run one search on the first half of the seeds and one prompt, proven on the others, as `accelplug.tune` does."""
    study = Study(pipe, [{"prompt": text, **settings} for text in (SEARCHED, PROVEN)], list(range(seeds)), foreground, None)
    seen, unseen = [(0, seed) for seed in range(seeds // 2)], [(1, seed) for seed in range(seeds // 2, seeds)]
    search = kind(study, bounds, seen, unseen, seconds, journal)
    with quiet(pipe):
        search.run(patches, True)
    return search


def told(search: Search, found: Tuned) -> dict[str, Any]:
    """The search as plain data."""
    errors = [error for candidate, point in search.points.items() if (error := forecast_error(search, candidate, point))]
    measured = {name: [error[name] for error in errors if name in error] for name in ("speedup", "margin")}
    return {
        "why": found.why,
        "notes": found.notes,
        "seconds": found.seconds,
        "probes": 0 if isinstance(search, RandomSearch) or search.predictor is None else len(search.predictor.probes),
        "whole_runs": sum(len(row.samples) for row in search.study.rows.values()),
        "winner": vars(found.proven) if found.proven else None,
        "overturned": sum(point.verdict == "overturned" for point in found.points),
        "forecast_error": {
            name: {"points": len(values), "median": statistics.median(values), "largest": max(values)}
            for name, values in measured.items()
            if values
        },
        "points": [{**vars(point), "error": search.study.rows[point.name].error} for point in found.points],
    }


def forecast_error(search: Search, candidate: Candidate, point: Point) -> dict[str, float]:
    """How far a predictor was off from the first whole run: speed-up as a share of it, the margin in the bound's unit."""
    sample = search.study.rows[point.name].samples[0]
    gain = gains(search.study.rows[DENSE_ROW], search.study.rows[point.name])[0]
    clips = [search.study.clips[name, sample.prompt, sample.seed] for name in (DENSE_ROW, point.name)]
    error = {}
    if (speedup := point.predicted.get("speedup")) is not None and candidate.arm is not None:
        error["speedup"] = abs(speedup / gain - 1)
    if (margin := point.predicted.get("margin")) is not None:
        error["margin"] = abs(margin - min(bound.margin(bound.value(sample, clips[0], clips[1])) for bound in search.bounds))
    return error


def beside(
    study: Study, recipes: Mapping[str, Any], pairs: Sequence[Pair], bounds: Sequence[Bound], until: float | None = None
) -> dict[str, list[Run]]:
    """Run recipes on every pair, as dense, a, b, dense, c, d, dense, ...: each has a dense run next to it.

    Returns
    -------
    By name, one run a pair: prompt, seed, gain over the dense neighbour, margin to the nearest bound, and the bounds' values.
    With `until`, on `time.monotonic`, no pair is begun that would end later, as far as the one before it tells.
    """
    facts = model_facts(study.pipe)
    found: dict[str, list[Any]] = {name: [] for name in recipes}
    variants = [Variant(name, load(recipe, facts)) for name, recipe in recipes.items()]

    def run(variant: Variant, pair: Pair) -> Any:
        study.rows.setdefault(variant.name, study.new_row(variant))
        study.time(variant, *pair)
        return study.rows[variant.name].samples[-1]

    taken = 0.0
    for pair in pairs:
        start = time.monotonic()
        if until is not None and start + taken > until:
            break
        before = run(Variant(DENSE_ROW, kind="dense"), pair).latency_ms
        for two in (variants[i : i + 2] for i in range(0, len(variants), 2)):
            samples = [run(variant, pair) for variant in two]
            after = run(Variant(DENSE_ROW, kind="dense"), pair).latency_ms
            for variant, sample, neighbour in zip(two, samples, (before, after), strict=False):
                clips = study.clips[DENSE_ROW, *pair], study.clips[variant.name, *pair]
                values = {bound.name: bound.value(sample, *clips) for bound in bounds}
                margin = min(bound.margin(values[bound.name]) for bound in bounds)
                run_ = {"prompt": pair[0], "seed": pair[1], "gain": neighbour / sample.latency_ms, "margin": margin}
                found[variant.name].append({**run_, **values})
            before = after
        taken = time.monotonic() - start
    return found


def summary(runs: Sequence[Run], bounds: Sequence[Bound]) -> dict[str, Any]:
    """Median and range of the gain, the worst of each bound, and whether every run keeps the budget."""
    gains = [run["gain"] for run in runs]
    worst = {b.name: (min if b.higher_is_better else max)(run[b.name] for run in runs) for b in bounds}
    spread = {"gain": statistics.median(gains), "gain_from": min(gains), "gain_to": max(gains)}
    return {**spread, **worst, "holds": all(run["margin"] >= 0 for run in runs), "runs": len(runs)}


def pieces(search: Search) -> dict[str, Candidate]:
    """The best patch alone, the best cache alone that goes with it, and both; best: the fastest that holds, else the closest."""

    def best(candidates: Sequence[Candidate]) -> Candidate | None:
        known = [(candidate, search.points[candidate]) for candidate in candidates if candidate in search.points]
        order = sorted(
            known, key=lambda item: (item[1].margin < 0, -item[1].speedup if item[1].margin >= 0 else -item[1].margin)
        )
        return order[0][0] if order else None

    patch = best([c for c in search.points if c.arm is not None and c.cache is None])
    if patch is None:
        return {}
    together = {both.cache: both for both in cached(patch, [cache for ladder in search.ladders for cache in ladder])}
    cache = best([c for c in search.points if c.arm is None and c.cache in together])
    if cache is None:
        return {"patch alone": patch}
    return {"patch alone": patch, "cache alone": cache, "both": together[cache.cache]}


def pool(points: Sequence[Point], bounds: Sequence[Bound], number: int) -> list[Point]:
    """What another split might choose: the fastest that keep the budget or miss it by less than a tenth of a bound."""
    slack = 0.1 * max(abs(bound.limit) for bound in bounds)
    close = [point for point in points if point.speedup >= WORTH and point.margin >= -slack]
    return sorted(close, key=lambda point: -point.speedup)[:number]


def overturned(runs: Mapping[str, Sequence[Run]], search: Sequence[int], proof: Sequence[int]) -> str:
    """What becomes of a split, as indices of runs: how many winners of the search its proof overturns before one stands."""

    def gain(name: str, which: Sequence[int]) -> float:
        return statistics.median(runs[name][i]["gain"] for i in which)

    def holds(name: str, which: Sequence[int]) -> bool:
        return all(runs[name][i]["margin"] >= 0 for i in which)

    held = sorted((n for n in runs if holds(n, search) and gain(n, search) >= WORTH), key=lambda n: -gain(n, search))
    if not held:
        return "nothing held in the search"
    for number, name in enumerate(held[:FINALISTS]):
        if holds(name, proof) and gain(name, [*search, *proof]) >= WORTH:
            return f"proven after {number} overturned"
    return f"all {min(len(held), FINALISTS)} overturned"


def splits(runs: Mapping[str, Sequence[Run]]) -> dict[str, int]:
    """Count the outcomes over all ways to choose `SIDE` runs to search on and `SIDE` others to prove with."""
    indices = range(min((len(found) for found in runs.values()), default=0))
    outcomes = Counter(
        overturned(runs, search, proof)
        for search in itertools.combinations(indices, SIDE)
        for proof in itertools.combinations([i for i in indices if i not in search], SIDE)
    )
    return dict(sorted(outcomes.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--time", type=float, nargs="+", default=[600.0], help="seconds of each search, of further ones the last"
    )
    parser.add_argument("--budget", nargs="+", default=["psnr>=26"], help="bounds, of one search each (default psnr>=26)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="beside the searches (default all)")
    parser.add_argument("--patches", nargs="+", help="of the searches (default all that have a ladder)")
    parser.add_argument("--grid", choices=GRIDS, default="middle")
    parser.add_argument("--seeds", type=int, default=4, help="of a search, half of them for its proof (default 4)")
    parser.add_argument("--pairs", type=int, default=6, help="prompts and seeds to split, at least 4 (default 6)")
    parser.add_argument("--no-shipped", dest="shipped", action="store_false", help="leave shipped recipes out of held_out")
    parser.add_argument("--pool", type=int, default=6, help="candidates that are run on them (default 6)")
    parser.add_argument(
        "--limit", type=float, default=2040.0, help="seconds in all; pairs are left out for it (default 2040)"
    )
    parser.add_argument("--report", type=Path, help="also write the page of the search (.html)")
    parser.add_argument("--name", default="tune", help="of the result file (default tune)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument(
        "--smoke", action="store_true", help="all parts at a tiny size, into tune_smoke: figures mean nothing"
    )
    options = parser.parse_args()
    if options.smoke:
        options.grid, options.seeds, options.pairs, options.pool, options.threads = "tiny", 2, 4, 2, 1
        options.name, options.time = "tune_smoke", [10.0]
    until = time.monotonic() + options.limit
    torch.set_num_threads(options.threads)
    pipe = WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32)
    frames, height, width, steps = GRIDS[options.grid]
    settings = {"num_frames": frames, "height": height, "width": width, "num_inference_steps": steps, "guidance_scale": 3.0}
    asked = {**vars(options), "report": options.report and options.report.name}
    data: dict[str, Any] = {**environment(pipe), "settings": settings, "budget": options.budget, "asked": asked}

    def write(**parts: Any) -> None:
        data.update(parts)
        write_json(options.name, jsonable(data))

    journal, winners = Journal(None, ""), {}

    def search_for(name: str, kind: type[Search], budget: str, seconds: float) -> tuple[Search, Tuned]:
        search = searched(kind, pipe, settings, options.seeds, parse_budget(budget), seconds, journal, options.patches)
        found = search.result()
        print(found)
        write(**{name: told(search, found)})
        winners[name] = found.proven
        return search, found

    first, *others = options.budget
    search, found = search_for("tune", Search, first, options.time[0])
    if options.report is not None:
        found.to_html(options.report)
    for number, budget in enumerate(others, start=1):
        search_for(f"tune, {budget}", Search, budget, options.time[min(number, len(options.time) - 1)])
    if "random" in options.parts:
        search_for("random", RandomSearch, first, found.seconds["all"])
    if "held_out" in options.parts:
        write(**held_out(pipe, search, winners, options.shipped))
    if "splits" in options.parts:
        write(splits=splitted(pipe, found, settings, options, until))


def held_out(pipe: Any, search: Search, winners: Mapping[str, Point | None], shipped: bool) -> dict[str, Any]:
    """Run winners, the best patch and cache with and without each other, and what is shipped, where the search never looked."""
    bounds, (file,) = search.bounds, matching_files(model_facts(pipe))
    recipes: dict[str, Any] = {f"shipped {name}": recipe for name, recipe in file.recipes.items() if shipped}
    recipes |= {name: candidate.rules() for name, candidate in pieces(search).items()}
    recipes |= {name: point.recipe for name, point in winners.items() if point is not None}
    with quiet(pipe):
        runs = beside(search.study, recipes, search.unseen, bounds)
    found = {name: {"recipe": str(search.study.rows[name].rules), **summary(of, bounds)} for name, of in runs.items()}
    within = [row["gain"] for name, row in found.items() if name.startswith("shipped") and row["holds"]]
    mine = found["tune"]["gain"] if winners["tune"] else 1.0
    best = max(within, default=1.0)
    finds = {
        "tune": mine,
        "fastest_shipped_within_budget": best if within else None,
        "at_least_as_fast": mine >= max(best, 1.0),
    }
    for name, row in found.items():
        print(f"{name:24s} {row['gain']:.2f}x  {'holds' if row['holds'] else 'fails'}  {[row[b.name] for b in bounds]}")
    return {"held_out": found, "finds": finds} if shipped else {"held_out": found}


def splitted(pipe: Any, found: Tuned, settings: dict[str, Any], options: argparse.Namespace, until: float) -> dict[str, Any]:
    """Run the search's fastest on fresh prompts and seeds, and split these in every way."""
    bounds = found.bounds
    texts = [{"prompt": FRESH[i], **settings} for i in range(options.pairs)]
    fresh = Study(pipe, texts, list(range(100, 100 + options.pairs)), foreground, None)
    chosen = {point.name: point.recipe for point in pool(found.points, bounds, options.pool)}
    with quiet(pipe):
        runs = beside(fresh, chosen, list(zip(range(options.pairs), fresh.seeds, strict=True)), bounds, until)
    counts = splits(runs)
    print(counts)
    return {"counts": counts, "candidates": {name: summary(of, bounds) for name, of in runs.items() if of}, "runs": runs}


if __name__ == "__main__":
    main()
