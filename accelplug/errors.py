"""Everything accelplug raises. Each message says the subject, what was expected, what was got, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class AccelplugError(Exception):
    """Base of all errors of this package."""


class RecipeError(AccelplugError, ValueError):
    """A recipe cannot be read, has an unknown key or value, or does not fit the model."""


class NoMatchError(AccelplugError, LookupError):
    """Nothing was found where something must be: no recipe, no denoiser, no attention site that a rule names."""


class AlreadyAppliedError(AccelplugError, RuntimeError):
    """A recipe is on this model already; remove it first."""


class UnsupportedError(AccelplugError, NotImplementedError):
    """The request is sound but cannot be done here: this model, device, dtype, head dimension or mode."""


class ShapeError(AccelplugError, ValueError):
    """A tensor or a plan has another shape than its contract says."""


class FallbackError(AccelplugError, RuntimeError):
    """Under ``strict=True``: an attention call that a rule names would have run dense."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (nearest: a, b)"`` for the known names most like `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""


def refused_values(error: Any, known: Iterable[str]) -> str:
    """Return what a pydantic ``ValidationError`` found, in one line: key, what was expected, what was got.

    Parameters
    ----------
    error : what pydantic raised.
    known : the keys that there are.
    """
    told, keys = [], list(known)
    for problem in error.errors(include_url=False)[:5]:
        place = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            told.append(f"there is no key {place!r}{nearest(place, keys)}; known: {', '.join(keys)}")
        else:
            message = problem["msg"].removeprefix("Value error, ").rstrip(".")
            got = "" if problem["type"] == "value_error" else f", got {str(problem['input'])[:80]!r}"
            told.append(f"{place}: {message[:1].lower()}{message[1:]}{got}".removeprefix(": "))
    return "; ".join(told)


_TYPED: ContextVar[bool] = ContextVar("typed", default=False)


@contextmanager
def typed() -> Iterator[None]:
    """Have errors inside speak to who typed a command, not to who wrote Python."""
    token = _TYPED.set(True)
    try:
        yield
    finally:
        _TYPED.reset(token)


def worded(python: str, command: str) -> str:
    """Return the wording that fits who asked: an argument, ``time_budget_s``, or a command's option, ``--time``."""
    return command if _TYPED.get() else python
