"""The diffusers host: finds a pipeline's denoisers and their attention, and asks for a patch whenever layout or step change."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accelplug import compat
from accelplug.bounded import Bounded
from accelplug.call import Clock, Layout, Share, Site
from accelplug.errors import NoMatchError, UnsupportedError
from accelplug.families import require_family
from accelplug.families.base import Geometry, site_kinds
from accelplug.hosts import rebind, ulysses
from accelplug.hosts.answering import Answering, asks_for_gradients
from accelplug.hosts.caches import StepCaches
from accelplug.hosts.clock import ContextListener, StepClock
from accelplug.hosts.entrance import Entrance
from accelplug.hosts.forecast import Forecast, Forecaster
from accelplug.hosts.gate import Verdict
from accelplug.hosts.guiding import Guiding
from accelplug.hosts.hoist import Hoist
from accelplug.hosts.host import Host, Setup
from accelplug.hosts.models import DENOISERS, PATCHABLE, denoisers, processor_owners
from accelplug.hosts.placement import Placed
from accelplug.hosts.positions import FrameAngles
from accelplug.hosts.record import Choice, given
from accelplug.hosts.run import Moment, Passed, Run
from accelplug.hosts.site import Entered, Region, SiteRecord
from accelplug.hosts.texts import Texts
from accelplug.hosts.ulysses import Gathered
from accelplug.hosts.undo import Undo
from accelplug.kernels.memory import Memory
from accelplug.recipe import ModelFacts, RunFacts

if TYPE_CHECKING:
    from accelplug.kernels.orders import Tiles
    from accelplug.patches.base import Patch


RUNS = frozenset({"compare", "tune", "calibrate"})
"""Abilities that take a whole pipeline, which runs from noise to a picture."""

TIMESTEPS = ("timestep", "timesteps", "t", "vision_timesteps")
"""Names that denoisers have for the argument that says the timestep."""

INSTALL = "_accelplug_install"
"""Attribute of a denoiser: which installation of ours is on it. Dynamo guards no hooks, so that its graphs need this to tell."""
_installs = itertools.count()


class _Thread(threading.local):
    """What a thread is at: its run of the denoiser, and the time."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.now = Clock()
        self.announced = False
        """Whether a context has told of the forward that comes."""
        self.comes_first = True
        """Whether no other forward of the run was at its step before."""
        self.context = ExitStack()
        """The cache context that we have opened around a forward."""

    @property
    def ahead(self) -> bool:
        """Whether its forward is one that we run ahead of another."""
        return self.now.phase == "ahead"


