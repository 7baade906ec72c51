"""What happened while a plug was on: which calls ran sparse, which fell back to dense and why, and, on request, every call."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accelplug.call import Clock, Site
from accelplug.errors import FallbackError

if TYPE_CHECKING:
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
    """

    site: Site
    clock: Clock
    patch: str
    reason: str | None
    density: float | None
    tokens: int
    ms: float | None = None
    plan: BlockPlan | None = None


@dataclass
class Ledger:
    """Counts of what ran how; the list of events while a trace is on."""

    strict: bool = False
    served: Counter[str] = field(default_factory=Counter)
    """Calls answered, by patch name; ``dense`` counts those that no rule names or that a gate left dense."""
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Calls that a rule names and that ran dense all the same, by (module, reason)."""
    hoisted: Counter[str] = field(default_factory=Counter)
    """Forwards in which an order that blocks share was applied once for them, by where, and in which it was not, by why."""
    events: list[Event] | None = None
    timed: bool = False
    keep_plans: bool = False
    _open: list[tuple[list[Event], bool, bool]] = field(default_factory=list)

    def fell_back(self, module: str, reason: str, times: int = 1) -> None:
        """Count a fallback; warn the first time a reason comes up, or raise under strict."""
        if self.strict:
            raise FallbackError(
                f"Attention of {module} would run dense, but strict=True asks for none that a rule names: {reason}. "
                "Exclude it by a rule, or apply with strict=False."
            )
        if not any(known == reason for _, known in self.fallbacks):
            logger.warning("%s runs dense: %s (counted in plug.report(); later ones are not logged)", module, reason)
        self.fallbacks[module, reason] += times

    def note(self, event: Event) -> None:
        """Add an event to the open trace."""
        if self.events is not None:
            self.events.append(event)

    @contextmanager
    def trace(self, timed: bool, plans: bool) -> Iterator[list[Event]]:
        """Collect an event per call. Of several that are open, of threads too, the last one opened gets them."""
        events: list[Event] = []
        self._open.append((events, timed, plans))
        self.events, self.timed, self.keep_plans = self._open[-1]
        try:
            yield events
        finally:
            self._open = [trace for trace in self._open if trace[0] is not events]
            self.events, self.timed, self.keep_plans = self._open[-1] if self._open else (None, False, False)
