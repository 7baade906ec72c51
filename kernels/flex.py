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
from accelplug.kernels.plan import BlockPlan, Threshold
from accelplug.kernels.rest import Coarse, extended

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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    coarse: Coarse | None,
    scale: float,
    key_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return (out, lse); see `attention.block_attention`."""
    if (reason := unsupported(q, plan, return_lse)) is not None:
        raise UnsupportedError(f"backend='flex' cannot serve: {reason}. Use backend='blocked' or 'auto'.")
    slots_q, slots_k = len(plan.q_len) * plan.block_q, plan.key_slots
    rows, ratio = q.shape[-2], q.shape[1] // k.shape[1]
    k, v = extended(k, v, coarse, slots_k)
    q, k, v = _padded(q, slots_q), *(_padded(x, -(-x.shape[-2] // plan.block_k) * plan.block_k) for x in (k, v))
    levels = () if coarse is None else coarse.levels
    if key_mask is None:
        key = (plan.bits.data_ptr(), plan.bits._version, levels)
        mask = _masks.get(key, lambda: (plan, plan.block_mask(levels)))[1]
    else:
        key_mask = F.pad(key_mask, (0, slots_k - key_mask.shape[-1]))
        mask = plan.block_mask(levels, key_mask)
    score_mod = None if coarse is None else _score_mod(coarse.bias, slots_k)
    shapes = (tuple(q.shape), tuple(k.shape), v.shape[-1], plan.block_q, plan.block_k, tuple(plan.bits.shape), levels)
    kind = (coarse and coarse.bias.shape, plan.box is not None, key_mask is not None, return_lse)
    run = _compiled.get((q.device, q.dtype, *shapes, *kind, scale), lambda: _compile(q, k))
    options = {"scale": scale, "enable_gqa": ratio > 1, "return_lse": return_lse}
    out = run(q, k, v, score_mod=score_mod, block_mask=mask, **options)
    out, lse = out if return_lse else (out, None)
    return out[..., :rows, :], None if lse is None else lse[..., :rows]


def _padded(x: Tensor, slots: int) -> Tensor:
    return F.pad(x, (0, 0, 0, slots - x.shape[-2])) if x.shape[-2] < slots else x


def _compile(q: Tensor, k: Tensor) -> Callable[..., Any]:
    logger.info("compiling FlexAttention for q %s, k %s: some seconds, once per shape", tuple(q.shape), tuple(k.shape))
    # A code object of its own: Dynamo counts recompilations per code object, and each shape here is a first compilation.
    code = flex_attention.__code__.replace(co_name="flex_attention [accelplug]")
    own = types.FunctionType(
        code, flex_attention.__globals__, "flex_attention", flex_attention.__defaults__, flex_attention.__closure__
    )
    own.__kwdefaults__ = flex_attention.__kwdefaults__
    return torch.compile(own, dynamic=False, fullgraph=True)


def _score_mod(bias: Tensor, slots: int) -> Callable[..., Tensor]:
    """Add `bias`, float32 (B|1, H|1, E), to the logits of the coarse keys, which stand from `slots` on."""
    one_batch, one_head = bias.shape[0] == 1, bias.shape[1] == 1
    last = bias.shape[-1] - 1  # behind it stand keys that fill the last block; nobody reads them

    def add_bias(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        mean = torch.where(key < slots, 0, torch.where(key - slots < last, key - slots, last))
        extra = bias[b * 0 if one_batch else b, h * 0 if one_head else h, mean]
        return score + torch.where(key < slots, 0.0, extra)

    return add_bias
