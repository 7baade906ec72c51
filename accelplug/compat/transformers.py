"""Private names of transformers, each with its contract below."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelplug.call import FULL_ATTENTION
from accelplug.compat.contracts import contract, expect
from accelplug.compat.torch import unwrap_compiled

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
                "__reduce__": lambda self: (_itself, (_stock_config(self),)),
                "__deepcopy__": lambda self, memo: _copied(self, memo),
                "__module__": cls.__module__,
                "__qualname__": cls.__qualname__,
            },
        )
    view: Any = object.__new__(_VIEWS[cls, name])
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


def _itself(config: Any) -> Any:
    return config


def _stock_config(view: Any) -> Any:
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


def masks_by_name(cls: type) -> bool:
    """Whether an attention class hides keys of its own choice under transformers' eager and sdpa functions alone, by their names.

    Sparse attention of DeepSeek's kind does: any other function is told which keys to read, and must see to it.
    """
    code = getattr(inspect.unwrap(inspect.getattr_static(cls, "forward")), "__code__", None)
    return code is not None and ("eager", "sdpa") in code.co_consts


def attention_name(config: Any) -> str:
    """Return which attention function a model is set to use."""
    return config._attn_implementation or "eager"


@contract("transformers: attention modules look their function up by config at every call, and take extra arguments")
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
    expect(own in ("sdpa", "eager"), f"config._attn_implementation is {own!r}, expected sdpa or eager")
    expect(looks_kernel_up(type(attention)), "LlamaAttention.forward does not call get_interface")
    register_attention(name, spy)
    try:
        attention.config = config_view(attention.config, name)
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]), accelplug_contract=1)
    finally:
        unregister_attention(name)
    expect(seen, "the registered function was not called: it is not looked up by config._attn_implementation")
    expect(seen[0].get("accelplug_contract") == 1, "an extra argument does not reach the attention function")
    expect(attention_name(model.config) == own, "a view of a module's config changed the model's")
    expect(name not in AttentionInterface(), "a function that was taken out of _global_mapping is still there")
    expect(
        attention_function("eager", type(attention)) is modeling_llama.eager_attention_forward,
        "get_interface does not give a module's own eager_attention_forward",
    )


def crosses(cls: type) -> bool:
    """Whether an attention class reads keys from outside of its own sequence."""
    forward = inspect.signature(inspect.getattr_static(cls, "forward")).parameters
    return not {"cross_attention_states", "encoder_hidden_states"}.isdisjoint(forward)


def image_text_classes() -> tuple[str, ...]:
    """Return the names of all classes that AutoModelForImageTextToText makes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return tuple(dict.fromkeys(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()))


@contract("transformers: the classes for images and text are listed by name")
def _image_text_classes() -> None:
    missing = {"LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"} - set(image_text_classes())
    expect(not missing, f"among the classes for images and text there is no {', '.join(sorted(missing))}")


def entering(layer: Any, hidden: Any) -> Any:
    """Return what enters a layer, (B, S, C): of several streams, (N, B, S, C), the one that its attention reads (Gemma 3n)."""
    return hidden[layer.config.altup_active_idx] if hidden.ndim == 4 else hidden


@contract("transformers: layers with several streams say which one their attention reads")
def _streams() -> None:
    from transformers import Gemma3nTextConfig

    expect(hasattr(Gemma3nTextConfig(), "altup_active_idx"), "a Gemma3nTextConfig has no altup_active_idx")


