"""Methods that choose for every head: what each way reads, that one kernel call serves all, and what the searches find."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot, scaled_dot_product_attention

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.errors import RecipeError, ShapeError, UnsupportedError
from accelplug.kernels.plan import pack_bits
from accelplug.kernels.static import band_width
from accelplug.patches.base import Patch
from accelplug.patches.calibration import Seen
from accelplug.patches.sparse import template
from accelplug.patches.sparse.paro import ORDERS, Paro, ParoSearch, mask_row
from accelplug.patches.sparse.per_head import reads
from accelplug.patches.sparse.radial import Radial
from accelplug.patches.sparse.rest_weights import RestWeights
from accelplug.patches.sparse.sparse_vdit import FULL, MODES, SKIP, SparseVdit, SparseVditSearch
from accelplug.patches.sparse.sta import Sta, StaSearch, maximal_windows
from accelplug.table import Table

LAYOUT = Layout((4, 6, 8), text_after=5)
VIDEO = Layout((4, 6, 8))
SITE = Site("blocks.0.attn1", "transformer", "self", 0, 1)
ALL_MODES = Table(torch.arange(5, dtype=torch.uint8)[None], key="modes")


def call_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionCall:
    return AttentionCall(q, k, v, None, q.shape[-1] ** -0.5, lambda: scaled_dot_product_attention(q, k, v))


def noise(heads: int, tokens: int, width: int = 16) -> AttentionCall:
    return call_of(*torch.randn(3, 1, heads, tokens, width).unbind())


def answer(patch: Patch, call: AttentionCall, layout: Layout = LAYOUT) -> torch.Tensor:
    return patch.attend(call, patch.prepare(SITE, layout, Clock(0, 4), {}))


def seen(call: AttentionCall, layout: Layout, step: int = 0, steps: int = 1) -> Seen:
    clock = Clock(step, steps)
    return Seen(call, call.dense(), SITE, layout, clock, step, steps, torch.Generator().manual_seed(step))


def places(layout: Layout) -> torch.Tensor:
    """Frame, row and column of every visual token, int64 (V, 3)."""
    return torch.cartesian_prod(*[torch.arange(n) for n in layout.grid_thw])


def along(axis: int, layout: Layout, strength: float = 30.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys (V, D): a token attends to those that differ from it on one axis alone."""
    others = [i for i in range(3) if i != axis]
    code = torch.cat([one_hot(places(layout)[:, i], 16).float() for i in others], -1)
    return code * strength, code


# ------------------------------------------------------------------------------------------------------------ sparse_vdit


def test_the_published_width_of_a_band() -> None:
    assert band_width(1000, 0.3) == pytest.approx(163.3, abs=0.1)
    far = (torch.arange(1000)[:, None] - torch.arange(1000)).abs()
    assert float((far <= band_width(1000, 0.3)).float().mean()) == pytest.approx(0.3, abs=2e-3)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_densities_are_as_asked(density: float) -> None:
    layout = Layout((8, 16, 16))
    patch = SparseVdit({"block": 16, "diagonal": density, "multi_diagonal": density, "stripe": density})
    found = dict(zip(MODES, patch.laid(layout).plan.density()[0].tolist(), strict=True))
    assert (found["full"], found["skip"]) == (1, 0)
    for mode in ("diagonal", "multi_diagonal", "stripe"):
        assert found[mode] == pytest.approx(density, abs=0.01)


