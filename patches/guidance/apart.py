"""Tokens that read some of the others: attention in parts, each by the user's own backend, without a mask over all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accelplug.errors import AccelplugError, UnsupportedError

if TYPE_CHECKING:
    from accelplug.call import AttentionCall, Layout


@dataclass(frozen=True, eq=False)
class Apart:
    """Queries that read alike, part by part.

    Attributes
    ----------
    queries, keys : places in the call, int64 (n,) and (m,), for each part; every query is in one.
    back : the place of each query in the parts one behind the other, int64 (S_q,).
    """

    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    back: Tensor

    @classmethod
    def of(cls, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Apart:
        """Return the parts; those without queries are left out."""
        asking = [(q, k) for q, k in zip(queries, keys, strict=True) if len(q)]
        return cls(tuple(q for q, _ in asking), tuple(k for _, k in asking), torch.cat([q for q, _ in asking]).argsort())

    def to(self, device: torch.device | str) -> Apart:
        """Return the parts with their tensors on `device`."""
        queries, keys = (tuple(x.to(device) for x in each) for each in (self.queries, self.keys))
        return Apart(queries, keys, self.back.to(device))

    @property
    def density(self) -> float:
        """Share of the (query, key) pairs that is read."""
        pairs = sum(len(q) * len(k) for q, k in zip(self.queries, self.keys, strict=True))
        return pairs / (len(self.back) * (int(max(k.max() for k in self.keys)) + 1))

    def attend(self, call: AttentionCall) -> Tensor:
        """Return what each part makes of its own keys, (B, H, S_q, D_v). Where none of them is valid in a sample, it reads all of them."""
        found = []
        for queries, keys in zip(self.queries, self.keys, strict=True):
            q, k, v = call.q.index_select(2, queries), call.k.index_select(2, keys), call.v.index_select(2, keys)
            mask = None if call.mask is None else call.mask[:, keys]
            if mask is not None:
                mask = (mask | ~mask.any(-1, keepdim=True))[:, None, None]
            found.append(call.dense(q=q, k=k, v=v, attn_mask=mask))
        return torch.cat(found, 2).index_select(2, self.back)


def places_of_texts(layout: Layout, texts: Sequence[int]) -> tuple[Tensor, ...]:
    """Return where the keys of each text stand, int64 (n,) each; `texts`: their numbers of tokens, all text in all."""
    text = torch.arange(layout.text)
    if not layout.crossed:
        text = torch.where(text < layout.text_before, text, text + layout.visual)
    return text.split(list(texts))


def texts_of(layout: Layout, tokens: int | None, name: str) -> tuple[int, ...]:
    """Return how many tokens each prompt has: as the host knows, or `tokens` each.

    Raises
    ------
    AccelplugError
        If the text is not a multiple of them.
    UnsupportedError
        If neither is known.
    """
    if tokens is None:
        if not layout.texts:
            raise UnsupportedError(
                f"{name} must know which tokens are of which prompt, and was told of none. Give the pipeline a prompt, 'one | another'; "
                "or join embeddings and set `tokens`, how many each has."
            )
        return layout.texts
    if layout.text > tokens and layout.text % tokens:
        raise AccelplugError(
            f"{name}: expected a text of whole prompts of {tokens} tokens, got {layout.text} tokens. Mend `tokens`."
        )
    return (tokens,) * max(layout.text // tokens, 1)
