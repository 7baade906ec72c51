"""Every backend against the float32 reference, and the reference against dense attention in float64."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Never

import pytest
import torch
import torch.nn.functional as F

from accelplug.bounded import Bounded
from accelplug.errors import ShapeError, UnsupportedError
from accelplug.kernels import attention, chunks, flex
from accelplug.kernels.attention import (
    Backend,
    Precision,
    available_backends,
    block_attention,
    choices,
    forget_choices,
    measure_choice,
)
from accelplug.kernels.plan import BlockPlan, Box, Threshold, pool
from accelplug.kernels.precision import ValuePrecision, quantised, quantised_values
from accelplug.kernels.rest import Drop, Pool, Rectified, Representative, Rest, Tied
from tests.conftest import DEVICE

if TYPE_CHECKING:
    from accelplug.kernels.triton_block import Tier

pytestmark = pytest.mark.usefixtures("nan_memory")

# (batch, heads, kv heads, tokens, head_dim, value dim, block_q, block_k)
SHAPES = {
    "B1-H2-S100-d16": (1, 2, 2, 100, 16, 16, 16, 16),
    "B2-H4kv2-S97-d40-q32k16": (2, 4, 2, 97, 40, 40, 32, 16),
    "B2-H2-S113-d24-v40-q16k32": (2, 2, 2, 113, 24, 40, 16, 32),
    "B1-H1-S129-d80": (1, 1, 1, 129, 80, 80, 64, 64),
    "B1-H1-S127-d96": (1, 1, 1, 127, 96, 96, 64, 64),
    "B1-H1-S65-d160": (1, 1, 1, 65, 160, 160, 32, 32),
    "B1-H1-S40-d256": (1, 1, 1, 40, 256, 256, 16, 16),
}
RESTS: dict[str, Callable[[int], Drop | Pool]] = {
    "drop": lambda heads: Drop(),
    "pool": lambda heads: Pool(),
    "weighted": lambda heads: Pool(torch.linspace(0.1, 1, heads)),
}
FLEX_BLOCK = 32 if DEVICE == "cpu" else 64  # FlexAttention takes no smaller blocks on a GPU
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="about what a CPU chooses or lacks")
# Largest error allowed, relative to the largest output, by dtype: rounding of inputs and of probabilities.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make(
    shape: tuple[int, ...],
    *,
    per_head: bool = False,
    dtype: torch.dtype = torch.float32,
    density: float = 0.4,
    box: bool = False,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockPlan]:
    batch, heads, kv_heads, tokens, dim, dim_v, block_q, block_k = shape
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, tokens, d, generator=g).to(dtype)
        for n, d in ((heads, dim), (kv_heads, dim), (kv_heads, dim_v))
    )
    q_len, k_len = (lengths(tokens, block) for block in (block_q, block_k))
    members = torch.rand(batch if per_head else 1, heads if per_head else 1, len(q_len), len(k_len), generator=g) < density
    members[..., 0] = True
    window = None
    if box:
        rows, keys = (torch.arange(len(n) * b)[:, None].int() for n, b in ((q_len, block_q), (k_len, block_k)))
        window = Box(rows - 20, rows + 9, keys)
        members[:] = True
    return q, k, v, BlockPlan.from_members(members, q_len, k_len, block_q, block_k, window)


def lengths(tokens: int, block: int) -> torch.Tensor:
    blocks = -(-tokens // block)
    out = torch.full((blocks,), block, dtype=torch.int32)
    out[-1] = tokens - (blocks - 1) * block
    return out


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert torch.isfinite(got).all()
    error = (got.double() - expected.double()).abs().max()
    assert error <= TOLERANCE[dtype] * max(1.0, float(expected.abs().max())), f"error {error:.2e}"


@pytest.mark.parametrize("mask", ["all", "padded"])
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_backend_equals_reference(backend: Backend, shape: tuple[int, ...], rest: str, mask: str) -> None:
    q, k, v, plan = make(shape, per_head=shape[0] == 2)
    key_mask = None if mask == "all" else torch.rand(shape[0], shape[3]) < 0.7
    arguments: dict[str, Any] = {"rest": RESTS[rest](shape[1]), "key_mask": key_mask, "return_lse": True}
    expected, expected_lse = block_attention(q, k, v, plan, backend="reference", **arguments)
    got, lse = block_attention(q, k, v, plan, backend=backend, **arguments)
    close(got, expected)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lie", ["by token", "fused", "between others"])
def test_blocked_takes_rows_where_they_lie(lie: str) -> None:
    q, k, v, plan = make((2, 4, 4, 97, 16, 16, 16, 16), per_head=True)
    expected = block_attention(q, k, v, plan, rest=Pool(), backend="reference")
    if lie == "by token":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif lie == "fused":
        q, k, v = torch.stack([q, k, v], 3).permute(0, 2, 3, 1, 4).contiguous().permute(2, 0, 3, 1, 4)
    else:  # at no multiple of their width
        q, k, v = (torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]] for x in (q, k, v))
    close(block_attention(q, k, v, plan, rest=Pool(), backend="blocked"), expected)


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("heads", [1, 2, 4], ids=["one list", "lists of keys", "lists of queries"])
@pytest.mark.parametrize("numbers", [1, 1 << 12, 1 << 24], ids=["rows", "pieces", "whole"])
def test_blocked_takes_what_reads_alike_together(
    numbers: int, heads: int, rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that read one block beside such that read all; blocks that are all short, shorter, or empty."""
    monkeypatch.setattr(chunks, "CHUNK", numbers)
    q, k, v, plan = make((2, 4, 2, 160, 16, 16, 16, 16))
    members = torch.rand(2, heads, 10, 10) < torch.linspace(0.0, 1.0, 10)[:, None]
    members[..., 0] = True
    k_len = torch.tensor([12, 12, 5, 12, 0, 12, 12, 1, 12, 12], dtype=torch.int32)
    q_len = torch.tensor([16] * 9 + [0], dtype=torch.int32)
    plan = BlockPlan.from_members(members, q_len, k_len, 16, 16)
    arguments: dict[str, Any] = {"rest": RESTS[rest](4), "return_lse": True}
    (expected, expected_lse), (got, lse) = (
        block_attention(q, k, v, plan, backend=name, **arguments) for name in ("reference", "blocked")
    )
    close(got[:, :, :144], expected[:, :, :144])
    torch.testing.assert_close(lse[:, :, :144], expected_lse[:, :, :144], rtol=1e-5, atol=1e-5)


