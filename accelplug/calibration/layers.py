"""Which layers of a language model read a long prompt sparsely: those in which it moves what the model predicts least.

Flux Attention (arXiv 2604.07394) trains a router that sends each layer of each prompt to full or to sparse attention. This chooses
once for a model, without training, on any text:

1. A prompt is a piece of the text that ends in the first words of a passage which stood earlier in it, at a tenth, a half or nine
   tenths. What follows is the rest of that passage, then the text as it goes on: the one must be looked up, the other understood.
2. What a layer costs, for each way of reading, is the divergence ``KL(dense || sparse)`` of what is predicted there, in nats a token,
   mean over what follows, with no other layer sparse; the prompt is read sparsely, what follows by the model as it is. What it saves
   are the pairs of queries and keys that are not read.
3. Layers join in the order of cost over saving. Divergences do not add up: how many may join, so that what they do together stays
   within `budget`, is found by bisection, as if one more never helped.
4. A prompt that had no say tells what the choice is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from accelplug import compat, show
from accelplug.errors import AccelplugError
from accelplug.patches.base import Config
from accelplug.plug import apply

QUOTED_AT = (0.1, 0.5, 0.9)
QUOTED, BEGUN, GOES_ON = 32, 8, 32
"""Tokens of a passage, those of them that the prompt ends in, and tokens of the text behind it."""


class LayerKnobs(Config):
    """What is tried, on how much text, and how far predictions may move."""

    tokens: int = Field(4096, ge=256, description="Of a prompt. Choices hold for lengths like it.")
    prompts: int = Field(3, ge=1, le=64, description="That choose; one more judges.")
    budget: float = Field(0.02, gt=0.0, description="Most that predictions may move, KL in nats a token. Ours.")
    modes: tuple[str, ...] = Field(
        ("prefill_rows", "stream"), min_length=1, description="Patches that are tried in each layer."
    )
    group: int = Field(
        1, ge=1, description="Neighbouring layers that are tried, and chosen, together: with 2, half as many runs."
    )

    def trials(self, depth: int) -> int:
        """How many ways of reading are tried alone in a model of so many layers."""
        return len(self.modes) * -(-depth // self.group)


@dataclass(frozen=True, eq=False)
class Passage:
    """A prompt, int64 (S,), and what follows it, int64 (S',)."""

    prompt: Tensor
    behind: Tensor


@dataclass(frozen=True)
class Tried:
    """Some layers read in one way: what that costs alone, and the share of pairs that it saves."""

    layers: tuple[int, ...]
    mode: str
    cost: float
    saving: float


@dataclass(frozen=True)
class ChosenLayers:
    """The rules, and in words what they are worth."""

    rules: list[dict[str, Any]]
    told: str


def passages(ids: Tensor, knobs: LayerKnobs) -> list[Passage]:
    """Return as many prompts as choose and judge, at equal distances in a text, int64 (N,).

    Raises
    ------
    AccelplugError
        If the text is too short.
    """
    need = knobs.tokens + GOES_ON
    if len(ids) < need:
        raise AccelplugError(
            f"calibrate layers: expected a text of {need} tokens or more, got {len(ids)}. Give more of it, or fewer tokens."
        )
    found = []
    for number in range(knobs.prompts + 1):
        text = ids[number * (len(ids) - need) // knobs.prompts :][:need]
        end = knobs.tokens - BEGUN
        at = int(QUOTED_AT[number % len(QUOTED_AT)] * (end - QUOTED))
        passage = text[at : at + QUOTED]
        found.append(
            Passage(torch.cat([text[:end], passage[:BEGUN]]), torch.cat([passage[BEGUN:], text[end : end + GOES_ON]]))
        )
    return found


def predictions(model: Any, passage: Passage) -> Tensor:
    """Return what a model predicts behind a prompt: log-probabilities, float32 (S', vocabulary)."""
    prompt, behind = (x[None].to(model.device) for x in (passage.prompt, passage.behind))
    read = model(prompt, use_cache=True, logits_to_keep=1)
    cache = {compat.transformers.cache_keyword(type(model).forward): compat.transformers.cache_of(read)}
    more = model(behind[:, :-1], **cache)
    return torch.cat([read.logits[0], more.logits[0]]).float().log_softmax(-1)


def divergence_of(expected: Tensor, found: Tensor) -> float:
    """Return KL(expected || found) in nats, mean over rows of log-probabilities (S', vocabulary)."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())


class Trials:
    """Runs a model with some layers sparse, and holds it against itself."""

    def __init__(self, model: Any, texts: Sequence[Passage], settings: Mapping[str, Mapping[str, Any]]) -> None:
        self.model, self.texts, self.settings = model, texts, settings
        self.dense = [predictions(model, text) for text in texts]

    def rules(self, chosen: Mapping[int, str], **more: Any) -> list[dict[str, Any]]:
        """Rules for a choice of a way of reading by layer."""
        found = []
        for mode, settings in self.settings.items():
            if layers := sorted(layer for layer, one in chosen.items() if one == mode):
                told = {"with": {**settings, **more}} if {**settings, **more} else {}
                found.append({"where": {"layers": spans(layers)}, "patch": mode, **told})
        return found

    def cost(self, chosen: Mapping[int, str], first: int = 0, end: int | None = None) -> float:
        """Divergence with a choice, mean over the texts from `first` to `end`."""
        if not chosen:
            return 0.0
        with apply(self.model, {"rules": self.rules(chosen, min_tokens=0)}, gate="off", strict=True):
            pairs = list(zip(self.texts, self.dense, strict=True))[first:end]
            return sum(divergence_of(dense, predictions(self.model, text)) for text, dense in pairs) / len(pairs)

    def savings(self, mode: str) -> dict[int, float]:
        """Share of pairs that each layer saves where all read in one way, on the first text."""
        rule = {"patch": mode, "with": {**self.settings[mode], "min_tokens": 0}}
        with apply(self.model, {"rules": [rule]}, gate="off") as plug, plug.trace() as events:
            predictions(self.model, self.texts[0])
        return {
            event.site.layer: 1 - event.density
            for event in events
            if event.patch == mode and event.density is not None and event.site.layer is not None
        }


@torch.no_grad()
def choose_layers(
    model: Any, ids: Tensor, knobs: LayerKnobs, settings: Mapping[str, Mapping[str, Any]], tell: show.Tell
) -> ChosenLayers:
    """Choose by layer how a model reads long prompts.

    Parameters
    ----------
    ids : a text, int64 (N,).
    settings : of each patch in `knobs.modes`, where they are not its defaults.
    tell : told how many runs are done, and what comes.

    Raises
    ------
    AccelplugError
        If the text is too short, or no layer keeps the budget.
    """
    trials = Trials(model, passages(ids, knobs), {mode: settings.get(mode, {}) for mode in knobs.modes})
    savings = {mode: trials.savings(mode) for mode in knobs.modes}
    steps, done = [], 0
    for mode, by_layer in savings.items():
        layers = sorted(by_layer)
        for some in (tuple(layers[i : i + knobs.group]) for i in range(0, len(layers), knobs.group)):
            tell(done, f"{mode} in layer {spans(some)[0]}")
            cost = trials.cost(dict.fromkeys(some, mode), end=-1)
            steps.append(Tried(some, mode, cost, sum(by_layer[layer] for layer in some) / len(some)))
            done += 1
    steps.sort(key=lambda step: step.cost / max(step.saving, 1e-9))
    few, most, joint = 0, len(steps), 0.0
    while few < most:
        number = (few + most + 1) // 2
        tell(done, f"{number} of {len(steps)} together")
        cost = trials.cost(choice_of(steps[:number]), end=-1)
        few, most, joint = (number, most, cost) if cost <= knobs.budget else (few, number - 1, joint)
    if not few:
        raise AccelplugError(
            f"calibrate layers: no layer can be read by {' or '.join(knobs.modes)} within {knobs.budget} nats: the least is "
            f"{min(step.cost for step in steps):.4f}. Raise the budget, or give milder settings."
        )
    chosen = choice_of(steps[:few])
    saved = sum(savings[mode][layer] for layer, mode in chosen.items()) / max(map(len, savings.values()))
    judged = trials.cost(chosen, first=-1)
    told = (
        f"Chosen on {knobs.prompts} prompts of {knobs.tokens} tokens: {len(chosen)} of {max(map(len, savings.values()))} layers, "
        f"density {1 - saved:.3f}, predictions move by {joint:.4f} nats a token, by {judged:.4f} on a prompt that had no say."
    )
    return ChosenLayers(trials.rules(chosen), told)


def choice_of(steps: Sequence[Tried]) -> dict[int, str]:
    """Return by layer the way of reading that saves most, of those that were taken."""
    saved: dict[int, tuple[float, str]] = {}
    for step in steps:
        for layer in step.layers:
            saved[layer] = max(saved.get(layer, (-1.0, "")), (step.saving, step.mode))
    return {layer: mode for layer, (_, mode) in saved.items()}


def spans(layers: Sequence[int]) -> list[str]:
    """Return ascending numbers as slices of a recipe: ``["2:5", "7:8"]``."""
    runs = (list(run) for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0]))
    return [f"{run[0][1]}:{run[-1][1] + 1}" for run in runs]
