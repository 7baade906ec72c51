"""SVG-EAR: the error of pooling stated a second time key by key in float64, and the routing by it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels import chunks
from accelplug.kernels.compensation import compensation_error
from accelplug.patches.sparse.svg_ear import SvgEar
from accelplug.patches.sparse.template import Blocks

SITE = Site("blocks.1.attn1", "transformer", "self", 1, 4)


def error_by_keys(
    q_pool: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    block: int,
    scale: float,
    valid: torch.Tensor,
) -> torch.Tensor:
    """One head, float64, one key at a time; rows over their squared softmax sum."""
    q_pool, k, v = q_pool.double(), k.double(), v.double()
    keys = [[i for i in range(n * block, n * block + int(size)) if valid[i]] for n, size in enumerate(lengths)]
    error = torch.zeros(len(q_pool), len(lengths), dtype=torch.float64)
    for m, q in enumerate(q_pool):
        weight = [float((scale * q @ k[i]).exp()) for i in range(len(k))]
        total = sum(weight[i] for own in keys for i in own)
        for n, own in ((n, own) for n, own in enumerate(keys) if own):
            mean = (scale * q @ k[own].mean(0)).exp() * v[own].mean(0)
            error[m, n] = sum(float((mean - weight[i] * v[i]).square().sum()) for i in own) / len(own) / total**2
    return error


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [chunks.CHUNK, 1])
@pytest.mark.parametrize("shift", [0.0, 60.0])  # logits that overflow exp in float32
def test_the_error_is_the_formula_stated_key_by_key(
    masked: bool, chunk: int, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    lengths = torch.tensor([8, 8, 5, 8, 3], dtype=torch.int32)
    q_pool, k, v = torch.randn(2, 4, 3, 6), torch.randn(2, 2, 40, 6), torch.randn(2, 2, 40, 4)
    q_pool[..., 0], k[..., 0] = 1.0, k[..., 0] * 0.1 + shift * 2
    valid = torch.rand(2, 40) < 0.7 if masked else torch.ones(2, 40, dtype=torch.bool)
    valid[:, 24:32] &= not masked  # a block without a key
    error = compensation_error(q_pool, k, v, lengths, 8, 0.7, valid if masked else None)
    for b in range(2):
        for h in range(4):
            expected = error_by_keys(q_pool[b, h], k[b, h // 2], v[b, h // 2], lengths, 8, 0.7, valid[b])
            torch.testing.assert_close(error[b, h].double(), expected, rtol=1e-3, atol=1e-8)
    assert (error >= 0).all()


def test_equal_keys_and_values_cost_nothing_to_pool() -> None:
    key, value = torch.randn(2, 1, 2, 5, 1, 4)
    k, v = (x.expand(1, 2, 5, 8, 4).flatten(2, 3).clone() for x in (key, value))
    k[:, :, 16:24] += torch.randn(1, 2, 8, 4)
    lengths = torch.full((5,), 8, dtype=torch.int32)
    error = compensation_error(torch.randn(1, 2, 3, 4), k, v, lengths, 8, 0.5, None)
    others = [0, 1, 3, 4]
    assert (error[..., 2] > 1e-5).all()
    assert (error[..., others] < 1e-9).all()


def blocks_of(layout: Layout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **config: Any) -> tuple[SvgEar, Blocks]:
    patch = SvgEar({"block": 8, "block_k": 8, "order": "raster", "backend": "reference", **config})
    call = AttentionCall(q, k, v, None, 0.5, dense=None)
    params = patch.prepare(SITE, layout, Clock(0, 2), {})
    return patch, Blocks.of(call, *patch.arrange(call, params), 8, 8)


def members_by_hand(blocks: Blocks, top_p: float, min_ratio: float) -> torch.Tensor:
    """The released rule, one row of 14 visual blocks at a time, float64: attention to means says how much, error says what."""
    error = compensation_error(blocks.q_pool, blocks.k, blocks.v, blocks.key_lengths, 8, 0.5, None)[..., :14, :14].double()
    keys = blocks.key_lengths[:14].double()
    logits = 0.5 * blocks.q_pool.double()[..., :14, :] @ blocks.k_pool.double()[..., :14, :].mT
    mass = (logits + keys.log()).softmax(-1)
    members = torch.zeros(error.shape, dtype=torch.bool)
    for row in itertools.product(*map(range, error.shape[:-1])):
        ranked = mass[row].argsort(descending=True).tolist()
        likeliest = [j for n, j in enumerate(ranked) if n < int(28 * min_ratio) or sum(mass[row][ranked[:n]]) < top_p]
        read = ranked[: max(1, int(14 * min_ratio))] if min_ratio else []
        budget = float(keys[likeliest].sum() - keys[read].sum())
        for j in error[row].argsort(descending=True).tolist():
            if j not in read and budget > 0:
                read.append(j)
                budget -= float(keys[j])
        members[row][read] = True
    return members


@pytest.mark.parametrize(("top_p", "min_ratio"), [(0.6, 0.0), (0.9, 0.1), (0.3, 0.2), (0.0, 0.25)])
def test_attention_to_means_says_how_much_a_row_reads_and_the_error_says_what(top_p: float, min_ratio: float) -> None:
    layout = Layout((3, 5, 7), 0, 4)
    q, k, v = 2 * torch.randn(3, 2, 2, layout.length, 8)
    patch, blocks = blocks_of(layout, q, k, v, top_p=top_p, min_ratio=min_ratio)
    members = patch.route(blocks).members[..., :14, :14]  # 105 visual tokens in 14 blocks, text in one
    assert torch.equal(members, members_by_hand(blocks, top_p, min_ratio))
    assert 0.05 < float(members.float().mean()) < 1


@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 0.25, 0.5])
def test_every_row_reads_twice_its_least_and_text(min_ratio: float) -> None:
    layout = Layout((3, 5, 7), 3, 4)
    q, k, v = torch.randn(3, 1, 2, layout.length, 8)
    patch, blocks = blocks_of(layout, q, k, v, top_p=0.0, min_ratio=min_ratio)
    members = patch.route(blocks).members
    assert members[..., 14:, :].all()
    assert members[..., 14:].all()
    read, short = members[..., :14, :14].sum(-1), members[..., :14, 13]  # the last block has one key: it buys no other
    wanted = {0.0: 1, 0.1: 2, 0.25: 7, 0.5: 14}[min_ratio]
    assert ((read == wanted) | (short & (read == min(wanted + 1, 14)))).all()


def test_a_budget_goes_to_the_worst_pairs_of_a_head() -> None:
    layout = Layout((4, 8, 8))
    q, k, v = 2 * torch.randn(3, 1, 2, 256, 8)
    patch, blocks = blocks_of(layout, q, k, v, density=0.25, min_ratio=0.05)
    members = patch.route(blocks).members
    error = compensation_error(blocks.q_pool, blocks.k, blocks.v, blocks.key_lengths, 8, 0.5, None)
    assert (members.sum((-2, -1)) == 256).all()  # a quarter of 32 x 32
    likeliest = (blocks.q_pool @ blocks.k_pool.mT).topk(1, -1).indices  # one in 32: blocks of equal length
    forced = torch.zeros_like(members).scatter(-1, likeliest, True)
    assert (members & forced).sum() == forced.sum()
    chosen, left = error.masked_fill(~members | forced, torch.inf), error.masked_fill(members, -1)
    assert (chosen.amin((-2, -1)) >= left.amax((-2, -1))).all()


def test_reading_the_worst_beats_reading_the_likeliest() -> None:
    """Blocks of equal keys score highest here, and cost nothing to pool."""
    torch.manual_seed(1)
    layout = Layout((4, 8, 8))
    q, k, v = torch.randn(3, 1, 2, 256, 8)
    k[..., :128, :] = q.mean(-2, keepdim=True) * 30
    v[..., :128, :] = v[..., :1, :]
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    patch, blocks = blocks_of(layout, q, k, v, density=0.25)
    out = patch.attend(AttentionCall(q, k, v, None, 0.5, dense=None), patch.prepare(SITE, layout, Clock(0, 2), {}))
    members = patch.route(blocks).members
    assert members[..., 16:].float().mean() > 0.3
    score = (blocks.q_pool @ blocks.k_pool.transpose(-1, -2)).topk(8, -1).indices
    likeliest = blocks.plan(torch.zeros_like(members).scatter(-1, score, True))
    from accelplug.kernels.attention import block_attention
    from accelplug.kernels.rest import Pool

    other = block_attention(q, k, v, likeliest, rest=Pool(), scale=0.5, backend="reference")
    assert (out - exact).square().mean() < 0.8 * (other - exact).square().mean()


def test_neutral_and_batches() -> None:
    layout = Layout((3, 5, 7))
    assert SvgEar({"top_p": 1.0}).prepare(SITE, layout, Clock(), {}) is None
    assert SvgEar({"density": 1.0}).prepare(SITE, layout, Clock(), {}) is None
    q, k, v = torch.randn(3, 3, 2, layout.length, 8)
    patch = SvgEar({"block": 8, "block_k": 8, "backend": "reference", "top_p": 0.5})

    def run(rows: slice) -> torch.Tensor:
        call = AttentionCall(q[rows], k[rows], v[rows], None, 0.5, dense=None)
        return patch.attend(call, patch.prepare(SITE, layout, Clock(0, 2), {}))

    apart = torch.cat([run(slice(b, b + 1)) for b in range(3)])
    torch.testing.assert_close(run(slice(None)), apart)
