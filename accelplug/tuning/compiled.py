"""Denoisers that go through torch.compile: whether, and room for all the graphs of a search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelplug import compat
from accelplug.hosts.models import runs_compiled

GRAPHS = 512
"""Graphs that a compiled function may have during a search. Dynamo gives a function up after 8."""


@contextmanager
def room_to_compile(pipe: Any) -> Iterator[None]:
    """Let a compiled denoiser have a graph for each candidate. All graphs of the process are dropped at the end."""
    if not runs_compiled(pipe):
        yield
        return
    with compat.torch.room_for_graphs(GRAPHS):
        yield
