"""Which versions of the host libraries were tested, and what is checked of others."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from accelplug.compat import diffusers, torch, transformers
from accelplug.compat.contracts import Check, contracts_of, why_broken
from accelplug.errors import AccelplugError, UnsupportedError
from accelplug.files import cache_folder

LIBRARIES = (torch, diffusers, transformers)


OLDEST = {"torch": "2.13", "diffusers": "0.41", "transformers": "5.17"}


TESTED = {"torch": "2.13", "diffusers": "0.42", "transformers": "5.24"}
"""The oldest and the newest minor versions that the suite runs on. Others warn, and are checked; see `require`."""


def installed(package: str) -> str | None:
    """Return the installed version of `package`, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tested_versions(package: str) -> str:
    """Return the minor versions of `package` that the suite runs on, in words."""
    oldest, newest = OLDEST[package], TESTED[package]
    return newest if oldest == newest else f"{oldest} to {newest}"


def untested(package: str) -> bool:
    """Whether the suite did not run on the installed version of `package`, by its minor version; never of one it does not know."""
    found = installed(package)
    if found is None or package not in OLDEST:
        return False
    return not _minor(OLDEST[package]) <= _minor(found) <= _minor(TESTED[package])


def _minor(text: str) -> tuple[int, int]:
    major, minor, *_ = [*text.split("."), "0"]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


def contracts() -> Iterator[tuple[str, Check]]:
    """Yield (library: what is relied on, check), for tests, for `accelplug doctor` and for `require`."""
    for library in LIBRARIES:
        yield from contracts_of(library)


def require(library: str) -> None:
    """Have torch and a host library keep what is relied on: checked where a version is outside of what the suite ran on.

    They are checked once for each set of versions: what holds is noted in `files.cache_folder`, or,
    where that cannot be written, for this process.

    Raises
    ------
    UnsupportedError
        If a contract is broken.
    """
    found = {package: installed(package) or "" for package in ("torch", library)}
    strange = {package: text for package, text in found.items() if text and untested(package)}
    if not strange:
        return
    tested = ", ".join(f"{package} {tested_versions(package)}" for package in strange)
    names = ", ".join(f"{package} {text}" for package, text in strange.items())
    warnings.warn(
        f"accelplug was tested with {tested}, found {names}. What it relies on is checked once; `accelplug doctor` shows it.",
        stacklevel=3,
    )
    source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()[
        :8
    ]
    note = "-".join([*(f"{package}-{text}" for package, text in found.items()), source])
    if note in _HELD:
        return
    with suppress(OSError, AccelplugError):  # no right to look, or no home
        if (cache_folder() / "contracts" / note).exists():
            return
    require_contracts(library)
    _HELD.add(note)
    with suppress(OSError, AccelplugError):
        folder = cache_folder() / "contracts"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / note).touch()


_HELD: set[str] = set()
"""Sets of versions whose contracts hold, as far as this process has seen."""


def require_contracts(library: str) -> None:
    """Check what is relied on of torch and of a host library, whatever their versions.

    Raises
    ------
    UnsupportedError
        If a contract is broken.
    """
    found = {package: installed(package) or "" for package in ("torch", library)}
    broken = [
        f"{promise}: {why}"
        for promise, check in contracts()
        if promise.partition(":")[0] in found and (why := why_broken(check)) is not None
    ]
    if broken:
        names = ", ".join(f"{package} {text}" for package, text in found.items())
        tested = ", ".join(f"{package} {tested_versions(package)}" for package in found)
        raise UnsupportedError(
            f"{names} no longer keeps what accelplug relies on. {'; '.join(broken)}. Install what was tested ({tested}), or a newer "
            "accelplug."
        )
