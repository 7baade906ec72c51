"""Arms of a comparison: recipes, or functions of the user's that change a pipeline in any way and return what undoes it."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelplug.comparison.metrics import Clip, psnr_db
from accelplug.errors import AccelplugError

Undoable = Callable[[Any], Callable[[], Any]]
"""``change(pipe) -> undo``: applied by `compare` ahead of an arm's run, and ``undo()`` behind it."""
ROOM_DB = 6.0
"""PSNR by which a dense run may fall behind what two dense runs have among themselves, where they differ, in dB. Ours: twice the error."""
TRIES = 3
"""Dense runs behind an arm, until one is as they were."""


def is_change(given: Any) -> bool:
    """Whether an arm is a function, and not a recipe or a class."""
    return callable(given) and not isinstance(given, type)


def arm_name(change: Undoable) -> str:
    """Return what a function is called; lambdas and objects that are called have no name worth a row."""
    name = getattr(change, "__name__", "")
    return "function" if name in ("", "<lambda>") else name


def source_of(change: Undoable) -> str:
    """Return a function's source, as far as Python knows it: what a page shows of an arm, and what tells it from another one."""
    try:
        return textwrap.dedent(inspect.getsource(change)).rstrip()
    except (OSError, TypeError):
        return f"{getattr(change, '__module__', '')}.{getattr(change, '__qualname__', type(change).__name__)}"


@contextmanager
def changed(pipe: Any, name: str, change: Undoable) -> Iterator[None]:
    """Have a function change a pipeline, and undo it.

    Raises
    ------
    AccelplugError
        If it returns nothing that undoes it.
    """
    undo = change(pipe)
    if not callable(undo):
        raise AccelplugError(
            f"The arm {name!r} returned {undo!r}: expected a function without arguments that undoes what it did. "
            "The pipeline may be changed now; load it anew."
        )
    try:
        yield
    finally:
        undo()


def require_same(name: str, before: Sequence[Clip], again: Callable[[], Clip]) -> None:
    """Refuse an arm whose undo leaves another pipeline behind.

    Dense runs that are alike to the last bit must be so behind it, too; where a machine's rounding varies from run to run, one of
    `TRIES` must. Runs that always differ may differ by `ROOM_DB` more.

    Parameters
    ----------
    before : clips of two dense runs ahead of the arm.
    again : makes one more.

    Raises
    ------
    AccelplugError
        If it does.
    """
    repeated, left = psnr_db(before[0], before[1]), -math.inf
    for _ in range(TRIES):
        after = again()
        left = max(left, *(psnr_db(after, clip) for clip in before))
        if left >= (math.inf if math.isinf(repeated) else repeated - ROOM_DB):
            return
    ahead = "the same to the last bit" if math.isinf(repeated) else f"{repeated:.1f} dB apart"
    raise AccelplugError(
        f"The arm {name!r} does not undo what it did: a dense run after it is {left:.1f} dB from one ahead of it, and two ahead of it "
        f"were {ahead}. What its function returns must restore everything; the pipeline is changed now, load it anew."
    )
