"""Token merging: the maths against loops and against tomesd, what attention does with it, and who shares a match."""

from __future__ import annotations

from itertools import product
from typing import Any

import diffusers
import pytest
import tomesd.merge
import torch
from diffusers.hooks import HookRegistry
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import normalize
from torch.nn.functional import scaled_dot_product_attention as sdpa

import accelplug
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.errors import ShapeError
from accelplug.hosts.rebind import dense_sdpa
from accelplug.kernels.merge import match, merge, mlerp, own_tokens, partition, slot_sizes, unmerge
from accelplug.patches.tokens import sharing
from accelplug.patches.tokens.tome import Tome
from accelplug.testing.laws import run_once
from accelplug.testing.models import batch_of_two
from tests import tiny_models

GRIDS = [(1, 7, 9), (3, 5, 6), (2, 1, 11), (1, 1, 1)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def site(layer: int = 0) -> Site:
    return Site(f"blocks.{layer}.attn1", "transformer", "self", layer, 8)


def call_on(layout: Layout, seed: int = 0, batch: int = 1, mask: torch.Tensor | None = None) -> AttentionCall:
    q, k, v = (noise(batch, 2, layout.length, 16, seed=seed + i) for i in range(3))
    dense = dense_sdpa(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
    return AttentionCall(q, k, v, mask, 16**-0.5, dense)


def attend(config: dict, layout: Layout, call: AttentionCall) -> torch.Tensor:
    patch = Tome(config)
    return patch.attend(call, patch.prepare(site(), layout, Clock(), {}))


# ------------------------------------------------------------------------------------------------------------ the maths


@pytest.mark.parametrize("cell", [(1, 2, 2), (2, 2, 3)])
@pytest.mark.parametrize("grid", GRIDS)
def test_each_whole_cell_has_one_destination_and_all_else_are_sources(
    grid: tuple[int, int, int], cell: tuple[int, int, int]
) -> None:
    drawn = partition(grid, cell, (2, 4, 4), seed=3)
    sources, destinations = drawn.source[drawn.is_source], drawn.destination[drawn.is_destination]
    assert torch.cat([sources, destinations]).sort().values.tolist() == list(range(drawn.tokens))
    assert drawn.sources == len(sources)
    assert drawn.is_destination.any(-1).all(), "a tile without a destination"
    t, h, w = (min(c, n) for c, n in zip(cell, grid, strict=True))
    cell = (t, h, w)
    counts: dict[tuple[int, ...], int] = {}
    for token in destinations.tolist():
        place = (token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2])
        corner = tuple(p // c for p, c in zip(place, cell, strict=True))
        counts[corner] = counts.get(corner, 0) + 1
    assert counts == dict.fromkeys(product(*(range(n // c) for n, c in zip(grid, cell, strict=True))), 1)


def test_destinations_come_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, other = (partition((1, 16, 16), seed=seed) for seed in (1, 2))
    partition.cache_clear()
    torch.rand(5)
    again = partition((1, 16, 16), seed=1)
    assert torch.equal(again.destination, one.destination)
    assert not torch.equal(other.destination, one.destination)
    torch.set_rng_state(state)
    partition((1, 16, 15), seed=9)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("grid", GRIDS[:3])
def test_match_and_merge_against_loops(grid: tuple[int, int, int]) -> None:
    drawn = partition(grid, (1, 2, 2), (2, 4, 4), seed=5)
    metric, x = noise(2, drawn.tokens, 6), noise(2, 3, drawn.tokens, 4, seed=1)
    merged = drawn.sources // 2
    slot = match(metric, drawn, merged)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    for sample in range(2):
        best = []
        for tile in range(len(drawn.source)):
            ends = drawn.destination[tile][drawn.is_destination[tile]].tolist()
            for token in drawn.source[tile][drawn.is_source[tile]].tolist():
                best.append(max((float(unit[sample, token] @ unit[sample, end]), token, end) for end in ends))
        into = {token: end for _, token, end in sorted(best, reverse=True)[:merged]}
        kept = [token for token in range(drawn.tokens) if token not in into]
        assert slot[sample].tolist() == [kept.index(into.get(token, token)) for token in range(drawn.tokens)]
        for place, owner in enumerate(kept):
            members = [owner, *(token for token, end in into.items() if end == owner)]
            mean = merge(x, slot, len(kept))[sample, :, place]
            torch.testing.assert_close(mean, x[sample, :, members].mean(1))
            assert slot_sizes(slot, len(kept))[sample, place] == len(members)


@pytest.mark.parametrize(("rows", "columns"), [(8, 12), (7, 9)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_tomesd_merges_and_unmerges_alike(rows: int, columns: int, ratio: float) -> None:
    """Its search is not local, so one tile holds the grid; its draw is its own, so both take the first token of a cell."""
    metric, x = noise(2, rows * columns, 32), noise(2, rows * columns, 8, seed=1)
    drawn = partition((1, rows, columns), tile_thw=(1, rows, columns), seed=None)
    merged = min(int(rows * columns * ratio), drawn.sources)
    fewer, back = tomesd.merge.bipartite_soft_matching_random2d(metric, columns, rows, 2, 2, merged, no_rand=True)
    slot = match(metric, drawn, merged)
    ours = merge(x[:, None], slot, rows * columns - merged)
    torch.testing.assert_close(unmerge(ours, slot)[:, 0], back(fewer(x)))
    assert fewer(x).shape == ours[:, 0].shape


def test_a_mean_as_long_as_the_longest_and_what_is_left_where_sources_are_dropped() -> None:
    drawn = partition((1, 7, 9), seed=2)
    metric, x = noise(2, 63, 6), noise(2, 3, 63, 4, seed=1)
    merged = drawn.sources // 2
    slot, slots = match(metric, drawn, merged), 63 - merged
    mean, long, own = merge(x, slot, slots), mlerp(x, slot, slots), own_tokens(slot, slots, drawn)
    pruned = merge(x, slot, slots, own)
    destinations = set(drawn.destination[drawn.is_destination].tolist())
    for sample in range(2):
        for place in range(slots):
            members = (slot[sample] == place).nonzero().flatten().tolist()
            longest = x[sample, :, members].norm(dim=-1).amax(1)
            torch.testing.assert_close(long[sample, :, place].norm(dim=-1), longest)
            torch.testing.assert_close(normalize(long[sample, :, place], dim=-1), normalize(mean[sample, :, place], dim=-1))
            (owner,) = members if len(members) == 1 else [token for token in members if token in destinations]
            torch.testing.assert_close(pruned[sample, :, place], x[sample, :, owner])


@pytest.mark.parametrize("merging", ["mean", "mlerp", "prune"])
def test_masked_keys_are_never_read_however_tokens_are_merged(merging: str) -> None:
    layout = Layout((1, 6, 8), 4, 3)
    valid = torch.ones(2, layout.length, dtype=torch.bool)
    valid[1, [1, 20, 21, 30, 53]] = False
    outs = []
    for value in (0.0, 50.0):
        call = call_on(layout, batch=2, mask=valid)
        call.v.masked_fill_(~valid[:, None, :, None], value)
        outs.append(attend({"merging": merging}, layout, call))
    torch.testing.assert_close(*outs)


def test_equal_tokens_survive_merging_and_sizes_add_up() -> None:
    drawn = partition((2, 5, 7), seed=0)
    for merged in (0, 1, drawn.sources):
        slot = match(noise(2, drawn.tokens, 8), drawn, merged)
        slots = drawn.tokens - merged
        constant = torch.full((2, 1, drawn.tokens, 3), 0.7)
        assert torch.allclose(unmerge(merge(constant, slot, slots), slot), constant)
        assert (slot_sizes(slot, slots).sum(-1) == drawn.tokens).all()
        assert (slot_sizes(slot, slots) >= 1).all()


def test_zero_vectors_are_merged_like_others() -> None:
    drawn = partition((1, 6, 10), seed=4)
    slot = match(torch.zeros(1, 60, 8), drawn, drawn.sources)
    owners = slot[0, drawn.destination[drawn.is_destination]].tolist()
    assert sorted(owners) == list(range(60 - drawn.sources))
    assert set(slot.flatten().tolist()) == set(owners)


def test_shapes_that_do_not_fit_are_refused() -> None:
    drawn = partition((1, 4, 4))
    with pytest.raises(ShapeError, match="merges at most 12"):
        match(noise(1, 16, 4), drawn, 13)
    with pytest.raises(ShapeError, match=r"\(B, 16, C\)"):
        match(noise(1, 15, 4), drawn, 3)


# --------------------------------------------------------------------------------------------------------- as attention


@pytest.mark.parametrize("mode", ["kv", "qkv"])
@pytest.mark.parametrize("text", [(0, 0), (5, 0), (0, 5), (2, 3)])
def test_tokens_equal_within_cells_give_dense(mode: str, text: tuple[int, int]) -> None:
    """Then merging loses nothing, and counting each key as often as it has tokens is exact."""
    layout = Layout((1, 6, 8), *text)
    call = call_on(layout, batch=2)
    for x in (call.q, call.k, call.v):
        visual = x[..., text[0] : text[0] + 48, :].unflatten(-2, (3, 2, 4, 2))
        visual.copy_(visual[..., :1, :, :1, :].clone())
    out = attend({"mode": mode}, layout, call)
    torch.testing.assert_close(out, call.dense())
    unweighed = attend({"mode": mode, "proportional": False, "ratio": 0.4}, layout, call)
    assert not torch.allclose(unweighed, call.dense(), atol=1e-3)


@pytest.mark.parametrize("proportional", [True, False])
def test_against_attention_with_bias_and_mask(proportional: bool) -> None:
    layout = Layout((1, 6, 8), 4, 3)
    valid = torch.ones(2, layout.length, dtype=torch.bool)
    valid[1, [1, 20, 21, 53]] = False
    call = call_on(layout, batch=2, mask=valid)
    out = attend({"ratio": 0.5, "proportional": proportional}, layout, call)
    drawn = partition((1, 6, 8), seed=0)
    slot = match(call.k[..., 4:52, :].mean(1), drawn, 24)
    weight = valid[:, 4:52].float()
    bias = slot_sizes(slot, 24, weight).log() if proportional else torch.zeros(2, 24)
    bias = bias.masked_fill(slot_sizes(slot, 24, weight) == 0, -torch.inf)
    ends = torch.zeros(2, layout.length).masked_fill(~valid, -torch.inf)
    bias = torch.cat([ends[:, :4], bias, ends[:, 52:]], -1)[:, None, None]
    k, v = (
        torch.cat([x[..., :4, :], merge(x[..., 4:52, :], slot, 24, weight), x[..., 52:, :]], -2) for x in (call.k, call.v)
    )
    expected = sdpa(call.q, k, v, attn_mask=bias)
    torch.testing.assert_close(out[..., 4:52, :], expected[..., 4:52, :])
    exact = call.dense()
    for rows in (slice(0, 4), slice(52, None)):
        torch.testing.assert_close(out[..., rows, :], exact[..., rows, :])


def test_half_precision_does_not_round_the_count() -> None:
    layout = Layout((1, 16, 16))
    q, k, v = (noise(1, 2, 256, 64, seed=i) for i in range(3))
    k[:] = 0.0  # every score is its count alone
    exact = attend({"ratio": 0.7}, layout, AttentionCall(q, k, v, None, 1.0, dense_sdpa(q, k, v, scale=1.0)))
    q, k, v = (x.half() for x in (q, k, v))
    half = attend({"ratio": 0.7}, layout, AttentionCall(q, k, v, None, 1.0, dense_sdpa(q, k, v, scale=1.0)))
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=2e-4)


def test_cost_is_what_is_merged() -> None:
    layout = Layout((1, 8, 8), 16)
    call = call_on(layout)
    for mode, pairs in (("kv", 64 * 48 + 16 * 80), ("qkv", 32 * 48 + 16 * 80)):
        patch = Tome({"mode": mode, "ratio": 0.5})
        assert patch.inspect(call, patch.prepare(site(), layout, Clock(), {})) == (pairs / 80**2, None)
    assert Tome({"ratio": 0.99}).merged(layout) == 48, "more than all sources"


# --------------------------------------------------------------------------------------------------------- one match, many


class Matches(list):
    """Matches that were made: their metrics."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Matches:
    made = Matches()

    def counting(metric: torch.Tensor, *others: Any) -> Any:
        made.append(metric)
        return match(metric, *others)

    monkeypatch.setattr(sharing, "match", counting)
    return made


def recipe(**config: Any) -> dict:
    return {"patch": "tome", "with": config}


def test_layers_and_steps_share_a_match(made: Matches) -> None:
    model, inputs = tiny_models.build("wan")  # 3 layers
    with accelplug.apply(model, recipe(interval=2, reuse_layers=2), gate="off") as plug:
        for step, matches in enumerate([2, 2, 4, 4]):
            plug.step(step, 4)
            run_once(model, inputs)
            assert len(made) == matches, f"step {step}"
        plug.step(0, 4)  # the next run begins
        run_once(model, inputs)
        assert len(made) == 6


def test_an_unknown_step_never_sees_an_older_forward(made: Matches) -> None:
    model, inputs = tiny_models.build("wan")
    other = {key: value.flip(-1) if value.is_floating_point() else value for key, value in inputs.items()}
    with accelplug.apply(model, recipe(interval=5, reuse_layers=3), gate="off"):
        run_once(model, inputs)
        second = run_once(model, other)
        assert len(made) == 2
    with accelplug.apply(model, recipe(interval=5, reuse_layers=3), gate="off"):
        assert torch.equal(run_once(model, other), second)


def test_branches_have_matches_of_their_own_and_the_same_destinations(made: Matches) -> None:
    """Two calls with named branches are what one call with both halves is."""
    model, inputs = tiny_models.build("wan")
    both, halves = batch_of_two(inputs)
    with accelplug.apply(model, recipe(interval=2), gate="off") as plug:
        apart = []
        for step in range(2):
            plug.step(step, 4)
            for branch, half in zip(("cond", "uncond"), halves, strict=True):
                with model.cache_context(branch):
                    apart.append(run_once(model, half))
        assert len(made) == 6
    with accelplug.apply(model, recipe(interval=2), gate="off") as plug:
        for step in range(2):
            plug.step(step, 4)
            together = run_once(model, both)
            torch.testing.assert_close(together, torch.cat(apart[2 * step : 2 * step + 2]), rtol=1e-4, atol=1e-5)


def test_a_layer_whose_leader_was_skipped_matches_itself(made: Matches) -> None:
    """As under a cache that skips blocks."""
    state: dict[str, Any] = {}
    layout = Layout((1, 6, 8))
    patch = Tome({"interval": 2, "reuse_layers": 4})
    first, second = (patch.prepare(site(layer), layout, Clock(0, 4), state) for layer in (0, 1))
    out = patch.attend(call_on(layout), second)
    assert len(made) == 1
    assert torch.equal(out, patch.attend(call_on(layout), first))
    assert len(made) == 2, "the first call of a leader makes the match"
    leader = patch.prepare(site(0), layout, Clock(1, 4), state)
    patch.attend(call_on(layout), leader)
    assert len(made) == 2, "the match of step 0 serves step 1"
    patch.attend(call_on(layout, batch=2), leader)
    assert len(made) == 3, "a batch of another size needs its own"


def test_a_reset_forgets_matches(made: Matches) -> None:
    model, inputs = tiny_models.build("wan")
    with accelplug.apply(model, recipe(interval=4), gate="off") as plug:
        plug.step(1, 4)
        run_once(model, inputs)
        HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()  # as pipelines do where a run ends
        plug.step(2, 4)
        run_once(model, inputs)
        assert len(made) == 6


@pytest.mark.parametrize("kind", ["regional", "whole"])
def test_a_shared_match_crosses_compiled_graphs(kind: str) -> None:
    model, inputs = tiny_models.build("wan")
    rule = recipe(interval=2, reuse_layers=2, mode="qkv")
    eager = []
    with accelplug.apply(model, rule, gate="off") as plug:
        for step in range(4):
            plug.step(step, 4)
            eager.append(run_once(model, {**inputs, "hidden_states": inputs["hidden_states"] + step}))
    torch._dynamo.reset()
    counter = CompileCounter()
    forward = model
    with accelplug.apply(model, rule, gate="off") as plug:
        if kind == "regional":
            model.compile_repeated_blocks(fullgraph=True, backend=counter)
        else:
            forward = torch.compile(model, fullgraph=True, backend=counter)
        for step in range(4):
            plug.step(step, 4)
            with model.cache_context("cond"):
                out = run_once(forward, {**inputs, "hidden_states": inputs["hidden_states"] + step})
            torch.testing.assert_close(out, eager[step], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2, "graphs that make a match, and graphs that take one"
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------ its recipes

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("config", "name", "channels", "touched"), [(SD15, "stable-diffusion-1.5", 320, 5), (SDXL, "sdxl", 640, 10)]
)
def test_unets_are_merged_at_their_finest_attention_alone(
    config: dict[str, Any], name: str, channels: int, touched: int
) -> None:
    """As the release's max_downsample asks for, whatever the size of the image."""
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config)
    with accelplug.apply(model) as plug:
        assert plug.recipe.name == f"{name}/tome"
        merged = [site for site in plug.sites if plug.recipe.may_touch(site)]
        assert len(merged) == touched
        assert {model.get_submodule(site.module).to_q.in_features for site in merged} == {channels}
        for grid, patch in (((1, 64, 64), "tome"), ((1, 56, 64), None)):
            assert {plug.recipe.decide(site, Layout(grid), Clock()).patch for site in merged} == {patch}


@pytest.mark.parametrize("recipe", ["tome", "proxy"])
def test_flux_is_merged_from_2048_on(recipe: str) -> None:
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    with accelplug.apply(model, recipe) as plug:
        decisions = {
            rows: [plug.recipe.decide(site, Layout((1, rows, rows), 512), Clock(14, 28)) for site in plug.sites]
            for rows in (64, 128, 256)
        }
    served = {rows: sum(decision.patch == recipe for decision in of) for rows, of in decisions.items()}
    assert served == {64: 0, **dict.fromkeys((128, 256), 14 + 33 if recipe == "tome" else 57)}
    if recipe == "proxy":  # 8 x 8 windows at both sizes
        assert {tuple(decision.config["window_thw"]) for decision in decisions[128]} == {(1, 16, 16)}
        assert {tuple(decision.config["window_thw"]) for decision in decisions[256]} == {(1, 32, 32)}
