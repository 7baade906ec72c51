"""Probe repair: the regression is the textbook's, it judges itself, and it touches nothing that is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.repair import HELD_BACK, probe_rows, repair
from accelplug.patches.sparse.neighborhood import Neighborhood
from accelplug.patches.sparse.sol import Sol
from accelplug.patches.sparse.sparse_vdit import SparseVdit

LAYOUT = Layout((3, 6, 7), text_before=5, text_after=3)
SITE = Site("block", "transformer", "joint", 1, 4)


def tensors(heads: int = 2, tokens: int = LAYOUT.length, width: int = 4, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(3))
    return q, k, v


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


def test_probes_of_a_grid_are_not_all_of_one_column() -> None:
    assert len((probe_rows(0, 12 * 16, 12) % 16).unique()) > 6


def test_the_regression_is_the_textbooks() -> None:
    """Centred ridge regression on both features, scaled to a mean square of 1, in float64, written out."""
    q, dense, sparse = wrong_by_query()
    rows = probe_rows(5, LAYOUT.visual, 40)
    mended, _, _ = repair(sparse, q, dense[..., rows, :], rows, slice(5, 131), ridge=3.0)
    for row in range(2):
        for head in range(2):
            o, query, exact = (x[row, head].double() for x in (sparse, q, dense))
            x = torch.cat([y / y[rows].square().mean().sqrt() for y in (o, query)], -1)
            mean, residual = x[rows].mean(0), exact[rows] - o[rows]
            centred = x[rows] - mean
            slope = torch.linalg.solve(centred.T @ centred + 3 * torch.eye(8), centred.T @ (residual - residual.mean(0)))
            expected = o + residual.mean(0) + (x - mean) @ slope
            expected[rows] = exact[rows]
            torch.testing.assert_close(mended[row, head, 5:131].double(), expected[5:131], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(mended[row, head, :5], sparse[row, head, :5], atol=0, rtol=0)
            torch.testing.assert_close(mended[row, head, 131:], sparse[row, head, 131:], atol=0, rtol=0)


def test_the_estimate_is_the_error_of_rows_that_were_held_back() -> None:
    q, dense, sparse = wrong_by_query()
    rows = probe_rows(5, LAYOUT.visual, 60)
    mended, error, whole = repair(sparse, q, dense[..., rows, :], rows, slice(5, 131))
    estimate = error / whole
    left = (mended - dense)[..., 5:131, :].norm(dim=(-2, -1)) / dense[..., 5:131, :].norm(dim=(-2, -1))
    assert (left < 0.1 * (sparse - dense).norm() / dense.norm()).all(), "a linear error is found"
    assert ((estimate / left).log().abs() < 1.5).all(), (estimate, left)


def test_a_head_that_repair_would_harm_is_left_alone_but_for_its_probes() -> None:
    q, k, v = tensors()
    sparse = scaled_dot_product_attention(q, k, v)
    noise = torch.randn(sparse.shape, generator=torch.Generator().manual_seed(1))
    dense = torch.cat([(sparse + 0.3 * noise)[:, :1], (sparse + 0.3 * q)[:, 1:]], 1)  # nothing to learn in the first head
    rows = probe_rows(0, LAYOUT.length, 16)
    mended, error, whole = repair(sparse, q, dense[..., rows, :], rows)
    estimate = error / whole
    others = torch.ones(LAYOUT.length, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(mended[:, 0, others], sparse[:, 0, others])
    assert not torch.equal(mended[:, 1, others], sparse[:, 1, others])
    held = rows[::HELD_BACK]
    as_it_is = (sparse - dense)[:, 0, held].norm(dim=(-2, -1)) / dense[:, 0, held].norm(dim=(-2, -1))
    torch.testing.assert_close(estimate[:, 0], as_it_is)
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
    assert Neighborhood({}).probed(LAYOUT, call) == 0, "off, if it is not asked for"
