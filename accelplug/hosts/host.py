"""What a host must have, which hosts there are, and what can be done with whose models.

A host is one file that gets into a library's models, and one line in `HOSTS`. It knows that library and no method's name; `Plug`
knows neither. A `Plug` has one host for each part of its model that it is on: a pipeline's denoisers, a language model's decoder and
its vision tower.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from accelplug.call import Clock, Site
from accelplug.errors import AlreadyAppliedError, NoMatchError, UnsupportedError
from accelplug.hosts.gate import Gate, Verdict
from accelplug.hosts.ledger import Ledger
from accelplug.hosts.models import model_in
from accelplug.hosts.placement import Placed
from accelplug.hosts.record import LEFT_DENSE, Choice, Decide
from accelplug.hosts.undo import Undo
from accelplug.recipe import ModelFacts, RunFacts

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.hosts.forecast import Forecast
    from accelplug.recipe import Positions, StepCache

HOSTS = (
    "accelplug.hosts.encoders:EncoderHost",  # first: models of transformers that are given pictures have a decoder too, by their word
    "accelplug.hosts.transformers:LanguageHost",
    "accelplug.hosts.geometry:GeometryHost",
    "accelplug.hosts.diffusers:DenoiserHost",  # last: it takes any other module for a denoiser, and says which ones it knows
)
"""Where hosts are, in the order in which they are asked for a model. A new host is a line here."""

PLUGGED = "_accelplug_on"
"""Attribute of a model and of its parts that a recipe is on: the `Plug`."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What a plug hands to its hosts; by default nothing is patched.

    Attributes
    ----------
    recipe : its name, for messages.
    decide : (site, layout or None, clock) -> what the recipe says.
    guide : (site, layout or None, clock) -> what perturbs a call in a forward to be guided by; None where no rule is about one.
    around : its patches that stand around ``generate``, the first one outermost.
    cache : its step cache.
    positions : how it tells frames apart.
    ledger : counts what ran how.
    gate : times dense against sparse.
    processor : a vision-language model's.
    check_rules : called behind every forward of a run, and at its end, with whether it is that.
    enters : whether any of its patches is given what enters attention modules.
    touches : whether a patch may answer at a site.
    families : of its patches.
    """

    recipe: str = "accelplug"
    decide: Decide = lambda site, layout, clock: LEFT_DENSE
    guide: Decide | None = None
    around: tuple[Choice, ...] = ()
    cache: StepCache | None = None
    ledger: Ledger = field(default_factory=Ledger)
    gate: Gate = field(default_factory=partial(Gate, "off"))
    processor: Any = None
    check_rules: Callable[[bool], None] = lambda ended: None
    enters: bool = False
    touches: Callable[[Site], bool] = lambda site: False
    families: frozenset[str] = frozenset()
    positions: Positions | None = None


class Host(Protocol):
    """One part of a model with its attention in our hands. The methods with a body are for hosts that have something to say.

    Attributes
    ----------
    library : that the models are of, for the versions that were tested.
    called : what such a model is, in words: a denoiser, a language model.
    expects : models that are taken, in words for messages.
    gives : what a run of such a model gives, by which it is compared, tuned and inspected: pictures, answers, features, geometry.
    serves : families of patches that can answer.
    abilities : what can be done with the models beside `apply` and `remove` -> with which of them, in words for messages: compare,
        tune, calibrate, inspect; mark (images in a prompt), cache (a step cache), positions (of frames), step (rules of diffusion
        steps, guidance branches and the token grid).
    name : of the part: ``transformer``, ``decoder``, ``vision``.
    root : the module that is entered.
    records : what stands at its attention modules: each has a ``module``, and a ``site`` or None where rules cannot name it.
    skipped : attention modules that cannot be entered, and why.
    barred : those among them that rules could name.
    """

    library: ClassVar[str]
    called: ClassVar[str]
    expects: ClassVar[str]
    gives: ClassVar[str]
    serves: ClassVar[frozenset[str]]
    abilities: ClassVar[Mapping[str, str]]

    name: str
    root: Any
    records: Sequence[Any]
    skipped: dict[str, str]
    barred: Sequence[Site] = ()

    @classmethod
    def knows(cls, model: Any) -> bool:
        """Whether the model, taken out of its wrappers, is one for this host."""

    @classmethod
    def parts(cls, model: Any) -> dict[str, Any]:
        """Return the modules of a model that a recipe goes on, by name."""

    @classmethod
    def require_known(cls, parts: Mapping[str, Any]) -> None:
        """Refuse parts of which it is not known where they attend, ahead of any recipe, by `UnsupportedError`. By default all are."""
        return

    @classmethod
    def facts(cls, model: Any) -> ModelFacts:
        """Return what recipes match a model by."""

    @classmethod
    def of(cls, model: Any, parts: Mapping[str, Any], setup: Setup) -> Sequence[Host]:
        """Make the hosts of a model's parts. Nothing of the model is changed."""

    @classmethod
    def abilities_of(cls, model: Any) -> frozenset[str]:
        """Return what can be done with this very model."""
        return frozenset(cls.abilities)

    @classmethod
    def names(cls, model: Any) -> tuple[str, ...]:
        """Return names that rules may call parts by which this model does not have, others of its kind do."""
        return ()

    def install(self, undo: Undo) -> None:
        """Get in. How to get out again is written into `undo` ahead of every change."""

    def collect(self) -> None:
        """Count what could not be counted when it happened: compiled calls that ran dense."""

    def unrouted(self) -> list[str]:
        """Modules that a rule names, whose attention never came by."""

    def placed(self) -> list[Placed]:
        """What runs where, in this thread's forward or the latest one."""

    def reset(self) -> None:
        """End this thread's run: what was kept for its steps is forgotten."""
        return

    def compiled(self) -> list[str]:
        """What ran in compiled code, where calls are not counted."""
        return []

    def reach(self) -> str | None:
        """Say how much of a prompt's time rules can touch; None where no rule says how one is read."""
        return None

    def forecasts(self) -> list[Forecast]:
        """What the gate's timings predict end to end."""
        return []

    def cached(self) -> str | None:
        """Say what a step cache came to that may be left out or rest; None of one that always is at work."""
        return None

    def guided(self) -> str | None:
        """Say what guidance cost; None where no rule is about it."""
        return None

    def share_of(self, verdict: Verdict) -> float | None:
        """Share in a forward of the calls that a verdict is about; None where none was measured."""
        return None

    @property
    def now(self) -> Clock:
        """When this thread's forward happens, as far as that is known."""
        return Clock()

    @property
    def seen(self) -> RunFacts | None:
        """What forwards came by, for rules to be held against; None where rules do not wait for a run."""
        return None

    @property
    def held(self) -> frozenset[int | None]:
        """Numbers of the rules that have held somewhere; None for no rule."""
        return frozenset()

    def step(self, index: int | None, steps: int | None) -> None:
        """Take the step that comes in this thread from the user; see `Plug.step`. Refused by hosts without steps."""
        raise refusal("step", type(self), self.root)

    def mark(self, image: Tensor | None) -> None:
        """Take from the user where images are; see `Plug.mark`. Refused by hosts without prompts."""
        raise refusal("mark", type(self), self.root)


