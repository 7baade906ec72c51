"""What a comparison has finished, kept in a folder: one that was killed goes on from there, and ends as it would have.

``rows-0.jsonl`` (of each process one) has a line for each arm as it was traced, and one for each run of an arm or a floor at a prompt and
seed; ``clips`` has the clips, a file each. Arms, prompts and seeds may be added, or left out. Another model, device, version, setting or
judge is an error that names it, and so is another arm of the same name: rows that were measured otherwise are not put beside these.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from accelplug import files
from accelplug.comparison.environment import environment
from accelplug.comparison.journal import Journal, call_digest, fingerprint
from accelplug.comparison.ranks import Ranks
from accelplug.comparison.rows import LayerGrid, Row, Sample, from_jsonable
from accelplug.errors import AccelplugError
from accelplug.show import jsonable

KEPT_ROWS, KEPT_CLIPS = "rows-{}.jsonl", "clips"
ALONE = Ranks()
SITTING = "sitting"
"""Each process that made a run has left a line that begins so."""


@dataclass
class Ran:
    """One run: its figures, estimated errors by layer and step, most memory in MiB, and of an arm its clip, uint8 (F, H, W, 3)."""

    sample: Sample
    errors: LayerGrid = field(default_factory=list)
    peak_mib: float | None = None
    clip: np.ndarray | None = None


class Finished:
    """What is finished, by arm, prompt and seed.

    Parameters
    ----------
    folder : None keeps nothing.
    facts : what all rows depend on, by name; see `facts_of`.
    ranks : the processes that share the work; what the first one finds finished, all do.

    Raises
    ------
    AccelplugError
        If the folder holds rows that depend on something else, or cannot be read or written.
    """

    def __init__(self, folder: Any = None, facts: Mapping[str, Any] | None = None, ranks: Ranks = ALONE) -> None:
        self.folder = None if folder is None else files.path_of(folder, "A folder to go on from")
        if self.folder is None:
            self._own = Journal(None, "")
            self.sitting = 1
            return
        try:
            (self.folder / KEPT_CLIPS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AccelplugError(
                f"{self.folder}: expected a folder to keep a comparison in, {error.strerror or error}."
            ) from error
        found: dict[str, Any] = {}
        if ranks.first:
            for path in sorted(self.folder.glob(KEPT_ROWS.format("*"))):
                found |= Journal(path, facts, "a comparison").entries
        found = ranks.agreed(found)
        self._own = Journal(self.folder / KEPT_ROWS.format(ranks.rank), facts, "a comparison")
        self._own.entries = found
        self.sitting = 1 + self.sittings

    @property
    def sittings(self) -> int:
        """In how many sittings runs were made: this one counts once it has made one."""
        return sum(key.startswith(SITTING) for key in self._own.entries)

    def traced(self, row: Row) -> Row | None:
        """Return an arm's row as it was traced, without runs; None where it was not.

        Parameters
        ----------
        row : as it begins: what the arm is.

        Raises
        ------
        AccelplugError
            If another arm of that name was.
        """
        if (found := self._own.entries.get(f"traced {row.name}")) is None:
            return None
        kept = Row(**found)
        if (kept.kind, kept.rules) != (row.kind, row.rules):
            raise AccelplugError(
                f"{self.folder} holds another arm {row.name!r}: expected {row.rules!r}, got {kept.rules!r}. "
                "Give the arm another name, or another folder."
            )
        return kept

    def keep_traced(self, row: Row) -> None:
        """Keep an arm's row as it was traced."""
        made = jsonable({name: value for name, value in vars(row).items() if name != "samples"})
        self._own.get(f"traced {row.name}", lambda: made)

    def ran(self, name: str, call: Mapping[str, Any], prompt: int, seed: int) -> Ran | None:
        """Return a run of the row `name`, of the call of number `prompt`; None where it was not made, or its clip is not there."""
        key = run_key(name, call, seed)
        if (found := self._own.entries.get(key)) is None:
            return None
        if (clip := self._clip(key) if found["clip"] else None) is None and found["clip"]:
            return None
        sample = Sample.from_dict({**from_jsonable(found["sample"]), "prompt": prompt})
        return Ran(sample, found["errors"], found["peak_mib"], clip)

    def keep(self, name: str, call: Mapping[str, Any], seed: int, ran: Ran) -> None:
        """Keep a run. Its clip is written first: what has a line is whole."""
        if self.folder is None:
            return
        self._own.get(f"{SITTING} {self.sitting}", lambda: datetime.now(UTC).isoformat(timespec="seconds"))
        key = run_key(name, call, seed)
        if ran.clip is not None:
            self._write(self._path(key), ran.clip)
        self._own.entries.pop(key, None)  # its clip was gone
        kept = {"sample": ran.sample.to_dict(), "errors": ran.errors, "peak_mib": ran.peak_mib, "clip": ran.clip is not None}
        self._own.get(key, lambda: jsonable(kept))

    def _write(self, path: Path, clip: np.ndarray) -> None:
        packed, beside = io.BytesIO(), path.with_suffix(f".{os.getpid()}.tmp")
        np.savez_compressed(packed, clip=clip)
        try:
            beside.write_bytes(packed.getvalue())
            beside.replace(path)
        except OSError as error:
            raise AccelplugError(
                f"{path} cannot be written: {error.strerror or error}. Make room, and go on from there."
            ) from error

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / KEPT_CLIPS / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"

    def _clip(self, key: str) -> np.ndarray | None:
        try:
            with np.load(self._path(key)) as held:
                clip: np.ndarray = held["clip"]
                return clip
        except (OSError, ValueError, KeyError, BadZipFile):
            return None


def run_key(name: str, call: Mapping[str, Any], seed: int) -> str:
    return json.dumps([name, call_digest(call), seed])


def facts_of(pipe: Any, calls: Sequence[Mapping[str, Any]], *judges: Any) -> dict[str, Any]:
    """Return what rows depend on beside their arm, prompt and seed: model with adapters, device, versions, what all calls share, judges."""
    around = environment(pipe)
    shared = {
        name: value
        for name, value in calls[0].items()
        if isinstance(value, int | float | str | bool)
        and all(call.get(name) == value for call in calls[1:])
        and name != "prompt"
    }
    return {
        "model": fingerprint(pipe, [], []),
        **{name: around.get(name) for name in ("device", "threads", "versions", "dtype")},
        "settings": shared,
        "judges": [getattr(judge, "__qualname__", str(judge)) if judge else None for judge in judges],
    }
