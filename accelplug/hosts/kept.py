"""Layers of a cache that leave keys and values to what a patch keeps them in, and how a cache comes to have them and loses them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from accelplug import compat
from accelplug.call import KeptKeys
from accelplug.errors import UnsupportedError
from accelplug.hosts.stream import CURRENT


class KeptLayer(DynamicLayer):
    """A cache layer that is as long as its sequence, whatever is kept of it.

    Where it is reset, or others put keys of their own into it, it is a dynamic layer like any other.

    Parameters
    ----------
    kept : what keeps keys and values.
    like : the layer in whose place it stands.
    name : of the patch, for messages.
    """

    def __init__(self, kept: KeptKeys, like: Any, name: str) -> None:
        super().__init__()
        self._kept: KeptKeys | None = kept
        self.name, self.rows = name, len(like.keys)
        self.dtype, self.device, self.is_initialized = like.keys.dtype, like.keys.device, True
        self._show()

    @property
    def kept(self) -> KeptKeys | None:
        """What keeps keys and values, None where nothing does any more."""
        if self._kept is not None and (self.keys is not self._shown[0] or self.values is not self._shown[1]):
            self._kept = None
        return self._kept

    def _show(self, handed: tuple[Tensor, Tensor] | None = None) -> None:
        """Have keys and values be what others see of them: all, or what a step was handed."""
        assert self._kept is not None
        if handed is None:
            handed = (torch.empty(0), torch.empty(0)) if self._kept.freed else self._kept.whole()
        self.keys, self.values = self._shown = handed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if (kept := self.kept) is None:
            return super().update(key_states, value_states, *args, **kwargs)
        forward = CURRENT.get()
        if kept.freed and (forward is None or forward.stream is None):
            raise UnsupportedError(
                f"{self.name} has freed keys of this cache, and no longer stands in the model, or cannot tell whose they are. "
                "Start a new cache."
            )
        self._show(kept.append(key_states, value_states))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return super().get_seq_length() if (kept := self.kept) is None else kept.length

    def crop(self, tokens_to_remove: int) -> None:
        """Drop as many tokens as a number below 0 says; in transformers 5.17 a number above 0 says how many stay."""
        if (kept := self.kept) is None:
            super().crop(tokens_to_remove)
        else:
            kept.crop(tokens_to_remove if tokens_to_remove > 0 else kept.length + tokens_to_remove)
            self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.kept is None:
            super().reorder_cache(beam_idx)
        else:
            self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kept is None:
            super().batch_repeat_interleave(repeats)
        else:
            self._take(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.kept is None:
            super().batch_select_indices(indices)
        else:
            self._take(torch.arange(self.rows)[indices.cpu()])

    def _take(self, rows: Tensor) -> None:
        assert self._kept is not None
        self._kept.take_rows(rows)
        self.rows = len(rows)
        self._show()

    def reset(self) -> None:
        self._kept, self.keys, self.values = None, None, None  # type: ignore[assignment]
        self.is_initialized = False

    def offload(self) -> None:
        """Stay: where keys lie is for the patch to say."""

    def prefetch(self) -> None:
        """Stay."""


def hand_over(cache: Any, index: int, keep: Callable[[Tensor, Tensor], KeptKeys | None], name: str) -> None:
    """Have a patch keep the keys and values of a cache's layer, if it wants to; of a layer that slides, or is another's, it has nothing.

    Parameters
    ----------
    cache, index : the cache, and which of its layers.
    keep : the patch's, told keys and values (B, H_kv, S, D).
    name : of the patch.

    Raises
    ------
    UnsupportedError
        If the cache is static, quantised or offloaded, or of another kind that does not hold keys and values as they are.
    """
    layer = compat.transformers.cache_layer(cache, index)
    if layer is None or compat.transformers.slides(layer) or getattr(layer, "kept", None) is not None:
        return
    offloaded = compat.transformers.is_offloaded(cache)
    if offloaded or not (compat.transformers.keeps_all(layer) or isinstance(layer, KeptLayer)):
        kind = "is offloaded by transformers" if offloaded else f"has a {type(layer).__name__}"
        raise UnsupportedError(
            f"{name} keeps the keys and values of a dynamic cache its own way: expected layers of kind DynamicLayer, and this cache "
            f"{kind}. Leave out cache_implementation and pass no cache, or a DynamicCache; or remove the plug."
        )
    if (kept := keep(layer.keys, layer.values)) is not None:
        cache.layers[index] = KeptLayer(kept, layer, name)


def give_back(cache: Any) -> None:
    """Put dynamic layers in the place of ours, with all their keys and values; one that has freed some stays, and refuses to go on."""
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if isinstance(layer, KeptLayer) and (kept := layer.kept) is not None and not kept.freed:
            plain = DynamicLayer()
            keys, values = (x.to(layer.device).contiguous() for x in kept.whole())
            plain.lazy_initialization(keys, values)
            plain.keys, plain.values = keys, values
            cache.layers[index] = plain
