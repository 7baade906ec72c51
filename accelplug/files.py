"""A user's files: places that are checked before the work, text that is UTF-8 or refused, writing whole or not at all, by one process."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from pathlib import Path
from typing import Any

from accelplug.errors import AccelplugError

MAX_PATH = 4096
"""Characters of a path: what file systems take at most."""


def path_of(given: Any, what: str) -> Path:
    """Return a path that a user gave, as text or as a `Path`.

    Raises
    ------
    AccelplugError
        If it is neither, or names nothing that a file system can hold.
    """
    if not isinstance(given, str | os.PathLike) or isinstance(os.fspath(given), bytes):
        raise AccelplugError(f"{what}: expected a path, as text or as a Path, got {type(given).__name__}.")
    path = Path(given)
    if "\0" in str(path) or not str(given).strip() or len(str(path)) > MAX_PATH:
        raise AccelplugError(f"{what}: expected a path of 1 to {MAX_PATH} characters, got {str(given)[:40]!r}.")
    return path


def without_links(package: Path = Path(__file__).parent) -> str | None:
    """Say in a sentence that this clone has text files where there should be symbolic links, as git makes without them; else None."""
    broken = [name for name in ("kernels", "patches", "recipes") if (package / name).is_file()]
    if not broken:
        return None
    return (
        f"{package} has text files in place of the symbolic links {', '.join(broken)}: in the clone, run "
        "`git config core.symlinks true` and `git checkout -- accelplug`, or install it by `pip install .`, without -e."
    )


def cache_folder() -> Path:
    """Return where this package may keep what it can make again; it need not be there.

    ``$ACCELPLUG_CACHE``, else ``accelplug`` in the platform's cache: ``$XDG_CACHE_HOME`` or ``~/.cache``, ``~/Library/Caches`` on
    macOS, ``%LOCALAPPDATA%`` on Windows.

    Raises
    ------
    AccelplugError
        If there is no home folder, and none of these is set.
    """
    own = os.environ.get("ACCELPLUG_CACHE")
    folders = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA") or "~/AppData/Local"}
    platform = folders.get(sys.platform, os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return Path(own or Path(platform, "accelplug")).expanduser().absolute()
    except RuntimeError as error:
        raise AccelplugError(f"There is no cache folder: {error} Set ACCELPLUG_CACHE to a folder.") from error


def output(given: Any, what: str = "The file to write", suffixes: tuple[str, ...] = ()) -> Path:
    """Return the path of a file that can be written, ahead of the work whose result goes there.

    Parameters
    ----------
    given : the path.
    what : what the file is, for the message.
    suffixes : ends of the name of which it must have one, ``.yaml``; any if there are none.

    Raises
    ------
    AccelplugError
        If it is not a path, has another end, is a folder, or its folder is not there or cannot be written to.
    """
    path = path_of(given, what)
    if suffixes and path.suffix.lower() not in suffixes:
        raise AccelplugError(f"{what}: expected a name that ends in {' or '.join(suffixes)}, got {path}.")
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise AccelplugError(f"{what}: {path} is a folder; give the name of a file in it.")
        if not target.parent.is_dir():
            raise AccelplugError(f"{what}: {path} cannot be written, there is no folder {target.parent}. Make it first.")
        if not os.access(target if target.exists() else target.parent, os.W_OK):
            raise AccelplugError(f"{what}: {path} must not be written to. Give a place of your own.")
    except OSError as error:
        raise AccelplugError(f"{what}: {path} cannot be written: {error.strerror or error}.") from error
    return path


def read(given: Any, what: str = "The file", limit: int | None = None) -> str:
    """Return the text of a file as it stands there.

    Parameters
    ----------
    given : the path.
    what : what the file is, for the message.
    limit : bytes that it may have; a larger file, or one that is not regular, is refused before it is read.

    Raises
    ------
    AccelplugError
        If it is not a path, not there, a folder, too large, or not UTF-8.
    """
    path = path_of(given, what)
    try:
        found = path.stat()
        if limit is not None and not (stat.S_ISREG(found.st_mode) and found.st_size <= limit):
            raise AccelplugError(
                f"{what}: expected a file of at most {limit} bytes, {path} is not one. Is it the right file?"
            )
        data = path.read_bytes()
    except OSError as error:
        raise AccelplugError(f"{what}: {path} cannot be read: {error.strerror or error}.") from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise AccelplugError(
            f"{what}: {path} is not UTF-8 text: {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from error


def lines(given: Any, what: str = "The file") -> list[str]:
    """Return the lines of a text file that hold something, without the space around them; see `read` for what it raises."""
    text = read(given, what).removeprefix("\ufeff")
    return [line.strip() for line in text.splitlines() if line.strip()]


def is_running() -> bool:
    """Whether processes of torch.distributed know of each other; torch is not loaded to ask."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def launched() -> bool:
    """Whether accelerate launch or torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes files."""
    if is_running():
        return sys.modules["torch.distributed"].get_rank() == 0
    return not launched() or int(os.environ.get("RANK", "0")) == 0


def write(given: Any, data: str | bytes) -> Path:
    """Write a file whole or not at all: beside it, then moved over it; of several processes the first one does.

    Links are followed, a file's mode is kept.

    Raises
    ------
    AccelplugError
        If it cannot be written; what was there is then as before.
    """
    path = path_of(given, "The file to write")
    if not is_first():
        return path
    data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise AccelplugError(f"{path} cannot be written, there is no folder {target.parent}. Make it first.")
    try:
        mode = target.stat().st_mode if target.exists() else None
        if mode is not None and not stat.S_ISREG(mode):  # a device or a pipe; a folder refuses by itself
            target.write_bytes(data)
            return path
        beside = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with beside.open("xb") as file:
                file.write(data)
            if mode is not None:
                beside.chmod(stat.S_IMODE(mode))
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise AccelplugError(
            f"{path} cannot be written: {error.strerror or error}. What was there is as before; give another place, or make room."
        ) from error
    return path


def append(path: Path, line: str) -> None:
    """Add a line to a file.

    Raises
    ------
    AccelplugError
        If it cannot be written, or not whole.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise AccelplugError(
            f"{path} cannot be written: {error.strerror or error}. Give another place, or make room."
        ) from error


def cut(path: Path, length: int) -> None:
    """Leave so many bytes of a file.

    Raises
    ------
    AccelplugError
        If it cannot be written.
    """
    try:
        os.truncate(path, length)
    except OSError as error:
        raise AccelplugError(f"{path} cannot be written: {error.strerror or error}. Give another place.") from error