def test_what_each_mode_reads() -> None:
    patch = SparseVdit({"block": 8, "diagonal": 0.2, "multi_diagonal": 0.2, "stripe": 0.25})
    tokens = torch.arange(LAYOUT.length)
    read = dict(zip(MODES, reads(patch.laid(LAYOUT), tokens), strict=True))
    video, text = slice(0, LAYOUT.visual), slice(LAYOUT.visual, None)
    assert read["full"].all()
    assert not read["skip"][video].any()
    for mode in MODES:
        assert read[mode][text].all(), "text reads all"
        assert mode == "skip" or read[mode][:, text].all(), "text is read by all"
        assert mode == "skip" or read[mode].any(-1).all()
    place = places(LAYOUT)
    near = (tokens[video, None] - tokens[video]).abs()
    assert read["diagonal"][video, video][near == 0].all()
    assert near[read["diagonal"][video, video]].max() < band_width(LAYOUT.visual, 0.2) + 8
    same_place = (place[:, None, 1:] == place[:, 1:]).all(-1)
    assert read["multi_diagonal"][video, video][same_place].all(), "all frames of one place"
    assert not read["diagonal"][video, video][same_place].all()
    assert (read["stripe"][video] == read["stripe"][0]).all(), "the same keys for all"


@pytest.mark.parametrize("rest", ["drop", "pool"])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_one_kernel_call_serves_heads_of_all_modes(backend: str, rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"block": 8, "backend": backend, "rest": rest}
    call = noise(5, LAYOUT.length)
    patch = SparseVdit({**config, "modes": ALL_MODES})
    kernel, calls = template.block_attention, []
    monkeypatch.setattr(template, "block_attention", lambda **given: calls.append(1) or kernel(**given))
    together = answer(patch, call)
    assert len(calls) == 1
    assert not together[0, SKIP, : LAYOUT.visual].any()
    torch.testing.assert_close(together[:, FULL], call.dense()[:, FULL], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[0, :, LAYOUT.visual :], call.dense()[0, :, LAYOUT.visual :], rtol=1e-4, atol=1e-5)
    for head, mode in enumerate(MODES[1:], 1):
        alone = answer(SparseVdit({**config, "modes": mode}), call)
        torch.testing.assert_close(together[:, head], alone[:, head], rtol=1e-5, atol=1e-6)


def test_grouped_queries_and_ragged_blocks() -> None:
    layout = Layout((3, 5, 7))  # 105 tokens, one more than 13 blocks of 8
    call = noise(5, 105)
    call = call_of(call.q, call.k[:, :1].contiguous(), call.v[:, :1].contiguous())
    call = AttentionCall(call.q, call.k, call.v, None, call.scale, call.dense)
    patch = SparseVdit({"block": 8, "backend": "reference", "modes": ALL_MODES})
    wide = call_of(call.q, *(x.expand(-1, 5, -1, -1) for x in (call.k, call.v)))
    torch.testing.assert_close(answer(patch, call, layout), answer(patch, wide, layout))


def test_heads_that_do_not_fit_are_an_error() -> None:
    patch = SparseVdit({"block": 8, "modes": ALL_MODES})
    with pytest.raises(ShapeError, match="5 heads, this call has 2"):
        answer(patch, noise(2, LAYOUT.length))
    with pytest.raises(ValueError, match=r"entry \[0, 0\] is 5, and should be less than 5"):
        SparseVdit({"modes": Table(torch.tensor([[5]]))})
    full = Table(torch.zeros(1, 2, dtype=torch.uint8))
    assert SparseVdit({"modes": full}).prepare(SITE, LAYOUT, Clock(), {}) is None


