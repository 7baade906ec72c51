"""The first-order rest: PISA's sum written out in float64, what it leaves alone, and where it is right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.errors import UnsupportedError
from accelplug.kernels import flex
from accelplug.kernels.attention import Backend, block_attention, lower
from accelplug.kernels.plan import BlockPlan, Threshold
from accelplug.kernels.rest import Linear, Pool, Slope
from accelplug.patches.sparse.rows import SampledRows
from accelplug.patches.sparse.sol import Sol
from tests.conftest import DEVICE

pytestmark = pytest.mark.usefixtures("nan_memory")

LAYOUT = Layout((3, 6, 7), text_before=5, text_after=3)
SITE = Site("block", "transformer", "joint", 1, 4)
BACKENDS: list[Backend] = ["reference", "blocked", "triton"]


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    may: Tensor | None = None,
    weight: Tensor | None = None,
    slope: str = "mass",
) -> Tensor:
    """Attention with the first-order rest, float64 (B, H, P_q, D_v), one row and one block at a time."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    pooled, read = (x.expand(*q.shape[:2], -1, -1) for x in (plan.at(0), plan.members))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            query, key, value = q[b, h].double(), *(x[b, h * k.shape[1] // q.shape[1]].double() for x in (k, v))
            starts = [(plan.block_k * n, int(held)) for n, held in enumerate(plan.k_len)]
            slots = [[j for j in range(at, at + held) if may is None or may[b, j]] for at, held in starts]
            means = [(key[block].mean(0), value[block].mean(0)) for block in slots]
            exponent = 1 if weight is None else float(weight[h])
            given, taken = torch.zeros(q.shape[-2], dtype=torch.float64), torch.zeros(len(slots), dtype=torch.float64)
            for row in range(q.shape[-2]):
                m, logits, values, far = row // plan.block_q, [], [], []
                for n in (n for n, block in enumerate(slots) if block):
                    if read[b, h, m, n]:
                        logits += [scale * query[row] @ key[j] for j in slots[n]]
                        values += [value[j] for j in slots[n]]
                    elif pooled[b, h, m, n]:
                        far.append((len(logits), n))
                        logits.append(scale * query[row] @ means[n][0] + exponent * math.log(len(slots[n])))
                        values.append(means[n][1])
                if logits:
                    p = torch.stack(logits).softmax(0)
                    out[b, h, row] = p @ torch.stack(values)
                    for place, n in far:
                        given[row] += p[place]
                        taken[n] += p[place]
            if slope == "keys":
                ever = pooled[b, h].any(0)
                taken = torch.tensor([float(len(block)) for block in slots], dtype=torch.float64) * ever
            matrix = torch.zeros(q.shape[-1], v.shape[-1], dtype=torch.float64)
            for n in (n for n, block in enumerate(slots) if block and taken[n] > 0):
                for j in slots[n]:
                    matrix += taken[n] / taken.sum() / len(slots[n]) * torch.outer(key[j] - means[n][0], value[j])
            out[b, h] += given[:, None] * scale * query @ matrix
    return out


