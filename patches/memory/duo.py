"""Heads that retrieve keep all keys; the others keep first tokens, a window, and one token that stands for the rest.

DuoAttention (arXiv 2410.10819) tells two kinds of heads apart: few need what stands far back, and the others read first tokens and recent
ones alone. RazorAttention (arXiv 2407.15891) lets what they drop be read as one compensation token: with n tokens dropped, their mean key
and value, counted n times, ``o = (sum_read e^{s q.k_j} v_j + n e^{s q.k^} v^) / (sum_read e^{s q.k_j} + n e^{s q.k^})``.

Which heads retrieve is a table of scores, which `accelplug calibrate MODEL --patch heads` measures; the share `keep` of the model's key
heads with the highest scores keeps all. Without a table no head does: that is StreamingLLM, compensated.
On SmolLM2-135M heads by `razor`, scores from random tokens told over and over, find more than those by `needle` (benchmarks.kv_memory).

Keys and values of streaming heads are let go of layer by layer while the prompt is read: a layer of H key heads, of which F keep
all, holds F S + (H - F) (sink + window + slack) keys in place of H S. With ``prompt: stream`` what a token reads depends on the tokens
before it alone, not on whether they came in one forward, in chunks or one by one; else the first forward is the model's own. `slack`
is for drafts: an assisted answer takes back as many tokens at a time as there are in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from accelplug.errors import RecipeError, UnsupportedError
from accelplug.kernels.streaming import streaming_attention
from accelplug.patches.base import Config
from accelplug.patches.memory.keeping import FewerKeys, Keeping, Params
from accelplug.table import Table

if TYPE_CHECKING:
    from accelplug.call import AttentionCall, Clock, Prompt, Site


@dataclass(eq=False)
class SplitKeys(FewerKeys):
    """Keys and values of one layer, of some heads all and of the others those of first and recent tokens.

    Attributes
    ----------
    full, near : key heads of either kind, int64 (F,) and (N,).
    sink, window, slack : see `Duo.Config`.
    length : S, slots of the sequence.
    keys, values : Tensor (B, F, S, D) and (B, F, S, D_v), of heads that keep all.
    near_keys, near_values : Tensor (B, N, n, D) and (B, N, n, D_v), of the others.
    number, slot : int64 (B, n), which token of its row those are, -1 for none, and in which slot of the sequence they came.
    count, gone : int64 (B,), tokens of each row, without padding; and how many of them were let go of, which are those from `sink` on.
    key_sum, value_sum : float32 (B, N, D) and (B, N, D_v), of these.
    """

    heads: tuple[Tensor, Tensor]
    sink: int
    window: int
    slack: int
    length: int
    keys: Tensor
    values: Tensor
    near_keys: Tensor
    near_values: Tensor
    number: Tensor
    slot: Tensor
    count: Tensor
    gone: Tensor
    key_sum: Tensor
    value_sum: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, heads: tuple[Tensor, Tensor], valid: Tensor, config: Duo.Config) -> SplitKeys:
        """Take all keys and values of a sequence, (B, H_kv, S, D) and (B, H_kv, S, D_v); bool (B, S), False for padding."""
        (full, near), length = heads, keys.shape[2]
        number = torch.where(valid, valid.cumsum(-1) - 1, -1)
        slot = torch.arange(length, device=valid.device).expand(len(valid), -1)
        near_keys, near_values = keys.index_select(1, near), values.index_select(1, near)
        return cls(
            heads,
            config.sink,
            config.window,
            config.slack,
            length,
            keys.index_select(1, full),
            values.index_select(1, full),
            near_keys,
            near_values,
            number,
            slot,
            valid.sum(-1),
            torch.zeros_like(number[:, 0]),
            torch.zeros_like(near_keys[:, :, 0], dtype=torch.float32),
            torch.zeros_like(near_values[:, :, 0], dtype=torch.float32),
        )

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        (full, near), tokens = self.heads, k.shape[2]
        new = torch.arange(tokens, device=self.number.device)
        self.keys, self.values = (torch.cat(pair, 2) for pair in ((self.keys, k[:, full]), (self.values, v[:, full])))
        self.near_keys, self.near_values = (
            torch.cat(pair, 2) for pair in ((self.near_keys, k[:, near]), (self.near_values, v[:, near]))
        )
        self.number = torch.cat([self.number, self.count[:, None] + new], 1)
        self.slot = torch.cat([self.slot, (self.length + new).expand(len(self.slot), -1)], 1)
        self.count, self.length = self.count + tokens, self.length + tokens
        return k, v

    def leave_out(self, valid: Tensor) -> None:
        """Take those of the newest tokens for padding that are False in bool (B, T)."""
        tokens = valid.shape[1]
        before = self.count[:, None] - tokens
        number = torch.where(valid, before + valid.cumsum(-1) - 1, -1)
        self.number = torch.cat([self.number[:, :-tokens], number], 1)
        self.count = before[:, 0] + valid.sum(-1)

    def trim(self) -> None:
        """Let go of what no window reaches any more, nor will where drafts are taken back."""
        if self.number.shape[1] <= self.sink + self.window + 2 * self.slack:
            return
        kept = (self.number < self.sink) | (self.number >= self.count[:, None] - self.window - self.slack)
        lost = (self.number >= 0) & ~kept
        self.gone = self.gone + lost.sum(-1)
        self.key_sum = self.key_sum + (self.near_keys.float() * lost[:, None, :, None]).sum(2)
        self.value_sum = self.value_sum + (self.near_values.float() * lost[:, None, :, None]).sum(2)
        self._keep(kept & (self.number >= 0))

    def crop(self, length: int) -> None:
        taken = (self.number >= 0) & (self.slot >= length)
        count = self.count - taken.sum(-1)
        if bool(((self.gone > 0) & (self.sink + self.gone > count - self.window + 1)).any()):
            raise UnsupportedError(
                f"{self.length - length} tokens cannot be taken back: streaming heads have let go of what they would read ahead of them. "
                f"Give duo a slack of {self.length - length} or more, or begin with a new cache."
            )
        self.count, self.length = count, length
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self._keep(~taken & (self.number >= 0))

    def _keep(self, kept: Tensor) -> None:
        """Keep some of the near tokens, bool (B, n), in their order."""
        order = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[:, : int(kept.sum(-1).max())]
        self.near_keys, self.near_values = (
            x.take_along_dim(order[:, None, :, None], 2) for x in (self.near_keys, self.near_values)
        )
        self.number = torch.where(kept.gather(1, order), self.number.gather(1, order), -1)
        self.slot = self.slot.gather(1, order)


@dataclass(frozen=True, eq=False)
class SplitParams(Params):
    """With `retrieves`, bool (H_kv,): key heads that keep all; None for none."""

    retrieves: Tensor | None = None

    def heads(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Which heads of keys (B, H_kv, S, D) keep all, and the others: int64 (F,) and (N,)."""
        number, device = keys.shape[1], keys.device
        retrieves = torch.zeros(number, dtype=torch.bool) if self.retrieves is None else self.retrieves
        if len(retrieves) != number:
            raise RecipeError(
                f"The scores of duo are of {len(retrieves)} key heads, and the layer has {number}. Calibrate for this model: "
                "accelplug calibrate MODEL --patch heads."
            )
        return retrieves.nonzero()[:, 0].to(device), (~retrieves).nonzero()[:, 0].to(device)


