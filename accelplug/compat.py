"""Every private name of a host library, in one place, each with a contract that tests and `accelplug doctor` check.

A contract is a function that raises when a host library no longer behaves as the code here relies on.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

TESTED = {"torch": "2.13", "diffusers": "0.42", "transformers": "5.24"}
"""Newest minor versions that the suite ran on; a newer one warns and works on."""

ENTRY_POINTS = frozenset({"dispatch_attention_fn", "scaled_dot_product_attention"})
"""The two names by which every processor of diffusers reaches attention."""

DYNAMO_MODULE_NAME = "namedtuple_accelplug"
"""``__name__`` of re-bound globals. Dynamo looks globals up in ``sys.modules[__name__]``, but not for names that start so."""


def dispatch_attention_fn() -> Callable[..., Any]:
    """Return diffusers' attention dispatcher."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn


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


def hook_types() -> tuple[type, type, type, type]:
    """Return diffusers' ``HookRegistry, ModelHook, StateManager, BaseState``."""
    from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager

    return HookRegistry, ModelHook, StateManager, BaseState


REGISTRY = "_diffusers_hook"
"""Attribute of a module that holds its hook registry."""

LEFT_BEHIND = ("forward", REGISTRY, "_cache_config")
"""Attributes that diffusers leaves on modules when a cache is disabled."""


def listen(denoiser: Any, name: str, hook: Any) -> Callable[[], None]:
    """Put a hook first in a denoiser's registry, without wrapping ``forward``; return what takes it away again.

    First, since removing another hook relinks only what stands behind that one. A registry that was brought goes with it.
    """
    registry_type, *_ = hook_types()
    brought = REGISTRY not in vars(denoiser)
    registry: Any = registry_type.check_if_exists_or_initialize(denoiser)  # type: ignore[attr-defined]
    order, references = registry._hook_order, registry._fn_refs
    hook.fn_ref = None
    registry.hooks[name] = hook
    order.insert(0, name)
    references.insert(0, None)

    def leave() -> None:
        if registry.hooks.get(name) is hook:
            index = registry._hook_order.index(name)
            del registry.hooks[name], registry._hook_order[index], registry._fn_refs[index]
        if brought and not registry.hooks and vars(denoiser).get(REGISTRY) is registry:
            delattr(denoiser, REGISTRY)

    return leave


def hooks_on(denoiser: Any) -> int:
    """Return how many hooks of diffusers are on the modules of a denoiser."""
    return sum(len(vars(module)[REGISTRY].hooks) for module in denoiser.modules() if REGISTRY in vars(module))


def step_cache(denoiser: Any) -> Any:
    """Return the config of the step cache that is on a denoiser, or None."""
    return getattr(denoiser, "_cache_config", None)


def guider_step(guider: Any) -> tuple[int, int] | None:
    """Return (step, steps) as the guider of a modular pipeline was told them, or None."""
    step, steps = (getattr(guider, name, None) for name in ("_step", "_num_inference_steps"))
    return None if step is None or not steps else (step, steps)


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Silence a pipeline's own progress bar, and give it back as it was."""
    name = "_progress_bar_config"
    before = getattr(pipe, name, None)
    try:
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        yield
    finally:
        if before is not None:
            setattr(pipe, name, before)
        elif hasattr(pipe, name):
            delattr(pipe, name)


def mag_ratios(denoiser: Any) -> dict[str, list[float]]:
    """Return what MagCache's calibration wrote down on a denoiser in this run so far, by cache context."""
    from diffusers.hooks.mag_cache import _MAG_CACHE_LEADER_BLOCK_HOOK

    registries = [vars(module)[REGISTRY] for module in denoiser.modules() if REGISTRY in vars(module)]
    leaders = [found for registry in registries if (found := registry.get_hook(_MAG_CACHE_LEADER_BLOCK_HOOK)) is not None]
    states = leaders[0].state_manager._state_cache if leaders else {}
    return {context: list(state.calibration_ratios) for context, state in states.items()}


def processor_metadata() -> dict[type, Any]:
    """Return diffusers' table of processors that layer skipping knows, keyed by exact class."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    AttentionProcessorRegistry._register()
    return AttentionProcessorRegistry._registry


# ----------------------------------------------------------------------------------------------------------- torch


def attention_is_skipped() -> bool:
    """Whether diffusers' PAG mode is on, which replaces scaled_dot_product_attention by its values."""
    from torch.overrides import _get_current_function_mode_stack

    return any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in _get_current_function_mode_stack())


