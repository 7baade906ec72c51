"""Wall times of calls on a device that may run ahead."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def timed_ms(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Run once; return the result and the wall time in milliseconds, the device synchronised before and after."""
    synchronise(device)
    start = time.perf_counter()
    result = run()
    synchronise(device)
    return result, 1e3 * (time.perf_counter() - start)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: then nothing may be timed, and a replay comes by no Python."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def synchronise(device: torch.device) -> None:
    """Wait for `device` to finish, where it runs ahead."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
