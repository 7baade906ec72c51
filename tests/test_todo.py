"""Down-sampled keys and values, and agents: the maths against loops in float64 and against torch's own nearest neighbour."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from accelplug.call import AttentionCall, Clock, Layout
from accelplug.kernels.merge import cells, match, partition
from accelplug.patches.base import Patch
from accelplug.patches.tokens.agent import Agent
from accelplug.patches.tokens.todo import Todo
from tests.test_tome import call_on, site

GRIDS = [((1, 7, 9), (1, 2, 2)), ((3, 5, 6), (2, 2, 4)), ((2, 1, 11), (1, 3, 3)), ((1, 3, 4), (9, 9, 9))]


def attend(patch: Patch, layout: Layout, call: AttentionCall) -> Tensor:
    return patch.attend(call, patch.prepare(site(), layout, Clock(), {}))


def members(grid: tuple[int, int, int], cell: tuple[int, int, int]) -> dict[tuple[int, ...], list[int]]:
    """Tokens of each cell, by its place, in order of cells."""
    found: dict[tuple[int, ...], list[int]] = {}
    for token, place in enumerate(product(*map(range, grid))):
        found.setdefault(tuple(p // c for p, c in zip(place, cell, strict=True)), []).append(token)
    return dict(sorted(found.items()))


def answer(q: Tensor, k: Tensor, v: Tensor, number: list[float], scale: float) -> Tensor:
    """What queries (H, N, D) read of keys that count `number` times, in float64."""
    weight = (q.double() @ k.double().transpose(-1, -2) * scale).exp() * torch.tensor(number, dtype=torch.float64)
    return weight @ v.double() / weight.sum(-1, keepdim=True)


@pytest.mark.parametrize(("grid", "cell"), GRIDS)
def test_cells_against_loops(grid: tuple[int, int, int], cell: tuple[int, int, int]) -> None:
    found, expected = cells(grid, cell), members(grid, cell)
    assert found.size[0].tolist() == [len(tokens) for tokens in expected.values()]
    for number, tokens in enumerate(expected.values()):
        assert (found.slot[0] == number).nonzero().flatten().tolist() == tokens
        assert int(found.centre[number]) in tokens


@pytest.mark.parametrize(("rows", "columns", "factor"), [(8, 12, 2), (9, 6, 3), (8, 4, 4)])
def test_the_centre_is_the_nearest_neighbour_of_the_paper(rows: int, columns: int, factor: int) -> None:
    tokens = torch.arange(float(rows * columns)).view(1, 1, rows, columns)
    size = (rows // factor, columns // factor)
    nearest = interpolate(tokens, size=size, mode="nearest-exact").flatten().long()
    assert torch.equal(cells((1, rows, columns), (1, factor, factor)).centre, nearest)


@pytest.mark.parametrize("representative", ["centre", "mean"])
@pytest.mark.parametrize("text", [(0, 0), (2, 3)])
@pytest.mark.parametrize(("grid", "cell"), GRIDS)
def test_todo_against_loops(
    grid: tuple[int, int, int], cell: tuple[int, int, int], text: tuple[int, int], representative: str
) -> None:
    layout = Layout(grid, *text)
    call = call_on(layout, batch=2)
    out = attend(Todo({"cell_thw": cell, "representative": representative}), layout, call)
    before, behind = text[0], text[0] + layout.visual
    groups = [[before + token for token in tokens] for tokens in members(grid, cell).values()]
    reads = [[before + token] for token in cells(grid, cell).centre.tolist()] if representative == "centre" else groups
    others = [[token] for token in (*range(before), *range(behind, layout.length))]
    number = [1.0] * len(others) + [float(len(group)) for group in groups]
    for sample in range(2):
        k, v = (torch.stack([x[sample].double()[:, some].mean(1) for some in others + reads], 1) for x in (call.k, call.v))
        expected = answer(call.q[sample, :, before:behind], k, v, number, call.scale)
        torch.testing.assert_close(out[sample, :, before:behind].double(), expected, rtol=1e-4, atol=1e-5)
    exact = call.dense()
    for rows in (slice(before), slice(behind, None)):
        torch.testing.assert_close(out[..., rows, :], exact[..., rows, :])


def test_todo_of_equal_cells_without_text_needs_no_count() -> None:
    layout = Layout((1, 6, 8))
    call = call_on(layout)
    counted = Todo().prepare(site(), layout, Clock(), {})
    assert counted is not None
    assert not counted.counted
    plain = attend(Todo({"proportional": False}), layout, call)
    assert torch.equal(attend(Todo(), layout, call), plain)


def test_todo_never_reads_masked_keys() -> None:
    layout = Layout((1, 6, 8), 4, 3)
    valid = torch.ones(2, layout.length, dtype=torch.bool)
    valid[1, [1, 4, 5, 12, 13, 20, 53]] = False  # of one cell all four
    for config in ({}, {"representative": "mean"}):
        outs = []
        for value in (0.0, 50.0):
            call = call_on(layout, batch=2, mask=valid)
            for x in (call.k, call.v):
                x.masked_fill_(~valid[:, None, :, None], value)
            outs.append(attend(Todo(config), layout, call))
        torch.testing.assert_close(*outs)


@pytest.mark.parametrize("text", [(0, 0), (2, 3)])
@pytest.mark.parametrize("agents", ["cells", "merged"])
@pytest.mark.parametrize("k_scale", [0.3, 1.0])
def test_agents_against_loops(agents: str, text: tuple[int, int], k_scale: float) -> None:
    grid, cell, tile = (1, 7, 9), (1, 2, 3), (1, 16, 16)
    layout = Layout(grid, *text)
    call = call_on(layout, batch=2)
    out = attend(Agent({"cell_thw": cell, "agents": agents, "k_scale": k_scale}), layout, call)
    before, behind = text[0], text[0] + layout.visual
    q = call.q[:, :, before:behind]
    for sample in range(2):
        if agents == "cells":
            groups = list(members(grid, cell).values())
        else:
            drawn = partition(grid, cell, tile, None)
            slot = match(q.mean(1), drawn, drawn.sources)[sample]
            groups = [(slot == place).nonzero().flatten().tolist() for place in range(int(slot.max()) + 1)]
        mean = torch.stack([q[sample].double()[:, group].mean(1) for group in groups], 1)
        read = answer(mean, call.k[sample], call.v[sample], [1.0] * layout.length, call.scale)
        expected = answer(q[sample], mean, read, [1.0] * len(groups), call.scale**k_scale)
        expected = expected + 0.075 * call.v[sample, :, before:behind].double()
        torch.testing.assert_close(out[sample, :, before:behind].double(), expected, rtol=1e-4, atol=1e-5)
    exact = call.dense()
    for rows in (slice(before), slice(behind, None)):
        torch.testing.assert_close(out[..., rows, :], exact[..., rows, :])


def test_too_many_agents_are_none() -> None:
    """As in the release: with half as many agents as tokens nothing is saved."""
    assert Agent({"cell_thw": (1, 1, 2)}).prepare(site(), Layout((1, 4, 8)), Clock(), {}) is None
    assert Agent({"cell_thw": (1, 2, 2)}).prepare(site(), Layout((1, 4, 8)), Clock(), {}) is not None


@pytest.mark.parametrize(
    ("patch", "pairs"),
    [(Todo(), 64 * (16 + 16) + 16 * 80), (Agent({"cell_thw": (1, 4, 4)}), (4 + 16) * 80 + 64 * 4)],
    ids=["todo", "agent"],
)
def test_cost_is_what_is_read(patch: Patch, pairs: int) -> None:
    layout = Layout((1, 8, 8), 16)
    cost, plan = patch.inspect(call_on(layout), patch.prepare(site(), layout, Clock(), {}))
    assert math.isclose(cost or 0, pairs / 80**2)
    assert plan is None