def held(module: Any, name: str) -> Any:
    """Return what a module itself holds under a name, as an attribute or as a submodule, or None."""
    return vars(module).get(name, vars(module).get("_modules", {}).get(name))


def pre_hooks(module: Any) -> list[Any]:
    """Return the functions that are called ahead of a module's forward."""
    return list(module._forward_pre_hooks.values())


def is_looked_into(module: Any) -> bool:
    """Whether somebody has hooks on a module, or a forward of their own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def unwrap_compiled(module: Any) -> Any:
    """Return the module inside what ``torch.compile(module)`` returned, or the module itself."""
    inner = held(module, "_orig_mod")
    return module if inner is None else inner


def is_compiled(module: Any) -> bool:
    """Whether a module, or one in it, goes through torch.compile."""
    return any(
        held(part, "_orig_mod") is not None or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


@contextmanager
def room_for_graphs(graphs: int) -> Iterator[None]:
    """Let Dynamo keep as many graphs of one function, where it gives up after 8. All graphs are dropped at the end."""
    import torch

    with torch._dynamo.config.patch(recompile_limit=graphs, accumulated_recompile_limit=64 * graphs):
        try:
            yield
        finally:
            torch._dynamo.reset()


def comptime() -> Callable[[Callable[[Any], None]], None]:
    """Return what, called in traced code, has Dynamo call a function while it traces."""
    import torch

    return torch._dynamo.comptime.comptime


def is_fake(x: Any) -> bool:
    """Whether a tensor has a shape alone, as under tracing."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(x, FakeTensor)


def times_written(x: Any) -> int:
    """Return a number that every write into a tensor raises."""
    return x._version


def traced_value(ctx: Any, name: str) -> Any:
    """Return the Python object that Dynamo traces as the local `name`; a tensor comes as a fake one."""
    variable = ctx.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker()
    return _concrete(variable)


def _concrete(variable: Any) -> Any:
    """Undo Dynamo's wrapping: constants and objects as they are, tensors as fake ones, through lists and dicts."""
    if variable.is_python_constant():
        return variable.as_python_constant()
    if (proxy := getattr(variable, "proxy", None)) is not None:
        return proxy.node.meta.get("example_value")
    items = getattr(variable, "items", None)
    if isinstance(items, dict):
        return {_concrete(key.vt): _concrete(value) for key, value in items.items()}
    if isinstance(items, list):
        return [_concrete(item) for item in items]
    return getattr(variable, "value", None)


# ---------------------------------------------------------------------------------------------------- transformers

ATTENTION = "accelplug"
"""Our attention function's name. transformers reads meaning into names with flash, sdpa, flex, a slash or ``paged|``."""

ATTENTION_KWARGS = frozenset(
    {
        "scaling", "dropout", "is_causal", "sliding_window", "s_aux", "softcap", "position_bias", "position_ids", "use_cache",
        "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "image_sizes", "past_key_values", "cache",
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch", "logits_to_keep", "use_kernels",
        "token_type_ids", "mm_token_type_ids", "seq_idx", "attention_mask",
    }
)  # fmt: skip
"""What transformers' models pass on to the attention function. What is not here might change what attention is."""


NO_LABEL = -100
"""What stands in ``labels`` where there is none."""


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Add an attention function to transformers' table."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)


def unregister_attention(name: str) -> None:
    """Take an attention function out of transformers' table, which has no way of its own to do so."""
    from transformers import AttentionInterface

    AttentionInterface._global_mapping.pop(name, None)


def attention_function(name: str, cls: type) -> Callable[..., Any]:
    """Return the attention function that a module of class `cls` would call under that implementation."""
    import sys

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


class _Seen:
    """A module as a flash function shall see it: with its own config, not our view."""

    def __init__(self, module: Any, config: Any) -> None:
        self.config, self._module = config, module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def seen_by(name: str, module: Any, config: Any) -> Any:
    """Return what to pass as the module to an attention function; flash functions read the implementation off its config."""
    return _Seen(module, config) if "flash" in name else module


def window_beside(name: str, mask: Any, kwargs: dict[str, Any]) -> int | None:
    """Return the sliding window that an attention function is told beside its mask, None where the mask has it.

    eager, sdpa and flex are told it too and leave it aside: their masks have it, and are None where no key is out of it.
    """
    in_mask = name in ("eager", "sdpa", "flex_attention", None) or (mask is not None and mask.ndim == 4)
    return None if in_mask else kwargs.get("sliding_window")


