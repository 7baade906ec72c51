"""Methods that choose, for every head, among a few ways of reading: the ways are laid out once, heads pick theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.errors import ShapeError
from accelplug.kernels.orders import Tiles
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.base import UnimplementedHalf
from accelplug.patches.calibration import Calibration, Seen, attended, relative_error
from accelplug.patches.sparse.template import Blocks, BlockSparse, OncePerDevice


@dataclass(frozen=True, eq=False)
class Ways(OncePerDevice):
    """Ways of reading one layout: tiles and a plan that have one of them where heads would be."""

    tiles: Tiles
    plan: BlockPlan

    def moved(self, device: torch.device) -> Ways:
        return Ways(self.tiles.to(device), self.plan.to(device))


@dataclass(frozen=True, eq=False)
class HeadParams:
    """What `attend` needs: the ways, and, int64 (H,) or (1,), which of them each head takes."""

    ways: Ways
    choice: Tensor
    rest_weight: Tensor | None = None

    def to(self, device: torch.device | str) -> HeadParams:
        """Return the params with their tensors on `device`."""
        weight = None if self.rest_weight is None else self.rest_weight.to(device)
        return HeadParams(self.ways.to(device), self.choice.to(device), weight)


class PerHead(BlockSparse):
    """Template of the methods that choose a way of reading for every head. A subclass writes `ways` and `choice`.

    All layers and steps share the ways of a layout. A layer's heads pick theirs inside the call, which one kernel call serves:
    orders and plans differ by head. A plan with full heads lists all blocks of all rows, int32 (H, M, N) while the call lasts.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._ways: Bounded[Layout, Ways] = Bounded(16)
        self._chosen: Bounded[tuple, HeadParams] = Bounded(1024)

    def ways(self, layout: Layout) -> Ways:
        """Return the ways of reading a layout."""
        raise UnimplementedHalf(type(self), "ways")

    def choice(self, site: Site, clock: Clock) -> Tensor | None:
        """Return which way each head takes here and now, int64 (H,), or (1,) for all; None where all read everything."""
        raise UnimplementedHalf(type(self), "choice")

    def laid(self, layout: Layout) -> Ways:
        """Return the ways of a layout, made once."""
        return self._ways.get(layout, lambda: self.ways(layout))

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> HeadParams | None:
        choice = None if self.neutral(layout) else self.choice(site, clock)
        if choice is None:
            return None
        if int(choice.max()) >= (number := self.laid(layout).plan.count.shape[1]):
            raise ShapeError(
                f"A head is to read in way {int(choice.max())}, and {type(self).__name__} has {number}, from 0."
            )
        weight = self.rest_weights(site, clock)
        key = (layout, *choice.tolist(), None if weight is None else (site.layer, *weight.tolist()))
        return self._chosen.get(key, lambda: HeadParams(self.laid(layout), choice, weight))

    def laid_out(self, call: AttentionCall, params: HeadParams) -> tuple[Blocks, BlockPlan]:
        choice, heads = params.choice, call.q.shape[1]
        if choice.shape[0] not in (1, heads):
            raise ShapeError(f"{type(self).__name__} has a choice for {choice.shape[0]} heads, this call has {heads}.")
        tiles = params.ways.tiles.of_heads(choice)
        blocks = Blocks.of(call, tiles, tiles, self.config.block, self.config.key_block)
        return blocks, params.ways.plan.of_heads(choice)


class WayErrors(Calibration):
    """How far each way of reading is from dense, per step, layer and head, on sampled queries.

    The error of a way is ``mean((O_way - O_dense)^2) / mean(O_dense^2)`` over the sampled rows of a head: 0 for dense, 1 for a
    head that gives nothing, whatever the size of its output.
    """

    patch: PerHead

    def observe(self, seen: Seen, part: int) -> None:
        tokens = seen.sample(self.config.rows)
        ways = self.patch.laid(seen.layout).to(seen.call.q.device)
        read = reads(ways, tokens)  # [W, R, S]
        errors = torch.zeros(seen.call.q.shape[1], len(read), dtype=torch.float64)
        for row, head in seen.heads():
            logits, values = seen.logits(tokens, row, head), seen.values(row, head)
            exact = attended(logits, torch.ones_like(read[0]), values)
            errors[head] += torch.stack([relative_error(attended(logits, way, values), exact) for way in read]).cpu()
        self.add(seen, "error", errors / seen.call.q.shape[0])
        self.add(seen, "density", ways.plan.density()[0].cpu().expand_as(errors))


def reads(ways: Ways, tokens: Tensor) -> Tensor:
    """Which keys the queries of `tokens` (R,) read in each way: bool (W, R, S), keys in model order."""
    tiles, members = ways.tiles, ways.plan.members[0]  # [W, M, N]
    slots = tiles.slot_of_token().expand(len(members), -1)
    return torch.stack(
        [
            way[at[tokens] // ways.plan.block_q].index_select(-1, at // ways.plan.block_k)
            for way, at in zip(members, slots, strict=True)
        ]
    )