def must_be_given(base: Any) -> set[str]:
    """Return what a base model's forward cannot do without, but for tokens."""
    parameters = inspect.signature(type(base).forward).parameters
    required = {name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return required - {"self", "input_ids"}


def number_of_layers(decoder: Any) -> int:
    """Return how many layers a decoder has."""
    return len(decoder.layers) if hasattr(decoder, "layers") else decoder.config.num_hidden_layers


def layer_type(module: Any) -> str:
    """Return the type of the layer that an attention module stands in, in the words of transformers' configs."""
    if module.layer_idx < len(types := layer_types(module.config)):
        return types[module.layer_idx]
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    return FULL_ATTENTION if window is None else "sliding_attention"


def layer_types(config: Any) -> list[str]:
    """Return the type of each of a decoder's layers, as its config has them: attention's, and those of what stands in its place; or []."""
    return list(getattr(config, "layer_types", None) or ())


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


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output, or None."""
    from transformers import Cache

    items = output if isinstance(output, tuple) else (cache_given(vars(output)),)
    return next((item for item in items if isinstance(item, Cache)), None)


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


def tokens_seen(layer: Any) -> int:
    """Return how many tokens went through a cache layer."""
    return layer.get_seq_length()


def keeps_all(layer: Any) -> bool:
    """Whether a cache layer holds all keys and values as they are, and grows with them."""
    from transformers.cache_utils import DynamicLayer

    return type(layer) is DynamicLayer


def is_offloaded(cache: Any) -> bool:
    """Whether a cache moves its layers to CPU memory and back by itself."""
    return bool(getattr(cache, "offloading", False))


CACHE_LAYER_METHODS = frozenset(
    {
        "update", "lazy_initialization", "get_mask_sizes", "get_seq_length", "get_max_length", "get_max_cache_shape", "offload",
        "prefetch", "reset", "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices",
    }
)  # fmt: skip
"""What a cache asks of a layer that keeps all."""


@contract("transformers: a layer of a cache may be another's, and is asked for what is known")
def _cache_layers() -> None:
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    public = {name for name in dir(DynamicLayer) if not name.startswith("_") and callable(getattr(DynamicLayer, name))}
    expect(not public - CACHE_LAYER_METHODS, f"layers of a cache are asked for {sorted(public - CACHE_LAYER_METHODS)} too")
    model, cache = _tiny_decoder(), DynamicCache()
    asked: list[int] = []

    class Layer(DynamicLayer):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append(key_states.shape[2])
            return super().update(key_states, value_states)

    given = {cache_keyword(type(model).forward): cache}
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), **given)
        expect(keeps_all(cache.layers[0]), "a dynamic cache has another layer than DynamicLayer")
        expect(not is_offloaded(cache), "a plain cache says that it is offloaded")
        held, cache.layers[0] = cache.layers[0], Layer()
        cache.layers[0].update(held.keys, held.values)
        model(torch.tensor([[4]]), **given)
    expect(asked == [3, 1], f"another layer in a cache was handed {asked}, expected [3, 1] tokens")


@contract("transformers: a decode step is handed the cache that read the prompt, and the cache takes attributes")
def _cache_contract() -> None:
    """What reads a prompt and then a token: the decoder is handed the very cache that was given and came back."""
    import torch
    from transformers import DynamicCache

    model, cache = _tiny_decoder(), DynamicCache()
    expect(cache.get_seq_length() == 0, "an empty cache does not say that it is empty")
    cache._accelplug_contract = 1
    seen: list[Any] = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(cache_given(kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        given = {cache_keyword(type(model).forward): cache}
        output = model(torch.tensor([[1, 2, 3]]), **given)
        expect(cache_of(output) is cache, f"a model's output holds its cache under none of {CACHE_NAMES}")
        model(torch.tensor([[4]]), **given)
    expect(all(x is cache for x in seen), f"the decoder is handed its cache under none of {CACHE_NAMES}")
    expect(cache.get_seq_length() == 4, "a cache does not count the tokens of a prompt and of the step behind it")
    expect(tokens_seen(cache_layer(cache, 0)) == 4, "a layer of a cache does not count its tokens")


def slides(layer: Any) -> bool:
    """Whether a cache layer keeps a window only."""
    return bool(getattr(layer, "is_sliding", False))


def window_of(module: Any) -> int | None:
    """Return how many keys an attention module reads at most, None where it reads all: as it says itself, or its config for all."""
    found = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    return found if isinstance(found, int) else None


@contract("transformers: a layer of a cache says whether it keeps a window only")
def _windows() -> None:
    from transformers import DynamicCache, MistralConfig

    layers = [cache_layer(DynamicCache(config=MistralConfig(sliding_window=window)), 0) for window in (4, None)]
    expect([slides(layer) for layer in layers] == [True, False], "is_sliding of a cache's layer does not say that it slides")
    from transformers.models.mistral.modeling_mistral import MistralAttention

    found = [window_of(MistralAttention(MistralConfig(sliding_window=window), 0)) for window in (4, None)]
    expect(found == [4, None], f"attention modules say that their windows are {found}, expected [4, None]")


@contract("transformers: heads are put together by o_proj")
def _outputs() -> None:
    weight = output_weight(_tiny_decoder().model.layers[0].self_attn)
    expect(weight is not None and tuple(weight.shape) == (16, 16), "a LlamaAttention has no o_proj with a weight (C, H D)")


def output_weight(module: Any) -> Any:
    """Return the weight (C, H D) of the projection behind attention, None where it is not where it is known to be."""
    projection = getattr(module, "o_proj", None)
    return getattr(projection, "weight", None)


def adds_to_attention(module: Any, kwargs: Mapping[str, Any]) -> str | None:
    """Say what an attention call of an encoder takes beside q, k, v, a mask and a scale, or None."""
    strange = sorted(name for name in kwargs.keys() - ATTENTION_KWARGS if kwargs[name] is not None)
    if strange:
        return f"its attention is given {strange[0]}, which is not known"
    if told := [name for name in ("s_aux", "softcap", "position_bias", "sliding_window") if kwargs.get(name) is not None]:
        return f"its attention has {told[0]}"
    if kwargs.get("dropout"):
        return "dropout is on"
    return "it is causal" if is_causal(module, dict(kwargs)) else None


def of_one_sequence(kwargs: dict[str, Any], q: Any, k: Any) -> dict[str, Any]:
    """Return what an attention function is told of a part of what it was called with: flash functions are told lengths."""
    import torch

    if kwargs.get("cu_seq_lens_q") is None:
        return kwargs
    ends = {
        f"cu_seq_lens_{name}": torch.tensor([0, x.shape[-2]], dtype=torch.int32, device=x.device)
        for name, x in (("q", q), ("k", k))
    }
    return {**kwargs, **ends, "max_length_q": q.shape[-2], "max_length_k": k.shape[-2]}


def keys_that_may_be_read(mask: Any, tokens: int) -> Any:
    """Return which keys a mask lets all queries read, bool (B, S); None where it says more than that, or is in no form that is known."""
    import torch

    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4) or mask.shape[-1] != tokens:
        return None
    lowest = torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else None
    if lowest is not None and mask.ndim == 4 and not bool(((mask == 0) | (mask < lowest)).all()):
        return None
    keep = mask.bool() if lowest is None or mask.ndim == 2 else mask > lowest
    if keep.ndim == 2:
        return keep
    return keep[:, 0, 0] if bool((keep == keep[:, :1, :1]).all()) else None


def packs_sequences(arguments: Mapping[str, Any]) -> bool:
    """Whether a forward or an attention call is continuous batching's, which packs several sequences into one row."""
    return "read_index" in arguments


@contract("transformers: continuous batching is known by its arguments")
def _packed() -> None:
    from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs

    arguments = dict.fromkeys(PagedAttentionArgs.__annotations__)
    expect(packs_sequences(arguments), "continuous batching passes no read_index to a model")


NO_LABEL = -100
"""What stands in ``labels`` where there is none."""


def valid_tokens(mask: Any, past: int) -> Any:
    """Return which tokens are not padding, bool (B, S), of a mask in any of transformers' forms; None where it does not say.

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


@contract("transformers: attention is collected from what attention modules return")
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
            expect(not attention_is_collected(), "attention is collected where nothing is to be")

    layer.self_attn.register_forward_pre_hook(between)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
        found = model(torch.tensor([[1, 2, 3]]), output_attentions=True).attentions
    expect(asked == [False, True], f"whether attention is asked for is said to be {asked}, expected [False, True]")
    expect(len(found) == 2, f"attention of {len(found)} layers of 2 was collected")


def forget_compiled_call(model: Any) -> None:
    """Drop the decode step that generate() compiled and keeps on the model."""
    vars(model).pop("_compiled_call", None)
    vars(model).pop("_last_compile_config", None)


@contract("transformers: the decode step that generate() compiled is kept on the model")
def _compiled_call() -> None:
    from transformers import CompileConfig

    model = _tiny_decoder()
    before = set(vars(model))
    model.get_compiled_call(CompileConfig(backend="eager"))
    expect(set(vars(model)) - before, "generate() keeps what it compiled elsewhere than at _compiled_call")
    forget_compiled_call(model)
    left = sorted(set(vars(model)) - before)
    expect(not left, f"generate() keeps {left} beside _compiled_call and _last_compile_config")


def tensor_mesh(model: Any) -> Any:
    """Return the mesh of the processes that share each layer's heads of a model, or None."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or not getattr(model, "_tp_size", None):
        return None
    names = mesh.mesh_dim_names or ()
    return mesh["tp"] if "tp" in names and len(names) > 1 else mesh


@contract("transformers: models say how their heads are shared out")
def _shared_heads() -> None:
    model = _tiny_decoder()
    for name in ("_device_mesh", "_tp_size"):
        expect(hasattr(model, name), f"PreTrainedModel has no {name}")
    expect(tensor_mesh(model) is None, "a model in one process is taken for a parallel one")


ORIGIN = "_name_or_path"
"""Key of a config that says where a model was loaded from."""


@contract("transformers: a config says under one key where it came from")
def _origin() -> None:
    expect(ORIGIN in _tiny_decoder().config.to_dict(), f"a config has no {ORIGIN}")


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


@contract("transformers: Qwen's models keep where positions have got to on the base model")
def _offset_of_positions() -> None:
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
    expect(position_offset(model) is not None, "a forward of Qwen2VLModel does not write rope_deltas")
    set_position_offset(model, None)
    expect(position_offset(model) is None, "rope_deltas was not given back")


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


def _tiny_decoder() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
