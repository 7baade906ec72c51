"""Getting in between a processor of diffusers and attention, and out again, without touching anything but the instance.

A processor's own ``__call__`` is re-bound: the same instructions, over a copy of its globals in which the two names that reach
attention lead to `_route`. It lives in a dynamic subclass, set on a shallow copy of the processor. The layer is known by a
`Record` on the attention module. No source of diffusers is copied, no class or module of it is changed.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accelplug import compat
from accelplug.hosts import ulysses
from accelplug.hosts.ulysses import Gathered
from accelplug.hosts.undo import Undo

RECORD = "_accelplug"
"""Attribute of an attention module that holds its `Record` while a plug is on."""


class Record(Protocol):
    """What a host leaves at an attention module."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        dense: Callable[..., Tensor],
        blocked: str | None,
    ) -> Tensor:
        """Answer one attention call; all tensors (B, H, S, D). `blocked`: why only dense can serve, or None."""

    @property
    def gathered(self) -> Gathered | None:
        """Where the tokens lie that ranks have exchanged, if they are to be put in order."""


class _Slot(threading.local):
    """The record whose processor runs now, per thread. (A ContextVar cannot be traced by Dynamo.)"""

    def __init__(self) -> None:  # in every thread: Dynamo guards on what the instance holds, not on a default of the class
        self.record: Record | None = None


_slot = _Slot()


def can_rebind(processor: object) -> bool:
    """Whether `processor` reaches attention by a name that can be re-bound."""
    call = inspect.getattr_static(type(processor), "__call__", None)
    return isinstance(call, types.FunctionType) and bool(_dispatching_names(call))


def way_out(processor: object) -> str:
    """Say what to do about a processor that cannot be re-bound."""
    name = type(processor).__name__
    calls = {"Sliced": "pipe.disable_attention_slicing()", "XFormers": "pipe.disable_xformers_memory_efficient_attention()"}
    first = next(
        (call for start, call in calls.items() if name.startswith(start)), "set_attn_processor() with one that does"
    )
    return f"{name} reaches attention by no name that can be re-bound; call {first} first"


def rebind(attention: Any, record: Record, undo: Undo) -> Any:
    """Set a re-bound copy of `attention`'s processor on it, and `record` beside; return the original processor."""
    original = attention.processor
    rebound = copy.copy(original)
    object.__setattr__(rebound, "__class__", _subclass_of(original))
    undo.put(attention, RECORD, record)
    undo.add(functools.partial(_restore, attention, record, original))
    _register(type(rebound), type(original), record)
    attention.processor = rebound
    return original


def is_rebound(attention: Any, record: Record) -> bool:
    """Whether `attention` still runs the re-bound processor that `rebind` put there for `record`."""
    return attention.__dict__.get(RECORD) is record and hasattr(type(attention.processor), "stock")


def _restore(attention: Any, record: Record, original: Any) -> None:
    """Undo `rebind`. A processor that somebody else set since is left alone; what was set on ours (backend, parallelism) is kept."""
    if is_rebound(attention, record):
        vars(original).update(vars(attention.processor))
        attention.processor = original
    _unregister(_subclass_of(original), record)


_users: dict[type, weakref.WeakSet[Any]] = {}
"""By re-bound class, the records whose modules run it."""
_lock = threading.RLock()  # an interrupt on the way out of it must not lock the undo out


def _register(subclass: type, stock: type, record: Record) -> None:
    """Let layer skipping and PAG, which look processors up by exact class, know a re-bound class while it is in use."""
    metadata = compat.diffusers.processor_metadata()
    with _lock:
        _users.setdefault(subclass, weakref.WeakSet()).add(record)
        if stock in metadata:
            metadata[subclass] = metadata[stock]


def _unregister(subclass: type, record: Record) -> None:
    metadata = compat.diffusers.processor_metadata()
    with _lock:
        users = _users.get(subclass, weakref.WeakSet())
        users.discard(record)
        if not users:
            _users.pop(subclass, None)
            metadata.pop(subclass, None)


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    **others: Any,
) -> Tensor:
    """Stand in for ``dispatch_attention_fn``, whose tensors are (B, S, H, D)."""
    call = functools.partial(
        _stock_dispatch,
        dropout_p=dropout_p,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        attention_kwargs=attention_kwargs,
        **others,
    )
    record = _slot.record
    if record is None:
        return call(query, key, value, attn_mask=attn_mask, scale=scale)
    blocked, parallel = _only_dense(dropout_p, is_causal), others.get("parallel_config")
    exchanges = ulysses.exchanges(parallel)
    if parallel is not None and not exchanges:
        blocked = blocked or "its tokens are shared out over ranks that do not exchange them"
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if not exchanges or blocked or enable_gqa or gradients:
        return _answer(record, call, query, key, value, attn_mask, scale, blocked)
    whole = functools.partial(call, parallel_config=None)

    def answer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if (gathered := record.gathered) is None:
            return _answer(record, whole, q, k, v, mask, scale, None)
        q, k, v = map(gathered.in_order, (q, k, v))
        mask = None if mask is None else gathered.mask_in_order(mask)
        return gathered.as_gathered(_answer(record, whole, q, k, v, mask, scale, None))

    return ulysses.attend_exchanged(query, key, value, attn_mask, scale, parallel, answer)


