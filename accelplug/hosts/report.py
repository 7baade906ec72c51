"""What a plug did since it was applied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accelplug.hosts.estimates import ErrorSpread
from accelplug.show import Shown, table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """What a plug did since it was applied. Prints as a table."""

    recipe: str
    served: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    hoisted: dict[str, int] = field(default_factory=dict)
    gated: list[str] = field(default_factory=list)
    unjudged: list[str] = field(default_factory=list)
    gains: dict[str, float] = field(default_factory=dict)
    errors: dict[str, ErrorSpread] = field(default_factory=dict)
    """What each patch estimates of the relative error of its answers, in the last run."""
    errors_by_layer: dict[str, ErrorSpread] = field(default_factory=dict)
    unestimated: dict[str, int] = field(default_factory=dict)
    """Calls of the last run, by patch, that should have been repaired and estimated, and were not."""
    kept: dict[str, str] = field(default_factory=dict)
    """What audits found of the attention that each patch's plans keep; by module where that was asked for."""
    forecasts: dict[str, str] = field(default_factory=dict)
    expected: str = ""
    """What the rules come to in a run of as many steps as the last one had; ahead of the first run, in runs of some lengths."""
    caches: list[str] = field(default_factory=list)
    """What step caches came to that may be left out, or rest in some runs."""
    guided: list[str] = field(default_factory=list)
    """What guidance cost: forwards beside the pipeline's."""
    reach: list[str] = field(default_factory=list)
    """How much of a prompt's time rules can touch in a language model: its layers with full attention, and the ceiling that leaves."""
    compiled: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    unrouted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        """Calls that patches answered."""
        return sum(calls for name, calls in self.served.items() if name != "dense")

    @property
    def left_dense(self) -> list[str]:
        """What ran dense though it should not have, in words."""
        found = [f"fell back to dense: {what} ({calls} calls)" for what, calls in self.fallbacks.items()]
        if not self.answered and not self.compiled:
            found.append("; ".join(["no call was answered by a patch", *self.idle]))
        return found

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield (what, how much) in reading order."""
        if self.expected:
            yield "expected by the rules", self.expected
        for name, calls in self.served.items():
            gain = f", each {self.gains[name]:.2f}x faster than dense" if name in self.gains else ""
            yield f"answered by {name}", f"{calls} calls{gain}"
        for what, predicted in self.forecasts.items():
            yield f"predicted for {what}", predicted
        for name, error in self.errors.items():
            yield f"estimated error of {name}", str(error)
        for name, calls in self.unestimated.items():
            yield (
                f"not repaired by {name}",
                f"{calls} calls of the last run: too few tokens to probe, or dense attention answered",
            )
        for module, error in self.errors_by_layer.items():
            yield f"estimated error at {module}", str(error)
        for what, kept in self.kept.items():
            yield f"attention kept by {what}", kept
        for what, calls in self.fallbacks.items():
            yield f"fell back to dense: {what}", f"{calls} calls"
        for where, forwards in self.hoisted.items():
            yield f"order of tokens applied {where}", f"{forwards} forwards"
        for reason in self.gated:
            yield "left dense by the gate", reason
        for reason in self.unjudged:
            yield "not judged by the gate", reason
        for said in self.caches:
            yield "step cache", said
        for said in self.guided:
            yield "guidance", said
        for said in self.reach:
            yield "of a prompt", said
        for what in self.compiled:
            yield "runs compiled, calls not counted", what
        for rule in self.idle:
            yield "never held", rule
        for module in self.unrouted:
            yield "named by a rule, never seen", module
        for module, why in self.skipped.items():
            yield f"cannot be re-bound: {module}", why

    def __rich__(self) -> Table:
        found = table(self.recipe, "attention", "", names=False)
        for row in self.rows():
            found.add_row(*row)
        return found

    def __str__(self) -> str:
        return "\n".join(f"{what}: {much}" for what, much in self.rows()) or "nothing ran yet"
