"""Answers attention calls by the patches that were settled: counts them, has the gate time them, and tells those who trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.errors import UnsupportedError
from accelplug.hosts.forecast import Meter
from accelplug.hosts.gate import Gate
from accelplug.hosts.ledger import Event, Ledger
from accelplug.hosts.placement import Placed
from accelplug.hosts.record import Choice
from accelplug.hosts.run import Passed
from accelplug.hosts.site import Settled, SiteRecord
from accelplug.kernels.timing import timed_ms
from accelplug.recipe import RunFacts

if TYPE_CHECKING:
    from accelplug.hosts.host import Setup


class Answering:
    """What hosts have in common whose patches are settled by how tokens lie: those of denoisers, and of image encoders.

    Parameters
    ----------
    ledger : counts what ran how.
    gate : times dense against sparse.
    """

    def __init__(self, ledger: Ledger, gate: Gate) -> None:
        self.ledger, self.gate, self.meter = ledger, gate, Meter()
        self._moved: Bounded[tuple[int, torch.device], tuple[Any, Any]] = Bounded(64)
        self._held: set[int | None] = set()

    @property
    def now(self) -> Clock:
        """When this thread's forward happens, as far as that is known."""
        return Clock()

    @property
    def held(self) -> frozenset[int | None]:
        """Numbers of the rules that have held somewhere."""
        return frozenset(self._held)

    def on_device(self, params: Any, device: torch.device | None) -> Any:
        """Return a patch's params with their tensors on `device`, the same object every time."""
        if params is None or device is None or device.type == "cpu":
            return params
        # The originals are kept beside the moved ones, so that an id stays theirs.
        return self._moved.get((id(params), device), lambda: (params, params.to(device)))[1]

    def answer(
        self,
        record: SiteRecord,
        here: Settled,
        q: Tensor,
        call: AttentionCall | None,
        reason: str | None,
        dense: Callable[[], Tensor],
        entered: float | None,
    ) -> Tensor:
        """Answer one eager attention call, counting what it does.

        Parameters
        ----------
        here : what is settled for it.
        call : what its patch is asked; None where dense attention runs.
        reason : why that is, if a rule names the call.
        entered : since when we are at it, where the forward is measured.
        """
        if call is not None and here.patch is not None and here.patch.enters and record.site is not None:
            call, reason = None, record.barred or "what enters its module is not in reach"
            self.ledger.fell_back(record.site.module, reason)
        ahead = self.now.phase == "ahead"  # not what the gate is to judge
        if call is not None and not ahead and (reason := self.not_worth_it(here, call)) is not None:
            call = None
        run = dense if call is None else partial(here.answer, call)
        timed = self.ledger.timed or entered is not None
        out, ms = timed_ms(run, q.device) if timed else (run(), None)
        if call is not None and record.site is not None and (reason := self._too_wrong(here)) is not None:
            self.ledger.fell_back(record.site.module, reason)
            out, call = dense(), None
        name = here.choice.name if call is not None else "dense"
        self.ledger.count(self.ledger.served, name)
        if self.ledger.traces:
            self._note(record, here, call, name, reason, q, ms if self.ledger.timed else None)
        if entered is not None and record.site is not None:
            dense_ms = ms if call is None else self._judged_dense_ms(here, call.q)
            self.meter.call(record.site.module, q, dense_ms, entered)
        return out

    def not_worth_it(self, here: Settled, call: AttentionCall) -> str | None:
        """Why a call is left dense that a patch could answer, or None; the gate times it where it is new."""
        patch, params = here.patch, here.params
        if patch is None or not patch.speed or self.gate.mode == "off":
            return None
        if self.gate.may_time(call.q.device):
            patch.choose_backend(call, params)
        verdict = self.gate.verdict(here.choice.name, patch, call.q, call.dense, lambda: here.answer(call))
        return verdict.reason if verdict is not None and not verdict.pays and self.gate.mode == "auto" else None

    def _too_wrong(self, here: Settled) -> str | None:
        """Why the answer of a patch is not good enough, by its own estimate, or None."""
        estimates = self.ledger.estimates
        return estimates.reason if here.error is not None and estimates.is_above(here.error) else None

    def _judged_dense_ms(self, here: Settled, q: Tensor) -> float | None:
        """What dense attention takes where a patch answered, if the gate has timed it."""
        if here.patch is None:
            return None
        verdict = self.gate.known(here.choice.name, here.patch, tuple(q.shape), q.dtype, q.device)
        return None if verdict is None else verdict.dense_ms

    def _note(
        self,
        record: SiteRecord,
        here: Settled,
        call: AttentionCall | None,
        name: str,
        reason: str | None,
        q: Tensor,
        ms: float | None,
    ) -> None:
        density: float | None = 1.0
        plan = None
        if call is not None and here.patch is not None:
            density, plan = here.patch.inspect(call, here.params)
        # Plans of a whole run would fill the memory of a large model: those of the last step are kept.
        last = self.now.step is None or self.now.step + 1 == self.now.steps
        kept = plan if self.ledger.keeps_plans and last else None
        if record.site is not None:
            said = None if here.error is None else float(here.error)
            error = None if said is None or math.isnan(said) else said
            self.ledger.note(Event(record.site, self.now, name, reason, density, q.shape[-2], ms, kept, error))


