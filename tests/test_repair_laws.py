"""What holds of every block-sparse method whose error is repaired: beside what the method itself must keep, nothing but the probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.kernels import chunks, importance
from accelplug.kernels.memory import Memory
from accelplug.kernels.orders import tiles
from accelplug.kernels.repair import Probes, block_rows, probe_rows, repair_
from accelplug.patches.sparse.paro import Paro
from accelplug.patches.sparse.sparse_vdit import FULL, SKIP, SparseVdit
from accelplug.patches.sparse.template import BlockSparse
from accelplug.registry import patch_class
from accelplug.table import Table
from accelplug.testing.laws import Law, Subject, it_does_something_and_undoes_it, laws, nothing_is_left_of_a_run
from accelplug.testing.models import DENOISERS_TRIED
from tests.patch_rows import ROWS

LAYOUT = Layout((3, 6, 7), text_before=5, text_after=3)
VISUAL = slice(5, 131)
VIDEO = Layout((3, 6, 8))
SITE = Site("block", "transformer", "joint", 1, 4)
PROBES = 30
REPAIR = {"repair": "output_query", "probes": PROBES}

SUBJECTS = [row for row in ROWS.values() if row.blocks]
BY_TOKEN = replace(ROWS["vmoba"], working={**ROWS["vmoba"].working, "gates": "token"})
BY_VARIANCE = replace(ROWS["proxy"], working={**ROWS["proxy"].working, "variance": True})
CLUSTERED = replace(ROWS["sol"], working={**ROWS["sol"].working, "order": "kmeans", "cluster_iterations": 3})
SHARED = replace(ROWS["rows"], working={**ROWS["rows"].working, "rows": 3})
"""The rows that it scores by are the probes."""
WAYS = [*SUBJECTS, BY_TOKEN, BY_VARIANCE, CLUSTERED, SHARED]


@dataclass(frozen=True)
class Way:
    """A patch, what its error is regressed on, and the step it is tried in: later ones take what was learned before."""

    subject: Subject
    repair: str
    step: int

    def __str__(self) -> str:
        return "-".join(map(str, (self.subject.patch, *self.subject.working.values(), self.repair, self.step)))

    @property
    def mending(self) -> dict[str, Any]:
        """Settings with which its error is repaired."""
        return {"repair": self.repair} if self.subject is SHARED else {"repair": self.repair, "probes": PROBES}

    def patch(self, **config: Any) -> BlockSparse:
        return patch_of(self.subject, **{**self.mending, **config})

    def probed(self, layout: Layout = LAYOUT) -> Tensor:
        """Tokens that it computes exactly, int64 (R,)."""
        if self.subject is not SHARED:
            return probe_rows(layout.text_before, layout.visual, PROBES, step=self.step)
        order = tiles(layout, "raster", 8)
        slots, _ = block_rows(order.lengths(8)[: order.visual_slots // 8], 8, 3, self.step)
        return order.tokens_in(slots.flatten())

    def answer(self, call: AttentionCall, layout: Layout = LAYOUT) -> Tensor:
        """What it gives in its step, other queries before."""
        patch, memory = self.patch(), Memory()
        params = prepared(patch, layout)
        for step in range(self.step):
            memory.advance(step)
            patch.attend(replace(asked(1.2 * call.q, call.k, call.v, call.mask), ticket=memory.ticket), params)
        memory.advance(self.step)
        return patch.attend(replace(call, ticket=memory.ticket), params)


every_way = pytest.mark.parametrize(
    "way", [Way(subject, *how) for subject in WAYS for how in (("output_query", 0), ("output", 1))], ids=str
)


def patch_of(subject: Subject, **config: Any) -> BlockSparse:
    patch = patch_class(subject.patch)({"block": 8, "backend": "reference", **subject.working, **config})
    assert isinstance(patch, BlockSparse)
    return patch


def call_of(
    layout: Layout = LAYOUT, heads: int = 2, kv_heads: int | None = None, batch: int = 1, masked: bool = False
) -> AttentionCall:
    """Queries that look at keys some tokens on; values are wider than keys. `masked`: the last text tokens are padding."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, layout.length, 4, generator=generator)
    k = torch.randn(batch, kv_heads or heads, layout.length, 4, generator=generator) + 2 * q[:, : kv_heads or heads].roll(
        3, -2
    )
    v = torch.randn(batch, kv_heads or heads, layout.length, 6, generator=generator)
    mask = None
    if masked:
        mask = torch.ones(batch, layout.length, dtype=torch.bool)
        mask[:, -2:] = False
    return asked(q, k, v, mask)


