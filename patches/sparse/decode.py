"""Template of sparse decoding: a step that makes one token reads the keys that a method chooses, and not all that a cache holds.

A method writes two things: `summarise`, what it keeps of a piece of the past, once, when that has left the window; and `choose`, which
tokens a step reads by that. Always read are the first tokens (`sink`), and the newest: a window (`local`) and what no summary has yet.
The parts of an output are joined by the logarithms of their sums of exponentials, so that one that reads everything is exact.

* Heads that share keys read the same tokens.
* Tokens count from each row's own first one: padding moves none, and is not read.
* A prompt is read by the model's own attention, and so are several tokens at a time: a prompt's pieces, a new turn, drafts. So is a step
  where the cache has fewer than `min_tokens`, which is counted as dense. Layers below `dense_layers` stay dense.
* With `min_mass` one step in 16 is audited: the logits of all keys say what share of its attention each head found in those that were read.
* Keys and values stand in room that grows ahead, in the cache that the prompt filled, and follow it when it is cropped, sorted or repeated.
  A static or a quantised cache, or one that transformers offloads, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from accelplug.errors import UnsupportedError
from accelplug.kernels.kept import GrowingKeys, RowOrder, rows_at
from accelplug.kernels.parts import PartialAttention, joined, part
from accelplug.patches.base import Config, Patch, UnimplementedHalf

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Prompt, Site
    from accelplug.kernels.plan import BlockPlan

AUDIT_EVERY = 16
"""Tokens from one step that an audit looks at to the next: 1/16 of the products q.k of dense decoding. Ours."""


class DecodeConfig(Config):
    """The keys that all methods of sparse decoding share."""

    sink: int = Field(4, ge=0, description="Tokens at the front that every step reads. Paper of StreamingLLM.")
    local: int = Field(64, ge=1, description="Newest tokens that every step reads. Paper of RetroInfer.")
    dense_layers: int = Field(2, ge=0, description="Layers at the front that stay dense. Paper of Quest.")
    min_tokens: int = Field(4096, ge=0, description="Steps with fewer tokens in the cache run dense. Ours.")
    min_mass: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="Least share of its attention that a head must find in the keys that a step reads, by one step in 16; key heads of one "
        "that has less read everything up to the next such step, which is counted. none: nobody looks.",
    )


@dataclass(frozen=True, eq=False)
class Params:
    """What a call needs to know of its sequence: where the tokens of its rows lie."""

    order: RowOrder


@dataclass(frozen=True, eq=False)
class Reads:
    """What a step reads of the past that is summarised.

    Attributes
    ----------
    ranks : int64 (B, H_kv, n), tokens by their rank in their row.
    held : bool (B, H_kv, n), False for filling.
    keys, values : (B, H_kv, m, D) and (B, H_kv, m, D_v), what stands for tokens that are not read; None for nothing.
    weight : float32 (B, H_kv, m), the logarithm of how many tokens each stands for.
    """

    ranks: Tensor
    held: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """A step that makes a token, as a method sees it.

    Attributes
    ----------
    q : float32 (B, H_kv, G, D), scaled, by the key head that they share.
    index : what `summarise` returned of all pieces, joined along the third dimension.
    kept, order : the keys, and where tokens lie among them.
    """

    q: Tensor
    index: Mapping[str, Tensor]
    kept: GrowingKeys
    order: RowOrder

    def slots(self, ranks: Tensor) -> Tensor:
        """Slots of tokens (B|1, H_kv, n), within the cache."""
        return self.order.slots_of(ranks).clamp(0, self.kept.length - 1)

    def keys(self, ranks: Tensor) -> Tensor:
        """Keys of tokens (B, H_kv, n): (B, H_kv, n, D)."""
        return rows_at(self.kept.keys, self.slots(ranks))


class Decode(Patch):
    """Template of sparse decoding; a method writes `summarise` and `choose`."""

    Config: ClassVar[type[Config]] = DecodeConfig
    family = "decode"
    writes: ClassVar[tuple[str, ...]] = ("summarise", "choose")
    needs = frozenset({"probabilities", "cache"})
    about_images = False
    config: DecodeConfig

    @property
    def piece(self) -> int:
        """Tokens that are summarised at a time, once they have left the window."""
        raise UnimplementedHalf(type(self), "piece")

    def summarise(
        self, keys: Tensor, values: Tensor, ranks: Tensor, held: Tensor, known: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what is kept of a piece of the past, (B, H_kv, m, ...) by name.

        Parameters
        ----------
        keys, values : (B, H_kv, n, D) and (B, H_kv, n, D_v).
        ranks : int64 (B, n), which tokens of their row they are.
        held : bool (B, n), False for filling.
        known : what was returned of the pieces before, joined; empty ahead of the first.
        """
        raise UnimplementedHalf(type(self), "summarise")

    def choose(self, step: Step) -> Reads:
        """Return which tokens of the past a step reads."""
        raise UnimplementedHalf(type(self), "choose")

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Params | None:
        if clock.phase != "decode" or (site.layer or 0) < self.config.dense_layers:
            return None
        return Params(RowOrder.of(layout.valid, layout.padded))

    def keep(self, keys: Tensor, values: Tensor, params: Params) -> GrowingKeys:
        return GrowingKeys(keys, values)

    def declines(self, call: AttentionCall, params: Params) -> str | None:
        place, kept, order = call.place, call.kept, params.order
        if place is not None and (place.window is not None or place.first_key):
            return "the layer reads a window of its own"
        if not isinstance(kept, GrowingKeys):
            return "its cache does not have the keys and values of all its tokens"
        if call.k.shape[2] != kept.length or call.k.data_ptr() != kept.keys.data_ptr():
            return "the model makes other keys of what its cache holds"
        if order.slots is not None and kept.length < order.prompt:
            return "a padded prompt was cut: where its tokens lie is not known"
        if call.mask is not None and call.mask.ndim == 4 and call.mask.shape[1] > 1:
            return "heads have masks of their own"
        return None

    def idles(self, call: AttentionCall, params: Params) -> bool:
        return call.k.shape[2] < self.config.min_tokens

    def attend(self, call: AttentionCall, params: Params) -> Tensor:
        step = self.step(call, params)
        choice = self.choose(step) if step.index else None
        parts = [self._static(step, call.mask)]
        if choice is not None:
            parts.append(self._chosen(step, choice, call.mask))
        out = joined(parts)
        if choice is not None and self.config.min_mass is not None:
            below = self._audited(step, choice, call, self.config.min_mass)
            if bool(below.any()):
                out[below] = self._everything(step, below, call.mask).to(out.device)
        return out.flatten(1, 2)[:, :, None].to(call.q.dtype)

    def attention(self, call: AttentionCall, params: Params) -> Tensor:
        raise UnsupportedError(
            f"Where heads look is asked for at a decode step that {type(self).__name__} answers, which reads some keys alone. "
            "Leave out output_attentions, or remove the plug; plug.trace() says what share is read."
        )

    def inspect(self, call: AttentionCall, params: Params) -> tuple[float, None]:
        step = self.step(call, params)
        read = [self._static_ranks(step)[1]]
        if step.index:
            choice = self.choose(step)
            read += [choice.held] + ([] if choice.weight is None else [choice.weight.isfinite()])
        return sum(float(x.float().sum(-1).mean()) for x in read) / float(
            step.order.tokens(step.kept.length).float().mean()
        ), None

    def kept(self, call: AttentionCall, params: Params, plan: BlockPlan | None) -> Tensor | None:
        step = self.step(call, params)
        return self._share(step, self.choose(step), call.mask).flatten(1, 2) if step.index else None

    def step(self, call: AttentionCall, params: Params) -> Step:
        """The call as a method sees it, with everything summarised that has left the window."""
        kept: Any = call.kept
        self._catch_up(kept, params.order)
        q = call.q[:, :, 0].float().unflatten(1, (call.k.shape[1], -1)) * call.scale
        return Step(q, kept.index, kept, params.order)

    def _catch_up(self, kept: GrowingKeys, order: RowOrder) -> None:
        """Summarise what has left the window, by whole pieces; the first time, all of it."""
        total, goal, start = order.tokens(kept.length), kept.length - self.config.local, self._start(kept, order)
        if kept.index:
            goal -= (goal - kept.indexed) % self.piece
            number = goal - kept.indexed
        else:
            number = goal - order.least - self.config.sink
        if number <= 0:
            return
        ranks = start + torch.arange(number, device=start.device)
        held = ranks < total - self.config.local
        slots = order.slots_of(ranks).clamp(0, kept.length - 1)[:, None].expand(-1, kept.keys.shape[1], -1)
        keys, values = rows_at(kept.keys, slots), rows_at(kept.values, slots)
        ranks, held = (x.expand(len(keys), -1) for x in (ranks, held))
        found = self.summarise(keys, values, ranks, held, kept.index)
        kept.index = {name: torch.cat([kept.index[name], x], 2) if kept.index else x for name, x in found.items()}
        kept.end = torch.minimum(start + number, total - self.config.local).clamp(min=start).expand(len(keys), -1)
        kept.indexed, kept.settled = goal, goal if order.slots is None else kept.length

    def _start(self, kept: GrowingKeys, order: RowOrder) -> Tensor:
        """The first token of each row that is neither read by every step as one at the front, nor summarised: int64 (B|1, 1)."""
        return kept.end if kept.index else torch.full_like(order.padding, self.config.sink)

    def _static_ranks(self, step: Step) -> tuple[Tensor, Tensor]:
        """Tokens that every step reads, int64 (B|1, n), and which are not filling, bool."""
        order, kept, start = step.order, step.kept, self._start(step.kept, step.order)
        tail = kept.length - (kept.indexed if kept.index else order.least + self.config.sink)
        front = torch.arange(self.config.sink, device=start.device).expand(len(start), -1)
        ranks = torch.cat([front, start + torch.arange(max(tail, 0), device=start.device)], 1)
        return ranks, ranks < order.tokens(kept.length)

    def _static(self, step: Step, mask: Tensor | None) -> PartialAttention:
        ranks, held = self._static_ranks(step)
        slots = step.order.slots_of(ranks).clamp(0, step.kept.length - 1).expand(len(step.q), -1)
        keys, values = step.kept.near(slots)
        held = held.expand(len(step.q), -1) & _readable(mask, slots)
        return part(step.q, keys, values, _bias(held).to(keys.device)[:, None])

    def _chosen(self, step: Step, choice: Reads, mask: Tensor | None) -> PartialAttention:
        slots = step.slots(choice.ranks)
        kept = step.kept
        keys, values = rows_at(kept.keys, slots), rows_at(kept.values, slots)
        bias = _bias(choice.held & _readable(mask, slots))
        if choice.keys is not None and choice.values is not None and choice.weight is not None:
            keys, values = torch.cat([keys.float(), choice.keys], 2), torch.cat([values.float(), choice.values], 2)
            bias = torch.cat([bias, choice.weight], 2)
        return part(step.q.to(keys.device), keys, values, bias)

    # ---------------------------------------------------------------------------------------------------------------- audits

    def _audited(self, step: Step, choice: Reads, call: AttentionCall, least: float) -> Tensor:
        """Which key heads read everything, bool (B, H_kv): those of a head that kept less than `least` when it was last looked at."""
        kept = step.kept
        due = (step.order.tokens(kept.length) % AUDIT_EVERY == 0).to(step.q.device).expand(len(step.q), -1)  # [B, 1]
        if kept.below is None:
            due = torch.ones_like(due)
        if bool(due.any()):
            share = self._share(step, choice, call.mask)
            below = share < least
            if call.audited is not None:
                rows = due[:, 0]
                call.audited(share[rows].flatten(1), below[rows].flatten(1))
            found = below.any(2)
            kept.below = found if kept.below is None else torch.where(due, found, kept.below)
        assert kept.below is not None
        return kept.below

    def _share(self, step: Step, choice: Reads, mask: Tensor | None) -> Tensor:
        """Share of its true attention that each head finds in the keys that a step reads one by one, float32 (B, H_kv, G)."""
        tokens = replace(choice, keys=None, values=None, weight=None)
        read = [self._static(step, mask)[1], self._chosen(step, tokens, mask)[1].to(step.q.device)]
        keys = step.kept.keys
        logits = (step.q.to(keys.device) @ keys.float().mT).masked_fill(~self._tokens(step, mask)[:, None, None], -torch.inf)
        every = logits.logsumexp(-1).to(step.q.device)
        return (torch.stack(read).logsumexp(0) - every).exp().nan_to_num(nan=1.0).clamp(max=1.0)  # NaN: no key may be read

    def _everything(self, step: Step, heads: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of some key heads, bool (B, H_kv), over all keys: float32 (n, G, D_v)."""
        kept = step.kept
        row, head = heads.to(kept.keys.device).nonzero(as_tuple=True)
        q, keys, values = step.q.to(kept.keys.device)[row, head], kept.keys[row, head], kept.values[row, head]
        bias = _bias(self._tokens(step, mask))[row]
        return part(q[:, None], keys[:, None], values[:, None], bias[:, None])[0][:, 0]

    def _tokens(self, step: Step, mask: Tensor | None) -> Tensor:
        """Which slots of the cache hold tokens that the step may read: bool (B, S), where the keys are."""
        kept = step.kept
        slots = torch.arange(kept.length, device=kept.keys.device).expand(len(step.q), -1)
        return (step.order.held(kept.length).to(slots.device) & _readable(mask, slots)).expand(len(step.q), -1)


def _bias(held: Tensor) -> Tensor:
    """0 for keys that are held, -inf for the others."""
    return torch.zeros(held.shape, device=held.device).masked_fill_(~held, -torch.inf)


def _readable(mask: Tensor | None, slots: Tensor) -> Tensor:
    """Which slots (B, n) or (B, H, n) a decode step's mask lets it read: bool."""
    if mask is None:
        return torch.ones((), dtype=torch.bool, device=slots.device)
    may = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    rows = (may[:, 0, -1] if may.ndim == 4 else may).to(slots.device).expand(len(slots), -1)
    return rows.gather(1, slots.flatten(1)).view(slots.shape)
