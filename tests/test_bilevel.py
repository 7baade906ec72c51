"""Bi-level routing: regions chosen by pooled scores, halos against a brute-force mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.orders import compact_tile
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.sparse.bilevel import Bilevel
from accelplug.patches.sparse.template import Blocks

SITE = Site("blocks.1.attn1", "transformer", "self", 1, 4)
LAYOUT = Layout((3, 5, 7), text_before=2, text_after=9)


def routed(layout: Layout, mask: torch.Tensor | None = None, **config: Any) -> tuple[Bilevel, Blocks, BlockPlan]:
    method = Bilevel({"block": 8, **config})
    params = method.prepare(SITE, layout, Clock(), {})
    q, k, v = (torch.randn(2, heads, layout.length, 16) for heads in (4, 2, 2))
    call = AttentionCall(q, k, v, mask, 0.25, lambda: None)
    blocks = Blocks.of(call, params.tiles, params.tiles, method.config.block, method.config.key_block)
    return method, blocks, method.route(blocks)


@pytest.mark.parametrize("halo", [0, 1, 2])
@pytest.mark.parametrize("tile_thw", [(1, 2, 4), (2, 2, 2), None])
@pytest.mark.parametrize("blocks", [{"block": 8}, {"block": 8, "block_k": 16}, {"block": 16, "block_k": 8}])
def test_the_halo_is_the_tiles_around_cut_at_borders(
    halo: int, tile_thw: tuple[int, int, int] | None, blocks: dict[str, Any]
) -> None:
    method, laid, plan = routed(LAYOUT, tile_thw=tile_thw, halo=halo, k=1, **blocks)
    place, held = laid.k_tiles.coordinates(), laid.k_tiles.held
    near = method.around(laid.k_tiles)
    size = torch.tensor(tile_thw or compact_tile(LAYOUT.grid_thw, method.config.unit))
    for m in range(near.shape[0]):
        for n in range(near.shape[1]):
            mine = place[m * laid.block : (m + 1) * laid.block][held[m * laid.block : (m + 1) * laid.block]]
            theirs = place[n * laid.block_k : (n + 1) * laid.block_k][held[n * laid.block_k : (n + 1) * laid.block_k]]
            if not len(mine) or not len(theirs):
                continue
            text = bool((mine[0] < 0).any() or (theirs[0] < 0).any())
            tiles_apart = (mine[0] // size - theirs[0] // size).abs().max()
            assert bool(near[m, n]) == (not text and int(tiles_apart) <= halo)
    text_rows, text_columns = laid.query_text, laid.key_text
    assert plan.members[..., text_columns].all()
    assert plan.members[..., text_rows, :][..., plan.k_len > 0].all()
    assert plan.members[..., near & (plan.k_len > 0)].all()


def test_a_region_chooses_the_k_of_highest_score() -> None:
    _, blocks, plan = routed(LAYOUT, k=3, halo=0)
    scores = blocks.q_pool @ blocks.k_pool.mT
    candidates = blocks.candidates[0, 0]
    for batch in range(2):
        for head in range(4):
            for m in (~blocks.query_text).nonzero()[:, 0].tolist():
                best = scores[batch, head, m].masked_fill(~candidates, -torch.inf).topk(3).indices.tolist()
                assert set(plan.members[batch, head, m].nonzero()[:, 0].tolist()) == {
                    *best,
                    m,
                    *blocks.key_text.nonzero()[:, 0].tolist(),
                }


@pytest.mark.parametrize("p", [0.3, 0.7, 0.95])
def test_with_p_it_is_the_fewest_that_hold_the_mass(p: float) -> None:
    _, blocks, plan = routed(LAYOUT, k=2, p=p, halo=0)
    visual = ~blocks.query_text
    scores = (blocks.q_pool @ blocks.k_pool.mT * blocks.scale).masked_fill(~blocks.candidates[..., None, :], -torch.inf)
    mass = scores.softmax(-1)[..., visual, :]
    number = (mass.sort(-1, descending=True).values.cumsum(-1) < p).sum(-1) + 1
    chosen = plan.members[..., visual, :] & ~blocks.key_text
    own = torch.eye(chosen.shape[-1], dtype=torch.bool)[visual]
    assert ((chosen & ~own).sum(-1) <= number.clamp(min=2)).all()
    assert (chosen.sum(-1) >= number.clamp(min=2)).all()
    assert ((mass * chosen).sum(-1) >= p - 1e-6).all()


def test_masked_regions_are_no_candidates() -> None:
    valid = torch.ones(2, LAYOUT.length, dtype=torch.bool)
    _, blocks, _ = routed(LAYOUT, k=2, halo=0)
    gone = blocks.k_tiles.gather[8:16]  # all of the second region
    valid[1, gone] = False
    _, blocks, plan = routed(LAYOUT, mask=valid, k=2, halo=0)
    others = torch.arange(plan.members.shape[2]) != 1
    assert not plan.members[1][:, others & ~blocks.query_text, 1].any()


def test_p_one_is_dense() -> None:
    assert Bilevel({"p": 1.0, "block": 8}).prepare(SITE, LAYOUT, Clock(), {}) is None
