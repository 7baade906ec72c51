"""Prompts to compare on: a caller's own, or so many of ours. Differences between arms show on many prompts, never on one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from accelplug import zoo
from accelplug.errors import AccelplugError, worded

PROMPTS = (
    "A fox trots along a snowy ridge at dawn, its breath steaming, camera panning slowly with it.",
    "Close-up of hands kneading bread dough on a floured wooden table, soft window light.",
    "A crowded night market in the rain, neon signs mirrored in puddles, people with umbrellas passing.",
    "A red paper boat drifts down a narrow stream between mossy stones.",
    "An old fisherman with a grey beard mends a net on a pier and looks up at the camera.",
    "A hummingbird hovers in front of a purple flower, wings a blur, background out of focus.",
    "Timelapse of clouds racing over a field of ripe wheat with a single oak tree.",
    "A white cat jumps from a bookshelf onto a sofa and curls up on a striped blanket.",
    "A glass of water falls from a table and breaks on a tiled floor, in slow motion.",
    "A dancer in a yellow dress spins on an empty theatre stage under one spotlight.",
    "Aerial view of a winding mountain road with one blue car, autumn forest on both sides.",
    "A robot made of copper waters small plants in a greenhouse, steam rising behind it.",
    "Two children fly a green kite on a windy beach while waves roll in.",
    "A steam train crosses a stone viaduct over a misty valley, smoke trailing behind.",
    "A page of handwritten music on a piano stand, a hand turning it, dust in a sunbeam.",
    "A street artist paints a large mural of a whale on a brick wall.",
    "A bowl of ramen with steam, chopsticks lifting noodles, shallow depth of field.",
    "An astronaut walks over red dunes towards a small glass dome, long shadows.",
    "A horse gallops through shallow water at sunset, splashes lit from behind.",
    "A watchmaker's workbench with gears and tools, a tiny screwdriver turning a screw.",
)
"""Ours: people, animals, hands, writing, texture, fast and slow motion, moving and still cameras."""


def own(pipe: Any) -> tuple[str, ...]:
    """Return the prompts that come with the package for a pipeline: what the bundled one was trained to draw, else `PROMPTS`."""
    if str(getattr(pipe, "name_or_path", "")) == str(zoo.path()):
        from accelplug.zoo.shapes import HELD_OUT_CAPTIONS

        return tuple(HELD_OUT_CAPTIONS)
    return PROMPTS


def with_prompts(pipe: Any, inputs: Any, prompts: Any) -> Any:
    """Return the arguments of a pipeline's calls, one mapping a prompt.

    Parameters
    ----------
    inputs : what every call has, without a prompt, or one mapping a prompt; None for nothing.
    prompts : a list of prompts; how many: the first ones of `inputs` where those are several, else of `own`; None for `inputs` alone.

    Raises
    ------
    AccelplugError
        If there are not so many, or both have prompts.
    """
    if prompts is None:
        return inputs
    what = worded("prompts", "--prompts")
    count = int(prompts) if isinstance(prompts, Integral) and not isinstance(prompts, bool) else None
    if isinstance(inputs, Iterable) and not isinstance(inputs, str | Mapping):
        given = list(inputs)
        if count is None:
            raise AccelplugError(
                f"{what} and inputs both say what is asked for: expected prompts, and one mapping of settings."
            )
        texts: list[Any] = given
    elif isinstance(inputs, Mapping | None):
        if inputs and "prompt" in inputs:
            raise AccelplugError(f"{what}: the inputs have a prompt, too. Give one of both.")
        if count is None and (
            isinstance(prompts, str) or not isinstance(prompts, Iterable) or not all(isinstance(p, str) for p in prompts)
        ):
            raise AccelplugError(f"{what}: expected a number, or a list of texts, got {prompts!r}.")
        texts = [{**(inputs or {}), "prompt": text} for text in (own(pipe) if count is not None else prompts)]
    else:
        raise AccelplugError(f"{what}: expected a mapping of settings beside them, got {inputs!r}.")
    if count is not None and not 1 <= count <= len(texts):
        raise AccelplugError(f"{what}: expected a number from 1 to {len(texts)}, for so many there are, got {count}.")
    return texts[:count]