def made(
    batch: int, heads: int, kv_heads: int, tokens: int, width: int, value: int, block_q: int, block_k: int, per_head: bool
) -> tuple[Tensor, Tensor, Tensor, BlockPlan]:
    torch.manual_seed(0)
    q = torch.randn(batch, heads, tokens, width)
    k, v = torch.randn(batch, kv_heads, tokens, width), torch.randn(batch, kv_heads, tokens, value)
    rows, keys = -(-tokens // block_q), -(-tokens // block_k)
    members = torch.rand(batch if per_head else 1, heads if per_head else 1, rows, keys) < 0.4
    members[..., 0] = True
    return q, k, v, BlockPlan.from_members(members, _lengths(tokens, block_q), _lengths(tokens, block_k), block_q, block_k)


def _lengths(tokens: int, block: int) -> Tensor:
    return (tokens - torch.arange(0, tokens, block)).clamp(max=block).int()


SHAPES = {
    "B1-H2-S100": (1, 2, 2, 100, 16, 16, 16, 16),
    "B2-H4kv2-S97-q32k16": (2, 4, 2, 97, 24, 40, 32, 16),
    "B1-H2kv1-S65-q16k32": (1, 2, 1, 65, 16, 16, 16, 32),
}


@pytest.mark.parametrize("slope", ["mass", "keys"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_sum_written_out(backend: Backend, shape: str, per_head: bool, masked: bool, slope: Slope) -> None:
    q, k, v, plan = made(*SHAPES[shape], per_head)
    may = torch.rand(len(q), k.shape[-2]) < 0.7 if masked else None
    weight = torch.linspace(0.2, 1, q.shape[1]) if per_head else None
    if may is not None:
        k, v = (torch.where(may[:, None, :, None], x, 1e3) for x in (k, v))  # what may not be read has no say
    got, lse = block_attention(
        q, k, v, plan, rest=Linear(weight, slope), scale=0.3, key_mask=may, backend=backend, return_lse=True
    )
    torch.testing.assert_close(got.double(), written_out(q, k, v, plan, 0.3, may, weight, slope), rtol=1e-4, atol=1e-5)
    _, pooled = block_attention(
        q, k, v, plan, rest=Pool(weight), scale=0.3, key_mask=may, backend="reference", return_lse=True
    )
    torch.testing.assert_close(lse, pooled, rtol=1e-5, atol=1e-5)  # the first order cancels in the sum of weights


def test_keys_alike_is_the_papers_where_every_block_is_pooled_by_some_row() -> None:
    """All values in one go: acc += (g / T) * scale * q H with H over all blocks."""
    q, k, v, _ = made(1, 2, 2, 96, 16, 16, 16, 16, False)
    n = _lengths(96, 16)
    plan = BlockPlan.from_members(torch.eye(6, dtype=torch.bool), n, n, 16, 16)
    mean = k.unflatten(-2, (6, 16)).mean(-2).repeat_interleave(16, -2)
    total = (k - mean).mT @ v
    pooled, lse = block_attention(q, k, v, plan, rest=Pool(), scale=0.3, backend="reference", return_lse=True)
    _, exact = block_attention(q, k, v, plan, scale=0.3, backend="reference", return_lse=True)
    g = 1 - (exact - lse).exp()
    got = block_attention(q, k, v, plan, rest=Linear(slope="keys"), scale=0.3, backend="reference")
    torch.testing.assert_close(got, pooled + (g / 96)[..., None] * 0.3 * q @ total, rtol=1e-4, atol=1e-5)


def test_is_right_to_first_order_where_all_blocks_lean_alike() -> None:
    """Keys and values spread alike about every mean: halving the spread of keys takes 1/4 of the error off, pooling's halves."""
    torch.manual_seed(0)
    q, offset, value = torch.randn(1, 1, 64, 8), torch.randn(16, 8), torch.randn(16, 8)
    offset, value = offset - offset.mean(0), value - value.mean(0)
    k_mean, v_mean = torch.randn(2, 6, 1, 8)
    n = _lengths(96, 16)
    plan = BlockPlan.from_members(torch.eye(4, 6, dtype=torch.bool), n[:4], n, 16, 16)
    errors: dict[str, list[float]] = {"pool": [], "linear": []}
    for spread in (0.2, 0.1):
        k, v = ((k_mean + spread * offset).view(1, 1, 96, 8), (v_mean + value).view(1, 1, 96, 8))
        exact = scaled_dot_product_attention(q, k, v)
        for name, rest in (("pool", Pool()), ("linear", Linear())):
            out = block_attention(q, k, v, plan, rest=rest, backend="reference")
            errors[name].append(float((out - exact).norm()))
    assert errors["pool"][0] / errors["pool"][1] == pytest.approx(2, rel=0.15)
    assert errors["linear"][0] / errors["linear"][1] == pytest.approx(4, rel=0.3)
    assert errors["linear"][0] < 0.2 * errors["pool"][0]


def test_spread_keys_that_nobody_looks_at_rule_the_papers_mean_alone() -> None:
    """Its keys lie far against all queries. By keys the term is mostly its own; by mass it adds nothing."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 96, 8)
    q[..., 0] = 3.0
    k[..., :16, 0] -= 100
    k[..., :16, 1:] *= 10
    v[..., :16, 1:] += k[..., :16, 1:]
    n = _lengths(96, 16)
    plan = BlockPlan.from_members(torch.eye(6, dtype=torch.bool), n, n, 16, 16)
    pooled, by_mass, by_keys = (
        block_attention(q, k, v, plan, rest=rest, backend="reference")[..., 16:, :]
        for rest in (Pool(), Linear(), Linear(slope="keys"))
    )
    exact = scaled_dot_product_attention(q, k, v)[..., 16:, :]
    errors = [float((out - exact).norm() / exact.norm()) for out in (pooled, by_mass, by_keys)]
    assert errors[1] < errors[0] < 0.1 * errors[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_added_where_nothing_is_pooled(backend: Backend) -> None:
    q, k, v, plan = made(*SHAPES["B2-H4kv2-S97-q32k16"], False)
    members = plan.members.clone()
    members[..., 1, :] = True
    plan = BlockPlan.from_members(members, plan.q_len, plan.k_len, 32, 16)
    pooled, linear = (block_attention(q, k, v, plan, rest=rest, backend=backend) for rest in (Pool(), Linear()))
    assert torch.equal(pooled[..., 32:64, :], linear[..., 32:64, :])
    assert not torch.equal(pooled[..., :32, :], linear[..., :32, :])
    everything = BlockPlan.from_members(torch.ones_like(members), plan.q_len, plan.k_len, 32, 16)
    pooled, linear = (block_attention(q, k, v, everything, rest=rest, backend=backend) for rest in (Pool(), Linear()))
    assert torch.equal(pooled, linear)


@pytest.mark.parametrize("slope", ["mass", "keys"])
def test_a_block_that_all_rows_read_has_no_say(slope: Slope) -> None:
    q, k, v, plan = made(*SHAPES["B1-H2-S100"], False)  # the first block is read by all
    other = torch.cat([v[..., :16, :] + 5 * k[..., :16, :], v[..., 16:, :]], -2)
    outs = [block_attention(q, k, x, plan, rest=Linear(slope=slope), backend="reference") for x in (v, other)]
    pools = [block_attention(q, k, x, plan, rest=Pool(), backend="reference") for x in (v, other)]
    torch.testing.assert_close(outs[1] - pools[1], outs[0] - pools[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_skipped_heads_and_rows_without_a_key_give_nothing(backend: Backend) -> None:
    q, k, v, plan = made(*SHAPES["B1-H2-S100"], True)
    members = plan.members.clone()
    members[:, 1] = False
    skipped = BlockPlan.from_members(members, plan.q_len, plan.k_len, 16, 16, skipped=torch.tensor([[False, True]]))
    out = block_attention(q, k, v, skipped, rest=Linear(), backend=backend)
    assert not out[:, 1].any()
    nothing = block_attention(q, k, v, plan, rest=Linear(), backend=backend, key_mask=torch.zeros(1, 100, dtype=torch.bool))
    assert not nothing.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_threshold_is_lowered_first(backend: Backend) -> None:
    q, k, v, plan = made(*SHAPES["B1-H2-S100"], False)
    none = torch.zeros(7, dtype=torch.bool)
    rule = Threshold(torch.randn(1, 2, 7), 0, none, none, plan.q_len, plan.k_len, 16, 16)
    got = block_attention(q, k, v, rule, rest=Linear(), scale=0.3, backend=backend)
    torch.testing.assert_close(got.double(), written_out(q, k, v, lower(rule, q, k, 0.3, None), 0.3), rtol=1e-4, atol=1e-5)


def test_a_mask_by_head_is_each_head_with_its_own() -> None:
    q, k, v, plan = made(2, 3, 3, 97, 16, 24, 16, 16, False)
    mask, weight = torch.rand(2, 3, 97) < 0.7, torch.tensor([0.2, 0.6, 1.0])
    got = block_attention(q, k, v, plan, rest=Linear(weight), scale=0.3, key_mask=mask, backend="blocked")
    for head in range(3):
        one = slice(head, head + 1)
        expected = written_out(q[:, one], k[:, one], v[:, one], plan, 0.3, mask[:, head], weight[one])
        torch.testing.assert_close(got[:, one].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_float32_rounded(backend: Backend) -> None:
    q, k, v, plan = made(*SHAPES["B2-H4kv2-S97-q32k16"], True)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    got = block_attention(q, k, v, plan, rest=Linear(), scale=0.3, backend=backend)
    expected = written_out(q, k, v, plan, 0.3)
    assert got.dtype == torch.bfloat16
    assert float((got.double() - expected).abs().max()) < 1.6e-2 * float(expected.abs().max())


def test_plans_made_inside_a_graph() -> None:
    q, k, v, plan = made(*SHAPES["B1-H2-S100"], True)
    sizes = plan.q_len, plan.k_len, plan.block_q, plan.block_k

    def attend(q: Tensor, k: Tensor, v: Tensor, members: Tensor) -> Tensor:
        return block_attention(q, k, v, BlockPlan.from_members(members, *sizes), rest=Linear(), backend="blocked")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, plan.members), attend(q, k, v, plan.members))


@pytest.mark.skipif(DEVICE != "cpu", reason="about what a CPU lacks")
def test_a_backend_without_log_sum_exps_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, plan = made(1, 1, 1, 96, 16, 16, 32, 32, False)
    monkeypatch.setattr("accelplug.kernels.attention.FLEX_MIN_SLOTS", 0)
    monkeypatch.setattr(flex, "missing", lambda device: None)
    torch.testing.assert_close(
        block_attention(q, k, v, plan, rest=Linear()), block_attention(q, k, v, plan, rest=Linear(), backend="blocked")
    )
    with pytest.raises(UnsupportedError, match="log-sum-exp"):
        block_attention(q, k, v, plan, rest=Linear(), backend="flex")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "config"),
    [(Sol, {"tau": 0.8, "band": 0}), (SampledRows, {"density": 0.3}), (Sol, {"tau": 0.8, "band": 0, "order": "kmeans"})],
    ids=["sol", "rows", "orders by head"],
)
def test_joint_attention_with_text(method: Any, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Batch 2, GQA where orders are shared, padded text, text on both sides: its rows are dense, and its values lean on nobody."""
    torch.manual_seed(0)
    heads = 4 if config.get("order") == "kmeans" else 2
    q = torch.randn(2, 4, LAYOUT.length, 16, dtype=dtype)
    k, v = torch.randn(2, 2, heads, LAYOUT.length, 16, dtype=dtype)
    mask = torch.ones(2, LAYOUT.length, dtype=torch.bool)
    mask[1, -2:] = False

    def dense(q: Tensor = q, attn_mask: Tensor | None = mask[:, None, None]) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=0.25, enable_gqa=True)

    call, outs = AttentionCall(q, k, v, mask, 0.25, dense), {}
    for rest in ("pool", "linear"):
        patch = method({"block": 8, "backend": "blocked", "rest": rest, **config})
        params = patch.prepare(SITE, LAYOUT, Clock(0, 4), {})
        outs[rest] = patch.attend(call, params)
        assert 0 < patch.inspect(call, params)[0] < 1
    difference = (outs["linear"].float() - outs["pool"].float()).abs().amax((0, 1, 3))
    visual = slice(5, 131)
    assert (difference[visual] > 0).all()
    assert not difference[:5].any()
    assert not difference[131:].any()
    torch.testing.assert_close(outs["linear"][..., :5, :].float(), dense()[..., :5, :].float(), rtol=2e-2, atol=2e-2)
    assert outs["linear"].dtype == dtype
