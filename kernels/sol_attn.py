"""Sol-Attn's own kernel, as package `kernels` brings it from the Hub: threshold, exact blocks and pooled rest in one call.

It takes tau and finds thresholds itself (interface.py of NVlabs/Sana, branch sol-engine, commit 2deaf463): bfloat16, heads of 128, blocks
of 64, a band of one block, every other block read as its mean. A `Threshold` that was made so carries its `rule`. The kernel is proposed
for the Hub as `HUB` (huggingface/kernels-community) and was not there when this was written. No GPU has run this: what is
passed on and what comes of it are tested against a stand-in of the published rule. So `auto` never takes it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accelplug import compat
from accelplug.errors import UnsupportedError
from accelplug.kernels.plan import BlockPlan, Threshold
from accelplug.kernels.rest import Pool, Rest

HUB = "kernels-community/sol-attn"
BLOCK, DIM, BAND = 64, 128, 1


def missing(device: torch.device) -> str | None:
    """Why Sol-Attn's kernel cannot run on `device`, or None; whether the Hub has it shows when it is asked for."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"Sol-Attn's kernel runs on NVIDIA GPUs alone, not on {'ROCm' if device.type == 'cuda' else device.type}"
    if compat.versions.installed("kernels") is None:
        return "kernels is not installed (pip install kernels)"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"Sol-Attn's kernel is for compute capability 8 and above, this GPU has {major}.{minor}"


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | Threshold, rest: Rest, key_mask: Tensor | None, native: bool
) -> str | None:
    """Why this call cannot run on Sol-Attn's kernel, or None. `native`: whether products are to be those of the dtype."""
    if (reason := missing(q.device)) is not None:
        return reason
    if not isinstance(plan, Threshold) or plan.rule is None:
        return "it makes thresholds of its own, as patch sol does with one tau for all heads, statistic diag or exact, and no text"
    if (plan.block_q, plan.block_k, plan.band) != (BLOCK, BLOCK, BAND):
        return f"it takes blocks of {BLOCK} and a band of {BAND}, got {plan.block_q} x {plan.block_k} and {plan.band}"
    if not isinstance(rest, Pool) or rest.weight is not None or rest.representative != "mean":
        return "it reads every other block as its mean, at weight 1 (rest: pool)"
    if q.dtype != torch.bfloat16 or not q.shape == k.shape == v.shape or q.shape[-1] != DIM:
        return f"it takes bfloat16, and q, k and v of one shape with heads of {DIM}, got {q.dtype}, {tuple(q.shape)}, {tuple(k.shape)}"
    if key_mask is not None or not native:
        return "it masks no keys and rounds nothing to 8 bits"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | Threshold,
    rest: Rest,
    scale: float,
    key_mask: Tensor | None,
    native: bool,
) -> Tensor:
    """Return the output (B, H, P_q, D_v); see `attention.block_attention`."""
    if (reason := unsupported(q, k, v, plan, rest, key_mask, native)) is not None or not isinstance(plan, Threshold):
        raise UnsupportedError(f"backend='sol' cannot serve: {reason}. Use backend='triton' or 'auto'.")
    tau, statistic = plan.rule or (0.0, "")
    return _sol_op(q, k, v, scale, tau, statistic)


@torch.library.custom_op("accelplug::sol_attn", mutates_args=())
def _sol_op(q: Tensor, k: Tensor, v: Tensor, scale: float, tau: float, statistic: str) -> Tensor:
    """One opaque node in compiled graphs. The kernel's tensors are (B, S, H, D)."""
    try:
        out = _from_hub()(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), scale=scale, tau=tau, thresh_type=statistic)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a download or another's code may throw
        raise UnsupportedError(f"backend='sol' failed: {HUB}: {error}. Use backend='triton' or 'auto'.") from error
    return out.transpose(1, 2).contiguous()


@_sol_op.register_fake
def _sol_op_fake(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape)


@functools.cache
def _from_hub() -> Callable[..., Tensor]:
    hub: Any = importlib.import_module("kernels")  # of Hugging Face: what is asked for by name is downloaded, and run
    kernel: Callable[..., Tensor] = hub.get_kernel(HUB).sol_attn
    return kernel
