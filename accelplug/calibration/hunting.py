"""Which heads to guide away from: hunted for greedily, by any function of the picture (HeadHunter, arXiv 2506.10978).

A round makes, for every head that is left, all pictures with it perturbed beside those chosen before. The paper adds the heads with the
best mean at once. Here they join one by one, best first, and stay if pictures score more with them: heads that are good alone may be too
much together.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from accelplug import compat, files, show
from accelplug.comparison import arguments
from accelplug.comparison.ranks import require_one
from accelplug.errors import AccelplugError, NoMatchError
from accelplug.hosts.clips import clip_of
from accelplug.inspection.heads import heads_of
from accelplug.patches.base import Config
from accelplug.patches.guidance.headhunter import Head
from accelplug.plug import apply
from accelplug.zoo import shapes

HUNTED = "headhunter"
"""The patch whose heads are hunted for."""

Objective = Callable[[np.ndarray, str], float]
"""(frames, float32 (F, H, W, 3) in [0, 1]; the prompt, or "") -> a figure, more is better."""


class HuntKnobs(Config):
    """What a hunt can be told."""

    rounds: int = Field(1, ge=1, le=64, description="Rounds. Paper: 1 for quality, 5 for a style.")
    add: int = Field(6, ge=1, le=4096, description="Heads that a round adds at most. Paper: 24 for quality, 3 for a style.")
    layers: tuple[int, ...] | None = Field(None, description="Layers whose heads are tried; all, if left out.")
    steps: str | None = Field(
        None, description="Steps in which there is guidance, '0:20%', also in the recipe; all, if left out."
    )


# ------------------------------------------------------------------------------------------------------------- objectives


def sharpness(frames: np.ndarray, prompt: str = "") -> float:
    """Mean size of the gradient of the luminance, of values from 0 to 1; it goes up with noise, too."""
    grey = frames @ np.array([0.299, 0.587, 0.114], np.float32)
    down, across = np.diff(grey, axis=1)[:, :, :-1], np.diff(grey, axis=2)[:, :-1]
    return float(np.hypot(down, across).mean())


def shown_share(frames: np.ndarray, prompt: str) -> float:
    """Whether a clip of the bundled video model shows what its caption says, by the zoo's detector: 1, or the share of it that is there."""
    asked, seen = set(shapes.parse(prompt)), set(shapes.detect((frames * 255).round().clip(0, 255).astype(np.uint8)))
    return len(asked & seen) / len(asked | seen)


BUILT_IN: dict[str, Objective] = {"sharpness": sharpness, "agreement": shown_share}


def objective_of(given: Any) -> Objective:
    """Return an objective: one of `BUILT_IN` by name, ``module:function`` of the user's, or the function itself.

    Raises
    ------
    AccelplugError
        If there is none.
    """
    if callable(given):
        return given
    known = f"{', '.join(BUILT_IN)}, or module:function, a function of the frames (F, H, W, 3) in [0, 1] and of the prompt"
    if given is None or not isinstance(given, str):
        raise AccelplugError(f"calibrate {HUNTED} hunts by an objective: expected {known}; got {given!r}.")
    if given in BUILT_IN:
        return BUILT_IN[given]
    module, colon, name = given.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if colon and name else None
    except (ImportError, AttributeError, ValueError) as error:
        raise AccelplugError(f"objective: {given!r} cannot be imported: {error}. Is its module on the path?") from error
    if not callable(found):
        raise AccelplugError(f"objective: expected {known}; got {given!r}.")
    return found


# -------------------------------------------------------------------------------------------------------------- the hunt


