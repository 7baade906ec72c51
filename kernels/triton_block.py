"""Block attention in Triton: one program per (head, query block) walks its list of key blocks in one online softmax.

The pooled rest is a second loop in the same softmax. A `Threshold` is evaluated in that loop, so that no plan is ever
materialised. Imported only where triton is installed; under ``TRITON_INTERPRET=1`` it runs on a CPU.

Tiles go by tensor descriptors or by pointers, see `Tier`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from accelplug.errors import UnsupportedError
from accelplug.kernels.plan import LEVELS, LOG2_E, BlockPlan, Threshold, pack_bits
from accelplug.kernels.precision import Quantised, QuantisedValues
from accelplug.kernels.rest import Drop, Pool, coarse

MIN_BLOCK = 16  # the least that tl.dot takes on a side
MIN_EIGHT = 32  # and of 8-bit numbers on the side that it sums over
GROUP = 64  # pooled keys per step

Tier = Literal["pointers", "keys", "whole"]
"""What goes by tensor descriptors: nothing; keys and values; queries and the output as well. All give the same numbers.

Only ``keys`` was timed on a GPU, an H100. `benchmarks.gpu_block_attention` times all three.
"""


def missing(device: torch.device) -> str | None:
    """Why the kernel cannot run on `device`, or None."""
    if device.type == "cpu":
        return None if triton.knobs.runtime.interpret else "on a CPU it runs only in the interpreter (TRITON_INTERPRET=1)"
    return None if device.type in ("cuda", "xpu") else f"Triton does not run on {device.type}"


def unsupported(
    q: Tensor, v: Tensor, plan: BlockPlan | Threshold, dtype: torch.dtype | None = None, values: str = "native"
) -> str | None:
    """Why this call, with q.k in an 8-bit `dtype` or as it is, and p.v as `values` says, cannot run here, or None."""
    if (reason := missing(q.device)) is not None:
        return reason
    if plan.block_q < MIN_BLOCK or plan.block_q & (plan.block_q - 1):
        return f"query blocks must be a power of two of at least {MIN_BLOCK}, got {plan.block_q}"
    if _spread(plan) and isinstance(plan, BlockPlan) and (plan.box is not None or plan.causal is not None):
        what = "under a box" if plan.causal is None else "of a causal plan"
        return f"key blocks {what} must be a power of two of at least {MIN_BLOCK}, got {plan.block_k}"
    if dtype is not None and _spread(plan):
        return f"8-bit key blocks must be a power of two of at least {MIN_BLOCK}, got {plan.block_k}"
    if values != "native" and (_spread(plan) or plan.block_k < MIN_EIGHT):
        return f"key blocks of 8-bit values must be a power of two of at least {MIN_EIGHT}, got {plan.block_k}"
    if dtype == torch.float8_e4m3fn and q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 9):
        return "this GPU multiplies no fp8"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"head dimensions go up to 256, got {q.shape[-1]} and {v.shape[-1]}"
    return None


def tier_of(device: torch.device) -> Tier:
    """The tier that serves on `device` unless another is asked for.

    NVIDIA GPUs have hardware for descriptors (TMA) from compute capability 9.0 on. Elsewhere Triton makes pointers of them whose
    alignment it does not know: compiled for 8.0, loads of 2 bytes, where ``pointers`` has asynchronous ones of 16.
    """
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0)):
        return "pointers"
    return "keys"


def evaluates(rule: Threshold, rest: Drop | Pool) -> bool:
    """Whether the kernel finds this plan as it goes: its scores are those of the pooled keys."""
    return not _spread(rule) and (isinstance(rest, Drop) or rest.representative == "mean")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | Threshold,
    rest: Drop | Pool,
    scale: float,
    key_mask: Tensor | None,
    return_lse: bool,
    eight: Quantised | None = None,
    v8: QuantisedValues | None = None,
    tier: Tier | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return (out, lse); see `attention.block_attention`. A `Threshold` takes `Drop` or means, and neither `eight` nor `v8`.

    With `eight`, blocks are read exactly by its queries and keys, and by means through its queries and the means of `k`, smoothed too;
    the log-sum-exp is that of smoothed keys. With `v8`, blocks that are read exactly give its values. `tier`: that of `tier_of`;
    ``whole`` wants triton 3.5 and rows of the output that are multiples of 16 bytes, else `UnsupportedError` is raised.
    """
    values = "native" if v8 is None else "int8"
    if (reason := unsupported(q, v, plan, None if eight is None else eight.k.dtype, values)) is not None:
        raise UnsupportedError(f"backend='triton' cannot serve: {reason}. Use backend='flex', 'blocked' or 'auto'.")
    spread = _spread(plan)
    tier = tier_of(q.device) if tier is None else tier
    if tier == "whole" and (reason := _not_whole(v.shape[-1] * q.element_size())) is not None:
        raise UnsupportedError(f"tier='whole' cannot serve: {reason}. Use tier='keys'.")
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # the interpreter's dot takes the bits of bf16 for integers
        out, lse = attend(q.float(), k.float(), v.float(), plan, rest, scale, key_mask, return_lse, eight, v8, tier)
        return out.bfloat16(), lse
    if scale < 0:  # the kernel takes maxima before it scales
        q, scale, eight = -q, -scale, eight and replace(eight, q=-eight.q)
    batch, heads, rows, dim = q.shape
    dim_v, blocks_k = v.shape[-1], len(plan.k_len)
    threshold, pooled = isinstance(plan, Threshold), isinstance(rest, Pool)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(batch, heads, rows, dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    none = q.new_empty(0)

    more = coarse(k, v, plan, Pool() if threshold and not pooled else rest, key_mask, mean=_mean, exact=spread)
    k_coarse, v_coarse, bias, coarse_keys = none, none, none, 0
    if more is not None:
        k_coarse, v_coarse, coarse_keys = more.k, more.v, more.k.shape[-2]
        k_coarse = k_coarse if eight is None else eight.smoothed(k_coarse)
        v_coarse = v_coarse if v8 is None else v8.in_steps(v_coarse)
        bias = (more.bias * LOG2_E).expand(batch, heads, -1).contiguous()
    if eight is not None:
        q, k = eight.q, eight.k
    if v8 is not None:
        v = v8.v
    box, theta, level_count = None, none, none
    if isinstance(plan, Threshold):
        index = count = whole = plan.q_len  # not read
        theta = plan.theta.expand(batch, heads, -1).contiguous()
        bits = pack_bits(plan.always)[None, None]
    else:
        index, count, whole, bits, box = lists(plan), plan.count, plan.whole, plan.taken, plan.box
        counts = [count[..., None]] if spread else []
        counts += [] if plan.level_count is None else [plan.level_count]
        level_count = torch.cat(counts, -1).contiguous() if counts else none
    plan_batch, plan_heads = (0 if bits.shape[0] == 1 else 1), bits.shape[1]
    causal = plan.causal if isinstance(plan, BlockPlan) else None
    entries = index.shape[-1] if not threshold else 0

    block_d = max(16 if eight is None else 32, triton.next_power_of_2(dim))  # tl.dot takes no fewer
    block_dv = max(16, triton.next_power_of_2(dim_v))
    grid = (len(plan.q_len), batch * heads)
    tile, warps, stages = _tuning(out, plan.block_q, MIN_BLOCK if spread else plan.block_k)
    tile = tile if v8 is None else v8.tile
    by_tile, whole_tier = tier != "pointers", tier == "whole"
    _kernel[grid](
        _tiles_of(q, plan.block_q, block_d) if whole_tier else q,
        _tiles_of(k, tile, block_d) if by_tile else k,
        _tiles_of(v, *((tile, block_dv) if v8 is None else (block_dv, tile))) if by_tile else v,
        _tiles_of(out, plan.block_q, block_dv) if whole_tier else out,
        lse,
        index,
        count,
        whole,
        level_count,
        bits,
        plan.q_len,
        plan.k_len,
        theta,
        box.lo if box else none,
        box.hi if box else none,
        box.coord if box else none,
        none if key_mask is None else key_mask.to(torch.uint8).contiguous(),
        none if eight is None else eight.q_step,
        none if eight is None else eight.k_step,
        none if v8 is None else v8.step,
        k_coarse,
        v_coarse,
        bias,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        heads,
        heads // k.shape[1],
        rows,
        k.shape[-2],
        len(plan.q_len),
        blocks_k,
        coarse_keys,
        entries,
        bits.shape[-1],
        plan_batch * plan_heads,
        heads // plan_heads,
        causal or 0,
        scale * LOG2_E,
        D=dim,
        D_V=dim_v,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        BLOCK_M=plan.block_q,
        BLOCK_K=plan.block_k,
        TILE_K=tile,
        GROUP_K=GROUP,
        AXES=box.coord.shape[1] if box else 0,
        CAUSAL=causal is not None,
        HAS_MASK=key_mask is not None,
        EIGHT=eight is not None,
        EIGHT_V=v8 is not None,
        LISTED=not spread and not threshold,
        FIRST_RUN=1 if spread else LEVELS[0],
        LEVELS=level_count.shape[-1] if level_count is not none else 0,
        POOLED=pooled,
        THRESHOLD=threshold,
        KEY_TILES=by_tile,
        ROW_TILES=whole_tier,
        num_warps=warps,
        num_stages=stages,
    )
    return out, lse if return_lse else None


def lists(plan: BlockPlan) -> Tensor:
    """Return the numbers of the key blocks that each row reads, int16 (B|1, H|1, M, N), or int32 from 32,768 blocks on.

    First those read exactly, the full and past before the others, then those of level 2, 4 and 8; each part ascending. Behind the
    last stands nothing that was written. Made in one pass over the bits, with nothing beside: it need not be kept between calls.
    """
    *outer, rows, words = plan.bits.shape
    blocks = len(plan.k_len)
    dtype = torch.int16 if blocks <= torch.iinfo(torch.int16).max else torch.int32
    index = torch.empty(*outer, rows, blocks, dtype=dtype, device=plan.bits.device)
    levels = plan.bits.new_empty(0) if plan.level is None else plan.level.contiguous()
    _list_kernel[index[..., 0].numel(),](
        plan.bits, levels, plan.k_len, index, blocks, words, rows, plan.causal or 0,
        CAUSAL=plan.causal is not None, BLOCK_M=plan.block_q, BLOCK_K=plan.block_k, LEVELS=len(plan.levels),
        SPAN=min(1024, max(32, triton.next_power_of_2(blocks))),
    )  # fmt: skip
    return index


def _not_whole(row_bytes: int) -> str | None:
    """Why queries and output cannot go by descriptors, or None."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        return f"its compiler fails on it before triton 3.5, this is {triton.__version__}"
    return f"rows of the output have {row_bytes} bytes, expected a multiple of 16" if row_bytes % 16 else None


def _spread(plan: BlockPlan | Threshold) -> bool:
    """Whether key blocks are too odd for tiles of their own: then tiles are gathered from several, as those of means are."""
    return plan.block_k < MIN_BLOCK or plan.block_k & (plan.block_k - 1) > 0


def _mean(x: Tensor, lengths: Tensor, run: int, key_mask: Tensor | None) -> Tensor:
    """Mean over each run, (B, H, len(lengths), D) in x's dtype; `plan.pool` in one pass over x."""
    batch, heads, slots, dim = x.shape
    mean = torch.empty(batch, heads, len(lengths), dim, dtype=x.dtype, device=x.device)
    valid = x.new_empty(0) if key_mask is None else key_mask.to(torch.uint8).contiguous()
    run_slots = triton.next_power_of_2(run)
    runs = max(1, 32 // run_slots)
    _pool_kernel[triton.cdiv(len(lengths), runs), batch * heads](
        x, mean, lengths, valid, *x.stride()[:3], heads, slots, len(lengths),
        D=dim, BLOCK_D=triton.next_power_of_2(dim), RUN=run, RUN_SLOTS=run_slots, RUNS=runs, HAS_MASK=key_mask is not None,
    )  # fmt: skip
    return mean


def _tiles_of(x: Tensor, tile: int, dim: int) -> TensorDescriptor:
    """x (B, H, S, D) for loads or stores of `tile` tokens by `dim` dimensions.

    What lies outside reads as 0 and is not written, and Hopper copies while it computes.
    """
    unit = 16 // x.element_size()  # rows must start at multiples of 16 bytes
    if any(stride % unit for stride in x.stride()[:-1]) or x.data_ptr() % 16:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % unit)).contiguous()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tile, dim])


