"""The keys of a prompt that its last tokens look at are kept, the others let go of: the baseline that everyone knows.

SnapKV (arXiv 2404.14469). With p the attention of the last `window` tokens of the prompt over all its keys, the votes for a key ahead of
them are ``mean_(i in window) p_ij``, pooled along the sequence over `pool` keys and meant over the query heads that share a key head. Each
key head keeps the window and its keys of most votes, `capacity` in all.

The first forward of a sequence is taken for its prompt: it is read by the model's own attention, and what comes later, tokens of the answer
or further turns, is kept whole. So what is asked should stand at its end. Prompts of at most `capacity` tokens keep all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, scaled_dot_product_attention

from accelplug.errors import UnsupportedError
from accelplug.kernels.spans import row_attention
from accelplug.patches.base import Config
from accelplug.patches.memory.keeping import FewerKeys, Keeping, Params

if TYPE_CHECKING:
    from accelplug.call import AttentionCall, Clock, Prompt, Site


@dataclass(eq=False)
class ChosenKeys(FewerKeys):
    """Keys and values of one layer, as many of every head.

    Attributes
    ----------
    keys, values : Tensor (B, H_kv, n, D) and (B, H_kv, n, D_v).
    held : bool (B, n), False where there is nothing.
    length : slots of the sequence.
    firm : the slot of the sequence from which on all are kept.
    """

    keys: Tensor
    values: Tensor
    held: Tensor
    length: int
    firm: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        new = torch.ones(len(k), k.shape[2], dtype=torch.bool, device=self.held.device)
        self.held, self.length = torch.cat([self.held, new], 1), self.length + k.shape[2]
        return k, v

    def leave_out(self, valid: Tensor) -> None:
        """Take those of the newest tokens for padding that are False in bool (B, T)."""
        self.held = torch.cat([self.held[:, : -valid.shape[1]], valid], 1)

    def crop(self, length: int) -> None:
        if length < self.firm:
            raise UnsupportedError(
                f"{self.length - length} tokens cannot be taken back: snapkv has let go of keys of the prompt, and keeps all from slot "
                f"{self.firm} on. Begin with a new cache."
            )
        left = self.held.shape[1] - (self.length - length)
        self.keys, self.values, self.held = self.keys[:, :, :left], self.values[:, :, :left], self.held[:, :left]
        self.length = length


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which keys of a prompt a layer keeps: slots int64 (B, H_kv, n), and `ChosenKeys`'s held and firm."""

    slots: Tensor
    held: Tensor
    firm: int


@dataclass(frozen=True, eq=False)
class SnapParams(Params):
    """With `length`, tokens that were asked, int64 (B, 1) where rows differ, and what was `chosen`, by layer, while they were read."""

    length: int | Tensor
    layer: int | None
    chosen: dict[str, Any]