def test_the_search_finds_what_was_planted() -> None:
    tokens = VIDEO.visual
    raster = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs().float()
    q, k = torch.zeros(2, 1, 5, tokens, tokens).unbind()
    k[:] = torch.eye(tokens)
    q[0, 0] = torch.randn(tokens, tokens) * 3  # no structure: full
    q[0, 2] = -raster  # next in raster order
    place = places(VIDEO)
    q[0, 3] = ((place[:, None, 1:] == place[:, 1:]).all(-1).float() - 1) * 50  # all frames of its own place
    stripes = SparseVdit({"block": 8}).reads("stripe", SparseVdit({"block": 8}).laid(VIDEO).tiles)[0].repeat_interleave(8)
    q[0, 4] = (stripes.float() - 1) * 50
    v = torch.randn(1, 5, tokens, 8)
    v[0, 1] = 1e-3 * torch.randn(tokens, 8)
    q[0, 1] = 0.0  # spread over everything, of values that cancel
    search = SparseVditSearch(SparseVdit({"block": 8}), {"lam": 0.5, "eps": 0.45})
    search.observe(
        seen(AttentionCall(q, k, v, None, 1.0, lambda: scaled_dot_product_attention(q, k, v, scale=1.0)), VIDEO), 0
    )
    modes = search.tables()["modes"]
    assert modes.shape == (1, 1, 5)
    assert [MODES[i] for i in modes[0, 0, [0, 2, 3, 4]]] == ["full", "diagonal", "multi_diagonal", "stripe"]
    error = search.mean("error")[0, 0]
    assert error[:, FULL].max() < 1e-9
    torch.testing.assert_close(error[:, SKIP], torch.ones(5, dtype=torch.float64))
    nothing = SparseVditSearch(SparseVdit({"block": 8}), {"eps": 0.0})
    nothing.state = search.state
    assert (nothing.tables()["modes"] == FULL).all(), "with eps 0 all heads stay full"
    greedy = SparseVditSearch(SparseVdit({"block": 8}), {"lam": 100.0, "eps": 1000.0})
    greedy.state = search.state
    assert (greedy.tables()["modes"] == SKIP).all(), "where reading costs all, all is skipped"


# --------------------------------------------------------------------------------------------------------------------- sta


def test_published_densities_of_windows() -> None:
    layout = Layout((30, 48, 80))
    small = Sta({"block": 384, "windows": [[3, 3, 3], [5, 5, 5]]})
    assert small.tile_thw(layout) == (6, 8, 8)
    density = small.laid(layout).plan.density()[0]
    assert density[0] == pytest.approx(27 / 300)
    assert density[1] == pytest.approx(125 / 300)
    assert Sta({"block": 128}).tile_thw(layout) == (2, 8, 8)


def test_windows_are_clamped_at_the_borders() -> None:
    layout = Layout((6, 24, 40))
    patch = Sta({"block": 64, "windows": [[3, 1, 3]]})  # 6 x 3 x 5 tiles of (1, 8, 8)
    members = patch.laid(layout).plan.members[0, 0].view(6, 3, 5, 6, 3, 5)
    assert (members.flatten(3).sum(-1) == 9).all()
    for frame, row, column in torch.cartesian_prod(torch.arange(6), torch.arange(3), torch.arange(5)).tolist():
        centre = min(max(frame, 1), 4), row, min(max(column, 1), 3)
        read = members[frame, row, column].nonzero()
        assert (read.amin(0).tolist(), read.amax(0).tolist()) == (
            [centre[0] - 1, row, centre[2] - 1],
            [centre[0] + 1, row, centre[2] + 1],
        )


def test_maximal_windows() -> None:
    windows: Any = maximal_windows((5, 6, 10), 0.3)
    assert all(math.prod(w) <= 90 for w in windows)
    assert (3, 3, 10) in windows
    assert (3, 3, 9) not in windows
    assert maximal_windows((1, 2, 2), 0.01) == ((1, 1, 1),)


def test_the_mask_search_finds_the_axis() -> None:
    layout = Layout((6, 6, 16))  # tiles of (1, 1, 8)
    patch = Sta({"block": 8, "windows": [["full", 1, 1], [1, "full", 1], [1, 1, "full"]]})
    code = [along(axis, layout) for axis in (0, 1, 2)]
    q, k = (torch.stack([pair[i] for pair in code])[None] for i in (0, 1))
    search = StaSearch(patch, {"rows": 32})
    for step, heads in enumerate(([0, 1, 2], [1, 2, 0])):
        search.observe(seen(call_of(q[:, heads], k[:, heads], torch.randn(1, 3, layout.visual, 8)), layout, step, 2), 0)
    choice = search.tables()["choice"]
    assert choice.tolist() == [[[0, 1, 2]], [[1, 2, 0]]]  # a window for each step, layer and head
    table = Table(choice, StaSearch.axes["choice"])
    found = answer(Sta({**patch.config.model_dump(), "choice": table}), call_of(q, k, torch.randn_like(q)), layout)
    assert torch.isfinite(found).all()


