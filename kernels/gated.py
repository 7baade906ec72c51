"""Gated attention: every query reads whole regions of keys, of its own choice. For methods whose gates are by token."""

from __future__ import annotations

import torch
from torch import Tensor

from accelplug.kernels.chunks import at_once


@torch.library.custom_op("accelplug::gated_attention", mutates_args=())
def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, region: Tensor, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    """Return attention over the keys of the regions that each query chose, and over those of no region, which all read.

    Queries of a region are gathered, head by head, and what regions give is merged by its log-sum-exp: the cost follows the
    number of pairs, on every device, but no kernel is fast for it. One opaque node in compiled graphs. Sums are float32.

    Parameters
    ----------
    q : Tensor (B, H, S, D).
    k, v : Tensor (B, H_kv, S_k, D) and (B, H_kv, S_k, D_v); H_kv divides H.
    gate : bool (B, H, S, R), the regions that each query reads.
    region : int64 (S_k,), region of each key; -1 for keys that all queries read.
    scale : factor on q.k.
    key_mask : bool (B, S_k), keys that may be read; None for all.

    Returns
    -------
    out : Tensor (B, H, S, D_v) in the dtype of q; 0 for a query that reads no key.
    """
    out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=torch.float32)
    group = q.shape[1] // k.shape[1]
    members = [(region == r).nonzero()[:, 0] for r in range(-1, gate.shape[-1])]
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            lse = q.new_full((q.shape[2],), -torch.inf, dtype=torch.float32)
            for r, keys in enumerate(members, -1):
                keys = keys if key_mask is None else keys[key_mask[row, keys]]
                chosen = torch.arange(len(lse), device=q.device) if r < 0 else gate[row, head, :, r].nonzero()[:, 0]
                if not len(keys) or not len(chosen):
                    continue
                key, value = (x[row, head // group, keys].float() for x in (k, v))
                for queries in chosen.split(at_once(len(keys))):
                    logits = (q[row, head, queries].float() * scale) @ key.T  # [n, keys]
                    here = logits.logsumexp(-1)
                    both = torch.logaddexp(lse[queries], here)
                    kept = (lse[queries] - both).exp()[:, None] * out[row, head, queries]
                    out[row, head, queries] = kept + (logits - both[:, None]).exp() @ value
                    lse[queries] = both
    return out.to(q.dtype)


@gated_attention.register_fake
def _gated_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, region: Tensor, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])
