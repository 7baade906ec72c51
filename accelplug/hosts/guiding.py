"""A forward beside those of a pipeline, with heads perturbed, and what predictions gain by going away from it.

Behind the conditional forward of a step the denoiser is called once more, on what it was given, and ``scale * (e - e')`` is added to
what it predicted. The same is added to the other predictions of the step: every guidance is a sum of predictions whose weights sum to
one, so that the pipeline's own guidance, or its guider, has the differences that it would have had, and its result gains just that.
(CFG-Zero fits a factor between predictions, and adaptive projected guidance an axis: these are fitted to the shifted ones.)

Which prediction is conditional: that of the context or guider branch ``cond``; the half of a batch whose halves are the same latents that a
family says; without either the first forward of a step. Of a bare denoiser without contexts every forward is.

Until the first perturbed block both forwards are the same, so that the further one begins there where it can (`hosts.opening`). It has a
guidance branch of its own, ``perturbed``: patches and step caches keep for it what they keep by branch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from accelplug import compat
from accelplug.call import Clock, Layout, Site
from accelplug.errors import RecipeError, UnsupportedError
from accelplug.hosts.ledger import Event, Ledger
from accelplug.hosts.opening import Opening
from accelplug.hosts.placement import Placed
from accelplug.hosts.record import Choice, Decide, given
from accelplug.hosts.site import SiteRecord
from accelplug.patches.perturbation import Perturbation

if TYPE_CHECKING:
    import inspect

    from accelplug.families.base import Family
    from accelplug.hosts.clock import StepClock
    from accelplug.hosts.hoist import Hoist
    from accelplug.hosts.run import Run

PERTURBED = "perturbed"
"""Guidance branch of the further forward."""
BOTH_BRANCHES = "cond_uncond"
"""Cache context of pipelines that have both branches in one batch, where there are two."""
CONDITIONAL = ("cond", "pred_cond", BOTH_BRANCHES)
"""Names of the branch that is asked for: of contexts, and of guiders."""
ONCE_A_BATCH = frozenset(
    {
        *("txt_ids", "image_cond_ids", "image_rotary_emb", "rotary_embedding", "visual_rope_pos", "text_rope_pos"),
        *("position_ids", "token_tags", "timestep_indices", "video_indices", "audio_indices", "text_indices"),
    }
)
"""Arguments of denoisers that a batch has once."""

Guide = tuple[Choice, Any]
"""What perturbs a module's calls, and its params."""


class GuidedHost(Protocol):
    """A denoiser's host, as far as it is asked here."""

    name: str
    denoiser: Any
    signature: inspect.Signature
    clock: StepClock
    hoist: Hoist
    records: list[SiteRecord]
    ledger: Ledger

    @property
    def now(self) -> Clock:
        """When this thread's forward happens."""

    @property
    def run(self) -> Run:
        """This thread's."""

    @property
    def comes_first(self) -> bool:
        """Whether no other forward of this thread's run was at this step before."""

    def latents(self, inputs: Mapping[str, Any]) -> Any:
        """Return the latents among a forward's inputs: a tensor, or a list of one for each sample."""

    def hold(self, rule: int | None) -> None:
        """Take note that a rule of the recipe has held."""

    def parameters_of(self, choice: Choice, site: Site, layout: Layout) -> Any:
        """Ask a patch what it needs at a site."""


class _Within(threading.local):
    """What perturbs the calls of the forward that this thread is in, and which module runs it; None in those of the pipeline."""

    def __init__(self) -> None:
        self.guides: dict[SiteRecord, Guide] | None = None
        self.stand_in: nn.Module | None = None


