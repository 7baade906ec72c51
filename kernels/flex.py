"""Block attention by FlexAttention: compiled once per shape, fast on CPU and GPU. On a CPU it needs a C++ compiler.

Two backends: ``flex`` is torch's own kernel, ``flash`` has torch build it on FlashAttention-4 (package flash-attn-4, Hopper and
datacentre Blackwell). ``flash`` never ran on a GPU here: only what it refuses and what it asks torch for is tested.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import shutil
import types
from collections.abc import Callable
from typing import Any, Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from accelplug import compat
from accelplug.bounded import Bounded
from accelplug.errors import UnsupportedError
from accelplug.kernels.plan import BlockPlan, Threshold
from accelplug.kernels.rest import Coarse, extended

logger = logging.getLogger("accelplug")

FLASH_DIMS = (64, 128)
"""Head dimensions for which FlashAttention-4 has tiles of 128 keys on every GPU that it runs on."""

KEPT = 1 << 22
"""Most pairs of blocks of a plan whose mask is kept between calls; it takes 8 bytes a pair, and heads that differ have a pair each."""

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


@functools.cache
def _flash_importable() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:  # no flash_attn at all
        return False


def flash_missing(device: torch.device) -> str | None:
    """Why FlexAttention on FlashAttention-4 cannot run on `device`, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"FlashAttention-4 runs on NVIDIA GPUs alone, not on {'ROCm' if device.type == 'cuda' else device.type}"
    options = getattr(torch_flex, "FlexKernelOptions", None)
    if options is None or "FLASH" not in get_args(get_type_hints(options).get("BACKEND")):
        return f"torch {torch.__version__} has no FlashAttention-4 under FlexAttention"
    if not _flash_importable():
        return "flash-attn-4 is not installed (pip install --pre flash-attn-4)"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10, 11):
        return f"FlashAttention-4 skips blocks on compute capability 9, 10 and 11 alone, this GPU has {major}.{minor}"
    return None


def flash_unsupported(q: Tensor, v: Tensor, plan: BlockPlan | Threshold) -> str | None:
    """Why this call cannot run on FlashAttention-4, or None."""
    if (reason := flash_missing(q.device)) is not None:
        return reason
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention-4 takes bfloat16 and float16, got {q.dtype}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] not in FLASH_DIMS:
        return f"FlashAttention-4 is asked for head dimensions 64 and 128 alone, got {q.shape[-1]} and {v.shape[-1]}"
    rows = 128 if torch.cuda.get_device_capability(q.device)[0] == 9 else 256  # Blackwell has two tiles of queries in flight
    if plan.block_q % rows or plan.block_k != 128:
        return (
            f"FlashAttention-4 takes key blocks of 128 and query blocks of a multiple of {rows} on this GPU, got "
            f"{plan.block_q} x {plan.block_k}"
        )
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
    *,
    backend: Literal["flex", "flash"] = "flex",
) -> tuple[Tensor, Tensor | None]:
    """Return (out, lse); see `attention.block_attention`."""
    flash = backend == "flash"
    if (reason := flash_unsupported(q, v, plan) if flash else unsupported(q, plan, return_lse)) is not None:
        others = "'flex', 'blocked'" if flash else "'blocked'"
        raise UnsupportedError(f"backend='{backend}' cannot serve: {reason}. Use backend={others} or 'auto'.")
    slots_q, slots_k = len(plan.q_len) * plan.block_q, plan.key_slots
    rows, ratio = q.shape[-2], q.shape[1] // k.shape[1]
    k, v = extended(k, v, coarse, slots_k)
    q, k, v = padded(q, slots_q), *(padded(x, -(-x.shape[-2] // plan.block_k) * plan.block_k) for x in (k, v))
    levels = () if coarse is None else coarse.levels
    if key_mask is None and math.prod(plan.bits.shape[:3]) * slots_k // plan.block_k <= KEPT:
        key = (plan.bits.data_ptr(), plan.bits.shape, compat.torch.times_written(plan.bits), plan.causal, levels)
        mask = _masks.get(key, lambda: (plan, plan.block_mask(levels)))[1]
    else:
        key_mask = None if key_mask is None else F.pad(key_mask, (0, slots_k - key_mask.shape[-1]))
        mask = plan.block_mask(levels, key_mask)
    score_mod = None if coarse is None else _score_mod(coarse.bias, slots_k)
    shapes = (tuple(q.shape), tuple(k.shape), v.shape[-1], plan.block_q, plan.block_k, tuple(plan.bits.shape), levels)
    masked = (plan.box is not None, plan.causal is not None, key_mask is not None)
    kind = (coarse and coarse.bias.shape, *masked, return_lse)
    run = _compiled.get((backend, q.device, q.dtype, *shapes, *kind, scale), lambda: _compile(q, k))
    options: dict[str, Any] = {"scale": scale, "enable_gqa": ratio > 1, "return_lse": return_lse}
    if flash:
        options["kernel_options"] = {"BACKEND": "FLASH"}
    try:
        out = run(q, k, v, score_mod=score_mod, block_mask=mask, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a package that changes still: whatever it throws, `auto` goes on without it
        if not flash:
            raise
        raise UnsupportedError(
            f"backend='flash' failed inside FlashAttention-4 or torch: {error}. Use backend='flex' or 'auto'."
        ) from error
    out, lse = out if return_lse else (out, None)
    return out[..., :rows, :], None if lse is None else lse[..., :rows]


def padded(x: Tensor, slots: int) -> Tensor:
    """Return (B, H, P, D) with as many slots, zeros behind."""
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
    last = bias.shape[-1] - 1  # behind it stand keys that fill the last block, which no query reads

    def add_bias(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        mean = torch.where(key < slots, 0, torch.where(key - slots < last, key - slots, last))
        extra = bias[b * 0 if one_batch else b, h * 0 if one_head else h, mean]
        return score + torch.where(key < slots, 0.0, extra)

    return add_bias
