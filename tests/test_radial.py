"""Radial attention: published densities, and both variants of the mask stated a second time, token by token."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from accelplug.call import Clock, Layout, Site
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.sparse.radial import Radial

SITE = Site("blocks.1.attn1", "transformer", "self", 1, 4)
GRIDS_THW = [(5, 4, 4), (7, 3, 5), (9, 2, 3), (1, 3, 7), (17, 1, 1)]


def plan_of(layout: Layout, **config: Any) -> BlockPlan:
    radial = Radial(config)
    return radial.select(radial.order(layout))


def token_reads(variant: str, distance: int, row: int, column: int, s: int, decay: float, block: int) -> bool:
    """Whether token `row` of a frame reads token `column` of one `distance` away, s tokens each: the rules as published."""
    if variant == "paper":
        ratio = 2 ** math.floor(math.log2(max(distance, 1)))
        if ratio <= s:
            return abs(row - column) + 1 <= s / ratio
        return distance % math.ceil(ratio / s) == 0 and row == column
    group = distance.bit_length()
    length = 2 ** s.bit_length() / 2**group
    window = s if distance <= 1 else max(length * decay, block)
    thinned = distance > 1 and length < block and distance % int(block / length) != 0
    return abs(row - column) <= window and not thinned


def members_by_tokens(layout: Layout, variant: str, sink: bool, decay: float, block: int) -> torch.Tensor:
    frames, s = layout.grid_thw[0], math.prod(layout.grid_thw[1:])
    visual_blocks = math.ceil(layout.visual / block)
    text_blocks = math.ceil((layout.length - layout.visual) / block)
    members = torch.ones(visual_blocks + text_blocks, visual_blocks + text_blocks, dtype=torch.bool)
    members[:visual_blocks, :visual_blocks] = False
    for i in range(frames):
        for j in range(frames):
            pair = torch.tensor(
                [
                    [
                        (sink and j == 0) or token_reads(variant, abs(i - j), row, column, s, decay, block)
                        for column in range(s)
                    ]
                    for row in range(s)
                ]
            )
            for m in range(i * s // block, (i * s + s - 1) // block + 1):
                for n in range(j * s // block, (j * s + s - 1) // block + 1):
                    rows = slice(max(m * block - i * s, 0), min((m + 1) * block - i * s, s))
                    columns = slice(max(n * block - j * s, 0), min((n + 1) * block - j * s, s))
                    read = pair[rows, columns].sum(0)  # rows that read each column
                    touched = int((read > 0).sum())
                    dense = int((3 * read > rows.stop - rows.start).sum())
                    members[m, n] |= touched > 0 if variant == "paper" else 10 * dense > 6 * touched
    return members


@pytest.mark.parametrize(
    ("grid_thw", "config", "kept"),
    [
        pytest.param((18, 48, 80), {"decay": 0.2}, 83_728, id="wan2.1-69f"),
        pytest.param((30, 48, 80), {"decay": 0.95, "sink": False}, 222_452, id="hunyuan-117f"),
        pytest.param((20, 48, 80), {"decay": 0.8, "block": 64}, 502_720, id="wan2.2-77f-block64"),
        pytest.param((20, 48, 80), {"decay": 0.8}, 126_912, id="wan2.2-77f"),
        pytest.param((21, 48, 80), {"decay": 0.2}, 103_768, id="wan2.1-81f"),
        pytest.param((64, 48, 80), {"decay": 0.95, "sink": False}, 643_468, id="hunyuan-253f"),  # density .1746
        pytest.param((41, 48, 80), {"decay": 0.2}, 274_680, id="wan2.1-161f"),  # density .1816
    ],
)
def test_keeps_as_many_blocks_as_the_released_mask(
    grid_thw: tuple[int, int, int], config: dict[str, Any], kept: int
) -> None:
    plan = plan_of(Layout(grid_thw), **config)
    assert int(plan.count.sum()) == kept
    assert float(plan.density()) == pytest.approx(kept / len(plan.k_len) ** 2)


def test_frames_that_do_not_fill_blocks_lose_no_tail() -> None:
    plan = plan_of(Layout((21, 45, 80)), decay=0.2)  # the released code keeps 91,264: it cuts the last block of each frame
    assert len(plan.q_len) == 591
    assert int(plan.q_len[-1]) == 21 * 3600 % 128
    assert 91_264 < int(plan.count.sum()) < 1.01 * 91_264


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("grid_thw", GRIDS_THW)
def test_equals_the_rule_stated_token_by_token(grid_thw: tuple[int, int, int], sink: bool, variant: str) -> None:
    layout = Layout(grid_thw, text_before=3, text_after=6)
    plan = plan_of(layout, variant=variant, sink=sink, decay=0.3, block=8)
    assert torch.equal(plan.members[0, 0], members_by_tokens(layout, variant, sink, 0.3, 8))


def test_equals_the_rule_where_windows_are_wider_than_a_block() -> None:
    layout = Layout((6, 9, 11))
    plan = plan_of(layout, decay=0.9, block=8, sink=False)
    assert torch.equal(plan.members[0, 0], members_by_tokens(layout, "code", False, 0.9, 8))


def test_the_paper_variant_loses_no_pair_of_equation_4() -> None:
    frames, s = 9, 15
    mask = plan_of(Layout((frames, 3, 5)), variant="paper", block=8, sink=False).dense_mask()[0, 0]
    for row in range(frames * s):
        for column in range(frames * s):
            if token_reads("paper", abs(row // s - column // s), row % s, column % s, s, 1.0, 8):
                assert mask[row, column]


def test_more_decay_keeps_more() -> None:
    plans = [plan_of(Layout((12, 24, 30)), decay=decay, block=16, sink=False) for decay in (0.1, 0.3, 0.6, 1.0)]
    for less, more in itertools.pairwise(plans):
        assert not (less.members & ~more.members).any()
        assert float(less.density()) < float(more.density())


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("grid_thw", [*GRIDS_THW, (3, 5, 11), (4, 3, 19)])  # 165 and 228 tokens: ragged in blocks of 8
def test_every_row_reads_itself_and_text_is_dense(grid_thw: tuple[int, int, int], variant: str) -> None:
    radial = Radial({"block": 8, "sink": False, "variant": variant})
    tiles = radial.order(Layout(grid_thw, text_before=2, text_after=1))
    members = radial.select(tiles).members[0, 0]
    text = tiles.is_text(8)
    assert members.diagonal().all()
    assert members[text].all()
    assert members[:, text].all()


def test_the_sink_is_the_first_frame() -> None:
    layout = Layout((16, 4, 8))
    sink, plain = (plan_of(layout, block=8, sink=sink, decay=0.1).members[0, 0] for sink in (True, False))
    assert sink[:, :4].all()
    assert torch.equal(sink[:, 4:], plain[:, 4:])
    assert not plain[:, :4].all()


def test_window_full_is_neutral() -> None:
    layout = Layout((6, 4, 8), text_after=3)
    radial = Radial({"window": "full", "block": 8})
    assert radial.prepare(SITE, layout, Clock(), {}) is None
    assert radial.select(radial.order(layout)).members.all()
    assert Radial({"block": 8}).prepare(SITE, layout, Clock(), {}) is not None


def test_adjacent_frames_read_each_other_whole() -> None:
    layout = Layout((2, 4, 8))
    assert Radial({"block": 8}).prepare(SITE, layout, Clock(), {}) is None
    assert plan_of(layout, block=8).members.all()
