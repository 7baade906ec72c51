"""Retrieval: keys and values lie in CPU memory, and a step fetches those that an index finds for its query.

RetrievalAttention (arXiv 2409.10516). The first tokens and the newest are read where the model is (`sink` and `local`: 128 and 512); of
all others an index for each head of keys finds the `tokens` with the largest q.k, which are read in CPU memory, beside the CPU. With
outputs o and logarithms l of the sums of exponentials, the whole is

    ``(exp(l_1) o_1 + exp(l_2) o_2) / (exp(l_1) + exp(l_2))``,

exact over what was read. The paper's index is a graph that knows the prompt's queries, and takes no new tokens in. Ours has clusters of
keys (see `clusters`): the `probe` of them with most mass are searched token by token, and new tokens become clusters once they have left
the window. Heads that share keys read the same tokens, ranked by the sum of their shares of attention (ours).

`search: faiss` looks in an inverted file of faiss instead (`pip install accelplug[faiss]`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from accelplug.errors import UnsupportedError
from accelplug.kernels.kept import OffloadedKeys, RowOrder
from accelplug.kernels.wave import members
from accelplug.patches.sparse.clusters import ClusterConfig, Clustered, shares
from accelplug.patches.sparse.decode import Params, Reads, Step

if TYPE_CHECKING:
    from accelplug.call import AttentionCall, Clock, Prompt, Site


class Retrieval(Clustered):
    """A step reads the tokens that an index of keys in CPU memory finds, beside the first and the newest."""

    class Config(ClusterConfig):
        sink: int = Field(128, ge=0, description="Tokens at the front that every step reads. Paper.")
        local: int = Field(512, ge=1, description="Newest tokens that every step reads. Paper.")
        update: int = Field(64, ge=1, description="New tokens that go into the index at a time. Ours.")
        tokens: int = Field(100, ge=1, description="Tokens that a step finds. Paper.")
        probe: float = Field(0.1, gt=0.0, le=1.0, description="Share of the clusters that are searched. Ours.")
        search: Literal["clusters", "faiss"] = Field("clusters", description="What finds them: our clusters, or faiss.")

    config: Config

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        if self.config.search == "faiss":
            _faiss()

    def prepare(self, site: Site, layout: Prompt, clock: Clock, state: dict[str, Any]) -> Params | None:
        params = super().prepare(site, layout, clock, state)
        return None if params is None else Params(RowOrder.of(layout.valid.cpu(), layout.padded))

    def keep(self, keys: Tensor, values: Tensor, params: Params) -> OffloadedKeys:
        return OffloadedKeys(keys, values)

    def step(self, call: AttentionCall, params: Params) -> Step:
        kept: Any = call.kept
        kept.offload()
        return super().step(call, params)

    def summarise(
        self, keys: Tensor, values: Tensor, ranks: Tensor, held: Tensor, known: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if self.config.search == "clusters":
            return super().summarise(keys, values, ranks, held, known)
        return {"rank": ranks[:, None], "held": held[:, None]}

    def choose(self, step: Step) -> Reads:
        q = step.q.cpu()
        if self.config.search == "faiss":
            ranks, held = self._found_by_faiss(step, q)
        else:
            share = shares(q, step.index)
            number = (step.index["number"] > 0).sum(-1, keepdim=True)
            some = (self.config.probe * number - 1e-4).ceil()
            chosen = share.topk(int(some.max())).indices
            ranks, held = members(step.index, chosen, torch.arange(chosen.shape[-1]) < some)
        return _best(q, step, ranks, held, self.config.tokens)

    def _found_by_faiss(self, step: Step, q: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that the heads of a key head find, each its own: int64 and bool (B, H_kv, G * tokens), each once."""
        kept: Any = step.kept
        batch, heads, groups, _ = q.shape
        kept.engines = kept.engines or [None] * (batch * heads)
        ranks = torch.full((batch, heads, groups, self.config.tokens), -1)
        for row in range(batch):
            known = step.index["rank"][row, 0][step.index["held"][row, 0]]
            keys = step.keys(known.expand(batch, heads, -1))[row].float()
            for head in range(heads):
                engine = kept.engines[row * heads + head]
                if engine is None:
                    engine = kept.engines[row * heads + head] = self._engine(keys[head])
                if engine is not None:
                    engine.add_with_ids(keys[head, engine.ntotal :].numpy(), known[engine.ntotal :].numpy())
                    ranks[row, head] = torch.from_numpy(engine.search(q[row, head].numpy(), self.config.tokens)[1])
        ranks = ranks.flatten(2).sort(-1).values
        return ranks.clamp(min=0), (ranks >= 0) & (ranks != pad(ranks, (1, 0), value=-1)[..., :-1])

    def _engine(self, keys: Tensor) -> Any:
        """An inverted file for keys (n, D), trained on them and empty; None where there are none yet."""
        if not len(keys):
            return None
        faiss, (number, dim) = _faiss(), keys.shape
        lists = -(-number // self.config.cluster)
        engine = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
        engine.cp.min_points_per_centroid, engine.nprobe = 1, math.ceil(self.config.probe * lists - 1e-4)
        engine.train(keys.numpy())
        return engine


def _best(q: Tensor, step: Step, ranks: Tensor, held: Tensor, tokens: int) -> Reads:
    """Of these tokens (B, H_kv, n) as many as that, of the largest share of attention, summed over the heads that share keys."""
    logits = (q @ step.keys(ranks).float().mT).masked_fill(~held[:, :, None], -torch.inf)
    share = logits.softmax(-1).nan_to_num(nan=0.0).sum(2)
    best = share.topk(min(tokens, share.shape[-1])).indices
    return Reads(ranks.gather(2, best), held.gather(2, best))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UnsupportedError(
            "retrieval with search: faiss needs faiss, which is not installed. Run `pip install faiss-cpu`, or leave search out."
        ) from error
    return faiss
