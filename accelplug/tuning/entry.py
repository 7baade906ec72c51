"""tune(): the fastest recipe of a pipeline within a quality budget, or what makes a language model answer better."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accelplug import compat, show
from accelplug.comparison import arguments
from accelplug.comparison.journal import Journal, fingerprint
from accelplug.comparison.ranks import require_one, working
from accelplug.comparison.study import Study
from accelplug.comparison.texts import TextExam
from accelplug.errors import AccelplugError, UnsupportedError, worded
from accelplug.hosts.host import require_ability
from accelplug.hosts.models import unwrapped
from accelplug.tuning import space
from accelplug.tuning.budget import Bound, parse_budget, require_measured
from accelplug.tuning.compiled import room_to_compile
from accelplug.tuning.language import tune_language
from accelplug.tuning.result import Tuned
from accelplug.tuning.search import Search
from accelplug.tuning.space import require_ladders
from accelplug.tuning.texts import tune_texts
from accelplug.tuning.workers import Workers


def tune(
    pipe: Any,
    inputs: Any = None,
    budget: str | Bound | Sequence[str | Bound] | None = None,
    *,
    time_budget_s: float = 600.0,
    seeds: int | Sequence[int] = 4,
    patches: Sequence[str] | None = None,
    caches: bool = True,
    foreground: Callable[[np.ndarray], np.ndarray] | None = None,
    detect: Callable[[np.ndarray, str], float] | None = None,
    processor: Any = None,
    objective: str | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Tuned:
    """Find the fastest recipe that keeps a diffusers pipeline or a language model within a quality budget; or the most accurate.

    Probe cheaply, then run. A dense run is recorded; every patch and setting is tried on a few of its denoiser calls, from
    which time and error of whole runs are predicted (`accelplug.tuning.prediction`). The fastest that promise to stay
    within the budget are run whole on one prompt and seed, and each run corrects the predictor; those that hold go on to
    more seeds. The winner is proven on prompts and seeds that the search never saw, its worst run within every bound; if it
    fails there, the next one is.

    Nothing is drawn at random: equal measurements lead to equal proposals in equal order. Times are measurements too, and how many
    proposals are tried depends on how long they take; `resume` keeps the probes, so that those at least are the same again.

    Several processes (`accelerate launch`, torchrun) share the whole runs, each with a pipeline of its own: a candidate's first look is
    then at as many prompts and seeds as there are processes. The first one decides, writes and keeps the clips; all get the recipe.

    Where the denoiser goes through torch.compile, each candidate compiles anew, and its first run is not timed.

    Language models on long texts (a `TextExam`, or nothing for a model that sees no pictures): patches of sparse prefill, and what reads
    or keeps fewer keys in decoding; the fastest that finds and predicts as stock does, see `accelplug.tuning.texts`.

    Language models that answer questions: patches aim attention at the picture, and make no model faster. Candidates answer
    questions, few at first, and the better half goes on to more (successive halving). Those that beat the stock model answer
    questions about pictures that were held out; the recipe is one that beats it there too (McNemar's test, for likelihoods the
    sign test, with Holm's correction over the finalists) within the budget: the fastest of those that do equally well. Else: stay stock.

    Parameters
    ----------
    pipe : a diffusers pipeline, or a transformers language or vision-language model. It is left as it was.
    inputs : arguments of the pipeline's call, one mapping or several. The last of several prompts is held out for the proof.
        Language models: an `Exam`, or a list of ``{"text", "answer", "image"}``, image a PIL image or a path, and optional;
        generated scenes if left out. Half of the pictures are held out. Or a `TextExam`; contexts of the next seed are held out.
    budget : bounds that every run must keep against dense at the same seed: ``"fg_psnr>=26"``, ``"ssim>=.9, agreement>=1"``,
        a `Bound` with your own function, or a list of such; ``"psnr>=26"`` if left out. Language models: bounds on figures
        over all questions, ``"accuracy>=0.8, hallucination<=stock, speed>=0.9"``, none if left out. accuracy: share that is
        right; mcc, recall, hallucination: of questions of yes and no; nll: nats a token of the reference answers; speed: the
        stock model's time over the patched one's; each against a number or against ``stock+0.01``. On long texts
        ``"needle>=stock, nll<=stock+0.02"`` if left out; also ruler, associative.
    time_budget_s : seconds to spend, about; the proof is kept time for. Ctrl-C ends the search and keeps the best so far.
    seeds : number of seeds, or the seeds. The second half is held out for the proof. Language models: the first one draws which
        pictures are.
    patches : names of patches to try; all that have a ladder in `accelplug.tuning.space`, `accelplug.tuning.aims`. Of pipelines also the
        recipes that all denoisers have, as they stand, if all of their patches are among them.
    caches : also try step caches, alone and with patches. None are tried in runs of few steps; `Tuned.notes` says what does not fit.
    foreground, detect : as for `accelplug.compare`, for the bounds ``fg_psnr`` and ``agreement``.
    processor : a language model's: its processor, or its tokenizer.
    objective : what a language model should do better: ``accuracy``, ``mcc`` or ``nll``. Accuracy if left out, or nll where
        references are not all yes or no.
    resume : a file that keeps what was measured; a second call goes on from there.
    progress : show a progress bar with the best so far.

    Returns
    -------
    `Tuned`: a recipe for `accelplug.apply`, with the front, all that was tried, and why; a dense one if nothing pays.

    Raises
    ------
    AccelplugError
        If inputs, seeds or the budget cannot be used.
    UnsupportedError
        If processes hold one pipeline between them, or several were launched to tune a language model.
    """
    numbers = arguments.seeds_of(list(range(seeds)) if isinstance(seeds, int) else seeds, "tune")
    arguments.require_seconds(time_budget_s, worded("tune, time_budget_s", "--time"))
    if not (patches is None or (isinstance(patches, list | tuple | set) and all(isinstance(name, str) for name in patches))):
        raise AccelplugError(f"tune, patches: expected a list of names, got {patches!r}.")
    pipe, processor = unwrapped(pipe, processor)
    if require_ability(pipe, "tune").gives == "answers":
        require_one("tune")
        if foreground is not None or detect is not None:
            raise AccelplugError(
                "foreground and detect are about clips; bound a language model's answers, or leave them out."
            )
        reads = isinstance(inputs, TextExam) or (inputs is None and not hasattr(processor, "image_processor"))
        return (tune_texts if reads else tune_language)(
            pipe,
            inputs,
            budget,
            objective=objective,
            processor=processor,
            time_budget_s=time_budget_s,
            seed=numbers[0],
            patches=patches,
            resume=resume,
            progress=progress,
        )
    prompts = arguments.calls(pipe, inputs, "tune")
    if len(numbers) < 2:
        raise AccelplugError(f"tune needs at least two seeds, one to search and one to prove with; got {len(numbers)}.")
    if objective is not None:
        raise AccelplugError(
            worded(f"objective={objective!r}", f"--objective {objective}")
            + " is a language model's. A pipeline gets faster; bound what it may lose."
        )
    bounds = parse_budget("psnr>=26" if budget is None else budget)
    arguments.require_functions(foreground=foreground, detect=detect)
    require_measured(bounds, {"foreground=": foreground, "detect=": detect})
    require_ladders(patches, space.known_ladders(), "a diffusers pipeline")
    half = len(numbers) // 2
    seen = list(itertools.product(range(max(len(prompts) - 1, 1)), numbers[:half]))
    unseen = list(itertools.product([len(prompts) - 1], numbers[half:]))
    study = Study(pipe, prompts, numbers, foreground, detect)
    with working(pipe) as ranks, compat.diffusers.quiet(pipe), room_to_compile(pipe):
        if ranks.joined:
            raise UnsupportedError(
                "tune runs parts of a model by themselves, and processes share this one. Tune it on one device."
            )
        study.processes = ranks.parts
        workers = Workers(study, bounds, [*seen, *unseen], ranks)
        if not ranks.first:
            return workers.follow()
        found: Tuned | AccelplugError = AccelplugError("The first process ended before tune was done; it says why.")
        try:
            journal = Journal(resume, fingerprint(pipe, prompts, numbers))
            search = Search(study, bounds, seen, unseen, time_budget_s, journal, ranks)
            with show.progress("tuning", time_budget_s, progress) as search.tell:
                search.run(patches, caches)
            found = search.result()
        finally:
            workers.stop(found if isinstance(found, AccelplugError) else found.without_clips())
    return found
