"""Where a figure was measured: device, versions, the state of the source."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from accelplug import compat
from accelplug.kernels.timing import timed_ms
from accelplug.version import __version__

CLEAR_REFS = Path("/proc/self/clear_refs")
"""Linux: a 5 written here resets the peak of resident memory."""


def environment(pipe: Any = None) -> dict[str, Any]:
    """Return date, device by name, versions, git revision (with ``-dirty``) and, of a pipeline, its dtype."""
    packages = ("torch", "diffusers", "transformers", "triton")
    versions = {name: found for name in packages if (found := compat.versions.installed(name))}
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": {"accelplug": __version__, **versions},
        "git": revision(),
        "baseline": baseline(),
        "memory": memory_name(),
    }
    if pipe is not None and hasattr(pipe, "dtype"):
        facts["dtype"] = str(pipe.dtype).removeprefix("torch.")
    return facts


def device_name() -> str:
    """Name of the accelerator, or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()} ({torch.get_num_threads()} threads)"


def baseline() -> str:
    """The dense attention that runs are held against, by name."""
    if not torch.cuda.is_available():
        return "torch SDPA (CPU flash)"
    return "torch SDPA (cuDNN, flash or efficient, as torch picks)"


def memory_name() -> str:
    """What `peak_mib` measures, in words."""
    return "allocated by torch" if torch.cuda.is_available() else "resident"


def memory_heading(of: str | None = None) -> str:
    """What a column of peak memory is called, with its unit; `of`: what was measured, if not on this machine."""
    return f"peak MiB, {of or memory_name()}"


def forget_peak(device: torch.device) -> bool:
    """Start `peak_mib` anew; return whether the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR_REFS.write_text("5")
    except OSError:  # not Linux, or a container that forbids it
        return False
    return True


def peak_mib(device: torch.device) -> float:
    """Most memory since `forget_peak`, MiB: allocated by torch on a GPU, else resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def revision() -> str | None:
    """Short git hash of the checkout, ``-dirty`` if something is not committed; None outside a checkout."""
    root = Path(__file__).parents[2]
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=9"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def timed_runs(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[list[float], float | None]:
    """Return milliseconds of each of so many runs, and the most memory meanwhile, MiB; None where the system does not tell."""
    known = forget_peak(device)
    ms = [timed_ms(run, device)[1] for _ in range(repeats)]
    return ms, peak_mib(device) if known else None
