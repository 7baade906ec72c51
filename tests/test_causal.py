"""Causal plans: every backend against attention with the mask spelled out, offsets, padding, grouped heads, and the law itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from accelplug.errors import ShapeError, UnsupportedError
from accelplug.kernels.attention import Backend, block_attention
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.rest import Drop, Linear, Pool, Rest, Tied
from tests.test_kernels import FLEX_BLOCK, TOLERANCE, close, lengths

pytestmark = pytest.mark.usefixtures("nan_memory")

BACKENDS: tuple[Backend, ...] = ("reference", "blocked", "triton")
RESTS: dict[str, Callable[[int], Rest]] = {
    "drop": lambda heads: Drop(),
    "pool": lambda heads: Pool(),
    "weighted": lambda heads: Pool(torch.linspace(0.1, 1, heads)),
}
# (batch, heads, kv heads, queries, keys, head_dim, block_q, block_k)
SHAPES = {
    "square": (1, 2, 2, 97, 97, 16, 16, 16),
    "one-slot": (2, 6, 2, 65, 65, 24, 16, 16),
    "wide-queries": (1, 4, 2, 111, 111, 16, 32, 16),
    "wide-keys": (2, 2, 1, 90, 90, 16, 16, 32),
    "chunk": (2, 4, 2, 33, 97, 16, 16, 16),  # begins at 64
    "odd-chunk": (1, 2, 1, 29, 100, 16, 16, 16),  # begins at 71
    "odd-chunk-wide": (1, 2, 1, 45, 100, 16, 32, 16),
}


def make(
    shape: tuple[int, ...], *, plan_heads: int = 1, density: float = 0.4, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockPlan]:
    batch, heads, kv_heads, queries, keys, dim, block_q, block_k = shape
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    q, k, v = (torch.randn(batch, h, n, dim, generator=g).to(dtype) for h, n in sizes)
    q_len, k_len = lengths(queries, block_q), lengths(keys, block_k)
    members = torch.rand(batch if plan_heads > 1 else 1, plan_heads, len(q_len), len(k_len), generator=g) < density
    return q, k, v, BlockPlan.from_members(members, q_len, k_len, block_q, block_k, causal=keys - queries)


def spelled_out(q: Any, k: Any, v: Any, plan: BlockPlan, rest: Rest, key_mask: Any = None) -> torch.Tensor:
    """Row by row in float64: the tokens that are read, and one mean for each past block that is not."""
    q, k, v = q.double(), k.double(), v.double()
    ratio, scale, first = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5, k.shape[2] - q.shape[2]
    members = plan.members
    members = members.expand(len(q), *members.shape[1:]).repeat_interleave(q.shape[1] // members.shape[1], 1)
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        logs: list[float] = []
        for j in range(len(plan.k_len)):
            tokens = range(j * plan.block_k, min((j + 1) * plan.block_k, k.shape[2]))
            begin = first + i // plan.block_q * plan.block_q
            may = [t for t in tokens if t <= first + i and (key_mask is None or key_mask[b, t])]
            if members[b, h, i // plan.block_q, j]:
                keys += [k[b, h // ratio, t] for t in may]
                values += [v[b, h // ratio, t] for t in may]
                logs += [0.0] * len(may)
            elif isinstance(rest, Pool) and may and (j + 1) * plan.block_k <= begin + 1:
                keys.append(k[b, h // ratio, may].mean(0)), values.append(v[b, h // ratio, may].mean(0))
                logs.append((1.0 if rest.weight is None else float(rest.weight[h])) * math.log(len(may)))
        if keys:
            p = (scale * torch.stack(keys) @ q[b, h, i] + torch.tensor(logs)).softmax(0)
            out[b, h, i] = p @ torch.stack(values)
    return out


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("shape", ["one-slot", "chunk", "odd-chunk", "wide-queries"])
def test_the_reference_is_what_is_meant(shape: str, rest: str) -> None:
    sizes = SHAPES[shape]
    q, k, v, plan = make(sizes, plan_heads=sizes[1])
    mask = None
    if sizes[0] == 2:  # padding on the left in one row, on the right in the other
        mask = torch.ones(2, sizes[4], dtype=torch.bool)
        mask[0, :19], mask[1, -9:] = False, False
    kept = RESTS[rest](sizes[1])
    got = block_attention(q, k, v, plan, rest=kept, key_mask=mask, backend="reference")
    close(got, spelled_out(q, k, v, plan, kept, mask).float())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rest", ["drop", "weighted"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backend_equals_reference(backend: Backend, shape: str, rest: str, padded: bool) -> None:
    batch, heads, kv_heads, _, keys = SHAPES[shape][:5]
    mask = torch.rand(batch, keys) < 0.7 if padded else None
    if mask is not None:
        mask[0, :35] = False
    q, k, v, plan = make(SHAPES[shape], plan_heads=kv_heads if padded else heads)
    arguments: dict[str, Any] = {"rest": RESTS[rest](heads), "key_mask": mask, "return_lse": True}
    expected, expected_lse = block_attention(q, k, v, plan, backend="reference", **arguments)
    got, lse = block_attention(q, k, v, plan, backend=backend, **arguments)
    close(got, expected)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rest", "padded"), [("drop", False), ("weighted", True)])
def test_flex_equals_reference(rest: str, padded: bool) -> None:
    shape = (2, 4, 2, 70, 170, 32, FLEX_BLOCK, FLEX_BLOCK)
    q, k, v, plan = make(shape, plan_heads=2)
    mask = torch.rand(2, 170) < 0.7 if padded else None
    arguments: dict[str, Any] = {"rest": RESTS[rest](4), "key_mask": mask}
    got = block_attention(q, k, v, plan, backend="flex", **arguments)
    close(got, block_attention(q, k, v, plan, backend="reference", **arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [64, 65, 63])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_that_reads_all_is_causal_attention(backend: Backend, tokens: int, dtype: torch.dtype) -> None:
    q, k, v, plan = make((1, 2, 1, tokens, tokens, 32, 16, 16), density=2.0, dtype=dtype)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    own = (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) - exact).abs().max()
    for rest in (Drop(), Pool()):
        got = block_attention(q, k, v, plan, rest=rest, backend=backend)
        error = (got - exact).abs().max()
        assert error <= (2 * own + 1e-7 if dtype == torch.float32 else TOLERANCE[dtype] * exact.abs().max())
    assert float(plan.density()) == 1.0


@pytest.mark.parametrize("rest", ["drop", "pool"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_later_changes_no_earlier_row(backend: Backend, rest: str) -> None:
    q, k, v, plan = make((1, 2, 1, 97, 97, 16, 16, 16), plan_heads=2)
    before = block_attention(q, k, v, plan, rest=RESTS[rest](2), backend=backend)
    for token in (15, 16, 40):
        other_q, other_k, other_v = (x.clone() for x in (q, k, v))
        for x in (other_q, other_k, other_v):
            x[:, :, token:] = 100.0 * torch.randn_like(x[:, :, token:])
        after = block_attention(other_q, other_k, other_v, plan, rest=RESTS[rest](2), backend=backend)
        assert torch.equal(after[:, :, :token], before[:, :, :token])
        assert not torch.equal(after[:, :, token:], before[:, :, token:])


@pytest.mark.parametrize("rest", ["drop", "pool"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_chunks_it_is_the_whole(backend: Backend, rest: str) -> None:
    q, k, v, plan = make((1, 2, 1, 150, 150, 16, 16, 16), plan_heads=2)
    whole = block_attention(q, k, v, plan, rest=RESTS[rest](2), backend=backend)
    size, parts = 4 * plan.block_q, []
    for start in range(0, 150, size):
        end, blocks = min(start + size, 150), slice(start // plan.block_q, (start + size) // plan.block_q)
        chunk = plan.members[:, :, blocks, : -(-end // plan.block_k)]
        sizes = (plan.q_len[blocks], lengths(end, plan.block_k), plan.block_q, plan.block_k)
        part = BlockPlan.from_members(chunk, *sizes, causal=start)
        arguments: dict[str, Any] = {"rest": RESTS[rest](2), "backend": backend}
        parts.append(block_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], part, **arguments))
    close(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_behind_the_last_query_are_not_read(backend: Backend) -> None:
    """As a static cache has them."""
    q, k, v, _ = make((1, 2, 1, 40, 90, 16, 16, 16))
    plan = BlockPlan.from_members(torch.ones(3, 6, dtype=torch.bool), lengths(40, 16), lengths(90, 16), 16, 16, causal=10)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.arange(90) <= 10 + torch.arange(40)[:, None], enable_gqa=True
    )
    close(block_attention(q, k, v, plan, backend=backend), expected)
    assert float(plan.density()) == 1.0


def test_density_counts_the_pairs_that_causal_attention_reads() -> None:
    for shape in SHAPES.values():
        *_, plan = make(shape, plan_heads=shape[1])
        reads = plan.dense_mask()[..., : shape[3], : shape[4]]
        pairs = torch.ones(shape[3], shape[4], dtype=torch.bool).tril(shape[4] - shape[3])
        torch.testing.assert_close(plan.density(), reads.double().sum((-1, -2)) / pairs.sum())
        assert not (reads & ~pairs).any()


def test_what_causal_plans_do_not_take() -> None:
    q, k, v, plan = make((1, 4, 2, 64, 64, 16, 16, 16))
    for rest in (Tied(), Linear()):
        with pytest.raises(UnsupportedError, match="would tell rows of a causal plan of later ones"):
            block_attention(q, k, v, plan, rest=rest)
    with pytest.raises(ShapeError, match="a key slot of at least 0"):
        BlockPlan.from_members(plan.members, plan.q_len, plan.k_len, 16, 16, causal=-1)
    *_, three = make((1, 3, 1, 64, 64, 16, 16, 16), plan_heads=3)
    with pytest.raises(ShapeError, match="The plan has 3 heads; expected 1, 2 as the keys, or 4 as the queries"):
        block_attention(q, k, v, three)