def is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an attention function that is given no mask lets a query read no key behind it."""
    told = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if told is None else told)


_VIEWS: dict[tuple[type, str], type] = {}


def config_view(config: Any, name: str) -> Any:
    """Return a live view of a config that answers `name` for its attention implementation. A copy of it is a plain config."""
    cls = type(config)
    if (cls, name) not in _VIEWS:
        _VIEWS[cls, name] = type(
            cls.__name__,
            (cls,),
            {
                "_attn_implementation": property(lambda self: name),
                "_accelplug_view": True,
                "__reduce__": lambda self: (_plain, (_plain_of(self),)),
                "__deepcopy__": lambda self, memo: _copied(self, memo),
                "__module__": cls.__module__,
                "__qualname__": cls.__qualname__,
            },
        )
    view: Any = object.__new__(_VIEWS[cls, name])
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


def is_view(config: Any) -> bool:
    """Whether a config is one of our views."""
    return getattr(type(config), "_accelplug_view", False)


def _plain(config: Any) -> Any:
    return config


def _plain_of(view: Any) -> Any:
    """The config that a view shows: where models keep it we cannot tell, so an equal one that shares its ``__dict__``."""
    config: Any = object.__new__(type(view).__mro__[1])
    object.__setattr__(config, "__dict__", view.__dict__)
    return config


def _copied(view: Any, memo: dict[int, Any]) -> Any:
    import copy

    # The model's own config shares this dict; whoever is copied first puts the copy of the dict in the memo.
    config: Any = object.__new__(type(view).__mro__[1])
    object.__setattr__(config, "__dict__", copy.deepcopy(view.__dict__, memo))
    return config


def looks_kernel_up(cls: type) -> bool:
    """Whether an attention class asks transformers for its function at every call."""
    forward = inspect.getattr_static(cls, "forward")
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "get_interface" in code.co_names


def attention_name(config: Any) -> str:
    """Return which attention function a model is set to use."""
    return config._attn_implementation or "eager"


def tensor_mesh(model: Any) -> Any:
    """Return the mesh of the processes that share each layer's heads of a model, or None."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or not getattr(model, "_tp_size", None):
        return None
    names = mesh.mesh_dim_names or ()
    return mesh["tp"] if "tp" in names and len(names) > 1 else mesh


def position_offset(base: Any) -> Any:
    """Return by how much positions in three dimensions run behind the count of tokens, (B, 1), where a model keeps that; or None."""
    return getattr(base, "rope_deltas", None)


@contextmanager
def positions_kept(base: Any) -> Iterator[None]:
    """Leave a base model's own `position_offset`, which its forward writes, as it was."""
    before = position_offset(base)
    try:
        yield
    finally:
        if hasattr(base, "rope_deltas"):
            base.rope_deltas = before


def number_of_layers(decoder: Any) -> int:
    """Return how many layers a decoder has."""
    return len(decoder.layers) if hasattr(decoder, "layers") else decoder.config.num_hidden_layers


def cache_layer(cache: Any, index: int) -> Any:
    """Return a layer of a cache, or None."""
    layers = getattr(cache, "layers", None)
    return layers[index] if layers is not None and index < len(layers) else None


def slides(layer: Any) -> bool:
    """Whether a cache layer keeps a window only."""
    return bool(getattr(layer, "is_sliding", False))


def tokens_seen(layer: Any) -> int:
    """Return how many tokens went through a cache layer."""
    return layer.get_seq_length()


CACHE_NAMES = ("cache", "past_key_values")
"""What a cache is called in arguments and outputs: from transformers 5.24 on, and before."""


def cache_keyword(forward: Callable[..., Any]) -> str:
    """Return the name under which a model's forward takes a cache."""
    parameters = inspect.signature(forward).parameters
    return next(name for name in CACHE_NAMES if name in parameters)


