"""What stands at one attention module of a denoiser, and in one part of it: its record, and what a forward has settled there."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.families.base import Geometry
from accelplug.hosts.placement import Placed
from accelplug.hosts.record import LEFT_DENSE, Choice, Decide
from accelplug.hosts.ulysses import Gathered

if TYPE_CHECKING:
    from accelplug.kernels.orders import Tiles
    from accelplug.patches.base import Patch


class SiteHost(Protocol):
    """A denoiser's or an image encoder's host, as far as records ask it."""

    root: Any
    decide: Decide

    @property
    def outer_mask(self) -> bool:
        """Whether a (B, 1, S, S) mask is an outer product of one validity."""

    @property
    def exchanging(self) -> bool:
        """Whether ranks exchange tokens for heads around attention."""

    @property
    def now(self) -> Clock:
        """When this thread's forward happens."""

    def attend(
        self,
        record: SiteRecord,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        scale: float | None,
        dense: Callable[..., Tensor],
        blocked: str | None,
    ) -> Tensor:
        """Answer one eager attention call of `record`."""


@dataclass(eq=False)
class Settled:
    """What runs at an attention module during one forward. Never changed, but replaced. Read inside compiled graphs."""

    choice: Choice = LEFT_DENSE
    reason: str | None = None
    patch: Patch | None = None
    params: Any = None
    layout: Layout | None = None
    order: Tiles | None = None
    """The order that every call here puts its tokens in; the same object where others share it."""
    exchanged: Gathered | None = None
    """Where tokens lie after an exchange between ranks, if not in order."""
    length: int = -1
    known: bool = True
    """Whether the forward of the denoiser was seen in this thread."""
    error: Tensor | None = None
    """Into which the patch writes an estimate of its error, float32 (); None where it has none."""
    ticket: Tensor | None = None
    """Of what it left here in the last step, see `kernels.memory`; None without an estimate."""


class _Here(threading.local):
    """What a thread's own forward has settled. (Set in every thread: Dynamo guards on what the instance holds.)"""

    def __init__(self) -> None:
        self.settled = Settled(known=False)


@dataclass(eq=False)
class SiteRecord:
    """What stands at one attention module: its site, and, for each thread its own, what runs there now."""

    host: SiteHost
    module: Any
    site: Site | None
    """None where rules cannot name it: cross-attention, refiners, audio."""
    original: Any = None
    routed: bool = False
    traced: bool = False
    """Whether it ran in compiled code, where calls are not counted."""
    missed: bool = False
    latest: Settled = field(default_factory=lambda: Settled(known=False))
    """What any thread has settled last, for reports."""
    _here: _Here = field(default_factory=_Here)

    @property
    def settled(self) -> Settled:
        """What runs here in this thread's forward."""
        return self._here.settled

    @settled.setter
    def settled(self, settled: Settled) -> None:
        self._here.settled = self.latest = settled

    @property
    def patch(self) -> Patch | None:
        """What answers, in this thread's forward."""
        return self._here.settled.patch

    @property
    def params(self) -> Any:
        """What the patch was given, in this thread's forward."""
        return self._here.settled.params

    @property
    def layout(self) -> Layout | None:
        """How tokens lie, in this thread's forward."""
        return self._here.settled.layout

    def placed(self, site: Site) -> Placed:
        """Say what runs here in this thread's forward, or in the latest one; ahead of the first, what the rules say already."""
        seen = self.settled if self.settled.known else self.latest
        choice = seen.choice if seen.known else self.host.decide(site, None, self.host.now)
        reason = seen.reason if seen.known else choice.reason
        error = math.nan if seen.error is None else float(seen.error)
        known = None if math.isnan(error) else error
        return Placed(site, choice.name, choice.patch, seen.params, seen.layout, reason, known)

    @property
    def gathered(self) -> Gathered | None:
        """Where tokens lie that are to be put in order: dense attention takes them in any."""
        return self.settled.exchanged if self.settled.patch is not None else None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        scale: float | None,
        dense: Callable[..., Tensor],
        blocked: str | None,
    ) -> Tensor:
        """Answer one attention call; all tensors (B, H, S, D)."""
        if not torch.compiler.is_compiling():
            return self.host.attend(self, q, k, v, mask, scale, dense, blocked)
        self.routed = self.traced = True
        here = self._here.settled
        patch = here.patch
        if patch is None or not here.known:  # a thread of which nothing is known yet has a graph of its own, traced anew
            return dense()
        key_mask, understood = key_validity(mask, here.length, self.host.outer_mask)
        if blocked is not None or not understood or not q.shape[-2] == k.shape[-2] == here.length:
            self.missed = True  # counted by the host, outside the graph
            return dense()
        call = AttentionCall(q, k, v, key_mask, scale_of(q, scale), dense, error=here.error, ticket=here.ticket)
        return patch.attend(call, here.params)

    def settle(
        self, choice: Choice, layout: Layout | None, params: Any, order: Tiles | None, exchanged: Gathered | None = None
    ) -> None:
        """Set what runs here from now on."""
        reason = choice.reason
        if choice.patch is not None and layout is None:
            where = " under context parallelism" if self.host.exchanging else ""
            reason = f"{type(self.host.root).__name__} was given tokens whose layout is not understood{where}"
        patch = choice.patch if params is not None else None
        length = layout.length if layout else -1
        self.settled = Settled(choice, reason, patch, params, layout, order, exchanged, length)


@dataclass(frozen=True, eq=False)
class Entered:
    """What one forward's input says about a region."""

    geometry: Geometry | None = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    batch: int = 1


class _Inside(threading.local):
    """What a thread's own forward brought to a region, and what was settled for."""

    def __init__(self) -> None:
        self.entered: Entered | None = None
        self.seen: tuple | None = None


@dataclass(eq=False)
class Region:
    """A part of a denoiser in which all tokens lie on one grid: all of it, or one resolution of a UNet."""

    path: str
    module: nn.Module
    records: list[SiteRecord] = field(default_factory=list)
    here: _Inside = field(default_factory=_Inside)
    latest: Entered = Entered()
    """What any thread's forward has brought last: a compiled forward brings nothing that can be read."""

    @property
    def entered(self) -> Entered:
        """What this thread's forward has brought."""
        return self.here.entered or self.latest

    @entered.setter
    def entered(self, entered: Entered) -> None:
        self.here.entered = self.latest = entered


def key_validity(mask: Any, length: int, outer: bool) -> tuple[Tensor | None, bool]:
    """Reduce a mask to key validity, bool (B, S_k).

    Returns
    -------
    validity : bool (B, S_k), or None where every key may be read.
    understood : whether `mask` says no more than that. `outer`: a (B, 1, S, S) mask is an outer product of one validity.
    """
    if mask is None:
        return None, True
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape[-1] != length:
        return None, False
    if mask.ndim == 2:
        return mask, True
    if mask.ndim == 4 and mask.shape[1] == 1 and (mask.shape[2] == 1 or outer):
        return mask[:, 0, 0], True
    return None, False


def scale_of(q: Tensor, scale: float | None) -> float:
    """Return the factor on q.k, 1 / sqrt(D) by default."""
    return q.shape[-1] ** -0.5 if scale is None else scale
