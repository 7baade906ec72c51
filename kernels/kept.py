"""Keys and values of a cache's layer in room that grows ahead of need: a new token costs its own bytes, not those of all before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

LEAST_ROOM = 256
"""Slots that are made ahead at least; else an eighth of what there is. Ours."""


class GrowingKeys:
    """All keys and values of a layer, on one device. What a method knows of them beside is its `index`.

    Parameters
    ----------
    keys, values : Tensor (B, H_kv, S, D) and (B, H_kv, S, D_v); copied.

    Attributes
    ----------
    length : how many tokens there are, S.
    index : tensors (B, H_kv, m, ...) whose third dimension grows with the tokens, by name; empty where nothing is known yet.
    end : int64 (B, 1), the token of each row with which the index ends, where it is not empty.
    indexed : how many slots stand ahead of the tail, which the index lacks.
    settled : how many slots the index goes by: of fewer it knows nothing.
    below : bool (B, H_kv), key heads that an audit found to keep too little; None ahead of the first.
    """

    freed = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.length = keys.shape[2]
        self._keys, self._values = _with_room(keys), _with_room(values)
        self.forget()

    def forget(self) -> None:
        """Have the index begin anew."""
        self.index: dict[str, Tensor] = {}
        self.end = torch.zeros(1, 1, dtype=torch.int64)
        self.indexed = self.settled = 0
        self.below: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """Keys of all tokens, (B, H_kv, S, D): a view."""
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """Values of all tokens, (B, H_kv, S, D_v): a view."""
        return self._values[:, :, : self.length]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens (B, H_kv, n, D); return all keys and values."""
        start, self.length = self.length, self.length + k.shape[2]
        if self.length > self._keys.shape[2]:
            self._keys, self._values = _with_room(self._keys, self.length), _with_room(self._values, self.length)
        self._keys[:, :, start : self.length] = k.detach()
        self._values[:, :, start : self.length] = v.detach()
        return self.keys, self.values

    def crop(self, length: int) -> None:
        """Drop all tokens behind the first `length`. An index that knows some of them begins anew."""
        self.length, self.below = min(self.length, length), None
        if self.length < self.settled:
            self.forget()

    def take_rows(self, rows: Tensor) -> None:
        """Have these rows of the batch, in this order; a row may come several times, or not at all."""
        self._keys, self._values = self._keys[rows.to(self._keys.device)], self._values[rows.to(self._values.device)]
        self.index = {name: x[rows.to(x.device)] for name, x in self.index.items()}
        self.end = self.end[rows.to(self.end.device)] if self.index else self.end
        self.below = None if self.below is None else self.below[rows.to(self.below.device)]

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens."""
        return self.keys, self.values

    def near(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at slots (B, n) that every step reads: (B, H_kv, n, D)."""
        slots = slots[:, None].expand(-1, self._keys.shape[1], -1)
        return rows_at(self.keys, slots), rows_at(self.values, slots)


