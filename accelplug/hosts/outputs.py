"""Keeping only those layers' outputs that a geometry transformer's heads read (the memory fix of VGGT*, arXiv 2509.02560).

The aggregator of VGGT gathers the outputs of all pairs of blocks, (B, S, P, 2 C) each, and its heads read four of them: at 1,000 frames
of 1,041 tokens the others take 79 GiB in bfloat16. Inside of `heads_outputs_alone` what is not read comes as a tensor of its shape that
holds one number, NaN, so that whoever reads it after all will notice. What the model gives is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from accelplug.errors import UnsupportedError
from accelplug.families.geometry import alternation_of
from accelplug.hosts.undo import Undo

READ = ("intermediate_layer_idx", "layers")
"""Attributes of a head that say which layers' outputs it reads, beside the last: of VGGT's, and of the small one's."""


def layers_read(model: Any) -> frozenset[int]:
    """Return which layers' outputs a model's heads read.

    Raises
    ------
    UnsupportedError
        If no head says so.
    """
    heads = [module for name, module in model.named_modules() if "head" in name]
    found = {int(layer) for head in heads for name in READ for layer in _layers_of(getattr(head, name, ()))}
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no head that says which layers it reads: expected one with {' or '.join(READ)}. Say which: "
            "heads_outputs_alone(model, layers=...)."
        )
    return frozenset(found)


def _layers_of(value: Any) -> Collection[int]:
    return value if isinstance(value, list | tuple) and all(isinstance(one, int) for one in value) else ()


def bytes_of_outputs(frames: int, tokens: int, width: int, layers: int, itemsize: int = 2) -> int:
    """Return what the outputs of so many layers take: frames x tokens of a frame x 2 C numbers each, `width` is C."""
    return frames * tokens * 2 * width * layers * itemsize


@contextmanager
def heads_outputs_alone(model: Any, layers: Collection[int] | None = None) -> Iterator[None]:
    """Have the aggregator of `model` keep the outputs that its heads read, and no others, while this lasts.

    Parameters
    ----------
    layers : whose outputs are read, from 0; None asks the heads. The last is always kept: the camera head reads it.

    Raises
    ------
    UnsupportedError
        If it is not a model whose aggregator gathers outputs of frame and global blocks side by side, or no head says what it reads.
    """
    root = next((module for module in model.modules() if alternation_of(module)), None)
    family = None if root is None else alternation_of(root)
    if root is None or family is None or "frame_blocks" not in family.beside:
        raise UnsupportedError(
            f"{type(model).__name__} has no aggregator that gathers the outputs of its layers: expected VGGT or VGGT-Omega."
        )
    number = len(getattr(root, family.blocks))
    kept = {layer % number for layer in (layers_read(model) if layers is None else layers)} | {number - 1}
    with Undo() as undo:
        undo.put(root, "forward", _Gathering(root.forward, frozenset(kept), root.frame_blocks[0].attn.qkv.in_features))
        yield


@dataclass(frozen=True, eq=False)
class _Gathering:
    """Stands in for an aggregator's forward."""

    forward: Callable[..., Any]
    kept: frozenset[int]
    width: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Forgetting(self.kept, self.width):
            return self.forward(*args, **kwargs)


@dataclass(eq=False)
class _Forgetting(TorchFunctionMode):
    """While it is on, outputs of layers that nobody reads are not made. One is known by its width, twice that of its two parts."""

    kept: frozenset[int]
    width: int
    layer: int = field(default=0)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.cat or not self._is_output(*args, **kwargs):
            return func(*args, **kwargs)
        self.layer += 1
        if self.layer - 1 in self.kept:
            return func(*args, **kwargs)
        one = (args[0] if args else kwargs["tensors"])[0]
        return one.new_full((), torch.nan).expand(*one.shape[:-1], 2 * self.width)

    def _is_output(self, tensors: Any, dim: int = 0, **_: Any) -> bool:
        """Whether frame and global tokens (B, S, P, C) come side by side."""
        if len(tensors) != 2 or not all(isinstance(one, Tensor) and one.ndim == 4 for one in tensors):
            return False
        return dim in (-1, 3) and all(one.shape[-1] == self.width for one in tensors)