class SnapKV(Keeping):
    """Keep the keys of a prompt that its last tokens look at."""

    class Config(Config):
        capacity: int = Field(2048, ge=1, description="Keys of the prompt that a head keeps, with the window. Code: 2048.")
        share: float | None = Field(
            None, gt=0.0, le=1.0, description="Or so much of the prompt, in place of capacity: kvpress's way. 1 is dense."
        )
        window: int = Field(32, ge=1, description="Last tokens of the prompt, which vote and are kept. Code: 32.")
        pool: int = Field(5, ge=1, le=63, description="Keys that votes are pooled over, an odd number. Code: 5.")
        pooling: Literal["mean", "max"] = Field("mean", description="How. Code: mean; for Mistral max, over 7.")

        @field_validator("pool")
        @classmethod
        def _pool_has_a_middle(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError(f"expected an odd number, got {value}")
            return value

    config: Config
    needs = Keeping.needs | {"first_forward"}

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> SnapParams | None:
        if self.config.share == 1.0:
            return None
        return SnapParams(layout.valid, layout.padded, clock.phase == "decode", layout.length, site.layer, state)

    def keep(self, keys: Tensor, values: Tensor, params: SnapParams) -> ChosenKeys | None:
        chosen: Chosen | None = params.chosen.pop(str(params.layer), None)
        if chosen is None:
            return None
        index = chosen.slots[..., None]
        taken = keys.take_along_dim(index, 2), values.take_along_dim(index, 2)
        return ChosenKeys(*taken, chosen.held, keys.shape[2], chosen.firm)

    def idles(self, call: AttentionCall, params: SnapParams) -> bool:
        return params.step and call.kept is None

    def attend(self, call: AttentionCall, params: SnapParams) -> Tensor:
        kept: Any = call.kept
        if kept is None:
            if call.place is not None and not call.place.first_query and (chosen := self._choose(call, params)) is not None:
                params.chosen[str(params.layer)] = chosen
            return call.dense()
        if params.padded and not params.step:
            kept.leave_out(params.of(kept.length - call.k.shape[2], call.k.shape[2], call.k.device))
        return self._read(call, kept)

    def _choose(self, call: AttentionCall, params: SnapParams) -> Chosen | None:
        """Choose what a prompt's last tokens vote for, if that is less than all."""
        batch, _, slots = call.k.shape[:3]
        config, valid = self.config, params.of(0, slots, call.k.device)
        place = torch.arange(slots, device=valid.device)
        end = torch.as_tensor(params.length, device=valid.device).expand(batch, 1)
        tokens = (valid & (place < end)).sum(-1, keepdim=True)  # [B, 1]
        wanted = torch.minimum(self._capacity(tokens), tokens)
        if bool((tokens == wanted).all()):
            return None
        ahead = valid & (place < end - config.window)
        firm = valid & ~ahead  # the window, and drafts behind it
        number = torch.minimum((wanted - config.window).clamp(min=0), ahead.sum(-1, keepdim=True))  # of those ahead
        most = int(number.max())
        best = self._votes(call, valid, ahead, end).topk(most, -1).indices  # [B, H_kv, most]
        held = torch.arange(most, device=valid.device) < number  # [B, most]
        best = torch.where(held[:, None], best, slots).sort(-1).values.clamp(max=slots - 1)
        first = firm.int().argmax(-1)
        tail = torch.arange(int(first.min()), slots, device=valid.device)
        slots_kept = torch.cat([best, tail.expand(*best.shape[:2], -1)], 2)
        return Chosen(slots_kept, torch.cat([held, firm[:, tail]], 1), int(first.max()))

    def _votes(self, call: AttentionCall, valid: Tensor, ahead: Tensor, end: Tensor) -> Tensor:
        """Votes of a prompt's last tokens, up to `end` (B, 1), for the keys `ahead` of them: float32 (B, H_kv, S), -1 for others."""
        config = self.config
        rows = (end - 1 - torch.arange(config.window - 1, -1, -1, device=end.device)).clamp(min=0)  # [B, w]
        p = row_attention(call, rows) * valid.gather(1, rows)[:, None, :, None]  # [B, H, w, S]
        votes = torch.where(ahead[:, None], p.mean(2), 0.0)
        pooled = (avg_pool1d if config.pooling == "mean" else max_pool1d)(votes, config.pool, 1, config.pool // 2)
        return pooled.unflatten(1, (call.k.shape[1], -1)).mean(2).masked_fill(~ahead[:, None], -1.0)

    def _capacity(self, tokens: Tensor) -> Tensor:
        """How many keys of a prompt of so many tokens are kept, int64 (B, 1)."""
        if self.config.share is None:
            return torch.full_like(tokens, max(self.config.capacity, self.config.window))
        return (tokens * self.config.share).ceil().long().clamp(min=self.config.window)

    def _read(self, call: AttentionCall, kept: ChosenKeys) -> Tensor:
        """Attend to what is kept, whose last tokens are those of the call."""
        tokens, slots = call.q.shape[2], kept.held.shape[1]
        if tokens == 1 and call.mask is None:
            return call.dense(call.q, kept.keys, kept.values)
        own = slots - tokens + torch.arange(tokens, device=call.q.device)
        may = kept.held[:, None] & (torch.arange(slots, device=own.device) <= own[:, None])
        groups = call.q.shape[1] // kept.keys.shape[1]
        k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (kept.keys, kept.values))
        return scaled_dot_product_attention(call.q, k, v, attn_mask=may[:, None], scale=call.scale)
