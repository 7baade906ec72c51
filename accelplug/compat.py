"""Every private name of a host library, in one place, each with a contract that tests and `accelplug doctor` check.

A contract is a function that raises when a host library no longer behaves as the code here relies on.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelplug.errors import UnsupportedError

OLDEST = {"torch": "2.13", "diffusers": "0.41", "transformers": "5.17"}
TESTED = {"torch": "2.13", "diffusers": "0.42", "transformers": "5.24"}
"""The oldest and the newest minor versions that the suite runs on. Others warn, and are checked; see `require`."""

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
_CACHES = tuple(f"diffusers.hooks.{kind}_cache" for kind in ("first_block", "mag", "taylorseer"))
"""Where the hooks of step caches are defined."""


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
    own = getattr(module, "__dict__", {})  # a stranger may pass anything
    return own.get(name, own.get("_modules", {}).get(name))


def is_looked_into(module: Any, ours: type) -> bool:
    """Whether somebody has hooks on a module, other than those of a class of ours, or a forward of their own."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" in vars(module) or not all(isinstance(hook, ours) for hook in hooks)


def unwrap_compiled(module: Any) -> Any:
    """Return the module inside what ``torch.compile(module)`` returned, or the module itself."""
    inner = held(module, "_orig_mod")
    return module if inner is None else inner


def submodule(module: Any, path: str) -> Any:
    """Return what is at a path inside a module now, looking through torch.compile, or None."""
    for name in path.split("."):
        module = getattr(unwrap_compiled(module), name, None)
    return unwrap_compiled(module) if module is not None else None


def is_wrapped(part: Any, module: Any) -> bool:
    """Whether `part` is what ``torch.compile(module)`` returned."""
    return part is not module and hasattr(part, "named_modules") and unwrap_compiled(part) is module


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

    with _graphs(graphs):
        try:
            yield
        finally:
            torch._dynamo.reset()


def _graphs(limit: int) -> Any:
    import torch

    return torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=64 * limit)


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


_HOOKS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
"""Where a torch module keeps its forward hooks, and what it knows of them beside."""


def drop_hook(names: dict[str, Any], hook: Any) -> None:
    """Take a forward hook out of the ``__dict__`` of a torch module, if it is there."""
    for hooks, notes in _HOOKS.items():
        for key in [key for key, found in names[hooks].items() if found is hook]:
            for note in notes:
                names[note].pop(key, None)
            del names[hooks][key]


