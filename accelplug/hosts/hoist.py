"""Tokens are permuted once for consecutive blocks that share an order, instead of in every attention call.

A block-sparse call permutes q, k and v, and un-permutes its output. Where two or more consecutive blocks use the same order, the
hidden states and the rotary embedding (and the modulation, where it has a token axis) are permuted before the first block, the
hidden states un-permuted after the last, and the calls in between permute nothing. A dense fallback among them is still correct:
without a mask, self-attention gives permuted outputs for permuted tokens, and cross-attention to text works row by row. Results
equal those of permuting in every call to rounding: matrix products see their rows in another order.

The hooks last for one eager forward and are removed at its end, by exception too. A run of blocks ends at one that is dense by a rule
or by the gate, that has an order of its own, or whose tokens others may look at: hooks, a replaced forward (step caches,
offloading), a processor of another class. Compiled blocks are left out: first, inner and last ones would need graphs of their own,
and Dynamo does not guard on hooks by default.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accelplug import compat
from accelplug.bounded import Bounded
from accelplug.hosts import rebind
from accelplug.hosts.undo import Undo

if TYPE_CHECKING:
    from accelplug.families.base import AnyOrder
    from accelplug.hosts.ledger import Ledger
    from accelplug.hosts.site import Settled, SiteRecord
    from accelplug.kernels.orders import Tiles

LEAST = 2
"""Blocks in a row from which an order is applied ahead."""


class Hoist:
    """Applies shared orders ahead of the blocks of one denoiser.

    Parameters
    ----------
    denoiser : whose blocks.
    scheme : what is known of them, None where nothing is.
    records : of its attention modules.
    answers : record of an attention module -> whether its next calls run its patch.
    ledger : counts in how many forwards what was hoisted, or why not.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scheme: AnyOrder | None,
        records: list[SiteRecord],
        answers: Callable[[SiteRecord], bool],
        ledger: Ledger,
    ) -> None:
        self.denoiser, self.records = denoiser, records
        self.scheme = scheme if scheme is not None and type(denoiser).__name__ == scheme.denoiser else None
        self.answers, self.ledger = answers, ledger
        self._moved: Bounded[tuple[int, torch.device], tuple[Tiles, Tensor, Tensor]] = Bounded(16)
        self._standing = _Standing()
        self.undo = Undo()
        """Journal of the plug's changes, in which those of a forward are noted while it lasts."""

    def begin(self, device: torch.device) -> None:
        """Put hooks on the runs of blocks that share an order, for the forward that comes in this thread."""
        if self.scheme is None or sum(record.settled.order is not None for record in self.records) < LEAST:
            return
        blocks = [_Block(name, module, *self._found(module)) for name, module in self._children()]
        for order, group in groupby(blocks, key=lambda block: block.order):  # tiles compare by identity
            run = list(group)
            if order is not None and len(run) >= LEAST:
                self._hoist(run, order, device)
        for reason in {block.obstacle for block in blocks if block.obstacle}:
            self.ledger.count(self.ledger.hoisted, f"by every call, {reason}")

    def end(self) -> None:
        """Take this thread's hooks off, and give the calls their own orders back. A second call does nothing."""
        if self._standing.own is not None:
            self._standing.own.run()
            self._standing.own = None
        for record, settled in self._standing.before:
            record.settled = settled
        self._standing.before.clear()

    @property
    def stands(self) -> bool:
        """Whether tokens are in another order in some blocks of this thread's forward."""
        return self._standing.own is not None

    def _children(self) -> Iterator[tuple[str, nn.Module]]:
        name = self.scheme.blocks if self.scheme else ""
        for number, block in getattr(self.denoiser, name).named_children():
            yield f"{name}.{number}", block

    def _found(self, block: nn.Module) -> tuple[list[SiteRecord], Tiles | None, str | None]:
        """The patched attention of a block, the order that it shares with others, or what stands in the way."""
        owners = [module for module in block.modules() if compat.torch.held(module, "processor") is not None]
        records = [vars(module).get(rebind.RECORD) for module in owners]
        sites = [record for record in records if record is not None and record.site is not None]
        orders = {record.settled.order for record in sites}
        order = orders.pop() if len(orders) == 1 else None
        if order is None or not all(map(self.answers, sites)):
            return sites, None, None
        obstacle = self._obstacle(block, records)
        return sites, None if obstacle else order, obstacle

    def _obstacle(self, block: nn.Module, records: list[SiteRecord | None]) -> str | None:
        if torch.is_grad_enabled():
            return "because gradients may be asked for"
        if compat.torch.is_compiled(block):
            return "because blocks are compiled"
        looked_at = any(compat.torch.is_looked_into(module, OwnHook) for module in block.modules())
        stock = type(block).__name__ == (self.scheme and self.scheme.block) and all(map(self._is_stock, records))
        return "because others look into blocks" if looked_at or not stock else None

    def _is_stock(self, record: SiteRecord | None) -> bool:
        """Whether attention runs the processor that is known, re-bound."""
        return (
            record is not None
            and rebind.is_rebound(record.module, record)
            and type(record.original).__name__ == (self.scheme and self.scheme.processor)
            and not compat.diffusers.is_parallel(record.module.processor)
        )

    def _hoist(self, run: list[_Block], order: Tiles, device: torch.device) -> None:
        there, back = self._indices(order, device)
        arguments = self.scheme.arguments if self.scheme else ()
        passage = _Passage(arguments, there, back)
        own = self._standing.own = self._standing.own or Undo(within=self.undo)
        for block in run:
            hook = passage.first if block is run[0] else passage.inner
            own.hook(block.module, "register_forward_pre_hook", OwnHook(block.module, hook), with_kwargs=True)
            for record in block.sites:
                here = record.settled
                self._standing.before.append((record, here))
                if here.patch is not None:
                    record.settled = replace(here, params=here.patch.in_order(here.params))
        own.hook(run[-1].module, "register_forward_hook", OwnHook(run[-1].module, passage.last))
        self.ledger.count(self.ledger.hoisted, f"once for {run[0].name} to {run[-1].name}")

    def _indices(self, order: Tiles, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token of each place, and place of each token, int64 (S,) on `device`."""

        def move() -> tuple[Tiles, Tensor, Tensor]:
            if order.gather is None or order.scatter is None:
                raise ValueError("tokens in raster order need no permuting")
            return order, order.gather[: order.tokens].to(device), order.scatter.to(device)

        return self._moved.get((id(order), device), move)[1:]  # `order` is kept beside, so that its id stays its own


@dataclass(frozen=True, eq=False)
class _Block:
    """One block: what shares its order, None where it has none or something stands in the way."""

    name: str
    module: nn.Module
    sites: list[SiteRecord]
    order: Tiles | None
    obstacle: str | None


class _Passage:
    """One run of blocks in one forward: what their hooks do."""

    def __init__(self, arguments: tuple[tuple[str, int], ...], there: Tensor, back: Tensor) -> None:
        self.arguments, self.there, self.back = arguments, there, back
        self._permuted: dict[str, tuple[Any, Any]] = {}

    def first(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        name, dimensions = self.arguments[0]
        bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs)
        bound.arguments[name] = self._permute(bound.arguments[name], dimensions)
        return self.inner(block, bound.args[1:], bound.kwargs)

    def inner(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs)
        for name, dimensions in self.arguments[1:]:
            given = bound.arguments[name]
            # Blocks are handed the same embedding and modulation one after the other.
            if name not in self._permuted or self._permuted[name][0] is not given:
                self._permuted[name] = given, self._permute(given, dimensions)
            bound.arguments[name] = self._permuted[name][1]
        return bound.args[1:], bound.kwargs

    def last(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        self._permuted.clear()
        return output.index_select(1, self.back)

    def _permute(self, x: Any, dimensions: int) -> Any:
        if isinstance(x, tuple):
            return tuple(self._permute(part, dimensions) for part in x)
        return x.index_select(1, self.there) if x.ndim == dimensions else x


class _Standing(threading.local):
    """What stands for a thread's own forward."""

    def __init__(self) -> None:
        self.own: Undo | None = None
        self.before: list[tuple[SiteRecord, Settled]] = []


class OwnHook:
    """Hook of one block in the forward of one thread."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        self.module, self.run, self.thread = module, run, threading.get_ident()

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        ours = module is self.module and threading.get_ident() == self.thread
        return self.run(module, *given) if ours else None
