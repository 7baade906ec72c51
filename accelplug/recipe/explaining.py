"""What pydantic found wrong, in the words of a recipe: file, line, key, what was expected, what was got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from accelplug.errors import nearest
from accelplug.recipe.strict_yaml import Loc, Source


def explain(error: ValidationError, source: Source, loc: Loc, model_at: Callable[[Loc], Any]) -> str:
    """Say in our words what pydantic found: file, line, key, what was expected, what was got.

    Parameters
    ----------
    loc : where the data that was validated stands in `source`.
    model_at : place in that data -> the pydantic model that it is of, whose keys are known.
    """
    lines = []
    problems = error.errors(include_url=False)
    # A list whose items are wrong also counts as too short; the items say more.
    inner = [p for p in problems if not (p["type"] == "too_short" and p["input"])]
    for problem in (inner or problems)[:5]:
        part = tuple(problem["loc"])
        where = source.at((*loc, *part))
        key = str(part[-1]) if part else ""
        if problem["type"] == "extra_forbidden" and key == "heads":
            lines.append(f"{where}: choosing heads is not built for block-sparse patches; remove the key.")
        elif problem["type"] == "extra_forbidden":
            fields = model_at(part[:-1]).model_fields
            known = [info.alias or name for name, info in fields.items()]
            lines.append(f"{where}: there is no key {key!r}{nearest(key, known)}. Known: {', '.join(known)}.")
        elif problem["type"] == "missing":
            lines.append(f"{where}: the key {key!r} is missing; add it.")
        else:
            message = problem["msg"].removeprefix("Value error, ").rstrip(".")
            got = "" if problem["type"] == "value_error" else f", got {shortened(problem['input'])}"
            lines.append(f"{where}: {message[:1].lower()}{message[1:]}{got}.")
    return "\n".join(lines)


def shortened(value: Any, length: int = 80) -> str:
    """Return a value as it was written, cut where it is longer than a message should be."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