def held_by(wrapper: Any) -> Any:
    """Return the model that a wrapper holds and calls: torch.compile's, PEFT's, a parallel one, a transformers pipeline; else None."""
    if (inside := unwrap_compiled(wrapper)) is not wrapper:
        return inside
    if is_pipeline(wrapper):
        return wrapper.model
    names = {cls.__name__ for cls in type(wrapper).__mro__}
    if "PeftModel" in names:
        return wrapper.get_base_model()
    return wrapper.module if names & {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"} else None


def is_pipeline(model: Any) -> bool:
    """Whether an object is one of transformers' pipelines."""
    return any(cls.__module__ == "transformers.pipelines.base" and cls.__name__ == "Pipeline" for cls in type(model).__mro__)


def processor_of(model: Any) -> Any:
    """Return what a transformers pipeline makes inputs with, None of anything else."""
    return (getattr(model, "processor", None) or getattr(model, "tokenizer", None)) if is_pipeline(model) else None


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
        "token_type_ids", "mm_token_type_ids", "seq_idx", "attention_mask", "labels", "shift_labels",
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


def set_position_offset(base: Any, offset: Any) -> None:
    """Set a base model's own `position_offset`, where its forward writes one."""
    if hasattr(base, "rope_deltas"):
        base.rope_deltas = offset


@contextmanager
def positions_kept(base: Any) -> Iterator[None]:
    """Leave a base model's own `position_offset`, which its forward writes, as it was."""
    before = position_offset(base)
    try:
        yield
    finally:
        set_position_offset(base, before)


ORIGIN = "_name_or_path"
"""Key of a config that says where a model was loaded from."""


def crosses(cls: type) -> bool:
    """Whether an attention class reads keys that are no tokens of its own sequence."""
    forward = inspect.signature(inspect.getattr_static(cls, "forward")).parameters
    return not {"cross_attention_states", "encoder_hidden_states"}.isdisjoint(forward)


def must_be_given(base: Any) -> set[str]:
    """Return what a base model's forward cannot do without, but for tokens."""
    parameters = inspect.signature(type(base).forward).parameters
    required = {name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return required - {"self", "input_ids"}


def attention_is_collected() -> bool:
    """Whether a forward of this thread was asked for ``output_attentions``."""
    from transformers.utils.output_capturing import _active_collector

    return "attentions" in (_active_collector.get() or {})


@contextmanager
def uncollected() -> Iterator[None]:
    """Have transformers collect nothing for a forward that is under way: layers are run that are none of its."""
    from transformers.utils.output_capturing import _active_collector

    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)


def number_of_layers(decoder: Any) -> int:
    """Return how many layers a decoder has."""
    return len(decoder.layers) if hasattr(decoder, "layers") else decoder.config.num_hidden_layers


def cache_layer(cache: Any, index: int) -> Any:
    """Return a layer of a cache, or None; also where a layer of the model shares another's."""
    layers = getattr(cache, "layers", None)
    layer = layers[index] if layers is not None and index < len(layers) else None
    return None if type(layer).__name__ == "DummyLayer" else layer


def keys_at(cache: Any) -> int | None:
    """Return where in memory the keys of a cache's first layer lie, or None where it keeps none as they are."""
    keys = first_keys(cache)
    return None if keys is None else keys.data_ptr()


def first_keys(cache: Any) -> Any:
    """Return the keys of a cache's first layer, or None where it keeps none as they are."""
    return getattr(cache_layer(cache, 0), "keys", None)


def rows_told_apart(cache: Any, tokens: int) -> Any:
    """Return what tells the rows of a cache apart, (B, H, D): the largest of their first keys in a layer that has all; or None."""
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.ndim == 4 and keys.shape[2] >= tokens and not slides(layer):
            return keys[:, :, :tokens].amax(2)
    return None


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


def require(library: str) -> None:
    """Have torch and a host library keep what is relied on: checked where a version is outside of what the suite ran on.

    They are checked once for each set of versions: what holds is noted in the cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``), or,
    where that cannot be written, for this process.

    Raises
    ------
    UnsupportedError
        If a contract is broken.
    """
    found = {package: installed(package) or "" for package in ("torch", library)}
    strange = {package: text for package, text in found.items() if text and untested(package)}
    if not strange:
        return
    tested = ", ".join(f"{package} {tested_versions(package)}" for package in strange)
    names = ", ".join(f"{package} {text}" for package, text in strange.items())
    warnings.warn(
        f"accelplug was tested with {tested}, found {names}. What it relies on is checked once; `accelplug doctor` shows it.",
        stacklevel=3,
    )
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    note = "-".join([*(f"{package}-{text}" for package, text in found.items()), source])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "accelplug", "contracts")
    if note in _HELD:
        return
    with suppress(OSError, RuntimeError):  # no home, or no right to look
        folder = folder.expanduser()
        if (folder / note).exists():
            return
    require_contracts(library)
    _HELD.add(note)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / note).touch()


def require_contracts(library: str) -> None:
    """Check what is relied on of torch and of a host library, whatever their versions.

    Raises
    ------
    UnsupportedError
        If a contract is broken.
    """
    found = {package: installed(package) or "" for package in ("torch", library)}
    broken = [
        f"{promise}: {why}"
        for promise, check in contracts()
        if promise.partition(":")[0] in found and (why := why_broken(check)) is not None
    ]
    if broken:
        names = ", ".join(f"{package} {text}" for package, text in found.items())
        tested = ", ".join(f"{package} {tested_versions(package)}" for package in found)
        raise UnsupportedError(
            f"{names} no longer keeps what accelplug relies on. {'; '.join(broken)}. Install what was tested ({tested}), or a newer "
            "accelplug."
        )