class DenoiserHost(Answering, Host):
    """One denoiser with its attention re-bound.

    Parameters
    ----------
    name, denoiser : the part.
    clock : of the pipeline.
    setup : what the plug hands in.
    takes_turns : whether another denoiser of the pipeline runs some of the steps.
    texts : the pipeline's prompts, where a patch asks which tokens are whose.
    """

    library = "diffusers"
    called = "a denoiser"
    expects = "a diffusers pipeline with a transformer or unet that is loaded (call load_components() of a modular one), or such a module"
    gives = "pictures"
    serves = frozenset({"sparse", "tokens", "bias", "texts", "guidance"})
    abilities = dict.fromkeys(RUNS, "a whole diffusers pipeline") | dict.fromkeys(
        ("inspect", "cache", "positions", "step"), "a diffusers pipeline or denoiser"
    )

    @classmethod
    def knows(cls, model: Any) -> bool:
        """Whether it has a denoiser; any module that others leave may be one."""
        return bool(denoisers(model))

    @classmethod
    def parts(cls, model: Any) -> dict[str, Any]:
        """Return the denoisers."""
        return dict(denoisers(model))

    @classmethod
    def require_known(cls, parts: Mapping[str, Any]) -> None:
        """Refuse denoisers that have no family."""
        for part in parts.values():
            require_family(part)

    @classmethod
    def facts(cls, model: Any) -> ModelFacts:
        """Return the classes and the config of the first denoiser, and which components the pipeline has."""
        denoiser = next(iter(denoisers(model).values()))
        components = getattr(model, "components", None)
        present = (
            {name for name, part in components.items() if part is not None} if isinstance(components, Mapping) else set()
        )
        config = dict(getattr(denoiser, "config", {}))
        return ModelFacts(tuple(kind.__name__ for kind in type(denoiser).__mro__), config, frozenset(present), denoiser=True)

    @classmethod
    def of(cls, model: Any, parts: Mapping[str, Any], setup: Setup) -> list[DenoiserHost]:
        """Make a host for each denoiser; they go by one clock, and are given one text."""
        clock, texts = StepClock(model), Texts(model) if "texts" in setup.families else None
        return [cls(name, part, clock, setup, takes_turns=len(parts) > 1, texts=texts) for name, part in parts.items()]

    @classmethod
    def abilities_of(cls, model: Any) -> frozenset[str]:
        """All, but that a bare denoiser cannot be run whole."""
        return frozenset(cls.abilities) - (frozenset() if callable(model) and not isinstance(model, nn.Module) else RUNS)

    @classmethod
    def names(cls, model: Any) -> tuple[str, ...]:
        """Return the names that a bare denoiser may have in a pipeline."""
        return DENOISERS if isinstance(model, nn.Module) else ()

    def __init__(
        self,
        name: str,
        denoiser: nn.Module,
        clock: StepClock,
        setup: Setup,
        *,
        takes_turns: bool = False,
        texts: Texts | None = None,
    ) -> None:
        self.texts = texts
        self.name, self.denoiser, self.family = name, denoiser, require_family(denoiser)
        self.root = denoiser
        self.clock = clock
        super().__init__(setup.ledger, setup.gate)
        self.decide, self.check_rules, cache = setup.decide, setup.check_rules, setup.cache
        self.enters = setup.enters
        self.cache, self.caches = cache, None
        if cache is not None:
            self.caches = StepCaches(
                {name: denoiser},
                cache.kind,
                cache.settings_for(None),
                for_run=cache.settings_for if cache.by_run else None,
                optional=cache.optional,
                shared=takes_turns,
            )
        self.angles = None if setup.positions is None else FrameAngles(denoiser, self.family, setup.positions)
        self.passed = Passed()
        self.skipped: dict[str, str] = {}
        self.barred: list[Site] = []
        """Attention that rules could name if its processor were another; `skipped` says which it is."""
        self._ahead: Bounded[tuple, str | None] = Bounded(64)
        self._gathered: Bounded[tuple, Gathered | None] = Bounded(16)
        self.signature = inspect.signature(type(denoiser).forward)
        self.records = self._records(setup.touches)
        self.regions = self._regions()
        self.hoist = Hoist(denoiser, self.family.any_order, self.records, self._answers, self.ledger)
        self.forecaster = Forecaster(name, self.meter, self.records, self.passed, self.decide, self.gate, takes_turns)
        self.guiding = None if setup.guide is None else Guiding(self, setup.guide, self.family)
        self._came_through: bool | None = False
        """Whether a forward has come to its end; None where that has been looked at."""
        self._traced = False
        self._weights: Any = None
        self._thread = _Thread()

    # ------------------------------------------------------------------------------------------------- in and out

    def _records(self, touches: Callable[[Site], bool]) -> list[SiteRecord]:
        owners = dict(processor_owners(self.denoiser))
        kinds, layers = site_kinds(self.family, list(owners))
        records = []
        for path, module in owners.items():
            kind, layer = kinds.get(path, (None, None))
            site = Site(path, self.name, kind, layer, layers) if kind in {*PATCHABLE, "cross"} else None
            if site is not None and site.kind == "cross" and not touches(site):
                site = None
            if not rebind.can_rebind(module.processor):
                self.skipped[path] = rebind.way_out(module.processor)
                self.barred += [site] if site else []
                continue
            records.append(SiteRecord(self, module, site))
        if not any(record.site for record in records):
            name, barred = type(self.denoiser).__name__, {self.skipped[site.module] for site in self.barred}
            if barred:
                raise NoMatchError(
                    f"{name} has {len(self.barred)} attention modules for rules, none usable: {'; '.join(barred)}."
                )
            raise NoMatchError(
                f"{name} has no self- or joint-attention that can be re-bound; expected modules "
                f"that fit {[pattern for pattern, _ in self.family.sites]}, found {sorted(owners) or 'no processors'}."
            )
        return records

    def _regions(self) -> list[Region]:
        if not self.family.level:
            return [Region("", self.denoiser, [record for record in self.records if record.site])]
        regions = {
            path: Region(path, module)
            for path, module in self.denoiser.named_modules()
            if type(module).__name__ in self.family.level
        }
        regions[""] = Region("", self.denoiser)  # what lies outside all levels (motion modules) has no grid
        for record in self.records:
            if record.site:
                owner = next((path for path in regions if record.site.module.startswith(path + ".")), "")
                regions[owner].records.append(record)
        return [region for region in regions.values() if region.records]

    def install(self, undo: Undo) -> None:
        """Put records, the context listener and hooks in place; `undo` restores what is then still ours."""
        undo.add(self.reset)
        if self.texts is not None:
            self.texts.install(undo)
        for record in self.records:
            record.original = rebind.rebind(record.module, record, undo)
        self.hoist.undo = undo
        undo.add(self.hoist.end)
        if self.enters:
            for record in (record for record in self.records if record.site):
                Entrance(record).install(undo)
        ContextListener(self.denoiser, self._on_context, self._run_ends).install(undo)
        if self.family.level:
            for region in (region for region in self.regions if region.path):
                undo.hook(region.module, "register_forward_pre_hook", _RegionHook(self, region), with_kwargs=True)
        undo.put(self.denoiser, INSTALL, next(_installs))
        undo.hook(self.denoiser, "register_forward_hook", self._leave_forward, always_call=True)
        undo.hook(self.denoiser, "register_forward_hook", self._after_forward)
        if self.guiding is not None:
            undo.hook(self.denoiser, "register_forward_hook", self.guiding.after_forward, with_kwargs=True)
        undo.hook(self.denoiser, "register_forward_pre_hook", self._before_forward, with_kwargs=True)
        if self.guiding is not None:
            self.guiding.opening.undo = undo
            undo.add(self.guiding.leave_forward)
            undo.hook(self.denoiser, "register_forward_pre_hook", self.guiding.before_forward, with_kwargs=True)
        if self.angles is not None:
            self.angles.install(undo)
        if self.caches is not None:
            self.caches.install(undo)

    @property
    def outer_mask(self) -> bool:
        """Whether a (B, 1, S, S) mask is an outer product of one validity."""
        return self.family.outer_mask

    @property
    def text_apart(self) -> bool:
        """Whether text asks in calls of its own, which stay dense."""
        return self.family.text_apart

    def reset(self) -> None:
        """End this thread's run: what was kept for its steps is forgotten."""
        self._thread.run = None

    def _run_ends(self) -> None:
        self.reset()
        self.check_rules(True)

    # ------------------------------------------------------------------------------------------- layout and step

    @property
    def now(self) -> Clock:
        """When this thread's forward happens."""
        return self._thread.now

    @property
    def run(self) -> Run:
        """This thread's run."""
        run = self._thread.run = self._thread.run or Run()
        return run

    @property
    def comes_first(self) -> bool:
        """Whether no other forward of this thread's run was at this step before."""
        return self._thread.comes_first

    def is_own(self, module: nn.Module) -> bool:
        """Whether a module is the denoiser, or stands in for it in this thread; a deep copy of it does not."""
        return module is self.denoiser or (self.guiding is not None and module is self.guiding.stand_in)

    def latents(self, inputs: Mapping[str, Any]) -> Any:
        """Return the latents among a forward's inputs: a tensor, or a list of one for each sample."""
        return _samples(inputs, self.family.latents)

    def _on_context(self, context: Any) -> None:
        self.clock.on_context(context)
        if context is not None and self._traced:  # compiled, it does not run the pre-hook: settle with the last geometry
            self._note_step(self._moment(None))
            self._thread.announced = True
            for region in self.regions:
                self.settle_and_count(region)

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            if getattr(module, INSTALL, 0) >= 0:  # read for its guard
                compat.torch.comptime()(_settle_at_trace)
            return
        if not self.is_own(module):
            return
        inputs = given(self.signature, args, kwargs)
        if self._thread.ahead:
            self.enter_root(inputs, self.family.geometry(getattr(self.denoiser, "config", None), inputs))
            return
        timestep = next((inputs[name] for name in TIMESTEPS if name in inputs), None)
        geometry = self.family.geometry(getattr(self.denoiser, "config", None), inputs)
        sizes = self._sizes(inputs, None if self.family.level else geometry)
        moment = self._moment(timestep)
        self._open_context(moment.clock.branch)
        run = self._note_step(moment, sizes, announced=self._thread.announced)
        run.inside = run.broken = True
        self._check_processors()
        self._check_routes()
        self.hoist.end()  # what an interrupted forward left
        self.enter_root(inputs, geometry)
        if self._wants_ahead():
            self._run_ahead(args, kwargs)
            self.enter_root(inputs, geometry)
        latents = _latents(inputs, self.family.latents)
        if latents is not None:
            self.hoist.begin(latents.device)
        if latents is not None and self.gate.mode != "off" and self.gate.may_time(latents.device):
            self.meter.begin(tuple(latents.shape), latents.dtype, latents.device)

    def _wants_ahead(self) -> bool:
        """Whether the forward to come is to be run once ahead, and can be: its step is known, and nobody else counts."""
        if self.now.step is None or self._is_compiled() or getattr(self.denoiser, "is_cache_enabled", False):
            return False
        settled = [record.settled for record in self.records if record.settled.patch is not None]
        return any(here.patch is not None and here.patch.wants_ahead(here.params) for here in settled)

    def _run_ahead(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Run the forward to come, with those patches alone that take part in it."""
        here = self._thread
        before, here.now = here.now, replace(here.now, phase="ahead")
        try:
            self.denoiser(*args, **kwargs)
        finally:
            here.now = before

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_compiling() and self.is_own(module) and not self._thread.ahead:
            self.meter.end()
            if self._came_through is False:
                self._came_through = True
            if self._thread.run is not None:
                self._thread.run.broken = False
            self.check_rules(False)

    def _leave_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_compiling() and self.is_own(module) and not self._thread.ahead:
            self.hoist.end()
            if self.guiding is not None and output is None:  # it raised
                self.guiding.leave_forward()
            self._thread.context.close()
            if self._thread.run is not None:
                self._thread.run.inside = False

    def _open_context(self, branch: str | None) -> None:
        """Tell our step cache which branch runs, where a guider said so and the pipeline opens no cache context: modular ones."""
        self._thread.context.close()  # what an interrupted forward left
        if self.caches is not None and branch is not None and self.clock.context is None:
            self._thread.context.enter_context(self.denoiser.cache_context(branch))  # type: ignore[operator]

    def _moment(self, timestep: Any) -> Moment:
        now = self.clock.now(timestep, self.denoiser, self._thread.run, self.family.timestep)
        weights = compat.diffusers.adapters_at_work(self.denoiser), self.clock.fused
        if weights != self._weights:
            self._weights = weights
            self.meter.forget()
        return replace(now, weights=weights)

    def _note_step(self, moment: Moment, sizes: Any = None, announced: bool = False) -> Run:
        """Take note of the time, of the run that the forward to come is of, and of all steps and branches.

        `announced`: whether the context around the forward has told this already.
        """
        here, run, now = self._thread, self._thread.run, moment.clock
        here.comes_first = run is None or not run.has_been_at(moment)
        if run is None or not (run.goes_on(moment, sizes) or (announced and run.is_at(moment))):
            run = here.run = Run(shift=None if run is None or here.comes_first else run.shift)
        here.announced = False
        if self.caches is not None:
            self.caches.enter(self.denoiser, run, moment, self.clock.context)
        run.take(moment, sizes)
        here.now = replace(now, turn=run.turn) if now.branch is None and now.step is not None and run.turn else now
        self.passed.note(now)
        return run

    def _sizes(self, inputs: Mapping[str, Any], geometry: Geometry | None) -> Any:
        """What all forwards of a run and branch share: the shape of the latents, and the grid where tokens come packed."""
        latents = _latents(inputs, self.family.latents)
        return latents is not None and latents.shape, geometry and geometry.grid_thw

    def trace_begins(self) -> None:
        """Take note that the denoiser is compiled, and of the time, while Dynamo traces it."""
        self._traced = True
        if self.guiding is not None:
            raise UnsupportedError(
                f"This recipe calls {type(self.denoiser).__name__} once more a step, to be guided by what it predicts, and that cannot "
                "be done in a graph of the whole model. Compile its blocks instead: compile_repeated_blocks()."
            )
        if not self._thread.announced:
            self._note_step(self._moment(None))
        self._thread.announced = False

    def enter_root(self, inputs: Mapping[str, Any], geometry: Geometry | None) -> None:
        """Settle what does not wait for the input of a level. `geometry`: what the denoiser's own inputs say."""
        for region in self.regions:
            if not region.path:
                self._enter(region, inputs, geometry)

    def enter(self, region: Region, inputs: Mapping[str, Any]) -> None:
        """Take the geometry of a region from its inputs, and settle what runs there."""
        self._enter(region, inputs, self.family.geometry(getattr(region.module, "config", None), inputs))

    def _enter(self, region: Region, inputs: Mapping[str, Any], geometry: Geometry | None) -> None:
        latents = _latents(inputs, self.family.latents)
        if latents is not None:
            region.entered = Entered(geometry, latents.device, latents.dtype, len(latents))
        else:
            region.entered = replace(region.entered, geometry=geometry)
        self.settle_and_count(region)

    def settle_and_count(self, region: Region) -> None:
        """Settle what runs in a region, and count what a rule names and cannot have."""
        self._settle(region)
        for record in region.records:
            if record.settled.reason is not None and record.site is not None:
                self.ledger.fell_back(record.site.module, record.settled.reason)

    def collect(self) -> None:
        """Count what compiled code could not: calls that met an obstacle inside a graph."""
        for record in self.records:
            if record.missed and record.site is not None:
                record.missed = False
                self.ledger.fell_back(
                    record.site.module, "a mask, a length or a flag of the compiled call is not understood"
                )

    def _check_processors(self) -> None:
        self.collect()
        for record in self.records:
            if record.site is None or record.latest.choice.patch is None:
                continue
            if compat.torch.submodule(self.denoiser, record.site.module) is not record.module:
                what = "the module was replaced"
            elif not rebind.is_rebound(record.module, record):
                what = f"its processor was replaced by {type(record.module.processor).__name__}"
            else:
                continue
            self.ledger.fell_back(record.site.module, f"{what} since apply(); remove and apply again")

    def _check_routes(self) -> None:
        """After the first forward: attention that a rule names and that never came by is a fallback like any other."""
        if self._came_through is True:
            self._came_through = None  # once is enough
            for module in self.unrouted():
                self.ledger.fell_back(module, "its attention never came by in the first forward")

    def _settle(self, region: Region) -> None:
        share = Share(*compat.diffusers.shares_heads(self.denoiser))
        entered = region.entered
        key = (self._thread.run, entered.geometry, self.now, entered.device, share, self.exchanging)
        if key == region.here.seen:
            return
        region.here.seen = key
        compiled = self.gate.mode != "off" and self._is_compiled()
        for record in region.records:
            if record.site is None:
                continue
            if record.site.heads != share:
                record.site = replace(record.site, heads=share)
            layout = self._expected_layout(entered.geometry, record.site)
            exchanged = self._exchanged(layout, share, entered.device)
            self._settle_record(record, layout, entered.device, exchanged)
            if compiled and record.settled.patch is not None:
                self._judge_ahead(record, region)

    def _settle_record(
        self, record: SiteRecord, layout: Layout | None, device: torch.device | None, exchanged: Gathered | None
    ) -> None:
        assert record.site is not None
        record.settle(*self._prepare(record.site, layout, device), exchanged)
        self._ask_for_error(record, device)
        if self.guiding is not None and (guide := self.guiding.at(record)) is not None:
            choice, params = guide
            record.settled = replace(record.settled, guide=(choice, self.on_device(params, device)))

    def _ask_for_error(self, record: SiteRecord, device: torch.device | None) -> None:
        """Hand a patch that estimates its error where to write it, or leave it out by what it said in the step before.

        Such a patch is also told where to find what it left there.
        """
        here, site, run = record.settled, record.site, self._thread.run
        if here.patch is None or not here.patch.estimates or site is None or run is None or device is None:
            return
        state = run.state[site.module, self.now.branch]
        compiled = self._is_compiled()
        error, reason = self.ledger.estimates.ask(site, self.now, here.choice.name, device, state, compiled)
        patch = here.patch if reason is None else None
        memory: Memory = state.setdefault("memory", Memory())
        memory.advance(self.now.step)
        record.settled = replace(here, patch=patch, reason=reason, error=error, ticket=memory.ticket)

    def _is_compiled(self) -> bool:
        """Whether attention never comes by in eager mode, where the gate would time it: blocks are compiled, or all around us."""
        return self._traced or compat.torch.is_compiled(self.denoiser)

    def _judge_ahead(self, record: SiteRecord, region: Region) -> None:
        """Let the gate time made-up tensors of the real shape, outside every graph; what cannot be judged stands as such."""
        shape, entered = self._shape_bhsd(record, region), region.entered
        device, name, patch = entered.device, record.settled.choice.name, record.settled.patch
        dtype = _dtype_of(record.module, entered.dtype)
        if patch is None or not patch.speed:
            return
        seen = shape is not None and dtype is not None and device is not None
        verdict = self.gate.known(name, patch, shape, dtype, device) if seen else None  # type: ignore[arg-type]
        if verdict is None and (not seen or torch.compiler.is_compiling()):
            self.gate.postpone(name, self.name)
            return

        def judge() -> str | None:
            generator = torch.Generator(device or "cpu").manual_seed(0)  # the global generator stays untouched
            q, k, v = (torch.randn(shape or (), generator=generator, dtype=dtype, device=device) for _ in range(3))
            here = replace(record.settled, error=None, ticket=None)
            q = q[..., here.unasked[0] : here.length - here.unasked[1], :]
            return self.not_worth_it(here, here.call(q, k, v, None, None, rebind.dense_sdpa(q, k, v)))

        if verdict is not None:
            stays = verdict.pays or self.gate.mode == "report"
        else:
            stays = self._ahead.get((patch, shape, dtype, device), judge) is None
        if not stays:
            record.settled = replace(record.settled, patch=None)
        self.gate.settle(name, self.name)

    def _shape_bhsd(self, record: SiteRecord, region: Region) -> tuple[int, int, int, int] | None:
        """Shape of the queries to come, where the attention module tells its heads."""
        module = record.module
        heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
        dim = getattr(module, "head_dim", None)
        if heads and dim is None and (to_q := getattr(module, "to_q", None)) is not None:
            dim = to_q.out_features // heads
        if not heads or dim is None:
            return None
        here = record.site.heads.of(heads) if record.site else range(heads)
        return region.entered.batch, len(here), record.settled.length, dim

    def _answers(self, record: SiteRecord) -> bool:
        """Whether the next calls of `record` will run its patch, as far as can be said ahead: the gate has judged, if it is on."""
        here, region = record.settled, self.regions[0]
        if here.patch is None or here.reason is not None:
            return False
        if self.gate.mode == "off" or not here.patch.speed:
            return True
        shape, entered = self._shape_bhsd(record, region), region.entered
        dtype = _dtype_of(record.module, entered.dtype)
        if shape is None or dtype is None or entered.device is None:
            return False
        verdict = self.gate.known(here.choice.name, here.patch, shape, dtype, entered.device)
        return verdict is not None and (verdict.pays or self.gate.mode == "report")

    def _expected_layout(self, geometry: Geometry | None, site: Site) -> Layout | None:
        if geometry is None:
            return None
        # Shares of ranks are known where they are shares of text and of the grid.
        others = geometry.ahead + geometry.behind + sum(geometry.unasked)
        if site.kind == "joint" and self.exchanging and (others or not self.family.split_apart):
            return None
        layout = geometry.layout(site.kind, geometry.longest(site.kind))
        return layout if layout is None or self.texts is None else self.texts.told(layout)

    @property
    def exchanging(self) -> bool:
        """Whether ranks exchange tokens for heads around attention."""
        return ulysses.exchanges(compat.diffusers.parallel_config(self.denoiser))

    def _exchanged(self, layout: Layout | None, share: Share, device: torch.device | None) -> Gathered | None:
        if layout is None or not self.exchanging:
            return None

        def make() -> Gathered | None:
            found = Gathered.of(layout, share.ranks)
            return found.to(device) if found is not None and device is not None else found

        return self._gathered.get((layout, share.ranks, device), make)

    def _prepare(
        self, site: Site, layout: Layout | None, device: torch.device | None
    ) -> tuple[Choice, Layout | None, Any, Tiles | None]:
        choice = self.decide(site, layout, self.now)
        self._held.add(choice.rule)
        if choice.patch is None or layout is None or (self._thread.ahead and not choice.patch.ahead):
            return choice, layout, None, None
        params = self._prepared(choice.patch, site, layout)
        order = None if params is None or self.hoist.scheme is None else choice.patch.shared_order(params)
        return choice, layout, self.on_device(params, device), order

    def _prepared(self, patch: Patch, site: Site, layout: Layout) -> Any:
        state = self.run.state
        shared = state.setdefault((None, self.now.branch), {})
        return patch.prepare(site, layout, self.now, state.setdefault((site.module, self.now.branch), {"shared": shared}))

    def hold(self, rule: int | None) -> None:
        """Take note that a rule of the recipe has held."""
        self._held.add(rule)

    def parameters_of(self, choice: Choice, site: Site, layout: Layout) -> Any:
        """Ask a patch of guidance what it needs at a site."""
        return None if choice.patch is None else self._prepared(choice.patch, site, layout)

    # --------------------------------------------------------------------------------------------- the call itself

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
        """Answer one eager attention call of `record`, counting what it does."""
        record.routed = True
        if record.site is None or k.shape[-2] <= record.settled.aside:
            return dense()
        entered = self.meter.clock(q.device)
        settled = record.settled
        answers = settled.patch is not None or settled.guide is not None
        if answers and q.shape[-2] != settled.queries and q.shape[-2] == k.shape[-2]:
            self._settle_for_length(record, q.shape[-2])
        here = record.settled
        call, reason = None, here.reason
        if not here.known:
            reason = f"{type(self.denoiser).__name__} itself was not called in this thread"
            self.ledger.fell_back(record.site.module, reason)
        if here.patch is not None:
            reason = self._obstacle(record, q, k, v, mask, blocked)
            if reason is not None:
                self.ledger.fell_back(record.site.module, reason)
            else:
                call = here.call(q, k, v, mask, scale, dense)
        out = self.answer(record, here, q, call, reason, dense, entered)
        return out if self.guiding is None else self.guiding.answer(record, out, q, k, v, scale, dense)

    def _settle_for_length(self, record: SiteRecord, length: int) -> None:
        """Text of another length than the inputs said (Mochi drops padded text per sample)."""
        region = next(region for region in self.regions if record in region.records)
        entered = region.entered
        layout = entered.geometry.layout(record.site.kind, length) if entered.geometry and record.site else None
        if layout is not None and record.site is not None:
            self._settle_record(record, layout, entered.device, record.settled.exchanged)

    def _obstacle(self, record: SiteRecord, q: Tensor, k: Tensor, v: Tensor, mask: Any, blocked: str | None) -> str | None:
        """Why a call that a patch is there for must run dense, or None."""
        if blocked is not None:
            return blocked
        if (why := asks_for_gradients(self.denoiser, q, k, v) or record.settled.obstacle(q, k, mask)) is not None:
            return why
        if compat.diffusers.attention_is_skipped():
            return "perturbed-attention guidance skips the scores of this call"
        return None

    # ------------------------------------------------------------------------------------------------------- reports

    def forecasts(self) -> list[Forecast]:
        """What the timings so far predict, by size of the latents."""
        return self.forecaster.forecasts()

    def share_of(self, verdict: Verdict) -> float | None:
        """Share in a forward of the calls that a verdict is about; None where none was measured."""
        return self.meter.share_of(verdict)

    def cached(self) -> str | None:
        """Say what an optional step cache, or one that goes by the length of the run, came to."""
        if self.cache is None or self.caches is None:
            return None
        if self.caches.left_out:
            return f"{self.cache.kind} left out of {self.name}: {self.caches.left_out}"
        if not self.cache.by_run or (steps := self.caches.steps) is None:
            return None
        if self.caches.rests:
            return f"{self.cache.kind} computed every step: {self.caches.rests}"
        if not self.cache.serves(steps):
            return f"{self.cache.kind} computed every step: the run had {steps}, and it is for runs of {self.cache.run}"
        return f"{self.cache.kind} computed {self.cache.computed(steps)} of {steps} steps"

    def guided(self) -> str | None:
        """Say what guidance cost, in forwards and rows."""
        return None if self.guiding is None else self.guiding.report()

    def step(self, index: int | None, steps: int | None) -> None:
        """Take the step that comes in this thread from the user."""
        self.clock.set(index, steps)

    @property
    def seen(self) -> RunFacts:
        """What forwards came by so far, for rules to be held against."""
        layouts = {record.latest.layout for record in self.records if record.latest.layout is not None}
        first = 0 if self.forecaster.takes_turns else min(self.passed.steps, default=0)
        return RunFacts(self.passed.latest.steps, frozenset(self.passed.branches), frozenset(layouts), first)

    def compiled(self) -> list[str]:
        """What ran in compiled code, where calls are not counted: each patch, and at how many modules."""
        traced = [record.latest for record in self.records if record.site and record.traced]
        patches = Counter(latest.choice.name if latest.patch is not None else "dense" for latest in traced)
        return [f"{name} at {number} modules of {self.name}" for name, number in patches.items()]

    def placed(self) -> list[Placed]:
        """What runs where, in this thread's forward or the latest one."""
        guided = [] if self.guiding is None else self.guiding.placed()
        return [*(record.placed(record.site) for record in self.records if record.site), *guided]

    def unrouted(self) -> list[str]:
        """Modules that a rule names, whose attention never came by."""
        return [r.site.module for r in self.records if r.site and r.latest.choice.patch is not None and not r.routed]


class _RegionHook:
    """Pre-hook of one resolution of a UNet."""

    def __init__(self, host: DenoiserHost, region: Region) -> None:
        self.host, self.region = host, region

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module is not self.region.module or torch.compiler.is_compiling():
            return
        self.host.enter(self.region, given(inspect.signature(type(module).forward), args, kwargs))


def _settle_at_trace(ctx: Any) -> None:
    """Settle a denoiser while Dynamo traces its pre-hook: the shapes are known, the tensors are fake."""
    host, args, kwargs = (compat.torch.traced_value(ctx, name) for name in ("self", "args", "kwargs"))
    host.trace_begins()
    inputs = given(host.signature, args, kwargs)
    host.enter_root(inputs, host.family.geometry(getattr(host.denoiser, "config", None), inputs))
    for region in host.regions:
        if region.path:  # the input of a level is not known yet: its last eager forward has to do
            host.settle_and_count(region)


def _dtype_of(attention: Any, latents: torch.dtype | None) -> torch.dtype | None:
    """The dtype that an attention module computes in: that of its weights, or of the latents where these are stored in fewer bits."""
    weight = getattr(getattr(attention, "to_q", None), "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1:
        return weight.dtype
    return latents


def _samples(inputs: Mapping[str, Any], name: str | None) -> Any:
    """The first tensor of numbers among a forward's inputs, or list of them, one for each sample. `name`: the argument that holds the
    latents, where that is another, the last of several."""
    if name is not None:
        named: Any = inputs.get(name)
        return named[-1] if isinstance(named, list | tuple) and named else named
    for x in inputs.values():
        first = x[0] if isinstance(x, list | tuple) and x else x
        if isinstance(first, Tensor) and first.is_floating_point():
            return x
    return None


def _latents(inputs: Mapping[str, Any], name: str | None) -> Tensor | None:
    """What `_samples` finds, as a tensor: of a list the first sample for all."""
    found = _samples(inputs, name)
    return found[0].expand(len(found), *found[0].shape) if isinstance(found, list | tuple) else found
