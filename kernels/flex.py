"""Block attention by FlexAttention: compiled once per shape, fast on CPU and GPU. On a CPU it needs a C++ compiler."""

from __future__ import annotations

import functools
import logging
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from accelplug.bounded import Bounded
from accelplug.errors import UnsupportedError
from accelplug.kernels.plan import BlockPlan, Threshold, pool
from accelplug.kernels.rest import Pool, Rest

logger = logging.getLogger("accelplug")

_compiled: Bounded[tuple, Callable[..., Any]] = Bounded(32)
# The plan is kept beside its mask, so that the address in the key stays its own.
_masks: Bounded[tuple, tuple[BlockPlan, BlockMask]] = Bounded(16)


@functools.cache
def _compiler_missing() -> bool:
    return not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl"))


def missing(device: torch.device) -> str | None:
    """Why FlexAttention cannot run on `device`, or None."""
    if device.type == "cpu":
        return "no C++ compiler was found (g++ or clang++)" if _compiler_missing() else None
    return None if device.type in ("cuda", "xpu") else f"FlexAttention does not run on {device.type}"


def unsupported(q: Tensor, plan: BlockPlan | Threshold, return_lse: bool) -> str | None:
    """Why this call cannot run here, or None."""
    if (reason := missing(q.device)) is not None:
        return reason
    if return_lse and q.device.type == "cpu":
        return "FlexAttention gives no log-sum-exp on CPU"
    if q.device.type == "cuda" and (q.shape[-1] < 16 or min(plan.block_q, plan.block_k) < 64):
        return "FlexAttention on CUDA needs a head dimension of at least 16 and blocks of at least 64"
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, rest: Rest, scale: float, key_mask: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (out, lse); see `attention.block_attention`."""
    if (reason := unsupported(q, plan, return_lse)) is not None:
        raise UnsupportedError(f"backend='flex' cannot serve: {reason}. Use backend='blocked' or 'auto'.")
    slots_q, slots_k = len(plan.q_len) * plan.block_q, plan.key_slots
    rows = q.shape[-2]
    q = F.pad(q, (0, 0, 0, slots_q - rows)) if rows < slots_q else q
    k, v = (F.pad(x, (0, 0, 0, slots_k - x.shape[-2])) if x.shape[-2] < slots_k else x for x in (k, v))
    if key_mask is not None:
        key_mask = F.pad(key_mask, (0, slots_k - key_mask.shape[-1]))
    pooled = isinstance(rest, Pool)
    if isinstance(rest, Pool):
        (k_pool, number), (v_pool, _) = (pool(x, plan.k_len, plan.block_k, key_mask) for x in (k, v))
        bias = _pool_bias(plan, number, rest.weight)
        more = bias.shape[-1] - len(plan.k_len)
        k, v = (torch.cat([x, F.pad(p, (0, 0, 0, more)).to(x.dtype)], -2) for x, p in ((k, k_pool), (v, v_pool)))
        score_mod = _score_mod(bias, plan.block_q, slots_k)
    else:
        score_mod = None
    extra = (k.shape[-2] - slots_k) // plan.block_k
    if key_mask is None:
        mask = _masks.get((plan.bits.data_ptr(), plan.bits._version, extra), lambda: (plan, plan.block_mask(extra)))[1]
    else:
        mask = plan.block_mask(extra, key_mask)
    shapes = (tuple(q.shape), tuple(k.shape), v.shape[-1], plan.block_q, plan.block_k)
    kind = (pooled, bias.shape if pooled else None, plan.box is not None, key_mask is not None, return_lse)
    run = _compiled.get((q.device, q.dtype, *shapes, *kind, scale), lambda: _compile(q, k))
    out = run(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_lse=return_lse,
    )
    out, lse = out if return_lse else (out, None)
    return out[..., :rows, :], None if lse is None else lse[..., :rows]


def _compile(q: Tensor, k: Tensor) -> Callable[..., Any]:
    logger.info("compiling FlexAttention for q %s, k %s: some seconds, once per shape", tuple(q.shape), tuple(k.shape))
    # A code object of its own: Dynamo counts recompilations per code object, and each shape here is a first compilation.
    code = flex_attention.__code__.replace(co_name="flex_attention [accelplug]")
    own = types.FunctionType(
        code, flex_attention.__globals__, "flex_attention", flex_attention.__defaults__, flex_attention.__closure__
    )
    own.__kwdefaults__ = flex_attention.__kwdefaults__
    return torch.compile(own, dynamic=False, fullgraph=True)


def _pool_bias(plan: BlockPlan, number: Tensor, weight: Tensor | None) -> Tensor:
    """What pooled key j adds to the logits of query block m: float32 (B|1, H|1, M, N padded to whole key blocks)."""
    logs = number.clamp(min=1).log()[:, :, None]  # [B|1, 1, 1, N]
    if weight is not None:
        logs = logs * weight[:, None, None]
    unread = ~plan.members & (number > 0)[:, :, None]
    bias = torch.where(unread, logs, -torch.inf)
    return F.pad(bias, (0, -bias.shape[-1] % plan.block_k), value=-torch.inf).contiguous()


def _score_mod(bias: Tensor, block_q: int, exact: int) -> Callable[..., Tensor]:
    one_batch, one_head = bias.shape[0] == 1, bias.shape[1] == 1

    def add_bias(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        block = torch.where(key >= exact, key - exact, 0)
        extra = bias[b * 0 if one_batch else b, h * 0 if one_head else h, row // block_q, block]
        return score + torch.where(key >= exact, extra, 0.0)

    return add_bias