def _tuning(q: Tensor, block_q: int, block_k: int) -> tuple[int, int, int]:
    """Keys per step, warps and pipeline stages.

    At head dimensions 64 and 128 in 16 bits the best of a sweep on an H100; elsewhere chosen to fit, not timed.
    """
    dim = q.shape[-1]
    warps = 8 if q.element_size() == 4 or (block_q >= 128 and dim > 64) else 4
    if q.element_size() == 4:
        tile = 32 if dim <= 128 else 16
    else:
        hopper = q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) >= (9, 0)
        tile = 128 if hopper and dim <= 128 else 64
    return min(tile, block_k), warps, 2


@triton.jit
def _softmax_step(scores, scale, values, top, total, acc):
    """Add keys to the online softmax: `scores` [M, T] times `scale` is in the log2 domain, `values` is [T, DV]."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)  # [M]
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row without a key yet must not become NaN
    p = tl.exp2(scores * scale - shift[:, None])  # [M, T]
    fade = tl.exp2(top - shift)  # [M]
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")  # [M, DV]
    return new_top, total, acc


@triton.jit
def _eight_bit_step(scores, scale, values, top, total, acc):
    """As `_softmax_step`, with int8 `values` [T, DV] in steps: in each row the largest of the tile has 127 of its own steps."""
    own_top = tl.max(scores, 1) * scale  # [M]
    new_top = tl.maximum(top, own_top)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    own_shift = tl.where(own_top == float("-inf"), 0.0, own_top)
    p = tl.exp2(scores * scale - own_shift[:, None])  # [M, T]
    fade, share = tl.exp2(top - shift), tl.exp2(own_top - shift)  # [M]
    total = total * fade + share * tl.sum(p, 1)
    product = tl.dot((p * 127 + 0.5).to(tl.int8), values).to(tl.float32)  # [M, DV]
    acc = acc * fade[:, None] + product * (share / 127)[:, None]
    return new_top, total, acc


@triton.jit
def _pool_kernel(
    x, mean, lengths, valid, stride_b, stride_h, stride_s, heads, slots, number,
    D: tl.constexpr, BLOCK_D: tl.constexpr, RUN: tl.constexpr, RUN_SLOTS: tl.constexpr, RUNS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Mean of each run of RUN slots; one program per (RUNS of them, head)."""
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    run, d = tl.program_id(0) * RUNS + tl.arange(0, RUNS), tl.arange(0, BLOCK_D)
    place = tl.arange(0, RUN_SLOTS)[None, :]
    at = run[:, None] * RUN + place  # [RUNS, RUN_SLOTS]
    length = tl.load(lengths + run, mask=run < number, other=0)
    counted = (place < length[:, None]) & (at < slots)
    if HAS_MASK:
        counted = counted & (tl.load(valid + b.to(tl.int64) * slots + at, mask=counted, other=0) != 0)
    x += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    tokens = tl.load(
        x + at[:, :, None].to(tl.int64) * stride_s + d[None, None, :],
        mask=counted[:, :, None] & (d[None, None, :] < D),
        other=0.0,
    ).to(tl.float32)  # [RUNS, RUN_SLOTS, D]
    divisor = tl.maximum(tl.sum(counted.to(tl.float32), 1), 1.0)  # [RUNS]
    out = mean + (tl.program_id(1).to(tl.int64) * number + run[:, None]) * D + d[None, :]
    result = tl.sum(tokens, 1) / divisor[:, None]  # [RUNS, D]
    tl.store(out, result.to(mean.dtype.element_ty), mask=(run[:, None] < number) & (d[None, :] < D))


