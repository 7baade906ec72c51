"""compare(): a model dense and with recipes, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from accelplug import compat, show
from accelplug.comparison import arguments
from accelplug.comparison.exam import Exam
from accelplug.comparison.ranks import working
from accelplug.comparison.rows import DENSE_ROW, STOCK_ROW, Variant
from accelplug.comparison.study import OBSERVED, Study
from accelplug.comparison.texts import TextExam
from accelplug.comparison.texts.compared import compare_texts
from accelplug.comparison.vlm import compare_vlm
from accelplug.errors import AccelplugError, worded
from accelplug.hosts.host import model_facts, require_ability
from accelplug.hosts.models import denoisers, unwrapped
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
    caches: bool = False,
    floors: bool = True,
    foreground: Callable[[np.ndarray], np.ndarray] | None = None,
    detect: Callable[[np.ndarray, str], float] | None = None,
    processor: Any = None,
    progress: bool = True,
) -> Any:
    """Run a model dense and with recipes, on the same inputs, and measure speed and quality.

    A vision-language model is examined on an `Exam` and gives a `VlmComparison` (see `accelplug.comparison.vlm`), a language model on
    a `TextExam` and gives a `TextComparison` (see `accelplug.comparison.texts.compared`); the rest of this is about pipelines, which
    give a `Comparison`.

    Several processes (`accelerate launch`, torchrun) share the prompts and seeds, each with a pipeline of its own: dense and recipes
    of one prompt and seed are timed in one process. All get all figures, the first one the clips too; it alone writes files.

    Each recipe is first run once traced, for attention time, density, plans and kernels; this also compiles. Then come the timed
    runs, interleaved: dense, every recipe, dense, ... The pipeline is left as it was.

    Parameters
    ----------
    pipe : a diffusers pipeline, or a transformers language or vision-language model.
    recipe : one recipe or several: anything that `accelplug.apply` takes, a list of such, or a mapping name -> recipe.
    inputs : arguments of the pipeline's call; one mapping, or one per prompt. `output_type` is set here, to arrays. For a
        vision-language model an `Exam`; generated scenes if left out. For a language model a `TextExam`; one prompt length at which
        all recipes are at work if left out.
    seeds : one run of everything per seed and prompt.
    caches : add FirstBlockCache alone, and with each recipe.
    floors : add the two floors: dense in another attention kernel or dtype, and dense at another seed.
    foreground : uint8 (F, H, W, 3) -> bool (F, H, W), the objects, for the foreground PSNR.
    detect : (uint8 clip, prompt) -> agreement in [0, 1].
    processor : a language model's: its processor, or its tokenizer.
    progress : show a progress bar.

    Raises
    ------
    AccelplugError
        If there is nothing to run.
    UnsupportedError
        If models of this kind are not compared.
    """
    pipe, processor = unwrapped(pipe, processor)
    if require_ability(pipe, "compare").gives == "answers":
        if caches or foreground is not None or detect is not None:
            raise AccelplugError("caches, foreground and detect are about pipelines; leave them out for a language model.")
        return _examine(pipe, recipe, inputs, processor, progress)
    prompts, seeds = arguments.calls(pipe, inputs, "compare"), arguments.seeds_of(seeds, "compare")
    arguments.require_functions(foreground=foreground, detect=detect)
    recipes = _rows_of(pipe, recipe)
    study = Study(pipe, prompts, seeds, foreground, detect)
    variants = [Variant(DENSE_ROW, kind="dense"), *(Variant(name, loaded) for name, loaded in recipes.items())]
    if caches:
        _require_caches(pipe)
        cached = {STEP_CACHE: load(OBSERVED, model_facts(pipe))}
        cached |= {f"{STEP_CACHE} + {name}": loaded for name, loaded in recipes.items()}
        variants += [
            Variant(name, loaded.with_cache("first_block", threshold=CACHE_THRESHOLD), "cache")
            for name, loaded in cached.items()
        ]
    with working(pipe) as ranks, compat.diffusers.quiet(pipe):
        pairs = ranks.share(study.pairs)
        floors = floors and (ranks.first or ranks.joined)
        jobs = [(f"tracing {variant.name}", partial(study.trace, variant)) for variant in variants]
        jobs += [
            (f"timing {variant.name}, seed {seed}", partial(study.time, variant, prompt, seed))
            for (prompt, seed), variant in product(pairs, variants)
        ]
        if floors:
            jobs += [("floor: dense in another kernel", partial(study.floor_of_kernels))]
            jobs += [("floor: dense at another seed", partial(study.floor_of_seeds))]
        with show.progress("comparing", len(jobs), progress and ranks.first) as tell:
            for done, (what, run) in enumerate(jobs):
                tell(done, what)
                run()
        study.gather(ranks)
    return study.finish(recipes)


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
    rows = _rows_of(model, recipe)
    if isinstance(exam, TextExam) or not sees:
        texts = exam if isinstance(exam, TextExam) else TextExam()
        return compare_texts(model, rows, texts.at_work(rows.values()), processor, progress=progress)
    return compare_vlm(model, rows, exam or Exam.scenes(), processor, progress=progress)


def _rows_of(pipe: Any, recipe: Any) -> dict[str, Recipe]:
    """The recipes by the names of their rows."""
    named = _by_name(pipe, recipe)
    if taken := [name for name in named if name.split(",")[0] in (DENSE_ROW, STOCK_ROW) or name.startswith(STEP_CACHE)]:
        raise AccelplugError(
            f"A recipe is called {taken[0]!r}, as a row of the comparison is. "
            + worded("Pass {'another name': recipe}.", "Rename it in its file.")
        )
    return named


def _by_name(pipe: Any, recipe: Any) -> dict[str, Recipe]:
    facts = model_facts(pipe)
    if isinstance(recipe, Mapping) and not {"rules", "patch", "recipes"} & set(recipe):
        return {name: load(item, facts) for name, item in recipe.items()}
    items = recipe if isinstance(recipe, list | tuple) else [recipe]
    loaded = [load(item, facts) for item in items]
    names = [item.name.split("/")[-1] for item in loaded]
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
