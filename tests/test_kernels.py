"""Every backend against the float32 reference, and the reference against dense attention in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from accelplug.errors import ShapeError, UnsupportedError
from accelplug.kernels import flex
from accelplug.kernels.attention import block_attention, choices, forget_choices, measure_choice
from accelplug.kernels.plan import BlockPlan, Box, Threshold, pool
from accelplug.kernels.rest import Drop, Pool
from tests.conftest import DEVICE

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
RESTS = {
    "drop": lambda heads: Drop(),
    "pool": lambda heads: Pool(),
    "weighted": lambda heads: Pool(torch.linspace(0.1, 1, heads)),
}
FLEX_BLOCK = 32 if DEVICE == "cpu" else 64  # FlexAttention takes no smaller blocks on a GPU
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="about what a CPU chooses or lacks")
# Largest error allowed, relative to the largest output, by dtype: rounding of inputs and of probabilities.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make(shape, *, per_head=False, dtype=torch.float32, density=0.4, box=False, seed=0):
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


def close(got, expected, dtype=torch.float32):
    assert torch.isfinite(got).all()
    error = (got.double() - expected.double()).abs().max()
    assert error <= TOLERANCE[dtype] * max(1.0, float(expected.abs().max())), f"error {error:.2e}"


@pytest.mark.parametrize("mask", ["all", "padded"])
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_backend_equals_reference(backend, shape, rest, mask):
    q, k, v, plan = make(shape, per_head=shape[0] == 2)
    key_mask = None if mask == "all" else torch.rand(shape[0], shape[3]) < 0.7
    arguments = {"rest": RESTS[rest](shape[1]), "key_mask": key_mask, "return_lse": True}
    expected, expected_lse = block_attention(q, k, v, plan, backend="reference", **arguments)
    got, lse = block_attention(q, k, v, plan, backend=backend, **arguments)
    close(got, expected)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rest", ["drop", "pool"])
@pytest.mark.parametrize("case", ["plain", "heads", "gqa", "box", "padded", "bf16"])
def test_flex_equals_reference(case, rest):
    shape = (2, 4, 2 if case == "gqa" else 4, 200, 32, 32, FLEX_BLOCK, FLEX_BLOCK)
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    q, k, v, plan = make(shape, per_head=case == "heads", box=case == "box", dtype=dtype)
    key_mask = torch.rand(2, 200) < 0.7 if case == "padded" else None
    arguments = {"rest": RESTS[rest](4), "key_mask": key_mask}
    close(
        block_attention(q, k, v, plan, backend="flex", **arguments),
        block_attention(q, k, v, plan, backend="reference", **arguments),
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_half_precision(backend, dtype):
    q, k, v, plan = make(SHAPES["B2-H4kv2-S97-d40-q32k16"], dtype=dtype)
    for rest in (Drop(), Pool()):
        close(
            block_attention(q, k, v, plan, rest=rest, backend=backend),
            block_attention(q, k, v, plan, rest=rest, backend="reference"),
            dtype,
        )


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
@pytest.mark.parametrize("rest", ["drop", "pool"])
def test_box(backend, rest):
    q, k, v, plan = make((1, 2, 2, 100, 16, 16, 16, 16), box=True)
    rows, keys = torch.arange(100)[:, None], torch.arange(100)
    reads = (keys >= rows - 20) & (keys < rows + 9)
    got = block_attention(q, k, v, plan, rest=RESTS[rest](2), backend=backend)
    close(
        got, F.scaled_dot_product_attention(q, k, v, attn_mask=reads)
    )  # nothing is left over for the rest: all blocks are read


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton", "flex"])
@pytest.mark.parametrize("tokens", [64, 65, 63, 79])
def test_density_one_is_dense_within_twice_its_own_error(backend, tokens):
    block = FLEX_BLOCK if backend == "flex" else 16
    q, k, v, plan = make((2, 2, 2, tokens, 32, 32, block, block), density=2.0)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    own = (F.scaled_dot_product_attention(q, k, v) - exact).abs().max()
    for rest in (Drop(), Pool()):
        error = (block_attention(q, k, v, plan, rest=rest, backend=backend) - exact).abs().max()
        assert error <= 2 * own + 1e-7


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_halves_merge_by_lse(backend):
    q, k, v, plan = make((1, 2, 2, 128, 16, 16, 16, 16), density=2.0)
    first = torch.zeros(8, 8, dtype=torch.bool)
    first[:, :3] = True
    parts = [BlockPlan.from_members(half, plan.q_len, plan.k_len, 16, 16) for half in (first, ~first)]
    (out_a, lse_a), (out_b, lse_b) = (block_attention(q, k, v, part, backend=backend, return_lse=True) for part in parts)
    share = torch.sigmoid(lse_a - lse_b)[..., None]
    close(share * out_a + (1 - share) * out_b, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton", "flex"])
def test_pool_is_exact_where_a_blocks_keys_are_equal(backend):
    size = FLEX_BLOCK if backend == "flex" else 16
    q, k, v, plan = make((1, 2, 2, 100, 16, 16, size, size))
    block = torch.arange(100) // size
    k, v = k[..., block * size, :], v[..., block, :]  # values may differ between blocks only, too
    close(block_attention(q, k, v, plan, rest=Pool(), backend=backend), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("backend", ["blocked", "triton"])
@pytest.mark.parametrize("rest", ["drop", "pool"])
def test_a_negative_scale(backend, rest):
    q, k, v, plan = make((1, 2, 2, 100, 16, 16, 16, 16))
    arguments = {"rest": RESTS[rest](2), "scale": -0.3}
    expected = block_attention(q, k, v, plan, backend="reference", **arguments)
    close(block_attention(q, k, v, plan, backend=backend, **arguments), expected)


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_a_row_without_a_key_is_zero(backend):
    q, k, v, plan = make((1, 1, 1, 48, 16, 16, 16, 16))
    key_mask = torch.zeros(1, 48, dtype=torch.bool)
    out, lse = block_attention(q, k, v, plan, key_mask=key_mask, backend=backend, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("rest", ["drop", "pool"])
@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_threshold(backend, rest):
    tokens, block = 200, 16
    q, k, v, plan = make((2, 4, 2, tokens, 16, 16, block, block))
    n = len(plan.k_len)

    def rule(theta: float) -> Threshold:
        sink = torch.zeros(n, dtype=torch.bool)
        sink[2] = True
        return Threshold(torch.full((2, 4, n), theta), 1, sink, torch.arange(n) == 5, plan.q_len, plan.k_len, block, block)

    for theta in (-math.inf, 0.0, 0.4, math.inf):
        q_pool, k_pool = pool(q, plan.q_len, block)[0], pool(k, plan.k_len, block)[0].repeat_interleave(2, 1)
        lowered = rule(theta).lower(q_pool, k_pool, 0.25)
        arguments = {"rest": RESTS[rest](4), "scale": 0.25}
        expected = block_attention(q, k, v, lowered, backend="reference", **arguments)
        close(block_attention(q, k, v, rule(theta), backend=backend, **arguments), expected)
        band = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 1
        always = band | (torch.arange(n) == 2) | (torch.arange(n) == 5)[:, None]
        assert (lowered.members | ~always).all()
        if theta == math.inf:
            assert torch.equal(lowered.members[0, 0], always)
        if theta == -math.inf:
            assert lowered.members.all()


def test_one_opaque_node_under_compile():
    q, k, v, plan = make(SHAPES["B1-H2-S100-d16"])
    compiled = torch.compile(
        lambda q, k, v: block_attention(q, k, v, plan, rest=Pool()) * 2, fullgraph=True, backend="aot_eager"
    )
    close(compiled(q, k, v), 2 * block_attention(q, k, v, plan, rest=Pool()))


def test_op_is_well_formed():
    q, k, v, plan = make(SHAPES["B1-H2-S100-d16"])
    arguments = (
        *(q, k, v, plan.q_len, plan.k_len, plan.index, plan.count, plan.whole, plan.bits),
        *(None,) * 8,
        *(True, 16, 16, 0, 0.25, "blocked", True),
    )
    torch.library.opcheck(
        torch.ops.accelplug.block_attention.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_many_flex_shapes_in_one_process():
    """More shapes than Dynamo would recompile one function for."""
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for tokens in (33, 65, 97, 129):
            q, k, v, plan = make((1, 1, 1, tokens, 16, 16, FLEX_BLOCK, FLEX_BLOCK))
            close(block_attention(q, k, v, plan, backend="flex"), block_attention(q, k, v, plan, backend="reference"))


@on_cpu
def test_choice_is_measured_kept_and_used():
    forget_choices()
    q, k, v, plan = make(SHAPES["B1-H2-S100-d16"])
    times = measure_choice(q, k, v, plan)
    assert set(times) == {"blocked"}  # small, on a CPU: nothing to compile for
    assert choices() == [{"backend": "blocked", "ms": times}]
    assert measure_choice(q, k, v, plan) == times
    forget_choices()
    assert choices() == []


@on_cpu
def test_without_a_compiler_flex_is_refused_and_auto_goes_on(monkeypatch):
    monkeypatch.setattr(flex, "_compiler_missing", lambda: True)
    q, k, v, plan = make((1, 1, 1, 8192, 16, 16, 128, 128), density=0.05)
    with pytest.raises(UnsupportedError, match=r"no C\+\+ compiler"):
        block_attention(q, k, v, plan, backend="flex")
    close(block_attention(q, k, v, plan), block_attention(q, k, v, plan, backend="blocked"))


def test_wrong_arguments_say_what_is_wrong():
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
    with pytest.raises(UnsupportedError, match="power of two of at least 16"):
        block_attention(*small, backend="triton")
    wide = make((1, 1, 1, 40, 320, 320, 16, 16))
    with pytest.raises(UnsupportedError, match="up to 256"):
        block_attention(*wide, backend="triton")


@on_cpu
def test_flex_gives_no_lse_on_a_cpu():
    with pytest.raises(UnsupportedError, match="log-sum-exp"):
        block_attention(*make((1, 1, 1, 64, 16, 16, 32, 32)), backend="flex", return_lse=True)
