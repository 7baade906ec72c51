"""Hierarchical attention: the formula by hand in float64, and the theorem that it is as near to softmax as its tie allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.patches.sparse.hierarchical import Hierarchical

SITE = Site("blocks.1.attn1", "transformer", "self", 1, 4)
SCALE = 0.4


def attend(layout: Layout, q: Tensor, k: Tensor, v: Tensor, **config: Any) -> Tensor:
    patch = Hierarchical({"block": 8, "backend": "reference", **config})
    params = patch.prepare(SITE, layout, Clock(), {})
    return patch.attend(AttentionCall(q, k, v, None, SCALE, dense=lambda **_: pytest.fail("ran dense")), params)


def attention_map(layout: Layout, q: Tensor, k: Tensor, **config: Any) -> Tensor:
    """What the patch does to values is linear: the values of the identity show it, float64 (S, S)."""
    identity = torch.eye(layout.length).expand(*q.shape[:2], -1, -1)
    return attend(layout, q, k, identity, **config)[0, 0].double()


def visual_blocks(layout: Layout, block: int = 8) -> list[list[int]]:
    first, last = layout.text_before, layout.text_before + layout.visual
    return [list(range(start, min(start + block, last))) for start in range(first, last, block)]


def by_hand(layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head, (S, D), raster order: float64, one block after another."""
    q, k, v = q.double(), k.double(), v.double()
    logits = SCALE * q @ k.T
    out = logits.softmax(-1) @ v  # text rows
    blocks = visual_blocks(layout)
    text = [token for token in range(layout.length) if not any(token in block for block in blocks)]
    for own in blocks:
        near = own + text
        others = [block for block in blocks if block is not own]
        exact = logits[own][:, near]
        a = exact.logsumexp(-1).mean()
        b = torch.stack([SCALE * q[own].mean(0) @ k[c].mean(0) + torch.tensor(float(len(c))).log() for c in others])
        share = torch.cat([a[None], b]).softmax(0)
        far = share[1:] @ torch.stack([v[c].mean(0) for c in others])
        out[own] = share[0] * (exact.softmax(-1) @ v[near]) + far
    return out


LAYOUTS = (Layout((2, 4, 6)), Layout((3, 5, 5)), Layout((3, 5, 5), 0, 9))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_the_formula_stated_block_by_block(layout: Layout) -> None:
    q, k, v = torch.randn(3, 2, 2, layout.length, 16)
    out = attend(layout, q, k, v)
    for b in range(2):
        for h in range(2):
            torch.testing.assert_close(out[b, h].double(), by_hand(layout, q[b, h], k[b, h], v[b, h]), rtol=1e-4, atol=1e-6)


def divergence(theta: Tensor, p: Tensor) -> Tensor:
    """Sum over rows of KL(theta || p), where theta may hold zeros."""
    return (theta * (theta.clamp(min=1e-300).log() - p.log())).sum()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_map_that_is_constant_on_pairs_of_blocks_is_nearer_to_softmax(layout: Layout) -> None:
    q, k = torch.randn(2, 1, 1, layout.length, 16)
    softmax = (SCALE * q[0, 0].double() @ k[0, 0].double().T).softmax(-1)
    ours = attention_map(layout, q, k)
    torch.testing.assert_close(ours.sum(-1), torch.ones(layout.length, dtype=torch.float64), rtol=1e-5, atol=0)
    blocks = visual_blocks(layout)
    best, generator = divergence(ours, softmax), torch.Generator().manual_seed(1)
    for trial in range(200):
        size = 10.0 ** -(trial % 4)
        other = torch.empty_like(ours)
        noise = torch.randn(layout.length, layout.length, generator=generator, dtype=torch.float64)
        other[:] = ours * (size * noise).exp()  # within what a row reads exactly, rows may differ
        for own in blocks:
            for far in (block for block in blocks if block is not own):
                rows, columns = torch.tensor(own)[:, None], torch.tensor(far)
                other[rows, columns] = ours[rows, columns] * (size * noise[own[0], far[0]]).exp()  # one factor for the pair
            # Rows of a block must share the mass that stays exact, so the rows' exact parts are brought to one sum.
            near = torch.ones(layout.length, dtype=torch.bool)
            near[torch.tensor([token for block in blocks if block is not own for token in block])] = False
            exact = other[torch.tensor(own)][:, near]
            kept = ours[own[0], near].sum() * (size * noise[own[0], own[0]]).exp()
            part = other[torch.tensor(own)]
            part[:, near] = exact / exact.sum(-1, keepdim=True) * kept
            other[torch.tensor(own)] = part
        other = other / other.sum(-1, keepdim=True)
        assert divergence(other, softmax) > best


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_tie_never_brings_it_nearer_than_pooling_row_by_row(layout: Layout) -> None:
    q, k = torch.randn(2, 1, 1, layout.length, 16)
    softmax = (SCALE * q[0, 0].double() @ k[0, 0].double().T).softmax(-1)
    tied, pooled = (divergence(attention_map(layout, q, k, rest=rest), softmax) for rest in ("tied", "pool"))
    assert 0 < pooled < tied


def test_blocks_of_equal_queries_and_keys_are_exact() -> None:
    layout = Layout((3, 4, 4))
    q, k = torch.randn(2, 1, 2, 6, 16).repeat_interleave(8, -2)
    v = torch.randn(1, 2, 48, 16)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)
    torch.testing.assert_close(attend(layout, q, k, v), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("block", "block_k"), [(8, None), (16, 8), (8, 16)])
def test_a_block_reads_the_keys_of_its_own_slots(block: int, block_k: int | None) -> None:
    patch = Hierarchical({"block": block, "block_k": block_k})
    plan = patch.prepare(SITE, Layout((3, 4, 8)), Clock(), {}).plan
    own = torch.arange(96)
    reads = plan.dense_mask()[0, 0]
    assert reads.any(-1).all()
    size = max(block, block_k or block)
    assert torch.equal(reads, (own[:, None] // size) == (own // size))
    assert reads.diagonal().all()
    assert float(plan.density()) == pytest.approx(size / 96)


def test_full_band_and_one_block_are_neutral() -> None:
    layout = Layout((3, 4, 4))
    assert Hierarchical({"block": 8, "band": "full"}).prepare(SITE, layout, Clock(), {}) is None
    assert Hierarchical({"block": 48}).prepare(SITE, layout, Clock(), {}) is None
    q, k, v = torch.randn(3, 1, 2, 48, 16)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)
    torch.testing.assert_close(attend(layout, q, k, v, band=6), dense, rtol=1e-4, atol=1e-5)
    assert float((attend(layout, q, k, v) - dense).abs().max()) > 1e-3