class OffloadedKeys(GrowingKeys):
    """The same in CPU memory, from `offload` on. What every step reads stands on the model's device too."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__(keys, values)
        self.device = keys.device

    def forget(self) -> None:
        super().forget()
        self._near: GrowingKeys | None = None
        self.engines: list[Any] = []
        """Indices of another library, one for each row and head."""

    def offload(self) -> None:
        """Move to CPU memory, if that was not done yet."""
        self._keys, self._values = self._keys.cpu(), self._values.cpu()

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self._near is not None and k.shape[2] == 1:
            self._near.append(k, v)
        else:
            self._near = None
        return super().append(k, v)

    def crop(self, length: int) -> None:
        self._near = None
        super().crop(length)

    def take_rows(self, rows: Tensor) -> None:
        if self.engines:
            self.forget()
        super().take_rows(rows)
        if self._near is not None:
            self._near.take_rows(rows)

    def near(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        if self._near is None or self._near.length != slots.shape[1]:
            keys, values = super().near(slots)
            self._near = GrowingKeys(keys.to(self.device), values.to(self.device))
        return self._near.whole()


def _with_room(x: Tensor, slots: int | None = None) -> Tensor:
    """A copy of x (B, H, S, D) with room for as many slots and some more. No inference tensor: others write into it too."""
    slots = x.shape[2] if slots is None else slots
    with torch.inference_mode(False):
        grown = torch.empty(*x.shape[:2], slots + max(LEAST_ROOM, slots // 8), x.shape[3], dtype=x.dtype, device=x.device)
    grown[:, :, : x.shape[2]] = x.detach()
    return grown


def rows_at(x: Tensor, slots: Tensor) -> Tensor:
    """Return rows of x (B, H, S, D) by slots (B|1, H, n): (B, H, n, D)."""
    batch, heads, _, dim = x.shape
    step = x.stride(2)
    slots = slots.expand(batch, -1, -1)
    if x.stride(3) != 1 or step == 0 or x.stride(0) % step or x.stride(1) % step:
        return x.take_along_dim(slots[..., None], 2)
    # Whole rows of one long matrix: several times as fast on a CPU as an index for every number.
    first = torch.arange(batch, device=x.device)[:, None] * (x.stride(0) // step)
    first = first + torch.arange(heads, device=x.device) * (x.stride(1) // step)
    at = slots + first[..., None]
    rows = 1 + sum((size - 1) * (stride // step) for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return x.as_strided((rows, dim), (step, 1)).index_select(0, at.flatten()).view(batch, heads, -1, dim)


@dataclass(frozen=True, eq=False)
class RowOrder:
    """Which slots the tokens of each row have, in their order: a prompt's padding stands between them, and behind it are tokens alone.

    Attributes
    ----------
    slots : int64 (B, P), of a prompt of P slots those of tokens, in order, ahead of those of padding; None without padding.
    padding : int64 (B|1, 1), how many of the P are padding.
    least : the least of these.
    prompt : P.
    """

    slots: Tensor | None
    padding: Tensor
    least: int
    prompt: int

    @classmethod
    def of(cls, valid: Tensor, padded: bool) -> RowOrder:
        """Make it from which slots of a prompt are tokens, bool (B, P), and whether any is not."""
        if not padded:
            return cls(None, torch.zeros(1, 1, dtype=torch.int64, device=valid.device), 0, valid.shape[1])
        padding = (~valid).sum(-1, keepdim=True)
        order = (~valid).to(torch.int8).argsort(dim=-1, stable=True)
        return cls(order, padding, int(padding.min()), valid.shape[1])

    def tokens(self, slots: int) -> Tensor:
        """How many tokens so many slots hold, as far as all behind the prompt's end are: int64 (B|1, 1), below 0 ahead of a row's first."""
        return slots - self.padding

    def held(self, slots: int) -> Tensor:
        """Which of the first so many slots hold tokens, as far as all behind the prompt's end do: bool (B|1, slots)."""
        if self.slots is None:
            return torch.ones(1, slots, dtype=torch.bool, device=self.padding.device)
        number = (
            torch.arange(self.prompt, device=self.padding.device) < self.prompt - self.padding
        )  # tokens stand first in the order
        return pad(torch.zeros_like(number).scatter(1, self.slots, number), (0, slots - self.prompt), value=True)

    def slots_of(self, ranks: Tensor) -> Tensor:
        """Slots of tokens by their rank in their row, int64 (B|1, H, n) or (B|1, n); of a rank that no token has, any slot."""
        if self.slots is None:
            return ranks
        padding = self.padding if ranks.ndim == 2 else self.padding[:, None]
        rows = self.slots if ranks.ndim == 2 else self.slots[:, None].expand(-1, ranks.shape[1], -1)
        ranks = ranks.expand(len(padding), *ranks.shape[1:])
        inside = rows.gather(-1, ranks.clamp(0, self.prompt - 1))
        return torch.where(ranks < self.prompt - padding, inside, ranks + padding)
