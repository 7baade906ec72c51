"""Sol attention: the threshold stated a second time block by block, and the share of blocks it reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.curves import morton
from accelplug.kernels.orders import Tiles, tiles
from accelplug.kernels.plan import BlockPlan
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
    return sol.route(blocks).lower(blocks.q_pool, blocks.k_pool, scale)


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
    diag, exact = (Sol({"statistic": statistic}).theta(blocks) for statistic in ("diag", "exact"))
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
        return sol.route(blocks_of(q, k, laid)).theta

    compiled = torch.compile(theta, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), theta(q, k))
