"""What travels with a language model's forward, and what is known of a sequence and lives on its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from accelplug.call import AttentionCall, Clock, Prompt, Rows, Site

FORWARD = "accelplug_run"
"""The keyword argument that carries a `Forward` from the decoder to the attention function."""
STREAM = "_accelplug"
"""Attribute of a cache that holds its `Stream`, and of an attention module that holds its record."""

DECODE = Clock(phase="decode")
PREFILL = Clock(phase="prefill")
AHEAD = Clock(phase="ahead")


class Attending(Protocol):
    """What stands at an attention module, as those see it who look at its calls."""

    index: int
    site: Site


class Reader(Protocol):
    """Whose sequences they are."""

    sees: bool
    """Whether the model looks at images."""
    no_image: str
    """What is said where a prompt has none."""


Watch = Callable[[Any, AttentionCall, Prompt, Clock], None]
"""Looks at an attention call: (`Attending`, call, tokens of its sequence up to the prompt's end, clock)."""

CURRENT: ContextVar[Forward | None] = ContextVar("accelplug_run", default=None)
"""The forward that this thread runs; a ContextVar that is read outside of graphs only."""
ASKED: ContextVar[Rows] = ContextVar("accelplug_asked", default=1)
"""What the model was asked for: logits of the last so many tokens, or of those in a bool (1|B, S)."""
WATCHER: ContextVar[Watch | None] = ContextVar("accelplug_watch", default=None)
TOLD: ContextVar[tuple[Stream, Tensor | None] | None] = ContextVar("accelplug_told", default=None)
"""Of the base model's forward that has ended: its sequences, and what it gave of a prompt's tokens, for who asks for logits."""
UNPATCHED: ContextVar[bool] = ContextVar("accelplug_stock", default=False)


@dataclass(eq=False)
class Stream:
    """What is known of one batch of sequences. It lives on their cache, and is copied with it."""

    host: Reader
    prompt: Prompt
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By patch, what it must remember: sinks, chosen heads, maps."""
    decode: list[Any] = field(default_factory=list)
    """By record, what its patch needs at a decode step."""
    step: Forward | None = None
    """A decode step, made ahead for compiled code."""
    tokens: int = 0
    """How many tokens it has, with those of the present forward."""
    keys: int | None = None
    """Where its first layer's keys lay behind the last forward: there too if the cache was cropped, not if it was pruned."""
    told_apart: Tensor | None = None
    """What tells the rows of its cache apart, where it has several."""
    shift: int = 0
    """How far its last position id was ahead of its prompt's last place: 1 where ids begin at 1, below 0 behind padding in all rows."""

    def lacks(self, needs: frozenset[str]) -> str | None:
        """Why patches with such needs cannot answer, or None."""
        if not self.host.sees:
            return None
        if not self.prompt.shows:
            return self.host.no_image
        if "whole_prompt" in needs and not self.prompt.asks:
            return "the labels ask for tokens ahead of the image; give the prompt's the label -100"
        return None


@dataclass(eq=False)
class Forward:
    """One forward. Patches answer where it has a stream; `companion` stands in for them in a forward of our own."""

    stream: Stream | None = None
    cache: Any = None
    clock: Clock = DECODE
    hidden: Tensor | None = None
    companion: Callable[[Attending, Tensor], Tensor] | None = None
    inputs: dict[str, Any] | None = None
    """Arguments of the base model's forward, until the decoder begins: images are encoded in between."""
    parent: Forward | None = None
    host: Reader | None = None
    """Whose it is. torch runs no hooks behind a forward that Ctrl-C ends: what is left behind in a thread is nothing to others."""
    handed: bool = False
    """Whether the decoder has it: a second call of the decoder is another forward."""


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Have `watch` look at every attention call of this thread, in modules that a host made with ``watched=True`` holds."""
    token = WATCHER.set(watch)
    try:
        yield
    finally:
        WATCHER.reset(token)


@contextmanager
def stock() -> Iterator[None]:
    """Have this thread's forwards be the stock model's, past all patches."""
    token = UNPATCHED.set(True)
    try:
        yield
    finally:
        UNPATCHED.reset(token)


def as_it_is(record: Attending, out: Tensor) -> Tensor:
    """What stands in for patches in the stock model's forwards."""
    return out
