"""Where ids say that tokens lie: one full raster, whatever the distances between its frames, rows and columns."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from accelplug import compat
from accelplug.bounded import Bounded
from accelplug.families.base import Grid

R = TypeVar("R")
_READ: Bounded[tuple, tuple[tuple[weakref.ref[Any], ...], tuple[int, ...], Any]] = Bounded(64)
"""By what read them and the ids of tensors: these, how often each had been written to, and what they said."""


def once(read: Callable[..., R], *tensors: Any, **given: int) -> R | None:
    """Return ``read(*tensors, **given)``, which waits for the device, once while the tensors live and nobody writes to them.

    A pipeline makes its ids once a run, and hands them to every step. Of shapes alone, as under tracing, it returns None.
    """
    if any(compat.torch.is_fake(tensor) or tensor.device.type == "meta" for tensor in tensors):
        return None
    if any(tensor.is_inference() for tensor in tensors):  # nobody counts who writes to these
        return read(*tensors, **given)
    key, written = (read, *map(id, tensors), *given.items()), tuple(map(compat.torch.times_written, tensors))
    known = _READ.peek(key)
    if known is None or known[1] != written or any(ref() is not one for ref, one in zip(known[0], tensors, strict=True)):
        known = tuple(map(weakref.ref, tensors)), written, read(*tensors, **given)
        _READ.put(key, known)
    return known[2]


def rows_and_columns(ids: Any, ahead: int = 0) -> Grid | None:
    """Return (1, rows, columns) where `ids` (S, A), or (B, S, A) with equal samples, are a raster over axes 1 and 2.

    `ahead`: how many of them, ahead of the others, are of other tokens.
    """
    one = _sample(ids)
    return None if one is None else full_raster(one[ahead:], (1, 2))


def image_and_others(ids: Any) -> tuple[Grid, int] | None:
    """Return the grid of the image that `ids` begin with, and how many tokens of other images follow: theirs differ in another axis.

    `ids` are as in `rows_and_columns`; None where the first image lies otherwise.
    """
    one = _sample(ids)
    if one is None or one.ndim != 2 or not len(one):
        return None
    planes = one[:, [axis for axis in range(one.shape[1]) if axis not in (1, 2)]]
    elsewhere = (planes != planes[0]).any(1).nonzero().flatten()
    first = int(elsewhere[0]) if len(elsewhere) else len(one)
    grid = full_raster(one[:first], (1, 2))
    return None if grid is None else (grid, len(one) - first)


def full_raster(ids: Any, axes: tuple[int, ...]) -> Grid | None:
    """Return frames, rows and columns where `ids` (S, A), on the CPU, are a full raster, and None where they are not.

    Parameters
    ----------
    axes : entries of an id that grow from row to row and from column to column, or ahead of these from frame to frame; all others
        must be the same for all tokens.
    """
    import torch

    if ids.ndim != 2 or not len(ids):
        return None
    columns = _period(ids[:, axes[-1]])
    rows = len(ids) // columns if len(axes) == 2 else _period(ids[::columns, axes[-2]])
    frames = len(ids) // (rows * columns)
    if frames * rows * columns != len(ids):
        return None
    grid = ids.reshape(frames, rows, columns, -1)
    expected = grid[:1, :1, :1].repeat(frames, rows, columns, 1)
    for dim, axis in zip(range(3)[-len(axes) :], axes, strict=True):
        along = grid.movedim(dim, 0)[:, 0, 0, axis]
        if not bool((along.diff() > 0).all()):
            return None
        expected.movedim(dim, 0)[..., axis] = along[:, None, None]
    return (frames, rows, columns) if torch.equal(grid, expected) else None


def _period(x: Any) -> int:
    """After how many entries the first one comes again; all of them if it does not."""
    again = (x == x[0]).nonzero().flatten()
    return int(again[1]) if len(again) > 1 else len(x)


def _sample(ids: Any) -> Any:
    """Return ids (S, A) on the CPU, of samples (B, S, A) that are equal, or None."""
    import torch

    ids = ids.detach().cpu()
    if ids.ndim != 3:
        return ids
    return ids[0] if len(ids) and torch.equal(ids, ids[:1].expand_as(ids)) else None
