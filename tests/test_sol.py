"""Sol attention: the threshold stated a second time block by block, and the share of blocks it reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.curves import morton
from accelplug.kernels.orders import Tiles, tiles
from accelplug.kernels.plan import BlockPlan, Threshold
from accelplug.patches.sparse.sol import Sol
from accelplug.patches.sparse.template import Blocks

SITE = Site("blocks.1.attn1", "transformer", "self", 1, 4)


def plan_of(
    layout: Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    scale: float = 0.25,
    **config: Any,
) -> BlockPlan:
    """Select on q (B, H, S, D) and k (B, H_kv, S, D), tokens in raster order."""
    sol = Sol({"block": 8, **config})
    blocks = blocks_of(q, k, sol.order(layout), key_mask, scale)
    plan = sol.route(blocks)
    return plan if isinstance(plan, BlockPlan) else plan.lower(blocks.q_pool, blocks.k_pool, scale)


def blocks_of(
    q: torch.Tensor, k: torch.Tensor, laid: Tiles, key_mask: torch.Tensor | None = None, scale: float = 0.25, block: int = 8
) -> Blocks:
    return Blocks.of(AttentionCall(q, k, k, key_mask, scale, lambda: q), laid, laid, block, block)


def members_by_blocks(
    layout: Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    tau: float,
    statistic: str,
    scale: float = 0.25,
    band: int = 1,
    block: int = 8,
) -> torch.Tensor:
    """The rule for one head, q and k (S, D), text behind the visual tokens: float64, one block at a time."""
    starts = [*range(0, layout.visual, block), *range(layout.visual, layout.length, block)]
    ends = [min(s + block, layout.visual if s < layout.visual else layout.length) for s in starts]
    visual = [s < layout.visual for s in starts]
    q_mean, k_mean = ([x[s:e].double().mean(0) for s, e in zip(starts, ends, strict=True)] for x in (q, k))
    candidates = torch.stack([x for x, is_visual in zip(k_mean, visual, strict=True) if is_visual])
    members = torch.ones(len(starts), len(starts), dtype=torch.bool)
    for m, n in ((m, n) for m in range(len(starts)) for n in range(len(starts)) if visual[m] and visual[n]):
        a = scale / math.log(2)
        if statistic == "diag":
            spread = (q_mean[m] ** 2 * candidates.var(0, correction=0)).sum()
        else:
            spread = (candidates @ q_mean[m]).var(correction=0)
        theta = a * q_mean[m] @ candidates.mean(0) + tau * (a**2 * spread + 1e-6).sqrt()
        members[m, n] = bool(a * q_mean[m] @ k_mean[n] > theta) or abs(m - n) <= band
    return members


@pytest.mark.parametrize("statistic", ["diag", "exact"])
@pytest.mark.parametrize("layout", [Layout((3, 5, 7)), Layout((3, 5, 7), 0, 11), Layout((1, 11, 11), 0, 8)], ids=str)
def test_equals_the_rule_stated_block_by_block(layout: Layout, statistic: str) -> None:
    q, k = torch.randn(2, 1, 1, layout.length, 16)
    k = k + torch.randn(16)  # a mean to subtract
    k[..., layout.visual :, :] += 5  # text keys far away must not move the threshold
    plan = plan_of(layout, q, k, tau=0.6, statistic=statistic)
    assert torch.equal(plan.members[0, 0], members_by_blocks(layout, q[0, 0], k[0, 0], 0.6, statistic))


def parts_of(x: torch.Tensor, layout: Layout, block: int = 8) -> list[list[torch.Tensor]]:
    """Means of the quarters of each block of x (S, D) that hold a token, text behind the visual tokens: float64."""
    starts = [*range(0, layout.visual, block), *range(layout.visual, layout.length, block)]
    found = []
    for start in starts:
        end = min(start + block, layout.visual if start < layout.visual else layout.length)
        quarters = [x[s : min(s + block // 4, end)] for s in range(start, end, block // 4)]
        found.append([quarter.double().mean(0) for quarter in quarters])
    return found


def scores_by_parts(layout: Layout, q: torch.Tensor, k: torch.Tensor, scale: float = 0.25) -> torch.Tensor:
    """The log of the sum over pairs of parts, q and k (S, D), one pair of blocks at a time: float64 (M, N)."""
    rows, columns = parts_of(q, layout), parts_of(k, layout)
    return torch.stack(
        [
            torch.stack([torch.stack([scale * a @ b for a in row for b in column]).logsumexp(0) for column in columns])
            for row in rows
        ]
    )


@pytest.mark.parametrize("layout", [Layout((3, 5, 7)), Layout((3, 5, 7), 0, 11), Layout((1, 11, 11), 0, 8)], ids=str)
def test_sub_blocks_equal_the_rule_stated_block_by_block(layout: Layout) -> None:
    q, k = torch.randn(2, 1, 1, layout.length, 16)
    k[..., layout.visual :, :] += 5  # text keys far away must not move the threshold
    score, visual = scores_by_parts(layout, q[0, 0], k[0, 0]), -(-layout.visual // 8)
    laid = tiles(layout, "raster", 8)
    got = Sol({"block": 8, "statistic": "subblock"}).scores(blocks_of(q, k, laid)) * math.log(2)
    torch.testing.assert_close(got[0, 0].double(), score, rtol=1e-5, atol=1e-5)
    of_visual = score[:, :visual]
    theta = of_visual.mean(-1) + 0.6 * (of_visual.var(-1, correction=0)).sqrt()
    expected = score > theta[:, None]
    at = torch.arange(len(score))
    expected |= ((at[:, None] - at).abs() <= 1) | (at >= visual) | (at >= visual)[:, None]
    assert torch.equal(plan_of(layout, q, k, tau=0.6, statistic="subblock").members[0, 0], expected)


def test_sub_blocks_see_a_part_that_stands_out_where_means_do_not() -> None:
    layout = Layout((1, 8, 8))
    q, k = torch.full((1, 1, 64, 4), 2.0), 0.01 * torch.randn(1, 1, 64, 4)
    k[..., 40:42, :] = 9.0  # a quarter of block 5, made up for by the others
    k[..., 42:48, :] = -3.0
    means, parts = (
        plan_of(layout, q, k, tau=1.5, band=0, statistic=statistic).members[0, 0] for statistic in ("diag", "subblock")
    )
    assert not means[:5, 5].any()
    assert parts[:, 5].all()
    assert int(parts.sum()) == 8 + 7  # it, and each row's own


def test_sub_blocks_of_equal_keys_are_means() -> None:
    """Parts alike: the score is that of means and log 16, so both read the same."""
    layout = Layout((3, 4, 8))
    q, k = (torch.randn(1, 2, 12, 16).repeat_interleave(8, -2) for _ in range(2))
    means = plan_of(layout, q, k, tau=0.7, statistic="exact").members
    assert torch.equal(plan_of(layout, q, k, tau=0.7, statistic="subblock").members, means)


def test_a_part_whose_keys_are_all_masked_takes_no_part() -> None:
    layout, laid = Layout((2, 4, 8)), tiles(Layout((2, 4, 8)), "raster", 8)
    q, k = torch.randn(2, 1, 2, 64, 16)
    key_mask = torch.ones(1, 64, dtype=torch.bool)
    key_mask[:, 2:4] = key_mask[:, 32:] = False
    other = torch.where(key_mask[:, None, :, None], k, 100.0)
    sol = Sol({"block": 8, "statistic": "subblock"})
    score, same = (sol.scores(blocks_of(q, x, laid, key_mask)) for x in (k, other))
    assert torch.equal(score, same)
    assert torch.equal(score.isinf().any((0, 1, 2)), torch.arange(8) >= 4)
    plan = plan_of(layout, q, k, key_mask, tau=0.3, statistic="subblock")
    assert torch.equal(plan.members, plan_of(layout, q, other, key_mask, tau=0.3, statistic="subblock").members)
    assert not plan.members[..., :3, 4:].any()


@pytest.mark.parametrize("statistic", ["diag", "subblock"])
def test_least_is_a_floor_of_the_likeliest_blocks(statistic: str) -> None:
    layout = Layout((3, 5, 7), 0, 11)
    q, k = torch.randn(2, 1, 2, layout.length, 16)
    k[..., layout.visual :, :] += 5
    at = torch.arange(16)
    text, laid = at >= 14, tiles(layout, "raster", 8)
    score = Sol({"block": 8, "statistic": statistic}).scores(blocks_of(q, k, laid))
    band = ((at[:, None] - at).abs() <= 1) | text | text[:, None]
    highest = score[..., :14].argsort(-1, descending=True)[..., :5]
    expected = band.expand(1, 2, 16, 16).scatter(-1, highest, True)
    assert torch.equal(plan_of(layout, q, k, tau=1e4, least=5, statistic=statistic).members, expected)
    threshold = plan_of(layout, q, k, tau=0.5, statistic=statistic).members
    assert torch.equal(plan_of(layout, q, k, tau=0.5, least=5, statistic=statistic).members, threshold | expected)
    assert plan_of(layout, q, k, tau=1e4, least=99, statistic=statistic).members.all()


def test_the_kernel_evaluates_the_threshold_unless_it_must_rank() -> None:
    layout = Layout((3, 5, 7))
    q, k = torch.randn(2, 1, 1, layout.length, 16)
    blocks = blocks_of(q, k, tiles(layout, "raster", 8))
    kinds = {
        str(config): type(Sol({"block": 8, **config}).route(blocks)).__name__
        for config in ({}, {"statistic": "exact"}, {"least": 1}, {"statistic": "subblock"})
    }
    assert list(kinds.values()) == ["Threshold", "Threshold", "BlockPlan", "BlockPlan"]


@pytest.mark.parametrize("config", [{"statistic": "subblock"}, {"least": 3}, {"statistic": "subblock", "least": 3}], ids=str)
@pytest.mark.parametrize("order", ["gilbert", "kmeans"])
def test_settings_that_rank_serve_every_call(config: dict[str, Any], order: str) -> None:
    """Joint attention with padded text, GQA, batch 2, bf16, orders that differ by head; compiled without a graph break."""
    layout = Layout((3, 5, 7), 4, 9)
    q, k, v = torch.randn(2, 4, 118, 16), torch.randn(2, 2, 118, 16), torch.randn(2, 2, 118, 16)
    mask = torch.ones(2, 118, dtype=torch.bool)
    mask[1, -3:] = False
    sol = Sol({"block": 8, "tau": 2.0, "order": order, "backend": "blocked", **config})
    params = sol.prepare(SITE, layout, Clock(0, 4), {})

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sol.attend(AttentionCall(q, k, v, mask, 0.25, lambda: q), params)

    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None, None], scale=0.25, enable_gqa=True
    )
    out = run(q, k, v)
    for text in (slice(0, 4), slice(109, None)):
        torch.testing.assert_close(out[..., text, :], dense[..., text, :], rtol=1e-4, atol=1e-5)
    assert 0.05 < float((out - dense).norm() / dense.norm()) < 1
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), out, rtol=1e-4, atol=1e-5)
    assert run(*(x.bfloat16() for x in (q, k, v))).dtype == torch.bfloat16


@pytest.mark.parametrize(("tau", "share"), [(1.0, 0.1587), (1.5, 0.0668), (2.0, 0.0228)])
@pytest.mark.parametrize("statistic", ["diag", "exact"])
def test_reads_the_gaussian_tail(tau: float, share: float, statistic: str) -> None:
    blocks, layout = 512, Layout((8, 16, 32))
    q, k = torch.randn(2, 1, 2, layout.length, 32)
    plan = plan_of(layout, q, k, tau=tau, statistic=statistic)
    band = (3 * blocks - 2) / blocks**2
    assert float(plan.density().mean()) == pytest.approx(share + band * (1 - share), abs=0.004)


@pytest.mark.parametrize("band", [0, 1, 2])
def test_a_high_tau_reads_band_and_text_only(band: int) -> None:
    layout = Layout((3, 5, 7), 4, 9)
    q, k = torch.randn(2, 1, 1, layout.length, 16)
    members = plan_of(layout, q, k, tau=1e4, band=band).members[0, 0]
    at = torch.arange(16)
    text = at >= 14  # 105 visual tokens in 14 blocks
    assert torch.equal(members, ((at[:, None] - at).abs() <= band) | text | text[:, None])


def test_a_low_tau_reads_everything_and_dense_is_neutral() -> None:
    layout = Layout((3, 5, 7), 4, 9)
    q, k = torch.randn(2, 1, 1, layout.length, 16)
    assert plan_of(layout, q, k, tau=-1e4).members.all()
    assert plan_of(layout, q, k, tau="dense").members.all()
    assert Sol({"tau": "dense"}).prepare(SITE, layout, Clock(), {}) is None
    assert Sol().prepare(SITE, layout, Clock(), {}).plan is None


def test_both_statistics_agree_where_channels_are_uncorrelated() -> None:
    keys = torch.cat([torch.eye(8), -torch.eye(8)]) * torch.arange(1, 9).repeat(2)[:, None]  # diagonal covariance, mean 0
    laid = tiles(Layout((1, 4, 4)), "raster", 1)
    blocks = blocks_of(torch.randn(1, 2, 16, 8), keys.expand(1, 2, 16, 8), laid, scale=0.3, block=1)
    diag, exact = (Sol({"statistic": statistic}).theta(blocks, 1.0) for statistic in ("diag", "exact"))
    torch.testing.assert_close(diag, exact)


def test_equal_keys_have_no_spread_and_no_nan() -> None:
    layout = Layout((2, 4, 8))
    q, k = torch.randn(1, 1, 64, 16), torch.randn(16).expand(1, 1, 64, 16)
    for statistic in ("diag", "exact"):
        members = plan_of(layout, q, k, tau=1.0, statistic=statistic).members[0, 0]
        assert int(members.sum()) == 3 * 8 - 2  # nothing stands out: the band


def test_masked_blocks_leave_the_statistics_alone() -> None:
    """Keys 32 to 63 are masked: the first four blocks get the threshold they get without the others."""
    layout, half = Layout((2, 4, 8)), Layout((1, 4, 8))
    q, k = torch.randn(2, 1, 2, 64, 16)
    k[..., 32:, :] = 100
    key_mask = (torch.arange(64) < 32)[None]
    masked = plan_of(layout, q, k, key_mask, tau=0.3)
    alone = plan_of(half, q[..., :32, :], k[..., :32, :], tau=0.3)
    assert torch.equal(masked.members[..., :4, :4], alone.members)


def test_batches_do_not_mix() -> None:
    layout = Layout((3, 5, 7), 2, 3)
    q, k = torch.randn(2, 3, 2, layout.length, 16)
    together = plan_of(layout, q, k, tau=0.5).members
    assert torch.equal(together, torch.cat([plan_of(layout, q[b : b + 1], k[b : b + 1], tau=0.5).members for b in range(3)]))
    assert not torch.equal(together[0], together[1])


def test_grouped_queries_read_their_groups_keys() -> None:
    layout = Layout((3, 5, 7))
    q, k = torch.randn(1, 4, 105, 16), torch.randn(1, 2, 105, 16)
    grouped = plan_of(layout, q, k, tau=0.5).members
    assert torch.equal(grouped, plan_of(layout, q, k.repeat_interleave(2, 1), tau=0.5).members)


@pytest.mark.parametrize("visual", [8 * 13 + 1, 8 * 13 - 1])
def test_ragged_tails_are_read_and_read_something(visual: int) -> None:
    layout = Layout((1, 1, visual), 0, 1)
    q, k = torch.randn(2, 1, 1, layout.length, 16)
    members = plan_of(layout, q, k, tau=1e4, order="morton").members[0, 0]
    assert members.any(-1).all()
    assert members.diagonal().all()


@pytest.mark.parametrize("grid_thw", [(8, 8, 8), (3, 5, 7), (5, 12, 9), (1, 6, 11)])
def test_morton_is_a_permutation_that_keeps_neighbours_close(grid_thw: tuple[int, int, int]) -> None:
    order = morton(grid_thw)
    assert torch.equal(order.sort().values, torch.arange(math.prod(grid_thw)))
    _, rows, columns = grid_thw

    def extent(tokens: torch.Tensor) -> float:
        places = torch.stack([tokens // (rows * columns), tokens // columns % rows, tokens % columns], -1).float()
        return sum(float((block.amax(0) - block.amin(0)).max()) for block in places.split(8))

    assert extent(order) <= extent(torch.arange(len(order)))


def test_theta_is_traced_without_a_graph_break() -> None:
    layout, sol = Layout((3, 5, 7), 0, 4), Sol({"block": 8, "statistic": "exact"})
    laid = sol.order(layout)
    q, k = torch.randn(2, 1, 2, layout.length, 16)

    def theta(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        rule = sol.route(blocks_of(q, k, laid))
        assert isinstance(rule, Threshold)
        return rule.theta

    compiled = torch.compile(theta, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), theta(q, k))
