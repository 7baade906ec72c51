"""Measurements by key, kept in a file, so that a search can go on after it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelplug import files
from accelplug.errors import AccelplugError


class Journal:
    """A line of JSON for each measurement, the fingerprint of what was measured first.

    A line counts once it is whole: what an interrupt left half-written at the end is cut off, and measured again.

    Parameters
    ----------
    path : the file; None keeps measurements for this search only.
    fingerprint : of the model, prompts and seeds.

    Raises
    ------
    AccelplugError
        If the file holds a search with another fingerprint, is no journal, or cannot be read or written.
    """

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self.path = None if path is None else files.output(path, "A journal")
        self.entries: dict[str, Any] = {}
        if self.path is None:
            return
        whole, _, half = (files.read(self.path, "A journal") if self.path.exists() else "").rpartition("\n")
        try:
            first, *others = [json.loads(line) for line in whole.split("\n") if line] or [{"fingerprint": fingerprint}]
            self.entries = {line["key"]: line["value"] for line in others}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise AccelplugError(
                f"{self.path} is no journal of a search: {error}. Give another file, or delete it."
            ) from error
        if first != {"fingerprint": fingerprint}:
            raise AccelplugError(
                f"{self.path} holds a search for another model, adapters, prompts, seeds or device. "
                "Give another file, or delete it."
            )
        if half or not whole:
            files.write(self.path, (whole or json.dumps(first)) + "\n")

    def get(self, key: str, make: Callable[[], Any], read: Callable[[Any], Any] = lambda value: value) -> Any:
        """Return what is known under `key`, as `read` makes it of plain data; where it is not known, make it and keep it.

        Raises
        ------
        AccelplugError
            If the file holds something else there, or cannot be written.
        """
        if key not in self.entries:
            self.entries[key] = made = make()
            if self.path is not None:
                files.append(self.path, json.dumps({"key": key, "value": made}) + "\n")
            return read(made)
        try:
            return read(self.entries[key])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise AccelplugError(f"{self.path} holds no measurement under {key!r}: {error!r}. Delete that line.") from error