@triton.jit
def _list_kernel(
    bits, levels, k_len, index, blocks, words, rows, first_key,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, LEVELS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The list of one row of a plan, see `lists`."""
    row = tl.program_id(0).to(tl.int64)
    past = (first_key + tl.program_id(0) % rows * BLOCK_M + 1) // BLOCK_K if CAUSAL else blocks
    listed = 0
    for part in tl.static_range(2 + LEVELS):  # read exactly and full and past, exactly and not so, by means of 2, 4, 8
        for start in range(0, blocks, SPAN):
            block = start + tl.arange(0, SPAN)
            there = block < blocks
            if part < 2:
                word = tl.load(bits + row * words + block // 32, mask=there, other=0)
                length = tl.load(k_len + block, mask=there, other=0)
                chosen = there & (((word >> (block % 32)) & 1) != 0)
                whole = (length == BLOCK_K) & (block < past)
                chosen = chosen & (whole if part == 0 else ~whole)
            else:
                chosen = tl.load(levels + row * blocks + block, mask=there, other=0) == (1 << (part - 1))
            place = listed + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(index + row * blocks + place, block.to(index.dtype.element_ty), mask=chosen)
            listed += tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def _coarse_scores(q, k_coarse, at, there, scale, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Logits of the coarse keys `at` [G] without their bias: [M, G], log2 domain."""
    d = tl.arange(0, BLOCK_D)
    keys = tl.load(k_coarse + at[None, :] * D + d[:, None], mask=there[None, :] & (d[:, None] < D), other=0.0)  # [D, G]
    return tl.dot(q, keys, input_precision="ieee") * scale


@triton.jit
def _coarse_step(scores, v_coarse, bias, at, reads, top, total, acc, D_V: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Read the coarse keys `at` [G] where `reads` [G], by their `scores` [M, G]."""
    dv = tl.arange(0, BLOCK_DV)
    weight = tl.load(bias + at, mask=reads, other=float("-inf"))  # [G]
    values = tl.load(v_coarse + at[:, None] * D_V + dv[None, :], mask=reads[:, None] & (dv[None, :] < D_V), other=0.0)
    return _softmax_step(scores + weight[None, :], 1.0, values, top, total, acc)


@triton.jit
def _rows_at(x, rows, stride, held, D: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr):
    """The `rows` [T] of one head by pointers, [T, BLOCK_D]; what is not `held` [T] and lies outside reads as 0."""
    d = tl.arange(0, BLOCK_D)
    at = x + rows[:, None].to(tl.int64) * stride + d[None, :]
    return tl.load(at, mask=held[:, None] & (d[None, :] < D), other=0.0) if RAGGED or D < BLOCK_D else tl.load(at)


@triton.jit
def _key_step(
    q,
    k,
    v,
    stride_ks,
    stride_vs,
    b,
    kv_head,
    block,
    start,
    length,
    rows,
    lo,
    hi,
    coord,
    key_mask,
    k_step,
    slots_k,
    rows_held,
    first_key,
    scale,
    top,
    total,
    acc,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    AXES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EIGHT: tl.constexpr,
    EIGHT_V: tl.constexpr,
    KEY_TILES: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Read TILE_K keys of a key block exactly, from its slot `start` on."""
    tile = tl.arange(0, TILE_K)  # [T]
    first = block * BLOCK_K + start
    held = (start + tile < length) & (first + tile < slots_k)
    if KEY_TILES:
        keys = k.load([b, kv_head, first, 0]).reshape(TILE_K, BLOCK_D)
    else:
        keys = _rows_at(k, first + tile, stride_ks, held, D, BLOCK_D, RAGGED)
    if EIGHT_V and KEY_TILES:
        values = tl.trans(v.load([b, kv_head, 0, first]).reshape(BLOCK_DV, TILE_K))
    elif EIGHT_V:
        dv = tl.arange(0, BLOCK_DV)[None, :]
        values = tl.load(v + dv * stride_vs + (first + tile)[:, None], mask=dv < D_V, other=0)
    elif KEY_TILES:
        values = v.load([b, kv_head, first, 0]).reshape(TILE_K, BLOCK_DV)
    else:
        values = _rows_at(v, first + tile, stride_vs, held, D_V, BLOCK_DV, RAGGED)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee").to(tl.float32)  # [M, T]
    if EIGHT:
        scale *= tl.load(k_step + block)
    if RAGGED:
        scores = tl.where(held[None, :], scores, float("-inf"))
        if not EIGHT_V:
            values = tl.where(held[:, None], values, 0.0)  # nobody may have written to a slot without a token
        if CAUSAL:
            scores = tl.where((first + tile)[None, :] <= (first_key + rows)[:, None], scores, float("-inf"))
    if HAS_MASK:
        allowed = tl.load(key_mask + first + tile, mask=held, other=0) != 0
        scores = tl.where(allowed[None, :], scores, float("-inf"))
    for axis in tl.static_range(AXES):
        at = tl.load(coord + (first + tile) * AXES + axis, mask=held, other=0)[None, :]
        low = tl.load(lo + rows * AXES + axis, mask=rows_held, other=0)[:, None]
        high = tl.load(hi + rows * AXES + axis, mask=rows_held, other=1)[:, None]
        scores = tl.where((at >= low) & (at < high), scores, float("-inf"))
    if EIGHT_V:
        top, total, acc = _eight_bit_step(scores, scale, values, top, total, acc)
    else:
        top, total, acc = _softmax_step(scores, scale, values, top, total, acc)
    return top, total, acc


@triton.jit
def _kernel(
    q,
    k,
    v,
    out,
    lse,
    index,
    count,
    whole,
    level_count,
    bits,
    q_len,
    k_len,
    theta,
    lo,
    hi,
    coord,
    key_mask,
    q_step,
    k_step,
    v_step,
    k_coarse,
    v_coarse,
    bias,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    heads,
    ratio,
    slots_q,
    slots_k,
    blocks_q,
    blocks_k,
    coarse_keys,
    entries,
    words,
    plan_batch,
    heads_alike,
    first_key,
    scale,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    AXES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EIGHT: tl.constexpr,
    EIGHT_V: tl.constexpr,
    LISTED: tl.constexpr,
    FIRST_RUN: tl.constexpr,
    LEVELS: tl.constexpr,
    POOLED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEY_TILES: tl.constexpr,
    ROW_TILES: tl.constexpr,
):
    m = tl.program_id(0)
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    kv_head = h // ratio
    b64, h64, kv64 = b.to(tl.int64), h.to(tl.int64), kv_head.to(tl.int64)
    if not KEY_TILES:
        k += b64 * stride_kb + kv64 * stride_kh
        v += b64 * stride_vb + kv64 * stride_vh
    key_mask += b64 * slots_k
    row_of_plan = (b64 * plan_batch + h64 // heads_alike) * blocks_q + m
    row_of_bits = m.to(tl.int64) if THRESHOLD else row_of_plan  # what is always read is the same for all heads
    heads_kv = heads // ratio
    k_coarse += (b64 * heads_kv + kv64) * coarse_keys * D
    v_coarse += (b64 * heads_kv + kv64) * coarse_keys * D_V
    bias += (b64 * heads + h64) * coarse_keys

    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    rows_held = rows < slots_q
    if ROW_TILES:
        queries = q.load([b, h, m * BLOCK_M, 0]).reshape(BLOCK_M, BLOCK_D)
    else:
        queries = _rows_at(q + b64 * stride_qb + h64 * stride_qh, rows, stride_qs, rows_held, D, BLOCK_D, True)
    wide, exact_scale = queries, scale  # what coarse keys are read by; what undoes the rounding of exact logits
    if EIGHT:
        step = tl.load(q_step + (b64 * heads + h64) * blocks_q + m)
        wide, exact_scale = (queries.to(tl.float32) * step).to(k_coarse.dtype.element_ty), scale * step
        k_step += (b64 * heads_kv + kv64) * blocks_k
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    entries_of_row = index + row_of_plan * entries
    if LISTED:
        STEPS: tl.constexpr = BLOCK_K // TILE_K
        filled = tl.load(whole + row_of_plan)  # how many blocks at the front of the list have a token in every slot
        # No branch in this loop: loads of the next steps start while this one multiplies.
        for step in range(0, filled * STEPS):
            block = tl.load(entries_of_row + step // STEPS).to(tl.int32)
            top, total, acc = _key_step(
                queries, k, v, stride_ks, stride_vs, b, kv_head, block, step % STEPS * TILE_K, BLOCK_K, rows, lo, hi, coord,
                key_mask, k_step, slots_k, rows_held, first_key, exact_scale, top, total, acc, D, D_V, BLOCK_D, BLOCK_DV,
                BLOCK_K, TILE_K, CAUSAL, AXES, HAS_MASK, EIGHT, EIGHT_V, KEY_TILES, False,
            )  # fmt: skip
        for step in range(filled * STEPS, tl.load(count + row_of_plan) * STEPS):
            block = tl.load(entries_of_row + step // STEPS).to(tl.int32)
            top, total, acc = _key_step(
                queries, k, v, stride_ks, stride_vs, b, kv_head, block, step % STEPS * TILE_K, tl.load(k_len + block), rows,
                lo, hi, coord, key_mask, k_step, slots_k, rows_held, first_key, exact_scale, top, total, acc, D, D_V, BLOCK_D,
                BLOCK_DV, BLOCK_K, TILE_K, CAUSAL, AXES, HAS_MASK, EIGHT, EIGHT_V, KEY_TILES, True,
            )  # fmt: skip
        entries_of_row += tl.load(count + row_of_plan)

    for level in tl.static_range(LEVELS):
        means = BLOCK_K // (FIRST_RUN << level)  # per block; a tile takes them from as many blocks as it needs
        number = tl.load(level_count + row_of_plan * LEVELS + level)
        for start in range(0, number * means, GROUP_K):
            mean = start + tl.arange(0, GROUP_K)  # [G]
            there = mean < number * means
            at = tl.load(entries_of_row + mean // means, mask=there, other=0).to(tl.int32) * means + mean % means
            scores = _coarse_scores(wide, k_coarse, at, there, scale, D, BLOCK_D)
            top, total, acc = _coarse_step(scores, v_coarse, bias, at, there, top, total, acc, D_V, BLOCK_DV)
        entries_of_row += number
        k_coarse += blocks_k * means * D
        v_coarse += blocks_k * means * D_V
        bias += blocks_k * means

    if POOLED or THRESHOLD:
        rows_used = tl.load(q_len + m)
        counted = tl.arange(0, BLOCK_M) < rows_used
        for group in range(0, blocks_k, GROUP_K):
            blocks = group + tl.arange(0, GROUP_K)  # [G]
            there = blocks < blocks_k
            scores = _coarse_scores(wide, k_coarse, blocks, there, scale, D, BLOCK_D)
            word = tl.load(bits + row_of_bits * words + blocks // 32, mask=there, other=0)  # [G]
            exact = ((word >> (blocks % 32)) & 1) != 0  # [G]
            if THRESHOLD:
                mean = tl.sum(tl.where(counted[:, None], scores, 0.0), 0) / tl.maximum(rows_used, 1)  # [G]
                exact = exact | (mean > tl.load(theta + (b64 * heads + h64) * blocks_q + m))
            if POOLED:
                left = there & ~exact
                top, total, acc = _coarse_step(scores, v_coarse, bias, blocks, left, top, total, acc, D_V, BLOCK_DV)
            if THRESHOLD:
                for place in range(0, GROUP_K):
                    block = group + place
                    read = tl.sum(tl.where(tl.arange(0, GROUP_K) == place, (exact & there).to(tl.int32), 0), 0)
                    if read != 0:
                        length = tl.load(k_len + block)
                        for start in tl.static_range(0, BLOCK_K, TILE_K):
                            top, total, acc = _key_step(
                                queries, k, v, stride_ks, stride_vs, b, kv_head, block, start, length, rows, lo, hi, coord,
                                key_mask, k_step, slots_k, rows_held, first_key, exact_scale, top, total, acc, D, D_V, BLOCK_D,
                                BLOCK_DV, BLOCK_K, TILE_K, CAUSAL, AXES, HAS_MASK, EIGHT, EIGHT_V, KEY_TILES, True,
                            )  # fmt: skip

    result = acc / tl.where(total > 0, total, 1.0)[:, None]  # [M, DV]
    dv = tl.arange(0, BLOCK_DV)
    if EIGHT_V:
        result *= tl.load(v_step + (b64 * heads_kv + kv64) * D_V + dv, mask=dv < D_V, other=0.0)[None, :]
    if ROW_TILES:
        out.store([b, h, m * BLOCK_M, 0], result.to(out.dtype).reshape(1, 1, BLOCK_M, BLOCK_DV))
    else:
        out_at = out + ((b64 * heads + h64) * slots_q + rows[:, None]) * D_V + dv[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=rows_held[:, None] & (dv[None, :] < D_V))
    natural = tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(lse + (b64 * heads + h64) * slots_q + rows, natural, mask=rows_held)
