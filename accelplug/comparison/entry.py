"""compare(): a model dense and with recipes, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from accelplug import compat, show
from accelplug.comparison import arguments
from accelplug.comparison.arms import arm_name, is_change
from accelplug.comparison.exam import Exam
from accelplug.comparison.features import compare_features
from accelplug.comparison.floors import floor_prompts
from accelplug.comparison.parts import taken_apart
from accelplug.comparison.pictures import Pictures
from accelplug.comparison.prompts import with_prompts
from accelplug.comparison.ranks import working
from accelplug.comparison.resume import Finished, facts_of
from accelplug.comparison.rows import DENSE_ROW, STOCK_ROW, Variant
from accelplug.comparison.study import OBSERVED, Study
from accelplug.comparison.texts import TextExam
from accelplug.comparison.texts.compared import compare_texts
from accelplug.comparison.vlm import compare_vlm
from accelplug.comparison.walks import Walks, compare_walks
from accelplug.errors import AccelplugError, worded
from accelplug.hosts.host import model_facts, require_ability
from accelplug.hosts.models import denoisers, runs_compiled, unwrapped
from accelplug.recipe import Recipe, load

STEP_CACHE = "FirstBlockCache"
CACHE_THRESHOLD = 0.2
"""Residual difference below which FirstBlockCache skips the other blocks."""


def compare(
    pipe: Any,
    recipe: Any = None,
    inputs: Any = None,
    seeds: Sequence[int] = (0,),
    *,
    prompts: int | Sequence[str] | None = None,
    caches: bool = False,
    floors: bool | str = True,
    parts: bool = False,
    foreground: Callable[[np.ndarray], np.ndarray] | None = None,
    detect: Callable[[np.ndarray, str], float] | None = None,
    processor: Any = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Any:
    """Run a model dense and with recipes, on the same inputs, and measure speed and quality.

    A vision-language model is examined on an `Exam` and gives a `VlmComparison` (see `accelplug.comparison.vlm`), a language model on
    a `TextExam` and gives a `TextComparison` (see `accelplug.comparison.texts.compared`), an image encoder is run on `Pictures` and gives
    a `FeatureComparison` (see `accelplug.comparison.features`), a geometry transformer on `Walks` and gives a `WalkComparison` (see
    `accelplug.comparison.walks`); the rest of this is about pipelines, which give a `Comparison`.

    Several processes (`accelerate launch`, torchrun) share the prompts and seeds, each with a pipeline of its own: dense and recipes
    of one prompt and seed are timed in one process. All get all figures, the first one the clips too; it alone writes files.

    Each recipe is first run once traced, for attention time, density, plans and kernels; this also compiles. Then come the timed
    runs, interleaved: dense, every recipe, dense, ... The pipeline is left as it was.

    Parameters
    ----------
    pipe : a diffusers pipeline, or a transformers language or vision-language model, or image encoder, or a geometry transformer.
    recipe : one arm or several: anything that `accelplug.apply` takes, a list of such, or a mapping name -> arm. Of a pipeline an arm may
        also be a function, ``change(pipe) -> undo``, that makes it faster by whatever means and returns what undoes that.
    inputs : arguments of the pipeline's call; one mapping, or one per prompt. `output_type` is set here, to arrays. For a
        vision-language model an `Exam`; generated scenes if left out. For an image encoder `Pictures`, or what it takes; drawn scenes if
        left out. For a geometry transformer `Walks`, or pictures (S, 3, H, W) by name; drawn rooms if left out. For a language model a
        `TextExam`; one prompt length at which all recipes are at work if left out.
    seeds : one run of everything per seed and prompt.
    prompts : a pipeline's: a list of prompts, `inputs` being what all have; or how many of the given ones, or else of those that come with
        the package. From three on it is said who beats whom, see `accelplug.comparison.paired`; six show the smallest certain difference.
    caches : add FirstBlockCache alone, and with each recipe.
    floors : add what dense attention itself scores, once a prompt: in another kernel, in another dtype, at another seed. True: on as many
        prompts, the first ones, as take half as many runs again, on one at least; ``all``: on all; False: on none.
    parts : take every recipe of two parts or more apart: its patches, its step cache, and compilation where the pipeline is compiled. Each
        is run alone, and all but each; a table says what each gave, and what is lost between them (see `accelplug.comparison.parts`).
    foreground : uint8 (F, H, W, 3) -> bool (F, H, W), the objects, for the foreground PSNR.
    detect : (uint8 clip, prompt) -> agreement in [0, 1].
    processor : a language model's: its processor, or its tokenizer; an image encoder's image processor.
    resume : a pipeline's: a folder that keeps what was run; a comparison that was killed goes on from there. Arms, prompts and seeds may be
        added; what was measured on another model, device, version or with other settings is an error.
    progress : show a progress bar.

    Raises
    ------
    AccelplugError
        If there is nothing to run.
    UnsupportedError
        If models of this kind are not compared.
    """
    pipe, processor = unwrapped(pipe, processor)
    if (host := require_ability(pipe, "compare")).gives != "pictures":
        if caches or parts or not all(given is None for given in (prompts, foreground, detect, resume)):
            raise AccelplugError(
                f"caches, parts, prompts, foreground, detect and resume are about pipelines; leave them out for {host.called}."
            )
        examined = {"answers": _examine, "features": _looked_at, "geometry": _walked}
        return examined[host.gives](pipe, recipe, inputs, processor, progress)
    calls = arguments.calls(pipe, with_prompts(pipe, inputs, prompts), "compare")
    seeds = arguments.seeds_of(seeds, "compare")
    arguments.require_functions(foreground=foreground, detect=detect)
    arms = _arms_of(pipe, recipe)
    recipes = {name: arm for name, arm in arms.items() if isinstance(arm, Recipe)}
    study = Study(pipe, calls, seeds, foreground, detect)
    variants = [Variant(DENSE_ROW, kind="dense")]
    for name, arm in arms.items():
        variants.append(Variant(name, arm) if isinstance(arm, Recipe) else Variant(name, kind="function", change=arm))
    if caches:
        _require_caches(pipe)
        cached = {STEP_CACHE: load(OBSERVED, model_facts(pipe))}
        cached |= {f"{STEP_CACHE} + {name}": loaded for name, loaded in recipes.items()}
        variants += [
            Variant(name, loaded.with_cache("first_block", threshold=CACHE_THRESHOLD), "cache")
            for name, loaded in cached.items()
        ]
    apart, stacks = taken_apart(variants, runs_compiled(pipe)) if parts else ([], [])
    variants += apart
    with working(pipe) as ranks, compat.diffusers.quiet(pipe):
        if resume is not None:
            study.finished = Finished(resume, facts_of(pipe, calls, foreground, detect), ranks)
        pairs = ranks.share(study.pairs)
        jobs = study.jobs(
            variants, pairs, floor_prompts(floors, len(calls), len(seeds), len(variants) * (len(study.pairs) + 1))
        )
        with show.progress("comparing", len(jobs), progress and ranks.first) as tell:
            for done, (what, run) in enumerate(jobs):
                tell(done, what)
                run()
        study.gather(ranks)
    return replace(study.finish(recipes), stacks=stacks)


def _examine(model: Any, recipe: Any, exam: Any, processor: Any, progress: bool) -> Any:
    """Examine a language model: on pictures where it sees some, unless a `TextExam` is given."""
    arguments.require_processor(processor, "compare")
    sees = hasattr(processor, "image_processor")
    if not isinstance(exam, TextExam | (Exam if sees else TextExam) | None):
        raise AccelplugError(
            f"A language model is examined on a TextExam{', or on an Exam of pictures' if sees else ''}, got {type(exam).__name__}; "
            + worded(
                f"see TextExam(){', Exam.scenes() and Exam.coco(folder)' if sees else ''}.",
                "this one sees no pictures: leave --coco and --amber out.",
            )
        )
    rows = _recipes_of(model, recipe)
    if isinstance(exam, TextExam) or not sees:
        texts = exam if isinstance(exam, TextExam) else TextExam()
        return compare_texts(model, rows, texts.at_work(rows.values()), processor, progress=progress)
    return compare_vlm(model, rows, exam or Exam.scenes(), processor, progress=progress)


def _looked_at(model: Any, recipe: Any, pictures: Any, processor: Any, progress: bool) -> Any:
    """Run an image encoder on pictures."""
    held = pictures if isinstance(pictures, Pictures) else Pictures(pictures)
    return compare_features(model, _recipes_of(model, recipe), held, processor, progress=progress)


def _walked(model: Any, recipe: Any, walks: Any, processor: Any, progress: bool) -> Any:
    """Run a geometry transformer on scenes."""
    held = walks if isinstance(walks, Walks) else Walks(walks)
    return compare_walks(model, _recipes_of(model, recipe), held, progress=progress)


def _recipes_of(model: Any, recipe: Any) -> dict[str, Recipe]:
    """The recipes by the names of their rows, of a model that takes no functions."""
    arms = _arms_of(model, recipe)
    if changes := [name for name, arm in arms.items() if not isinstance(arm, Recipe)]:
        raise AccelplugError(f"{changes[0]} is a function: arms are recipes here. Compare functions on a pipeline.")
    return arms


def _arms_of(pipe: Any, recipe: Any) -> dict[str, Any]:
    """The recipes and functions by the names of their rows."""
    named = _by_name(pipe, recipe)
    if taken := [name for name in named if name.split(",")[0] in (DENSE_ROW, STOCK_ROW) or name.startswith(STEP_CACHE)]:
        raise AccelplugError(
            f"An arm is called {taken[0]!r}, as a row of the comparison is. "
            + worded("Pass {'another name': recipe}.", "Rename it in its file.")
        )
    return named


def _by_name(pipe: Any, recipe: Any) -> dict[str, Any]:
    facts = model_facts(pipe)
    if isinstance(recipe, Mapping) and not {"rules", "patch", "recipes"} & set(recipe):
        return {str(name): item if is_change(item) else load(item, facts) for name, item in recipe.items()}
    items = recipe if isinstance(recipe, list | tuple) else [recipe]
    loaded: list[Any] = [item if is_change(item) else load(item, facts) for item in items]
    names = [arm_name(item) if is_change(item) else item.name.split("/")[-1] for item in loaded]
    return {
        name if names.count(name) == 1 else f"{name} {i}": item
        for i, (name, item) in enumerate(zip(names, loaded, strict=True))
    }


def _require_caches(pipe: Any) -> None:
    for part in denoisers(pipe).values():
        if not hasattr(part, "enable_cache"):
            raise AccelplugError(
                f"{type(part).__name__} takes no FirstBlockCache; {worded('compare with caches=False', 'leave --caches out')}."
            )
