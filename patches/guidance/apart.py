"""Tokens that read one of several texts: attention in parts, each by the user's own backend, without a mask over all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from accelplug.bounded import Bounded
from accelplug.errors import AccelplugError, UnsupportedError
from accelplug.patches import base
from accelplug.patches.base import Patch, Positive

if TYPE_CHECKING:
    from accelplug.call import AttentionCall, Clock, Layout, Site
    from accelplug.kernels.plan import BlockPlan


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


class ReadsApart(Patch):
    """A method by which tokens read their own of several prompts. Who reads whom, a subclass's `parts`, hangs on how tokens lie alone."""

    class Config(base.Config):
        tokens: Positive | None = Field(
            None, description="Tokens of each prompt, where you join embeddings yourself; none: the pipeline tells."
        )

    config: Config
    speed = False

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._prepared: Bounded[Layout, Apart | None] = Bounded(16)

    def parts(self, layout: Layout, texts: tuple[int, ...]) -> Apart:
        """Return who reads whom, where there are several prompts; `texts`: how many tokens each has."""
        raise NotImplementedError

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Apart | None:
        return self._prepared.get(layout, lambda: self._apart(layout))

    def _apart(self, layout: Layout) -> Apart | None:
        texts = self._texts(layout)
        return None if len(texts) < 2 else self.parts(layout, texts)

    def _texts(self, layout: Layout) -> tuple[int, ...]:
        """How many tokens each prompt has: as the host knows, or `tokens` each.

        Raises
        ------
        AccelplugError
            If the text is not a multiple of them.
        UnsupportedError
            If neither is known.
        """
        tokens, name = self.config.tokens, type(self).__name__.lower()
        if tokens is None:
            if not layout.texts:
                raise UnsupportedError(
                    f"{name} must know which tokens are of which prompt, and was told of none. Give the pipeline a prompt, "
                    "'one | another'; or join embeddings and set `tokens`, how many each has."
                )
            return layout.texts
        if layout.text > tokens and layout.text % tokens:
            raise AccelplugError(
                f"{name}: expected a text of whole prompts of {tokens} tokens, got {layout.text} tokens. Mend `tokens`."
            )
        return (tokens,) * max(layout.text // tokens, 1)

    def attend(self, call: AttentionCall, params: Apart) -> Tensor:
        return params.attend(call)

    def inspect(self, call: AttentionCall, params: Apart) -> tuple[float | None, BlockPlan | None]:
        return params.density, None
