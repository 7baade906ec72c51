"""Pyramid sparse attention: importance and levels stated a second time, and the cases in which means say everything."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.importance import sampled_importance, sampled_slots
from accelplug.patches.sparse.psa import PYRAMID, Psa
from accelplug.patches.sparse.template import Blocks


def psa(**config: Any) -> Psa:
    return Psa({"block": 8, **config})


def lengths_of(*lengths: int) -> torch.Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("block", [8, 32, 128])
def test_a_quarter_of_each_block_is_drawn_by_one_permutation(block: int) -> None:
    lengths = lengths_of(block, block, block - 1, 5, 1, 0, block)
    slots, drawn = sampled_slots(lengths, block)
    assert slots.shape == (7, block // 4)
    assert drawn.sum(-1).tolist() == [-(-n // 4) for n in lengths.tolist()]
    own = slots - torch.arange(7)[:, None] * block
    assert ((own >= 0) & (own < lengths[:, None].clamp(min=1)))[drawn].all()
    assert torch.equal(own[0], own[1])
    assert torch.equal(own[0], own[6])
    assert all(len(set(row[kept].tolist())) == int(kept.sum()) for row, kept in zip(own, drawn, strict=True))
    assert not torch.equal(sampled_slots(lengths, block, seed=1)[0], slots)


@pytest.mark.parametrize(("block", "block_k"), [(8, 8), (16, 8), (8, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_importance_is_the_largest_probability_among_samples(
    monkeypatch: pytest.MonkeyPatch, block: int, block_k: int, masked: bool
) -> None:
    monkeypatch.setattr("accelplug.kernels.importance.BUDGET", 600)  # several chunks of query blocks
    q_len = lengths_of(*[block] * (64 // block), 3)
    k_len = lengths_of(*[block_k] * (64 // block_k), 3)
    q, k = torch.randn(2, 4, len(q_len) * block, 16), torch.randn(2, 2, len(k_len) * block_k, 16)
    key_mask = torch.rand(2, k.shape[-2]) < 0.6 if masked else None
    if masked:
        key_mask[0, :block_k] = False
    found = sampled_importance(q, k, q_len, k_len, block, block_k, 0.5, key_mask, 7)
    (rows, row_drawn), (keys, key_drawn) = sampled_slots(q_len, block, 7), sampled_slots(k_len, block_k, 7)
    for b in range(2):
        for h in range(4):
            allowed = [
                [s for s in slots[drawn].tolist() if key_mask is None or key_mask[b, s]]
                for slots, drawn in zip(keys, key_drawn, strict=True)
            ]
            expected = torch.zeros(len(q_len), len(k_len), dtype=torch.float64)
            for m in range(len(q_len)):
                for i in rows[m][row_drawn[m]].tolist():
                    weight = {
                        s: math.exp(0.5 * q[b, h, i].double() @ k[b, h // 2, s].double()) for part in allowed for s in part
                    }
                    for j, part in enumerate(allowed):
                        if part:
                            largest = max(weight[s] for s in part) / sum(weight.values())
                            expected[m, j] = max(float(expected[m, j]), largest)
            torch.testing.assert_close(found[b, h].double(), expected, rtol=1e-4, atol=1e-7)
    if masked:
        assert not found[0, ..., 0].any()


def levels_by_hand(row: list[float], allowed: list[bool], config: Psa.Config) -> list[int]:
    """One row, one level after another, on exact binary fractions."""
    ranked = sorted((j for j in range(len(row)) if allowed[j]), key=lambda j: (-row[j], j))
    total, level, start = sum(row[j] for j in ranked), [0] * len(row), 0
    for h, bound in zip(PYRAMID, config.bounds, strict=True):
        if config.rule == "topk":
            end = math.floor(len(ranked) * bound + 1e-9)
            least = 1
        else:
            end = (
                sum(sum(row[j] for j in ranked[:r]) < bound * total for r in range(len(ranked)))
                if bound < 1
                else len(ranked)
            )
            least = math.floor(len(ranked) * config.least_exact + 1e-9) + 1
        end = max(start, min(len(ranked), max(end, least) if h == 1 else end))
        if config.tile:
            fill = math.ceil(h * config.tile / config.key_block)
            end = start + math.ceil((end - start) / fill) * fill
            if end >= len(ranked):
                end = start + (len(ranked) - start) // fill * fill
        for j in ranked[start:end]:
            level[j] = h
        start = end
    return level


CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"bounds": (0.5, 0.5, 0.75, 1.0)},
    {"bounds": (0.0, 0.25, 0.5, 0.75), "least_exact": 0.3},
    {"rule": "topk", "bounds": (0.05, 0.15, 0.25, 0.5)},
    {"rule": "topk", "bounds": (0.1, 0.15, 0.15, 0.35)},
    {"block_k": 32, "block": 128, "tile": 32},
    {"block_k": 32, "block": 128, "tile": 32, "rule": "topk", "bounds": (0.1, 0.15, 0.15, 1.0)},
    {"block_k": 64, "block": 128, "tile": 32, "bounds": (0.25, 0.5, 0.75, 1.0)},
    {"block_k": 128, "block": 128, "tile": 32, "bounds": (0.25, 0.5, 0.75, 1.0)},
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("number", [6, 40])
def test_levels_equal_the_rules_stated_row_by_row(config: dict[str, Any], number: int) -> None:
    patch = psa(**config)
    generator = torch.Generator().manual_seed(number)
    importance = torch.randint(0, 17, (2, 2, 5, number), generator=generator).float() / 16  # ties, and exact sums
    candidates = torch.rand(2, 1, number, generator=generator) < 0.8
    level = patch.levels(importance, candidates)
    for row, allowed, mine in zip(
        importance.flatten(0, 2),
        candidates[:, :, None].expand_as(importance).flatten(0, 2),
        level.flatten(0, 2),
        strict=True,
    ):
        assert mine.tolist() == levels_by_hand(row.tolist(), allowed.tolist(), patch.config)
    if not config.get("tile"):
        assert (level == 1).any(-1).all(), "a row without an exact block"


def test_a_row_of_equal_importance_shares_its_ranks_out_by_the_bounds() -> None:
    importance, candidates = torch.ones(1, 1, 1, 100), torch.ones(1, 1, 100, dtype=torch.bool)
    level = psa(bounds=(0.4, 0.5, 0.6, 0.8)).levels(importance, candidates)
    assert [int((level == h).sum()) for h in (1, 2, 4, 8, 0)] == [40, 10, 10, 20, 20]
    level = psa(rule="topk", bounds=(0.05, 0.15, 0.25, 0.5)).levels(importance, candidates)
    assert [int((level == h).sum()) for h in (1, 2, 4, 8, 0)] == [5, 10, 10, 25, 50]
    concentrated = torch.tensor([1.0] + [1e-6] * 99).view(1, 1, 1, 100)
    level = psa(bounds=(0.4, 0.4, 0.4, 0.4)).levels(concentrated, candidates)
    assert int((level == 1).sum()) == 7  # one would do for the bound; 6 % and one more are read


SITE = Site("blocks.1.attn1", "transformer", "self", 1, 4)


def attend(patch: Psa, layout: Layout, q: Tensor, k: Tensor, v: Tensor, scale: float = 0.25) -> Tensor:
    params = patch.prepare(SITE, layout, Clock(), {})
    return patch.attend(AttentionCall(q, k, v, None, scale, dense=lambda **_: pytest.fail("ran dense")), params)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.25) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


LAYOUTS = (Layout((3, 4, 8)), Layout((3, 5, 7)), Layout((3, 5, 7), 0, 9))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("config", [{"least_exact": 1.0}, {"rule": "topk", "bounds": (1.0, 1.0, 1.0, 1.0)}], ids=str)
def test_every_block_at_level_one_is_dense(layout: Layout, config: dict[str, Any]) -> None:
    patch = psa(**config, backend="reference")
    q, k, v = torch.randn(3, 2, 2, layout.length, 16)
    patch.neutral = lambda layout: False  # through the kernel all the same
    torch.testing.assert_close(attend(patch, layout, q, k, v), dense(q, k, v), rtol=1e-4, atol=1e-5)
    assert psa(bounds=(1.0, 1.0, 1.0, 1.0)).prepare(SITE, layout, Clock(), {}) is None


@pytest.mark.parametrize("h", [2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_level_is_exact_where_so_many_keys_are_equal(layout: Layout, h: int) -> None:
    """One block in six is exact, all others are read at level h; the visual tail may be short."""
    patch = psa(rule="topk", bounds=[0.17 if level < h else 1.0 for level in PYRAMID], backend="reference")
    q, k, v = torch.randn(3, 1, 2, layout.length, 16)
    visual = layout.visual
    for x in (k, v):
        x[..., :visual, :] = x[..., 0:visual:h, :].repeat_interleave(h, -2)[..., :visual, :]
    params = patch.prepare(SITE, layout, Clock(), {})
    _, plan = patch.inspect(AttentionCall(q, k, v, None, 0.25, dense=lambda **_: None), params)
    assert set(plan.level.unique().tolist()) == {0, h}
    torch.testing.assert_close(attend(patch, layout, q, k, v), dense(q, k, v), rtol=1e-4, atol=1e-5)
    other = attend(patch, layout, q, k + torch.randn_like(k), v)
    assert float((other - dense(q, k, v)).abs().max()) > 0.05


def test_coarser_levels_cost_less() -> None:
    layout = Layout((4, 8, 8))
    q, k, v = torch.randn(3, 1, 2, 256, 16)
    call = AttentionCall(q, k, v, None, 0.25, dense=lambda **_: None)
    patch = psa(rule="topk", bounds=(0.125, 0.25, 0.5, 1.0))
    cost, plan = patch.inspect(call, patch.prepare(SITE, layout, Clock(), {}))
    assert cost == pytest.approx(0.125 + 0.125 / 2 + 0.25 / 4 + 0.5 / 8)
    assert float(plan.members.double().mean()) == 0.125


def test_similarity_lets_only_alike_keys_be_averaged() -> None:
    layout = Layout((2, 4, 8))  # eight blocks of eight
    q, v = torch.randn(2, 1, 1, 64, 16)
    base = torch.randn(8, 1, 16)
    k = base.expand(8, 8, 16).clone()
    k[1] = torch.randn(8, 16)  # no two alike
    k[2, ::2], k[2, 1::2] = base[2, 0], -base[2, 0]  # opposite within pairs, and so first and last of every group
    k[3, 4:] = -base[3, 0]  # alike in pairs and fours, not in eights
    k[4, 2:4], k[4, 6:] = -base[4, 0], -base[4, 0]  # alike in pairs only
    patch = psa(rule="topk", bounds=(0.0, 0.0, 0.0, 1.0), similarity=(0.7, 0.65, 0.6))
    params = patch.prepare(SITE, layout, Clock(), {})
    blocks = Blocks.of(
        AttentionCall(q, k.view(1, 1, 64, 16), v, None, 0.25, dense=lambda **_: None), params.tiles, params.tiles, 8, 8
    )
    assert patch.coarsest(blocks)[0, 0].tolist() == [8, 1, 1, 4, 2, 8, 8, 8]
    plan = patch.route(blocks)
    exact = plan.members[0, 0]
    assert exact[:, 1:3].all()
    assert ((plan.level[0, 0, :, 3] == 4) | exact[:, 3]).all()
    assert exact.sum() == 8 * 2 + (exact[:, [0, 3, 4, 5, 6, 7]]).sum()


def test_a_short_tail_without_a_pair_is_read_exactly() -> None:
    layout = Layout((1, 5, 5))  # the fourth block holds one key
    q, k, v = torch.ones(3, 1, 1, 25, 16)
    patch = psa(rule="topk", bounds=(0.0, 0.0, 0.0, 1.0), similarity=(0.7, 0.65, 0.6))
    params = patch.prepare(SITE, layout, Clock(), {})
    blocks = Blocks.of(AttentionCall(q, k, v, None, 0.25, dense=lambda **_: None), params.tiles, params.tiles, 8, 8)
    assert patch.coarsest(blocks)[0, 0].tolist() == [8, 8, 8, 1]


def test_batches_do_not_mix_and_grouped_queries_read_their_groups_keys() -> None:
    layout = Layout((3, 5, 7), 2, 3)
    q, k, v = torch.randn(3, 4, layout.length, 16), *torch.randn(2, 3, 2, layout.length, 16)
    patch = psa(backend="reference", similarity=(0.0, 0.0, 0.0))
    together = attend(patch, layout, q, k, v)
    alone = torch.cat([attend(patch, layout, q[b : b + 1], k[b : b + 1], v[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(together, alone)
    repeated = attend(patch, layout, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(together, repeated)


def test_route_is_traced_without_a_graph_break() -> None:
    layout, patch = Layout((3, 5, 7), 0, 4), psa(similarity=(0.1, 0.1, 0.1), tile=16)
    params = patch.prepare(SITE, layout, Clock(), {})
    q, k, v = torch.randn(3, 1, 2, layout.length, 16)

    def level(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = AttentionCall(q, k, v, None, 0.25, dense=lambda **_: None)
        return patch.route(Blocks.of(call, params.tiles, params.tiles, 8, 8)).level

    assert torch.equal(torch.compile(level, backend="eager", fullgraph=True)(q, k, v), level(q, k, v))


@pytest.mark.parametrize(("block", "block_k"), [(16, 8), (8, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_block_without_tokens_at_the_end_of_an_order_that_moves_none(block: int, block_k: int, masked: bool) -> None:
    """20 tokens in blocks of 16 and 8: a plan counts a fourth block of 8, and raster leaves no slot there."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 4, generator=g) for _ in range(3))
    mask = torch.rand(1, 20, generator=g) < 0.7 if masked else None
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
    call = AttentionCall(q, k, v, mask, 0.5, lambda: exact)
    layout, bounds = Layout((1, 4, 5)), (1.0, 1.0, 1.0, 1.0)
    outs = []
    for order in ("raster", "morton"):
        patch = Psa({"block": block, "block_k": block_k, "order": order, "bounds": bounds, "rest": "drop"})
        outs.append(patch.attend(call, patch.params(layout)))
    assert torch.allclose(outs[1], exact, atol=1e-5)
    assert torch.allclose(outs[0], exact, atol=1e-5)