def asked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> AttentionCall:
    """A call of these tensors, as a host makes it."""
    given = None if mask is None else mask[:, None, None]

    def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v, attn_mask: Tensor | None = given) -> Tensor:
        shared = k.shape[1] != q.shape[1]
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=0.5, enable_gqa=shared)

    return AttentionCall(q, k, v, mask, 0.5, dense)


def answer(patch: BlockSparse, call: AttentionCall, layout: Layout = LAYOUT) -> Tensor:
    params = prepared(patch, layout)
    return patch.attend(call, params)


def prepared(patch: BlockSparse, layout: Layout) -> Any:
    params = patch.prepare(SITE, layout, Clock(0, 4), {})
    assert params is not None, "it runs dense here"
    return params


def mapped(call: AttentionCall, change: Callable[[Tensor], Tensor]) -> AttentionCall:
    return asked(change(call.q), change(call.k), change(call.v), call.mask)


@every_way
def test_probes_are_exact_and_text_is_as_it_was(way: Way) -> None:
    call = call_of(masked=True)
    plain, mended, rows = answer(patch_of(way.subject), call), way.answer(call), way.probed()
    torch.testing.assert_close(mended[..., rows, :], call.dense()[..., rows, :])
    assert not torch.equal(mended[..., VISUAL, :], plain[..., VISUAL, :])
    for text in (slice(0, 5), slice(131, None)):
        assert torch.equal(mended[..., text, :], plain[..., text, :])


