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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import accelplug
from accelplug import compat
from accelplug.call import AttentionCall, Layout
from accelplug.comparison.texts.reader import kv_bytes
from accelplug.hosts.models import is_language_model, processor_owners
from accelplug.hosts.transformers import LanguageHost
from accelplug.patches.base import Patch
from accelplug.patches.sparse.template import BlockSparse
from accelplug.registry import entry_of, patch_class
from accelplug.testing.encoders import ENCODERS_TRIED
from accelplug.testing.geometry import GEOMETRY_TRIED
from accelplug.testing.language_models import (
    LANGUAGE_MODELS_TRIED,
    answer_of,
    build_language_model,
    row_of,
    word_processor,
)
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
from accelplug.testing.runs import cancel_an_answer, cancel_in_the_model, nothing_of_a_run_is_left


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
    signed : whether outputs are put together with weights of either sign, so that one may fall where what is read grows.
    only : names of the tiny models that it is for; none: all that its host serves.
    faint : settings with which a patch of language models goes its whole way, and the answer is another in the last digits alone;
        none: not tried.
    """

    patch: str
    neutral: Mapping[str, Any] | None
    working: Mapping[str, Any]
    everything: Mapping[str, Any] | None = None
    video_only: bool = False
    pools: bool = False
    graphs: int = 1
    signed: bool = False
    only: tuple[str, ...] = ()
    faint: Mapping[str, Any] | None = None

    @property
    def of_language_models(self) -> bool:
        """Whether it is a patch of language models; else of denoisers."""
        return entry_of(self.patch).family in LanguageHost.serves

    @property
    def of_geometry(self) -> bool:
        """Whether it is a patch of geometry transformers alone."""
        return entry_of(self.patch).family == "geometry"

    @property
    def blocks(self) -> bool:
        """Whether it is block-sparse: takes the settings that all such patches share, and has a plan."""
        return issubclass(patch_class(self.patch), BlockSparse)

    def recipe(self, config: Mapping[str, Any] | None = None, **where: Any) -> dict[str, Any]:
        """Return a recipe of one rule, with the working settings if none are given: blocks of 8, and the kernel in plain torch."""
        common = {"block": 8, "backend": "reference"} if self.blocks else {}
        rule = {"patch": self.patch, "with": {**common, **(self.working if config is None else config)}}
        return {"rules": [{"where": where, **rule} if where else rule]}


Claim = Callable[[Subject, Callable[[], Built]], None]
"""A law: it raises AssertionError where a patch breaks it on the tiny model that is made."""


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

    check: Claim
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
    faint: Mapping[str, Any] | None = None,
    only: tuple[str, ...] = (),
    models: Mapping[str, Callable[[], Built]] | None = None,
) -> list[Law]:
    """Return the laws for a patch, to be called one by one or handed to pytest::

        @pytest.mark.parametrize("law", accelplug.testing.laws(Mine, {"reach": 1}, neutral={"reach": 99}), ids=str)
        def test_laws(law):
            law()

    Parameters
    ----------
    patch : the class, which need not be registered; the name of a patch; or a `Subject`, which says all that follows.
    working, neutral, everything, video_only, pools, faint, only : see `Subject`. Blocks of 8 on grids of 48 to 105 tokens.
    models : tiny models by name, each a function that returns a model and what its forward is given; None: `DENOISERS_TRIED`
        and `ENCODERS_TRIED` for a patch of denoisers, which image encoders take too, `LANGUAGE_MODELS_TRIED` for one of language models,
        `GEOMETRY_TRIED` for one of geometry transformers.

    Raises
    ------
    AccelplugError
        If it is not a patch, or is not finished.
    """
    cls = patch if isinstance(patch, type) else None
    if isinstance(patch, Subject):
        subject = patch
    else:
        name = entry_of(patch).name
        subject = Subject(name, neutral, working or {}, everything, video_only, pools, only=only, faint=faint)
    with registered(cls) if cls is not None else nullcontext():
        blocks, host = subject.blocks, _host_of(subject)
        lets_go, about_text = (entry_of(subject.patch).family == family for family in ("memory", "texts"))
        elsewhere: Mapping[str, Any] = ENCODERS_TRIED if entry_of(subject.patch).family == "guidance" else {}
    found: list[Law] = []
    for check, names in host.laws:
        unsaid: dict[Callable[..., None], bool] = {
            neutral_is_exact: subject.neutral is None,
            the_kernel_at_density_one_is_dense: not subject.everything,
            near_nothing_it_is_the_stock_model: not subject.faint,
            what_is_let_go_of_is_freed: not lets_go,
            text_stays_dense: about_text,
        }
        if not unsaid.get(check) and (blocks or check not in OF_BLOCKS):
            tried = (host.models if models is None else models) if names is None else {name: TRIED[name] for name in names}
            found += [
                Law(check, subject, name, make, cls)
                for name, make in tried.items()
                if name not in elsewhere and (not subject.only or name in subject.only)
            ]
    return found


# ----------------------------------------------------------------------------------------------------------------- the laws


def neutral_is_exact(subject: Subject, make: Callable[[], Built]) -> None:
    """With neutral settings a model gives what it gives without the patch, bit for bit."""
    model, inputs = _built(subject, make)
    dense = run_once(model, inputs)
    with _on(model, subject, subject.neutral):
        assert torch.equal(run_once(model, inputs), dense), f"the output is another with {subject.neutral}"


def it_does_something_and_undoes_it(subject: Subject, make: Callable[[], Built]) -> None:
    """With working settings it runs, every query block reads a key block, the output is another; `remove` gives the very same model."""
    model, inputs = _built(subject, make)
    dense, before = run_once(model, inputs), snapshot_of(model)
    plug = _on(model, subject)
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
            assert event.plan.members.any(-1)[..., event.plan.q_len > 0].all(), "a query block has no key block"
            exact = float(event.plan.density().mean())
            counted = event.density > exact if subject.pools and exact < 1 else abs(event.density - exact) < 1e-6
            assert counted, f"it says that it reads {event.density} of the keys, its plan {exact} of them exactly"
        if not patch_class(subject.patch).speed or any(_is_thinned(event) for event in ran):
            assert not torch.equal(patched, dense), "the output is that of the model without it"
        else:  # a grid on which these settings read everything
            torch.testing.assert_close(patched, dense, rtol=1e-3, atol=1e-4)
    plug.remove()
    assert snapshot_of(model) == before, "something of it is left on the model"
    assert torch.equal(run_once(model, inputs), dense), "the model is another after remove"


def it_changes_the_answer_and_undoes_it(subject: Subject, make: Callable[[], Built]) -> None:
    """With working settings it runs, the answer is another; `remove` gives the very same model."""
    model, inputs = _built(subject, make)
    stock, before = run_once(model, inputs), snapshot_of(model)
    plug = _on(model, subject, strict=True)
    patched = run_once(model, inputs)
    assert torch.isfinite(patched).all(), "the answer is not finite"
    assert plug.report().served[subject.patch], f"it ran nowhere: {plug.report()}"
    assert not plug.report().unrouted, f"attention went past it: {plug.report()}"
    assert not torch.equal(patched, stock), "the answer is that of the model without it"
    plug.remove()
    assert snapshot_of(model) == before, "something of it is left on the model"
    assert torch.equal(run_once(model, inputs), stock), "the model is another after remove"


def near_nothing_it_is_the_stock_model(subject: Subject, make: Callable[[], Built]) -> None:
    """With faint settings it goes its whole way, and the answer is that of the model without it, but for rounding."""
    model, inputs = _built(subject, make)
    stock = run_once(model, inputs)
    with _on(model, subject, subject.faint, strict=True) as plug:
        found = run_once(model, inputs)
        assert plug.report().served[subject.patch], f"it ran nowhere: {plug.report()}"
    torch.testing.assert_close(found, stock, atol=3e-5, rtol=0)


def a_padded_batch_is_its_rows(subject: Subject, make: Callable[[], Built]) -> None:
    """The rows of a batch have no say in each other, nor has their padding."""
    model, inputs = _built(subject, make)
    with _on(model, subject):
        together, *rows = run_once(model, inputs), *(run_once(model, row_of(inputs, row)) for row in (0, 1))
    lengths = inputs["attention_mask"].sum(-1).tolist()
    prompts, said = together[: sum(lengths)].split(lengths), together[sum(lengths) :].unflatten(0, (-1, 2))
    for row, alone in enumerate(rows):
        torch.testing.assert_close(alone, torch.cat([prompts[row], said[:, row]]), atol=1e-4, rtol=1e-4)


def the_kernel_at_density_one_is_dense(subject: Subject, make: Callable[[], Built]) -> None:
    """Where it reads everything through the kernel, the output is that of dense attention, but for rounding."""
    model, inputs = _built(subject, make)
    dense = run_once(model, inputs)
    with _on(model, subject, subject.everything) as plug, plug.trace() as events:
        forced = run_once(model, inputs)
    densities = [event.density for event in events if event.patch == subject.patch]
    if densities or not subject.video_only:
        assert 1.0 in densities, f"its densities are {densities}"
    torch.testing.assert_close(forced, dense, rtol=1e-3, atol=2e-5 * float(dense.abs().max()) + 1e-6)


def batch_two_is_two_batches_of_one(subject: Subject, make: Callable[[], Built]) -> None:
    """The samples of a batch have no say in each other."""
    model, inputs = _built(subject, make)
    both, singles = batch_of_two(inputs)
    for rest in ({"rest": "drop"}, {"rest": "pool"}) if subject.blocks else ({},):
        with _on(model, subject, {**subject.working, **rest}):
            together = run_once(model, both)
            apart = torch.cat([run_once(model, single) for single in singles])
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def text_stays_dense(subject: Subject, make: Callable[[], Built]) -> None:
    """In joint attention text reads every token, and every token reads text."""
    model, inputs = _built(subject, make)
    with _on(model, subject) as plug, plug.trace() as events:
        run_once(model, inputs)
        kinds = {event.site.kind for event in events}
        assert "cross" not in kinds, "cross-attention goes through the patch"
        calls = _calls_of(plug, model, inputs)
    assert calls or subject.video_only or "joint" not in kinds, "it is asked nothing where text stands beside the grid"
    for patch, call, params, layout in calls:
        out, dense = patch.attend(call, params), call.dense()
        text = torch.ones(layout.length, dtype=torch.bool)
        text[layout.text_before : layout.text_before + layout.visual] = False
        if call.mask is not None and call.mask.ndim == 2:
            text &= call.mask.all(0)  # what padding says is nobody's
        asks = torch.zeros_like(text)
        asks[layout.asked] = True
        torch.testing.assert_close(out[:, :, text & asks], dense[:, :, text & asks], rtol=1e-3, atol=1e-4)
        louder = call.v + 100.0 * text[:, None]  # of whatever reads text, the output grows

        grown = patch.attend(replace(call, v=louder, dense=partial(_dense_with, call, louder)), params) - out
        grown = grown.abs() if subject.signed else grown
        assert (grown[:, :, asks] > 1e-5).all(), "a token does not read the text"


def other_instances_and_threads_notice_nothing(subject: Subject, make: Callable[[], Built]) -> None:
    """A model of the same class that runs in another thread at the same time stays as it is."""
    (patched, inputs), (stock, _) = _built(subject, make), _built(subject, make)
    dense, times = run_once(stock, inputs), 4 if subject.of_language_models else 20
    found: list[Tensor] = []
    with _on(patched, subject):
        thread = threading.Thread(target=lambda: found.extend(run_once(stock, inputs) for _ in range(times)))
        thread.start()
        different = [not torch.equal(run_once(patched, inputs), dense) for _ in range(times)]
        thread.join()
    assert all(different), "the patched model ran without its patch"
    assert len(found) == times, "the other thread failed"
    assert all(torch.equal(out, dense) for out in found), "the other model is another"


def low_precision_stays_finite(subject: Subject, make: Callable[[], Built]) -> None:
    """In bfloat16 neutral settings are exact too, and working ones give finite numbers of the model's dtype."""
    model, inputs = _built(subject, make)
    model.to(torch.bfloat16)
    inputs = {name: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    dense = run_once(model, inputs)
    if subject.neutral is not None:
        with _on(model, subject, subject.neutral):
            assert torch.equal(run_once(model, inputs), dense), f"the output is another with {subject.neutral}"
    with _on(model, subject):
        patched = run_once(model, inputs)
    assert patched.dtype == torch.bfloat16, f"the output is {patched.dtype}"
    assert torch.isfinite(patched).all(), "the output is not finite"
    assert not torch.equal(patched, dense), "the output is that of the model without it"


def copies_are_stock(subject: Subject, make: Callable[[], Built]) -> None:
    """A copy or a pickle of the patched model is the model without it, and needs no accelplug (language models that ran have none)."""
    model, inputs = _built(subject, make)
    dense = run_once(model, inputs)
    with _on(model, subject):
        run_once(model, inputs)
        twins = [copy.deepcopy(model)]
        if not subject.of_language_models:
            pickled = pickle.dumps(model)
            assert b"accelplug" not in pickled, "a pickle names accelplug"
            twins.append(pickle.loads(pickled))
        for twin in twins:
            assert torch.equal(run_once(twin, inputs), dense), "a copy is not the stock model"


def nothing_is_left_of_a_run(subject: Subject, make: Callable[[], Built]) -> None:
    """A run behind others, of which one was cancelled, is what it is alone: at the same size, at another one, and for two samples."""
    nothing_of_a_run_is_left(lambda: build_pipeline(make), subject.recipe(), cancel_in_the_model, 2)


def frames_behind_the_first_are_a_set(subject: Subject, make: Callable[[], Built]) -> None:
    """A geometry transformer says the same of frames behind the first in whatever order they come."""
    model, inputs = _built(subject, make)
    ((name, images),) = inputs.items()
    order = [0, *range(images.shape[1] - 1, 0, -1)]
    with _on(model, subject):
        there, back = run_once(model, inputs), run_once(model, {name: images[:, order]})
    torch.testing.assert_close(back, there[:, order], rtol=1e-4, atol=1e-5)


def nothing_is_left_of_an_answer(subject: Subject, make: Callable[[], Built]) -> None:
    """An answer behind others, of which one was cancelled, is what it is alone."""
    model, inputs = _built(subject, make)
    with _on(model, subject):
        alone = run_once(model, inputs)
    with _on(model, subject):
        for forwards in (0, 2):  # in the prompt, and in what is said
            cancel_an_answer(model, {**inputs, "input_ids": inputs["input_ids"].roll(1, 0)}, forwards)
            assert torch.equal(run_once(model, inputs), alone), "the answer is not what it is alone"
        assert torch.equal(run_once(model, inputs), alone), "the same answer again is another"


def what_is_let_go_of_is_freed(subject: Subject, make: Callable[[], Built]) -> None:
    """A cache that has read a prompt holds fewer bytes than the model's own: of whole storages, whatever part of them is read."""
    model, inputs = _built(subject, make)

    def held() -> int:
        with torch.no_grad():
            return kv_bytes(compat.transformers.cache_of(model(**copy.deepcopy(inputs), use_cache=True)))

    whole = held()
    with _on(model, subject, strict=True):
        kept = held()
    assert kept < 0.75 * whole, f"it holds {kept} bytes, the model's own cache {whole}"


@dataclass(frozen=True)
class LawsOfHost:
    """What patches of a sort of models are tried with.

    Attributes
    ----------
    laws : each with the names of the tiny models that it is tried on, in `TRIED`; None for all.
    models : all.
    """

    laws: tuple[tuple[Claim, tuple[str, ...] | None], ...]
    models: Mapping[str, Callable[[], Built]]


ON_DENOISERS = LawsOfHost(
    (
        (neutral_is_exact, None),
        (it_does_something_and_undoes_it, None),
        (
            the_kernel_at_density_one_is_dense,
            ("wan", "wan, one slot filled", "wan, one slot free", "flux", "unet_sd15", "dinov3"),
        ),
        (batch_two_is_two_batches_of_one, ("wan", "cogvideox", "hunyuan_video", "flux", "sd3", "dinov2")),
        (text_stays_dense, ("cogvideox", "hunyuan_video", "flux", "sd3", "dinov3")),
        (other_instances_and_threads_notice_nothing, ("wan",)),
        (low_precision_stays_finite, ("wan",)),
        (copies_are_stock, ("wan", "dinov2")),
        (nothing_is_left_of_a_run, ("wan pipeline",)),
    ),
    DENOISERS_TRIED | ENCODERS_TRIED,
)
ON_LANGUAGE_MODELS = LawsOfHost(
    (
        (neutral_is_exact, None),
        (it_changes_the_answer_and_undoes_it, None),
        (near_nothing_it_is_the_stock_model, ("llava",)),
        (a_padded_batch_is_its_rows, ("llava",)),
        (other_instances_and_threads_notice_nothing, ("llava",)),
        (low_precision_stays_finite, ("llava",)),
        (copies_are_stock, ("llava",)),
        (nothing_is_left_of_an_answer, ("llava",)),
        (what_is_let_go_of_is_freed, ("llava",)),
    ),
    LANGUAGE_MODELS_TRIED,
)
ON_GEOMETRY = LawsOfHost(
    (
        (neutral_is_exact, None),
        (it_does_something_and_undoes_it, None),
        (batch_two_is_two_batches_of_one, ("vggt",)),
        (frames_behind_the_first_are_a_set, ("vggt", "pi3")),
        (other_instances_and_threads_notice_nothing, ("vggt",)),
        (low_precision_stays_finite, ("vggt",)),
    ),
    GEOMETRY_TRIED,
)
TRIED: dict[str, Callable[[], Built]] = {
    **GEOMETRY_TRIED,
    **DENOISERS_TRIED,
    **ENCODERS_TRIED,
    **LANGUAGE_MODELS_TRIED,
    "wan pipeline": wan_pipeline,
}
OF_BLOCKS = (the_kernel_at_density_one_is_dense,)
"""Laws about block-sparse patches alone."""

# ------------------------------------------------------------------------------------------------------ what they are made of


def _host_of(subject: Subject) -> LawsOfHost:
    if subject.of_geometry:
        return ON_GEOMETRY
    return ON_LANGUAGE_MODELS if subject.of_language_models else ON_DENOISERS


def _built(subject: Subject, make: Callable[[], Built]) -> Built:
    return (build_language_model if subject.of_language_models else build_denoiser)(make)


def _on(model: Any, subject: Subject, config: Mapping[str, Any] | None = None, **options: Any) -> accelplug.Plug:
    """Have the patch on, with the working settings if none are given; it stands wherever it may, whatever it costs."""
    processor = word_processor() if subject.of_language_models else None
    return accelplug.apply(model, subject.recipe(config), gate="off", processor=processor, **options)


def run_once(model: Any, inputs: Arguments) -> Tensor:
    """Return what a denoiser gives, or a language model answers (see `answer_of`), from copies of its inputs."""
    if is_language_model(model):
        return answer_of(model, copy.deepcopy(inputs))
    with torch.no_grad():
        return sample_of(model(**copy.deepcopy(inputs)))


def snapshot_of(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model that a plug could leave behind, but for parameters' values."""
    return {
        "vars": {  # transformers puts its capture of outputs there and takes it away as it likes
            path: {name for name in vars(module) if "output_capturing" not in name} for path, module in model.named_modules()
        },
        "configs": {path: id(vars(module).get("config")) for path, module in model.named_modules()},
        "generate": id(vars(model).get("generate")),
        "classes": {path: type(module) for path, module in model.named_modules()},
        "processors": {path: (id(module.processor), type(module.processor)) for path, module in processor_owners(model)},
        "hooks": {
            path: {name: list(held) for name, held in vars(module).items() if name.endswith(("hooks", "hooks_with_kwargs"))}
            for path, module in model.named_modules()
        },
        "state": {key: value.data_ptr() for key, value in model.state_dict().items()},
        "registry": dict(compat.diffusers.processor_metadata()),
        "sdpa": torch.nn.functional.scaled_dot_product_attention,
        "dispatch": compat.diffusers.dispatch_attention_fn(),
        "attention": sorted(ALL_ATTENTION_FUNCTIONS),
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
