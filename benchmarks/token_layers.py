"""Fewer tokens on real models: what each method costs, how far it is off, what finding its tokens takes, and what becomes of whole runs.

usage: python -m benchmarks.token_layers wan-shapes|terrain-unet [--steps 5 9 13] [--only NAME ...] [--seeds 2] [--repeats 2] [--no-runs]

On the q, k, v of a real dense run: cost is the share of (query, key) pairs that is computed, a pooled key counted as one; error the
relative L2 error of the attention output; time that of the whole answer, and matching what finding the tokens takes of it, both as shares
of dense attention's, between whose calls they are timed (an idle machine). Random masks of blocks, dropping or pooling the others, cost
as much. Whole runs: PSNR against the dense run of the same seed, the mean and the worst of the seeds, beside what two dense runs of
different seeds have, and the time of a run between dense ones. A later run replaces the rows of a model's settings that it makes anew;
with ``--repeats 0``, for a busy machine, it times nothing. Image encoders have all that in `benchmarks.encoders`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import ConsistencyModelPipeline, WanPipeline
from torch.nn.functional import scaled_dot_product_attention

import accelplug
from accelplug import registry, zoo
from accelplug.call import AttentionCall, Clock, Site
from accelplug.comparison.environment import environment
from accelplug.comparison.metrics import psnr_db
from accelplug.hosts.rebind import dense_sdpa
from accelplug.patches.base import Patch
from benchmarks.common import RESULTS, write_json
from benchmarks.demo_pareto import PROMPT, Capture, Place, Random, measured

NAME = "token_layers"
SITE = Site("", "transformer", "self", 0, 6)
TIMES = ("time", "matching")
CLASS = 3
"""Difficulty of the terrain."""


class Calls(Capture):
    """Keeps the q, k, v of every layer at a few steps, in one guidance branch."""

    def attend(self, call: AttentionCall, params: Place) -> torch.Tensor:
        if params.branch in (None, "cond") and (params.step in self.steps or params.branch is None):
            q, k, v = (x.clone() for x in (call.q, call.k, call.v))
            dense = dense_sdpa(q, k, v, attn_mask=call.mask, scale=call.scale)
            self.calls[params] = AttentionCall(q, k, v, call.mask, call.scale, dense)
        return call.dense()


Setting = tuple[str, dict[str, Any]]


def token_settings(cell: list[int], tile: list[int], wide: list[int]) -> dict[str, Setting]:
    """Settings of every token method: tokens of a cell, of a tile, and of a cell of an agent."""
    tome = {"ratio": 0.5, "cell_thw": cell, "tile_thw": [max(t, 2 * c) for t, c in zip(tile, cell, strict=True)]}
    return {
        **{f"tome {ratio}": ("tome", {**tome, "ratio": ratio}) for ratio in (0.25, 0.5, 0.7)},
        **{f"tome {ratio}, not counted": ("tome", {**tome, "ratio": ratio, "proportional": False}) for ratio in (0.25, 0.5)},
        **{f"tome 0.5, {how}": ("tome", {**tome, "merging": how}) for how in ("mlerp", "prune")},
        "tome 0.5, qkv": ("tome", {**tome, "mode": "qkv"}),
        **{f"toma 0.5, {mode}": ("toma", {"tile_thw": tile, "mode": mode}) for mode in ("kv", "qkv")},
        "toma 0.5, kv, soft": ("toma", {"tile_thw": tile, "mode": "kv", "sharpness": 20.0}),
        **{f"todo, {what}": ("todo", {"cell_thw": cell, "representative": what}) for what in ("centre", "mean")},
        **{
            f"agent, {what}": ("agent", {"cell_thw": wide, "agents": what, "tile_thw": tile}) for what in ("cells", "merged")
        },
        "agent, unscaled, no shortcut": ("agent", {"cell_thw": wide, "k_scale": 1.0, "shortcut": 0.0}),
        "ptdit": ("ptdit", {"window_thw": tile}),
        "ptdit, windows alone": ("ptdit", {"window_thw": tile, "weights": [0.0, 1.0, 1.0]}),
    }


PROXIES: dict[str, dict[str, Any]] = {
    "drop": {"rest": "drop"},
    "mean": {},
    "centre": {"representative": "centre"},
    "centre_k_mean_v": {"representative": "centre_k_mean_v"},
    "variance": {"variance": True},
}


def proxies(*windows: tuple[int, int, int]) -> dict[str, Setting]:
    """Settings of `proxy` by its windows."""
    return {
        f"proxy {'x'.join(map(str, window))}, {what}": (
            "proxy",
            {"window_thw": list(window), "halo_thw": [0 if window[0] == 1 else 1, 1, 1], "backend": "blocked", **config},
        )
        for window in windows
        for what, config in PROXIES.items()
    }


@dataclass(frozen=True)
class Subject:
    """A model that methods are tried on.

    Attributes
    ----------
    load : makes its pipeline.
    call : arguments of its call.
    pictures : what a call gives, as float (F, H, W, C) from 0 to 1.
    block : of the random masks.
    settings : by the names of rows.
    dense_steps : share of the first steps that stay dense in whole runs.
    """

    load: Callable[[], Any]
    call: dict[str, Any]
    pictures: Callable[[Any], np.ndarray]
    block: int
    settings: dict[str, Setting]
    dense_steps: str

    def run(self, pipe: Any, seed: int) -> np.ndarray:
        """One whole run."""
        return self.pictures(pipe(**self.call, generator=torch.Generator().manual_seed(seed)))

    def recipe(self, setting: Setting) -> dict[str, Any]:
        """The setting in all layers."""
        patch, config = setting
        dense = [{"where": {"steps": self.dense_steps}, "patch": "dense"}] if self.dense_steps else []
        return {"rules": [*dense, {"patch": patch, "with": config}]}


SUBJECTS = {
    "wan-shapes": Subject(
        lambda: WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32),
        {"prompt": PROMPT, **zoo.DEMO, "output_type": "np"},
        lambda result: result.frames[0],
        64,
        {
            **token_settings([1, 2, 2], [1, 8, 8], [1, 4, 4]),
            "tome 0.5, cells along time": ("tome", {"ratio": 0.5, "cell_thw": [4, 1, 1], "tile_thw": [8, 4, 4]}),
            "todo along time": ("todo", {"cell_thw": [4, 1, 1]}),
            "toma 0.5, along time": ("toma", {"tile_thw": [4, 4, 4], "mode": "kv"}),
            "agent along time": ("agent", {"cell_thw": [4, 2, 2]}),
            **proxies((4, 2, 3), (4, 4, 4), (1, 8, 8)),
        },
        "0:25%",
    ),
    "terrain-unet": Subject(
        lambda: ConsistencyModelPipeline.from_pretrained(zoo.path("terrain-unet")),
        {"batch_size": 1, "class_labels": CLASS, "num_inference_steps": 1, "output_type": "np"},
        lambda result: np.asarray(result.images),
        16,
        {
            **token_settings([1, 2, 2], [1, 8, 8], [1, 4, 4]),
            **proxies((1, 4, 4)),
            "neighborhood, 17 x 17": ("neighborhood", {"window": [1, 17, 17], "block": 16, "backend": "blocked"}),
        },
        "",
    ),
}


def layers(
    pipe: Any, subject: Subject, settings: dict[str, Setting], steps: list[int], repeats: int
) -> list[dict[str, Any]]:
    """One row a setting and captured call."""
    Calls.steps = tuple(steps)
    with accelplug.apply(pipe, Calls(), gate="off"):
        subject.run(pipe, 0)
    return [row for name, setting in settings.items() for row in errors(name, *setting, subject.block, repeats)]


def errors(name: str, patch: str, config: dict[str, Any], block: int, repeats: int) -> list[dict[str, Any]]:
    """One row a captured call, and a printed line for all."""
    method: Any = registry.patch_class(patch)(config)
    rows = []
    for place, call in Calls.calls.items():
        exact = scaled_dot_product_attention(call.q, call.k, call.v)
        cost, error = measured(method, call, place, exact)
        row: dict[str, Any] = {"setting": name, "layer": place.layer, "step": place.step, "cost": cost, "error": error}
        row |= times(method, call, place, repeats)
        blocks = -(-place.layout.length // block)
        for rest, density in (("drop", cost), ("pool", max(cost - 1 / block, 1 / blocks))):
            mask = Random({"block": block, "density": min(density, 1.0), "rest": rest, "backend": "blocked"})
            _, row[f"random_{rest}"] = measured(mask, call, place, exact)
        rows.append(row)
    keys = ("cost", "error", "random_drop", "random_pool")
    mean = {key: statistics.fmean(row[key] for row in rows) for key in keys}
    wins = sum(row["error"] < min(row["random_drop"], row["random_pool"]) for row in rows)
    taken = [f"{key} {statistics.fmean(row[key] for row in rows):.2f}" for key in TIMES if rows[0][key] is not None]
    print(
        f"{name:28s} cost {mean['cost']:.3f}  error {mean['error']:.3f}  random {mean['random_drop']:.3f} dropping, "
        f"{mean['random_pool']:.3f} pooling  best of the three in {wins} of {len(rows)} calls  {', of it '.join(taken)}",
        flush=True,
    )
    return rows


def times(method: Patch, call: AttentionCall, place: Place, repeats: int) -> dict[str, float | None]:
    """Time of the answer, and of its matching where a match can be shared by steps, as shares of dense attention's; medians."""
    shares: dict[str, list[float]] = {key: [] for key in TIMES}
    shared = type(method)({**dict(method.config), "interval": 2}) if hasattr(method.config, "interval") else None

    def answer(by: Patch, clock: Clock, state: dict[str, Any]) -> torch.Tensor:
        params = by.prepare(SITE, place.layout, clock, state)
        return call.dense() if params is None else by.attend(call, params)

    for _ in range(repeats):
        dense = _seconds(call.dense)
        shares["time"].append(_seconds(partial(answer, method, Clock(), {})) / dense)
        if shared is not None:
            state: dict[str, Any] = {}
            first, second = (_seconds(partial(answer, shared, Clock(step, 2), state)) for step in range(2))
            shares["matching"].append((first - second) / dense)
    return {name: statistics.median(found) if found else None for name, found in shares.items()}


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def runs(pipe: Any, subject: Subject, settings: dict[str, Setting], seeds: int, repeats: int) -> list[dict[str, Any]]:
    """One row a setting: whole runs beside dense ones."""
    dense = [subject.run(pipe, seed) for seed in range(max(seeds, 2))]
    rows: list[dict[str, Any]] = [
        {"setting": "another seed", "psnr": psnr_db(dense[1], dense[0]), "worst": None, "time": None}
    ]
    for name, setting in settings.items():
        scores, shares = [], []
        for seed in range(seeds):
            with accelplug.apply(pipe, subject.recipe(setting), gate="off"):
                scores.append(psnr_db(subject.run(pipe, seed), dense[seed]))
        for _ in range(repeats):
            plain = _seconds(lambda: subject.run(pipe, 0))
            with accelplug.apply(pipe, subject.recipe(setting), gate="off"):
                subject.run(pipe, 0)  # the first forward settles what runs where
                shares.append(_seconds(lambda: subject.run(pipe, 0)) / plain)
        row = {
            "setting": name,
            "psnr": statistics.fmean(scores),
            "worst": min(scores),
            "time": statistics.median(shares) if shares else None,
        }
        rows.append(row)
        took = "" if row["time"] is None else f"  time {row['time']:.2f} of dense"
        print(f"{name:28s} PSNR {row['psnr']:.1f} dB, worst {row['worst']:.1f}{took}", flush=True)
    print(f"{'another seed':28s} PSNR {rows[0]['psnr']:.1f} dB")
    return rows


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(SUBJECTS))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 9, 13], help="diffusion steps whose calls are looked at")
    parser.add_argument("--only", nargs="+", help="settings, by their names")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="of what is timed; 0: nothing is")
    parser.add_argument("--no-runs", action="store_true", help="no whole runs")
    options = parser.parse_args()
    torch.set_num_threads(2 if options.repeats else 1)
    torch.set_grad_enabled(False)
    subject = SUBJECTS[options.model]
    settings = {name: subject.settings[name] for name in options.only or subject.settings}
    pipe = subject.load()
    pipe.set_progress_bar_config(disable=True)
    found = {
        **environment(pipe),
        "call": {key: value for key, value in subject.call.items() if key != "output_type"},
        "rows": layers(pipe, subject, settings, options.steps, options.repeats),
        "runs": [] if options.no_runs else runs(pipe, subject, settings, options.seeds, options.repeats),
    }
    path = RESULTS / f"{NAME}.json"
    held = json.loads(path.read_text()) if path.is_file() else {}
    for kind in ("rows", "runs"):
        anew = {row["setting"] for row in found[kind]}
        before = [row for row in held.get(options.model, {}).get(kind, []) if row["setting"] not in anew]
        found[kind] = before + found[kind]
    write_json(NAME, {**held, options.model: found})


if __name__ == "__main__":
    main()
