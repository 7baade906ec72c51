"""Private names of diffusers, each with its contract below."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from accelplug.compat.contracts import contract, expect
from accelplug.step_caches import CACHES

ENTRY_POINTS = frozenset({"dispatch_attention_fn", "scaled_dot_product_attention"})
"""The two names by which every processor of diffusers reaches attention."""


def dispatch_attention_fn() -> Callable[..., Any]:
    """Return diffusers' attention dispatcher."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn


@contract("diffusers: dispatch_attention_fn attends as asked")
def _dispatcher() -> None:
    import torch

    parameters = inspect.signature(dispatch_attention_fn()).parameters
    missing = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "backend"} - set(parameters)
    expect(not missing, f"dispatch_attention_fn lacks the parameters {sorted(missing)}")
    q, k, v = torch.randn(3, 1, 4, 2, 8)  # (B, S, H, D)
    mask = torch.tensor([True, True, True, False]).expand(1, 1, 4, 4)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
    out = dispatch_attention_fn()(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=0.5)
    expect(
        torch.allclose(out, expected, atol=1e-5), "dispatch_attention_fn does not answer (B, S, H, D) as scale and mask say"
    )


def denoiser_classes() -> tuple[str, ...]:
    """Return the names of all classes that stand among diffusers' denoisers, in ``models.transformers`` and ``models.unets``."""
    import torch
    from diffusers.models import transformers, unets

    found = (cls for package in (transformers, unets) for cls in vars(package).values())
    return tuple(cls.__name__ for cls in found if isinstance(cls, type) and issubclass(cls, torch.nn.Module))


@contract("diffusers: denoisers stand in models.transformers and models.unets")
def _denoiser_classes() -> None:
    missing = {"WanTransformer3DModel", "FluxTransformer2DModel", "UNet2DConditionModel"} - set(denoiser_classes())
    expect(not missing, f"among the denoisers there is no {', '.join(sorted(missing))}")


@contract("diffusers: processors reach attention by the two known names")
def _processor_entry_points() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    for processor in (AttnProcessor2_0, WanAttnProcessor):
        names = set(inspect.getattr_static(processor, "__call__").__code__.co_names)
        expect(names & ENTRY_POINTS, f"{processor.__name__}.__call__ uses none of {sorted(ENTRY_POINTS)}")


def context_parallel_attention() -> Callable[..., Any]:
    """Return what diffusers' backends run attention through where tokens are shared out over ranks."""
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    return _templated_context_parallel_attention


def parallel_config(part: Any) -> Any:
    """Return how a diffusers model or processor is spread over processes, or None."""
    return getattr(part, "_parallel_config", None)


def shares_heads(denoiser: Any) -> tuple[int, int]:
    """Return which part of how many of each layer's heads attention of a diffusers model has here; (0, 1): all."""
    config = parallel_config(denoiser)
    tensors, context = (getattr(config, f"{kind}_parallel_config", None) for kind in ("tensor", "context"))
    if tensors is not None:
        return tensors._mesh.get_local_rank(), tensors._mesh.size()
    return (0, 1) if context is None else (context._ulysses_local_rank, context.ulysses_degree)


def is_parallel(part: Any) -> bool:
    """Whether several processes hold one diffusers model between them."""
    return parallel_config(part) is not None


def blocks_of(pipe: Any) -> list[Any]:
    """Return the blocks of a modular pipeline, the outermost first; none of a classic one."""
    outermost = getattr(pipe, "_blocks", None)
    found = [] if outermost is None else [outermost]
    for block in found:  # it grows on the way
        found += block.sub_blocks.values()
    return found


def arguments_of(pipe: Any) -> dict[str, Any] | None:
    """Return the arguments of a pipeline's call with their defaults, None of those that have none; None where it takes any name."""
    if blocks := blocks_of(pipe):
        return {given.name or given.kwargs_type: given.default for given in blocks[0].inputs}
    taken = inspect.signature(type(pipe).__call__).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return None
    defaults = {parameter.name: parameter.default for parameter in taken if parameter.name != "self"}
    return {name: None if default is inspect.Parameter.empty else default for name, default in defaults.items()}