_HELD: set[str] = set()
"""Sets of versions whose contracts hold, as far as this process has seen."""


def tested_versions(package: str) -> str:
    """Return the minor versions of `package` that the suite runs on, in words."""
    oldest, newest = OLDEST[package], TESTED[package]
    return newest if oldest == newest else f"{oldest} to {newest}"


def untested(package: str) -> bool:
    """Whether the installed version of `package` is none that the suite ran on, by its minor version."""
    found = installed(package)
    return found is not None and not _minor(OLDEST[package]) <= _minor(found) <= _minor(TESTED[package])


def _minor(text: str) -> tuple[int, int]:
    major, minor, *_ = [*text.split("."), "0"]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


# ----------------------------------------------------------------------------------------------------------- contracts


def contracts() -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield (library: what is relied on, check), for tests, for `accelplug doctor` and for `require`."""
    yield "torch: Dynamo traces re-bound globals as they are", _dynamo_globals
    yield "torch: Dynamo tells while it traces what local names hold, tensors as fake ones", _traced_values
    yield "torch: a compiled module is known, and the one inside it", _compiled_modules
    yield "torch: Dynamo's limit of graphs can be set", _graph_limit
    yield "torch: hooks on modules and writes into tensors can be seen", _hooks_and_writes
    yield "diffusers: dispatch_attention_fn attends as asked", _dispatcher
    yield "diffusers: processors reach attention by the two known names", _processor_entry_points
    yield "diffusers: layer skipping looks processors up by exact class", _processor_registry
    yield (
        "diffusers: parallel models and processors say so, and attention runs through a function that takes another's",
        _parallel,
    )
    yield "diffusers: a hook of ours hears contexts and the end of a run, and is taken away", _listening
    yield "diffusers: a step cache is known while it is on, and what it leaves behind", _step_caches
    yield "diffusers: MagCache keeps the ratios of its calibration by cache context", _mag_calibration
    yield "diffusers: every set_timesteps makes a new tensor, and schedulers count from None", _schedules
    yield "diffusers: what a step cache holds is reset through its hooks, and takes a context again", _forgetting
    yield "diffusers: a guider says which step it was told", _guider
    yield "diffusers: a progress bar is silenced and given back", _progress_bar
    yield "diffusers: PAG's mode is seen while it is on", _skipped_attention
    yield "transformers: attention modules look their function up by config at every call, and take extra arguments", _lookup
    yield (
        "transformers: a decode step is handed the cache that read the prompt, and the cache takes attributes",
        _cache_contract,
    )
    yield "transformers: attention is collected from what attention modules return", _collected
    yield "transformers: a layer of a cache says whether it keeps a window only", _windows
    yield "transformers: continuous batching is known by its arguments", _packed
    yield "transformers: the decode step that generate() compiled is kept on the model", _compiled_call
    yield "transformers: models say how their heads are shared out", _shared_heads
    yield "transformers: a config says under one key where it came from", _origin
    yield "transformers: Qwen's models keep where positions have got to on the base model", _positions


def why_broken(check: Callable[[], None]) -> str | None:
    """Run a contract apart from what the process is set to; return what no longer holds, or None."""
    import torch

    dtype = torch.get_default_dtype()
    apart = (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
    )
    try:
        with ExitStack() as stack, warnings.catch_warnings():
            for context in apart:
                stack.enter_context(context)
            torch.set_default_dtype(torch.float32)
            warnings.simplefilter("ignore")
            check()
    except Exception as error:  # whatever a library has come to do
        return str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
    finally:
        torch.set_default_dtype(dtype)
    return None


def _expect(condition: object, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _dynamo_globals() -> None:
    import torch

    def body(x: Any) -> Any:
        return double(x)  # type: ignore[name-defined]  # noqa: F821

    names = {"double": lambda x: 2 * x, "__name__": DYNAMO_MODULE_NAME, "__builtins__": __builtins__}
    rebound = types.FunctionType(body.__code__.replace(co_name="contract"), names)
    compiled = torch.compile(rebound, backend="eager", fullgraph=True)
    _expect(torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0)), "Dynamo did not use the re-bound globals")


def _traced_values() -> None:
    import torch

    seen: dict[str, Any] = {}

    def look(ctx: Any) -> None:
        seen.update({name: traced_value(ctx, name) for name in ("x", "names", "number")})

    def body(x: Any, names: dict[str, Any], number: int) -> tuple[Any, bool]:
        if torch.compiler.is_compiling():
            comptime()(look)
        return x * number + names["y"], torch.compiler.is_compiling()

    x = torch.ones(2, 3)
    code = body.__code__.replace(co_name="contract")  # never traced before
    anew = types.FunctionType(code, globals(), None, None, body.__closure__)
    _, compiled = torch.compile(anew, backend="eager", fullgraph=True)(x, {"y": x, "list": [1, None]}, 2)
    if not compiled:
        return  # where the compiler is switched off nothing is traced
    _expect(seen.get("number") == 2, f"comptime does not tell a number: {seen}")
    for fake in (seen["x"], seen["names"]["y"]):
        right = is_fake(fake) and fake.shape == x.shape
        _expect(right, f"comptime tells a tensor as {type(fake).__name__}, not as FakeTensor")
    _expect(seen["names"]["list"] == [1, None], "comptime does not tell a list in a dict")
    _expect(not is_fake(x), "a tensor is taken for a FakeTensor")


def _compiled_modules() -> None:
    import torch

    module: Any = torch.nn.Linear(2, 2)
    outer: Any = torch.compile(module, backend="eager")
    _expect(not is_compiled(module), "a module that is not compiled is taken for one")
    _expect(unwrap_compiled(outer) is module, "torch.compile(module)._orig_mod is not the module")
    _expect(unwrap_compiled(module) is module, "a module that is not compiled is unwrapped")
    if outer is not module:  # as it is where the compiler is switched off
        _expect(is_compiled(torch.nn.Sequential(outer)), "torch.compile(module) has no submodule _orig_mod")
    module.compile(backend="eager")
    _expect(is_compiled(torch.nn.Sequential(module)), "module.compile() leaves no _compiled_call_impl")


def _graph_limit() -> None:
    import torch

    before = torch._dynamo.config.recompile_limit
    with _graphs(before + 1):
        _expect(torch._dynamo.config.recompile_limit == before + 1, "torch._dynamo.config.recompile_limit was not set")
    _expect(callable(torch._dynamo.reset), "torch._dynamo.reset is gone")


def _hooks_and_writes() -> None:
    import torch

    x, module = torch.zeros(2), torch.nn.Linear(2, 2)  # type: torch.Tensor, Any
    _expect(not is_looked_into(module, type(None)), "a module without hooks is taken for one with")
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        with register(repr):
            _expect(
                is_looked_into(module, type(None)), "a hook on a module is in neither _forward_hooks nor _forward_pre_hooks"
            )
    tables = {name for hooks, notes in _HOOKS.items() for name in (hooks, *notes)}
    module.register_forward_pre_hook(repr, with_kwargs=True)
    module.register_forward_hook(repr, with_kwargs=True, always_call=True)
    filled = {name for name, value in vars(module).items() if isinstance(value, dict) and value and "forward" in name}
    _expect(filled == tables, f"hooks stand in {sorted(filled)}, expected {sorted(tables)}")
    drop_hook(vars(module), repr)
    _expect(not any(vars(module)[name] for name in tables), "a dropped hook leaves something behind")
    _expect(held(torch.nn.ModuleDict({"inner": module}), "inner") is module, "a submodule is not in _modules")
    before = times_written(x)
    x += 1
    _expect(times_written(x) > before, "Tensor._version does not count writes")


def _dispatcher() -> None:
    import torch

    parameters = inspect.signature(dispatch_attention_fn()).parameters
    missing = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "backend"} - set(parameters)
    _expect(not missing, f"dispatch_attention_fn lacks the parameters {sorted(missing)}")
    q, k, v = torch.randn(3, 1, 4, 2, 8)  # (B, S, H, D)
    mask = torch.tensor([True, True, True, False]).expand(1, 1, 4, 4)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
    out = dispatch_attention_fn()(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=0.5)
    _expect(
        torch.allclose(out, expected, atol=1e-5), "dispatch_attention_fn does not answer (B, S, H, D) as scale and mask say"
    )


def _processor_entry_points() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    for processor in (AttnProcessor2_0, WanAttnProcessor):
        names = set(inspect.getattr_static(processor, "__call__").__code__.co_names)
        _expect(names & ENTRY_POINTS, f"{processor.__name__}.__call__ uses none of {sorted(ENTRY_POINTS)}")


def _schedules() -> None:
    import torch
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    for scheduler in (FlowMatchEulerDiscreteScheduler(), DDIMScheduler()):
        name = type(scheduler).__name__
        _expect(getattr(scheduler, "num_inference_steps", None) is None, f"{name} has a number of steps before it was set")
        scheduler.set_timesteps(4)
        before = scheduler.timesteps
        scheduler.set_timesteps(4)
        _expect(isinstance(before, torch.Tensor) and len(before) == 4, f"{name}.timesteps is no tensor of as many")
        _expect(scheduler.timesteps is not before, f"{name}.set_timesteps keeps its tensor: a run that begins is not seen")
    counting = FlowMatchEulerDiscreteScheduler()
    counting.set_timesteps(4)
    _expect(counting.step_index is None and counting.begin_index is None, "a scheduler does not count from None")
    counting.step(torch.zeros(1), counting.timesteps[0], torch.zeros(1))
    _expect(counting.step_index == 1, "a scheduler does not count its steps")


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
    _expect(manager.get_state() is not before, "a hook's reset_state keeps what its cache held, or drops the context")


def _processor_registry() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    _expect(AttnProcessor2_0 in processor_metadata(), "AttentionProcessorRegistry._registry does not hold AttnProcessor2_0")


def _parallel() -> None:
    from diffusers.models._modeling_parallel import ContextParallelConfig, TensorParallelConfig

    for part in (_tiny_denoiser(), _tiny_denoiser().blocks[0].attn1.processor):
        _expect(hasattr(part, "_parallel_config"), f"{type(part).__name__} has no _parallel_config")
        _expect(not is_parallel(part), f"{type(part).__name__} in one process is taken for a parallel one")
    missing = {"forward_op", "backward_op", "_parallel_config"} - set(
        inspect.signature(context_parallel_attention()).parameters
    )
    _expect(not missing, f"_templated_context_parallel_attention lacks the parameters {sorted(missing)}")
    for config, names in (
        (ContextParallelConfig, {"ulysses_degree", "ring_degree", "_ulysses_local_rank"}),
        (TensorParallelConfig, {"_mesh"}),
    ):
        missing = names - set(config.__dataclass_fields__)
        _expect(not missing, f"{config.__name__} lacks {sorted(missing)}")


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
    _expect(found is registry, f"HookRegistry.check_if_exists_or_initialize does not look for {REGISTRY}")
    registry.register_hook(hook_type(), "accelplug_behind")
    _denoise(denoiser, "cond")
    _expect(heard == ["cond", None], f"cache_context is heard as {heard}: stateful hooks are not those with _is_stateful")
    _pipeline(denoiser).maybe_free_model_hooks()
    _expect(heard[2:] == ["reset"], "the end of a pipeline's run does not reset the hooks of its denoiser")
    registry.remove_hook("accelplug_behind", recurse=False)
    stop_listening(vars(registry), "accelplug_contract")
    _expect(not registry.hooks, "a hook that was taken away is still in the registry")
    left = set(vars(denoiser)) - before
    _expect(left <= set(left_behind(vars(denoiser))), f"a hook leaves {sorted(left)} behind")
    _denoise(denoiser, "cond")
    _expect(len(heard) == 3, "a hook that was taken out of _hook_order still hears")


def _step_caches() -> None:
    import diffusers

    denoiser = _tiny_denoiser()
    before = {module: set(vars(module)) for module in denoiser.modules()}
    for config in (diffusers.FirstBlockCacheConfig(), diffusers.TaylorSeerCacheConfig(use_lite_mode=True)):
        denoiser.enable_cache(config)
        _expect(step_cache(denoiser) is config, "the config of a step cache is not at _cache_config")
        _expect(hooks_on(denoiser) > 0, f"a step cache puts no hooks where {REGISTRY} is")
        disable_cache(denoiser, config)
        _expect(step_cache(denoiser) is None, "_cache_config of a step cache that is off is not None")
        _expect(hooks_on(denoiser) == 0, "a step cache that is off leaves hooks")
        for module, names in before.items():
            left = set(vars(module)) - names
            _expect(left <= set(left_behind(vars(module))), f"a step cache leaves {sorted(left)} behind")


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
    _expect(list(found) == ["cond"] and len(found["cond"]) == 2, f"two steps of MagCache's calibration are found as {found}")


def _guider() -> None:
    import torch
    from diffusers import ClassifierFreeGuidance

    guider = ClassifierFreeGuidance()
    _expect(guider_step(guider) is None, "a guider says which step it is before it was told")
    guider.set_state(step=3, num_inference_steps=8, timestep=torch.tensor(500))
    _expect(guider_step(guider) == (3, 8), "a guider does not keep _step and _num_inference_steps")


def _progress_bar() -> None:
    pipe = _pipeline()
    with quiet(pipe):
        _expect(pipe.progress_bar(total=1).disable, "a pipeline's progress bar is not silenced")
    _expect("_progress_bar_config" not in vars(pipe), "silencing leaves _progress_bar_config behind")
    pipe.set_progress_bar_config(desc="mine")
    with quiet(pipe):
        pass
    _expect(pipe._progress_bar_config == {"desc": "mine"}, "_progress_bar_config is not given back")


def _skipped_attention() -> None:
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    _expect(not attention_is_skipped(), "attention is taken for skipped")
    with AttentionScoreSkipFunctionMode():
        _expect(attention_is_skipped(), "_get_current_function_mode_stack does not hold AttentionScoreSkipFunctionMode")


def _tiny_decoder() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def _lookup() -> None:
    import torch
    from transformers import AttentionInterface
    from transformers.models.llama import modeling_llama

    model = _tiny_decoder()
    attention = model.model.layers[0].self_attn
    seen: list[dict[str, Any]] = []

    def spy(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return q.transpose(1, 2), None

    name = "accelplug_contract"
    own = attention_name(attention.config)
    _expect(own in ("sdpa", "eager"), f"config._attn_implementation is {own!r}, expected sdpa or eager")
    _expect(looks_kernel_up(type(attention)), "LlamaAttention.forward does not call get_interface")
    register_attention(name, spy)
    try:
        attention.config = config_view(attention.config, name)
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]), accelplug_contract=1)
    finally:
        unregister_attention(name)
    _expect(seen, "the registered function was not called: it is not looked up by config._attn_implementation")
    _expect(seen[0].get("accelplug_contract") == 1, "an extra argument does not reach the attention function")
    _expect(attention_name(model.config) == own, "a view of a module's config changed the model's")
    _expect(name not in AttentionInterface(), "a function that was taken out of _global_mapping is still there")
    _expect(
        attention_function("eager", type(attention)) is modeling_llama.eager_attention_forward,
        "get_interface does not give a module's own eager_attention_forward",
    )


def _cache_contract() -> None:
    """What reads a prompt and then a token: the decoder is handed the very cache that was given and came back."""
    import torch
    from transformers import DynamicCache

    model, cache = _tiny_decoder(), DynamicCache()
    _expect(cache.get_seq_length() == 0, "an empty cache does not say that it is empty")
    cache._accelplug_contract = 1
    seen: list[Any] = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(cache_given(kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        given = {cache_keyword(type(model).forward): cache}
        output = model(torch.tensor([[1, 2, 3]]), **given)
        _expect(cache_of(output) is cache, f"a model's output holds its cache under none of {CACHE_NAMES}")
        model(torch.tensor([[4]]), **given)
    _expect(all(x is cache for x in seen), f"the decoder is handed its cache under none of {CACHE_NAMES}")
    _expect(cache.get_seq_length() == 4, "a cache does not count the tokens of a prompt and of the step behind it")
    _expect(tokens_seen(cache_layer(cache, 0)) == 4, "a layer of a cache does not count its tokens")


def _collected() -> None:
    """What is asked for is known inside of attention, and layers that are run in between are not collected."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager")).eval()
    asked: list[bool] = []
    layer: Any = model.model.layers[0]

    def between(module: Any, args: Any) -> None:
        asked.append(attention_is_collected())
        with uncollected():
            _expect(not attention_is_collected(), "attention is collected where nothing is to be")

    layer.self_attn.register_forward_pre_hook(between)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
        found = model(torch.tensor([[1, 2, 3]]), output_attentions=True).attentions
    _expect(asked == [False, True], f"whether attention is asked for is said to be {asked}, expected [False, True]")
    _expect(len(found) == 2, f"attention of {len(found)} layers of 2 was collected")