@dataclass(eq=False)
class OneForward:
    """What one forward has settled.

    Attributes
    ----------
    states : what patches keep, by attention module; "" has what all share.
    settled : what runs, by attention module and layout.
    """

    states: dict[str, dict[str, Any]] = field(default_factory=dict, kw_only=True)
    settled: dict[tuple[str, Layout], Settled] = field(default_factory=dict, kw_only=True)


class AnsweringByForward(Answering):
    """What hosts have in common of whose models every forward is a run: image encoders, and geometry transformers.

    Parameters
    ----------
    root : the module that is entered.
    setup : what the plug hands in.
    """

    records: Sequence[Any]
    outer_mask = text_apart = exchanging = False

    def __init__(self, root: Any, setup: Setup) -> None:
        super().__init__(setup.ledger, setup.gate)
        self.root, self.decide, self.check_rules = root, setup.decide, setup.check_rules
        self.passed = Passed()

    def settled_in(
        self, forward: OneForward | None, site: Site, layout: Layout | None, device: torch.device | None
    ) -> Settled:
        """Ask the recipe and its patch what runs at a module for tokens that lie so; once a forward."""
        if forward is None or layout is None:
            return Settled(self.decide(site, layout, self.now))
        key = site.module, layout
        if key not in forward.settled:
            choice = self.decide(site, layout, self.now)
            self._held.add(choice.rule)
            forward.settled[key] = self._prepared(choice, site, layout, device, forward.states)
        return forward.settled[key]

    def _prepared(
        self, choice: Choice, site: Site, layout: Layout, device: torch.device | None, states: dict[str, dict[str, Any]]
    ) -> Settled:
        if choice.patch is None:
            return Settled(choice, choice.reason, layout=layout, length=layout.length)
        state = states.setdefault(site.module, {"shared": states.setdefault("", {})})
        params = choice.patch.prepare(site, layout, self.now, state)
        if params is None or isinstance(params, str):
            return Settled(choice, params, layout=layout, length=layout.length)
        error = None
        if choice.patch.estimates and device is not None:
            error, _ = self.ledger.estimates.ask(site, self.now, choice.name, device, state, torch.compiler.is_compiling())
        params = self.on_device(params, device)
        return Settled(choice, None, choice.patch, params, layout, length=layout.length, error=error)

    def left_dense(self, site: Site, reason: str | None) -> Settled:
        """What is settled where nothing but dense attention can run. Where a rule names the call, why is counted."""
        choice = self.decide(site, None, self.now)
        return Settled(choice, reason if choice.chosen else None)

    def placed(self) -> list[Placed]:
        """What runs where, in this thread's forward or the latest one."""
        return [record.placed(record.site) for record in self.records]

    @property
    def seen(self) -> RunFacts:
        """What forwards came by so far, for rules to be held against."""
        layouts = {record.latest.layout for record in self.records if record.latest.layout is not None}
        return RunFacts(None, frozenset(self.passed.branches), frozenset(layouts))


def asks_for_gradients(root: Any, *tensors: Tensor) -> str | None:
    """Why no patch can answer where gradients are asked for, or None.

    Raises
    ------
    UnsupportedError
        If it is for training.
    """
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return None
    if root.training:
        raise UnsupportedError(
            f"{type(root).__name__} is in training mode and gradients are asked for, but accelplug is for inference. Call .eval() and run "
            "under torch.no_grad(), or remove the plug to train."
        )
    return "gradients are asked for; run under torch.no_grad()"