def outputs_of(pipe: Any) -> frozenset[str]:
    """Return what the innermost blocks of a modular pipeline leave in its state, by name; nothing of a classic one.

    The outermost one may name what a block made that is there no more.
    """
    innermost = [block for block in blocks_of(pipe) if not block.sub_blocks]
    return frozenset(given.name for block in innermost for given in block.intermediate_outputs)


@contract("diffusers: a modular pipeline says what it takes and leaves, by blocks in blocks")
def _blocks_in_blocks() -> None:
    pipe = _modular_pipeline()
    found = [type(block).__name__ for block in blocks_of(pipe)]
    expect(found[1:] == ["Loop", "Step"], "a modular pipeline's blocks are not at _blocks, and in their sub_blocks")
    expect(arguments_of(pipe) == {"steps": 3, "height": 8}, f"inputs of blocks are found as {arguments_of(pipe)}")
    expect(outputs_of(pipe) == {"images"}, f"outputs of blocks are found as {set(outputs_of(pipe))}")
    expect(pipe(height=4).get("images") == 4, "a modular pipeline's call does not return a state that has its outputs")
    expect(not blocks_of(_pipeline()) and not outputs_of(_pipeline()), "a classic pipeline is taken for a modular one")


def _modular_pipeline() -> Any:
    from diffusers.modular_pipelines import modular_pipeline as library
    from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

    class Step(library.ModularPipelineBlocks):
        inputs = (InputParam("height", default=8),)
        intermediate_outputs = (OutputParam("images"),)

        def __call__(self, components: Any, block_state: Any, i: int) -> Any:
            block_state.images = block_state.height
            return components, block_state

    class Loop(library.LoopSequentialPipelineBlocks):
        block_classes, block_names = [Step], ["step"]
        loop_inputs = (InputParam("steps", default=3),)

        def __call__(self, components: Any, state: Any) -> Any:
            block_state = self.get_block_state(state)
            with self.progress_bar(total=block_state.steps):
                for i in range(block_state.steps):
                    components, block_state = self.loop_step(components, block_state, i=i)
            self.set_block_state(state, block_state)
            return components, state

    return library.ModularPipeline(library.SequentialPipelineBlocks.from_blocks_dict({"loop": Loop()}))


LATENT_PIXELS = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor")
LATENT_FRAMES = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
"""What pipelines call the pixels and the frames that make one latent."""