def _windows() -> None:
    from transformers import DynamicCache, MistralConfig

    layers = [cache_layer(DynamicCache(config=MistralConfig(sliding_window=window)), 0) for window in (4, None)]
    _expect(
        [slides(layer) for layer in layers] == [True, False], "is_sliding of a cache's layer does not say that it slides"
    )


def _packed() -> None:
    from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs

    arguments = dict.fromkeys(PagedAttentionArgs.__annotations__)
    _expect(packs_sequences(arguments), "continuous batching passes no read_index to a model")


def _compiled_call() -> None:
    from transformers import CompileConfig

    model = _tiny_decoder()
    before = set(vars(model))
    model.get_compiled_call(CompileConfig(backend="eager"))
    _expect(set(vars(model)) - before, "generate() keeps what it compiled elsewhere than at _compiled_call")
    forget_compiled_call(model)
    left = sorted(set(vars(model)) - before)
    _expect(not left, f"generate() keeps {left} beside _compiled_call and _last_compile_config")


def _shared_heads() -> None:
    model = _tiny_decoder()
    for name in ("_device_mesh", "_tp_size"):
        _expect(hasattr(model, name), f"PreTrainedModel has no {name}")
    _expect(tensor_mesh(model) is None, "a model in one process is taken for a parallel one")


def _origin() -> None:
    _expect(ORIGIN in _tiny_decoder().config.to_dict(), f"a config has no {ORIGIN}")


def _positions() -> None:
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLModel

    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "layer_types": ["full_attention"],
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    model = Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=7)).eval()
    ids = torch.tensor([[1, 2, 7, 3]])
    with torch.no_grad():
        model(input_ids=ids, mm_token_type_ids=(ids == 7).int(), image_grid_thw=torch.tensor([[1, 2, 2]]))
    _expect(position_offset(model) is not None, "a forward of Qwen2VLModel does not write rope_deltas")
    set_position_offset(model, None)
    _expect(position_offset(model) is None, "rope_deltas was not given back")
