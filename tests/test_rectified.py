"""Rectified SpaAttn: its selection stated a second time block by block, and its neighbours token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.orders import Order, Tiles, tiles
from accelplug.patches.sparse.rectified import RectifiedSpaAttn, adjacency
from accelplug.patches.sparse.template import Blocks
from accelplug.registry import patch_class

SITE = Site("blocks.1.attn1", "transformer", "self", 1, 4)
LAYOUTS = (Layout((3, 5, 7)), Layout((3, 5, 7), 0, 11), Layout((2, 6, 6), 5, 0), Layout((1, 11, 11), 3, 8))


def tokens_by_block(tiles: Tiles, block: int) -> list[list[int]]:
    token = torch.arange(tiles.slots) if tiles.gather is None else tiles.gather
    return [[int(token[s]) for s in range(m, m + block) if tiles.held[s]] for m in range(0, tiles.slots, block)]


def touches(a: list[int], b: list[int], layout: Layout) -> bool:
    """Whether any token of a is within one step of any of b, on every axis."""
    _, rows, columns = layout.grid_thw

    def places(tokens: list[int]) -> list[tuple[int, int, int]]:
        visual = [t - layout.text_before for t in tokens if 0 <= t - layout.text_before < layout.visual]
        return [(t // (rows * columns), t // columns % rows, t % columns) for t in visual]

    return any(all(abs(x - y) <= 1 for x, y in zip(p, r, strict=True)) for p in places(a) for r in places(b))


@pytest.mark.parametrize("order", ["raster", "morton", "tile"])
@pytest.mark.parametrize(("block", "block_k"), [(8, 8), (16, 8), (8, 16)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blocks_touch_where_their_tokens_do(layout: Layout, block: int, block_k: int, order: Order) -> None:
    unit = max(block, block_k)
    laid = tiles(layout, order, unit, (2, 2, 2) if order == "tile" else None)
    found = adjacency(laid, laid, block, block_k)
    queries, keys = tokens_by_block(laid, block), tokens_by_block(laid, block_k)
    assert found.tolist() == [[touches(a, b, layout) for b in keys] for a in queries]
    text = laid.is_text(block)
    assert not found[text].any()
    assert found[~text & (laid.lengths(block) > 0)].any(-1).all()


def blocks_of(
    patch: RectifiedSpaAttn,
    layout: Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    scale: float = 0.5,
) -> tuple[Blocks, Mapping[str, Any]]:
    params = patch.prepare(SITE, layout, Clock(), {})
    call = AttentionCall(q, k, k, key_mask, scale, dense=lambda **_: pytest.fail("ran dense"))
    return Blocks.of(call, params.tiles, params.tiles, patch.config.block, patch.config.key_block), params.where


def members_by_hand(
    layout: Layout, blocks: Blocks, config: RectifiedSpaAttn.Config, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """One head, batch row 0, one row of blocks at a time; float64."""
    queries, keys = (tokens_by_block(blocks.q_tiles, size) for size in (blocks.block, blocks.block_k))
    q, k = (blocks.q_tiles.unpermute(x)[0, 0].double() for x in (blocks.q, blocks.k))
    text = [not layout.text_before <= part[0] < layout.text_before + layout.visual if part else False for part in keys]
    text_rows = [
        not layout.text_before <= part[0] < layout.text_before + layout.visual if part else False for part in queries
    ]
    read = [[t for t in part if key_mask is None or key_mask[0, t]] for part in keys]
    candidates = [j for j in range(len(keys)) if read[j] and not text[j]]
    members = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    for m, rows in enumerate(queries):
        if text_rows[m]:
            members[m] = torch.tensor([bool(part) for part in keys])
            continue
        if not rows:
            continue
        query = q[rows].mean(0)
        weight = {j: math.exp(blocks.scale * query @ k[read[j]].mean(0)) for j in candidates}
        if any(text):  # a pooled key counts as often as it has keys, and all text together is one candidate
            weight = {j: w * len(read[j]) for j, w in weight.items()}
            words = [t for j, part in enumerate(read) if text[j] for t in part]
            weight[-1] = sum(math.exp(blocks.scale * query @ k[t]) for t in words)
        ranked = sorted(weight, key=lambda j: -weight[j])
        least = max(1, math.floor((1 - cast(float, config.drop_rate)) * len(candidates) + 1e-9))
        for rank, j in enumerate(ranked):
            mass_before = sum(weight[i] for i in ranked[:rank]) / sum(weight.values())
            if j >= 0:
                members[m, j] = rank < least or mass_before < config.p
        for j, part in enumerate(keys):
            near = config.adjacent and touches(rows, part, layout)
            frames = layout.grid_thw[0]
            visual = blocks.q_tiles.visual_slots
            start = m < visual // blocks.block // frames and j < visual // blocks.block_k // frames
            members[m, j] |= bool(part) and (text[j] or near or (config.first_frame and start))
    return members


@pytest.mark.parametrize(
    "config", [{}, {"adjacent": False}, {"first_frame": True, "adjacent": False}, {"block_k": 16}], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_equals_the_rule_stated_block_by_block(layout: Layout, config: dict[str, Any], masked: bool) -> None:
    patch = RectifiedSpaAttn({"block": 8, "drop_rate": 0.8, "order": "morton", "rest": "drop", **config})
    q, k = torch.randn(2, 1, 1, layout.length, 16)
    key_mask = torch.rand(1, layout.length) < 0.7 if masked else None
    blocks, where = blocks_of(patch, layout, q, k, key_mask)
    members = patch.route(blocks, **where).members[0, 0]
    expected = members_by_hand(layout, blocks, patch.config, key_mask)
    held = blocks.query_lengths > 0
    assert torch.equal(members[held], expected[held])
    assert torch.equal(patch.route(blocks).members[0, 0], members)  # neighbours found in the call itself
    assert 0.1 < float(members[held].float().mean()) < 1


def test_p_reads_beyond_the_drop_rate() -> None:
    layout = Layout((3, 5, 7))
    q, k = torch.randn(2, 1, 1, 105, 16)
    density = []
    for p in (0.0, 0.5, 0.9, 1.0):
        patch = RectifiedSpaAttn({"block": 8, "drop_rate": 1.0, "p": p, "adjacent": False, "rest": "drop"})
        blocks, where = blocks_of(patch, layout, q, k)
        density.append(float(patch.route(blocks, **where).members.float().mean()))
    assert density[0] == pytest.approx(1 / 14)  # one block a row
    assert density == sorted(set(density))
    assert density[-1] == 1
    assert RectifiedSpaAttn({"drop_rate": 0}).prepare(SITE, layout, Clock(), {}) is None


def test_batches_do_not_mix() -> None:
    layout, patch = Layout((3, 5, 7), 2, 3), RectifiedSpaAttn({"block": 8, "drop_rate": 0.9, "rest": "drop"})
    q, k = torch.randn(2, 3, 2, layout.length, 16)

    def members(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        blocks, where = blocks_of(patch, layout, q, k)
        return patch.route(blocks, **where).members

    assert torch.equal(members(q, k), torch.cat([members(q[b : b + 1], k[b : b + 1]) for b in range(3)]))


def test_orders_by_head_have_neighbours_by_head() -> None:
    layout = Layout((4, 4, 6))
    choices = [tiles(layout, order, 8) for order in ("raster", "wht", "morton")]
    stacked = Tiles.per_head(choices)
    found = adjacency(stacked, stacked, 8, 8)
    assert torch.equal(found, torch.stack([adjacency(one, one, 8, 8) for one in choices]))
    assert not torch.equal(found[0], found[1])


def attend(layout: Layout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **config: Any) -> torch.Tensor:
    patch = RectifiedSpaAttn({"block": 8, "drop_rate": 0.9, "adjacent": False, "backend": "reference", **config})
    params = patch.prepare(SITE, layout, Clock(), {})
    return patch.attend(AttentionCall(q, k, v, None, 0.5, dense=lambda **_: pytest.fail("ran dense")), params)


@pytest.mark.parametrize("layout", [Layout((4, 4, 6)), Layout((4, 4, 6), 5, 4), Layout((3, 5, 5), 0, 9)], ids=str)
def test_blocks_that_their_means_describe_are_dense_attention(layout: Layout) -> None:
    """Equal queries, keys and values in each block, and none refused: what is not read is made up for without loss."""
    q, k, v = torch.randn(3, 1, 2, layout.length, 16)
    visual = slice(layout.text_before, layout.text_before + layout.visual)
    for x in (q, k, v):
        x[..., visual, :] = x[..., visual, :][..., ::8, :].repeat_interleave(8, -2)[..., : layout.visual, :]
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(attend(layout, q, k, v, rest_gain=False), dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attend(layout, q, k, v), dense, rtol=1e-4, atol=1e-5)  # no spread, so all is worth it
    assert float((attend(layout, q, k, v, rest="drop") - dense).abs().max()) > 0.05


def test_refusing_blocks_gives_their_share_to_what_is_read() -> None:
    layout = Layout((4, 4, 6))
    q, k, v = torch.randn(3, 1, 2, 96, 16)
    ones = torch.ones_like(v)
    for gain in (True, False):
        torch.testing.assert_close(attend(layout, q, k, ones, rest_gain=gain), ones)  # every row's weights sum to 1
    dropped, gained, all_in = (attend(layout, q, k, v, **c) for c in ({"rest": "drop"}, {}, {"rest_gain": False}))
    assert float((gained - dropped).norm()) < 0.3 * float((all_in - dropped).norm())  # noise: hardly a block is worth it


def test_every_selector_may_have_this_rest() -> None:
    layout = Layout((4, 4, 6), 0, 5)
    q, k, v = torch.randn(3, 1, 2, layout.length, 16)
    call = AttentionCall(q, k, v, None, 0.5, dense=lambda **_: pytest.fail("ran dense"))
    for name, config in (("radial", {"decay": 0.2}), ("sol", {"tau": 1.0}), ("neighborhood", {"window": [1, 4, 4]})):
        patch = patch_class(name)({"block": 8, "backend": "reference", "rest": "rectified", "rest_gain": False, **config})
        params = patch.prepare(SITE, layout, Clock(), {})
        cost, plan = patch.inspect(call, params)
        assert float(plan.density().mean()) < cost < float(plan.density().mean()) + 1 / 8
        dropped = patch_class(name)({**patch.config.model_dump(), "rest": "drop"})
        change = patch.attend(call, params) - dropped.attend(call, dropped.prepare(SITE, layout, Clock(), {}))
        assert float(change[..., :96, :].abs().max()) > 1e-3
        torch.testing.assert_close(change[..., 96:, :], torch.zeros(1, 2, 5, 16), atol=1e-6, rtol=0)  # text rows read all


@pytest.mark.parametrize("rest", ["rectified", "pool"])
def test_clusters_are_laid_out_in_the_call_and_have_no_neighbours(rest: str) -> None:
    layout = Layout((3, 6, 8), 0, 9)
    q, k, v = torch.randn(3, 2, 2, layout.length, 16)
    clusters = {"order": "kmeans", "query_clusters": 4, "key_clusters": 6, "rest": rest}
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(attend(layout, q, k, v, **clusters, p=1.0), dense, rtol=1e-4, atol=1e-5)
    sparse = attend(layout, q, k, v, **clusters)
    assert torch.isfinite(sparse).all()
    assert float((sparse - dense)[..., : layout.visual, :].abs().max()) > 0.05
