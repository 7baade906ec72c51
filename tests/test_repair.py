"""Probe repair: the regression is the textbook's, it judges itself, and it touches nothing that is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accelplug import kernels
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels import chunks
from accelplug.kernels.memory import Memory
from accelplug.kernels.repair import Probes, block_rows, probe_rows, repair_, step_of
from accelplug.patches.sparse.neighborhood import Neighborhood
from accelplug.patches.sparse.sol import Sol
from accelplug.patches.sparse.sparse_vdit import SparseVdit
from tests.test_memory import peak

LAYOUT = Layout((3, 6, 7), text_before=5, text_after=3)
SITE = Site("block", "transformer", "joint", 1, 4)


def tensors(heads: int = 2, tokens: int = LAYOUT.length, width: int = 4, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(3))
    return q, k, v


def repair(
    sparse: Tensor, q: Tensor, exact: Tensor, rows: Tensor, within: slice = slice(None), **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What `repair_` makes of a copy, and what it says of it."""
    out = sparse.clone()
    return out, *repair_(out, q, Probes(rows, exact), within, **how)


def wrong_by_query(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, the dense output, and one whose error is linear in output and query but for a little noise."""
    q, k, v = tensors()
    dense = scaled_dot_product_attention(q, k, v)
    generator = torch.Generator().manual_seed(seed)
    sparse = dense + 0.3 * q @ torch.randn(4, 4, generator=generator) + 0.2
    return q, dense, sparse + 0.001 * torch.randn(sparse.shape, generator=generator)


@pytest.mark.parametrize("number", [126, 63, 17, 1])
def test_probes_are_different_rows_all_over(number: int) -> None:
    rows = probe_rows(5, 126, number)
    assert rows.min() >= 5
    assert rows.max() < 131
    assert (rows.diff() > 0).all()
    assert len(rows) == number
    assert (rows.diff() <= 2 * 126 / number + 1).all()


def test_every_block_has_its_probes_and_what_is_there_twice_does_not_count() -> None:
    lengths = torch.tensor([8, 2, 0, 5], dtype=torch.int32)
    for step in range(3):
        slots, counted = block_rows(lengths, 8, 3, step)
        for block, held in enumerate(lengths.tolist()):
            inside = slots[block] - 8 * block if held else slots[block]
            assert ((inside >= 0) & (inside < max(held, 1))).all(), "a slot without a token"
            assert len(inside[counted[block]].unique()) == int(counted[block].sum()) == min(held, 3)


def test_probes_of_a_grid_are_not_all_of_one_column() -> None:
    assert len((probe_rows(0, 12 * 16, 12) % 16).unique()) > 6


def textbook(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Means of x and y, and the slope of a centred ridge regression, in float64."""
    centred = x - x.mean(0)
    slope = torch.linalg.solve(centred.T @ centred + ridge * torch.eye(x.shape[1]), centred.T @ (y - y.mean(0)))
    return x.mean(0), y.mean(0), slope


def test_the_regression_is_the_textbooks_and_every_row_is_judged_by_the_others() -> None:
    """Features scaled to a mean square of 1; each row left out by a fit of its own, written out."""
    q, dense, sparse = wrong_by_query()
    dense = dense + torch.randn(dense.shape, generator=torch.Generator().manual_seed(2))  # which nothing predicts
    trusts = []
    rows = probe_rows(5, LAYOUT.visual, 14)
    mended, left, whole = repair(sparse, q, dense[..., rows, :], rows, slice(5, 131), ridge=0.5)
    for row in range(2):
        for head in range(2):
            o, query, exact = (x[row, head].double() for x in (sparse, q, dense))
            x = torch.cat([y / y[rows].square().mean().sqrt() for y in (o, query)], -1)
            residual = exact[rows] - o[rows]
            predicted = torch.zeros_like(residual)
            for place in range(14):
                others = torch.arange(14) != place
                x_mean, y_mean, slope = textbook(x[rows][others], residual[others], 0.5)
                predicted[place] = y_mean + (x[rows][place] - x_mean) @ slope
            trust = ((predicted * residual).sum() / predicted.square().sum()).clamp(0, 1)
            trusts.append(float(trust))
            x_mean, y_mean, slope = textbook(x[rows], residual, 0.5)
            expected = o + trust * (y_mean + (x - x_mean) @ slope)
            expected[rows] = exact[rows]
            torch.testing.assert_close(mended[row, head, 5:131].double(), expected[5:131], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(mended[row, head, :5], sparse[row, head, :5], atol=0, rtol=0)
            torch.testing.assert_close(mended[row, head, 131:], sparse[row, head, 131:], atol=0, rtol=0)
            torch.testing.assert_close(left[row, head].double(), (residual - trust * predicted).norm(), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(whole[row, head].double(), exact[rows].norm(), atol=1e-5, rtol=1e-5)
    assert any(0 < trust < 0.9 for trust in trusts), trusts


def test_the_estimate_is_near_to_the_error_of_all_rows() -> None:
    q, dense, sparse = wrong_by_query()
    rows = probe_rows(5, LAYOUT.visual, 60)
    mended, left, whole = repair(sparse, q, dense[..., rows, :], rows, slice(5, 131))
    others = torch.ones(LAYOUT.length, dtype=torch.bool).index_fill(0, rows, False)
    others[:5] = others[131:] = False
    true = (mended - dense)[..., others, :].norm(dim=(-2, -1)) / dense[..., others, :].norm(dim=(-2, -1))
    assert (true < 0.1 * (sparse - dense).norm() / dense.norm()).all(), "a linear error is found"
    assert ((left / whole / true).log().abs() < 0.5).all(), (left / whole, true)


def test_a_head_that_repair_would_harm_is_left_alone_but_for_its_probes() -> None:
    q, k, v = tensors()
    sparse = scaled_dot_product_attention(q, k, v)
    noise = torch.randn(sparse.shape, generator=torch.Generator().manual_seed(1))
    dense = torch.cat([(sparse + 0.3 * noise)[:, :1], (sparse + 0.3 * q)[:, 1:]], 1)  # nothing to learn in the first head
    rows = probe_rows(0, LAYOUT.length, 16)
    mended, left, _ = repair(sparse, q, dense[..., rows, :], rows)
    changed = (mended - sparse).index_fill(-2, rows, 0.0).norm(dim=(-2, -1))
    assert (changed[:, 0] < 0.1 * changed[:, 1]).all()
    as_it_is = (sparse - dense)[..., rows, :].norm(dim=(-2, -1))
    torch.testing.assert_close(left[:, 0], as_it_is[:, 0], atol=0, rtol=0.02)
    assert (left[:, 1] < 0.8 * as_it_is[:, 1]).all()
    assert torch.equal(mended[..., rows, :], dense[..., rows, :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("repair", ["output", "output_query"])
def test_a_patch_with_repair_is_nearer_to_dense(repair: str, masked: bool, dtype: torch.dtype) -> None:
    """Joint attention with text on both sides, a key mask, batch 2, an order by curve; text rows stay as they were."""
    q, k, v = (x.to(dtype) for x in tensors())
    k = k + 2 * q.roll(3, -2)  # something to look at
    mask = torch.ones(2, LAYOUT.length, dtype=torch.bool)
    mask[1, -2:] = not masked

    def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v, attn_mask: Tensor | None = mask[:, None, None]) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)

    call = AttentionCall(q, k, v, mask if masked else None, 0.5, dense)
    config = {"block": 8, "tau": 1.5, "order": "gilbert", "backend": "reference"}
    plain, mended = Sol(config), Sol({**config, "repair": repair, "probes": 40})
    outs = [patch.attend(call, patch.prepare(SITE, LAYOUT, Clock(0, 4), {})) for patch in (plain, mended)]
    errors = [float((out - dense()).float().norm()) for out in outs]
    assert errors[1] < 0.9 * errors[0]
    assert outs[1].dtype == dtype
    for text in (slice(0, 5), slice(131, None)):
        assert torch.equal(outs[0][..., text, :], outs[1][..., text, :])


def test_a_skipped_head_still_gives_nothing() -> None:
    q, k, v = tensors()
    call = AttentionCall(q, k, v, None, 0.5, lambda q, attn_mask: scaled_dot_product_attention(q, k, v, scale=0.5))
    patch = SparseVdit({"block": 8, "modes": "skip", "repair": "output_query", "probes": 40, "backend": "reference"})
    params: Any = patch.prepare(SITE, LAYOUT, Clock(0, 4), {})
    assert not patch.attend(call, params)[..., 5:131, :].any()


def test_probes_are_twice_as_many_as_features_and_never_half_of_the_rows() -> None:
    q, k, v = tensors()
    call = AttentionCall(q, k, v, None, 0.5, lambda: q)
    assert Neighborhood({"repair": "output_query", "probes": 64}).probed(LAYOUT, call) == 0, "more than half of 126"
    assert Neighborhood({"repair": "output", "probes": 0.01}).probed(LAYOUT, call) == 8
    assert Neighborhood({"repair": "output_query", "probes": 0.25}).probed(LAYOUT, call) == 32
    assert Neighborhood({"repair": "output", "probes": 1}).probed(LAYOUT, call) == 0, "one row says nothing of others"
    assert Neighborhood({}).probed(LAYOUT, call) == 0, "off, if it is not asked for"


def test_a_step_takes_the_rows_of_the_last_one_too() -> None:
    """As if they were rows of this one that weigh less, written out; within a step the first call's sums are those of all."""
    q, dense, sparse = wrong_by_query()
    memory, width = Memory(), 4
    rows = [probe_rows(5, LAYOUT.visual, 20, step=step) for step in range(2)]
    for step in range(2):
        memory.advance(step)
        exact = dense[..., rows[step], :]
        outs = [repair(sparse, q, exact, rows[step], slice(5, 131), carry=0.5, ticket=memory.ticket) for _ in range(2)]
        assert all(torch.equal(*both) for both in zip(*outs, strict=True)), "a call changes what the same call gives"
        alone = repair(sparse, q, exact, rows[step], slice(5, 131))[0]
        assert torch.equal(outs[0][0], alone) == (step == 0)
        assert memory.start is None, "the sums of two steps are held"
    o, query, exact = (x[1, 1].double() for x in (sparse, q, dense))
    size = torch.cat([y[rows[1]].square().mean().sqrt().expand(width) for y in (o, query)])
    both, weight = torch.cat(rows[::-1]), torch.tensor([1.0] * 20 + [0.5] * 20, dtype=torch.float64)[:, None]
    x, residual = torch.cat([o, query], -1) / size, exact - o
    x_mean, y_mean = ((weight * z[both]).sum(0) / weight.sum() for z in (x, residual))
    centred = weight * (x[both] - x_mean)
    slope = torch.linalg.solve(centred.T @ (x[both] - x_mean) + 5 * torch.eye(8), centred.T @ (residual[both] - y_mean))
    expected = o + y_mean + (x - x_mean) @ slope
    expected[rows[1]] = exact[rows[1]]
    torch.testing.assert_close(outs[0][0][1, 1, 5:131].double(), expected[5:131], atol=1e-5, rtol=1e-4)


def test_probes_move_from_step_to_step() -> None:
    rows = [set(probe_rows(0, 1000, 50, step=step).tolist()) for step in range(6)]
    assert len(set.union(*rows)) > 250


def test_a_memory_of_another_size_counts_for_nothing() -> None:
    q, dense, sparse = wrong_by_query()
    memory, rows = Memory(), probe_rows(5, LAYOUT.visual, 20)
    memory.advance(0)
    repair(sparse, q, dense[..., rows, :], rows, carry=0.5, ticket=memory.ticket)
    memory.advance(1)
    out, q, exact = (x[:1] for x in (sparse, q, dense[..., rows, :]))
    assert torch.equal(repair(out, q, exact, rows, carry=0.5, ticket=memory.ticket)[0], repair(out, q, exact, rows)[0])


def test_a_cuda_graph_that_is_captured_takes_nothing_from_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replay would take the same from the same step every time."""
    q, dense, sparse = wrong_by_query()
    memory, rows = Memory(), probe_rows(5, LAYOUT.visual, 20)
    for step in range(2):
        memory.advance(step)
        repair(sparse, q, dense[..., rows, :], rows, carry=0.5, ticket=memory.ticket)
    left = memory.end
    monkeypatch.setattr(kernels.memory, "capturing", lambda device: True)
    captured = repair(sparse, q, dense[..., rows, :], rows, carry=0.5, ticket=memory.ticket)
    assert torch.equal(captured[0], repair(sparse, q, dense[..., rows, :], rows)[0])
    assert memory.end is left
    assert step_of(q, memory.ticket) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_holds_no_copy_of_the_output(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 1 << 14)
    q, out, exact = (x.to(dtype) for x in tensors(4, 8192, 8, 1))
    rows = probe_rows(0, 8192, 32)
    probes = Probes(rows, exact[..., rows, :])
    assert peak(lambda: repair_(out, q, probes)) < 0.3 * out.nbytes


def test_heads_of_a_large_call_are_fitted_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, dense, sparse = wrong_by_query()
    found = []
    for piece in (None, 1):
        if piece is not None:
            monkeypatch.setattr(chunks, "CHUNK", piece)
        memory, outs = Memory(), list[torch.Tensor]()
        for step in range(2):
            memory.advance(step)
            rows = probe_rows(5, LAYOUT.visual, 20, step=step)
            outs += repair(sparse, q, dense[..., rows, :], rows, slice(5, 131), carry=0.5, ticket=memory.ticket)
        found.append(outs)
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole)
