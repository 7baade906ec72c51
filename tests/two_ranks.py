"""Two processes on the CPU that know of each other, for tests of what is spread over devices."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

# One server imports these once; the processes of all tests are forked from it.
PRELOADED = [
    "tests.tiny_models",
    "tests.tiny_language_models",
    "accelplug.plug",
    "diffusers.hooks",
    "torch.distributed.tensor",
]


def together(work: Callable[[int, str], Any], folder: Path, meet: bool = True) -> list[Any]:
    """Run ``work(rank, folder)`` in two processes; return what each gave, as `torch.save` keeps it.

    `meet`: whether they know of each other from the start; else from their environment, as accelerate and torchrun launch them.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(_run, (work, str(folder), port, meet), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def _run(rank: int, work: Callable[[int, str], Any], folder: str, port: int, meet: bool) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    if meet:
        torch.distributed.init_process_group("gloo")
    torch.save(work(rank, folder), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
