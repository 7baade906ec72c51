"""The one function of ours in transformers' table of attention functions, which all hosts of its models share."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakSet

from torch import Tensor

from accelplug import compat
from accelplug.hosts.stream import FORWARD, STREAM

_inside: WeakSet[Any] = WeakSet()
"""Hosts for which the function stands in the table."""
_entering = threading.RLock()  # an interrupt on the way out of it must not lock the undo out


def enter(host: Any) -> None:
    """Put the function into the table for a host."""
    with _entering:
        _inside.add(host)
        compat.transformers.register_attention(compat.transformers.ATTENTION, _attention_function)


def leave(host: Any) -> None:
    """Take it out again when no host needs it. Taken twice, it does no harm."""
    with _entering:
        _inside.discard(host)
        if not _inside:
            compat.transformers.unregister_attention(compat.transformers.ATTENTION)


def _attention_function(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """The registered function: what stands at the module answers."""
    forward = kwargs.pop(FORWARD, None)
    return getattr(module, STREAM).attend(module, query, key, value, attention_mask, forward, kwargs)
