"""Real weights over night: recipes beside dense and its floors, on many prompts, with memory, on a GPU and weights of the hub.

usage: python -m benchmarks.real FOLDER [--model NAME ...] [--recipe NAME ...] [--arm MODULE:FUNCTION ...] [--prompts 15] [--seed 0 ...]
                                        [--floors some|all] [--offload] [--dry-run]

One model after the other; one that cannot be loaded or does not fit is told of, and the next one has its turn. Killed, the same command
goes on where it was: every run is kept in FOLDER/MODEL as soon as it ends. For each model it writes MODEL.json and MODEL.html, and
the recipe files MODEL.yaml and MODEL-presets.yaml with a `measured` row a recipe, as `accelplug compare --record` would:
`accelplug verify MODEL.yaml PIPELINE` runs it once more. `--arm` adds functions of your own, which change the pipeline and return what
undoes that (see docs/measuring.md).

`--dry-run` goes the same way with the bundled model in place of all, in seconds: it shows that the plumbing holds, and says nothing of any
model.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import accelplug
from accelplug import loading, zoo
from accelplug.comparison.result import Comparison
from accelplug.hosts.host import model_facts
from accelplug.recipe import Recipe, RecipeFile, matching_files, read_file, shipped_files

VIDEO = {"guidance_scale": 5.0, "num_inference_steps": 50}
DRY = {"num_frames": 9, "height": 48, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0}


@dataclass(frozen=True)
class Model:
    """A model of the hub, and what its pipeline is called with: sizes and steps of its own card or demo."""

    repository: str
    settings: dict[str, Any] = field(default_factory=dict)
    modular: bool = False


MODELS = {
    "wan2.2": Model(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers", {"height": 720, "width": 1280, "num_frames": 81, "num_inference_steps": 40}
    ),
    "hunyuanvideo": Model("hunyuanvideo-community/HunyuanVideo", {**VIDEO, "height": 720, "width": 1280, "num_frames": 129}),
    "minimax-h3": Model("MiniMaxAI/MiniMax-H3", modular=True),
    "flux": Model(
        "black-forest-labs/FLUX.1-dev", {"height": 2048, "width": 2048, "num_inference_steps": 50, "guidance_scale": 3.5}
    ),
    "qwen-image": Model(
        "Qwen/Qwen-Image", {"height": 1328, "width": 1328, "num_inference_steps": 50, "true_cfg_scale": 4.0}
    ),
}


def loaded(model: Model, offload: bool) -> Any:
    """Load a model of the hub in bfloat16, onto the accelerator or, with `offload`, beside it."""
    import diffusers

    if model.modular:
        pipe = diffusers.ModularPipeline.from_pretrained(model.repository)
        pipe.load_components(dtype=torch.bfloat16)
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model.repository, dtype=torch.bfloat16)
    if offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(torch.accelerator.current_accelerator() or "cpu")
    return pipe


def recipes_in(folder: Path, name: str, pipe: Any, names: Sequence[str]) -> dict[str, Recipe]:
    """Copy the file of recipes that fits a model best, and that of the presets, to where rows are recorded; return those that are meant.

    `names`: the defaults of both if there are none.
    """
    own = copied(matching_files(model_facts(pipe))[0].path, folder / f"{name}.yaml")
    presets = copied(shipped_files()["denoiser"], folder / f"{name}-presets.yaml")
    names = names or [own.default, presets.default]
    return {short: (own if short in own.recipes else presets).recipe(short) for short in names}


def copied(source: Path | None, path: Path) -> RecipeFile:
    """Copy a recipe file anew, without the rows of an earlier night, and read it."""
    assert source is not None
    shutil.copyfile(source, path)
    return read_file(path)


def function(told: str) -> Callable[[Any], Any]:
    """Return the function that ``module:name`` names."""
    module, _, name = told.partition(":")
    found: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    return found


def compared(folder: Path, name: str, pipe: Any, settings: dict[str, Any], options: argparse.Namespace) -> Comparison:
    """Compare one model, and write its three files."""
    recipes = recipes_in(folder, name, pipe, options.recipe)
    arms = {**recipes, **{told.rpartition(":")[2]: function(told) for told in options.arm}}
    floors = "all" if options.floors == "all" else True
    found: Comparison = accelplug.compare(
        pipe, arms, settings, options.seed or [0], prompts=options.prompts, floors=floors, resume=folder / name
    )
    found.to_json(folder / f"{name}.json")
    found.to_html(folder / f"{name}.html")
    found.record()
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Compare all models that are asked for; return how many could not be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeat for several (default all)")
    parser.add_argument(
        "--recipe",
        action="append",
        default=[],
        help="of the model's file; or a preset; repeat for several (default its default, and balanced)",
    )
    parser.add_argument(
        "--arm", action="append", default=[], metavar="MODULE:FUNCTION", help="a function, change(pipe) -> undo"
    )
    parser.add_argument("--prompts", type=int, default=15)
    parser.add_argument("--seed", action="append", type=int, help="repeat for several (default 0)")
    parser.add_argument("--floors", choices=["some", "all"], default="some")
    parser.add_argument("--offload", action="store_true", help="keep on the accelerator only what runs")
    parser.add_argument("--dry-run", action="store_true", help="the bundled model in place of each")
    options = parser.parse_args(given)
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in options.model or MODELS:
        model = MODELS[name]
        print(f"{name}: {'the bundled model in its place' if options.dry_run else model.repository}", flush=True)
        try:
            pipe = loading.pipeline(zoo.path(), "float32", "cpu") if options.dry_run else loaded(model, options.offload)
            print(compared(options.folder, name, pipe, DRY if options.dry_run else model.settings, options), flush=True)
        except Exception:  # a night is long: the next model has its turn
            failed += 1
            traceback.print_exc()
        pipe = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
