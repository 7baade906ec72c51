"""VMoBA: its regions by layer, and pairs of a head competing, against the rule written as a loop."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.patches.sparse.template import Blocks
from accelplug.patches.sparse.vmoba import Vmoba, region_of, strongest_pairs

LAYOUT = Layout((5, 4, 6), text_before=3, text_after=6)
PARTS = [[3, 1, 1], [1, 2, 3], [2, 2, 2]]


def site(layer: int | None) -> Site:
    return Site("blocks.x.attn1", "transformer", "self", layer, 9)


def random_call(layout: Layout, heads: int = 2) -> AttentionCall:
    q, k, v = (torch.randn(2, heads, layout.length, 16) for _ in range(3))
    return AttentionCall(q, k, v, None, 0.25, lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, scale=0.25))


@pytest.mark.parametrize(
    ("layer", "region_thw"), [(0, (2, 4, 6)), (1, (5, 2, 2)), (2, (3, 2, 3)), (3, (2, 4, 6)), (None, (3, 2, 3))]
)
def test_layers_take_slabs_columns_and_cuboids_by_turns(layer: int | None, region_thw: tuple[int, int, int]) -> None:
    method = Vmoba({"parts": PARTS, "block": 8})
    params = method.prepare(site(layer), LAYOUT, Clock(), {})
    turn = params.where["turn"]
    assert method.region_thw(LAYOUT, turn) == region_thw
    counts = [-(-n // size) for n, size in zip(LAYOUT.grid_thw, region_thw, strict=True)]
    region = region_of(params.tiles, 8, region_thw, counts)
    place = params.tiles.coordinates().view(-1, 8, 3)
    held = params.tiles.held.view(-1, 8)
    for blocks, number, there in zip(place, region.tolist(), held, strict=True):
        cell = {tuple((p // torch.tensor(region_thw)).tolist()) for p, h in zip(blocks, there, strict=True) if h}
        if number < 0:
            assert cell == {(-1, -1, -1)}
        else:
            ((frame, row, column),) = cell
            assert number == (frame * counts[1] + row) * counts[2] + column
    assert method.prepare(site(layer), LAYOUT, Clock(), {}) is params


@pytest.mark.parametrize("tau", [0.05, 0.25, 0.6, 0.95])
def test_pairs_compete_as_in_a_loop(tau: float) -> None:
    gate = torch.randn(2, 3, 7, 4)
    own = torch.zeros(7, 4, dtype=torch.bool)
    own[torch.arange(6), torch.tensor([0, 0, 1, 2, 3, 3])] = True  # row 6 is text
    lengths = torch.tensor([8, 3, 8, 8, 8, 5, 8], dtype=torch.int32)
    readable = torch.ones(2, 1, 4, dtype=torch.bool)
    readable[1, 0, 2] = False
    chosen = strongest_pairs(gate, own, readable, lengths, tau)
    assert torch.equal(chosen & own, own.expand_as(chosen))
    for batch in range(2):
        for head in range(3):
            pairs = [(m, r) for m in range(6) for r in range(4) if readable[batch, 0, r]]
            values = torch.stack([gate[batch, head, m, r] for m, r in pairs]).double()
            scaled = (values - values.min()) / (values.max() - values.min())
            share = {pair: float(s) * int(lengths[pair[0]]) for pair, s in zip(pairs, scaled, strict=True)}
            goal = tau * sum(share.values())
            held, wanted = (
                sum((s for pair, s in share.items() if own[pair]), 0.0),
                {tuple(x) for x in own.nonzero().tolist()},
            )
            for pair in sorted((p for p in pairs if not own[p]), key=lambda pair: -share[pair]):
                if held >= goal:
                    break
                held += share[pair]
                wanted.add(pair)
            assert {tuple(x) for x in chosen[batch, head].nonzero().tolist()} == wanted


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_members_are_whole_regions_with_text_dense(layer: int) -> None:
    method = Vmoba({"parts": PARTS, "block": 8, "block_k": 16, "tau": 0.3})
    params = method.prepare(site(layer), LAYOUT, Clock(), {})
    call = random_call(LAYOUT)
    blocks = Blocks.of(call, params.tiles, params.tiles, 8, 16)
    plan = method.route(blocks, **params.where)
    turn = params.where["turn"]
    counts = [-(-n // size) for n, size in zip(LAYOUT.grid_thw, method.region_thw(LAYOUT, turn), strict=True)]
    rows, columns = (region_of(params.tiles, size, method.region_thw(LAYOUT, turn), counts) for size in (8, 16))
    members, visual, there = plan.members, rows >= 0, plan.k_len > 0
    assert members[..., ~visual, :][..., there].all()
    assert members[..., columns < 0].all()
    own = (rows[:, None] == columns) & there
    assert members[:, :, own].all()
    for region in columns[columns >= 0].unique():
        part = members[..., visual, :][..., (columns == region) & there]
        assert torch.equal(part.any(-1), part.all(-1)), "a region is read in part"
    assert 0.1 < float(plan.density().mean()) < 0.95


def test_a_region_s_mean_key_is_that_of_its_tokens() -> None:
    """Blocks count by their tokens: without that the second region, whose short last block stands out, would have more."""
    layout = Layout((4, 3, 5))  # two regions of 30 tokens: three blocks of 8 and one of 6
    method = Vmoba({"parts": [[2, 1, 1]] * 3, "block": 8, "tau": 0.95})
    params = method.prepare(site(0), layout, Clock(), {})
    q, k = torch.zeros(2, 1, 1, layout.length, 16)
    q[..., 0] = 1.0
    k[:, :, :30, 0], k[:, :, 30:54, 0], k[:, :, 54:, 0] = 1.0, 0.8, 1.7  # means 1 and 0.98
    call = AttentionCall(q, k, torch.randn_like(k), None, 1.0, lambda: None)
    plan = method.route(Blocks.of(call, params.tiles, params.tiles, 8, 8), **params.where)
    first, second = plan.members[0, 0, :4], plan.members[0, 0, 4:]
    assert second.all()
    assert first[:, :4].all()
    assert not first[:, 4:].any()


def test_tau_one_is_dense() -> None:
    assert Vmoba({"tau": 1.0, "block": 8}).prepare(site(0), LAYOUT, Clock(), {}) is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_gates_by_token_are_the_paper_s_rule_one_query_at_a_time(layer: int, masked: bool) -> None:
    method = Vmoba({"parts": PARTS, "gates": "token", "tau": 0.35})
    params = method.prepare(site(layer), LAYOUT, Clock(), {})
    q, k, v = torch.randn(2, 4, LAYOUT.length, 8), *torch.randn(2, 2, 2, LAYOUT.length, 8)
    valid = torch.rand(2, LAYOUT.length) < 0.8 if masked else torch.ones(2, LAYOUT.length, dtype=torch.bool)
    out = method.attend(AttentionCall(q, k, v, valid if masked else None, 0.3, lambda: None), params)
    assert out.shape == q.shape
    region_thw = method.region_thw(LAYOUT, params.where["turn"])
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in LAYOUT.grid_thw), indexing="ij"), -1).view(-1, 3)
    cell = [tuple(p) for p in (place // torch.tensor(region_thw)).tolist()]
    cell = [None] * LAYOUT.text_before + cell + [None] * LAYOUT.text_after
    regions = sorted({c for c in cell if c is not None})
    for batch, head in ((0, 0), (1, 3)):
        keys, values = k[batch, head // 2].double(), v[batch, head // 2].double()
        readable = {c: [s for s in range(LAYOUT.length) if cell[s] == c and valid[batch, s]] for c in regions}
        means = {c: keys[members].mean(0) for c, members in readable.items() if members}
        gate = {(s, c): float(q[batch, head, s].double() @ m) for s in range(len(cell)) if cell[s] for c, m in means.items()}
        low, high = min(gate.values()), max(gate.values())
        share = {pair: (g - low) / (high - low) for pair, g in gate.items()}
        goal, read = 0.35 * sum(share.values()), {(s, cell[s]) for s in range(len(cell)) if cell[s] in means}
        spent = sum(share[pair] for pair in read)
        for pair in sorted(set(gate) - read, key=lambda pair: -share[pair]):
            if spent >= goal:
                break
            read.add(pair)
            spent += share[pair]
        for s in range(LAYOUT.length):
            allowed = [t for t in range(len(cell)) if valid[batch, t]]
            if cell[s] is not None:
                allowed = [t for t in allowed if cell[t] is None or (s, cell[t]) in read]
            logits = 0.3 * keys[allowed] @ q[batch, head, s].double()
            torch.testing.assert_close(
                out[batch, head, s].double(), logits.softmax(0) @ values[allowed], rtol=1e-4, atol=1e-5
            )


def test_gates_by_token_take_what_fits_them_and_compile() -> None:
    with pytest.raises(ValueError, match="gates: token has no blocks"):
        Vmoba({"gates": "token", "rest": "pool"})
    method = Vmoba({"parts": PARTS, "gates": "token", "tau": 0.35})
    params, call = method.prepare(site(2), LAYOUT, Clock(), {}), random_call(LAYOUT)
    density, plan = method.inspect(call, params)
    assert plan is None
    assert 0.2 < density < 0.9
    compiled = torch.compile(method.attend, backend="eager")(call, params)
    torch.testing.assert_close(compiled, method.attend(call, params))
