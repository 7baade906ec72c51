"""What several calls share: the match that the first of some layers makes, in the first of some steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.call import Clock, Layout, Site
from accelplug.kernels.merge import Partition, match


@dataclass(eq=False)
class SharedMatch:
    """The match that several calls share. Graphs write `slot` and `weight`, and look at nothing else.

    Attributes
    ----------
    slot : int64 (B, ...), None where there is none yet.
    weight : float32 (B, ...), what else the match consists of; None where it is nothing.
    period, step : of `interval` steps, and the last step in it, that it is for; None where steps are not known.
    leader : the first layer that shares it: it makes the match.
    """

    slot: Tensor | None = None
    weight: Tensor | None = None
    period: int | None = None
    step: int | None = None
    leader: int | None = None

    def for_batch(self, batch: int) -> Tensor | None:
        """Return `slot` where it is for so many samples; else None."""
        return self.slot if self.slot is not None and len(self.slot) == batch else None


def period_of(clock: Clock, interval: int) -> int | None:
    """Return which `interval` steps these are; None where the step is not known."""
    return None if clock.step is None else clock.step // interval


def shared_match(
    sharers: Any, site: Site, layout: Layout, clock: Clock, state: dict[str, Any], *, interval: int, layers: int
) -> tuple[SharedMatch | None, bool]:
    """Return the match that `site` shares with other layers and steps, and whether one that is there already will be good.

    Layers share within one guidance branch. Where a pipeline does not name the branch and calls twice a step, steps after the first of
    an interval take the later call's; where the step is not known, every forward has a match of its own.

    Parameters
    ----------
    sharers : the patch, whose other calls it is shared with.
    interval, layers : how many steps, and layers in a row, share one; with 1 and 1 there is nothing to share: None.
    """
    if interval == layers == 1 or site.layer is None:
        return None, False
    memories = state.setdefault("shared", {}).setdefault("matches", Bounded(256))
    memory = memories.get((sharers, layout, site.layer // layers), SharedMatch)
    step, period = clock.step, period_of(clock, interval)
    if memory.period != period:
        memory.period, memory.leader, memory.slot = period, None, None
    if memory.leader is not None and site.layer > memory.leader:
        return memory, True
    if step is None or memory.step is None or step <= memory.step:  # not known to be a later step of the same run
        memory.slot = None
    memory.leader, memory.step = site.layer, step
    return memory, memory.slot is not None


def slot_of(metric: Tensor, partition: Partition, merged: int, memory: SharedMatch | None, reads: bool) -> Tensor:
    """Return the match, int64 (B, N): the one in memory where that is good; else it is made, and kept there.

    Parameters
    ----------
    metric : (B, H, N, D), of which the mean over heads tells what is alike.
    partition, merged : as for `match`.
    memory, reads : of `shared_match`.
    """
    if memory is not None and reads and (known := memory.for_batch(len(metric))) is not None:
        return known
    slot = match(metric.mean(1, dtype=torch.float32), partition, merged)
    if memory is not None:
        memory.slot = slot
    return slot
