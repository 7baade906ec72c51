"""One line of a comparison on long texts: what came of every context, what it is worth, and what it is beside the stock model's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelplug.comparison.environment import memory_heading
from accelplug.comparison.evaluators.evaluator import Figure
from accelplug.comparison.questions import Reply
from accelplug.comparison.texts.context import TextItem
from accelplug.comparison.texts.reader import Reading
from accelplug.comparison.texts.scores import TEXT_METRICS, beside, gain, text_figures

if TYPE_CHECKING:
    from accelplug.hosts.ledger import Event
    from accelplug.hosts.report import Report


@dataclass
class LayerReads:
    """What a recipe reads, by layer: share of the (query, key) pairs, and of the true attention, None where it reads all."""

    density: list[float]
    kept: list[float | None]

    @classmethod
    def of(cls, events: Sequence[Event], layers: int, phase: str) -> LayerReads:
        """Take it from the calls in which a prompt is read, phase ``prefill``, or from steps that make a token, ``decode``: their mean."""
        made = cls([1.0] * layers, [None] * layers)
        told = [event for event in events if event.clock.phase == phase and event.density is not None]
        for layer in range(layers):
            here = [event for event in told if event.site.layer == layer]
            kept = [event.kept for event in here if event.kept is not None]
            made.density[layer] = statistics.fmean([event.density or 0.0 for event in here] or [1.0])
            made.kept[layer] = statistics.fmean(kept) if kept else None
        return made

    @property
    def mean_density(self) -> float:
        """Over all layers."""
        return statistics.fmean(self.density)

    @property
    def least_kept(self) -> tuple[float, int] | None:
        """The layer that keeps least of its attention: (share, layer)."""
        return min(((share, layer) for layer, share in enumerate(self.kept) if share is not None), default=None)

    @property
    def mean_kept(self) -> float:
        """Over the layers that do not read all; NaN where all do."""
        shares = [share for share in self.kept if share is not None]
        return statistics.fmean(shares) if shares else math.nan


@dataclass
class TextRow:
    """What came of every context with a recipe on, or stock.

    Attributes
    ----------
    readings : by length of the prompt and the context's key, in the order in which they were read.
    layers, steps_read : by length of the prompt, what is read of it, and what the steps behind it read; of recipes alone.
    figures : by name: needle, ruler, associative, nll; by length ``first 4096``, ``kv 4096``, ``peak 4096``; and ``step``.
    """

    name: str
    kind: str
    readings: dict[tuple[int, str], Reading] = field(default_factory=dict)
    layers: dict[int, LayerReads] = field(default_factory=dict)
    steps_read: dict[int, LayerReads] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def replies(self) -> list[Reply]:
        """What was said, in the order of the items of all contexts."""
        return [reply for reading in self.readings.values() for reply in reading.replies]

    def of(self, tokens: int) -> list[Reading]:
        """The readings of a length."""
        return [reading for (length, _), reading in self.readings.items() if length == tokens]

    @property
    def steps(self) -> list[float]:
        """Seconds of a token, by context that was weighed token by token."""
        return [reading.step_s for reading in self.readings.values() if reading.step_s is not None]

    def drawn(self) -> list[Figure]:
        """What a page draws."""
        return list(self.figures.values())

    def note(self, report: Report) -> None:
        """Take in why calls ran dense, and what audits found."""
        said = [f"ran dense: {what.split(': ', 1)[-1]}" for what in report.fallbacks]
        if not set(report.served) - {"dense"}:
            said.append("no call was answered in some contexts: they were read as stock does")
        audits = [f"attention kept by {what}" for what in report.kept]
        known = [note for note in self.notes if not note.startswith(tuple(audits) or ("\n",))]
        said += [f"{what}: {kept}" for what, kept in zip(audits, report.kept.values(), strict=True)]  # of the last context
        self.notes = list(dict.fromkeys(known + said))

    def hold(self, stock: TextRow, items: Sequence[TextItem]) -> None:
        """Hold it against the stock model's row, which may be itself."""
        is_stock, found = self is stock, dict[str, Figure]()
        for name, value in text_figures(items, self.replies).items():
            metric = TEXT_METRICS[name]
            delta = None if is_stock else beside(metric, items, stock.replies, self.replies)
            share, better = not metric.unit, "more" if metric.higher_is_better else "less"
            if not math.isnan(value):
                found[name] = Figure(metric.heading, value, better, delta, share, 2 if share else 3)  # type: ignore[arg-type]
        for tokens in dict.fromkeys(length for length, _ in self.readings):
            before, after = ([reading.first_s for reading in row.of(tokens)] for row in (stock, self))
            found[f"first {tokens}"] = _times(f"first token at {tokens:,}: times as fast", before, after, is_stock)
            kv, peaks = (max(r.kv_mib for r in self.of(tokens)), [r.peak_mib for r in self.of(tokens) if r.peak_mib])
            found[f"kv {tokens}"] = Figure(f"KV MiB at {tokens:,}", kv, "less", share=False)
            if peaks:
                found[f"peak {tokens}"] = Figure(f"{memory_heading()}, at {tokens:,}", max(peaks), "less", share=False)
        if self.steps:
            found["step"] = _times("a token: times as fast", stock.steps, self.steps, is_stock)
        self.figures = found


def needle_grid(items: Sequence[TextItem], row: TextRow) -> dict[tuple[float, int], float]:
    """By depth and length, the share of needles that were found."""
    return _shares(items, row, "needle", lambda item: (item.depth, item.tokens))


def by_task(items: Sequence[TextItem], row: TextRow) -> dict[tuple[str, int], float]:
    """By task and length, the share that is right; how texts go on aside."""
    tasks = dict.fromkeys(item.task for item in items if item.task != "suffix")
    found = [_shares(items, row, task, lambda item: (item.task, item.tokens)) for task in tasks]
    return {key: share for shares in found for key, share in shares.items()}


def _shares(items: Sequence[TextItem], row: TextRow, task: str, key: Callable[[TextItem], Any]) -> dict[Any, float]:
    found: dict[Any, list[bool]] = {}
    for item, reply in zip(items, row.replies, strict=True):
        if item.task == task:
            found.setdefault(key(item), []).append(reply.right)
    return {name: statistics.fmean(right) for name, right in found.items()}


def _times(name: str, stock: Sequence[float], own: Sequence[float], is_stock: bool) -> Figure:
    """How many times as fast as stock."""
    faster = gain(stock, own)
    return Figure(name, 1 + faster.value, "more", None if is_stock else faster, share=False)
