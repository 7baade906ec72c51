"""What methods that attend among fewer tokens share: keys that count as often as they have tokens, and text that is answered densely."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelplug.call import AttentionCall

EXTRA = 8
"""Head channels that the keys' bias takes: two hold it, and kernels want a multiple of 8."""

NEVER = -6e4
"""Bias of a key that stands for no token: float16 holds it, and the softmax makes it 0."""


def attend_counted(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, number: Tensor | None) -> Tensor:
    """Attend with the user's backend, log(number) added to the scores of each key; number float32 (B|1, S_k), or None for all 1.

    The bias rides in extra head channels, which every backend can take: ones in q, bias / scale in k.
    """
    if number is None:
        return call.dense(q=q, k=k, v=v, attn_mask=None)
    k = keys_that_count(k, number, call.scale)
    v_padded = pad(v, (0, EXTRA)) if v.shape[-1] == q.shape[-1] else v  # flash kernels want one width
    return call.dense(q=queries_that_count(q), k=k, v=v_padded, attn_mask=None)[..., : v.shape[-1]]


def queries_that_count(q: Tensor) -> Tensor:
    """Give queries ones where `keys_that_count` have their bias: (B, H, S_q, D) -> (B, H, S_q, D + 8)."""
    return pad(pad(q, (0, 2), value=1.0), (0, EXTRA - 2))


def keys_that_count(k: Tensor, number: Tensor, scale: float) -> Tensor:
    """Give keys log(number) / scale, in two parts so that half precision does not round it: (B, H, S_k, D) -> (B, H, S_k, D + 8).

    Parameters
    ----------
    number : float32 (B|1, S_k), tokens that each key stands for; 0 for a key that is not to be read.
    scale : factor on q.k, which stays that of D channels.
    """
    bias = (number.log() / scale).masked_fill(number == 0, NEVER)[:, None, :, None].expand(len(k), k.shape[1], -1, -1)
    high = bias.to(k.dtype)
    return pad(torch.cat([k, high, (bias - high.float()).to(k.dtype)], -1), (0, EXTRA - 2))


def between_text(call: AttentionCall, visual: Tensor, before: int) -> Tensor:
    """Put what visual queries are answered, (B, H, N, D_v), behind `before` text tokens and ahead of the others. Text reads every key."""
    behind = before + visual.shape[-2]
    if call.q.shape[-2] == visual.shape[-2]:
        return visual
    text = torch.cat([call.q[..., :before, :], call.q[..., behind:, :]], -2)
    exact = call.dense(q=text) if call.mask is None else call.dense(q=text, attn_mask=call.mask[:, None, None])
    return torch.cat([exact[..., :before, :], visual, exact[..., before:, :]], -2)
