"""What happened while a plug was on: which calls ran sparse, which fell back to dense and why, and, on request, every call."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelplug.call import Clock, Site
from accelplug.errors import FallbackError
from accelplug.hosts.estimates import Estimates

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.kernels.plan import BlockPlan

logger = logging.getLogger("accelplug")


@dataclass(frozen=True)
class Event:
    """One self- or joint-attention call.

    Attributes
    ----------
    patch : name of the patch that answered, or ``dense``.
    reason : why a call that a rule names ran dense, or None.
    density : fraction of (query, key) pairs computed, pooled keys counted; 1.0 for dense, None where a patch cannot say.
    tokens : length of the query sequence.
    ms : wall time of the call in milliseconds, device synchronised; None unless the trace is timed.
    plan : the block plan, None unless the trace keeps plans.
    error : the patch's estimate of the relative error of its answer, None where it has none. The call ran dense where it is above the
        bound.
    """

    site: Site
    clock: Clock
    patch: str
    reason: str | None
    density: float | None
    tokens: int
    ms: float | None = None
    plan: BlockPlan | None = None
    error: float | None = None
    kept: float | None = None
    """Share of the true attention that falls on what the plan reads, mean over heads and a few exact rows; None where nobody can say."""


@dataclass
class Audit:
    """What audits of a module's calls found: the share of attention that its heads kept, and how many read everything for that."""

    heads: int = 0
    total: float = 0.0
    least: float = 1.0
    dense: int = 0

    def add(self, kept: Tensor, dense: Tensor) -> None:
        """Take in a call: float32 (B, H) and bool (B, H)."""
        self.heads += kept.numel()
        self.total += float(kept.sum())
        self.least = min(self.least, float(kept.min()))
        self.dense += int(dense.sum())

    def join(self, other: Audit) -> None:
        """Take in those of another module."""
        self.heads, self.total, self.dense = self.heads + other.heads, self.total + other.total, self.dense + other.dense
        self.least = min(self.least, other.least)

    def __str__(self) -> str:
        said = f"{self.total / max(self.heads, 1):.3f}, least {self.least:.3f}"
        return f"{said}; {self.dense} of {self.heads} heads read everything"


@dataclass(eq=False)
class Trace:
    """An open list of events, and what it wants of each."""

    timed: bool
    plans: bool
    events: list[Event] = field(default_factory=list)


@dataclass
class Ledger:
    """Counts of what ran how; every call while a trace is open. Traces may be open side by side: each has all events."""

    strict: bool = False
    estimates: Estimates = field(default_factory=Estimates)
    served: Counter[str] = field(default_factory=Counter)
    """Calls answered, by patch name; ``dense`` counts those that no rule names or that a gate left dense."""
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Calls that a rule names and that ran dense all the same, by (module, reason)."""
    hoisted: Counter[str] = field(default_factory=Counter)
    """Forwards in which an order that blocks share was applied once for them, by where, and in which it was not, by why."""
    kept: dict[tuple[str, str], Audit] = field(default_factory=dict)
    """What audits found, by (patch, module)."""
    traces: list[Trace] = field(default_factory=list)
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def timed(self) -> bool:
        """Whether a trace that is open wants calls timed."""
        return any(trace.timed for trace in self.traces)

    @property
    def keeps_plans(self) -> bool:
        """Whether a trace that is open wants plans."""
        return any(trace.plans for trace in self.traces)

    def fell_back(self, module: str, reason: str, times: int = 1) -> None:
        """Count a fallback; warn the first time a reason comes up, or raise under strict."""
        if self.strict:
            raise FallbackError(
                f"Attention of {module} would run dense, but strict=True asks for none that a rule names: {reason}. "
                "Exclude it by a rule, or apply with strict=False."
            )
        if not any(known == reason for _, known in self.fallbacks):
            logger.warning("%s runs dense: %s (counted in plug.report(); later ones are not logged)", module, reason)
        self.count(self.fallbacks, (module, reason), times)

    def count(self, counter: Counter[Any], key: Hashable, times: int = 1) -> None:
        """Add to one of the counters, which threads share."""
        with self._counting:
            counter[key] += times

    def audited(self, patch: str, module: str, kept: Tensor, dense: Tensor) -> None:
        """Take in what an audit of a call found."""
        with self._counting:
            self.kept.setdefault((patch, module), Audit()).add(kept, dense)

    def kept_in(self, by_module: bool) -> dict[str, str]:
        """What audits found, by patch, or by patch and module."""
        found: dict[str, Audit] = {}
        for (patch, module), kept in self.kept.items():
            found.setdefault(f"{patch} at {module}" if by_module else patch, Audit()).join(kept)
        return {what: str(kept) for what, kept in found.items()}

    def note(self, event: Event) -> None:
        """Add an event to the open traces."""
        for trace in self.traces:
            trace.events.append(event)

    @contextmanager
    def trace(self, timed: bool, plans: bool) -> Iterator[list[Event]]:
        """Collect an event per call."""
        opened = Trace(timed, plans)
        self.traces = [*self.traces, opened]
        try:
            yield opened.events
        finally:
            self.traces = [trace for trace in self.traces if trace is not opened]
