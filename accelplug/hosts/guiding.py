"""A forward beside those of a pipeline, with heads perturbed, and what predictions gain by going away from it.

Behind the conditional forward of a step the denoiser is called once more, on what it was given, and ``scale * (e - e')`` is added to
what it predicted. The same is added to the other predictions of the step: every guidance is a sum of predictions whose weights sum to
one, so that the pipeline's own guidance, or its guider, has the differences that it would have had, and its result gains just that.
(CFG-Zero fits a factor between predictions, and adaptive projected guidance an axis: these are fitted to the shifted ones.)

Which prediction is conditional: that of the context or guider branch ``cond``; the second half of a batch whose halves are the same latents
(the first half where a family says so); without either the first forward of a step. Of a bare denoiser without contexts every forward is.
The further forward has a guidance branch of its own, ``perturbed``: patches and step caches keep for it what they keep by branch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from accelplug import compat
from accelplug.call import Clock, Layout, Site
from accelplug.errors import RecipeError, UnsupportedError
from accelplug.hosts.ledger import Event, Ledger
from accelplug.hosts.placement import Placed
from accelplug.hosts.record import Choice, Decide, given
from accelplug.hosts.site import SiteRecord
from accelplug.patches.perturbation import Perturbation

if TYPE_CHECKING:
    import inspect

    from accelplug.hosts.clock import StepClock
    from accelplug.hosts.run import Run

PERTURBED = "perturbed"
"""Guidance branch of the further forward."""
CONDITIONAL = ("cond", "pred_cond")
"""Names of the branch that is asked for: of contexts, and of guiders."""
BOTH_BRANCHES = "cond_uncond"
"""Cache context of a batch that holds both branches."""
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

    denoiser: Any
    signature: inspect.Signature
    clock: StepClock
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
    """What perturbs the calls of the forward that this thread is in; None in those of the pipeline."""

    def __init__(self) -> None:
        self.guides: dict[SiteRecord, Guide] | None = None


class Guiding:
    """Makes further forwards of one denoiser.

    Parameters
    ----------
    host : of the denoiser.
    decide : what perturbs a call.
    conditional_first : whether the first half of a batch that holds both branches is the conditional one.
    """

    def __init__(self, host: GuidedHost, decide: Decide, conditional_first: bool) -> None:
        self.host, self.decide, self.conditional_first = host, decide, conditional_first
        self._here = _Within()
        self._latest: dict[SiteRecord, Guide] = {}
        self._forwards, self._rows, self._further, self._further_rows = 0, 0, 0, 0

    def at(self, record: SiteRecord) -> Guide | None:
        """Return what perturbs the calls of a module in this thread's forward."""
        return None if self._here.guides is None else self._here.guides.get(record)

    def after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Return what a forward predicts, led away from what it predicts with heads perturbed; None to leave it as it is."""
        host = self.host
        if torch.compiler.is_compiling() or module is not host.denoiser or self._here.guides is not None:
            return None
        inputs = given(host.signature, args, kwargs)
        latents = host.latents(inputs)
        if latents is None:
            return None
        step, branch, rows = host.now.step, host.now.branch, len(latents)
        self._forwards, self._rows = self._forwards + 1, self._rows + rows
        halves = branch == BOTH_BRANCHES or (branch is None and _are_twice_the_same(latents))
        unnamed = branch is None and (host.comes_first or step is None)
        if not (halves or unnamed or branch in CONDITIONAL):
            known = host.run.shift
            return (
                None if known is None or known[0] != step else _with_prediction(output, lambda good: _added(good, known[1]))
            )
        host.run.shift = None
        if not (guides := self._guides()):
            return None
        if not host.comes_first and step is not None:
            self._fell_back(guides, "another guidance branch of its step came before the conditional one")
            return None
        self._require_no_other(guides)
        part = slice(None)
        if halves:
            part = slice(0, rows // 2) if self.conditional_first else slice(rows // 2, None)
        asked = _some_rows(inputs, part, rows, isinstance(latents, list)) if halves else inputs
        worse = self._perturbed(inputs if asked is None else asked, guides)
        worse = worse[part] if asked is None else worse
        self._further, self._further_rows = self._further + 1, self._further_rows + (rows if asked is None else len(worse))
        scale = _scale_of(guides)
        shift = _map(lambda e, e_worse: scale * (e - e_worse), _prediction(output)[part], worse)
        host.run.shift = step, shift
        return _with_prediction(output, lambda good: _added(good, _twice(shift) if halves else shift))

    def _guides(self) -> dict[SiteRecord, Guide]:
        """What perturbs each module's calls at this step, where anything does."""
        found: dict[SiteRecord, Guide] = {}
        for record in self.host.records:
            if record.site is None or record.site.kind == "cross":
                continue
            layout = record.settled.layout
            choice = self.decide(record.site, layout, self.host.now)
            self.host.hold(choice.rule)
            if choice.patch is None:
                if choice.reason is not None:
                    self.host.ledger.fell_back(record.site.module, choice.reason)
            elif layout is None:
                self.host.ledger.fell_back(
                    record.site.module, "its layout is not understood, so its heads are not perturbed"
                )
            elif (params := self.host.parameters_of(choice, record.site, layout)) is not None:
                found[record] = choice, params
        self._latest = found
        return found

    def _perturbed(self, inputs: Mapping[str, Any], guides: dict[SiteRecord, Guide]) -> Any:
        """What the denoiser predicts with heads perturbed."""
        host = self.host
        self._here.guides = guides
        try:
            with compat.diffusers.in_context(host.denoiser, PERTURBED, host.clock.context):
                return _prediction(host.denoiser(**inputs))
        finally:
            self._here.guides = None

    def _require_no_other(self, guides: Mapping[SiteRecord, Guide]) -> None:
        if self.host.clock.perturbs:
            raise UnsupportedError(
                f"{_name_of(guides)} makes a perturbed forward of its own, and the pipeline makes one too: expected pag_scale=0. "
                "Set it, or remove the plug."
            )

    def _fell_back(self, guides: Mapping[SiteRecord, Guide], reason: str) -> None:
        for record in guides:
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
        if not self._forwards:
            return None
        if not self._further:
            return f"no further forward in {self._forwards}"
        more = 1 + self._further_rows / self._rows
        return f"{_name_of(self._latest)}: {self._further} further forwards beside {self._forwards}, {more:.2f}x as many rows to predict"


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


def _are_twice_the_same(latents: Any) -> bool:
    """Whether the second half of a batch is the first again, as where it holds both branches of classifier-free guidance."""
    if len(latents) % 2:
        return False
    half = len(latents) // 2
    return all(torch.equal(one, other) for one, other in zip(latents[:half], latents[half:], strict=True))


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


def _added(good: Any, shift: Any) -> Any:
    return _map(lambda e, more: e + more, good, shift)


def _twice(shift: Any) -> Any:
    return torch.cat([shift, shift]) if isinstance(shift, Tensor) else [*shift, *shift]
