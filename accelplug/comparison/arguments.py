"""What compare, tune and calibrate are asked for, checked ahead of the first run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

from accelplug import compat
from accelplug.chat import tokenizer_of
from accelplug.errors import AccelplugError, nearest, worded

OPTIONS = {
    "num_frames": "frames",
    "height": "height",
    "width": "width",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}
"""Arguments of a pipeline's call, and the command's options for them."""


def require_processor(processor: Any, what: str) -> None:
    """Refuse what is neither a processor nor a tokenizer.

    Raises
    ------
    AccelplugError
        If it is not.
    """
    if not hasattr(tokenizer_of(processor), "pad_token_id"):
        got = "none" if processor is None else f"a {type(processor).__name__}"
        raise AccelplugError(
            f"{what} asks a language model through its processor or tokenizer, got {got}; pass processor=AutoProcessor..."
        )


def calls(pipe: Any, inputs: Any, what: str) -> list[dict[str, Any]]:
    """Return the arguments of a pipeline's calls; `inputs` holds one mapping or several.

    Raises
    ------
    AccelplugError
        If there are none, or the pipeline takes no argument of that name.
    """
    if isinstance(inputs, str) or not isinstance(inputs, Mapping | Iterable | None):
        raise AccelplugError(f"{what}: expected a mapping of the pipeline's arguments or a list of such, got {inputs!r}.")
    made = [inputs] if isinstance(inputs, Mapping) else list(() if inputs is None else inputs)
    if not made:
        raise AccelplugError(f"{what} needs inputs: arguments of the pipeline's call, such as {{'prompt': '...'}}.")
    taken = compat.diffusers.arguments_of(pipe)
    known = None if taken is None else list(taken)
    for item in made:
        if not isinstance(item, Mapping):
            raise AccelplugError(f"{what}: expected a mapping of the pipeline's arguments, got {item!r}.")
        for name in item:
            if name == "generator":
                raise AccelplugError(f"inputs hold a generator, but {what} makes one per seed. Leave it out and pass seeds.")
            if known is not None and name not in known:
                guider = name == "guidance_scale" and hasattr(pipe, "guider")
                raise AccelplugError(
                    worded(
                        f"{what}: {type(pipe).__name__} takes no argument {name!r}{nearest(str(name), known)}; "
                        f"it takes {', '.join(map(str, known))}.",
                        f"{type(pipe).__name__} takes no --{OPTIONS.get(name, name)}. Leave it out.",
                    )
                    + " Its guider has it: pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=...))."
                    * guider
                )
    return [dict(item) for item in made]


def seeds_of(given: Any, what: str) -> list[int]:
    """Return seeds, each once.

    Raises
    ------
    AccelplugError
        If they are not a list of different whole numbers that a generator takes.
    """
    seeds = [] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not seeds:
        raise AccelplugError(
            f"{what}: expected at least one seed, such as {worded('seeds=[0, 1]', '--seed 0')}, got {given!r}."
        )
    for seed in seeds:
        require_whole(seed, f"{what}, a seed", 0, 2**63 - 1)
    if len(set(seeds)) < len(seeds):
        raise AccelplugError(f"{what}: expected different seeds, got {seeds}; a seed run twice proves nothing.")
    return [int(seed) for seed in seeds]


def require_whole(given: Any, what: str, least: int, most: float = math.inf) -> None:
    """Refuse what is not a whole number in a range.

    Raises
    ------
    AccelplugError
        If it is not.
    """
    if isinstance(given, bool) or not isinstance(given, Integral) or not least <= int(given) <= most:
        within = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
        raise AccelplugError(f"{what}: expected a whole number {within}, got {given!r}.")


def require_functions(**given: Any) -> None:
    """Refuse what is given by name, is not None, and cannot be called.

    Raises
    ------
    AccelplugError
        If there is one.
    """
    for name, function in given.items():
        if function is not None and not callable(function):
            raise AccelplugError(f"{name}: expected a function, got {function!r}.")


def require_seconds(given: Any, what: str) -> None:
    """Refuse what is not a time to spend.

    Raises
    ------
    AccelplugError
        If it is not a number of seconds, 0 or more.
    """
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < math.inf:
        raise AccelplugError(f"{what}: expected seconds, 0 or more, got {given!r}.")


@contextmanager
def refusals(pipe: Any, started: Callable[[], Any]) -> Iterator[None]:
    """Turn what a pipeline raises about its arguments, ahead of its denoiser's first call, into an `AccelplugError`."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        if started() or isinstance(error, AccelplugError):
            raise
        raise AccelplugError(f"{type(pipe).__name__} does not take these inputs: {error}") from error
