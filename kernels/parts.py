"""Attention over some of the keys, and the whole of such parts: each part's output counts by the sum of its exponentials."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PartialAttention = tuple[Tensor, Tensor]
"""float32 (B, H_kv, G, D_v), and the logarithm of the sum of its exponentials, (B, H_kv, G); -inf where it has no key."""


def part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> PartialAttention:
    """Return attention over these keys, of queries that share them.

    Parameters
    ----------
    q : float32 (B, H_kv, G, D), scaled.
    k, v : Tensor (B, H_kv, n, D) and (B, H_kv, n, D_v).
    bias : float32 (B|1, H_kv|1, n), added to a key's logits: -inf for one that is not to be read; None for 0.
    """
    logits = q @ k.float().mT
    if bias is not None:
        logits = logits + bias[:, :, None]
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().nan_to_num(nan=0.0)  # NaN: no key may be read
    return weights @ v.float(), lse


def joined(parts: Sequence[PartialAttention]) -> Tensor:
    """Return attention over the keys of all parts, float32 (B, H_kv, G, D_v), on the device of the first; 0 where there is no key."""
    device = parts[0][0].device
    lse = torch.stack([each.to(device) for _, each in parts])
    weights = (lse - lse.logsumexp(0)).exp().nan_to_num(nan=0.0)
    return sum(
        (w[..., None] * out.to(device) for w, (out, _) in zip(weights, parts, strict=True)), torch.zeros((), device=device)
    )