class Duo(Keeping):
    """Heads that retrieve keep all keys; the others keep first tokens, a window, and one token that stands for the rest."""

    class Config(Config):
        scores: Annotated[float, Field(ge=-1.0)] | Table = Field(
            0.0, description="Table (layers, key heads): how much each retrieves, -1 for unknown. A number: no head does."
        )
        keep: float = Field(
            0.5,
            ge=0.0,
            le=1.0,
            description="Share of key heads that keep all; 1 is dense. Paper: 0.5 where heads share keys, else 0.25.",
        )
        sink: int = Field(128, ge=0, description="First tokens that streaming heads keep. Paper: 128.")
        window: int = Field(256, ge=1, description="Recent tokens that they keep, the newest one too. Paper: 256.")
        compensate: bool = Field(True, description="Whether one token stands for what they drop. RazorAttention's.")
        prompt: Literal["stream", "dense"] = Field(
            "stream",
            description="How the first forward of a sequence is read: as all others, as DuoAttention does, or by the model's own "
            "attention, as RazorAttention does. Ours: stream, measured by benchmarks.kv_memory: by razor's scores dense finds no more.",
        )
        slack: int = Field(64, ge=0, description="Further tokens that they hold on to, for drafts to be taken back. Ours.")

    config: Config

    @cached_property
    def retrieves(self) -> Tensor | None:
        """Which key heads keep all, bool (layers, H_kv); None for none."""
        if not isinstance(scores := self.config.scores, Table):
            return None
        flat = scores.by_head().flatten()
        number = round(self.config.keep * int((flat >= 0).sum()))
        best = flat.argsort(descending=True, stable=True)[:number]
        return torch.zeros(len(flat), dtype=torch.bool).index_fill_(0, best, True).view(scores.values.shape)

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> SplitParams | None:
        heads = None
        if self.retrieves is not None and isinstance(self.config.scores, Table):
            self.config.scores.require(site, None)
            heads = site.heads.part(self.retrieves[site.layer or 0])
        if self.config.keep == 1.0 or (heads is not None and bool(heads.all())):
            return None
        return SplitParams(layout.valid, layout.padded, clock.phase == "decode", heads)

    def keep(self, keys: Tensor, values: Tensor, params: SplitParams) -> SplitKeys:
        found = self._taken(keys, values, params)
        found.trim()
        return found

    def attend(self, call: AttentionCall, params: SplitParams) -> Tensor:
        kept: Any = call.kept
        if kept is None and self.config.prompt == "dense":
            return call.dense()
        if kept is None:
            return self._read(call, self._taken(call.k, call.v, params))
        new = call.k.shape[2]
        if params.padded and not params.step:
            kept.leave_out(params.of(kept.length - new, new, call.k.device))
        out = self._read(call, kept)
        kept.trim()
        return out

    def _taken(self, keys: Tensor, values: Tensor, params: SplitParams) -> SplitKeys:
        valid = params.of(0, keys.shape[2], keys.device)
        return SplitKeys.of(keys, values, params.heads(keys), valid, self.config)

    def _read(self, call: AttentionCall, kept: SplitKeys) -> Tensor:
        """Attend to what is kept, whose last tokens are those of the call."""
        full, near = kept.heads
        queries, parts = call.q.unflatten(1, (len(full) + len(near), -1)), []
        if len(full):
            parts.append(call.dense(queries[:, full].flatten(1, 2), kept.keys, kept.values))
        if len(near):
            sums = (kept.key_sum, kept.value_sum) if self.config.compensate else None
            held = kept.near_keys, kept.near_values, kept.number
            parts.append(
                streaming_attention(queries[:, near].flatten(1, 2), *held, call.scale, kept.sink, kept.window, sums)
            )
        out = torch.cat([part.unflatten(1, (-1, queries.shape[2])) for part in parts], 1)
        return out[:, torch.cat([full, near]).argsort()].flatten(1, 2)