@every_way
def test_two_samples_have_no_say_in_each_other(way: Way) -> None:
    call = call_of(batch=2)
    together = way.answer(call)
    apart = torch.cat([way.answer(mapped(call, itemgetter(slice(i, i + 1)))) for i in range(2)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@every_way
def test_two_calls_are_equal_bit_for_bit(way: Way) -> None:
    call = call_of()
    assert torch.equal(way.answer(call), way.answer(call))


@every_way
def test_keys_that_are_padding_have_no_influence(way: Way) -> None:
    call = call_of(masked=True)
    louder = mapped(call, lambda x: torch.where(torch.arange(LAYOUT.length)[:, None] < LAYOUT.length - 2, x, 1e4))
    torch.testing.assert_close(way.answer(louder)[..., VISUAL, :], way.answer(call)[..., VISUAL, :])


@every_way
def test_heads_may_share_keys(way: Way) -> None:
    """Grouped queries give what they give where keys and values are written out for each head."""
    call = call_of(heads=4, kv_heads=2)
    repeated = asked(call.q, call.k.repeat_interleave(2, 1), call.v.repeat_interleave(2, 1))
    torch.testing.assert_close(way.answer(call), way.answer(repeated), rtol=1e-4, atol=1e-5)


@every_way
def test_low_precision_is_near_to_full(way: Way) -> None:
    call = call_of()
    out = way.answer(mapped(call, Tensor.bfloat16))
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()
    exact = call.dense()
    assert float((out - exact).norm()) < 1.5 * float((way.answer(call) - exact).norm()) + 0.02 * float(exact.norm())


@every_way
@pytest.mark.parametrize("layout", [Layout((3, 5, 7), 3), Layout((2, 7, 9), text_after=2), Layout((5, 5, 5))], ids=str)
def test_odd_sizes(way: Way, layout: Layout) -> None:
    call = call_of(layout)
    params = way.patch().prepare(SITE, layout, Clock(0, 4), {})
    if params is None:
        assert way.subject.video_only, "it runs dense on a grid of several frames"
        return
    out, rows = way.answer(call, layout), way.probed(layout)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[..., rows, :], call.dense()[..., rows, :])


@pytest.mark.parametrize("way", [Way(subject, "output_query", 1) for subject in WAYS], ids=str)
def test_one_graph_serves_all_layers(way: Way) -> None:
    """Nothing in it depends on values, and layers and steps whose params and memories are other tensors do not recompile."""
    torch._dynamo.reset()
    counter, patch = CompileCounter(), way.patch()

    @torch.compile(fullgraph=True, backend=counter)
    def attend(q: Tensor, k: Tensor, v: Tensor, params: Any, ticket: Tensor) -> Tensor:
        return patch.attend(replace(asked(q, k, v), ticket=ticket), params)

    call = call_of(VIDEO)
    for layer in (1, 4, 7):  # methods that go by turns have three
        site = replace(SITE, layer=layer, layers=9, kind="self")
        params, memory = patch.prepare(site, VIDEO, Clock(0, 4), {}), Memory()
        for step in range(way.step + 1):
            memory.advance(step)
            eager = patch.attend(replace(call, ticket=memory.ticket), params)
            compiled = attend(call.q, call.k, call.v, params, memory.ticket)
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("layout", [VIDEO, Layout((3, 6, 8), text_before=8), Layout((3, 6, 8), 4, 4)], ids=str)
@pytest.mark.parametrize("way", [Way(ROWS["sol"], "output_query", 0), Way(SHARED, "output_query", 0)], ids=str)
def test_tokens_may_come_in_order_already(way: Way, layout: Layout) -> None:
    """A host that permutes once for many blocks hands in tokens in slots: the same rows are probed, and the same are visual."""
    patch = way.patch(order="morton")
    params = prepared(patch, layout)
    order = patch.shared_order(params)
    assert order is not None
    assert order.gather is not None
    assert order.scatter is not None
    call, there = call_of(layout), order.gather[: layout.length]
    permuted = patch.attend(mapped(call, lambda x: x[..., there, :]), patch.in_order(params))
    torch.testing.assert_close(permuted[..., order.scatter, :], patch.attend(call, params), rtol=1e-4, atol=1e-5)


def table(values: list[int]) -> Table:
    """One row of choices by head, for every layer."""
    return Table(torch.tensor([values] * SITE.layers, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("patch", "heads"),
    [(Paro, {"order": [0, 3, 5, 2], "density": 0.4}), (SparseVdit, {"modes": [FULL, 1, 2, 3, SKIP]})],
    ids=["paro", "sparse_vdit"],
)
@pytest.mark.parametrize("layout", [LAYOUT, Layout((3, 5, 7), 3)], ids=str)
def test_orders_that_differ_by_head(patch: type[BlockSparse], heads: dict[str, Any], layout: Layout) -> None:
    """Rows are probed where the grid says, wherever a head's order has put them; a head that gives nothing still does."""
    number = len(next(iter(heads.values())))
    config = {"block": 8, "backend": "reference", **{k: table(v) if isinstance(v, list) else v for k, v in heads.items()}}
    call = call_of(layout, heads=number)
    out = answer(patch({**config, **REPAIR}), call, layout)
    rows = probe_rows(layout.text_before, layout.visual, PROBES)
    expected = call.dense()[..., rows, :]
    for head, mode in enumerate(heads.get("modes", [])):
        expected[:, head] *= mode != SKIP
    torch.testing.assert_close(out[..., rows, :], expected)


SAMPLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "raster": ({}, {}),
    "short tiles": ({"order": "tile", "tile_thw": [2, 2, 2]}, {}),
    "empty blocks": ({"block": 8, "block_k": 32}, {}),
    "more rows than tokens": ({"rows": 8}, {}),
    "clusters": ({"order": "kmeans", "cluster_iterations": 3}, {"heads": 3}),
    "masked": ({"order": "morton"}, {"masked": True, "batch": 2}),
    "clusters, masked": (
        {"order": "kmeans", "cluster_iterations": 3},
        {"masked": True, "heads": 4, "kv_heads": 2, "batch": 2},
    ),
    "shared keys": ({"order": "gilbert"}, {"heads": 4, "kv_heads": 2, "batch": 2}),
    "output": ({"repair": "output"}, {}),
}
"""Ways of sampling, and calls."""


@pytest.mark.parametrize("pieces", [1, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", SAMPLED)
def test_sampled_rows_serve_as_probes(way: str, dtype: torch.dtype, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what dense attention gives there, and repair makes of them what it makes of any probes."""
    monkeypatch.setattr(importance, "BUDGET", pieces)
    monkeypatch.setattr(chunks, "CHUNK", pieces)
    config, given = SAMPLED[way]
    call = mapped(call_of(**given), lambda x: x.to(dtype))
    patch = patch_of(SHARED, **{"repair": "output_query", **config})
    params, found, repaired = prepared(patch, LAYOUT), [], patch.repaired

    def listen(out: Tensor, call: AttentionCall, tiles: Any, plan: Any, probes: Probes) -> Tensor:
        found.append((out.clone(), probes))
        return repaired(out, call, tiles, plan, probes)

    monkeypatch.setattr(patch, "repaired", listen)
    answered = patch.attend(call, params)
    ((sparse, probes),) = found
    place = probes.rows.expand(*call.q.shape[:2], -1)[..., None].expand(-1, -1, -1, 6)
    dense = mapped(call, Tensor.float).dense().gather(-2, place)
    near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(probes.out.float(), dense, **near)
    assert probes.counted is not None
    for row in place[..., 0].flatten(0, 1):
        assert set(row[probes.counted].tolist()) == set(row.tolist()) - (set() if probes.counted[0] else {int(row[0])})
        assert len(row[probes.counted].unique()) == probes.counted.sum()
    rows = probes.rows.expand(*call.q.shape[:2], -1)
    for b, h in torch.cartesian_prod(torch.arange(len(rows)), torch.arange(rows.shape[1])).tolist():
        own = [x[b : b + 1, h : h + 1] for x in (sparse, call.q, dense.to(dtype))]
        of_head = Probes(rows[b, h, probes.counted], own[2][..., probes.counted, :])
        repair_(own[0], own[1], of_head, VISUAL, on_query=patch.config.repair == "output_query")
        torch.testing.assert_close(answered[b : b + 1, h : h + 1], own[0], **near)


def test_it_says_which_rows_are_exact() -> None:
    said = [patch_of(SHARED, repair="output", probes=probes).repairs for probes in (None, 0.5, 12)]
    assert said == [
        "output, 3 rows of each block exact, carry 0.5",
        "output, 0.5 of the rows exact, carry 0.5",
        "output, 12 rows exact, carry 0.5",
    ]


def test_sampled_rows_move_where_the_last_step_is_known() -> None:
    """Else what is carried over says nothing new."""
    patch, found, memory = patch_of(SHARED, repair="output_query"), [], Memory()
    params, call = prepared(patch, LAYOUT), replace(call_of(), ticket=memory.ticket)
    for step in range(6):
        memory.advance(step)
        blocks, _ = patch.laid_out(call, params)
        found.append(set(blocks.probes[0].rows.tolist()))
    assert len(set.union(*found)) > 1.5 * len(found[0])


ON_A_MODEL = (it_does_something_and_undoes_it, nothing_is_left_of_a_run)
REPAIRED = [replace(row, working={**row.working, **Way(row, "output_query", 0).mending}) for row in (*SUBJECTS, SHARED)]
WAN = {"wan": DENOISERS_TRIED["wan"]}


@pytest.mark.parametrize(
    "law", [law for row in REPAIRED for law in laws(row, models=WAN) if law.check in ON_A_MODEL], ids=str
)
def test_laws_of_every_patch(law: Law) -> None:
    law()
