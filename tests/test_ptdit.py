"""Two stages of proxies and windows: the maths against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from accelplug.call import AttentionCall, Clock, Layout
from accelplug.errors import RecipeError
from accelplug.kernels.windows import windows
from accelplug.patches.tokens.ptdit import PtDit
from tests.test_todo import answer, members
from tests.test_tome import call_on, site

GRIDS = [((1, 7, 9), (1, 2, 4)), ((3, 5, 6), (2, 2, 9)), ((2, 4, 8), (1, 2, 4))]


def attend(config: dict, layout: Layout, call: AttentionCall) -> Tensor:
    patch = PtDit(config)
    return patch.attend(call, patch.prepare(site(), layout, Clock(), {}))


@pytest.mark.parametrize("text", [(0, 0), (2, 3)])
@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_against_loops(grid: tuple[int, int, int], window: tuple[int, int, int], text: tuple[int, int]) -> None:
    layout, before = Layout(grid, *text), text[0]
    behind = before + layout.visual
    call = call_on(layout, batch=2)
    outs = [attend({"window_thw": window, "weights": weights}, layout, call) for weights in torch.eye(3).tolist()]
    together = attend({"window_thw": window, "weights": (1, 2, 3)}, layout, call)
    mean = torch.stack([n / 6 * out for n, out in zip((1, 2, 3), outs, strict=True)]).sum(0)
    torch.testing.assert_close(together[:, :, before:behind], mean[:, :, before:behind])
    half = tuple(0 if n >= length else n // 2 for n, length in zip(window, grid, strict=True))
    groups, others = list(members(grid, window).values()), [*range(before), *range(behind, layout.length)]
    for sample in range(2):
        q, k, v = (x[sample].double() for x in (call.q, call.k, call.v))
        ones = [1.0] * (len(others) + len(groups))
        mean_q, mean_k, mean_v = (
            torch.stack([x[:, before:behind][:, group].mean(1) for group in groups], 1) for x in (q, k, v)
        )
        keys = torch.cat([k[:, others], mean_k], 1)
        read = answer(mean_q, keys, torch.cat([v[:, others], mean_v], 1), ones, call.scale)
        expected = [answer(q[:, before:behind], keys, torch.cat([v[:, others], read], 1), ones, call.scale)]
        for shift in ((0, 0, 0), half):
            cut, within = windows(grid, window, shift), torch.zeros_like(expected[0])
            for row, held in zip(cut.token, cut.held, strict=True):
                here = before + row[held]
                within[:, row[held]] = answer(q[:, here], k[:, here], v[:, here], [1.0] * len(here), call.scale)
            expected.append(within)
        for out, part in zip(outs, expected, strict=True):
            torch.testing.assert_close(out[sample, :, before:behind].double(), part, rtol=1e-4, atol=1e-5)
    exact = call.dense()
    for rows in (slice(before), slice(behind, None)):
        torch.testing.assert_close(outs[0][..., rows, :], exact[..., rows, :])


def test_masked_keys_are_never_read_and_windows_of_nothing_else_are_finite() -> None:
    layout = Layout((1, 4, 8), 4, 3)
    valid = torch.ones(2, layout.length, dtype=torch.bool)
    valid[1, [1, 4, 5, 6, 7, 12, 13, 14, 15, 20]] = False  # of one window all
    outs = []
    for value in (0.0, 50.0):
        call = call_on(layout, batch=2, mask=valid)
        for x in (call.k, call.v):
            x.masked_fill_(~valid[:, None, :, None], value)
        outs.append(attend({"window_thw": (1, 2, 4)}, layout, call))
    assert outs[0].isfinite().all()
    rows = valid[:, None, :, None]
    torch.testing.assert_close(outs[0].masked_fill(~rows, 0), outs[1].masked_fill(~rows, 0))


def test_settings_that_answer_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match="weights must not all be 0"):
        PtDit({"weights": (0, 0, 0)})


def test_cost_is_what_is_read() -> None:
    layout = Layout((1, 8, 8), 16)
    patch = PtDit({"window_thw": (1, 4, 4)})
    cost, _ = patch.inspect(call_on(layout), patch.prepare(site(), layout, Clock(), {}))
    shifted = sum((rows * columns) ** 2 for rows in (2, 4, 2) for columns in (2, 4, 2))
    assert math.isclose(cost or 0, ((4 + 64) * (4 + 16) + 4 * 16**2 + shifted + 16 * 80) / 80**2)
