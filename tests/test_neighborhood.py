"""Neighbourhood attention: the windows stated a second time token by token, and what visiting them costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.sparse.freeswim import FreeSwim
from accelplug.patches.sparse.neighborhood import Neighborhood
from accelplug.patches.sparse.windows import Axis, visited_tiles

SITE = Site("blocks.1.attn1", "transformer", "self", 1, 4)


def plan_of(layout: Layout, **config: Any) -> BlockPlan:
    method = Neighborhood(config)
    return method.select(method.order(layout))


def token_mask(layout: Layout, **config: Any) -> torch.Tensor:
    """The plan's mask in token order, bool (S, S)."""
    method = Neighborhood(config)
    tiles = method.order(layout)
    slot = torch.arange(layout.length) if tiles.scatter is None else tiles.scatter
    return method.select(tiles).dense_mask()[0, 0][slot][:, slot]


def neighbours(i: int, length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> set[int]:
    """Keys of position i on one axis: the published rule, with its border correction as two terms."""
    residue, place = i % dilation, i // dilation
    group = math.ceil((length - residue) / dilation)
    left, right = window // 2, window // 2 + window % 2 - 1
    if causal:
        leader = min(place // stride * stride + stride - 1, group - 1)
        start, end = max(leader - left - right, 0), place + 1
    else:
        leader = min(place // stride * stride + stride // 2, group - 1)
        shift = group - right - leader - 1 if leader + right >= group else 0
        start = max(leader - left, 0) + shift
        end = start + window
    return {key * dilation + residue for key in range(start, end)}


def mask_by_tokens(
    layout: Layout,
    window: tuple[int, int, int],
    stride: tuple[int, int, int] = (1, 1, 1),
    dilation: tuple[int, int, int] = (1, 1, 1),
    causal: tuple[bool, bool, bool] = (False,) * 3,
) -> torch.Tensor:
    rules = list(zip(layout.grid_thw, window, stride, dilation, causal, strict=True))
    places = list(itertools.product(*map(range, layout.grid_thw)))
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
    for row, query in enumerate(places, layout.text_before):
        reads = [neighbours(i, *rule) for i, rule in zip(query, rules, strict=True)]
        for column, key in enumerate(places, layout.text_before):
            mask[row, column] = all(at in keys for at, keys in zip(key, reads, strict=True))
    return mask


CASES = [
    pytest.param((4, 6, 10), {"window": (3, 3, 5)}, id="sliding"),
    pytest.param((5, 7, 9), {"window": (2, 4, 6)}, id="even-windows-odd-grid"),
    pytest.param((5, 7, 9), {"window": (3, 5, 4), "stride": (2, 3, 4)}, id="strided"),
    pytest.param((4, 7, 10), {"window": (2, 3, 3), "dilation": (2, 2, 3)}, id="dilated"),
    pytest.param((3, 11, 7), {"window": (1, 4, 2), "stride": (1, 2, 2), "dilation": (1, 2, 3)}, id="strided-dilated"),
    pytest.param((6, 5, 4), {"window": (3, 3, 3), "causal": (True, False, False)}, id="causal-time"),
    pytest.param(
        (9, 5, 4),
        {"window": (3, 2, 4), "stride": (2, 2, 1), "dilation": (3, 1, 1), "causal": (True, True, False)},
        id="causal-all",
    ),
    pytest.param((1, 9, 13), {"window": (1, 4, 5), "stride": (1, 3, 2)}, id="image"),
]


@pytest.mark.parametrize(("grid_thw", "config"), CASES)
@pytest.mark.parametrize("text", [(0, 0), (3, 0), (2, 9)], ids=["no-text", "text-before", "text-both"])
def test_equals_the_rule_stated_token_by_token(
    grid_thw: tuple[int, int, int], config: dict[str, Any], text: tuple[int, int]
) -> None:
    layout = Layout(grid_thw, *text)
    assert torch.equal(token_mask(layout, block=16, **config), mask_by_tokens(layout, **config))


@pytest.mark.parametrize(("grid_thw", "config"), CASES)
@pytest.mark.parametrize("tile_thw", [(2, 2, 4), (1, 4, 3), None])
def test_tile_mask_is_every_visited_block_and_as_many_as_predicted(
    grid_thw: tuple[int, int, int], config: dict[str, Any], tile_thw: tuple[int, int, int] | None
) -> None:
    layout, method = Layout(grid_thw), Neighborhood({"block": 16, "mask": "tile", "tile_thw": tile_thw, **config})
    tiles = method.order(layout)
    plan = method.select(tiles)
    exact = mask_by_tokens(layout, **config)
    token = torch.arange(tiles.slots) if tiles.gather is None else tiles.gather
    in_slots = exact[token.clamp(max=layout.length - 1)][:, token.clamp(max=layout.length - 1)]
    visited = in_slots.unflatten(1, (-1, 16)).any(-1).unflatten(0, (-1, 16)).any(1)
    assert torch.equal(plan.members[0, 0], visited)
    assert plan.box is None
    assert int(plan.count.sum()) == visited_tiles(method.axes(layout), method.tile_thw(layout))


@pytest.mark.parametrize(("grid_thw", "config"), CASES)
def test_every_query_keeps_exactly_its_window(grid_thw: tuple[int, int, int], config: dict[str, Any]) -> None:
    mask = token_mask(Layout(grid_thw), block=16, **config)
    assert mask.diagonal().all()
    if not any(config.get("causal", ())):
        assert (mask.sum(-1) == math.prod(config["window"])).all()


@pytest.mark.parametrize("length", range(1, 14))
def test_an_axis_follows_the_published_rule_whatever_its_numbers(length: int) -> None:
    for window, dilation, causal in itertools.product(range(1, length + 1), (1, 2, 3), (False, True)):
        for stride in range(1, window + 1):
            if window * dilation > length:
                continue
            axis = Axis.fit(length, window, stride, dilation, causal)
            coordinate = axis.coordinate().tolist()
            for i, (first, last) in enumerate(zip(*(x.tolist() for x in axis.reads()), strict=True)):
                keys = {j for j in range(length) if first <= coordinate[j] < last}
                assert keys == neighbours(i, length, window, stride, dilation, causal)


def test_stride_equal_to_window_is_blocked_attention() -> None:
    grid_thw, window = (4, 6, 10), (2, 3, 5)
    axes = torch.meshgrid(*(torch.arange(n) // w for n, w in zip(grid_thw, window, strict=True)), indexing="ij")
    cell = torch.stack(axes, -1).flatten(0, 2)
    mask = token_mask(Layout(grid_thw), window=window, stride=window, block=16)
    assert torch.equal(mask, (cell[:, None] == cell).all(-1))


def separable(layout: Layout, *rules: Callable[[int, int], bool]) -> torch.Tensor:
    """Bool (S, S): whether every axis's rule (query, key) -> bool holds; no text."""
    masks = [
        torch.tensor([[bool(rule(i, j)) for j in range(n)] for i in range(n)])
        for n, rule in zip(layout.grid_thw, rules, strict=True)
    ]
    return torch.einsum("ad,be,cf->abcdef", *(m.int() for m in masks)).bool().reshape(layout.visual, layout.visual)


def always(i: int, j: int) -> bool:
    return True


@pytest.mark.parametrize("grid_thw", [(2, 8, 12), (1, 9, 13), (3, 7, 5)])
@pytest.mark.parametrize(("size", "halo"), [(4, 1), (4, 2), (3, 1), (4, 3), (5, 0)])
def test_halo_attention_reads_a_block_and_its_halo_and_nothing_beyond_the_border(
    grid_thw: tuple[int, int, int], size: int, halo: int
) -> None:
    def rule(i: int, j: int) -> bool:
        return i // size * size - halo <= j < (i // size + 1) * size + halo

    layout, wide = Layout(grid_thw), size + 2 * halo
    settings = {"window": ("full", wide, wide), "stride": (1, size, size), "border": "cut"}
    assert torch.equal(token_mask(layout, block=16, **settings), separable(layout, always, rule, rule))


@pytest.mark.parametrize(("grid_thw", "cells"), [((1, 8, 12), 4), ((2, 9, 13), 4), ((1, 7, 10), 3)])
def test_grid_attention_reads_what_lies_at_the_same_place_of_every_cell(grid_thw: tuple[int, int, int], cells: int) -> None:
    steps = [-(-n // cells) for n in grid_thw[1:]]
    settings = {"window": ("full",) * 3, "dilation": (1, *steps)}
    same_place = [lambda i, j, d=d: (i - j) % d == 0 for d in steps]
    assert torch.equal(token_mask(Layout(grid_thw), block=16, **settings), separable(Layout(grid_thw), always, *same_place))


def test_a_dilated_whole_axis_is_not_neutral() -> None:
    method = Neighborhood({"window": ("full",) * 3, "dilation": (1, 2, 1), "block": 8})
    assert method.prepare(SITE, Layout((3, 6, 7)), Clock(), {}) is not None
    assert method.prepare(SITE, Layout((3, 1, 7)), Clock(), {}) is None


@pytest.mark.parametrize("tile_thw", [(1, 2, 4), (2, 2, 2), None])
@pytest.mark.parametrize("text", [(0, 0), (3, 2)], ids=["no-text", "text"])
def test_grid_beside_blocks_visits_the_union_of_both_key_sets(
    tile_thw: tuple[int, int, int] | None, text: tuple[int, int]
) -> None:
    layout = Layout((2, 9, 13), *text)
    config = {"window": (1, 4, 4), "stride": (1, 4, 4), "border": "cut", "grid": (1, 4, 6), "mask": "tile", "block": 8}
    method = Neighborhood({**config, "tile_thw": tile_thw})
    tiles = method.order(layout)
    plan = method.select(tiles)
    in_block = separable(layout, int.__eq__, *[lambda i, j: i // 4 == j // 4] * 2)
    in_grid = separable(layout, always, lambda i, j: (i - j) % 4 == 0, lambda i, j: (i - j) % 6 == 0)
    exact = torch.ones(layout.length, layout.length, dtype=torch.bool)
    inside = slice(layout.text_before, layout.text_before + layout.visual)
    exact[inside, inside] = in_block | in_grid
    in_slots = exact[tiles.gather][:, tiles.gather]
    visited = in_slots.unflatten(1, (-1, 8)).any(-1).unflatten(0, (-1, 8)).any(1)
    assert torch.equal(plan.members[0, 0], visited)
    text_blocks = tiles.is_text(8)
    number = visited_tiles(method.axes(layout), method.tile_thw(layout), (1, 4, 6))
    assert int(visited[~text_blocks][:, ~text_blocks].sum()) == number


@pytest.mark.parametrize(
    ("window", "stride", "tile_thw", "block", "density"),
    [
        pytest.param((18, 24, 24), (6, 8, 8), (6, 8, 8), 384, 0.09, id="sliding-tiles-3x3x3"),
        pytest.param((30, 40, 40), (1, 32, 8), (2, 8, 8), 128, 5 / 12, id="30x40x40"),
        pytest.param((30, 40, 40), (1, 32, 8), None, 128, 5 / 12, id="30x40x40-auto-tile"),
    ],
)
def test_windows_in_multiples_of_the_tile_visit_nothing_else(
    window: tuple[int, int, int],
    stride: tuple[int, int, int],
    tile_thw: tuple[int, int, int] | None,
    block: int,
    density: float,
) -> None:
    plan = plan_of(Layout((30, 48, 80)), window=window, stride=stride, tile_thw=tile_thw, block=block)
    assert float(plan.density()) == pytest.approx(density)


def test_a_sliding_window_visits_more_tiles_than_it_has_keys() -> None:
    plan = plan_of(Layout((1, 64, 64)), window=(1, 20, 20))
    assert 400 / 64**2 < float(plan.density()) < 0.34


def test_auto_tile_suits_the_grid() -> None:
    image, video = Layout((1, 64, 64)), Layout((16, 32, 32))
    assert Neighborhood({"window": (1, 20, 20)}).tile_thw(image) == (1, 8, 16)
    assert Neighborhood({"window": (4, 8, 8), "stride": (4, 8, 4)}).tile_thw(video) == (4, 8, 4)
    assert math.prod(Neighborhood({"block": 24}).tile_thw(Layout((3, 11, 13)))) == 24


def test_blocks_hold_tokens_of_one_residue() -> None:
    method = Neighborhood({"window": ("full", 3, 3), "dilation": (1, 2, 4), "block": 16})
    tiles = method.order(Layout((2, 9, 13)))
    row, column = tiles.gather // 13 % 9 % 2, tiles.gather % 13 % 4
    residue = (row * 4 + column).unflatten(0, (-1, 16))
    assert (residue == residue[:, :1]).all()


@pytest.mark.parametrize("window", [("full", "full", "full"), (99, 99, 99), (3, "full", 7)])
def test_windows_as_wide_as_the_axes_are_neutral(window: tuple[int | str, ...]) -> None:
    layout, method = Layout((3, 5, 7), text_after=2), Neighborhood({"window": window, "block": 8})
    assert method.prepare(SITE, layout, Clock(), {}) is None
    assert method.select(method.order(layout)).members.all()


def test_a_causal_axis_is_not_neutral() -> None:
    causal = {"window": ("full",) * 3, "causal": (True, False, False), "block": 8}
    assert Neighborhood(causal).prepare(SITE, Layout((3, 5, 7)), Clock(), {}) is not None
    assert Neighborhood(causal).prepare(SITE, Layout((1, 5, 7)), Clock(), {}) is None


@pytest.mark.parametrize(
    "config",
    [
        {"window": (1, 3, 3), "stride": (1, 4, 1)},
        {"tile_thw": (4, 8, 8)},
        {"window": (0, 3, 3)},
        {"window": (3, 3)},
        {"dilation": (0, 1, 1)},
        {"grid": (1, 4, 4)},
        {"grid": (1, 4, 4), "mask": "tile", "dilation": (1, 2, 2)},
    ],
)
def test_settings_that_make_no_sense_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stride|tile_thw|window|dilation|grid"):
        Neighborhood(config)


@pytest.mark.parametrize("native", [(4, 6), (3, 5), (5, 12), (1, 2)])
@pytest.mark.parametrize("grid_thw", [(2, 8, 11), (1, 9, 13)])
def test_freeswim_follows_the_published_bounds(native: tuple[int, int], grid_thw: tuple[int, int, int]) -> None:
    layout, method = Layout(grid_thw), FreeSwim({"native_hw": native, "block": 16})

    def bounds(length: int, native: int) -> Callable[[int, int], bool]:
        d = native // 2

        def reads(i: int, j: int) -> bool:
            return i - d - max(0, d + i - length + 1) <= j <= i + d + max(0, d - i)

        return reads

    rules = [bounds(length, size) for length, size in zip(grid_thw[1:], native, strict=True)]
    expected = separable(layout, always, *rules)
    tiles = method.order(layout)
    slot = torch.arange(layout.length) if tiles.scatter is None else tiles.scatter
    assert torch.equal(method.select(tiles).dense_mask()[0, 0][slot][:, slot], expected)
    rows, columns = (min(2 * (size // 2) + 1, length) for size, length in zip(native, grid_thw[1:], strict=True))
    assert (expected.sum(-1) == grid_thw[0] * rows * columns).all()


@pytest.mark.parametrize("entropy", [True, False])
def test_freeswim_sharpens_by_the_logarithm_to_the_native_tokens(entropy: bool) -> None:
    layout = Layout((2, 8, 11), text_after=3)
    method = FreeSwim({"native_hw": (4, 6), "block": 16, "backend": "reference", "entropy": entropy})
    assert FreeSwim({}).sharpening == pytest.approx(1.0461, abs=1e-4)
    q, k, v = (torch.randn(1, 2, layout.length, 16) for _ in range(3))
    call = AttentionCall(q, k, v, None, 0.25, lambda: None)
    tiles = method.order(layout)
    mask = method.select(tiles).dense_mask()[0, 0][tiles.scatter][:, tiles.scatter]
    scale = 0.25 * (math.log(48) / math.log(24)) ** 0.5 if entropy else 0.25
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    params = method.prepare(SITE, layout, Clock(), {})
    torch.testing.assert_close(method.attend(call, params), expected)


def test_freeswim_leaves_the_native_size_dense() -> None:
    method = FreeSwim({"native_hw": (8, 11)})
    assert method.prepare(SITE, Layout((5, 8, 11)), Clock(), {}) is None
    assert method.prepare(SITE, Layout((5, 8, 12)), Clock(), {}) is not None
    with pytest.raises(ValueError, match="at least 2 tokens"):
        FreeSwim({"native_hw": (1, 1)})
