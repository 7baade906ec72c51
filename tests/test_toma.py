"""ToMA's match against loops, what attention does with it in float64, and who shares it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from accelplug.call import AttentionCall, Clock, Layout
from accelplug.kernels.facility import TIE, choose, merge_shares, share_sizes, token_shares, unmerge_shares
from accelplug.kernels.windows import windows
from accelplug.patches.tokens import toma
from accelplug.patches.tokens.toma import Toma
from tests.test_todo import answer
from tests.test_tome import call_on, noise, site

GRIDS = [((1, 7, 9), (1, 4, 4)), ((3, 5, 6), (2, 2, 4)), ((1, 3, 4), (9, 9, 9))]


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 2)])
@pytest.mark.parametrize(("grid", "window"), [((4, 7, 9), (2, 4, 4)), ((3, 5, 6), (2, 2, 4)), ((2, 3, 4), (9, 9, 9))])
def test_windows_against_loops(
    grid: tuple[int, int, int], window: tuple[int, int, int], shift: tuple[int, int, int]
) -> None:
    cut = windows(grid, window, shift)
    expected: dict[tuple[int, ...], list[int]] = {}
    for token, place in enumerate(product(*map(range, grid))):
        expected.setdefault(tuple((p + s) // w for p, w, s in zip(place, window, shift, strict=True)), []).append(token)
    assert [row[held].tolist() for row, held in zip(cut.token, cut.held, strict=True)] == [
        expected[key] for key in sorted(expected)
    ]
    x = noise(2, 3, cut.tokens, 4)
    assert torch.equal(cut.join(cut.split(x)), x)


def are_best_cover(alike: Tensor, chosen: list[int]) -> bool:
    """Whether each of them adds most of all to facility location, of one window's cosines (n, n). Of those that add as much, the first."""
    for place, token in enumerate(chosen):
        before = chosen[:place]
        worth = {j: float(alike[:, [*before, j]].max(-1).values.sum()) for j in range(len(alike)) if j not in before}
        if token != min(j for j, value in worth.items() if value >= max(worth.values()) - TIE):
            return False
    return True


@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_chosen_tokens_and_shares_against_loops(grid: tuple[int, int, int], window: tuple[int, int, int]) -> None:
    cut = windows(grid, window)
    metric = noise(2, cut.tokens, 6)
    held = cut.held.sum(-1)
    kept = held - held // 2
    number = int(kept.max())
    used = torch.arange(number) < kept[:, None]
    chosen = choose(metric, cut, number)
    share = token_shares(metric, chosen, cut, used, 7.0)
    for sample, group in product(range(2), range(len(held))):
        unit = normalize(metric[sample, cut.token[group][cut.held[group]]].double(), dim=-1)
        number_here = int(kept[group])
        picked = chosen[sample, group, :number_here].tolist()
        assert are_best_cover(unit @ unit.T, picked)
        of = (7.0 * (unit[picked] @ unit.T)).softmax(0)
        here = share[sample, group]
        torch.testing.assert_close(here[:number_here, : len(unit)].double(), of, rtol=1e-4, atol=1e-5)
        assert not here[number_here:].any()
        assert not here[:, len(unit) :].any()
    torch.testing.assert_close(share_sizes(share, cut).sum(-1), torch.full((2,), float(cut.tokens)))


@pytest.mark.parametrize("mode", ["kv", "qkv"])
@pytest.mark.parametrize("text", [(0, 0), (2, 3)])
@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_against_whole_matrices(
    grid: tuple[int, int, int], window: tuple[int, int, int], text: tuple[int, int], mode: str
) -> None:
    """Shares as one matrix (slots, N) in float64, for all windows together."""
    layout, (before, _) = Layout(grid, *text), text
    behind = before + layout.visual
    call = call_on(layout, batch=2)
    patch = Toma({"tile_thw": window, "mode": mode, "sharpness": 5.0})
    params = patch.prepare(site(), layout, Clock(), {})
    assert params is not None
    out = patch.attend(call, params)
    cut, metric = windows(grid, window), call.k[:, :, before:behind].mean(1)
    share = token_shares(metric, choose(metric, cut, params.used.shape[-1]), cut, params.used, 5.0).double()
    others = [*range(before), *range(behind, layout.length)]
    for sample in range(2):
        whole = torch.zeros(len(params.slots), layout.visual, dtype=torch.float64)
        first = 0
        for group, used in enumerate(params.used):
            rows, tokens = int(used.sum()), cut.token[group][cut.held[group]]
            whole[first : first + rows, tokens] = share[sample, group, :rows, : len(tokens)]
            first += rows
        merging = whole / whole.sum(-1, keepdim=True)
        q, k, v = (x[sample].double() for x in (call.q, call.k, call.v))
        k, v = (torch.cat([x[:, others], merging @ x[:, before:behind]], 1) for x in (k, v))
        q = q[:, before:behind]
        read = answer(merging @ q if mode == "qkv" else q, k, v, [1.0] * len(others) + whole.sum(-1).tolist(), call.scale)
        expected = whole.T @ read if mode == "qkv" else read
        torch.testing.assert_close(out[sample, :, before:behind].double(), expected, rtol=1e-4, atol=1e-5)
    exact = call.dense()
    for text_rows in (slice(0, before), slice(behind, layout.length)):
        torch.testing.assert_close(out[..., text_rows, :], exact[..., text_rows, :])


def test_equal_tokens_survive() -> None:
    cut = windows((2, 5, 7), (2, 4, 4))
    metric, x = noise(2, cut.tokens, 8), torch.full((2, 1, cut.tokens, 3), 0.7)
    used = torch.ones(len(cut.token), 4, dtype=torch.bool)
    share = token_shares(metric, choose(metric, cut, 4), cut, used, 1000.0)
    torch.testing.assert_close(unmerge_shares(merge_shares(x, share, cut), share, cut), x)


def test_masked_keys_are_never_read() -> None:
    layout = Layout((1, 6, 8), 4, 3)
    valid = torch.ones(2, layout.length, dtype=torch.bool)
    valid[1, [1, 20, 21, 53]] = False
    outs = []
    for value in (0.0, 50.0):
        call = call_on(layout, batch=2, mask=valid)
        call.v.masked_fill_(~valid[:, None, :, None], value)
        outs.append(Toma({"mode": "kv"}).attend(call, Toma({"mode": "kv"}).prepare(site(), layout, Clock(), {})))
    torch.testing.assert_close(*outs)


def test_layers_and_steps_share_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []

    def counting(metric: Tensor, *others: Any) -> Tensor:
        made.append(metric)
        return choose(metric, *others)

    monkeypatch.setattr(toma, "choose", counting)
    state: dict[str, Any] = {}
    layout, patch = Layout((1, 6, 8)), Toma({"interval": 2, "reuse_layers": 2})
    call = call_on(layout)
    for step, matches in enumerate([2, 2, 4, 4]):
        for layer in range(4):
            patch.attend(call, patch.prepare(site(layer), layout, Clock(step, 4), state))
        assert len(made) == matches, f"step {step}"


def test_cost_is_what_is_merged() -> None:
    layout = Layout((1, 8, 8), 16)
    call: AttentionCall = call_on(layout)
    for mode, pairs in (("kv", 64 * 48 + 16 * 80), ("qkv", 32 * 48 + 16 * 80)):
        patch = Toma({"mode": mode})
        assert patch.inspect(call, patch.prepare(site(), layout, Clock(), {})) == (pairs / 80**2, None)
