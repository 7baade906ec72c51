"""Whole runs of pipelines and answers of language models: with other inputs, cancelled in the middle, and one behind the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import accelplug
from accelplug import compat
from accelplug.hosts.models import denoisers
from accelplug.testing.language_models import generate
from accelplug.testing.models import Arguments


class Cancelled(KeyboardInterrupt):
    """Somebody wants no more of a run."""


def run_pipeline(pipe: Any, inputs: Arguments, seed: int = 0, **more: Any) -> Tensor:
    """Return what a pipeline gives at a seed, from copies of its inputs; of a modular one its latents."""
    out = pipe(**{**copy.deepcopy(inputs), **more}, generator=torch.Generator().manual_seed(seed))
    return out.get("latents") if compat.diffusers.blocks_of(pipe) else out[0]


def another_prompt(inputs: Arguments) -> Arguments:
    """Return the inputs of a pipeline with other embeddings."""
    return {
        name: given.flip(-1) * 1.5 if isinstance(given, Tensor) and "embeds" in name and given.is_floating_point() else given
        for name, given in inputs.items()
    }


def other_way_up(inputs: Arguments) -> Arguments:
    """Return the inputs of a pipeline with height and width exchanged: another grid of as many tokens."""
    return {**inputs, "height": inputs["width"], "width": inputs["height"]}


def two_samples(inputs: Arguments) -> Arguments:
    """Return the inputs of a pipeline, for two samples at a time."""
    name = "num_videos_per_prompt" if "num_frames" in inputs else "num_images_per_prompt"
    return {**inputs, name: 2}


def cancel_in_a_callback(pipe: Any, inputs: Arguments, step: int) -> None:
    """Run a pipeline, and interrupt it at the end of a step."""

    def callback(pipe: Any, at: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if at == step:
            raise Cancelled
        return given

    _run_until_cancelled(pipe, inputs, callback_on_step_end=callback)


def cancel_in_the_model(pipe: Any, inputs: Arguments, step: int) -> None:
    """Run a pipeline until a forward of its denoiser is cancelled, where its blocks have run and its output has not."""
    forwards = []
    denoiser = next(iter(denoisers(pipe).values()))
    attention = [path for path, module in denoiser.named_modules() if "processor" in vars(module)]
    last = next((path for path in ("proj_out", "conv_out") if hasattr(denoiser, path)), attention[-1])

    def count(*_: Any) -> None:
        forwards.append(1)

    def interrupt(*_: Any) -> None:
        if len(forwards) > step:
            raise Cancelled

    handles = [denoiser.register_forward_pre_hook(count), denoiser.get_submodule(last).register_forward_pre_hook(interrupt)]
    try:
        _run_until_cancelled(pipe, inputs)
    finally:
        for handle in handles:
            handle.remove()


def cancel_an_answer(model: Any, inputs: Arguments, forwards: int) -> None:
    """Have a language model generate until a forward of its decoder is cancelled in the last layer, behind so many whole ones."""
    begun: list[int] = []

    def interrupt(*_: Any) -> None:
        begun.append(1)
        if len(begun) > forwards:
            raise Cancelled

    handle = model.get_decoder().layers[-1].register_forward_pre_hook(interrupt)
    try:
        generate(model, inputs, 4)
    except Cancelled:
        return
    finally:
        handle.remove()
    raise AssertionError("the answer was not cancelled")


def _run_until_cancelled(pipe: Any, inputs: Arguments, **more: Any) -> None:
    try:
        run_pipeline(pipe, inputs, seed=9, **more)
    except Cancelled:
        return
    raise AssertionError("the run was not cancelled")


def nothing_of_a_run_is_left(
    make: Callable[[], tuple[Any, Arguments]],
    recipe: Mapping[str, Any],
    cancel: Callable[[Any, Arguments, int], None],
    step: int,
) -> None:
    """Try that a run behind a cancelled one gives what it gives with a plug of its own, for three kinds of inputs, and once more."""
    pipe, inputs = make()
    kinds = [inputs, other_way_up(inputs), two_samples(inputs)]
    alone = []
    for kind in kinds:
        with accelplug.apply(pipe, recipe, gate="off"):
            alone.append(run_pipeline(pipe, kind))
    with accelplug.apply(pipe, recipe, gate="off"):
        for kind, expected in zip(kinds, alone, strict=True):
            cancel(pipe, another_prompt(inputs), step)
            assert torch.equal(run_pipeline(pipe, kind), expected), "the run is not what it is alone"
        for _ in range(2):
            assert torch.equal(run_pipeline(pipe, inputs), alone[0]), "the same run again is another"
