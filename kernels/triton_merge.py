"""The hot parts of token merging in Triton: each source's likest destination, and the mean of each slot.

Beside their references in `merge`, of which they give the same. Neither writes a score or an expanded index to memory; sums go in the
order of the tokens, without atomics. Imported only where triton is installed; under ``TRITON_INTERPRET=1`` it runs on a CPU. No GPU has run
it yet: it was held against its references in the interpreter, and compiled for Ampere and Hopper.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP_ROWS = 32
"""Sources, destinations or slots of a step: tl.dot takes 16 at least."""


def likest_destination(unit: Tensor, source: Tensor, destination: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest cosine of each source with a destination of its tile, and which that is.

    Parameters
    ----------
    unit : float32 (B, N, C), of length 1.
    source, destination, real : int64 (G, A), int64 (G, E) and bool (G, E): `source`, `destination` and `is_destination` of a
        `merge.Partition`.

    Returns
    -------
    best, which : float32 and int64 (B, G, A), as `merge.best_destination` has them: of equal ones the first. Any at places
        without a source.
    """
    unit = unit.contiguous()
    batch, tokens, channels = unit.shape
    tiles, sources = source.shape
    best = unit.new_empty(batch, tiles, sources)
    which = torch.empty(batch, tiles, sources, dtype=torch.int64, device=unit.device)
    _best_kernel[triton.cdiv(sources, STEP_ROWS), tiles, batch](
        unit, source.contiguous(), destination.contiguous(), real.to(torch.uint8),
        best, which, tokens, sources, destination.shape[1], channels,
        BLOCK_C=min(128, max(16, triton.next_power_of_2(channels))), BLOCK=STEP_ROWS,
    )  # fmt: skip
    return best, which


@triton.jit
def _best_kernel(
    unit, source, destination, is_destination, best, which, tokens, sources, destinations, channels,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    base = unit + sample * tokens * channels
    here = tl.load(source + tile * sources + row, mask=row < sources, other=0)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    at = tl.zeros([BLOCK], tl.int64)
    for first in range(0, destinations, BLOCK):
        column = first + tl.arange(0, BLOCK)
        there = tl.load(destination + tile * destinations + column, mask=column < destinations, other=0)
        real = tl.load(is_destination + tile * destinations + column, mask=column < destinations, other=0)
        score = tl.zeros([BLOCK, BLOCK], tl.float32)
        for part in range(0, channels, BLOCK_C):
            channel = part + tl.arange(0, BLOCK_C)
            inside = (channel < channels)[None, :]
            x = tl.load(base + here[:, None] * channels + channel[None, :], mask=inside, other=0.0)
            y = tl.load(base + there[:, None] * channels + channel[None, :], mask=inside, other=0.0)
            score += tl.dot(x, tl.trans(y), input_precision="ieee")
        score = tl.where((real != 0)[None, :], score, float("-inf"))
        largest = tl.max(score, 1)
        found = tl.argmax(score, 1)
        better = largest > top
        at = tl.where(better, first + found.to(tl.int64), at)
        top = tl.where(better, largest, top)
    out = (sample * tl.num_programs(1) + tile) * sources + row
    tl.store(best + out, top, mask=row < sources)
    tl.store(which + out, at, mask=row < sources)


def merge_slots(x: Tensor, slot: Tensor, slots: int, weight: Tensor | None = None) -> Tensor:
    """Average the tokens of each slot: `merge.merge`, whose arguments and result it has."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, dim = x.shape
    order = slot.argsort(dim=-1, stable=True)  # tokens by slot
    ends = torch.searchsorted(
        slot.gather(1, order), torch.arange(slots, device=x.device).expand(batch, -1).contiguous(), right=True
    )
    out = torch.empty(batch, heads, slots, dim, dtype=x.dtype, device=x.device)
    _merge_kernel[triton.cdiv(slots, STEP_ROWS), batch * heads](
        x, order, ends, x.new_empty(0) if weight is None else weight.float().contiguous(), out, *x.stride()[:3],
        heads, tokens, slots, D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK=STEP_ROWS, WEIGHED=weight is not None,
    )  # fmt: skip
    return out


@triton.jit
def _merge_kernel(
    x, order, ends, weight, out, stride_b, stride_h, stride_n, heads, tokens, slots,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    sample, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(ends + sample * slots + row, mask=row < slots, other=0)
    first = tl.load(ends + sample * slots + row - 1, mask=(row > 0) & (row < slots), other=0)
    channel = tl.arange(0, BLOCK_D)
    base = x + sample * stride_b + head * stride_h
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    number = tl.zeros([BLOCK], tl.float32)
    for step in range(0, tl.max(last - first, 0)):
        there = first + step < last
        token = tl.load(order + sample * tokens + first + step, mask=there, other=0)
        counts = there.to(tl.float32)
        if WEIGHED:
            counts *= tl.load(weight + sample * tokens + token, mask=there, other=0.0)
        held = there[:, None] & (channel < D)[None, :]
        some = tl.load(base + token[:, None] * stride_n + channel[None, :], mask=held, other=0.0)
        total += some.to(tl.float32) * counts[:, None]
        number += counts
    mean = total / tl.maximum(number, 1.0)[:, None]
    place = ((sample * heads + head) * slots + row)[:, None] * D + channel[None, :]
    tl.store(out + place, mean.to(out.dtype.element_ty), mask=(row < slots)[:, None] & (channel < D)[None, :])
