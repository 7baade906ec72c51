"""The block plan: packing, lists, conversion, pooling."""

from __future__ import annotations

import math

import pytest
import torch

from accelplug.call import Layout
from accelplug.errors import ShapeError
from accelplug.kernels.curves import morton
from accelplug.kernels.orders import Order, Tiles, axis_order, compact_tile, tiles
from accelplug.kernels.plan import BlockPlan, pack_bits, pool, unpack_bits


def plan_of(members: torch.Tensor, tokens_q: int, tokens_k: int, block: int) -> BlockPlan:
    lengths = [torch.full((-(-t // block),), block, dtype=torch.int32) for t in (tokens_q, tokens_k)]
    for length, tokens in zip(lengths, (tokens_q, tokens_k), strict=True):
        length[-1] = tokens - (len(length) - 1) * block
    queries, keys = lengths
    return BlockPlan.from_members(members, queries, keys, block, block)


@pytest.mark.parametrize("number", [1, 31, 32, 33, 64, 100])
def test_bits_round_trip(number: int) -> None:
    members = torch.rand(2, 3, 5, number) < 0.5
    members[..., -1] = True
    assert torch.equal(unpack_bits(pack_bits(members), number), members)


def test_lists_are_complete_and_filled_blocks_stand_in_front() -> None:
    from accelplug.kernels.triton_block import lists

    members = torch.rand(2, 3, 7, 9) < 0.4
    members[..., 4] = True
    k_len = torch.tensor([8, 3, 8, 8, 8, 1, 8, 7, 8], dtype=torch.int32)
    plan = BlockPlan.from_members(members, torch.full((7,), 8, dtype=torch.int32), k_len, 8, 8)
    assert torch.equal(plan.members, members)
    index = lists(plan)
    assert index.dtype == torch.int16
    assert index.shape == members.shape
    for b, h, m in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(7)).tolist():
        listed = index[b, h, m, : plan.count[b, h, m]].tolist()
        assert sorted(listed) == members[b, h, m].nonzero()[:, 0].tolist()
        assert listed == sorted(listed, key=lambda block: (k_len[block] < 8, block))
        assert plan.whole[b, h, m] == sum(int(k_len[block]) == 8 for block in listed)


def test_means_stand_behind_what_is_read_exactly() -> None:
    from accelplug.kernels.triton_block import lists

    members = torch.rand(1, 2, 7, 9) < 0.3
    members[..., 4] = True
    k_len = torch.tensor([8, 3, 8, 8, 8, 0, 8, 7, 8], dtype=torch.int32)
    level = torch.tensor([0, 2, 4, 8], dtype=torch.uint8)[torch.randint(4, (1, 1, 7, 9))]
    plan = BlockPlan.from_members(members, torch.full((7,), 8, dtype=torch.int32), k_len, 8, 8, level=level)
    assert torch.equal(plan.at(0), ~members & (level == 0) & (k_len > 0))
    index = lists(plan)
    for h, m in torch.cartesian_prod(torch.arange(2), torch.arange(7)).tolist():
        row, start = index[0, h, m].tolist(), int(plan.count[0, h, m])
        for place, run in enumerate((2, 4, 8)):
            number = int(plan.level_count[0, h, m, place])
            held = [j for j in range(9) if level[0, 0, m, j] == run and not members[0, h, m, j] and k_len[j]]
            assert row[start : start + number] == held
            start += number
    read = [plan.at(run).double() @ torch.ceil(k_len.double() / run) for run in (1, 2, 4, 8)]
    keys = torch.stack(read).sum((0, -1)) * 8
    torch.testing.assert_close(plan.density(), keys / (56 * int(k_len.sum())))
    rest = plan.at(0).double().sum((-1, -2)) * 8
    torch.testing.assert_close(plan.density(rest=True) - plan.density(), rest / (56 * int(k_len.sum())))


def test_rows_without_a_block_are_refused_unless_skipped() -> None:
    members = torch.tensor([[[True, True], [False, False]], [[True, False], [False, True]]])[None]
    lengths = torch.full((2,), 8, dtype=torch.int32)
    with pytest.raises(ShapeError, match="reads no key block"):
        BlockPlan.from_members(members, lengths, lengths, 8, 8)
    plan = BlockPlan.from_members(members, lengths, lengths, 8, 8, skipped=torch.tensor([[True, False]]))
    assert plan.at(0).tolist() == [[[[False, False], [False, False]], [[False, True], [True, False]]]]
    with pytest.raises(ShapeError, match="Levels must be"):
        BlockPlan.from_members(members, lengths, lengths, 8, 8, level=torch.full((2, 2), 3, dtype=torch.uint8))


def test_density_counts_tokens_not_blocks() -> None:
    members = torch.tensor([[True, False], [True, True]])
    plan = plan_of(members, 12, 9, 8)  # blocks of 8 and 4 queries, 8 and 1 keys
    assert float(plan.density()) == pytest.approx((8 * 8 + 4 * 9) / (12 * 9))
    assert int(plan.dense_mask().sum()) == 8 * 8 + 4 * 9


def test_membership_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="M=2 query and N=2 key"):
        plan_of(torch.ones(3, 2, dtype=torch.bool), 16, 16, 8)


@pytest.mark.parametrize("tokens", [96, 97, 127])
def test_block_mask_means_the_same(tokens: int) -> None:
    blocks = -(-tokens // 32)
    members = torch.rand(1, 2, blocks, blocks) < 0.5
    members |= torch.eye(blocks, dtype=torch.bool)
    plan = plan_of(members, tokens, tokens, 32)
    flex = plan.block_mask()
    listed = flex.to_dense().bool()[:, :, :blocks, :blocks]
    assert torch.equal(listed, members.expand_as(listed))
    rows, keys = torch.arange(blocks * 32)[:, None], torch.arange(blocks * 32)
    zero = torch.tensor(0)
    allowed = flex.mask_mod(zero, zero, rows, keys).expand(len(rows), len(keys))
    fine = listed.repeat_interleave(32, -2).repeat_interleave(32, -1) & allowed
    assert torch.equal(fine[..., :tokens, :], plan.dense_mask()[..., :tokens, :])


def test_pool_divides_by_true_length_and_heeds_the_mask() -> None:
    x = torch.randn(2, 3, 21, 4)
    valid = torch.rand(2, 21) < 0.6
    valid[0, 16:] = False
    mean, number = pool(x, torch.tensor([8, 8, 5], dtype=torch.int32), 8, valid)
    for b in range(2):
        for n, (start, end) in enumerate(((0, 8), (8, 16), (16, 21))):
            kept = x[b, :, start:end][:, valid[b, start:end]]
            assert number[b, 0, n] == kept.shape[1]
            torch.testing.assert_close(mean[b, :, n], kept.mean(1) if kept.shape[1] else torch.zeros(3, 4))


@pytest.mark.parametrize("text", [(0, 0), (5, 0), (0, 7), (3, 4)])
@pytest.mark.parametrize(
    ("order", "tile"),
    [
        ("raster", None),
        ("morton", None),
        ("hilbert", None),
        ("gilbert", None),
        ("tile", (2, 2, 4)),
        ("tile", None),
        ("wht", None),
        ("hwt", None),
    ],
)
def test_tiles_round_trip(order: Order, tile: tuple[int, int, int] | None, text: tuple[int, int]) -> None:
    layout = Layout((3, 5, 7), *text)
    laid = tiles(layout, order, 16, tile)
    x = torch.randn(2, 3, layout.length, 4)
    slots = laid.permute(x)
    assert torch.equal(laid.unpermute(slots), x)
    assert int(laid.lengths(16).sum()) == layout.length
    assert int(laid.lengths(16)[laid.is_text(16)].sum()) == sum(text)
    if laid.gather is not None:  # text stands in blocks of its own
        held = laid.gather[laid.held]
        assert sorted(held.tolist()) == list(range(layout.length))


def test_morton_is_a_permutation_that_keeps_neighbours_near() -> None:
    grid = (4, 8, 8)
    order = morton(grid)
    assert sorted(order.tolist()) == list(range(256))
    blocks = order.view(-1, 8)  # runs of 8 are cubes of 2 x 2 x 2
    for run in blocks:
        place = torch.stack(torch.unravel_index(run, grid))
        assert ((place.max(1).values - place.min(1).values) <= 1).all()


def test_axis_orders_count_as_their_names_say() -> None:
    grid = (2, 3, 5)
    assert torch.equal(axis_order(grid, "thw"), torch.arange(30))
    frame, row, column = torch.unravel_index(axis_order(grid, "wht"), grid)
    assert torch.equal(column * 6 + row * 2 + frame, torch.arange(30))  # columns slowest, frames fastest
    there = axis_order(grid, "hwt")
    back = axis_order((3, 5, 2), "wth")  # each is the other's inverse, on the turned grid
    assert torch.equal(there[back], torch.arange(30))


@pytest.mark.parametrize("text", [(0, 0), (3, 5)])
def test_orders_per_head_are_each_heads_own(text: tuple[int, int]) -> None:
    layout = Layout((3, 4, 5), *text)
    names: tuple[Order, ...] = ("raster", "wht", "gilbert")
    choices = [tiles(layout, name, 16) for name in names]
    laid = Tiles.per_head(choices)
    x = torch.randn(2, 3, layout.length, 4)
    slots = laid.permute(x)
    held = laid.held
    for head, one in enumerate(choices):
        alone = one.permute(x[:, head : head + 1])
        assert torch.equal(
            slots[:, head : head + 1][..., held, :],
            torch.nn.functional.pad(alone, (0, 0, 0, len(held)))[..., : len(held), :][..., held, :],
        )
        assert torch.equal(laid.coordinates()[head][held], one.coordinates()[held])
    assert torch.equal(laid.unpermute(slots), x)
    shared = x[:, :1]
    assert torch.equal(laid.permute(shared), laid.permute(shared.expand(-1, 3, -1, -1)))
    flags = torch.rand(2, layout.length) < 0.5
    assert torch.equal(laid.permute_mask(flags), laid.permute(flags[:, None, :, None].float()).bool()[..., 0])


def test_orders_with_other_blocks_do_not_stack() -> None:
    layout = Layout((3, 4, 5))
    with pytest.raises(ShapeError, match="equally many slots"):
        Tiles.per_head([tiles(layout, "raster", 16), tiles(layout, "tile", 16, (1, 2, 2))])


@pytest.mark.parametrize("grid", [(1, 7, 9), (4, 6, 6), (3, 16, 1)], ids=str)
def test_the_compact_tile_cuts_into_fewest(grid: tuple[int, int, int]) -> None:
    tile = compact_tile(grid, 16)
    assert math.prod(tile) <= 16
    assert all(side <= length for side, length in zip(tile, grid, strict=True))
    pieces = math.prod(-(-n // m) for n, m in zip(grid, tile, strict=True))
    assert pieces >= -(-math.prod(grid) // 16)
    assert pieces <= math.prod(-(-n // m) for n, m in zip(grid, (1, 4, 4), strict=True))
