"""What the first blocks of a forward give, kept for a further forward that differs behind them alone and need not run them again.

A hook on the last of these blocks keeps what it gives in the pipeline's forward. The further one runs through a stand-in, which shares
everything with the denoiser but has what was kept in place of these blocks: all else that stands around blocks (embeddings, residuals of a
ControlNet, the head) runs as ever, so that nothing of any model is written here anew, and the result is that of the whole forward.

Blocks are not passed over where others count on them: hooks (offloading), a forward of somebody's own, a step cache, tokens in
another order (`hosts.hoist`). Nor where they are compiled, since hooks in a graph stay unseen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn

from accelplug import compat
from accelplug.hosts.hoist import OwnHook
from accelplug.hosts.undo import Undo


class Given(nn.Module):
    """A block of which it is known what it gives."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class _Kept(threading.local):
    """What a thread's forward has kept."""

    def __init__(self) -> None:
        self.own: Undo | None = None
        self.first = 0
        self.outputs: dict[str, Any] = {}


class Opening:
    """The blocks of a denoiser ahead of the first one in which a further forward differs.

    Parameters
    ----------
    denoiser : whose blocks.
    lists : names of the lists that they are in, in the order of execution; each block is given what the one before returned.
    """

    def __init__(self, denoiser: nn.Module, lists: Sequence[str]) -> None:
        self.denoiser, self.lists = denoiser, lists
        self.undo = Undo()
        """Journal of the plug's changes, in which those of a forward are noted while it lasts."""
        self._here = _Kept()

    @property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Path and module of each block."""
        return [(f"{name}.{n}", block) for name in self.lists for n, block in getattr(self.denoiser, name).named_children()]

    def begin(self, modules: Collection[str]) -> None:
        """Have kept, in the forward that comes in this thread, what is given ahead of the first of the modules at these paths."""
        self.end()
        self.forget()
        first = self._first(modules)
        if not first or not self._may_be_passed_over(block for _, block in self.blocks[:first]):
            return
        self._here.first, self._here.own = first, Undo(within=self.undo)
        for name, number in self._passed(first).items():
            last = getattr(self.denoiser, name)[number - 1]
            self._here.own.hook(last, "register_forward_hook", OwnHook(last, partial(self._keep, name)))

    def _keep(self, name: str, block: nn.Module, args: tuple, output: Any) -> None:
        self._here.outputs[name] = output

    def end(self) -> None:
        """Take this thread's hooks off. A second call does nothing."""
        if self._here.own is not None:
            self._here.own.run()
            self._here.own = None

    def forget(self) -> None:
        """Let go of what this thread has kept."""
        self._here.first = 0
        self._here.outputs.clear()

    def stand_in(self, modules: Collection[str], rows: Callable[[Any], Any]) -> tuple[nn.Module, int]:
        """Return what a further forward is to run, and how many blocks are passed over in it: the denoiser itself, and 0, if none can be.

        Parameters
        ----------
        modules : paths of those in which it differs.
        rows : an output -> the rows of it that are run again.
        """
        here, passed = self._here, self._passed(self._here.first)
        if not here.first or (self._first(modules) or 0) < here.first or passed.keys() != here.outputs.keys():
            return self.denoiser, 0
        parts = {}
        for name, number in passed.items():
            given, blocks = Given(rows(here.outputs[name])), list(getattr(self.denoiser, name))
            parts[name] = nn.ModuleList([given] * number + blocks[number:])
        return compat.torch.with_parts(self.denoiser, parts), here.first

    def _first(self, modules: Collection[str]) -> int | None:
        """Place of the first block that has one of some modules; None where one is in none of them."""
        places = {path: place for place, (path, _) in enumerate(self.blocks)}
        found = [places.get(".".join(module.split(".")[:2])) for module in modules]
        known = [place for place in found if place is not None]
        return min(known, default=None) if len(known) == len(found) else None

    def _passed(self, first: int) -> dict[str, int]:
        """How many blocks of each list stand ahead of a place, of the lists that have some."""
        passed = {}
        for name in self.lists:
            number = min(first, len(getattr(self.denoiser, name)))
            first -= number
            if number:
                passed[name] = number
        return passed

    def _may_be_passed_over(self, blocks: Iterable[nn.Module]) -> bool:
        if "forward" in vars(self.denoiser) or getattr(self.denoiser, "is_cache_enabled", False):
            return False
        if compat.torch.is_compiled(self.denoiser):
            return False
        return not any(compat.torch.is_looked_into(module, OwnHook) for block in blocks for module in block.modules())