class Guiding:
    """Makes further forwards of one denoiser.

    Parameters
    ----------
    host : of the denoiser.
    decide : what perturbs a call.
    family : of the denoiser.
    """

    def __init__(self, host: GuidedHost, decide: Decide, family: Family) -> None:
        self.host, self.decide, self.conditional = host, decide, family.conditional
        self.opening = Opening(host.denoiser, family.chain)
        self._here = _Within()
        self._latest: dict[SiteRecord, Guide] = {}
        self._forwards, self._rows, self._further, self._further_rows = 0, 0, 0, 0.0
        self._passed = 0

    @property
    def stand_in(self) -> nn.Module | None:
        """What runs the further forward that this thread is in, where that is not the denoiser."""
        return self._here.stand_in

    def at(self, record: SiteRecord) -> Guide | None:
        """Return what perturbs the calls of a module in this thread's forward."""
        return None if self._here.guides is None else self._here.guides.get(record)

    def _is_pipelines(self, module: nn.Module) -> bool:
        """Whether a forward is one that the pipeline has asked for."""
        ours = self._here.guides is not None or self.host.now.phase == "ahead"
        return not torch.compiler.is_compiling() and module is self.host.denoiser and not ours

    @property
    def _is_conditional(self) -> bool:
        """Whether a forward of the pipeline is the conditional one, or has it in its batch."""
        now = self.host.now
        return now.branch in CONDITIONAL if now.branch is not None else self.host.comes_first or now.step is None

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Have kept of a forward what a further one can begin with."""
        if self._is_pipelines(module) and self._is_conditional and self.opening.lists and not self.host.hoist.stands:
            self.opening.begin(_modules(record for record, _, params in self._chosen() if params is not None))

    def leave_forward(self) -> None:
        """Forget what a forward had kept that was cut off."""
        self.opening.end()
        self.opening.forget()

    def after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Return what a forward predicts, led away from what it predicts with heads perturbed; None to leave it as it is."""
        if not self._is_pipelines(module):
            return None
        try:
            self.opening.end()
            return self._guided(given(self.host.signature, args, kwargs), output)
        finally:
            self.opening.forget()

    def _guided(self, inputs: Mapping[str, Any], output: Any) -> Any:
        host = self.host
        latents = host.latents(inputs)
        if latents is None:
            return None
        step, branch, rows = host.now.step, host.now.branch, len(latents)
        self._forwards, self._rows = self._forwards + 1, self._rows + rows
        if not self._is_conditional:
            known = host.run.shift
            return None if known is None or known[0] != step else _with_prediction(output, partial(_added, known[1]))
        host.run.shift = None
        if not (guides := self._guides()):
            return None
        self._require_no_other(guides)
        branches = self._branches_in(latents, _prediction(output), branch)
        if (why := self._why_not(branches)) is not None:
            self._fell_back(guides, why)
            return None
        part = slice(None)
        if branches == 2:
            part = slice(0, rows // 2) if self.conditional == "first" else slice(rows // 2, None)
        asked = _some_rows(inputs, part, rows, isinstance(latents, list)) if branches == 2 else inputs
        scale, again = _scale_of(guides), slice(None) if asked is None else part
        worse = self._perturbed(inputs if asked is None else asked, guides, again, rows)
        worse = worse[part] if asked is None else worse
        shift = _map(lambda e, e_worse: scale * (e - e_worse), _prediction(output)[part], worse)
        host.run.shift = step, shift
        return _with_prediction(output, partial(_added, _twice(shift) if branches == 2 else shift))

    def _branches_in(self, latents: Any, predicted: Any, branch: str | None) -> int:
        """How many guidance branches a batch holds."""
        if branch != BOTH_BRANCHES and (branch is not None or self.conditional == "apart"):
            return 1
        return next((parts for parts in (2, 3) if _are_the_same(latents, predicted, parts)), 1)

    def _why_not(self, branches: int) -> str | None:
        """Why it is not known which predictions of a forward are conditional, or None; `branches`: how many it holds."""
        if branches == 3:
            return "three parts of a batch are the same latents, and which of them is conditional is not known"
        if branches == 2 and self.host.clock.guides is False:
            return (
                "both halves of a batch are the same latents, and its pipeline says that it has no classifier-free guidance"
            )
        if not self.host.comes_first and self.host.now.step is not None:
            return "another guidance branch of its step came before the conditional one"
        return None

    def _chosen(self) -> Iterator[tuple[SiteRecord, Choice, Any]]:
        """Yield what the rules have for each module at this step, and the params, None where it is not perturbed."""
        for record in self.host.records:
            if record.site is None or record.site.kind == "cross":
                continue
            layout = record.settled.layout
            choice = self.decide(record.site, layout, self.host.now)
            yield record, choice, None if layout is None else self.host.parameters_of(choice, record.site, layout)

    def _guides(self) -> dict[SiteRecord, Guide]:
        """What perturbs each module's calls at this step, where anything does; what a rule names and cannot have is counted."""
        found: dict[SiteRecord, Guide] = {}
        for record, choice, params in self._chosen():
            self.host.hold(choice.rule)
            reason = choice.reason
            if params is not None:
                found[record] = choice, params
            elif choice.patch is not None and record.settled.layout is None:
                reason = "its layout is not understood, so its heads are not perturbed"
            if reason is not None:
                self._fell_back([record], reason)
        self._latest = found
        return found

    def _perturbed(self, inputs: Mapping[str, Any], guides: dict[SiteRecord, Guide], part: slice, rows: int) -> Any:
        """What the denoiser predicts with heads perturbed. `inputs`: of some rows, `part`, of as many as the pipeline's forward had."""
        here, host = self._here, self.host
        try:
            runs, passed = self.opening.stand_in(_modules(guides), lambda output: _rows_of(output, part, rows, False))
        except _UnclearError:
            runs, passed = host.denoiser, 0
        here.guides, here.stand_in = guides, runs
        try:
            with compat.diffusers.in_context(host.denoiser, PERTURBED, host.clock.context):
                worse = _prediction(runs(**inputs))
        finally:
            here.guides = here.stand_in = None
        blocks = len(self.opening.blocks) or 1
        self._further, self._passed = self._further + 1, passed
        self._further_rows += len(worse) * (1 - passed / blocks)
        return worse

    def _require_no_other(self, guides: Mapping[SiteRecord, Guide]) -> None:
        if self.host.clock.perturbs:
            raise UnsupportedError(
                f"{_name_of(guides)} makes a perturbed forward of its own, and the pipeline makes one too: expected pag_scale=0. "
                "Set it, or remove the plug."
            )

    def _fell_back(self, records: Iterable[SiteRecord], reason: str) -> None:
        for record in records:
            if record.site is not None:
                self.host.ledger.fell_back(record.site.module, reason)

    # ------------------------------------------------------------------------------------------------- inside of it

    def answer(
        self,
        record: SiteRecord,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        dense: Callable[..., Tensor],
    ) -> Tensor:
        """Return the answer to a call of a perturbed module, `out` being that of its attention."""
        here, ledger = record.settled, self.host.ledger
        if here.guide is None or record.site is None:
            return out
        choice, _ = here.guide
        if (why := here.obstacle(q, k, None)) is not None or (
            here.layout is not None and here.layout.queries != q.shape[-2]
        ):
            ledger.fell_back(record.site.module, why or "other tokens enter its attention than its layout has")
            return out
        ledger.count(ledger.served, choice.name)
        if ledger.traces:
            ledger.note(Event(record.site, self.host.now, choice.name, None, None, q.shape[-2]))
        return here.perturbed(out, q, k, v, scale, dense)

    # ------------------------------------------------------------------------------------------------------ reports

    def placed(self) -> Iterator[Placed]:
        """Yield what perturbs which modules in the latest step in which there was a further forward."""
        for record, (choice, params) in self._latest.items():
            yield Placed(record.site, choice.name, choice.patch, params, record.latest.layout)

    def report(self) -> str | None:
        """Say what it costs; None before the first forward."""
        name = self.host.name
        if not self._forwards:
            return None
        if not self._further:
            return f"no further forward of {name} in {self._forwards}"
        more, blocks = 1 + self._further_rows / self._rows, len(self.opening.blocks)
        begun = f", the last from block {self._passed} of {blocks} on" if self._passed else ""
        return (
            f"{_name_of(self._latest)}: {self._further} further forwards of {name} beside {self._forwards}{begun}; {more:.2f}x as much to "
            "predict"
        )


def _modules(records: Iterable[SiteRecord]) -> list[str]:
    return [record.site.module for record in records if record.site is not None]


def _name_of(guides: Mapping[SiteRecord, Guide]) -> str:
    return ", ".join(dict.fromkeys(choice.name for choice, _ in guides.values())) or "guidance"


def _scale_of(guides: Mapping[SiteRecord, Guide]) -> float:
    scales = {choice.patch.scale for choice, _ in guides.values() if isinstance(choice.patch, Perturbation)}
    if len(scales) != 1:
        raise RecipeError(
            f"Rules of guidance that hold at once must have one scale, got {', '.join(map(str, sorted(scales)))}: what is perturbed "
            "is one forward. Give them the same."
        )
    return scales.pop()


# ------------------------------------------------------------------------------------------------------ rows and predictions


def _are_the_same(latents: Any, predicted: Any, parts: int) -> bool:
    """Whether all parts of a batch are the same latents, as where it holds as many branches of guidance.

    What is in the latents beside those that are predicted, a picture in further channels, may differ by branch.
    """
    if len(latents) % parts:
        return False
    if isinstance(latents, Tensor) and isinstance(predicted, Tensor) and latents.ndim == predicted.ndim:
        latents = latents[tuple(slice(size) for size in predicted.shape)]
    size = len(latents) // parts
    return all(torch.equal(one, other) for one, other in zip(latents[:-size], latents[size:], strict=True))


def _some_rows(inputs: Mapping[str, Any], part: slice, rows: int, listed: bool) -> dict[str, Any] | None:
    """Return a forward's inputs for some rows of its batch; None where it is not clear which inputs have a row each.

    `listed`: whether samples are items of lists.
    """
    try:
        return {
            name: value if name in ONCE_A_BATCH else _rows_of(value, part, rows, listed) for name, value in inputs.items()
        }
    except _UnclearError:
        return None


class _UnclearError(Exception):
    """A tensor has neither a row for each sample nor one for all."""


def _rows_of(value: Any, part: slice, rows: int, listed: bool) -> Any:
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] == 1:
            return value
        if value.shape[0] != rows:
            raise _UnclearError
        return value[part]
    if isinstance(value, Mapping):
        return {key: _rows_of(item, part, rows, listed) for key, item in value.items()}
    if isinstance(value, list) and listed and len(value) == rows:
        return value[part]
    if isinstance(value, list | tuple):
        return type(value)(_rows_of(item, part, rows, listed) for item in value)
    return value


def _prediction(output: Any) -> Any:
    """What a denoiser predicts: a tensor, or a list of one for each sample."""
    return output if isinstance(output, Tensor) else output[0]


def _with_prediction(output: Any, change: Callable[[Any], Any]) -> Any:
    """Return what a denoiser returned with another prediction."""
    new = change(_prediction(output))
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        return type(output)(**{**output, next(iter(output)): new})
    return type(output)((new, *output[1:]))


def _map(function: Callable[..., Tensor], *values: Any) -> Any:
    """Apply a function to tensors, or to those of lists one by one."""
    if isinstance(values[0], Tensor):
        return function(*values)
    return [function(*items) for items in zip(*values, strict=True)]


def _added(shift: Any, good: Any) -> Any:
    return _map(lambda e, more: e + more, good, shift)


def _twice(shift: Any) -> Any:
    return torch.cat([shift, shift]) if isinstance(shift, Tensor) else [*shift, *shift]