def latent_size(pipe: Any, config: Any, given: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return latent frames, rows and columns of a pipeline's call: by the sizes `given`, else by its own; None where it has none.

    Parameters
    ----------
    config : of its denoiser.
    given : arguments of the call: num_frames, height, width.
    """
    taken = arguments_of(pipe) or {}
    by, by_frames = (
        next(filter(None, (getattr(pipe, name, None) for name in names)), None) for names in (LATENT_PIXELS, LATENT_FRAMES)
    )
    side = getattr(pipe, "default_sample_size", None) or getattr(config, "sample_size", None)
    own = dict(zip(("height", "width"), side if isinstance(side, list | tuple) else (side, side), strict=True))
    own |= {name: found for name in own if (found := getattr(config, f"sample_{name}", None))}
    if hasattr(pipe, "canvas_multiple"):
        return _latent_size_of_h3(pipe, {**taken, **given})

    def latents(name: str) -> int | None:
        pixels = given.get(name) or taken.get(name)
        return pixels // by if isinstance(pixels, int) and by else own[name]

    frames = given.get("num_frames") or taken.get("num_frames")
    frames = frames or getattr(config, "sample_frames", None) if by_frames else 1
    rows, columns = latents("height"), latents("width")
    if not (frames and rows and columns) or (by_frames and "num_frames" not in taken):
        return None
    return (frames - 1) // (by_frames or 1) + 1, rows, columns


def _latent_size_of_h3(pipe: Any, given: Mapping[str, Any]) -> tuple[int, int, int]:
    """MiniMax-H3 has a canvas of its own, and frames in groups; its pipeline's module counts them."""
    from diffusers.modular_pipelines.minimax_h3 import modular_pipeline as h3

    height, width = given.get("height"), given.get("width")
    if height is None or width is None:
        settings = pipe.config.canvas_short_edge, pipe.config.canvas_max_pixels
        height, width = h3.resolve_canvas_size(16, 9, pipe.canvas_multiple, *settings)
    groups = pipe.vae_frames_per_chunk, pipe.vae_latents_per_chunk
    frames = h3.video_latent_num_frames(h3.align_num_frames(given.get("num_frames") or 124, *groups), *groups)
    return frames, height // pipe.vae_spatial_compression_ratio, width // pipe.vae_spatial_compression_ratio


@contract("diffusers: pipelines say how many pixels and frames make one latent")
def _latent_size() -> None:
    from diffusers import FluxPipeline, LTXPipeline, MochiPipeline, WanPipeline

    for cls, names in ((WanPipeline, 0), (LTXPipeline, 1), (MochiPipeline, 2), (FluxPipeline, 3)):
        kept = cls.__init__.__code__.co_names
        expect(
            {LATENT_PIXELS[names], *LATENT_FRAMES[names : names + 1]} <= set(kept),
            f"{cls.__name__} does not keep {LATENT_PIXELS[names]}",
        )


@contract("diffusers: parallel models and processors say so, and attention runs through a function that takes another's")
def _parallel() -> None:
    from diffusers.models._modeling_parallel import ContextParallelConfig, TensorParallelConfig

    for part in (_tiny_denoiser(), _tiny_denoiser().blocks[0].attn1.processor):
        expect(hasattr(part, "_parallel_config"), f"{type(part).__name__} has no _parallel_config")
        expect(not is_parallel(part), f"{type(part).__name__} in one process is taken for a parallel one")
    missing = {"forward_op", "backward_op", "_parallel_config"} - set(
        inspect.signature(context_parallel_attention()).parameters
    )
    expect(not missing, f"_templated_context_parallel_attention lacks the parameters {sorted(missing)}")
    for config, names in (
        (ContextParallelConfig, {"ulysses_degree", "ring_degree", "_ulysses_local_rank"}),
        (TensorParallelConfig, {"_mesh"}),
    ):
        missing = names - set(config.__dataclass_fields__)
        expect(not missing, f"{config.__name__} lacks {sorted(missing)}")


REGISTRY = "_diffusers_hook"
"""Attribute of a module that holds its hook registry."""


def hook_types() -> tuple[type, type, type, type]:
    """Return diffusers' ``HookRegistry, ModelHook, StateManager, BaseState``."""
    from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager

    return HookRegistry, ModelHook, StateManager, BaseState


def listen_first(registry: Any, name: str, hook: Any) -> None:
    """Put a hook that does not wrap ``forward`` first in a registry's lists: removing another relinks only what stands behind that one."""
    hook.fn_ref = None
    registry._hook_order.insert(0, name)
    registry._fn_refs.insert(0, None)
    registry.hooks[name] = hook


def stop_listening(names: dict[str, Any], name: str) -> None:
    """Take back what `listen_first` did to the ``__dict__`` of a registry, however far it came."""
    if name in names.get("_hook_order", ()):
        index = names["_hook_order"].index(name)
        del names["_hook_order"][index], names["_fn_refs"][index]
    names["hooks"].pop(name, None)


@contract("diffusers: a hook of ours hears contexts and the end of a run, and is taken away")
def _listening() -> None:
    registry_type, hook_type, manager_type, state_type = hook_types()
    heard: list[Any] = []

    class Manager(manager_type):  # type: ignore[misc, valid-type]
        def set_context(self, context: Any) -> None:
            heard.append(getattr(context, "name", context))

    class Hook(hook_type):  # type: ignore[misc, valid-type]
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.manager = Manager(state_type)

        def reset_state(self, module: Any) -> Any:
            heard.append("reset")
            return module

    denoiser = _tiny_denoiser()
    before = set(vars(denoiser))
    registry: Any = registry_type(denoiser)
    setattr(denoiser, REGISTRY, registry)
    listen_first(registry, "accelplug_contract", Hook())
    found = registry_type.check_if_exists_or_initialize(denoiser)  # type: ignore[attr-defined]
    expect(found is registry, f"HookRegistry.check_if_exists_or_initialize does not look for {REGISTRY}")
    registry.register_hook(hook_type(), "accelplug_behind")
    _denoise(denoiser, "cond")
    expect(heard == ["cond", None], f"cache_context is heard as {heard}: stateful hooks are not those with _is_stateful")
    _pipeline(denoiser).maybe_free_model_hooks()
    expect(heard[2:] == ["reset"], "the end of a pipeline's run does not reset the hooks of its denoiser")
    registry.remove_hook("accelplug_behind", recurse=False)
    stop_listening(vars(registry), "accelplug_contract")
    expect(not registry.hooks, "a hook that was taken away is still in the registry")
    left = set(vars(denoiser)) - before
    expect(left <= set(left_behind(vars(denoiser))), f"a hook leaves {sorted(left)} behind")
    _denoise(denoiser, "cond")
    expect(len(heard) == 3, "a hook that was taken out of _hook_order still hears")


@contextmanager
def in_context(denoiser: Any, name: str, outer: Any) -> Iterator[None]:
    """Have a cache context of another name on a denoiser for a moment, in place of `outer`, as it was heard (None: none was on)."""
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    _set_cache_context(denoiser, CacheContext(name) if outer is None else dataclasses.replace(outer, name=name))
    try:
        yield
    finally:
        _set_cache_context(denoiser, outer)


@contract("diffusers: a cache context gives way to another for a moment")
def _contexts_in_contexts() -> None:
    registry_type, hook_type, manager_type, state_type = hook_types()
    heard: list[Any] = []

    class Manager(manager_type):  # type: ignore[misc, valid-type]
        def set_context(self, context: Any) -> None:
            heard.append(context)

    denoiser, hook = _tiny_denoiser(), hook_type()
    hook._is_stateful, hook.manager = True, Manager(state_type)
    setattr(denoiser, REGISTRY, registry_type(denoiser))
    listen_first(vars(denoiser)[REGISTRY], "accelplug_contract", hook)
    with denoiser.cache_context("cond"), in_context(denoiser, "perturbed", heard[-1]):
        pass
    names = [getattr(context, "name", context) for context in heard]
    expect(names == ["cond", "perturbed", "cond", None], f"a context in a context is heard as {names}")


_CACHES = tuple(f"diffusers.hooks.{kind}_cache" for kind in CACHES)
"""Where the hooks of step caches are defined."""


def hooks_on(denoiser: Any) -> int:
    """Return how many hooks of diffusers are on the modules of a denoiser."""
    return sum(len(vars(module)[REGISTRY].hooks) for module in denoiser.modules() if REGISTRY in vars(module))


def step_cache(denoiser: Any) -> Any:
    """Return the config of the step cache that is on a denoiser, or None."""
    return getattr(denoiser, "_cache_config", None)


def disable_cache(denoiser: Any, config: Any) -> None:
    """Disable the step cache that ``enable_cache(config)`` has put on, or would have if nothing had interrupted it."""
    if denoiser._cache_config is None:
        denoiser._cache_config = config
    if denoiser._cache_config is config:
        denoiser.disable_cache()


def left_behind(names: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what stays in a module's ``__dict__`` of a cache that was disabled, or is on, but for what others' hooks need."""
    registry = names.get(REGISTRY)
    of_others = registry is not None and any(type(hook).__module__ not in _CACHES for hook in registry.hooks.values())
    return ("_cache_config",) if of_others else ("forward", REGISTRY, "_cache_config")


@contract("diffusers: a step cache is known while it is on, and what it leaves behind")
def _step_caches() -> None:
    import diffusers

    denoiser = _tiny_denoiser()
    before = {module: set(vars(module)) for module in denoiser.modules()}
    for config in (diffusers.FirstBlockCacheConfig(), diffusers.TaylorSeerCacheConfig(use_lite_mode=True)):
        denoiser.enable_cache(config)
        expect(step_cache(denoiser) is config, "the config of a step cache is not at _cache_config")
        expect(hooks_on(denoiser) > 0, f"a step cache puts no hooks where {REGISTRY} is")
        disable_cache(denoiser, config)
        expect(step_cache(denoiser) is None, "_cache_config of a step cache that is off is not None")
        expect(hooks_on(denoiser) == 0, "a step cache that is off leaves hooks")
        for module, names in before.items():
            left = set(vars(module)) - names
            expect(left <= set(left_behind(vars(module))), f"a step cache leaves {sorted(left)} behind")


def set_cache(denoiser: Any, settings: Mapping[str, Any]) -> None:
    """Set what the hooks of the step cache on a denoiser go by, where they have it."""
    for module in denoiser.modules():
        registry = vars(module).get(REGISTRY)
        for hook in registry.hooks.values() if registry is not None else ():
            if type(hook).__module__ in _CACHES:
                vars(hook).update({name: value for name, value in settings.items() if name in vars(hook)})


@contract("diffusers: TaylorSeer's hooks say from which step on they predict, and go by it at once")
def _cache_settings() -> None:
    import diffusers

    denoiser, calls = _tiny_denoiser(), []
    denoiser.enable_cache(diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, use_lite_mode=True))
    handle = denoiser.blocks[0].attn1.register_forward_pre_hook(lambda *_: calls.append(1))
    for first, expected in ((1, 1), (10_000, 2)):
        set_cache(denoiser, {"disable_cache_before_step": first})
        for _ in range(2):
            _denoise(denoiser, "cond")
        expect(len(calls) == expected, f"with disable_cache_before_step {first}, {len(calls)} of 2 steps are computed")
        calls.clear()
        forget_cached(denoiser, "", None)
    handle.remove()
    denoiser.disable_cache()


def forget_cached(denoiser: Any, but: str, context: Any) -> None:
    """Reset the stateful hooks of a denoiser, but for the one named `but`, and leave them in a cache context, as it was heard."""
    manager_type = hook_types()[2]
    for module in denoiser.modules():
        registry = vars(module).get(REGISTRY)
        for name, hook in registry.hooks.items() if registry is not None else ():
            if name == but or not hook._is_stateful:
                continue
            hook.reset_state(module)
            for manager in vars(hook).values():
                if isinstance(manager, manager_type) and context is not None:
                    manager.set_context(context)  # type: ignore[attr-defined]


@contract("diffusers: what a step cache holds is reset through its hooks, and takes a context again")
def _forgetting() -> None:
    import torch
    from diffusers.hooks import mag_cache
    from diffusers.hooks.hooks import CacheContext

    manager = mag_cache.StateManager(mag_cache.MagCacheState)
    hook = mag_cache.MagCacheHeadHook(manager, mag_cache.MagCacheConfig(calibrate=True))
    registry_type, *_ = hook_types()
    module, context = torch.nn.Linear(2, 2), CacheContext(name="cond")
    registry_type.check_if_exists_or_initialize(module).hooks["accelplug_contract"] = hook  # type: ignore[attr-defined]
    manager.set_context(context)
    before = manager.get_state()
    forget_cached(module, "another", context)
    expect(manager.get_state() is not before, "a hook's reset_state keeps what its cache held, or drops the context")


def lora_layers(model: Any) -> list[Any]:
    """Return the layers of a model that hold adapters of peft."""
    return [module for module in model.modules() if hasattr(type(module), "merged_adapters")]


def adapters_at_work(denoiser: Any) -> tuple[Any, ...]:
    """Return what is equal as long as the same adapters are at work in the same way, and empty without any."""
    layers = lora_layers(denoiser) if getattr(denoiser, "peft_config", None) else ()
    return tuple(
        (
            id(layer),
            layer.disable_adapters,
            *layer.active_adapters,
            *layer.merged_adapters,
            *getattr(layer, "scaling", {}).items(),
        )
        for layer in layers
    )


@contract("diffusers: adapters that are loaded, weighed or fused show in their layers")
def _adapters() -> None:
    if importlib.util.find_spec("peft") is None:
        return
    from peft import LoraConfig

    denoiser = _tiny_denoiser()
    seen = [adapters_at_work(denoiser)]
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="a")
    for change in (
        lambda: None,
        lambda: denoiser.set_adapters("a", weights=0.5),
        lambda: denoiser.fuse_lora(adapter_names=["a"]),
        lambda: (denoiser.unfuse_lora(), denoiser.disable_adapters()),
    ):
        change()
        seen.append(adapters_at_work(denoiser))
    expect(len(set(seen)) == 5 and seen[0] == (), "adapters come, change or are fused, and their layers do not say it")


def mag_ratios(denoiser: Any) -> dict[str, list[float]]:
    """Return what MagCache's calibration wrote down on a denoiser in this run so far, by cache context."""
    from diffusers.hooks.mag_cache import _MAG_CACHE_LEADER_BLOCK_HOOK

    registries = [vars(module)[REGISTRY] for module in denoiser.modules() if REGISTRY in vars(module)]
    leaders = [found for registry in registries if (found := registry.get_hook(_MAG_CACHE_LEADER_BLOCK_HOOK)) is not None]
    states = leaders[0].state_manager._state_cache if leaders else {}
    return {context: list(state.calibration_ratios) for context, state in states.items()}


@contract("diffusers: MagCache keeps the ratios of its calibration by cache context")
def _mag_calibration() -> None:
    import contextlib
    import io

    import diffusers

    denoiser = _tiny_denoiser()
    denoiser.enable_cache(diffusers.MagCacheConfig(calibrate=True, num_inference_steps=4))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it finds
        for _ in range(2):
            _denoise(denoiser, "cond")
    found = mag_ratios(denoiser)
    expect(list(found) == ["cond"] and len(found["cond"]) == 2, f"two steps of MagCache's calibration are found as {found}")


GUIDERS = ("guider", "guider_2")
"""What modular pipelines call their guiders."""


def guider_step(guider: Any) -> tuple[int, int] | None:
    """Return (step, steps) as the guider of a modular pipeline was told them, or None."""
    step, steps = (getattr(guider, name, None) for name in ("_step", "_num_inference_steps"))
    return None if step is None or not steps else (step, steps)


def guider_branch(guider: Any) -> tuple[str, Any] | None:
    """Return which branch's forward a guider has prepared last, and the timestep that it was told; None where it has prepared none."""
    count, names = (getattr(guider, name, None) for name in ("_count_prepared", "_input_predictions"))
    return (names[count - 1].removeprefix("pred_"), guider._timestep) if count and names and count <= len(names) else None


@contract("diffusers: a guider says which step it was told, and which branch it has prepared")
def _guider() -> None:
    import torch
    from diffusers import ClassifierFreeGuidance

    guider, timestep = ClassifierFreeGuidance(), torch.tensor(500)
    expect(guider_step(guider) is None, "a guider says which step it is before it was told")
    for _ in range(2):
        guider.set_state(step=3, num_inference_steps=8, timestep=timestep)
        expect(guider_step(guider) == (3, 8), "a guider does not keep _step and _num_inference_steps")
        expect(guider_branch(guider) is None, "a guider that was told a step has a branch prepared")
        for branch in ("cond", "uncond"):
            guider.prepare_models(torch.nn.Identity())
            found = guider_branch(guider)
            expect(found == (branch, timestep), f"by _count_prepared and _input_predictions the branch {branch} is {found}")


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Silence a pipeline's own progress bars, which a modular one has in its blocks, and give them back as they were."""
    name = "_progress_bar_config"
    bars = [owner for owner in blocks_of(pipe) or [pipe] if hasattr(owner, "set_progress_bar_config")]
    before = [vars(owner).get(name) for owner in bars]
    try:
        for owner in bars:
            owner.set_progress_bar_config(disable=True)
        yield
    finally:
        for owner, was in zip(bars, before, strict=True):
            if was is not None:
                setattr(owner, name, was)
            elif name in vars(owner):
                delattr(owner, name)


@contract("diffusers: progress bars are silenced and given back")
def _progress_bar() -> None:
    classic, modular = _pipeline(), _modular_pipeline()
    for pipe, owner in ((classic, classic), (modular, blocks_of(modular)[1])):
        with quiet(pipe):
            expect(owner.progress_bar(total=1).disable, "a pipeline's progress bar is not silenced")
        expect("_progress_bar_config" not in vars(owner), "silencing leaves _progress_bar_config behind")
        owner.set_progress_bar_config(desc="mine")
        with quiet(pipe):
            pass
        expect(owner._progress_bar_config == {"desc": "mine"}, "_progress_bar_config is not given back")


def execution_device(pipe: Any, otherwise: Any) -> Any:
    """Return the device that a pipeline runs on, also where its weights wait on another (offloading); `otherwise` if it does not say."""
    return getattr(pipe, "_execution_device", otherwise)


@contract("diffusers: a pipeline whose weights wait elsewhere says where it runs")
def _execution_device() -> None:
    denoiser = _tiny_denoiser()
    expect(str(execution_device(_pipeline(denoiser), None)) == "cpu", "a pipeline has no _execution_device")
    denoiser._hf_hook = SimpleNamespace(execution_device="meta")  # as accelerate leaves it
    found = str(execution_device(_pipeline(denoiser), None))
    expect(found == "meta", f"a module whose _hf_hook runs it on meta leaves _execution_device at {found}")


def processor_metadata() -> dict[type, Any]:
    """Return diffusers' table of processors that layer skipping knows, keyed by exact class."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    AttentionProcessorRegistry._register()
    return AttentionProcessorRegistry._registry


@contract("diffusers: layer skipping looks processors up by exact class")
def _processor_registry() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    expect(AttnProcessor2_0 in processor_metadata(), "AttentionProcessorRegistry._registry does not hold AttnProcessor2_0")


def attention_is_skipped() -> bool:
    """Whether diffusers' PAG mode is on, which replaces scaled_dot_product_attention by its values."""
    from torch.overrides import _get_current_function_mode_stack

    return any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in _get_current_function_mode_stack())


@contract("diffusers: PAG's mode is seen while it is on")
def _skipped_attention() -> None:
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    expect(not attention_is_skipped(), "attention is taken for skipped")
    with AttentionScoreSkipFunctionMode():
        expect(attention_is_skipped(), "_get_current_function_mode_stack does not hold AttentionScoreSkipFunctionMode")


@contract("diffusers: every set_timesteps makes a new tensor, and schedulers count from None")
def _schedules() -> None:
    import torch
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    for scheduler in (FlowMatchEulerDiscreteScheduler(), DDIMScheduler()):
        name = type(scheduler).__name__
        expect(getattr(scheduler, "num_inference_steps", None) is None, f"{name} has a number of steps before it was set")
        scheduler.set_timesteps(4)
        before = scheduler.timesteps
        scheduler.set_timesteps(4)
        expect(isinstance(before, torch.Tensor) and len(before) == 4, f"{name}.timesteps is not a tensor of as many")
        expect(scheduler.timesteps is not before, f"{name}.set_timesteps keeps its tensor: a run that begins is not seen")
    counting = FlowMatchEulerDiscreteScheduler()
    counting.set_timesteps(4)
    expect(counting.step_index is None and counting.begin_index is None, "a scheduler does not count from None")
    counting.step(torch.zeros(1), counting.timesteps[0], torch.zeros(1))
    expect(counting.step_index == 1, "a scheduler does not count its steps")


def _tiny_denoiser() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=8,
        num_layers=2,
        rope_max_seq_len=8,
    ).eval()


def _denoise(denoiser: Any, context: str) -> None:
    import torch

    with torch.no_grad(), denoiser.cache_context(context):
        denoiser(torch.zeros(1, 4, 1, 4, 4), torch.tensor([500]), torch.zeros(1, 2, 8))


def _pipeline(denoiser: Any = None) -> Any:
    from diffusers import DiffusionPipeline

    class Pipeline(DiffusionPipeline):
        def __init__(self, transformer: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)

    return Pipeline(denoiser)