# (batch, heads, kv heads, tokens, head_dim, value dim, block_q, block_k); key blocks of 8 and 24 have no tile of their own
MEANS_SHAPES = {
    "S113-q16k16": (1, 2, 2, 113, 16, 16, 16, 16),
    "B2-H2kv1-S97-q32k16": (2, 2, 1, 97, 16, 24, 32, 16),
    "S159-q16k32": (1, 2, 1, 159, 24, 16, 16, 32),
    "S97-q16k8": (1, 2, 2, 97, 16, 16, 16, 8),
    "S119-q16k24": (1, 2, 2, 119, 16, 16, 16, 24),
}


def levelled(
    shape: tuple[int, ...], *, skipped: bool = False, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockPlan]:
    """A plan in which every level occurs, and some heads skip their first query blocks."""
    q, k, v, plan = make(shape, per_head=True, density=0.2, seed=seed)
    level = torch.tensor([0, 2, 4, 8], dtype=torch.uint8)[torch.randint(4, plan.members.shape)]
    members, skips = plan.members, None
    if skipped:
        skips = torch.zeros(members.shape[:2], dtype=torch.bool)
        skips[:, 0] = True
        members, level = members.clone(), level.clone()
        members[:, 0, :2], level[:, 0, :2] = False, 0
    sizes = (plan.q_len, plan.k_len, plan.block_q, plan.block_k)
    return q, k, v, BlockPlan.from_members(members, *sizes, level=level, skipped=skips)


@pytest.mark.parametrize(("rest", "padded"), [("drop", False), ("weighted", True)])
@pytest.mark.parametrize("shape", MEANS_SHAPES.values(), ids=MEANS_SHAPES)
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_means_and_skipped_heads_equal_reference(backend: Backend, shape: tuple[int, ...], rest: str, padded: bool) -> None:
    q, k, v, plan = levelled(shape, skipped=True)
    key_mask = torch.rand(shape[0], shape[3]) < 0.7 if padded else None
    arguments: dict[str, Any] = {"rest": RESTS[rest](shape[1]), "key_mask": key_mask, "return_lse": True}
    expected, expected_lse = block_attention(q, k, v, plan, backend="reference", **arguments)
    got, lse = block_attention(q, k, v, plan, backend=backend, **arguments)
    close(got, expected)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert (got[:, 0, : 2 * plan.block_q] == 0).all()
    assert (got[:, 1] != 0).any(-1).all()


@pytest.mark.parametrize("mask", ["all", "padded"])
def test_means_by_token(mask: str) -> None:
    """Every run of h slots, spelled out one by one, in float64."""
    q, k, v, plan = levelled((1, 2, 2, 61, 16, 16, 16, 16))
    valid = torch.ones(61, dtype=torch.bool) if mask == "all" else torch.rand(61) < 0.7
    got = block_attention(q, k, v, plan, key_mask=None if mask == "all" else valid[None], backend="reference")
    q, k, v = q.double(), k.double(), v.double()
    for h, row in ((0, 5), (1, 40), (0, 60)):
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        logs: list[float] = []
        for block in range(4):
            run = 1 if plan.members[0, h, row // 16, block] else int(plan.level[0, h, row // 16, block])
            for start in range(16 * block, 16 * (block + 1), run) if run else ():
                tokens = [t for t in range(start, min(start + run, 61)) if valid[t]]
                if tokens:
                    keys.append(k[0, h, tokens].mean(0)), values.append(v[0, h, tokens].mean(0))
                    logs.append(math.log(len(tokens)))
        p = (0.25 * torch.stack(keys) @ q[0, h, row] + torch.tensor(logs)).softmax(0)
        close(got[0, h, row], (p @ torch.stack(values)).float())


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
@pytest.mark.parametrize("tokens", [96, 97, 111])
def test_means_are_exact_where_their_keys_and_values_are_equal(backend: Backend, tokens: int) -> None:
    q, k, v, plan = levelled((1, 2, 2, tokens, 16, 16, 16, 16))
    run = torch.arange(tokens) // 8 * 8
    k, v = k[..., run, :], v[..., run, :]
    reads = (plan.members | (plan.level > 0)).repeat_interleave(16, -1).repeat_interleave(16, -2)[..., :tokens, :tokens]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=reads)
    close(block_attention(q, k, v, plan, backend=backend), expected)


