"""What enters an attention module, in the hands of a patch: it may look at it, or put fewer tokens in its place and undo that behind.

Two hooks around the module, there only where a recipe has such a patch. Between them the call is answered by what `Patch.enter` returned.
Fewer tokens can enter where nothing but them does: position embeddings, masks and other sequences have an entry a token, and a module that
normalises over tokens or adds its input to its output would be given another answer. Such calls run dense, counted; compiled code too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from accelplug.call import AttentionCall
from accelplug.hosts.site import Settled, SiteRecord
from accelplug.hosts.undo import Undo
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.base import Inside, Patch

HIDDEN = "hidden_states"
"""Name of the argument that enters the projections, the first one, in both libraries."""


class Within(Patch):
    """Answers the call of one forward of a module by what `Patch.enter` returned. The gate does not judge it: projections are not timed."""

    speed = False

    def __init__(self, patch: Patch, inside: Inside, tokens: int) -> None:
        self.config, self.patch, self.inside, self.tokens = patch.config, patch, inside, tokens

    def attend(self, call: AttentionCall, params: Any) -> Tensor:
        """Answer it."""
        return self.inside.attend(call)

    def inspect(self, call: AttentionCall, params: Any) -> tuple[float | None, BlockPlan | None]:
        """What it costs, of dense attention among all tokens."""
        if call.q.shape[-2] == self.tokens:
            return self.patch.inspect(call, params)
        return (call.q.shape[-2] / self.tokens) ** 2, None


class _OfModule(threading.local):
    """What a thread's forward of the module has changed: what was settled, and how its output is undone."""

    def __init__(self) -> None:
        self.changed: tuple[Settled, Inside] | None = None


class Entrance:
    """The hooks around one attention module.

    Parameters
    ----------
    record : what stands at the module.
    """

    def __init__(self, record: SiteRecord) -> None:
        self.record, self._here = record, _OfModule()

    def install(self, undo: Undo) -> None:
        """Put the hooks in place."""
        undo.hook(self.record.module, "register_forward_hook", self._leave, always_call=True)
        undo.hook(self.record.module, "register_forward_pre_hook", self._enter, with_kwargs=True)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if torch.compiler.is_compiling() or module is not self.record.module:
            return None
        here, patch = self.record.settled, self.record.settled.patch
        self.record.barred = None
        if patch is None or not patch.enters:
            return None
        hidden, others = _what_enters(args, kwargs)
        reason = _why_not_tokens(hidden, here.length)
        inside = patch.enter(hidden, here.params) if reason is None else None
        if inside is not None and inside.hidden is not hidden and (reason := _one_a_token(module, others)) is not None:
            inside = None
        if inside is None:
            self.record.barred = reason
            return None
        within = Within(patch, inside, here.length)
        self._here.changed = here, inside
        self.record.settled = replace(here, patch=within, length=inside.hidden.shape[1])
        if args:
            return (inside.hidden, *args[1:]), kwargs
        return args, {**kwargs, HIDDEN: inside.hidden}

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if torch.compiler.is_compiling() or module is not self.record.module or self._here.changed is None:
            return None
        (here, inside), self._here.changed = self._here.changed, None
        self.record.settled = here
        if output is None:  # it raised
            return None
        return (inside.leave(output[0]), *output[1:]) if isinstance(output, tuple) else inside.leave(output)


def _what_enters(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What enters, and all else that a module is given, by name where it has one."""
    named = dict(kwargs)
    hidden = args[0] if args else named.pop(HIDDEN, None)
    return hidden, {**{f"argument {number}": value for number, value in enumerate(args[1:], 2)}, **named}


def _why_not_tokens(hidden: Any, length: int) -> str | None:
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[1] != length:
        shape = f"of shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        return f"what enters is {shape} where tokens (B, {length}, C) were expected"
    if torch.is_grad_enabled() and hidden.requires_grad:
        return "gradients are asked for; run under torch.no_grad()"
    return None


def _one_a_token(module: nn.Module, others: Mapping[str, Any]) -> str | None:
    """Why fewer tokens cannot enter, or None."""
    if getattr(module, "residual_connection", False):
        return "its module adds what enters to what leaves, so that fewer tokens cannot enter"
    if any(getattr(module, norm, None) is not None for norm in ("group_norm", "spatial_norm")):
        return "its module normalises over tokens, so that fewer cannot enter"
    given = next((name for name, value in others.items() if any(_tensors_in(value))), None)
    return None if given is None else f"{given} is given beside the tokens, so that fewer cannot enter"


def _tensors_in(value: Any) -> Iterable[bool]:
    if isinstance(value, tuple | list):
        return (found for item in value for found in _tensors_in(item))
    return [True] if isinstance(value, Tensor) else []