def _only_dense(dropout_p: float, is_causal: bool) -> str | None:
    return "the call has dropout or is causal" if dropout_p or is_causal else None


def _answer(
    record: Record,
    call: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scale: float | None,
    blocked: str | None,
) -> Tensor:
    """Have `record` answer for `call`, a dispatcher; tensors (B, S, H, D)."""

    def dense(q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None, **changed: Any) -> Tensor:
        return call(
            query if q is None else q.transpose(1, 2),
            key if k is None else k.transpose(1, 2),
            value if v is None else v.transpose(1, 2),
            scale=_scale_for(q, query, scale),
            **{"attn_mask": mask, **changed},
        ).transpose(1, 2)

    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return record.attend(q, k, v, mask, scale, dense, blocked).transpose(1, 2)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand in for ``F.scaled_dot_product_attention``, whose tensors are (B, H, S, D)."""
    dense = dense_sdpa(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    record = _slot.record
    if record is None:
        return dense()
    return record.attend(query, key, value, attn_mask, scale, dense, _only_dense(dropout_p, is_causal))


def _scale_for(q: Tensor | None, query: Tensor, scale: float | None) -> float | None:
    """The call's factor on q.k, for other queries than its own: the default follows the head dimension, which they may extend."""
    return query.shape[-1] ** -0.5 if scale is None and q is not None and q.shape[-1] != query.shape[-1] else scale


def dense_sdpa(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Callable[..., Tensor]:
    """Return torch's attention as patches call it: what they leave out is as it was given here."""

    def dense(q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None, **changed: Any) -> Tensor:
        arguments = {**given, **changed, "scale": _scale_for(q, query, given.get("scale"))}
        return F.scaled_dot_product_attention(
            query if q is None else q, key if k is None else k, value if v is None else v, **arguments
        )

    return dense


class _Functional(types.ModuleType):
    """``torch.nn.functional`` with one name changed."""

    scaled_dot_product_attention = staticmethod(_sdpa)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


_functional = _Functional("accelplug_functional")
_stock_dispatch = compat.diffusers.dispatch_attention_fn()


def _dispatching_names(function: types.FunctionType) -> set[str]:
    """Names in `function`, or in helpers of its module that it calls, that reach attention."""
    names = set(function.__code__.co_names) & compat.diffusers.ENTRY_POINTS
    for helper in _helpers(function).values():
        names |= set(helper.__code__.co_names) & compat.diffusers.ENTRY_POINTS
    return names


def _helpers(function: types.FunctionType) -> dict[str, types.FunctionType]:
    """Functions of the same module that `function` names and that reach attention themselves."""
    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {
        name: helper
        for name, helper in named.items()
        if isinstance(helper, types.FunctionType)
        and helper.__module__ == function.__module__
        and set(helper.__code__.co_names) & compat.diffusers.ENTRY_POINTS
    }


def _rebound(function: types.FunctionType) -> types.FunctionType:
    names = dict(function.__globals__)
    names["__name__"] = compat.torch.DYNAMO_MODULE_NAME
    if "dispatch_attention_fn" in names:
        names["dispatch_attention_fn"] = _dispatch
    names.update({name: _functional for name, value in names.items() if value is F})
    names.update({name: _rebound(helper) for name, helper in _helpers(function).items()})
    # Dynamo caches compiled frames per code object: a shared one would let a stock and a patched pipe run each other's graphs.
    code = function.__code__.replace(co_name=f"{function.__code__.co_name} [accelplug]")
    rebound = types.FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
    rebound.__kwdefaults__ = function.__kwdefaults__
    return rebound


def _subclass_of(processor: object) -> type:
    cls: Any = type(processor)
    return _subclass(cls)


@functools.cache
def _subclass(cls: Any) -> type:
    call = inspect.getattr_static(cls, "__call__")
    body = _rebound(call)

    def __call__(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before, _slot.record = _slot.record, getattr(attn, RECORD, None)
        try:
            return body(self, attn, *args, **kwargs)
        finally:
            _slot.record = before

    __call__.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]  # Attention.forward filters kwargs by it
    members = {"__call__": __call__, "__reduce_ex__": _stock_reduce}
    return type(
        cls.__name__, (cls,), {**members, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "stock": cls}
    )


def _stock_reduce(self: Any, protocol: Any) -> Any:
    """Copy and pickle as an instance of the stock class, which can be found by its name."""
    return object.__new__, (self.stock,), self.__dict__
