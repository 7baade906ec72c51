"""Speed and quality of every patch on the bundled model at the demo's grid, beside random block masks of equal density.

usage: python -m benchmarks.demo_pareto [--seeds 3] [--only curve|layers] [--setting NAME ...]

Two parts. `layers`: on the q, k, v of a real dense run, the error of each patch's attention output per layer, all with
rest=drop, and of a random block mask of the same density. `curve`: end-to-end speed-up and foreground PSNR of whole runs,
with a page, and `docs/demo.png`: a row for the dense clip and one for each setting's, at the first seed.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from pydantic import Field

import accelplug
from accelplug import registry, zoo
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.comparison.environment import environment
from accelplug.kernels.orders import Tiles
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.base import Patch
from accelplug.patches.sparse.template import BlockConfig, BlockSparse
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, agreement, foreground
from benchmarks.common import random_members, write_json
from benchmarks.zoo.evaluate import filmstrip

PICTURE = Path(__file__).parents[1] / "docs" / "demo.png"
PROMPT = HELD_OUT_CAPTIONS[1]
DENSE_STEPS = "0:25%"
SETTINGS: dict[str, dict[str, Any]] = {
    "radial": {"patch": "radial", "with": {"block": 64, "decay": 0.2, "rest": "pool"}},
    "neighborhood": {
        "patch": "neighborhood",
        "with": {"block": 64, "window": ["full", 12, 12], "mask": "tile", "rest": "pool"},
    },
    "sol, tau 1": {"patch": "sol", "with": {"tau": 1.0, "order": "morton"}},
    "sol, tau 0.5": {"patch": "sol", "with": {"tau": 0.5, "order": "morton"}},
    "random, density 0.3": {"patch": "random", "with": {"block": 64, "density": 0.3}},
}


@accelplug.register_patch
class Random(BlockSparse):
    """A block mask without a thought: its own block and as many random ones as the density asks for."""

    class Config(BlockConfig):
        density: float = Field(0.3, gt=0, le=1, description="Share of the key blocks that each query block reads.")
        seed: int = Field(0, description="Of the draw.")

    name, cite, summary = "random", "unpublished", "Every query block reads itself and random others."
    config: Config

    def select(self, tiles: Tiles, **where: Any) -> BlockPlan:
        return self.plan(random_members(tiles.slots // self.config.unit, self.config.density, self.config.seed), tiles)


@dataclass(frozen=True)
class Place:
    """Where and when a call was."""

    layer: int
    step: int
    branch: str | None
    layout: Layout


class Capture(Patch):
    """Runs dense, and keeps the q, k, v of a few steps of the conditional branch."""

    family = "sparse"
    speed = False
    steps: tuple[int, ...] = (5, 9, 13)
    calls: dict[Place, AttentionCall] = {}  # noqa: RUF012  # one study, one table

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Place:
        return Place(site.layer or 0, clock.step or 0, clock.branch, layout)

    def attend(self, call: AttentionCall, params: Place) -> torch.Tensor:
        if params.step in self.steps and params.branch == "cond":
            self.calls[params] = AttentionCall(
                call.q.clone(), call.k.clone(), call.v.clone(), call.mask, call.scale, call.dense
            )
        return call.dense()


def layer_errors(pipe: Any) -> list[dict[str, Any]]:
    """Relative L2 error of attention outputs per layer and step, rest=drop, beside random masks of equal density."""
    with accelplug.apply(pipe, Capture(), gate="off"):
        pipe(prompt=PROMPT, **zoo.DEMO, generator=torch.Generator().manual_seed(0), output_type="latent")
    rows: list[dict[str, Any]] = []
    for name, setting in SETTINGS.items():
        config = {**setting["with"], "rest": "drop"}
        if setting["patch"] == "random":
            continue
        patch: Any = registry.patch_class(setting["patch"])(config)
        for place, call in Capture.calls.items():
            exact = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
            density, error = measured(patch, call, place, exact)
            random = [
                measured(Random({"block": patch.config.block, "density": density, "seed": seed}), call, place, exact)
                for seed in range(3)
            ]
            rows.append(
                {
                    "setting": name,
                    "layer": place.layer,
                    "step": place.step,
                    "density": density,
                    "error": error,
                    "random_density": statistics.fmean(d for d, _ in random),
                    "random_error": statistics.fmean(e for _, e in random),
                }
            )
        mine = [row for row in rows if row["setting"] == name]
        better = sum(row["error"] < row["random_error"] for row in mine)
        print(
            f"{name:22s} density {statistics.fmean(r['density'] for r in mine):.3f}  "
            f"error {statistics.fmean(r['error'] for r in mine):.3f}  "
            f"random {statistics.fmean(r['random_error'] for r in mine):.3f}  better in {better} of {len(mine)} calls"
        )
    return rows


def measured(
    patch: BlockSparse, call: AttentionCall, place: Place, exact: torch.Tensor, steps: int | None = None
) -> tuple[float, float]:
    """Return (density, relative L2 error) of a patch on a captured call; tables may ask how many steps there were."""
    params = patch.prepare(Site("", "transformer", "self", place.layer, 6), place.layout, Clock(place.step, steps), {})
    if params is None:
        return 1.0, 0.0
    density, _ = patch.inspect(call, params)
    return density, float((patch.attend(call, params) - exact).norm() / exact.norm())


def recipe(setting: dict[str, Any]) -> dict[str, Any]:
    """The first quarter of the steps stays dense."""
    return {"rules": [{"where": {"steps": DENSE_STEPS}, "patch": "dense"}, {"where": {"kind": "self"}, **setting}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("curve", "layers"))
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="only these; repeat for several")
    options = parser.parse_args()
    settings = {name: SETTINGS[name] for name in options.setting or SETTINGS}
    torch.set_num_threads(2)
    pipe = WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        if options.only != "curve":
            write_json("demo_layers", {**environment(pipe), "prompt": PROMPT, "grid": "demo", "rows": layer_errors(pipe)})
    if options.only != "layers":
        result = accelplug.compare(
            pipe,
            {name: recipe(setting) for name, setting in settings.items()},
            {"prompt": PROMPT, **zoo.DEMO},
            range(options.seeds),
            foreground=foreground,
            detect=agreement,
        )
        print(result)
        write_json(
            "demo_pareto", {**result.to_dict(), "recipes": {name: recipe(setting) for name, setting in settings.items()}}
        )
        result.to_html("demo_pareto.html")
        filmstrip([result.clips[name, 0, 0] for name in ("dense", *settings)], PICTURE)


if __name__ == "__main__":
    main()
