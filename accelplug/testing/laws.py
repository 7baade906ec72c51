"""The laws: what holds for every patch on every model, each a function of a `Subject` and of a tiny model to try it on."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import accelplug
from accelplug import compat
from accelplug.call import AttentionCall, Layout
from accelplug.hosts.models import denoisers, processor_owners
from accelplug.patches.base import Patch
from accelplug.patches.sparse.template import BlockSparse
from accelplug.registry import entry_of, patch_class
from accelplug.testing.models import (
    DENOISERS_TRIED,
    Arguments,
    Built,
    batch_of_two,
    build_denoiser,
    build_pipeline,
    sample_of,
    wan_pipeline,
)
from accelplug.testing.registered import registered


@dataclass(frozen=True)
class Subject:
    """A patch, and the settings that the laws try it with.

    Attributes
    ----------
    patch : its name in recipes.
    neutral : settings with which it reads all there is, and so leaves a model as it is, bit for bit; None without such settings.
    working : settings with which it changes what a model gives.
    everything : settings with which a block-sparse patch reads all there is too, but through the kernel; none: not tried.
    video_only : whether it reads every key of images and of two frames.
    pools : whether key blocks that are not read exactly cost one key each.
    graphs : compiled graphs that layers of one policy take at most: as many as there are ways of lining tokens up by layer.
    """

    patch: str
    neutral: Mapping[str, Any] | None
    working: Mapping[str, Any]
    everything: Mapping[str, Any] | None = None
    video_only: bool = False
    pools: bool = False
    graphs: int = 1

    @property
    def blocks(self) -> bool:
        """Whether it is block-sparse: takes the settings that all such patches share, and has a plan."""
        return issubclass(patch_class(self.patch), BlockSparse)

    def recipe(self, config: Mapping[str, Any] | None = None, **where: Any) -> dict[str, Any]:
        """Return a recipe of one rule, with the working settings if none are given: blocks of 8, and the kernel in plain torch."""
        common = {"block": 8, "backend": "reference"} if self.blocks else {}
        rule = {"patch": self.patch, "with": {**common, **(self.working if config is None else config)}}
        return {"rules": [{"where": where, **rule} if where else rule]}


@dataclass(frozen=True)
class Law:
    """A law about a patch on one tiny model. Call it: it raises AssertionError where it does not hold. As text it is its name.

    Attributes
    ----------
    check : the law.
    subject : the patch, and the settings that it is tried with.
    model : name of the tiny model.
    make : makes it, and what it is given.
    cls : the class of the patch, registered while the law is tried; None for a patch that is known by its name.
    """

    check: Callable[[Subject, Callable[[], Built]], None]
    subject: Subject
    model: str
    make: Callable[[], Built]
    cls: type[Patch] | None = None

    def __call__(self) -> None:
        with registered(self.cls) if self.cls is not None else nullcontext():
            try:
                self.check(self.subject, self.make)
            except AssertionError as error:
                law = self.check.__name__.replace("_", " ")
                raise AssertionError(f"{self.subject.patch} on {self.model}, {law}: {error}") from error

    def __str__(self) -> str:
        return f"{self.subject.patch}-{self.check.__name__}-{self.model}"


def laws(
    patch: str | type[Patch] | Subject,
    working: Mapping[str, Any] | None = None,
    *,
    neutral: Mapping[str, Any] | None = None,
    everything: Mapping[str, Any] | None = None,
    video_only: bool = False,
    pools: bool = False,
    models: Mapping[str, Callable[[], Built]] = DENOISERS_TRIED,
) -> list[Law]:
    """Return the laws for a patch of denoisers, to be called one by one or handed to pytest::

        @pytest.mark.parametrize("law", accelplug.testing.laws(Mine, {"reach": 1}, neutral={"reach": 99}), ids=str)
        def test_laws(law):
            law()

    Parameters
    ----------
    patch : the class, which need not be registered; the name of a patch; or a `Subject`, which says all that follows.
    working, neutral, everything, video_only, pools : see `Subject`. Blocks of 8 on grids of 48 to 105 tokens.
    models : tiny denoisers by name, each a function that returns a model and what its forward is given.

    Raises
    ------
    AccelplugError
        If it is not a patch, is not finished, or is one of language models.
    """
    cls = patch if isinstance(patch, type) else None
    if not isinstance(patch, Subject):
        subject = Subject(entry_of(patch).name, neutral, working or {}, everything, video_only, pools)
    else:
        subject = patch
    with registered(cls) if cls is not None else nullcontext():
        blocks = subject.blocks
    found: list[Law] = []
    for check, names in LAWS:
        unsaid = (check is neutral_is_exact and subject.neutral is None) or (
            check is the_kernel_at_density_one_is_dense and not subject.everything
        )
        if not unsaid and (blocks or check not in OF_BLOCKS):
            tried = models if names is None else {name: TRIED[name] for name in names}
            found += [Law(check, subject, name, make, cls) for name, make in tried.items()]
    return found


# ----------------------------------------------------------------------------------------------------------------- the laws


def neutral_is_exact(subject: Subject, make: Callable[[], Built]) -> None:
    """With neutral settings a model gives what it gives without the patch, bit for bit."""
    model, inputs = build_denoiser(make)
    dense = run_once(model, inputs)
    with accelplug.apply(model, subject.recipe(subject.neutral or {}), gate="off"):
        assert torch.equal(run_once(model, inputs), dense), f"the output is another with {subject.neutral}"


def it_does_something_and_undoes_it(subject: Subject, make: Callable[[], Built]) -> None:
    """With working settings it runs, every query block reads a key block, the output is another; `remove` gives the very same model."""
    model, inputs = build_denoiser(make)
    dense, before = run_once(model, inputs), snapshot_of(model)
    plug = accelplug.apply(model, subject.recipe(), gate="off")
    with plug.trace(plans=True) as events:
        patched = run_once(model, inputs)
    assert torch.isfinite(patched).all(), "the output is not finite"
    ran = [event for event in events if event.patch == subject.patch]
    if subject.video_only and not any(row.params for row in plug.where()):
        frames = {row.layout.grid_thw[0] for row in plug.where() if isinstance(row.layout, Layout)}
        assert frames, "no layout was understood"
        assert max(frames) <= 2, f"it ran nowhere in {max(frames)} frames"
        assert torch.equal(patched, dense), "it ran nowhere, and the output is another"
    else:
        assert ran, f"it ran nowhere: {plug.report()}"
        for event in ran if subject.blocks else ():
            assert event.plan is not None, "it has no block plan"
            assert event.density is not None, "it does not say what share of the keys it reads"
            assert event.plan.members.any(-1).all(), "a query block has no key block"
            exact = float(event.plan.density().mean())
            counted = event.density > exact if subject.pools and exact < 1 else abs(event.density - exact) < 1e-6
            assert counted, f"it says that it reads {event.density} of the keys, its plan {exact} of them exactly"
        if any(_is_thinned(event) for event in ran):
            assert not torch.equal(patched, dense), "the output is that of the model without it"
        else:  # a grid on which these settings read everything
            torch.testing.assert_close(patched, dense, rtol=1e-3, atol=1e-4)
    plug.remove()
    assert snapshot_of(model) == before, "something of it is left on the model"
    assert torch.equal(run_once(model, inputs), dense), "the model is another after remove"


def the_kernel_at_density_one_is_dense(subject: Subject, make: Callable[[], Built]) -> None:
    """Where it reads everything through the kernel, the output is that of dense attention, but for rounding."""
    model, inputs = build_denoiser(make)
    dense = run_once(model, inputs)
    with accelplug.apply(model, subject.recipe(subject.everything or {}), gate="off") as plug, plug.trace() as events:
        forced = run_once(model, inputs)
    densities = [event.density for event in events if event.patch == subject.patch]
    if densities or not subject.video_only:
        assert 1.0 in densities, f"its densities are {densities}"
    torch.testing.assert_close(forced, dense, rtol=1e-3, atol=2e-5 * float(dense.abs().max()) + 1e-6)


def batch_two_is_two_batches_of_one(subject: Subject, make: Callable[[], Built]) -> None:
    """The samples of a batch have no say in each other."""
    model, inputs = build_denoiser(make)
    both, singles = batch_of_two(inputs)
    for rest in ({"rest": "drop"}, {"rest": "pool"}) if subject.blocks else ({},):
        with accelplug.apply(model, subject.recipe({**subject.working, **rest}), gate="off"):
            together = run_once(model, both)
            apart = torch.cat([run_once(model, single) for single in singles])
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def text_stays_dense(subject: Subject, make: Callable[[], Built]) -> None:
    """In joint attention text reads every token, and every token reads text."""
    model, inputs = build_denoiser(make)
    with accelplug.apply(model, subject.recipe(), gate="off") as plug, plug.trace() as events:
        run_once(model, inputs)
        kinds = {event.site.kind for event in events}
        assert "cross" not in kinds, "cross-attention goes through the patch"
        calls = _calls_of(plug, model, inputs)
    assert calls or subject.video_only or "joint" not in kinds, "it is asked nothing where text stands beside the grid"
    for patch, call, params, layout in calls:
        out, dense = patch.attend(call, params), call.dense()
        text = torch.ones(layout.length, dtype=torch.bool)
        text[layout.text_before : layout.text_before + layout.visual] = False
        torch.testing.assert_close(out[:, :, text], dense[:, :, text], rtol=1e-3, atol=1e-4)
        louder = call.v + 100.0 * text[:, None]  # of whatever reads text, the output grows

        grown = patch.attend(replace(call, v=louder, dense=partial(_dense_with, call, louder)), params) - out
        assert (grown > 1e-5).all(), "a token does not read the text"


def other_instances_and_threads_notice_nothing(subject: Subject, make: Callable[[], Built]) -> None:
    """A model of the same class that runs in another thread at the same time stays as it is."""
    (patched, inputs), (stock, _) = build_denoiser(make), build_denoiser(make)
    dense = run_once(stock, inputs)
    found: list[Tensor] = []
    with accelplug.apply(patched, subject.recipe(), gate="off"):
        thread = threading.Thread(target=lambda: found.extend(run_once(stock, inputs) for _ in range(20)))
        thread.start()
        different = [not torch.equal(run_once(patched, inputs), dense) for _ in range(20)]
        thread.join()
    assert all(different), "the patched model ran without its patch"
    assert len(found) == 20, "the other thread failed"
    assert all(torch.equal(out, dense) for out in found), "the other model is another"


def low_precision_stays_finite(subject: Subject, make: Callable[[], Built]) -> None:
    """In bfloat16 neutral settings are exact too, and working ones give finite numbers of the model's dtype."""
    model, inputs = build_denoiser(make)
    model.to(torch.bfloat16)
    inputs = {name: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    dense = run_once(model, inputs)
    if subject.neutral is not None:
        with accelplug.apply(model, subject.recipe(subject.neutral), gate="off"):
            assert torch.equal(run_once(model, inputs), dense), f"the output is another with {subject.neutral}"
    with accelplug.apply(model, subject.recipe(), gate="off"):
        patched = run_once(model, inputs)
    assert patched.dtype == torch.bfloat16, f"the output is {patched.dtype}"
    assert torch.isfinite(patched).all(), "the output is not finite"
    assert not torch.equal(patched, dense), "the output is that of the model without it"


def copies_are_stock(subject: Subject, make: Callable[[], Built]) -> None:
    """A copy or a pickle of the patched model is the model without it, and needs no accelplug."""
    model, inputs = build_denoiser(make)
    dense = run_once(model, inputs)
    with accelplug.apply(model, subject.recipe(), gate="off"):
        run_once(model, inputs)
        pickled = pickle.dumps(model)
        assert b"accelplug" not in pickled, "a pickle names accelplug"
        for twin in (copy.deepcopy(model), pickle.loads(pickled)):
            assert torch.equal(run_once(twin, inputs), dense), "a copy is not the stock model"


def nothing_is_left_of_a_run(subject: Subject, make: Callable[[], Built]) -> None:
    """A run behind others, of which one was cancelled, is what it is alone: at the same size, at another one, and for two samples."""
    nothing_of_a_run_is_left(lambda: build_pipeline(make), subject.recipe(), cancel_in_the_model, 2)


LAWS: tuple[tuple[Callable[[Subject, Callable[[], Built]], None], tuple[str, ...] | None], ...] = (
    (neutral_is_exact, None),
    (it_does_something_and_undoes_it, None),
    (the_kernel_at_density_one_is_dense, ("wan", "wan, one slot filled", "wan, one slot free", "flux", "unet_sd15")),
    (batch_two_is_two_batches_of_one, ("wan", "cogvideox", "hunyuan_video", "flux", "sd3")),
    (text_stays_dense, ("cogvideox", "hunyuan_video", "flux", "sd3")),
    (other_instances_and_threads_notice_nothing, ("wan",)),
    (low_precision_stays_finite, ("wan",)),
    (copies_are_stock, ("wan",)),
    (nothing_is_left_of_a_run, ("wan pipeline",)),
)
"""Each law, and the models that it is tried on; None for all."""

TRIED: dict[str, Callable[[], Built]] = {**DENOISERS_TRIED, "wan pipeline": wan_pipeline}
OF_BLOCKS = (the_kernel_at_density_one_is_dense,)
"""Laws about block-sparse patches alone."""

# ------------------------------------------------------------------------------------------------------ what they are made of


def run_once(model: nn.Module, inputs: Arguments) -> Tensor:
    """Return what a denoiser gives, from copies of its inputs."""
    with torch.no_grad():
        return sample_of(model(**copy.deepcopy(inputs)))


def snapshot_of(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model that a plug could leave behind, but for parameters' values."""
    return {
        "vars": {path: set(vars(module)) for path, module in model.named_modules()},
        "classes": {path: type(module) for path, module in model.named_modules()},
        "processors": {path: (id(module.processor), type(module.processor)) for path, module in processor_owners(model)},
        "hooks": {
            path: (list(module._forward_hooks), list(module._forward_pre_hooks), list(module._forward_pre_hooks_with_kwargs))
            for path, module in model.named_modules()
        },
        "state": {key: value.data_ptr() for key, value in model.state_dict().items()},
        "registry": dict(compat.diffusers.processor_metadata()),
        "sdpa": torch.nn.functional.scaled_dot_product_attention,
        "dispatch": compat.diffusers.dispatch_attention_fn(),
        "rng": torch.get_rng_state().tolist(),
    }


def _is_thinned(event: Any) -> bool:
    return event.density < 0.999 or (event.plan is not None and event.plan.box is not None)


def _calls_of(plug: Any, model: nn.Module, inputs: Arguments) -> list[tuple[Patch, AttentionCall, Any, Layout]]:
    """What the patches of a plug are asked in a forward, where text stands beside the grid."""
    calls: list[tuple[Patch, AttentionCall, Any, Layout]] = []
    layouts = {row.layout.length: row.layout for row in plug.where() if isinstance(row.layout, Layout)}

    def listen(patch: Patch) -> None:
        attend = patch.attend

        def heard(call: AttentionCall, params: Any) -> Tensor:
            layout = layouts[call.q.shape[2]]
            if layout.visual < layout.length:
                calls.append((patch, call, params, layout))
            return attend(call, params)

        vars(patch)["attend"] = heard

    patches = {id(row.patch): row.patch for row in plug.where() if row.patch is not None}
    for patch in patches.values():
        listen(patch)
    run_once(model, inputs)
    for patch in patches.values():
        del vars(patch)["attend"]
    return calls


def _dense_with(call: AttentionCall, values: Tensor, q: Any = None, k: Any = None, v: Any = None, **more: Any) -> Tensor:
    """Dense attention of a call whose values are others."""
    return call.dense(q, k, values if v is None else v, **more)


# ---------------------------------------------------------------------------------------------------------------------- runs


class Cancelled(KeyboardInterrupt):
    """Somebody wants no more of a run."""


def run_pipeline(pipe: Any, inputs: Arguments, seed: int = 0, **more: Any) -> Tensor:
    """Return what a pipeline gives at a seed, from copies of its inputs."""
    return pipe(**{**copy.deepcopy(inputs), **more}, generator=torch.Generator().manual_seed(seed))[0]


def another_prompt(inputs: Arguments) -> Arguments:
    """Return the inputs of a pipeline with other embeddings."""
    return {
        name: given.flip(-1) * 1.5 if isinstance(given, Tensor) and "embeds" in name and given.is_floating_point() else given
        for name, given in inputs.items()
    }


def other_way_up(inputs: Arguments) -> Arguments:
    """Return the inputs of a pipeline with height and width exchanged: another grid of as many tokens."""
    return {**inputs, "height": inputs["width"], "width": inputs["height"]}


def two_samples(inputs: Arguments) -> Arguments:
    """Return the inputs of a pipeline, for two samples at a time."""
    name = "num_videos_per_prompt" if "num_frames" in inputs else "num_images_per_prompt"
    return {**inputs, name: 2}


def cancel_in_a_callback(pipe: Any, inputs: Arguments, step: int) -> None:
    """Run a pipeline, and interrupt it at the end of a step."""

    def callback(pipe: Any, at: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if at == step:
            raise Cancelled
        return given

    _run_until_cancelled(pipe, inputs, callback_on_step_end=callback)


def cancel_in_the_model(pipe: Any, inputs: Arguments, step: int) -> None:
    """Run a pipeline until a forward of its denoiser is cancelled, where its blocks have run and its output has not."""
    forwards = []
    denoiser = next(iter(denoisers(pipe).values()))
    attention = [path for path, module in denoiser.named_modules() if "processor" in vars(module)]
    last = next((path for path in ("proj_out", "conv_out") if hasattr(denoiser, path)), attention[-1])

    def count(*_: Any) -> None:
        forwards.append(1)

    def interrupt(*_: Any) -> None:
        if len(forwards) > step:
            raise Cancelled

    handles = [denoiser.register_forward_pre_hook(count), denoiser.get_submodule(last).register_forward_pre_hook(interrupt)]
    try:
        _run_until_cancelled(pipe, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _run_until_cancelled(pipe: Any, inputs: Arguments, **more: Any) -> None:
    try:
        run_pipeline(pipe, inputs, seed=9, **more)
    except Cancelled:
        return
    raise AssertionError("the run was not cancelled")


def nothing_of_a_run_is_left(
    make: Callable[[], tuple[Any, Arguments]],
    recipe: Mapping[str, Any],
    cancel: Callable[[Any, Arguments, int], None],
    step: int,
) -> None:
    """Try that a run behind a cancelled one gives what it gives with a plug of its own, for three kinds of inputs, and once more."""
    pipe, inputs = make()
    kinds = [inputs, other_way_up(inputs), two_samples(inputs)]
    alone = []
    for kind in kinds:
        with accelplug.apply(pipe, recipe, gate="off"):
            alone.append(run_pipeline(pipe, kind))
    with accelplug.apply(pipe, recipe, gate="off"):
        for kind, expected in zip(kinds, alone, strict=True):
            cancel(pipe, another_prompt(inputs), step)
            assert torch.equal(run_pipeline(pipe, kind), expected), "the run is not what it is alone"
        for _ in range(2):
            assert torch.equal(run_pipeline(pipe, inputs), alone[0]), "the same run again is another"
