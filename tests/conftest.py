"""Shared by all tests: two threads (one where tests run side by side), fixed seeds, and memory that nobody wrote to reads as NaN."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Where test_kernels.py runs: ACCELPLUG_TEST_DEVICE=cuda runs it on a GPU, with the kernels compiled.
DEVICE = os.environ.get("ACCELPLUG_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels run on the CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from accelplug import zoo  # noqa: E402
from accelplug.errors import NoMatchError  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else int(os.environ.get("OMP_NUM_THREADS", "2")))
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and torch.empty_like return with NaN, so that an output nobody wrote cannot pass by luck."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


ABSENT = "real weights are absent"


@pytest.fixture(scope="session")
def fetched() -> Callable[[str], Path]:
    """The folder of weights that ``accelplug fetch`` brought; where they are absent the test is skipped, and counted."""

    def folder(name: str) -> Path:
        try:
            return zoo.path(name)
        except NoMatchError as error:
            pytest.skip(f"{ABSENT}: {error}")

    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", ()) if ABSENT in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} tests were skipped, since {ABSENT}: `make weights` brings them", yellow=True
        )