@pytest.mark.parametrize("mask", ["all", "padded"])
@pytest.mark.parametrize("representative", ["centre", "centre_k_mean_v"])
def test_the_centre_stands_for_its_block(representative: Representative, mask: str) -> None:
    q, k, v, plan = make((1, 2, 1, 45, 16, 16, 16, 16))
    valid = torch.ones(45, dtype=torch.bool) if mask == "all" else torch.rand(45) < 0.7
    key_mask = None if mask == "all" else valid[None]
    got = {
        backend: block_attention(q, k, v, plan, rest=Pool(None, representative), key_mask=key_mask, backend=backend)
        for backend in ("reference", "blocked", "triton")
    }
    close(got["blocked"], got["reference"])
    close(got["triton"], got["reference"])
    for row in (3, 20, 44):
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        logs: list[float] = []
        for block in range(3):
            tokens = [t for t in range(16 * block, min(16 * block + 16, 45)) if valid[t]]
            if plan.members[0, 0, row // 16, block]:
                keys.extend(k[0, 0, tokens]), values.extend(v[0, 0, tokens]), logs.extend([0.0] * len(tokens))
            else:
                centre = tokens[len(tokens) // 2]
                keys.append(k[0, 0, centre]), logs.append(math.log(len(tokens)))
                values.append(v[0, 0, centre] if representative == "centre" else v[0, 0, tokens].mean(0))
        p = (0.25 * torch.stack(keys) @ q[0, 1, row] + torch.tensor(logs)).softmax(0)
        close(got["reference"][0, 1, row], p @ torch.stack(values))


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_rectified_adds_fixed_weights(backend: Backend) -> None:
    q, k, v, plan = make((2, 4, 2, 45, 16, 24, 16, 16), per_head=True)
    share, weights = torch.rand(2, 4, 3), torch.rand(2, 4, 3, 3)
    exact = block_attention(q, k, v, plan, backend="reference")
    got = block_attention(q, k, v, plan, rest=Rectified(share, weights), backend=backend)
    for head, row in ((0, 2), (3, 44)):
        means = torch.stack([part.mean(0) for part in v[1, head // 2].split(16)])
        expected = share[1, head, row // 16] * exact[1, head, row] + weights[1, head, row // 16] @ means
        close(got[1, head, row], expected)


@pytest.mark.parametrize("mask", ["all", "padded"])
@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_tied_is_the_two_level_form(backend: Backend, mask: str) -> None:
    tokens, block = 45, 16
    q, k, v, _ = make((1, 2, 1, tokens, 16, 16, block, block))
    valid = torch.ones(tokens, dtype=torch.bool) if mask == "all" else torch.rand(tokens) < 0.7
    key_mask = None if mask == "all" else valid[None]
    n = lengths(tokens, block)
    plan = BlockPlan.from_members(torch.eye(3, dtype=torch.bool), n, n, block, block)
    got = block_attention(q, k, v, plan, rest=Tied(), key_mask=key_mask, backend=backend)
    parts = [[t for t in range(block * b, min(block * b + block, tokens)) if valid[t]] for b in range(3)]
    for b in range(3):
        rows = q[0, 1, block * b : block * (b + 1)]
        logits = 0.25 * rows @ k[0, 0, parts[b]].mT
        others = [c for c in range(3) if c != b]
        far = [0.25 * rows.mean(0) @ k[0, 0, parts[c]].mean(0) + math.log(len(parts[c])) for c in others]
        mu, *w = torch.stack([logits.logsumexp(-1).mean(), *far]).softmax(0)
        shared = sum(weight * v[0, 0, parts[c]].mean(0) for weight, c in zip(w, others, strict=True))
        close(got[0, 1, block * b : block * (b + 1)], mu * logits.softmax(-1) @ v[0, 0, parts[b]] + shared)


# (batch, heads, kv heads, tokens, head_dim, value dim, block_q, block_k); blocks of 96 and 128 have several tiles of probabilities
EIGHT_BIT_SHAPES = {
    "S113-q16k32": (1, 2, 2, 113, 16, 16, 16, 32),
    "B2-H2kv1-S161-q32k64": (2, 2, 1, 161, 24, 40, 32, 64),
    "B2-H2-S300-q64k128": (2, 2, 2, 300, 16, 16, 64, 128),
}
EIGHT_BITS: list[tuple[Precision, ValuePrecision]] = [
    ("int8", "native"),
    ("fp8", "native"),
    ("native", "int8"),
    ("int8", "int8"),
    ("fp8", "int8"),
]


@pytest.mark.parametrize(("precision", "values"), EIGHT_BITS)
@pytest.mark.parametrize("name", EIGHT_BIT_SHAPES)
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_8_bit_backends_agree(backend: Backend, name: str, precision: Precision, values: ValuePrecision) -> None:
    if backend == "blocked" and values != "native":
        pytest.skip("it rounds no probabilities: test_what_8_bit_values_want")
    shape = EIGHT_BIT_SHAPES[name]
    q, k, v, plan = levelled(shape)
    key_mask = torch.rand(shape[0], shape[3]) < 0.7
    kept = key_mask[:, None, :, None]  # a key that may not be read has no say in the rounding
    k = k if precision == "native" else torch.where(kept, k + 2, torch.nan)
    v = v if values == "native" else torch.where(kept, v + 2, torch.nan)
    how: dict[str, Any] = {"precision": precision, "values": values}
    arguments: dict[str, Any] = {**how, "rest": Pool(), "key_mask": key_mask, "return_lse": True}
    expected, expected_lse = block_attention(q, k, v, plan, backend="reference", **arguments)
    got, lse = block_attention(q, k, v, plan, backend=backend, **arguments)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    if values == "native":
        close(got, expected)
        return
    off = (
        (got - expected).abs().amax(-1)
    )  # a probability half-way between two steps may go to the one here, to the other there
    assert off.max() <= 2 / 127 * v.nan_to_num().abs().max()
    assert (off > TOLERANCE[torch.float32] * expected.abs().max()).double().mean() < 0.01


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_8_bits_lose_nothing_of_numbers_they_hold(backend: Backend, precision: Precision) -> None:
    q, k, v, plan = make((1, 2, 2, 64, 32, 16, 16, 16))
    if precision == "int8":
        q, k, largest = q.mul(40).round().clamp(-127, 127), k.mul(40).round().clamp(-127, 127), 127.0
    else:
        q, k, largest = (2.0 ** (3 * q).round().clamp(-6, 8)), -(2.0 ** (3 * k).round().clamp(-6, 8)), 448.0
    q[..., ::16, 0], k[..., ::16, 0] = largest, largest  # the step of each block is 1
    k[..., 1::2, :] = -k[..., ::2, :]  # nothing to smooth away
    arguments: dict[str, Any] = {"rest": Pool(), "scale": 2e-5, "backend": backend}
    close(block_attention(q, k, v, plan, precision=precision, **arguments), block_attention(q, k, v, plan, **arguments))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_8_bit_errors_are_those_of_rounding(precision: Precision) -> None:
    """No logit of row i is off by more than d_i = s sum(|q| e_k + |k'| e_q + e_q e_k), with e half a step; hence its output by
    (exp(2 d_i) - 1) sum_j p_ij |v_j - o_i|, and its log-sum-exp by d_i. Shared parts of the keys change nothing."""
    q, k, v, plan = make((1, 2, 2, 128, 16, 16, 32, 32), density=2.0)
    q, k, shared = 0.4 * q, 0.4 * k, torch.full((16,), 9.0)
    out, lse = block_attention(q, k + shared, v, plan, precision=precision, backend="reference", return_lse=True)

    def rounding(x: torch.Tensor) -> torch.Tensor:
        top = x.unflatten(-2, (-1, 32)).abs().amax((-1, -2)).repeat_interleave(32, -1)[..., None]
        if precision == "int8":
            return (top / 254).expand_as(x)
        return torch.maximum(x.abs() / 16, top / 448 * 2**-10)  # three bits behind the first, less below 2^-6

    q, k, v = q.double(), k.double(), v.double()
    smooth = k - k.mean(-2, keepdim=True)
    off_q, off_k = rounding(q), rounding(smooth)
    off = 0.25 * (q.abs() @ off_k.mT + off_q @ smooth.abs().mT + off_q @ off_k.mT).amax(-1) + 1e-5  # [B, H, P]
    logits = 0.25 * q @ (k + shared).mT
    p = logits.softmax(-1)
    exact = p @ v
    spread = (p[..., None] * (v[..., None, :, :] - exact[..., None, :]).abs()).sum(-2)
    assert off.max() < 0.3, "a bound that says nothing"
    assert ((out - exact).abs() <= (2 * off).expm1()[..., None] * spread).all()
    assert ((lse - logits.logsumexp(-1)).abs() <= off).all()
    nothing = torch.zeros(1, 2, 1, 16)
    rough = quantised(q.float(), (k + shared).float(), nothing, plan, precision, None).restored(torch.float32)
    unsmoothed = block_attention(*rough, v.float(), plan, backend="reference")
    assert (unsmoothed - exact).abs().mean() > 5 * (out - exact).abs().mean()


def test_8_bit_values_are_those_of_a_row_and_a_tile_spelled_out() -> None:
    """Numerators of each row and 64 keys in 127ths of their largest, values in 127ths of a channel's; sums as they were."""
    q, k, v, plan = make((1, 1, 1, 150, 16, 8, 128, 128), density=2.0)
    got = block_attention(q, k, v, plan, values="int8", backend="reference")
    step = v.abs().amax(-2, keepdim=True) / 127
    values = (v / step).round() * step
    for row in (0, 77, 149):
        p = (0.25 * k[0, 0] @ q[0, 0, row]).softmax(0)
        rounded = torch.cat([(part / part.max() * 127 + 0.5).floor() / 127 * part.max() for part in p.split(64)])
        assert not torch.equal(rounded, p)
        close(got[0, 0, row], rounded @ values[0, 0])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_8_bit_values_lose_nothing_of_numbers_they_hold(backend: Backend) -> None:
    """All keys alike: every probability of a tile is its largest. Channels have values of many sizes, and one has none."""
    q, k, v, plan = make((1, 2, 2, 96, 16, 16, 32, 32))
    v = v.mul(40).round().clamp(-127, 127)
    v[..., 0, :], v[..., 3] = 127, 0
    v *= 2.0 ** torch.arange(-8, 8)
    k[:] = k[..., :1, :]
    arguments: dict[str, Any] = {"rest": Pool(), "backend": backend}
    got, expected = (block_attention(q, k, v, plan, values=x, **arguments) for x in ("int8", "native"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_what_8_bit_values_want() -> None:
    q, k, v, plan = make((1, 1, 1, 97, 16, 16, 16, 16))
    with pytest.raises(UnsupportedError, match="key blocks of 8-bit values must be a power of two of at least 32, got 16"):
        block_attention(q, k, v, plan, values="int8", backend="triton")
    wide = make((1, 1, 1, 300, 16, 16, FLEX_BLOCK, FLEX_BLOCK))
    for backend in ("flex", "flash", "blocked"):
        with pytest.raises(UnsupportedError, match=f"backend='{backend}' cannot serve: it rounds no probabilities"):
            block_attention(*wide, values="int8", backend=backend)


@pytest.mark.parametrize("tier", ["pointers", "whole"])  # all other tests have the third
@pytest.mark.parametrize("case", ["padded", "odd", "means", "int8", "values", "threshold"])
def test_tiers_of_the_triton_kernel_equal_the_reference(monkeypatch: pytest.MonkeyPatch, case: str, tier: Tier) -> None:
    """Keys by descriptor or by pointer, queries and the output too; on a CPU as the interpreter has them."""
    from accelplug.kernels import triton_block

    described = []
    true_tiles = triton_block._tiles_of
    monkeypatch.setattr(triton_block, "_tiles_of", lambda x, *sizes: described.append(sizes) or true_tiles(x, *sizes))
    shape = (
        1,
        2,
        1,
        45,
        18 if case == "odd" else 40,
        24,
        32,
        32 if case == "values" else 16,
    )  # rows of 18 floats: no multiple of 16 bytes
    plan: BlockPlan | Threshold
    q, k, v, plan = levelled(shape) if case == "means" else make(shape, per_head=True, box=case == "int8")
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))  # as models hand them over
    key_mask = torch.rand(1, 45) < 0.7 if case == "padded" else None
    if case == "threshold":
        none = torch.zeros(len(plan.k_len), dtype=torch.bool)
        plan = Threshold(
            torch.zeros(1, 2, len(plan.q_len)), 0, none, none[: len(plan.q_len)], plan.q_len, plan.k_len, 32, 16
        )
    eight = quantised(q, k, torch.zeros(1, 1, 1, 40), plan, "int8", key_mask) if case == "int8" else None
    rest = Drop() if case == "int8" else Pool()
    v8 = None
    if case == "values":
        k[:] = k[..., :1, :]  # all probabilities alike: a tile's largest
        v8 = quantised_values(v, plan, key_mask)
    got, lse = triton_block.attend(q, k, v, plan, rest, 0.2, key_mask, True, eight, v8, tier)
    assert len(described) == {"pointers": 0, "whole": 4}[tier]
    q, k = (q, k) if eight is None else eight.restored(q.dtype)
    values = "native" if v8 is None else "int8"
    arguments: dict[str, Any] = {"rest": rest, "scale": 0.2, "values": values, "key_mask": key_mask, "return_lse": True}
    expected, expected_lse = block_attention(q, k, v, plan, backend="reference", **arguments)
    close(got, expected)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_what_the_whole_tier_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelplug.kernels import triton_block

    q, k, v, plan = make((1, 1, 1, 33, 16, 18, 16, 16))
    with pytest.raises(UnsupportedError, match="rows of the output have 72 bytes, expected a multiple of 16"):
        triton_block.attend(q, k, v, plan, Drop(), 0.2, None, False, tier="whole")
    monkeypatch.setattr(triton_block.triton, "__version__", "3.4.0")
    with pytest.raises(UnsupportedError, match=r"before triton 3\.5, this is 3\.4\.0"):
        triton_block.attend(q, k, v, plan, Drop(), 0.2, None, False, tier="whole")


def test_tied_and_rectified_have_no_lse() -> None:
    q, k, v, plan = make(SHAPES["B1-H2-S100-d16"])
    with pytest.raises(UnsupportedError, match="Tied has no log-sum-exp"):
        block_attention(q, k, v, plan, rest=Tied(), return_lse=True)
    with pytest.raises(ShapeError, match="Rectified takes share"):
        block_attention(q, k, v, plan, rest=Rectified(torch.ones(1, 2, 6), torch.ones(1, 2, 7, 7)))


@pytest.mark.parametrize("rest", ["drop", "pool"])
@pytest.mark.parametrize("case", ["plain", "heads", "gqa", "box", "padded", "bf16", "means", "q64"])
def test_flex_equals_reference(case: str, rest: str) -> None:
    shape = (2, 4, 2 if case == "gqa" else 4, 200, 32, 32, 64 if case == "q64" else FLEX_BLOCK, FLEX_BLOCK)
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    q, k, v, plan = make(shape, per_head=case == "heads", box=case == "box", dtype=dtype)
    if case == "means":
        q, k, v, plan = levelled(shape, skipped=True)
    key_mask = torch.rand(2, 200) < 0.7 if case == "padded" else None
    arguments: dict[str, Any] = {"rest": RESTS[rest](4), "key_mask": key_mask}
    close(
        block_attention(q, k, v, plan, backend="flex", **arguments),
        block_attention(q, k, v, plan, backend="reference", **arguments),
        dtype,
    )


def as_if_on_hopper(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> list[dict[str, Any]]:
    """Let q, k, v on the CPU pass for tensors on a GPU with flash-attn-4; returns what FlexAttention is then asked for.

    This tests what is asked for and refused; FlashAttention-4 itself never ran here.
    """
    asked = []
    monkeypatch.setattr(flex, "_compiled", Bounded(8))

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        asked.append(options)
        out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
        return (out, torch.zeros(q.shape[:-1])) if options["return_lse"] else out

    monkeypatch.setattr(flex, "_flash_importable", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    true_reason = flex.flash_missing
    monkeypatch.setattr(flex, "flash_missing", lambda device: true_reason(torch.device("cuda")))
    monkeypatch.setattr(flex, "_compile", lambda q, k: run)
    return asked


FLASH_SHAPE = (1, 2, 1, 300, 64, 64, 128, 128)


@pytest.mark.parametrize("return_lse", [False, True])
def test_flash_is_flex_with_an_option(monkeypatch: pytest.MonkeyPatch, return_lse: bool) -> None:
    asked = as_if_on_hopper(monkeypatch)
    q, k, v, plan = make(FLASH_SHAPE, dtype=torch.bfloat16)
    got = block_attention(q, k, v, plan, rest=Pool(), backend="flash", return_lse=return_lse)
    assert (got[0] if return_lse else got).shape == q.shape
    assert [options["kernel_options"] for options in asked] == [{"BACKEND": "FLASH"}]
    assert (asked[0]["return_lse"], asked[0]["enable_gqa"]) == (return_lse, True)
    assert asked[0]["block_mask"].BLOCK_SIZE == (128, 128)


@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "reason"),
    [
        (FLASH_SHAPE, torch.float32, (9, 0), "bfloat16 and float16"),
        ((1, 2, 1, 300, 96, 96, 128, 128), torch.bfloat16, (9, 0), "head dimensions 64 and 128"),
        ((1, 2, 1, 300, 64, 128, 128, 128), torch.bfloat16, (9, 0), "head dimensions 64 and 128"),
        ((1, 2, 1, 300, 64, 64, 64, 128), torch.bfloat16, (9, 0), "multiple of 128 on this GPU, got 64 x 128"),
        ((1, 2, 1, 300, 64, 64, 128, 64), torch.bfloat16, (9, 0), "key blocks of 128"),
        (FLASH_SHAPE, torch.bfloat16, (10, 0), "multiple of 256 on this GPU"),
        (FLASH_SHAPE, torch.bfloat16, (8, 0), "this GPU has 8.0"),
    ],
)
def test_flash_says_what_it_does_not_take(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, capability: tuple[int, int], reason: str
) -> None:
    asked = as_if_on_hopper(monkeypatch, capability)
    with pytest.raises(UnsupportedError, match=reason):
        block_attention(*make(shape, dtype=dtype), backend="flash")
    assert not asked


def test_flash_is_refused_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, plan = make(FLASH_SHAPE, dtype=torch.bfloat16)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    if DEVICE == "cpu":
        with pytest.raises(
            UnsupportedError, match=r"backend='flash' cannot serve: FlashAttention-4 runs on NVIDIA GPUs alone"
        ):
            block_attention(q, k, v, plan, backend="flash")
    assert "not on cpu" in available_backends(cpu)["flash"]
    monkeypatch.setattr(flex, "_flash_importable", lambda: False)
    assert "flash-attn-4 is not installed" in flex.flash_missing(gpu)
    monkeypatch.setattr(flex.torch_flex, "FlexKernelOptions", None)
    monkeypatch.setattr(flex.torch_flex, "_Backend", None)
    assert "has no FlashAttention-4" in flex.flash_missing(gpu)


def test_flash_is_measured_beside_the_others_and_left_out_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = as_if_on_hopper(monkeypatch)
    q, k, v, plan = make(FLASH_SHAPE, dtype=torch.bfloat16)
    forget_choices()
    assert set(measure_choice(q, k, v, plan)) >= {"flash", "blocked"}
    assert asked

    def fail(*args: Any, **options: Any) -> Never:
        raise RuntimeError("no kernel image")

    flex._compiled.clear()
    forget_choices()
    monkeypatch.setattr(flex, "_compile", lambda q, k: fail)
    assert "flash" not in measure_choice(q, k, v, plan)
    with pytest.raises(UnsupportedError, match="failed inside FlashAttention-4 or torch: no kernel image"):
        block_attention(q, k, v, plan, backend="flash")
    forget_choices()


@pytest.mark.parametrize("rest", ["drop", "pool"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_what_others_made_equals_reference(backend: Backend, dtype: torch.dtype, dim: int, rest: str) -> None:
    if (why_not := available_backends(DEVICE)[backend]) is not None:
        pytest.skip(f"needs a GPU with the package: {why_not}")
    q, k, v, plan = make((2, 4, 2, 700, dim, dim, 256, 128), per_head=True, dtype=dtype)
    arguments: dict[str, Any] = {"rest": RESTS[rest](4), "return_lse": True}
    expected, expected_lse = block_attention(q, k, v, plan, backend="reference", **arguments)
    got, lse = block_attention(q, k, v, plan, backend=backend, **arguments)
    close(got, expected, dtype)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_half_precision(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v, plan = make((1, 2, 1, 49, 40, 40, 32, 16), dtype=dtype)
    for rest in (Drop(), Pool()):
        close(
            block_attention(q, k, v, plan, rest=rest, backend=backend),
            block_attention(q, k, v, plan, rest=rest, backend="reference"),
            dtype,
        )


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
@pytest.mark.parametrize("rest", ["drop", "pool"])
def test_box(backend: Backend, rest: str) -> None:
    q, k, v, plan = make((1, 2, 2, 100, 16, 16, 16, 16), box=True)
    rows, keys = torch.arange(100)[:, None], torch.arange(100)
    reads = (keys >= rows - 20) & (keys < rows + 9)
    got = block_attention(q, k, v, plan, rest=RESTS[rest](2), backend=backend)
    close(
        got, F.scaled_dot_product_attention(q, k, v, attn_mask=reads)
    )  # nothing is left over for the rest: all blocks are read


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton", "flex"])
@pytest.mark.parametrize("tokens", [64, 65, 63, 79])
def test_density_one_is_dense_within_twice_its_own_error(backend: Backend, tokens: int) -> None:
    block = FLEX_BLOCK if backend == "flex" else 16
    q, k, v, plan = make((2, 2, 2, tokens, 32, 32, block, block), density=2.0)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    own = (F.scaled_dot_product_attention(q, k, v) - exact).abs().max()
    for rest in (Drop(), Pool()):
        error = (block_attention(q, k, v, plan, rest=rest, backend=backend) - exact).abs().max()
        assert error <= 2 * own + 1e-7


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_halves_merge_by_lse(backend: Backend) -> None:
    q, k, v, plan = make((1, 2, 2, 128, 16, 16, 16, 16), density=2.0)
    first = torch.zeros(8, 8, dtype=torch.bool)
    first[:, :3] = True
    parts = [BlockPlan.from_members(half, plan.q_len, plan.k_len, 16, 16) for half in (first, ~first)]
    (out_a, lse_a), (out_b, lse_b) = (block_attention(q, k, v, part, backend=backend, return_lse=True) for part in parts)
    share = torch.sigmoid(lse_a - lse_b)[..., None]
    close(share * out_a + (1 - share) * out_b, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton", "flex"])
def test_pool_is_exact_where_a_blocks_keys_are_equal(backend: Backend) -> None:
    size = FLEX_BLOCK if backend == "flex" else 16
    q, k, v, plan = make((1, 2, 2, 100, 16, 16, size, size))
    block = torch.arange(100) // size
    k, v = k[..., block * size, :], v[..., block, :]  # values may differ between blocks only, too
    close(block_attention(q, k, v, plan, rest=Pool(), backend=backend), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("backend", ["blocked", "triton"])
@pytest.mark.parametrize("rest", ["drop", "pool"])
def test_a_negative_scale(backend: Backend, rest: str) -> None:
    q, k, v, plan = make((1, 2, 2, 100, 16, 16, 16, 16))
    arguments: dict[str, Any] = {"rest": RESTS[rest](2), "scale": -0.3}
    expected = block_attention(q, k, v, plan, backend="reference", **arguments)
    close(block_attention(q, k, v, plan, backend=backend, **arguments), expected)


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_a_row_without_a_key_is_zero(backend: Backend) -> None:
    q, k, v, plan = make((1, 1, 1, 48, 16, 16, 16, 16))
    key_mask = torch.zeros(1, 48, dtype=torch.bool)
    out, lse = block_attention(q, k, v, plan, key_mask=key_mask, backend=backend, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("rest", ["drop", "pool"])
@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_threshold(backend: Backend, rest: str) -> None:
    tokens, block = 90, 16
    q, k, v, plan = make((2, 2, 1, tokens, 16, 16, block, block))
    n = len(plan.k_len)

    def rule(theta: float) -> Threshold:
        sink = torch.zeros(n, dtype=torch.bool)
        sink[2] = True
        return Threshold(torch.full((2, 2, n), theta), 1, sink, torch.arange(n) == 5, plan.q_len, plan.k_len, block, block)

    for theta in (-math.inf, 0.0, 0.4, math.inf):
        q_pool, k_pool = pool(q, plan.q_len, block)[0], pool(k, plan.k_len, block)[0].repeat_interleave(2, 1)
        lowered = rule(theta).lower(q_pool, k_pool, 0.25)
        arguments: dict[str, Any] = {"rest": RESTS[rest](2), "scale": 0.25}
        expected = block_attention(q, k, v, lowered, backend="reference", **arguments)
        close(block_attention(q, k, v, rule(theta), backend=backend, **arguments), expected)
        band = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 1
        always = band | (torch.arange(n) == 2) | (torch.arange(n) == 5)[:, None]
        assert (lowered.members | ~always).all()
        if theta == math.inf:
            assert torch.equal(lowered.members[0, 0], always)
        if theta == -math.inf:
            assert lowered.members.all()


def test_one_opaque_node_under_compile() -> None:
    q, k, v, plan = make(SHAPES["B1-H2-S100-d16"])
    compiled = torch.compile(
        lambda q, k, v: block_attention(q, k, v, plan, rest=Pool()) * 2, fullgraph=True, backend="aot_eager"
    )
    close(compiled(q, k, v), 2 * block_attention(q, k, v, plan, rest=Pool()))


@pytest.mark.parametrize("rest", [Pool(), Tied()], ids=["pool", "tied"])
def test_plans_made_inside_a_graph(rest: Pool | Tied) -> None:
    q, k, v, plan = make(SHAPES["B1-H2-S100-d16"])
    members, sizes = plan.members, (plan.q_len, plan.k_len, plan.block_q, plan.block_k)
    level = torch.where(torch.rand(members.shape) < 0.2, 4, 0).to(torch.uint8)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        made = BlockPlan.from_members(members, *sizes, level=level)
        return block_attention(q, k, v, made, rest=rest, precision="int8", backend="blocked")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    close(compiled(q, k, v, members), attend(q, k, v, members))


@on_cpu
def test_triton_kernel_compiles_for_gpus_that_are_not_here() -> None:
    """8-bit products. Hopper: the tier with TMA, for queries once, for keys and values in the loops of whole and of ragged blocks,
    and for the output. Ampere: the tier of pointers, 16 bytes at a time."""
    script = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from accelplug.kernels.triton_block import _kernel

names = _kernel.arg_names
numbers = dict(D=64, D_V=64, BLOCK_D=64, BLOCK_DV=64, BLOCK_M=64, BLOCK_K=64, TILE_K=64, GROUP_K=64, CAUSAL=True, AXES=1, HAS_MASK=True,
               EIGHT=True, LISTED=True, FIRST_RUN=2, THRESHOLD=False)
types = dict.fromkeys(names, "i32") | {"scale": "fp32", "key_mask": "*u8"}
types |= dict.fromkeys(("q_step", "k_step", "v_step"), "*fp32")
types |= dict.fromkeys(("index", "count", "whole", "level_count", "bits", "q_len", "k_len", "lo", "hi", "coord"), "*i32")
types |= dict.fromkeys(("k_coarse", "v_coarse"), "*bf16") | dict.fromkeys(("lse", "theta", "bias"), "*fp32")
for capability, tiles, eight_v in ((90, True, False), (90, True, True), (80, False, False), (80, False, True)):
    constants = numbers | dict(LEVELS=2 if tiles else 0, POOLED=tiles, KEY_TILES=tiles, ROW_TILES=tiles, EIGHT_V=eight_v)
    form = "tensordesc<{}[1,1,64,64]>" if tiles else "*{}"
    mine = types | dict.fromkeys(("q", "k"), form.format("i8")) | {"out": form.format("bf16")}
    mine["v"] = form.format("i8" if eight_v else "bf16")
    mine |= dict.fromkeys(constants, "constexpr")
    at = {(names.index(name),): value for name, value in constants.items()}
    even = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if mine[n][0] == "*" or n.startswith("stride")}
    target = GPUTarget("cuda", capability, 32)
    print("=====", triton.compile(ASTSource(_kernel, mine, at, even), target=target, options={"num_warps": 4}).asm["ptx"])
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    _, hopper, hopper_v, ampere, ampere_v = ran.stdout.split("=====")
    for ptx in (hopper, hopper_v):
        assert "k32.s32.s8.s8" in ptx
        assert len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)) >= 5
        assert len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global", ptx)) == 1
    for ptx in (ampere, ampere_v):
        assert "cp.async.cg.shared.global" in ptx  # copies of 16 bytes
        assert "ld.global.b16" not in ptx
    assert ampere_v.count("ld.global.b8") == ampere.count("ld.global.b8")  # of the mask
    for native, eight in ((hopper, hopper_v), (ampere, ampere_v)):
        assert eight.count(".s32.s8.s8") > native.count(".s32.s8.s8"), "p.v is not multiplied in 8 bits"


def test_op_is_well_formed() -> None:
    q, k, v, plan = make(SHAPES["B1-H2-S100-d16"])
    arguments = (
        *(q, k, v, None, None, plan.tensors()),
        *(16, 16, None, None, "mean", 0.25, "native", "native", "blocked", True),
    )
    torch.library.opcheck(
        torch.ops.accelplug.block_attention.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_many_flex_shapes_in_one_process() -> None:
    """More shapes than Dynamo would recompile one function for."""
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for tokens in (33, 65, 97, 129):
            q, k, v, plan = make((1, 1, 1, tokens, 16, 16, FLEX_BLOCK, FLEX_BLOCK))
            close(block_attention(q, k, v, plan, backend="flex"), block_attention(q, k, v, plan, backend="reference"))


@on_cpu
def test_choice_is_measured_kept_and_used() -> None:
    forget_choices()
    q, k, v, plan = make(SHAPES["B1-H2-S100-d16"])
    times = measure_choice(q, k, v, plan)
    assert set(times) == {"blocked"}  # small, on a CPU: nothing to compile for
    assert [(entry["backend"], entry["ms"]) for entry in choices()] == [("blocked", times)]
    assert measure_choice(q, k, v, plan) == times
    forget_choices()
    assert choices() == []


@on_cpu
@pytest.mark.parametrize(
    ("rest", "dtype", "order"),
    [
        (Drop(), torch.float32, ["flex", "blocked"]),
        (Pool(), torch.float32, ["blocked", "flex"]),
        (Drop(), torch.bfloat16, ["blocked", "flex"]),
        (Tied(), torch.float32, ["blocked"]),  # which asks for log-sum-exps
    ],
    ids=["drop", "pool", "bfloat16", "tied"],
)
def test_a_large_call_on_a_cpu_tries_first_what_is_mostly_faster(
    rest: Rest, dtype: torch.dtype, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "FLEX_MIN_SLOTS", 0)
    monkeypatch.setattr(flex, "missing", lambda device: None)
    q, _, v, plan = make((1, 2, 2, 100, 16, 16, 16, 16), dtype=dtype)
    assert attention._candidates(q, v, plan, rest, "native", "native", False) == order


@on_cpu
def test_without_a_compiler_flex_is_refused_and_auto_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_compiler_missing", lambda: True)
    q, k, v, plan = make((1, 1, 1, 8192, 16, 16, 128, 128), density=0.05)
    with pytest.raises(UnsupportedError, match=r"no C\+\+ compiler"):
        block_attention(q, k, v, plan, backend="flex")
    close(block_attention(q, k, v, plan), block_attention(q, k, v, plan, backend="blocked"))


def test_wrong_arguments_say_what_is_wrong() -> None:
    q, k, v, plan = make(SHAPES["B1-H2-S100-d16"])
    with pytest.raises(ShapeError, match=r"q\.shape"):
        block_attention(q, k[..., :8], v, plan)
    with pytest.raises(ShapeError, match="query slots"):
        block_attention(q[:, :, :50], k, v, plan)
    with pytest.raises(ShapeError, match="dtype"):
        block_attention(q.bfloat16(), k, v, plan)
    with pytest.raises(ShapeError, match="key_mask"):
        block_attention(q, k, v, plan, key_mask=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="backward"):
        block_attention(q.requires_grad_(), k, v, plan)
    small = make((1, 1, 1, 40, 16, 16, 8, 8))
    with pytest.raises(UnsupportedError, match="power of two of at least 16, got 8"):
        block_attention(*small, backend="triton")
    wide = make((1, 1, 1, 40, 320, 320, 16, 16))
    with pytest.raises(UnsupportedError, match="up to 256"):
        block_attention(*wide, backend="triton")


@on_cpu
def test_flex_gives_no_lse_on_a_cpu() -> None:
    with pytest.raises(UnsupportedError, match="log-sum-exp"):
        block_attention(*make((1, 1, 1, 64, 16, 16, 32, 32)), backend="flex", return_lse=True)


@pytest.mark.parametrize("rest", ["drop", "weighted", "rectified", "tied", "threshold"])
@pytest.mark.parametrize("per_head", [False, True])
def test_a_mask_by_head_is_each_head_with_its_own(per_head: bool, rest: str) -> None:
    """Orders that differ by head put masked keys into different slots."""
    shape = (2, 3, 3, 97, 16, 24, 16, 16)
    q, k, v, plan = make(shape, per_head=per_head)
    mask = torch.rand(2, 3, 97) < 0.7
    share, weights = torch.rand(2, 3, 7), torch.rand(2, 3, 7, 7)
    kinds: dict[str, Callable[[slice], Rest]] = {
        "drop": lambda one: Drop(),
        "weighted": lambda one: Pool(torch.tensor([0.2, 0.6, 1.0])[one]),
        "rectified": lambda one: Rectified(share[:, one], weights[:, one]),
        "tied": lambda one: Tied(),
        "threshold": lambda one: Pool(),
    }
    kept = kinds[rest]
    theta = torch.randn(2, 3, 7)
    none = torch.zeros(7, dtype=torch.bool)

    def read(one: slice) -> BlockPlan | Threshold:
        if rest == "threshold":
            return Threshold(theta[:, one], 0, none, none, plan.q_len, plan.k_len, 16, 16)
        members = plan.members[:, one] if per_head else plan.members
        return BlockPlan.from_members(members, plan.q_len, plan.k_len, 16, 16)

    every = slice(0, 3)
    got = block_attention(q, k, v, read(every), rest=kept(every), key_mask=mask, backend="reference")
    for head in range(3):
        one = slice(head, head + 1)
        alone = block_attention(
            q[:, one], k[:, one], v[:, one], read(one), rest=kept(one), key_mask=mask[:, head], backend="reference"
        )
        torch.testing.assert_close(got[:, one], alone)
    if rest in ("drop", "weighted"):
        _, lse = block_attention(q, k, v, read(every), rest=kept(every), key_mask=mask, backend="reference", return_lse=True)
        assert lse.shape == (2, 3, 97)
    with pytest.raises(ShapeError, match="key_mask"):
        block_attention(q, k[:, :1], v[:, :1], plan, key_mask=mask, backend="reference")


def test_means_follow_a_mask_by_head() -> None:
    x, mask = torch.randn(2, 3, 40, 8), torch.rand(2, 3, 40) < 0.6
    mean, number = pool(x, lengths(40, 16), 16, mask)
    for head in range(3):
        alone, count = pool(x[:, head : head + 1], lengths(40, 16), 16, mask[:, head])
        torch.testing.assert_close(mean[:, head : head + 1], alone)
        assert torch.equal(number[:, head : head + 1], count)


def test_a_head_alone_leaves_nothing_for_the_whole_plan() -> None:
    """One head of a plan starts at the address of all: what is kept of the one must not serve the other."""
    shape = (1, 3, 3, 97, 16, 24, 16, 16)
    q, k, v, plan = make(shape, per_head=True)
    mask = torch.rand(1, 3, 97) < 0.7
    for key_mask in (mask, None, mask):
        got, expected = (block_attention(q, k, v, plan, key_mask=key_mask, backend=b) for b in ("blocked", "reference"))
        close(got, expected)


@pytest.mark.parametrize(("precision", "values"), EIGHT_BITS)
def test_pieces_of_a_large_call_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, values: ValuePrecision
) -> None:
    """8 bits go by heads, the reference by query blocks: with plans and weights that differ by head, windows, masks, shared keys."""
    shape, key_mask = (2, 4, 2, 161, 24, 40, 32, 64), torch.rand(2, 161) < 0.7
    for box in (False, True):
        q, k, v, plan = make(shape, per_head=True, box=box)
        rest = Drop() if box else Pool(torch.linspace(0.1, 1, 4))
        how: dict[str, Any] = {"precision": precision, "values": values, "rest": rest, "key_mask": key_mask}
        how |= {"return_lse": True, "backend": "reference"}
        whole = block_attention(q, k, v, plan, **how)
        with monkeypatch.context() as patched:
            patched.setattr(chunks, "CHUNK", 1)
            pieces = block_attention(q, k, v, plan, **how)
        for one, other in zip(pieces, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_reference_of_a_causal_plan_goes_by_query_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = make((1, 2, 2, 97, 16, 16, 16, 16))
    n = lengths(97, 16)
    plan = BlockPlan.from_members(torch.rand(1, 2, 7, 7) < 0.5, n, n, 16, 16, causal=0)
    whole = block_attention(q, k, v, plan, backend="reference")
    monkeypatch.setattr(chunks, "CHUNK", 1)
    torch.testing.assert_close(block_attention(q, k, v, plan, backend="reference"), whole)
