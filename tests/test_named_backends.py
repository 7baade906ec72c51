"""Kernels of others that run by name alone: what they are given is right by value; no GPU has run them.

Stand-ins do in float32 what the makers document, and refuse what they document that they do not take.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from accelplug.call import Layout
from accelplug.errors import UnsupportedError
from accelplug.kernels import cudnn, sol_attn
from accelplug.kernels.attention import UNTRIED, _candidates, available_backends, block_attention
from accelplug.kernels.cudnn import Lists
from accelplug.kernels.plan import BlockPlan, Threshold
from accelplug.kernels.rest import Drop, Pool
from accelplug.patches.sparse.sol import Sol
from accelplug.patches.sparse.template import Blocks
from tests.conftest import DEVICE
from tests.test_kernels import close, lengths, make

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="stand-ins for what runs on a GPU")
GPU = torch.device("cuda")


def as_if_on(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    """Have both kernels believe that tensors lie on a GPU of a compute capability, with their packages there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
    monkeypatch.setattr("accelplug.compat.versions.installed", lambda package: "9.9")
    for module in (cudnn, sol_attn):
        true_reason = module.missing
        monkeypatch.setattr(module, "missing", lambda device, true_reason=true_reason: true_reason(GPU))


# --------------------------------------------------------------------------------------------------------------- cuDNN


