"""Clusters: Lloyd's algorithm stated a second time token by token, the order it gives, and what it remembers between steps."""

from __future__ import annotations

import gc
from typing import Any, cast

import pytest
import torch

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels import chunks
from accelplug.kernels.clusters import cluster_order, cluster_tiles, kmeans, lined_up
from accelplug.kernels.memory import COLD, Memory, memory_of
from accelplug.kernels.orders import tiles
from accelplug.patches.sparse.sol import Sol

SITE = Site("blocks.1.attn1", "transformer", "self", 1, 4)


def lloyd(x: torch.Tensor, centres: torch.Tensor, iterations: int, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One row, float64, one token and one cluster at a time."""
    x, centres = x.double(), centres.double().clone()

    def labels() -> list[int]:
        return [min(range(len(centres)), key=lambda c: float((token - centres[c]).square().sum())) for token in x]

    for _ in range(iterations):
        label = labels()
        for c in range(len(centres)):
            own = [token for token, at, counts in zip(x, label, valid, strict=True) if at == c and counts]
            if own:
                centres[c] = torch.stack(own).mean(0)
    return centres, torch.tensor(labels())


def blobs(*shape: int, centres: int = 5, spread: float = 0.3) -> torch.Tensor:
    """Tokens around a few centres."""
    *lead, number, dim = shape
    middle = 3 * torch.randn(*lead, centres, dim)
    owner = torch.randint(centres, (*lead, number))
    return middle.gather(-2, owner[..., None].expand(*shape)) + spread * torch.randn(shape)


@pytest.mark.parametrize("iterations", [0, 1, 3, 30])
@pytest.mark.parametrize("chunk", [chunks.CHUNK, 40])
def test_is_lloyds_algorithm(iterations: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    x, valid = blobs(3, 41, 4), torch.rand(3, 41) < 0.8
    start = torch.cat([x[:, :5], torch.full((3, 1, 4), 100.0)], 1)  # a last cluster that gets no token
    centres, label = kmeans(x, start, iterations, valid)
    for row in range(3):
        expected, expected_label = lloyd(x[row], start[row], iterations, valid[row])
        torch.testing.assert_close(centres[row].double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(label[row], expected_label)
    assert torch.equal(centres[:, 5], start[:, 5])


def same_or_reversed(place: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(place, expected) or torch.equal(place, len(expected) - 1 - expected)


def test_line_up_along_the_direction_of_greatest_spread() -> None:
    direction = torch.nn.functional.normalize(torch.randn(2, 1, 8), dim=-1)
    at = torch.stack([torch.randperm(20) for _ in range(2)])
    centres = at[..., None] * direction + 0.05 * torch.randn(2, 20, 8) + 7
    far = torch.cat([centres, 1e3 * torch.randn(2, 1, 8)], 1)  # without tokens: it has no say
    size = torch.ones(2, 21)
    size[:, 20] = 0
    for row in range(2):
        assert same_or_reversed(lined_up(centres, torch.ones(2, 20))[row], at[row])
        assert same_or_reversed(lined_up(far, size)[row, :20].argsort().argsort(), at[row])


def order_of(
    x: torch.Tensor,
    valid: torch.Tensor | None = None,
    first: int = 0,
    number: int | None = None,
    clusters: int = 5,
    iterations: int = 20,
    warm: int = 2,
    ticket: torch.Tensor = COLD,
) -> torch.Tensor:
    return cluster_order(x, valid, first, number or x.shape[2], clusters, iterations, warm, ticket)


def test_an_order_keeps_clusters_together() -> None:
    owner = torch.randint(4, (2, 3, 50))
    x = 10 * torch.randn(2, 3, 4, 8).gather(2, owner[..., None].expand(-1, -1, -1, 8)) + 0.1 * torch.randn(2, 3, 50, 8)
    order = order_of(x, clusters=12)  # more than there are, so that each is found: a cluster may be two
    assert torch.equal(order.sort(-1).values, torch.arange(50).expand(2, 3, 50))
    runs = owner.gather(-1, order).diff(dim=-1).ne(0).sum(-1) + 1
    assert (runs == 4).all()


def test_heads_and_batch_rows_are_by_themselves_and_no_generator_is_touched() -> None:
    x, state = blobs(3, 2, 60, 4), torch.get_rng_state()
    together = order_of(x)
    for b in range(3):
        for h in range(2):
            assert torch.equal(together[b, h], order_of(x[b : b + 1, h : h + 1])[0, 0])
    assert torch.equal(together, order_of(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(together[0, 0], together[0, 1])


def test_tokens_that_do_not_count_stand_last_and_move_no_centre() -> None:
    x, valid = blobs(2, 2, 40, 4), torch.rand(2, 40) < 0.7
    order = order_of(x, valid)
    counts = valid[:, None].expand(2, 2, 40).gather(-1, order)
    assert (counts.long().diff(dim=-1) <= 0).all()
    starts = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:5]
    loud = ~valid
    loud[:, starts] = False  # centres start at tokens, even at those that do not count
    changed = torch.where(loud[:, None, :, None], 1e3 * torch.randn(2, 2, 40, 4), x)
    number = valid.sum(-1)
    for b in range(2):
        assert torch.equal(order_of(changed, valid)[b, :, : number[b]], order[b, :, : number[b]])


@pytest.mark.parametrize("text", [(0, 0), (5, 0), (0, 7), (3, 4)])
@pytest.mark.parametrize("grid_thw", [(3, 4, 5), (2, 4, 8)], ids=str)
def test_tiles_of_clusters_round_trip(text: tuple[int, int], grid_thw: tuple[int, int, int]) -> None:
    layout = Layout(grid_thw, *text)
    raster, x = tiles(layout, "raster", 16), torch.randn(2, 3, layout.length, 4)
    valid = torch.rand(2, layout.length) < 0.8
    laid = cluster_tiles(raster, 16, cluster_order(x, valid, layout.text_before, layout.visual, 6, 10, 2, COLD))
    assert laid.gather.shape == (2, 3, raster.slots)
    assert torch.equal(laid.unpermute(laid.permute(x)), x)
    assert torch.equal(laid.held, raster.held)
    first = laid.gather.unflatten(-1, (-1, 16))[..., :1].expand(-1, -1, -1, 16).flatten(-2)
    empty = ~laid.held[: laid.visual_slots]
    assert torch.equal(laid.gather[..., : laid.visual_slots][..., empty], first[..., : laid.visual_slots][..., empty])
    number, held_text = layout.length - layout.visual, laid.held[laid.visual_slots :]
    in_text = laid.gather[..., laid.visual_slots :][..., held_text]
    tokens = [*range(text[0]), *range(layout.length - text[1], layout.length)]
    assert torch.equal(in_text, torch.tensor(tokens, dtype=torch.int64).expand(2, 3, number))
    every_head = valid[:, None].expand(2, 3, -1).gather(-1, laid.gather)
    mask = laid.permute_mask(valid)
    assert torch.equal(every_head[..., laid.held], mask[:, None].expand_as(every_head)[..., laid.held])


def test_a_step_starts_where_the_last_one_ended() -> None:
    memory, x = Memory(), blobs(1, 2, 60, 4, spread=2.0)
    memory.advance(0)
    cold = order_of(x, ticket=memory.ticket)
    assert torch.equal(cold, order_of(x))
    assert torch.equal(cold, order_of(x, ticket=memory.ticket, warm=0))  # within a step every call starts from the same
    after: Any = memory.end
    memory.advance(0)
    assert memory.start is None
    memory.advance(1)
    assert memory.start is after
    near = x + 0.3 * torch.randn_like(x)
    warm = order_of(near, ticket=memory.ticket, warm=1)
    centres, _ = kmeans(near.flatten(0, 1), cast(Any, after).flatten(0, 1), 1)
    torch.testing.assert_close(memory.end.flatten(0, 1), centres)
    assert not torch.equal(warm, order_of(near, iterations=1))
    other = order_of(x[..., :50, :].repeat(2, 1, 1, 1), ticket=memory.ticket)  # another batch: anew
    assert torch.equal(other, order_of(x[..., :50, :].repeat(2, 1, 1, 1)))


def test_centres_die_with_the_state_of_the_run() -> None:
    state: dict[str, Any] = {}
    sol, layout = Sol({"block": 8, "order": "kmeans"}), Layout((2, 4, 8))
    q, k, v = torch.randn(3, 1, 2, 64, 4)
    call = AttentionCall(q, k, v, None, 0.5, dense=None)
    for step in range(2):
        params = sol.prepare(SITE, layout, Clock(step, 4), state)
        sol.attend(call, params)
    queries, keys = state["clusters"]
    assert queries.start.shape == (1, 2, 2, 4)
    assert keys.start.shape == (1, 2, 2, 4)
    ticket = int(queries.ticket)
    del queries, keys
    state.clear()
    gc.collect()
    assert memory_of(torch.tensor(ticket), torch.device("cpu")) is None
    assert torch.isfinite(sol.attend(call, params)).all()  # its ticket is void: it starts anew
    unclocked = sol.prepare(SITE, layout, Clock(), state)
    for _ in range(2):
        sol.attend(call, unclocked)
        sol.prepare(SITE, layout, Clock(), state)
    assert [memory.start for memory in state["clusters"]] == [None, None]


def call_of(layout: Layout, heads: int = 2, kv_heads: int = 2, mask: bool = False, dim: int = 8) -> AttentionCall:
    q = torch.randn(2, heads, layout.length, dim)
    k, v = torch.randn(2, 2, kv_heads, layout.length, dim)
    valid = torch.rand(2, layout.length) < 0.8 if mask else None
    group = heads // kv_heads

    def dense() -> torch.Tensor:
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        allowed = None if valid is None else valid[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, allowed, scale=0.3)

    return AttentionCall(q, k, v, valid, 0.3, dense)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("text", [(0, 0), (3, 5)])
def test_all_blocks_in_cluster_order_are_dense_attention(mask: bool, kv_heads: int, text: tuple[int, int]) -> None:
    layout = Layout((3, 5, 7), *text)
    call = call_of(layout, kv_heads=kv_heads, mask=mask)
    sol = Sol({"block": 8, "block_k": 16, "order": "kmeans", "tau": -1e9, "backend": "reference", "query_clusters": 9})
    torch.testing.assert_close(sol.attend(call, sol.prepare(SITE, layout, Clock(0, 2), {})), call.dense())


def test_it_is_one_node_of_one_graph() -> None:
    layout = Layout((3, 5, 7), 0, 5)
    sol = Sol({"block": 8, "order": "kmeans", "backend": "reference", "rest": "pool"})
    calls = [call_of(layout) for _ in range(2)]
    states: list[dict[str, Any]] = [{}, {}]
    compiled = torch.compile(lambda call, params: sol.attend(call, params), backend="eager", fullgraph=True)
    for step in range(3):
        eager, traced = (sol.prepare(SITE, layout, Clock(step, 4), state) for state in states)
        for call in calls:
            torch.testing.assert_close(compiled(call, traced), sol.attend(call, eager))
    assert states[1]["clusters"][0].start is not None