def hosts() -> Iterator[type[Host]]:
    """Yield all hosts there are, in the order in which they are asked."""
    for place in HOSTS:
        yield pkgutil.resolve_name(place)


def host_of(model: Any) -> type[Host]:
    """Return the host for a model.

    Raises
    ------
    NoMatchError
        If there is none.
    """
    inside = model_in(model)
    known = list(hosts())
    for host in known:
        if host.knows(inside):
            return host
    raise NoMatchError(
        f"{type(model).__name__} is neither {' nor '.join(host.called for host in reversed(known))}: expected "
        f"{'; or '.join(host.expects for host in reversed(known))}."
    )


def require_ability(model: Any, what: str) -> type[Host]:
    """Return the host for a model of which `what` can be asked: compare, tune, calibrate, inspect.

    Raises
    ------
    NoMatchError
        If there is no host for it.
    UnsupportedError
        If it cannot be done with this model, or it is not known where a part of it attends; `inspect` says that by itself.
    """
    host, inside = host_of(model), model_in(model)
    if what not in host.abilities_of(inside):
        raise refusal(what, host, inside)
    if what != "inspect":
        host.require_known(host.parts(inside))
    return host


def refusal(what: str, host: type[Host], model: Any) -> UnsupportedError:
    """Return the one refusal of what cannot be done with a model of a host."""
    expected = dict.fromkeys(other.abilities[what] for other in hosts() if what in other.abilities)
    able = ", ".join(["apply", "remove", *sorted(host.abilities_of(model))])
    return UnsupportedError(
        f"{what}: expected {' or '.join(expected)}, got {type(model).__name__}, {host.called}. Pass such a model; this one takes "
        f"{able}."
    )


def model_facts(model: Any) -> ModelFacts:
    """Return what recipes match a model by: class names, its config (of its first denoiser), components of the pipeline."""
    return host_of(model).facts(model_in(model))


class _On(Protocol):
    """A plug, as far as it is asked what is on a model."""

    recipe: Any

    def remove(self) -> None: ...


def plug_of(place: Any) -> _On | None:
    """Return the `Plug` that is on a model, on a denoiser, or on the base model of a language model, or None."""
    return getattr(place, "__dict__", {}).get(PLUGGED)


def require_free(model: Any, parts: Mapping[str, Any]) -> None:
    """Refuse a model if a recipe is on it or on one of its parts.

    Raises
    ------
    AlreadyAppliedError
        Naming the recipe.
    """
    for name, place in {**parts, type(model).__name__: model}.items():
        if (on := plug_of(place)) is not None:
            raise AlreadyAppliedError(
                f"{on.recipe.name} is on this model's {name} already. Remove it first: accelplug.remove(model) or plug.remove()."
            )