class FrontEnd:
    """``cudnn.BSA`` as docs/fe-oss-apis/bsa.md has it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def block_sparse_attention_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        *,
        block_sizes: Tensor,
        q2k_block_nums: Tensor,
        sparse_block_size: int,
        allow_empty_block_nums: bool,
        softmax_scale: float,
        pack_gqa: bool,
    ) -> dict[str, Tensor]:
        self.sizes.append(size := sparse_block_size)
        batch, heads, rows, _ = q.shape
        assert rows % 64 == 0
        assert not pack_gqa
        assert index.dtype == block_sizes.dtype == q2k_block_nums.dtype == torch.int32
        assert index.is_contiguous()
        assert index.shape[:3] == q2k_block_nums.shape == (batch, heads, -(-rows // size))
        assert block_sizes.shape == (-(-k.shape[2] // size),)
        k, v = (x.float().repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
        out, lse = torch.zeros(*q.shape[:3], v.shape[-1]), torch.full(q.shape[:3], -torch.inf)
        for b, h, m in ((b, h, m) for b in range(batch) for h in range(heads) for m in range(index.shape[2])):
            read = index[b, h, m, : q2k_block_nums[b, h, m]].tolist()
            assert len(set(read)) == len(read)
            assert all(1 <= block_sizes[n] <= size for n in read)
            keys = [n * size + i for n in read for i in range(int(block_sizes[n]))]
            some = slice(m * size, (m + 1) * size)
            if keys:
                logits = softmax_scale * q[b, h, some].float() @ k[b, h, keys].T
                out[b, h, some], lse[b, h, some] = logits.softmax(-1) @ v[b, h, keys], logits.logsumexp(-1)
            else:
                assert allow_empty_block_nums
        return {"o_tensor": out.to(q.dtype), "lse_tensor": lse}


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch) -> FrontEnd:
    as_if_on(monkeypatch, 9)
    made = FrontEnd()
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(BSA=made))
    return made


@pytest.mark.parametrize(("block_q", "block_k", "size"), [(64, 64, 64), (128, 128, 128), (128, 64, 64), (64, 128, 64)])
def test_lists_hold_what_the_plan_reads(block_q: int, block_k: int, size: int) -> None:
    _, _, _, plan = make((2, 3, 3, 333, 8, 8, block_q, block_k), per_head=True)
    lists = Lists.of(plan, size, 2, 3)
    reads = torch.zeros(2, 3, len(plan.q_len) * block_q, plan.key_slots, dtype=torch.bool)
    for b, h, m in torch.cartesian_prod(*map(torch.arange, lists.number.shape)).tolist():
        for n in lists.index[b, h, m, : lists.number[b, h, m]].tolist():
            assert lists.sizes[n] > 0
            reads[b, h, m * size : (m + 1) * size, n * size : n * size + int(lists.sizes[n])] = True
    held = torch.arange(reads.shape[-2]) < 333  # rows without a token read what their block does
    assert torch.equal(reads[..., held, :], plan.dense_mask()[..., held, :])


@pytest.mark.parametrize("rest", ["drop", "pool", "weighted"])
@pytest.mark.parametrize("shape", [(1, 2, 1, 300, 64, 64, 64, 64), (2, 2, 2, 261, 128, 128, 128, 64)])
def test_cudnn_equals_the_reference(front_end: FrontEnd, shape: tuple[int, ...], rest: str) -> None:
    q, k, v, plan = make(shape, per_head=True, dtype=torch.bfloat16)
    kinds = {"drop": Drop(), "pool": Pool(), "weighted": Pool(torch.linspace(0.2, 1, shape[1]))}
    arguments: dict[str, Any] = {"rest": kinds[rest], "scale": 0.3, "return_lse": True}
    expected, expected_lse = block_attention(q, k, v, plan, backend="reference", **arguments)
    got, lse = block_attention(q, k, v, plan, backend="cudnn", **arguments)
    assert front_end.sizes == [64]
    close(got, expected, torch.bfloat16)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_cudnn_reads_by_means_and_skips_heads(front_end: FrontEnd) -> None:
    q, k, v, _ = make((1, 2, 2, 200, 64, 64, 64, 64), dtype=torch.float16)
    tokens = lengths(200, 64)
    members = torch.eye(4, dtype=torch.bool).expand(1, 2, 4, 4).clone()
    members[:, 1] = False
    level = torch.full((1, 2, 4, 4), 4, dtype=torch.uint8)
    level[:, 1] = 0
    skipped = torch.tensor([[False, True]])
    plan = BlockPlan.from_members(members, tokens, tokens, 64, 64, level=level, skipped=skipped)
    expected = block_attention(q, k, v, plan, backend="reference")
    got = block_attention(q, k, v, plan, backend="cudnn")
    close(got, expected, torch.float16)
    assert not got[:, 1].any()


@pytest.mark.parametrize(
    ("shape", "dtype", "major", "reason"),
    [
        ((1, 2, 2, 200, 64, 64, 64, 64), torch.float32, 9, "bfloat16 and float16, got torch.float32"),
        ((1, 2, 2, 200, 80, 80, 64, 64), torch.bfloat16, 9, "head dimensions 64 and 96 and 128"),
        ((1, 2, 2, 200, 64, 64, 64, 64), torch.bfloat16, 12, "head dimensions 128 on this GPU"),
        ((1, 2, 2, 200, 64, 64, 32, 64), torch.bfloat16, 9, "blocks of a multiple of 64, got 32 x 64"),
        ((1, 2, 1, 200, 128, 128, 64, 64), torch.bfloat16, 10, "heads of 128 that share no keys"),
        ((1, 2, 2, 200, 64, 64, 64, 64), torch.bfloat16, 8, "this GPU has 8.0"),
    ],
)
def test_cudnn_says_what_it_does_not_take(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, major: int, reason: str
) -> None:
    as_if_on(monkeypatch, major)
    with pytest.raises(UnsupportedError, match=f"backend='cudnn' cannot serve: .*{reason}"):
        block_attention(*make(shape, dtype=dtype), backend="cudnn")


def test_cudnn_masks_no_tokens_and_tells_what_it_throws(front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, plan = make((1, 2, 2, 200, 64, 64, 64, 64), dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="no padded keys"):
        block_attention(q, k, v, plan, key_mask=torch.ones(1, 200, dtype=torch.bool), backend="cudnn")
    monkeypatch.setattr(front_end, "block_sparse_attention_forward", lambda *_, **__: 1 / 0)
    with pytest.raises(UnsupportedError, match="failed inside nvidia-cudnn-frontend: division by zero"):
        block_attention(q, k, v, plan, backend="cudnn")


# ------------------------------------------------------------------------------------------------------------ Sol-Attn


def published(q: Tensor, k: Tensor, v: Tensor, *, scale: float, tau: float, thresh_type: str) -> Tensor:
    """``sol_attn`` as its authors have it: tensors (B, T, H, 128), bfloat16 and contiguous; see `accelplug.patches.sparse.sol`."""
    assert all(x.is_contiguous() and x.dtype == torch.bfloat16 and x.shape[-1] == 128 for x in (q, k, v))
    blocks = [slice(start, start + 64) for start in range(0, q.shape[1], 64)]
    out = torch.empty_like(q)
    for b, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[2])).tolist():
        rows, keys, values = (x[b, :, h].double() for x in (q, k, v))
        means = torch.stack([keys[block].mean(0) for block in blocks])
        middle, apart = means.mean(0), means - means.mean(0)
        for m, block in enumerate(blocks):
            query = rows[block].mean(0) * scale / torch.log(torch.tensor(2.0, dtype=torch.float64))
            spread = (query**2 * (apart**2).mean(0)).sum() if thresh_type == "diag" else ((apart @ query) ** 2).mean()
            theta = query @ middle + tau * (spread + 1e-6).sqrt()
            exact = [float(query @ mean) > theta or abs(m - n) <= 1 for n, mean in enumerate(means)]
            told = [
                (keys[at], values[at], torch.zeros(len(keys[at])))
                if reads
                else (means[n : n + 1], values[at].mean(0, keepdim=True), torch.tensor([float(len(keys[at]))]).log())
                for n, (at, reads) in enumerate(zip(blocks, exact, strict=True))
            ]
            key, value, bias = (torch.cat(parts).double() for parts in zip(*told, strict=True))
            out[b, block, h] = ((scale * rows[block] @ key.T + bias).softmax(-1) @ value).to(out.dtype)
    return out


def blocks_of(patch: Sol, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> Blocks:
    from accelplug.kernels.orders import tiles

    laid = tiles(layout, "raster", patch.config.unit)
    return Blocks(q, k, v, None, q.shape[-1] ** -0.5, laid, laid, patch.config.block, patch.config.key_block)


def sol_call(statistic: str = "diag", tokens: tuple[int, int, int] = (4, 10, 10), **settings: Any) -> tuple[Any, ...]:
    layout = Layout(grid_thw=tokens)
    q, k, v, _ = make((1, 2, 2, layout.visual, 128, 128, 64, 64), dtype=torch.bfloat16)
    patch = Sol({"tau": 0.4, "statistic": statistic, **settings})
    return q, k, v, patch.route(blocks_of(patch, layout, q, k, v))


@pytest.mark.parametrize("statistic", ["diag", "exact"])
def test_sol_equals_the_reference(monkeypatch: pytest.MonkeyPatch, statistic: str) -> None:
    as_if_on(monkeypatch, 9)
    asked: list[str] = []
    hub = SimpleNamespace(get_kernel=lambda name: asked.append(name) or SimpleNamespace(sol_attn=published))
    monkeypatch.setitem(sys.modules, "kernels", hub)
    sol_attn._from_hub.cache_clear()
    q, k, v, rule = sol_call(statistic)
    assert isinstance(rule, Threshold)
    assert rule.rule == (0.4, statistic)
    expected = block_attention(q, k, v, rule, rest=Pool(), backend="reference")
    close(block_attention(q, k, v, rule, rest=Pool(), backend="sol"), expected, torch.bfloat16)
    assert asked == [sol_attn.HUB]
    sol_attn._from_hub.cache_clear()


def test_sol_says_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_on(monkeypatch, 9)
    q, k, v, rule = sol_call()
    refused: list[tuple[str, Any]] = [
        ("thresholds of its own", (q, k, v, make((1, 2, 2, 400, 128, 128, 64, 64))[3])),
        ("blocks of 64 and a band of 1, got 64 x 64 and 2", sol_call(band=2)),
        ("bfloat16, and q, k and v of one shape", (q.half(), k.half(), v.half(), rule)),
    ]
    for reason, call in refused:
        with pytest.raises(UnsupportedError, match=f"backend='sol' cannot serve: .*{reason}"):
            block_attention(*call, rest=Pool(), backend="sol")
    with pytest.raises(UnsupportedError, match="reads every other block as its mean"):
        block_attention(q, k, v, rule, backend="sol")
    with pytest.raises(UnsupportedError, match="gives no log-sum-exp"):
        block_attention(q, k, v, rule, rest=Pool(), backend="sol", return_lse=True)
    text = Layout(text_after=16, grid_thw=(4, 8, 12))
    found = Sol({"tau": 0.4}).route(blocks_of(Sol({"tau": 0.4}), text, q, k, v))
    assert isinstance(found, Threshold)
    assert found.rule is None


def test_a_hub_without_the_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_on(monkeypatch, 9)

    def get_kernel(name: str) -> Any:
        raise FileNotFoundError("404")

    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    sol_attn._from_hub.cache_clear()
    q, k, v, rule = sol_call()
    with pytest.raises(UnsupportedError, match="backend='sol' failed: kernels-community/sol-attn: 404"):
        block_attention(q, k, v, rule, rest=Pool(), backend="sol")


# ---------------------------------------------------------------------------------------------------------------- both


def test_they_run_by_name_alone(front_end: FrontEnd) -> None:
    q, _, v, plan = make((1, 2, 2, 300, 128, 128, 64, 64), dtype=torch.bfloat16)
    assert not set(_candidates(q, v, plan, Drop(), "native", "native", False)) & {"cudnn", "sol"}
    assert {"cudnn", "sol"} < set(UNTRIED)


def test_where_they_are_missing_they_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = available_backends("cpu")
    assert "not on cpu" in found["cudnn"]
    assert "not on cpu" in found["sol"]
    monkeypatch.setattr(torch.version, "hip", None)
    assert cudnn.missing(GPU) == "nvidia-cudnn-frontend is not installed (pip install nvidia-cudnn-frontend)"
    assert sol_attn.missing(GPU) == "kernels is not installed (pip install kernels)"
