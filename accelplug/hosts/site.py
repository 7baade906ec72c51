"""What stands at one attention module of a denoiser, and in one part of it: its record, and what a forward has settled there."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

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
    def text_apart(self) -> bool:
        """Whether text asks in calls of its own, which stay dense."""

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
    unasked: tuple[int, int] = (0, 0)
    """How many of these tokens at the start and at the end do not ask, as in `Layout`."""
    row: int | None = None
    """A token whose row of a mask (B, 1, S, S) says which keys may be read; None where it may say more."""
    aside: int = 0
    """How many keys a call of the text alone has at most, which is dense; 0 where text asks together with the grid."""
    read: int | None = None
    """How many tokens are read, where they are others: cross-attention."""
    known: bool = True
    """Whether the forward of the denoiser was seen in this thread."""
    error: Tensor | None = None
    """Into which the patch writes an estimate of its error, float32 (); None where it has none."""
    ticket: Tensor | None = None
    """Of what it left here in the last step, see `kernels.memory`; None without an estimate."""
    guide: tuple[Choice, Any] | None = None
    """What perturbs the answer, and its params, in a forward to be guided by; see `hosts.guiding`."""

    @property
    def queries(self) -> int:
        """How many tokens ask."""
        return self.length - sum(self.unasked)

    @property
    def keys(self) -> int:
        """How many tokens are read."""
        return self.length if self.read is None else self.read

    def obstacle(self, q: Tensor, k: Tensor, mask: Any) -> str | None:
        """Why a call is none that was settled for, or None."""
        if self.patch is not None and self.patch.wants_ahead(self.params):
            return "no forward was run ahead: that takes a known step, and no compiled code, step cache or UNet"
        if q.shape[-2] != self.queries or k.shape[-2] != self.keys:
            tokens = f"{self.length} tokens" + f", of which {self.queries} ask" * (self.queries != self.length)
            tokens += f" that ask, and {self.keys} of text" * (self.read is not None)
            return f"{q.shape[-2]} queries and {k.shape[-2]} keys where the layout has {tokens}"
        if not key_validity(mask, self.keys, self.row)[1]:
            what = f"mask of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            return f"a {what} is more than key padding"
        return None

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None, dense: Callable[..., Tensor]
    ) -> AttentionCall:
        """Return a call as the patch sees it: tokens that do not ask have zeros."""
        validity, _ = key_validity(mask, self.keys, self.row)
        scale = scale_of(q, scale)
        if any(self.unasked):
            around = (0, 0, *self.unasked)
            q, dense = pad(q, around), partial(_dense_for_all, dense, around)
        return AttentionCall(q, k, v, validity, scale, dense, error=self.error, ticket=self.ticket)

    def answer(self, call: AttentionCall) -> Tensor:
        """Return what the patch answers to `call`, for the tokens that ask."""
        patch: Any = self.patch
        return self._of_those_that_ask(patch.attend(call, self.params))

    def perturbed(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None, dense: Callable[..., Tensor]
    ) -> Tensor:
        """Return what the guide makes of an answer to a call."""
        assert self.guide is not None
        choice, params = self.guide
        patch: Any = choice.patch
        return self._of_those_that_ask(
            patch.attend(self.call(q, k, v, None, scale, partial(_known_answer, out, dense)), params)
        )

    def _of_those_that_ask(self, out: Tensor) -> Tensor:
        return out[..., self.unasked[0] : self.length - self.unasked[1], :] if any(self.unasked) else out


class _Here(threading.local):
    """What a thread's own forward has settled. (Set in every thread: Dynamo guards on what the instance holds.)"""

    def __init__(self) -> None:
        self.settled = Settled(known=False)
        self.barred: str | None = None


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
    def barred(self) -> str | None:
        """Why what enters the module could not be changed in this thread's forward."""
        return self._here.barred

    @barred.setter
    def barred(self, reason: str | None) -> None:
        self._here.barred = reason

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
        if not here.known or (
            here.patch is None and here.guide is None
        ):  # a thread of which nothing is known is traced anew
            return dense()
        if k.shape[-2] <= here.aside:
            return dense()
        enters = here.patch is not None and here.patch.enters
        if blocked is not None or here.obstacle(q, k, mask) is not None or enters:
            self.missed = True  # counted by the host, outside the graph
            return dense()
        out = dense() if here.patch is None else here.answer(here.call(q, k, v, mask, scale, dense))
        return out if here.guide is None else here.perturbed(out, q, k, v, scale, dense)

    def settle(
        self, choice: Choice, layout: Layout | None, params: Any, order: Tiles | None, exchanged: Gathered | None = None
    ) -> None:
        """Set what runs here from now on."""
        reason = choice.reason
        if choice.patch is not None and layout is None:
            where = " under context parallelism" if self.host.exchanging else ""
            reason = f"{type(self.host.root).__name__} was given tokens whose layout is not understood{where}"
        patch = choice.patch if params is not None else None
        if layout is None:
            self.settled = Settled(choice, reason, patch, params, layout, order, exchanged)
            return
        row = layout.text_before if self.host.outer_mask else None
        aside = layout.text_before if self.host.text_apart else 0
        tokens, read = (layout.visual, layout.text) if layout.crossed else (layout.length, None)
        size = tokens, layout.unasked, row, aside, read
        self.settled = Settled(choice, reason, patch, params, layout, order, exchanged, *size)


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


def key_validity(mask: Any, length: int, row: int | None) -> tuple[Tensor | None, bool]:
    """Reduce a mask to key validity, bool (B, S_k).

    Parameters
    ----------
    row : the query whose row of a (B, 1, S, S) mask is that for all whose answers are read by anybody; None: there is no such query.

    Returns
    -------
    validity : bool (B, S_k), or None where every key may be read.
    understood : whether `mask` says no more than that.
    """
    if mask is None:
        return None, True
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape[-1] != length:
        return None, False
    if mask.ndim == 2:
        return mask, True
    if mask.ndim == 4:
        one_head, one_row = (mask.shape[dim] == 1 or mask.stride(dim) == 0 for dim in (1, 2))  # or one that is expanded
        if one_head and (one_row or row is not None):
            return mask[:, 0, 0 if one_row else row], True
    return None, False


def _known_answer(out: Tensor, dense: Callable[..., Tensor], *others: Tensor | None, **more: Any) -> Tensor:
    """Dense attention whose answer is known, unless other tensors are handed in."""
    return dense(*others, **more) if any(x is not None for x in (*others, *more.values())) else out


def _dense_for_all(
    dense: Callable[..., Tensor],
    around: tuple[int, int, int, int],
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    **changed: Any,
) -> Tensor:
    """Dense attention, with zeros for the tokens that do not ask where the queries are the call's own."""
    out = dense(q, k, v, **changed)
    return pad(out, around) if q is None else out


def scale_of(q: Tensor, scale: float | None) -> float:
    """Return the factor on q.k, 1 / sqrt(D) by default."""
    return q.shape[-1] ** -0.5 if scale is None else scale
