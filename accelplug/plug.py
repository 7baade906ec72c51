"""apply(): a recipe and a loaded model give a `Plug`, the handle that undoes it.

``plug.where()`` says what runs where, ``plug.report()`` what ran how since `apply`, ``plug.trace()`` collects every call.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import torch

from accelplug import compat
from accelplug.call import Site
from accelplug.errors import (
    AccelplugError,
    NoMatchError,
    UnsupportedError,
    nearest,
)
from accelplug.hosts import fit
from accelplug.hosts.chooser import Chooser
from accelplug.hosts.estimates import Estimate, Estimates
from accelplug.hosts.forecast import Forecast, amdahl
from accelplug.hosts.gate import Gate, Verdict
from accelplug.hosts.host import PLUGGED, Host, Setup, host_of, plug_of, require_free
from accelplug.hosts.ledger import Event, Ledger
from accelplug.hosts.models import model_in, unwrapped
from accelplug.hosts.placement import Placement
from accelplug.hosts.report import Report
from accelplug.hosts.undo import Undo
from accelplug.kernels.attention import Backend
from accelplug.recipe import Recipe, load
from accelplug.show import as_html

if TYPE_CHECKING:
    from rich.console import Group
    from torch import Tensor

    from accelplug.patches.base import Patch

logger = logging.getLogger("accelplug")

_LOCK = threading.RLock()
"""Held while a recipe goes on or off."""


def apply(
    model: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe | Patch | None = None,
    *,
    strict: bool = False,
    gate: str = "auto",
    backend: str = "auto",
    deterministic: bool = False,
    choices: Mapping[str, Any] | None = None,
    processor: Any = None,
    max_error: float | None = None,
) -> Plug:
    """Swap the attention of a loaded model as a recipe says.

    Parameters
    ----------
    model : a pipeline (classic or modular) that denoises, or a bare denoiser; a language or vision-language model or an image
        encoder, also inside of a pipeline, a PeftModel, what torch.compile returned, or a parallel wrapper; any model of
        `accelplug.hosts.host.HOSTS`.
    recipe : None for the default of the file that matches the model; a name in that file, ``radial``; a full name,
        ``wan2.1-t2v-14b/radial``; the path of a recipe file; a mapping; a `Recipe`; or an instance of a patch, for every self- and
        joint-attention module. A rule of a mapping may hold an instance, too: ``{"where": {...}, "patch": MyPatch({...})}``.
    strict : raise `FallbackError` where an attention call that a rule names would run dense, and where a rule cannot hold: of steps
        that no run has at the first forward, of a guidance branch that never comes at the end of a run. Rules for other sizes than
        that of the run are not an error, unless no patch of the recipe is for this one.
    gate : ``auto`` times dense against sparse at the first call of each shape and leaves dense what would not pay;
        ``report`` times and tells, but forces the recipe; ``off`` forces it and times nothing; ``quality`` too, but calls whose
        estimated error is above `max_error` run dense, and are counted.
    backend : kernel for patches that leave the choice open: ``auto``, ``first``, ``triton``, ``flex``, ``flash``,
        ``blocked``, ``reference``; or ``cudnn`` and ``sol``, which no GPU has run here, and which nothing but their name brings on.
    deterministic : True turns timing off: no gate, and the first kernel that serves is used.
    choices : what ``plug.choices`` was in an earlier run of this recipe, from its JSON too. Its gate, backend, verdicts and kernels
        hold in place of those arguments, without timing. A shape it does not know is timed, but not with ``deterministic=True``.
    processor : a vision-language model's processor, for recipes that write prompts of their own (``carve``) or ask which words
        a prompt has; that of the model's own pipeline, if left out.
    max_error : with ``gate="quality"``: the most that a call's output may differ from dense attention's, relative to that, as rows say
        that were computed exactly (`repair` in a rule's settings). Compiled code is judged a step late, see `hosts.estimates`.

    Returns
    -------
    The `Plug`: ``remove()`` it, or use it as a context manager.

    Raises
    ------
    AlreadyAppliedError
        If a recipe is on the model, or on one of its parts.
    NoMatchError
        If there is no host for the model, it has no attention that is known, or no rule of the recipe can fit any of it.
    RecipeError
        If the recipe cannot be read, was made for another model, has a rule that can never hold, or puts a patch where its step cache
        looks.
    UnsupportedError
        If a denoiser's class is not known or its attention cannot be swapped (linear attention), a patch of the recipe is for other
        models or does not estimate its error where ``gate="quality"`` asks for it, or a library newer than what accelplug was tested
        with no longer keeps what it relies on.
    """
    for name, given in {"strict": strict, "deterministic": deterministic}.items():
        if not isinstance(given, bool):
            raise AccelplugError(f"{name} must be True or False, got {given!r}.")
    if choices is not None:
        gate, backend, max_error = _replayed(choices)
    elif deterministic:
        gate = "off"
        backend = "first" if backend == "auto" else backend  # not what another plug of this process has measured either
    _require_one_of("gate", gate, ("auto", "report", "off", "quality"))
    _require_bound(gate, max_error)
    _require_one_of("backend", backend, get_args(Backend))
    model, processor = unwrapped(model, processor)
    with _LOCK:
        host = host_of(model)
        parts = host.parts(model)
        require_free(model, parts)
        compat.versions.require(host.library)
        host.require_known(parts)
        loaded = load(recipe, host.facts(model))
        plug = Plug(
            model,
            loaded,
            host,
            parts,
            strict=strict,
            gate=gate,
            backend=backend,
            measure=not deterministic,
            choices=choices,
            processor=processor,
            max_error=max_error,
        )
        plug._install()
    return plug


def _require_one_of(name: str, given: Any, known: tuple[str, ...]) -> None:
    if not isinstance(given, str) or given not in known:
        raise AccelplugError(f"{name} must be one of {', '.join(known)}, got {given!r}{nearest(str(given), known)}.")


def _require_bound(gate: str, max_error: Any) -> None:
    """A bound on errors, and the gate that goes by it, come together."""
    if max_error is not None and (
        isinstance(max_error, bool) or not isinstance(max_error, float | int) or not max_error > 0
    ):
        raise AccelplugError(f"max_error must be a number above 0, got {max_error!r}.")
    if (gate == "quality") != (max_error is not None):
        raise AccelplugError(
            f'gate="quality" and max_error, the relative error above which calls run dense, go together: got gate={gate!r}, '
            f"max_error={max_error!r}."
        )


def _replayed(choices: Mapping[str, Any]) -> tuple[str, str, float | None]:
    """The gate, the backend and the bound on errors of stored choices."""
    expected = {"recipe", "gate", "backend", "verdicts", "kernels"}
    if not isinstance(choices, Mapping) or not expected <= set(choices):
        found = list(map(str, choices)) if isinstance(choices, Mapping) else type(choices).__name__
        raise AccelplugError(f"choices must be what plug.choices gave, with {sorted(expected)}, got {found}.")
    return choices["gate"], choices["backend"], choices.get("max_error")


def remove(model: Any) -> None:
    """Take the recipe off a model, or off the model of a `Plug`; the model is then as it was before `apply`.

    Raises
    ------
    NoMatchError
        If no recipe is on it.
    """
    if isinstance(model, Plug):
        model.remove()
        return
    model = model_in(model)
    marked = [model, *(() if plug_of(model) else host_of(model).parts(model).values())]
    plugs = {id(on): on for place in marked if (on := plug_of(place))}
    if not plugs:
        raise NoMatchError(f"No recipe is on this {type(model).__name__}; nothing to remove.")
    for on in plugs.values():
        on.remove()


class Plug(AbstractContextManager["Plug"]):
    """A recipe on a model. Made by `apply`; `remove` undoes it, as does leaving the context."""

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        host: type[Host],
        parts: Mapping[str, Any],
        *,
        strict: bool,
        gate: str,
        backend: str,
        measure: bool,
        choices: Mapping[str, Any] | None = None,
        processor: Any = None,
        max_error: float | None = None,
    ) -> None:
        self.recipe = recipe
        self._undo, self._marks = Undo(), Undo()
        self._model = weakref.ref(model)
        self._kind = host
        self._backend = backend
        self._processor = processor
        self._ledger = Ledger(strict, Estimates(max_error))
        self._gate = Gate("off" if gate == "quality" else gate, times=measure)
        self._chooser = Chooser(recipe, backend, processor)
        if choices is not None:
            self._recall(choices)
        self.hosts: list[Host] = list(host.of(model, parts, self._setup()))
        """What is in the model, one for each part that the recipe is on."""
        fit.require_fit(recipe, self.hosts, elsewhere=host.names(model))
        if max_error is not None:
            self._chooser.require_estimates()

    def _setup(self) -> Setup:
        recipe = self.recipe
        for what, key, kind in (
            ("step cache", "cache", recipe.cache and recipe.cache.kind),
            ("positions", "positions", recipe.positions and recipe.positions.kind),
        ):
            if kind is not None and key not in self._kind.abilities:
                raise UnsupportedError(
                    f"{recipe.name} asks for the {what} {kind}, and {self._kind.called} takes none. Leave {key}: out."
                )
        return Setup(
            recipe.name,
            self._chooser.decide,
            self._chooser.guide if self.recipe.guided_by() else None,
            self._chooser.around(),
            recipe.cache,
            self._ledger,
            self._gate,
            self._processor,
            self._check_rules,
            self._chooser.enters(),
            touches=lambda site: bool(self.recipe.chosen_among([site])),
            families=frozenset(entry.family for entry in self.recipe.patches()),
            positions=recipe.positions,
        )

    def _check_rules(self, ended: bool) -> None:
        """Behind every forward of a run, and at its end: under strict a rule that cannot hold is an error."""
        if self._ledger.strict:
            fit.require_held(self.recipe, self.hosts, ended)

    def _recall(self, choices: Mapping[str, Any]) -> None:
        from accelplug.kernels.attention import recall

        if choices["recipe"] != self.recipe.name:
            raise AccelplugError(f"These choices were made for {choices['recipe']}; expected those of {self.recipe.name}.")
        self._gate.recall(choices["verdicts"])
        recall(choices["kernels"])

    def _install(self) -> None:
        try:
            for place in [self._model(), *(host.root for host in self.hosts)]:
                if plug_of(place) is None:  # first on, last off: whatever happens between, `remove` finds us by it
                    self._marks.put(place, PLUGGED, self)
            for host in self.hosts:
                host.install(self._undo)
                self._count_barred(host)
            logger.info("%s", self.summary())
        except BaseException as error:
            try:
                self.remove()
            finally:
                if isinstance(error, AttributeError | KeyError | ImportError):  # has a name of a library gone?
                    compat.versions.require_contracts(self._kind.library)
            raise

    def _count_barred(self, host: Host) -> None:
        """Attention that a rule names and that a foreign processor keeps from us is a fallback like any other."""
        for site in host.barred if self.recipe.patches() else ():
            if self.recipe.may_touch(site):
                self._ledger.fell_back(site.module, host.skipped[site.module])

    # ------------------------------------------------------------------------------------------------------ public

    def remove(self) -> None:
        """Give the model back as it was. A second call does nothing, or finishes what an interrupt has cut short."""
        with _LOCK:
            self._undo.run()
            self._marks.run()

    @property
    def active(self) -> bool:
        """Whether it is on a model, or something of it still is."""
        return bool(self._undo) or bool(self._marks)

    def __enter__(self) -> Plug:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def warmup(self, *args: Any, **kwargs: Any) -> Report:
        """Run the model once, so that kernels are compiled and the gate has decided before the run that counts.

        Takes what the model's call takes: use the size and number of steps of the runs to come. The output is dropped, and
        random states, a `generator`'s too, are put back. Its calls count in the report.

        Raises
        ------
        AccelplugError
            If the model is gone.
        """
        if (model := self._model()) is None:
            raise AccelplugError("warmup() needs the model that the plug was made for, and it is gone.")
        given = kwargs.get("generator")
        generators = given if isinstance(given, list | tuple) else [given] if given is not None else []
        states = [generator.get_state() for generator in generators]
        with torch.random.fork_rng(), torch.no_grad():
            model(*args, **kwargs)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        return self.report()

    def step(self, index: int | None, steps: int | None = None) -> None:
        """Tell which diffusion step comes in this thread (0-based, of `steps`), for a bare denoiser; with None let the pipeline tell.

        A step that does not lie behind the last one of its guidance branch begins a new run: nothing is kept from the one before.
        """
        for name, given, least in (("index", index, 0), ("steps", steps, 1)):
            if given is not None and (isinstance(given, bool) or not isinstance(given, Integral) or given < least):
                raise AccelplugError(f"step, {name}: expected a whole number of {least} or more, or None, got {given!r}.")
        if index is not None and steps is not None and index >= steps:
            raise AccelplugError(f"step: expected an index below the {steps} steps, counted from 0, got {index}.")
        for host in self._that_can("step"):
            host.step(index, steps)

    def mark(self, image: Tensor | None) -> None:
        """Tell where the images of a language model's prompts are, where it is not found: embeddings that you merged yourself.

        Holds for prompts that this thread reads from now on, until it is told anew; with None they are looked for again.

        Parameters
        ----------
        image : (B, S), bool, True for tokens that show an image, each run of them one; or integers, which image of its row a token
            shows, from 1, and 0 for text.

        Raises
        ------
        ShapeError
            If it has another shape or dtype; also in a forward whose prompt has another shape.
        UnsupportedError
            If the model is not a language model.
        """
        for host in self._that_can("mark"):
            host.mark(image)

    def _that_can(self, what: str) -> list[Host]:
        """The hosts that can be asked for something; where none can, the first, which refuses."""
        return [host for host in self.hosts if what in host.abilities] or self.hosts[:1]

    def trace(self, timed: bool = False, plans: bool = False) -> AbstractContextManager[list[Event]]:
        """Collect an `Event` per self- and joint-attention call while the context is open, and per cross-attention call that a rule names.

        Parameters
        ----------
        timed : measure each call, synchronising the device: do not time whole runs with it.
        plans : keep the `BlockPlan` of each call of the last step.
        """
        return self._ledger.trace(timed, plans)

    @property
    def sites(self) -> list[Site]:
        """The self- and joint-attention modules that rules can name."""
        return fit.sites_of(self.hosts)

    def where(self) -> Placement:
        """Say what runs where: per attention module its patch, with which params, layout and plan; prints as a table by layers.

        It is what stands for this thread's forward, or, outside of one, for the latest; ahead of the first one, what the rules say
        already. Iterate over it for its rows::

            for row in plug.where():
                print(row.site.module, row.name, row.density)
        """
        return Placement(self.summary(), tuple(row for host in self.hosts for row in host.placed()))

    @property
    def estimates(self) -> list[Estimate]:
        """What patches say of the relative error of their answers, by site, step and guidance branch of the latest run."""
        return self._ledger.estimates.known()

    @property
    def choices(self) -> dict[str, Any]:
        """What was chosen by measurement, and what that predicts, as plain data: store it with results.

        ``apply(model, recipe, choices=...)`` takes it again: the same verdicts and kernels, nothing timed anew.
        """
        from accelplug.kernels.attention import choices

        return {
            "recipe": self.recipe.name,
            "gate": self._gate.mode if self._ledger.estimates.bound is None else "quality",
            "max_error": self._ledger.estimates.bound,
            "backend": self._backend,
            "verdicts": [verdict.to_dict() for verdict in self._gate.verdicts],
            "kernels": choices(),
            "forecasts": [forecast.to_dict() for forecast in self.forecasts],
        }

    @property
    def forecasts(self) -> list[Forecast]:
        """What the gate's timings predict end to end, a `Forecast` for each denoiser and size of the latents seen so far.

        The attention share is measured in the first two eager forwards of a size (`warmup` runs some); nothing is timed in compiled
        or captured code, nor with ``gate="off"``.
        """
        return [forecast for host in self.hosts for forecast in host.forecasts()]

    def report(self, by_layer: bool = False) -> Report:
        """Say what ran how since `apply`: calls by patch, fallbacks with their reasons, what the gate left dense, what can be gained.

        Parameters
        ----------
        by_layer : list what patches estimate of their errors by module too, the median over steps and guidance branches of the last run;
            and what audits found by module.
        """
        self._count_replaced()
        for host in self.hosts:
            host.collect()
        gated = [verdict for verdict in self._gate.verdicts if not verdict.pays and self._gate.mode == "auto"]
        return Report(
            recipe=self.recipe.name,
            served=dict(self._ledger.served),
            fallbacks={f"{module}: {reason}": n for (module, reason), n in self._ledger.fallbacks.items()},
            hoisted=dict(self._ledger.hoisted),
            gated=[verdict.reason + self._end_to_end(verdict) for verdict in gated],
            unjudged=sorted(self._gate.unjudged),
            gains={v.patch: v.dense_ms / v.sparse_ms for v in self._gate.verdicts if v.pays},
            errors=self._ledger.estimates.by_patch(),
            unestimated=self._ledger.estimates.missing(),
            errors_by_layer=self._ledger.estimates.by_module() if by_layer else {},
            kept=self._ledger.kept_in(by_layer),
            expected=self._expected(),
            forecasts={f"{f.denoiser} at {_by(f.shape)}": str(f) for f in self.forecasts},
            caches=[said for host in self.hosts if (said := host.cached()) is not None],
            guided=[said for host in self.hosts if (said := host.guided()) is not None],
            reach=[said for host in self.hosts if (said := host.reach()) is not None],
            compiled=[what for host in self.hosts for what in host.compiled()],
            idle=[f"{self.recipe.named(rule.number)}: {rule.why}" for rule in fit.idle(self.recipe, self.hosts)],
            unrouted=[module for host in self.hosts for module in host.unrouted()],
            skipped={f"{host.name}.{path}": why for host in self.hosts for path, why in host.skipped.items()},
        )

    def _expected(self) -> str:
        """What the rules come to in a run like the last one, or, ahead of the first one, in runs of some lengths."""
        seen = next((facts for host in self.hosts if (facts := host.seen) is not None and facts.steps), None)
        if seen is None or seen.steps is None or not self.recipe.by_steps:
            return self.recipe.outlook()
        layout = max(seen.layouts, key=lambda layout: layout.visual, default=None)
        sites = [site for site in self.sites if site.kind != "cross"]
        return str(self.recipe.expected(seen.steps, sites, layout, seen.first) or "")

    def _replaced(self) -> list[Host]:
        """Hosts of parts that the pipeline has no more: its runs never come by here."""
        model = self._model()
        if model is None or isinstance(model, torch.nn.Module) or not self.active:
            return []
        present = self._kind.parts(model)
        return [host for host in self.hosts if present.get(host.name) is not host.root]

    def _count_replaced(self) -> None:
        for host in self._replaced():
            reason = f"the pipeline has another {host.name} than at apply(), without the recipe; remove and apply again"
            if (host.name, reason) not in self._ledger.fallbacks:
                self._ledger.fell_back(host.name, reason)

    def _end_to_end(self, verdict: Verdict) -> str:
        """What a verdict means for a forward, where the share of its calls in one is known."""
        shares = [share for host in self.hosts if (share := host.share_of(verdict)) is not None]
        if not shares:
            return ""
        gain = amdahl(shares[0], verdict.dense_ms / verdict.sparse_ms)
        return f"; such calls are {shares[0]:.0%} of a forward, which would be {gain:.2f}x as fast with it"

    def summary(self) -> str:
        """One line: which recipe, how many attention modules of how many it may touch, in which parts."""
        sites = [site for site in self.sites if site.kind != "cross"]
        touched = sum(self.recipe.may_touch(site) for site in sites)
        crossed = sum(site.kind == "cross" and bool(self.recipe.chosen_among([site])) for site in self.sites)
        where = ", ".join(f"{host.name} ({type(host.root).__name__})" for host in self.hosts)
        gone = ", ".join(host.name for host in self._replaced())
        more = f" and {crossed} of cross-attention" if crossed else ""
        state = f"on, but the pipeline has another {gone} now" if gone else "on" if self.active else "off"
        return f"{self.recipe.name}: {state}, touches {touched} of {len(sites)} self-attention modules{more} in {where}"

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "A Plug is the handle of one loaded model: it cannot be copied or pickled. Store plug.choices or plug.report(), and "
            "apply the recipe where the model is loaded."
        )

    def __repr__(self) -> str:
        return f"<Plug {self.summary()}>"

    def __rich__(self) -> Group:
        from rich.console import Group

        return Group(self.summary(), self.report())

    def _repr_html_(self) -> str:
        return as_html(self)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