def cache_given(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a forward, under either name, or None."""
    new, old = CACHE_NAMES
    found = arguments.get(new)
    return arguments.get(old) if found is None else found


def packs_sequences(arguments: Mapping[str, Any]) -> bool:
    """Whether a forward or an attention call is continuous batching's, which packs several sequences into one row."""
    return "read_index" in arguments


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output, or None."""
    from transformers import Cache

    items = output if isinstance(output, tuple) else (cache_given(vars(output)),)
    return next((item for item in items if isinstance(item, Cache)), None)


def valid_tokens(mask: Any, past: int) -> Any:
    """Return which tokens are no padding, bool (B, S), of a mask in any of transformers' forms; None where it does not say.

    A mask of (B, 1, S_q, S_k) says it of this forward's tokens, which stand behind `past` others: padding may not read itself.
    """
    import torch

    if isinstance(mask, dict):  # by type of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        return None
    keep = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    if keep.ndim == 2:
        return keep
    new, keys = keep.shape[2:]
    own = keep[:, 0].diagonal(past if keys >= past + new else keys - new, -2, -1)  # a window has lost its first keys
    return torch.nn.functional.pad(own, (past, 0), value=True)


def without_room(mask: Any, tokens: int) -> Any:
    """Return a decoder's mask for keys of `tokens` alone: a static cache has room for more. A block mask, which no patch reads, is None."""
    import torch

    if isinstance(mask, dict):  # by type of layer
        return {kind: without_room(one, tokens) for kind, one in mask.items()}
    return mask[..., :tokens] if isinstance(mask, torch.Tensor) else None


def forget_compiled_call(model: Any) -> None:
    """Drop the decode step that generate() compiled and keeps on the model."""
    vars(model).pop("_compiled_call", None)
    vars(model).pop("_last_compile_config", None)


def installed(package: str) -> str | None:
    """Return the installed version of `package`, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def warn_untested(package: str) -> None:
    """Warn when `package` is newer than what the suite ran on."""
    found = installed(package)
    if found and _minor(found) > _minor(TESTED[package]):
        warnings.warn(
            f"accelplug was tested with {package} up to {TESTED[package]}, found {found}. Run `accelplug doctor` to check "
            "what it relies on.",
            stacklevel=3,
        )


def _minor(text: str) -> tuple[int, int]:
    major, minor, *_ = text.split(".")
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


# ----------------------------------------------------------------------------------------------------------- contracts


def contracts() -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield (what is relied on, check), for tests and for `accelplug doctor`."""
    yield "diffusers: dispatch_attention_fn takes query, key, value, attn_mask, scale, backend", _dispatcher_signature
    yield "diffusers: context parallelism runs attention through a function that takes another's", _context_parallel
    yield "diffusers: HookRegistry adds and removes hooks by name", _hook_registry
    yield "diffusers: cache_context reaches StateManager.set_context of stateful hooks", _cache_context
    yield "diffusers: MagCache keeps the ratios of its calibration by cache context", _mag_calibration
    yield "diffusers: layer skipping looks processors up by exact class", _processor_registry
    yield "diffusers: processors reach attention by the two known names", _processor_entry_points
    yield "transformers: attention modules look their function up by config at every call, and take extra arguments", _lookup
    yield (
        "transformers: a decode step is handed the cache that read the prompt, and the cache takes attributes",
        _cache_contract,
    )
    yield "torch: Dynamo traces re-bound globals as they are", _dynamo_globals
    yield "torch: function modes can be listed", _function_modes


def _expect(condition: object, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _dispatcher_signature() -> None:
    parameters = inspect.signature(dispatch_attention_fn()).parameters
    missing = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "backend"} - set(parameters)
    _expect(not missing, f"dispatch_attention_fn lacks the parameters {sorted(missing)}")


def _context_parallel() -> None:
    if "parallel_config" not in inspect.signature(dispatch_attention_fn()).parameters:
        return  # diffusers before context parallelism
    from diffusers.models._modeling_parallel import ContextParallelConfig

    missing = {"forward_op", "backward_op", "_parallel_config"} - set(
        inspect.signature(context_parallel_attention()).parameters
    )
    _expect(not missing, f"_templated_context_parallel_attention lacks the parameters {sorted(missing)}")
    missing = {"ulysses_degree", "ring_degree", "_ulysses_local_rank"} - set(ContextParallelConfig.__dataclass_fields__)
    _expect(not missing, f"ContextParallelConfig lacks {sorted(missing)}")


def _hook_registry() -> None:
    import torch

    registry_type, hook_type, _, _ = hook_types()
    module = torch.nn.Linear(2, 2)
    registry = registry_type.check_if_exists_or_initialize(module)  # type: ignore[attr-defined]
    registry.register_hook(hook_type(), "accelplug_contract")
    _expect("accelplug_contract" in registry.hooks, "HookRegistry.hooks does not hold a registered hook")
    registry.remove_hook("accelplug_contract", recurse=False)
    _expect(not registry.hooks, "HookRegistry.remove_hook leaves the hook behind")
    _expect(module._diffusers_hook is registry, "the registry is not at module._diffusers_hook")


def _cache_context() -> None:
    import torch
    from diffusers.models.cache_utils import CacheMixin

    registry_type, hook_type, manager_type, state_type = hook_types()
    seen: list[Any] = []

    class Manager(manager_type):  # type: ignore[misc, valid-type]
        def set_context(self, context: Any) -> None:
            seen.append(context)

    class Hook(hook_type):  # type: ignore[misc, valid-type]
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.manager = Manager(state_type)

    class Model(torch.nn.Linear, CacheMixin):
        pass

    model: Any = Model(2, 2)
    registry_type.check_if_exists_or_initialize(model).register_hook(Hook(), "accelplug_contract")  # type: ignore[attr-defined]
    with model.cache_context("cond"):
        pass
    _expect(
        getattr(seen[0], "name", seen[0]) == "cond" and seen[-1] is None, f"cache_context called set_context with {seen}"
    )


def _mag_calibration() -> None:
    from diffusers.hooks import mag_cache
    from diffusers.hooks.hooks import CacheContext

    manager = mag_cache.StateManager(mag_cache.MagCacheState)
    manager.set_context(CacheContext(name="cond"))
    state = manager.get_state()
    _expect(manager._state_cache == {"cond": state}, "StateManager._state_cache does not hold states by the context's name")
    hook = mag_cache.MagCacheHeadHook(manager, mag_cache.MagCacheConfig(calibrate=True))
    _expect(hook.state_manager is manager, "MagCacheHeadHook.state_manager is not what it was given")
    _expect(state.calibration_ratios == [], "MagCacheState.calibration_ratios is no list that starts empty")
    _expect(mag_cache._MAG_CACHE_LEADER_BLOCK_HOOK, "the hook of MagCache's first block has no name")


def _processor_registry() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    _expect(AttnProcessor2_0 in processor_metadata(), "AttentionProcessorRegistry does not hold AttnProcessor2_0")


def _processor_entry_points() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    for processor in (AttnProcessor2_0, WanAttnProcessor):
        names = set(inspect.getattr_static(processor, "__call__").__code__.co_names)
        _expect(names & ENTRY_POINTS, f"{processor.__name__}.__call__ uses none of {sorted(ENTRY_POINTS)}")


def _lookup() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    attention = model.model.layers[0].self_attn
    seen: list[dict[str, Any]] = []

    def spy(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return q.transpose(1, 2), None

    name = f"{ATTENTION}_contract"
    register_attention(name, spy)
    try:
        attention.config = config_view(attention.config, name)
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]), accelplug_contract=1)
    finally:
        unregister_attention(name)
    _expect(seen, "the registered function was not called")
    _expect(seen[0].get("accelplug_contract") == 1, "an extra argument does not reach the attention function")
    _expect(model.config._attn_implementation != name, "a view of a module's config changed the model's")


