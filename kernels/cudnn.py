"""Block attention by cuDNN's block-sparse kernels (package nvidia-cudnn-frontend; Hopper and Blackwell), given lists of blocks.

Its front end takes, for each query block, which key blocks are read and how many, and how many keys each holds: a `BlockPlan`, unpacked.
Query and key blocks are of one size there, 64 or 128; larger ones are cut. What is read by means is computed here, and both parts are
put together by their log-sum-exps. No GPU has run this: the lists are tested by value against the plan, and the call against a stand-in
of what the front end documents (docs/fe-oss-apis/bsa.md, read in 1.32). So `auto` never takes it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelplug import compat
from accelplug.errors import UnsupportedError
from accelplug.kernels.chunks import at_once
from accelplug.kernels.flex import padded
from accelplug.kernels.plan import BlockPlan, block_lists
from accelplug.kernels.rest import Coarse

PACKAGE = "nvidia-cudnn-frontend"
BLOCKS_TAKEN = {9: (64,), 10: (128, 64), 11: (128, 64), 12: (64,)}
"""Tokens of a block, by the major compute capability; the first that divides the plan's blocks is taken. Hopper has 128
too since 1.32, where nothing is said of rows that read no block."""
DIMS_TAKEN = {9: (64, 96, 128), 10: (64, 96, 128), 11: (64, 96, 128), 12: (128,)}


@dataclass(frozen=True, eq=False)
class Lists:
    """A plan as cuDNN reads it, all int32: B, H as in the call, M query and N key blocks of the same size.

    Attributes
    ----------
    index : (B, H, M, N), numbers of the blocks that are read, in front; the others follow.
    number : (B, H, M), how many they are.
    sizes : (N,), keys that each block holds; none that is read holds none.
    """

    index: Tensor
    number: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, plan: BlockPlan, block: int, batch: int, heads: int) -> Lists:
        """Cut a plan's blocks into some of `block` slots."""
        rows, columns = plan.block_q // block, plan.block_k // block
        starts = torch.arange(columns, device=plan.k_len.device) * block
        sizes = (plan.k_len[:, None] - starts).clamp(0, block).flatten().int()
        members = plan.members.repeat_interleave(rows, -2).repeat_interleave(columns, -1) & (sizes > 0)
        number, index = block_lists(members.expand(batch, heads, -1, -1))
        return cls(index, number, sizes)


def missing(device: torch.device) -> str | None:
    """Why cuDNN's block-sparse kernels cannot run on `device`, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"cuDNN runs on NVIDIA GPUs alone, not on {'ROCm' if device.type == 'cuda' else device.type}"
    if compat.versions.installed(PACKAGE) is None:
        return f"{PACKAGE} is not installed (pip install {PACKAGE})"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in BLOCKS_TAKEN:
        return f"cuDNN's block-sparse kernels are for compute capability 9 to 12, this GPU has {major}.{minor}"
    return None


def unsupported(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, key_mask: Tensor | None) -> str | None:
    """Why this call cannot run on cuDNN's block-sparse kernels, or None."""
    if (reason := missing(q.device)) is not None:
        return reason
    major, _ = torch.cuda.get_device_capability(q.device)
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {q.dtype}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] not in DIMS_TAKEN[major]:
        taken = " and ".join(map(str, DIMS_TAKEN[major]))
        return f"it takes head dimensions {taken} on this GPU, got {q.shape[-1]} and {v.shape[-1]}"
    if plan.causal is not None or plan.box is not None or key_mask is not None:
        return "it masks no tokens: no causal plan, no window by token, no padded keys"
    size = _size(plan, major)
    if size is None:
        return f"it takes blocks of a multiple of 64, got {plan.block_q} x {plan.block_k}"
    alone = q.dtype == torch.bfloat16 and q.shape[-1] == 128 and q.shape[1] == k.shape[1]
    if size == 64 and major in (10, 11) and not alone:
        return "on this GPU it takes blocks of 64 in bfloat16 alone, with heads of 128 that share no keys"
    return None


def _size(plan: BlockPlan, major: int) -> int | None:
    return next((size for size in BLOCKS_TAKEN[major] if plan.block_q % size == plan.block_k % size == 0), None)


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
    if (reason := unsupported(q, k, v, plan, key_mask)) is not None:
        raise UnsupportedError(f"backend='cudnn' cannot serve: {reason}. Use backend='triton', 'flex' or 'auto'.")
    rows, size = q.shape[-2], _size(plan, torch.cuda.get_device_capability(q.device)[0]) or 0
    lists = Lists.of(plan, size, *q.shape[:2])
    tensors = (padded(q, len(plan.q_len) * plan.block_q), padded(k, plan.key_slots), padded(v, plan.key_slots))
    out, lse = _forward(*tensors, lists, size, scale)
    out, lse = out[..., :rows, :], lse[..., :rows]
    if coarse is not None:
        out, lse = _merged((out, lse), _by_means(q, plan, coarse, scale))
    return out.to(v.dtype), lse if return_lse else None


def _forward(q: Tensor, k: Tensor, v: Tensor, lists: Lists, size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Call the front end: (B, H, P_q, D_v) and the natural log-sum-exp, float32 (B, H, P_q)."""
    try:
        front_end: Any = importlib.import_module("cudnn")
        found = front_end.BSA.block_sparse_attention_forward(
            *(x.contiguous() for x in (q, k, v)),
            lists.index,
            block_sizes=lists.sizes,
            q2k_block_nums=lists.number,
            sparse_block_size=size,
            allow_empty_block_nums=True,
            softmax_scale=scale,
            pack_gqa=False,
        )
        return found["o_tensor"], found["lse_tensor"]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an interface that is still called experimental: whatever it throws
        raise UnsupportedError(
            f"backend='cudnn' failed inside {PACKAGE}: {error}. Use backend='triton', 'flex' or 'auto'."
        ) from error


def _by_means(q: Tensor, plan: BlockPlan, coarse: Coarse, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to the coarse keys alone: (out, lse), both float32; a row that reads none has 0 and -inf."""
    ratio, rows = q.shape[1] // coarse.k.shape[1], q.shape[-2]
    keys, values = (x.float().repeat_interleave(ratio, 1) for x in (coarse.k, coarse.v))
    out, lse = keys.new_empty(*q.shape[:-1], values.shape[-1]), keys.new_empty(q.shape[:-1])
    reads = plan.coarse_reads(coarse.levels)  # [B|1, H|1, M, E]
    step = at_once(q.shape[0] * q.shape[1] * keys.shape[-2] * plan.block_q)  # query blocks
    for first in range(0, len(plan.q_len), step):
        some = slice(first * plan.block_q, min((first + step) * plan.block_q, rows))
        may = reads[..., first : first + step, :].repeat_interleave(plan.block_q, -2)[..., : some.stop - some.start, :]
        logits = scale * q[..., some, :].float() @ keys.mT + coarse.bias[:, :, None]
        logits = logits.masked_fill(~may, -torch.inf)
        lse[..., some] = logits.logsumexp(-1)
        out[..., some, :] = logits.softmax(-1).nan_to_num(0.0) @ values
    return out, lse


def _merged(exact: tuple[Tensor, Tensor], means: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Put two parts of a row's attention together, each (out, lse), by what each holds of its mass."""
    both = torch.logaddexp(exact[1], means[1])
    shares = ((lse - both).exp().nan_to_num(0.0)[..., None] for _, lse in (exact, means))
    return sum(share * out.float() for share, (out, _) in zip(shares, (exact, means), strict=True)), both  # type: ignore[return-value]