@dataclass
class Hunt:
    """What is known so far: the mean of the objective by the heads that were perturbed, which a file can hold.

    Attributes
    ----------
    settings : all that scores depend on, as JSON: a partial file must agree.
    scores : by heads, as text, the objective of each picture.
    """

    settings: str
    scores: dict[str, list[float]] = field(default_factory=dict)

    def resume(self, path: Path) -> None:
        """Take up what a file holds, if it is there."""
        if not path.exists():
            return
        try:
            held = json.loads(files.read(path))
            settings, scores = held["settings"], {str(key): [float(x) for x in row] for key, row in held["scores"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise AccelplugError(f"{path}: no partial calibration: {error}. Delete it to start anew.") from error
        if settings != self.settings:
            raise AccelplugError(
                f"{path} holds a hunt with another objective, prompts, knobs or sizes, or of another model. Delete it to start anew, "
                "or give another path."
            )
        self.scores = scores

    def save(self, path: Path) -> None:
        """Write what is known."""
        files.write(path, json.dumps({"settings": self.settings, "scores": self.scores}))


@dataclass(frozen=True)
class Hunted:
    """What was found.

    Attributes
    ----------
    heads : in the order in which they were added.
    before, after : mean of the objective without guidance, and with these heads.
    tables : mean of the objective with a head beside those chosen before, by round: float32 (layers, heads), NaN where it was not tried.
    """

    heads: tuple[Head, ...]
    before: float
    after: float
    tables: dict[str, Tensor]

    def told(self, pictures: int) -> str:
        """What there is to say, in a sentence."""
        return (
            f"{len(self.heads)} heads, hunted for on {pictures} pictures in {len(self.tables)} rounds: the objective is {self.before:.4g} "
            f"without guidance, {self.after:.4g} with it."
        )


def recipe_of(heads: Sequence[Head], config: Mapping[str, Any], knobs: HuntKnobs) -> list[dict[str, Any]]:
    """Return the rules that guide away from some heads, as plain data."""
    where = {} if knobs.steps is None else {"where": {"steps": knobs.steps}}
    return [{**where, "patch": HUNTED, "with": {**config, "heads": [list(head) for head in heads]}}]


def hunt(
    pipe: Any,
    objective: Objective,
    runs: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    knobs: HuntKnobs,
    seed: int,
    settings: str,
    partial: Path | None,
    progress: bool,
) -> Hunted:
    """Hunt for heads; see `accelplug.calibrate`.

    Parameters
    ----------
    runs : arguments of the pipeline's call.
    settings : of the hunt, that a partial file must agree with.
    partial : where scores go after every picture; None: nowhere.

    Raises
    ------
    NoMatchError
        If no head raises the objective.
    """
    require_one(f"calibrate {HUNTED}")
    number = heads_of(pipe)
    tried = [
        (layer, head) for layer, n in number.items() for head in range(n) if knobs.layers is None or layer in knobs.layers
    ]
    found = Hunt(settings)
    if partial is not None:
        found.resume(partial)
    total = len(runs) * (1 + knobs.rounds * (len(tried) + knobs.add))

    def picture(index: int, heads: Sequence[Head]) -> float:
        begun: list[int] = []
        generator = torch.Generator("cpu").manual_seed(seed + index)
        rules = {"rules": recipe_of(heads, config, knobs) if heads else [{"patch": "dense"}]}
        with arguments.refusals(pipe, started=lambda: begun), apply(pipe, rules, gate="off", deterministic=True):
            frames, _ = clip_of(pipe, {**runs[index], "generator": generator})
        figure = float(objective(frames, str(runs[index].get("prompt", ""))))
        if not math.isfinite(figure):
            raise AccelplugError(
                f"The objective must give a finite number, got {figure} for run {index} with {list(heads)}."
            )
        return figure

    with show.progress("hunting", total, progress) as tell, compat.diffusers.quiet(pipe), torch.no_grad():

        def mean(heads: Sequence[Head]) -> float:
            row = found.scores.setdefault(_as_text(heads), [])
            while len(row) < len(runs):
                tell(
                    sum(map(len, found.scores.values())),
                    f"{len(heads)} heads, the last {list(heads[-1]) if heads else 'none'}",
                )
                row.append(picture(len(row), heads))
                if partial is not None:
                    found.save(partial)
            return sum(row) / len(row)

        return _greedy(mean, tried, number, knobs)


def _greedy(
    mean: Callable[[Sequence[Head]], float], tried: Sequence[Head], number: Mapping[int, int], knobs: HuntKnobs
) -> Hunted:
    """Add the best heads, round by round."""
    chosen: tuple[Head, ...] = ()
    before = best = mean(())
    tables: dict[str, Tensor] = {}
    for turn in range(knobs.rounds):
        scores = {head: mean((*chosen, head)) for head in tried if head not in chosen}
        table = torch.full((max(number) + 1, max(number.values())), torch.nan)
        for (layer, place), score in scores.items():
            table[layer, place] = score
        tables[f"round {turn + 1}"] = table
        better = sorted((head for head in scores if scores[head] > best), key=lambda head: -scores[head])[: knobs.add]
        for head in better:
            if (score := mean((*chosen, head))) > best:
                chosen, best = (*chosen, head), score
        if not better:
            break
    if not chosen:
        raise NoMatchError(
            f"None of {len(tried)} heads raises the objective, which is {before:.4g} without guidance. Try more pictures, another scale or "
            "u (--set scale=2), or another objective."
        )
    return Hunted(chosen, before, best, tables)


def _as_text(heads: Sequence[Head]) -> str:
    return " ".join(f"{layer}.{head}" for layer, head in heads)
