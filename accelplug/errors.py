"""Everything accelplug raises. Each message says the subject, what was expected, what was got, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