def test_a_choice_beyond_the_windows_is_an_error() -> None:
    with pytest.raises(ValueError, match="choice 2 is not one of the 1 windows"):
        Sta({"block": 8, "choice": 2})
    with pytest.raises(ShapeError, match="way 99, and Sta has"):
        Sta({"block": 8, "windows": "maximal", "choice": 99}).prepare(SITE, VIDEO, Clock(), {})


# -------------------------------------------------------------------------------------------------------------------- paro


def test_rows_of_masks() -> None:
    assert [mask_row(Clock(step, 8), 3) for step in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert mask_row(Clock(3, 8), 1) == 0


@pytest.mark.parametrize("layout", [LAYOUT, Layout((3, 5, 7), text_before=3)])
def test_orders_and_masks_of_each_head(layout: Layout) -> None:
    """Against a mask over tokens, made one head at a time."""
    unit, number = 8, -(-layout.visual // 8)
    masks = torch.rand(6, number, number) < 0.4
    masks |= torch.eye(number, dtype=torch.bool)
    table = Table(pack_bits(masks)[None, None], ("steps", "layers", "heads"), key="masks")
    patch = Paro({"block": unit, "backend": "reference", "order": Table(torch.arange(6)[None]), "masks": table})
    call = noise(6, layout.length)
    found = answer(patch, call, layout)
    first = layout.text_before
    for head, order in enumerate(ORDERS):
        rank = torch.empty(layout.visual, dtype=torch.int64)
        grid = torch.arange(layout.visual).view(layout.grid_thw)
        rank[grid.permute(*("thw".index(axis) for axis in order)).flatten()] = torch.arange(layout.visual)
        allowed = torch.ones(layout.length, layout.length, dtype=torch.bool)
        video = slice(first, first + layout.visual)
        allowed[video, video] = masks[head][rank // unit][:, rank // unit]
        q, k, v = (x[:, head] for x in (call.q, call.k, call.v))
        torch.testing.assert_close(
            found[:, head], scaled_dot_product_attention(q, k, v, attn_mask=allowed), rtol=1e-4, atol=1e-5
        )


def test_masks_of_other_blocks_are_refused() -> None:
    table = Table(torch.zeros(1, 1, 2, 5, 1, dtype=torch.int32), ("steps", "layers", "heads"))
    with pytest.raises(RecipeError, match="24 of 8 slots"):
        Paro({"block": 8, "masks": table}).prepare(SITE, VIDEO, Clock(0, 1), {})


def test_the_calibration_finds_the_axis_and_the_density() -> None:
    """A head that attends along an axis has its blocks where that axis counts fastest."""
    layout = Layout((8, 8, 8))
    code = [along(axis, layout) for axis in (0, 1, 2)]
    q, k = (torch.stack([pair[i] for pair in code])[None] for i in (0, 1))
    call = call_of(q, k, torch.randn(1, 3, layout.visual, 8))
    patch = Paro({"block": 8})
    search = ParoSearch(patch, {"density": 0.25})
    for part in range(2):
        for step in range(4):
            search.observe(seen(call, layout, step, 4), part)
    tables = search.tables()
    assert [ORDERS[i][-1] for i in tables["order"][0]] == ["t", "h", "w"]
    assert tables["masks"].shape == (3, 1, 3, 64, 2)
    assert search.state["sums"].nbytes == 3 * 3 * 64 * 64 * 2
    made = {key: Table(values, search.axes[key], key=key) for key, values in tables.items()}
    calibrated = Paro({"block": 8, "backend": "reference", **made})
    plan = calibrated.prepare(SITE, layout, Clock(0, 4), {}).plan
    assert plan.density()[0].tolist() == pytest.approx([0.25] * 3, abs=0.01)
    assert plan.members.any(-1).all()
    assert error(calibrated, call, layout) < 0.05
    assert (
        error(calibrated, call, layout)
        < error(Paro({"block": 8, "backend": "reference", "density": 0.25}), call, layout) / 4
    )


WAN_14B, HUNYUAN = (40, 40, (21, 45, 80)), (24, 60, (33, 45, 80))  # heads, layers, grid at 720p


@pytest.mark.parametrize(
    ("model", "block", "buckets", "refusal"),
    [
        (WAN_14B, 128, 4, None),
        (WAN_14B, 64, 4, "12791 MiB of sums and 801 MiB of masks, .* What fits: block=128 with buckets=4[.]"),
        (HUNYUAN, 128, 4, "What fits: block=256 with buckets=4, or block=128 with buckets=1[.]"),
        ((400, 400, (99, 90, 160)), 1024, 1, "What fits: nothing"),
    ],
)
def test_calibration_refuses_at_once_what_does_not_fit(
    model: tuple[int, int, tuple[int, int, int]], block: int, buckets: int, refusal: str | None
) -> None:
    heads, layers, grid = model
    layout = Layout(grid)
    x = torch.zeros(1, 1, 1, 1).expand(1, heads, layout.visual, 1)
    site = Site("blocks.0.attn1", "transformer", "self", 0, layers)
    first = Seen(call_of(x, x, x), x, site, layout, Clock(0, 50), 0, buckets, torch.Generator())
    search = ParoSearch(Paro({"block": block}))
    if refusal is None:
        search._require_room(first)
        return
    with pytest.raises(UnsupportedError, match=refusal):
        search.observe(first, 0)


def error(patch: Patch, call: AttentionCall, layout: Layout) -> float:
    exact = call.dense()
    return float((answer(patch, call, layout) - exact).norm() / exact.norm())


# ------------------------------------------------------------------------------------------------------ weights of the rest


def pooled(**config: Any) -> Radial:
    return Radial({"block": 8, "decay": 0.2, "rest": "pool", "backend": "reference", "sink": False, **config})


def test_equal_keys_want_the_textbook_weight() -> None:
    layout = Layout((16, 2, 4))
    call = noise(2, layout.visual)
    keys = call.k.unflatten(-2, (-1, 8)).mean(-2, keepdim=True).expand(-1, -1, -1, 8, -1).flatten(-3, -2)
    call = call_of(call.q, keys, call.v)
    weights = RestWeights(lambda *where: pooled())
    weights.observe(seen(call, layout), 0)
    assert weights.tables()["rest_weight"].tolist() == [[1.0, 1.0]]
    assert weights.mean("error")[0, 0, :, -1].max() < 1e-10


def test_blocks_whose_mean_value_misleads_want_little() -> None:
    """Half the keys of each block matter, and the mean value of a block says the opposite of theirs."""
    layout = Layout((16, 2, 4))
    matter = torch.arange(layout.visual) % 2 == 0
    keys = torch.where(matter, 3.0, -3.0)[None, None, :, None].expand(1, 2, -1, 16)
    values = torch.where(matter, 1.0, -3.0)[None, None, :, None].expand(1, 2, -1, 16)
    call = call_of(torch.ones_like(keys), keys.contiguous(), values.contiguous())
    weights = RestWeights(lambda *where: pooled())
    weights.observe(seen(call, layout), 0)
    table = weights.tables()["rest_weight"]
    assert table.tolist() == [[0.0, 0.0]]
    assert error(pooled(rest_weight=Table(table)), call, layout) < error(pooled(), call, layout)


def test_a_table_of_weights_reaches_every_head() -> None:
    layout = Layout((16, 2, 4))
    call = noise(3, layout.visual)
    table = answer(pooled(rest_weight=Table(torch.tensor([[0.0, 0.5, 1.0]]))), call, layout)
    for head, weight in enumerate((0.0, 0.5, 1.0)):
        torch.testing.assert_close(table[:, head], answer(pooled(rest_weight=weight), call, layout)[:, head])
    with pytest.raises(ShapeError, match="for 2 heads, this call has 3"):
        answer(pooled(rest_weight=Table(torch.ones(1, 2))), call, layout)
    unseen = RestWeights(lambda *where: None)
    unseen.observe(seen(call, layout), 0)
    assert not unseen.state