def _cache_contract() -> None:
    """What reads a prompt and then a token: the decoder is handed the very cache that was given and came back."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    cache = DynamicCache()
    _expect(cache.get_seq_length() == 0, "an empty cache does not say that it is empty")
    cache._accelplug_contract = 1
    seen: list[Any] = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(cache_given(kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        held = {cache_keyword(type(model).forward): cache}
        output = model(torch.tensor([[1, 2, 3]]), **held)
        _expect(cache_of(output) is cache, f"a model's output holds its cache under none of {CACHE_NAMES}")
        model(torch.tensor([[4]]), **held)
    _expect(all(x is cache for x in seen), f"the decoder is handed its cache under none of {CACHE_NAMES}")
    _expect(cache.get_seq_length() == 4, "a cache does not count the tokens of a prompt and of the step behind it")
    _expect(tokens_seen(cache_layer(cache, 0)) == 4, "a layer of a cache does not count its tokens")


def _function_modes() -> None:
    from torch.overrides import BaseTorchFunctionMode, _get_current_function_mode_stack

    with BaseTorchFunctionMode() as mode:
        _expect(mode in _get_current_function_mode_stack(), "the stack of function modes does not hold an active one")


def _dynamo_globals() -> None:
    import types

    import torch

    def body(x: Any) -> Any:
        return double(x)  # type: ignore[name-defined]  # noqa: F821

    names = {"double": lambda x: 2 * x, "__name__": DYNAMO_MODULE_NAME, "__builtins__": __builtins__}
    rebound = types.FunctionType(body.__code__.replace(co_name="contract"), names)
    compiled = torch.compile(rebound, backend="eager", fullgraph=True)
    _expect(torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0)), "Dynamo did not use the re-bound globals")
