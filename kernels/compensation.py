"""What pooling a key block costs: the error of reading its mean key and mean value in place of its keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from accelplug.kernels.chunks import at_once, by_heads
from accelplug.kernels.plan import pool


@torch.library.custom_op("accelplug::compensation_error", mutates_args=())
def compensation_error(
    q_pool: Tensor, k: Tensor, v: Tensor, k_len: Tensor, block_k: int, scale: float, key_mask: Tensor | None
) -> Tensor:
    """Return the squared error per key of pooling each key block, as each query block's mean query meets it.

    With mean query q, the keys k_j and values v_j of a block, their means k' and v', and ``e(x) = exp(scale * q.x)``:

        ``mean_j |e(k') v' - e(k_j) v_j|^2 / (sum_i e(k_i))^2``,  i over all keys

    so that rows can be compared: it is the error of a share of the row's output. With ``d_j = e(k_j) - e(k')`` the mean is
    ``e(k')^2 mean |v_j - v'|^2 + 2 e(k') mean (d_j (v_j - v').v_j) + mean (d_j^2 |v_j|^2)``: what depends on values are three
    numbers a key, and all that is multiplied are mean queries and keys, 1 / block of what q.k costs in attention.

    Parameters
    ----------
    q_pool : float32 (B, H, M, D), mean query of each block.
    k, v : Tensor (B, H_kv, P, D) and (B, H_kv, P, D_v) in block order.
    k_len : int32 (N,), keys at the front of each block of `block_k` slots.
    scale : factor on q.k.
    key_mask : bool (B, P), keys that may be read; None for all.

    Returns
    -------
    error : float32 (B, H, M, N), 0 for blocks without a key that may be read.
    """
    group = q_pool.shape[1] // k.shape[1]
    by_key_head = q_pool.unflatten(1, (k.shape[1], group))
    parts = [
        _of_heads(q.flatten(1, 2), keys, values, k_len, block_k, scale, key_mask)
        for q, keys, values in by_heads(len(k) * k.shape[-2] * (k.shape[-1] + v.shape[-1]), by_key_head, k, v)
    ]
    return torch.cat(parts, 1)


@compensation_error.register_fake
def _compensation_error_fake(
    q_pool: Tensor, k: Tensor, v: Tensor, k_len: Tensor, block_k: int, scale: float, key_mask: Tensor | None
) -> Tensor:
    return q_pool.new_empty((*q_pool.shape[:-1], len(k_len)))


def _of_heads(
    q_pool: Tensor, k: Tensor, v: Tensor, k_len: Tensor, block_k: int, scale: float, key_mask: Tensor | None
) -> Tensor:
    group, blocks = q_pool.shape[1] // k.shape[1], len(k_len)
    (k_pool, number), (v_pool, _) = (pool(x, k_len, block_k, key_mask) for x in (k, v))
    key, value = (torch.nn.functional.pad(x.float(), (0, 0, 0, blocks * block_k - x.shape[-2])) for x in (k, v))
    reads = (torch.arange(block_k, device=k.device) < k_len[:, None]).flatten()[None]  # [1, N * block_k]
    if key_mask is not None:
        reads = reads & torch.nn.functional.pad(key_mask, (0, reads.shape[-1] - key_mask.shape[-1]))
    reads = reads[:, None, None]  # [B|1, 1, 1, N * block_k]
    apart = value - v_pool.repeat_interleave(block_k, -2)
    moments = apart.square(), apart * value, value.square()
    spread, lean, size = (x.sum(-1).repeat_interleave(group, 1)[:, :, None] for x in moments)  # [B, H, 1, N * block_k]
    key, k_pool = (x.repeat_interleave(group, 1).transpose(-1, -2) for x in (key, k_pool))
    exists = number[..., None, :] > 0  # [B|1, 1, 1, N]

    def mean(x: Tensor) -> Tensor:
        return (x * reads).unflatten(-1, (blocks, block_k)).sum(-1) / number[..., None, :].clamp(min=1)

    def of_rows(rows: Tensor) -> Tensor:
        logit = (rows @ key).masked_fill(~reads, -torch.inf)
        pooled = (rows @ k_pool).masked_fill(~exists, -torch.inf)
        top = logit.amax(-1, keepdim=True)  # a mean key never scores higher than the highest of its keys
        top = top.masked_fill(top == -torch.inf, 0.0)
        weight, at_mean = (logit - top).exp(), (pooled - top).exp()
        differ = weight - at_mean.repeat_interleave(block_k, -1)
        error = at_mean.square() * mean(spread) + 2 * at_mean * mean(differ * lean) + mean(differ.square() * size)
        total = weight.sum(-1, keepdim=True)
        return error.clamp(min=0) / total.square().clamp(min=torch.finfo(torch.float32).tiny)

    step = at_once(key.shape[0] * key.shape[1] * key.shape[-1])
    return torch.cat([of_rows(rows) for rows in (q_pool * scale).split(step, -2)], -2)
