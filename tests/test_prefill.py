"""Sparse prefill on language models: what is read, and that decoding, chunks, padding, beams and short prompts are as they must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers import ContinuousBatchingConfig

import accelplug
from accelplug import compat
from accelplug.errors import RecipeError, UnsupportedError
from accelplug.kernels.past import antidiagonal_past, gated_past, mean_past, sampled_past
from accelplug.patches.sparse.dynamic_mask import DynamicMask
from accelplug.patches.sparse.power import Power
from accelplug.patches.sparse.prefill import PromptBlocks
from accelplug.patches.sparse.superlinear import Superlinear
from accelplug.registry import list_patches
from accelplug.table import Origin, Table
from accelplug.testing.language_models import TEXT_CONFIG, generate
from tests.patch_rows import ROWS
from tests.tiny_language_models import build, inputs

HYBRIDS = ("qwen3_next", "qwen3_5", "lfm2", "gemma3_text")
PREFILL = [entry.name for entry in list_patches() if entry.family == "prefill"]
BLOCK = 8
STATIC = ("stream", "triangle", "power")
"""Which look at no token."""


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT_CONFIG, **more})).eval().requires_grad_(False)


def prompt(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 490, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def applied(model: Any, patch: str, settings: dict[str, Any] | None = None, **options: Any) -> accelplug.Plug:
    rule = {"patch": patch, "with": {"backend": "blocked", **(ROWS[patch].working if settings is None else settings)}}
    return accelplug.apply(model, {"rules": [rule]}, **options)


def hidden(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """What comes out of one layer: a deeper one reads rows that blocks in between chose together."""
    return model.base_model(ids, **more).last_hidden_state


@pytest.mark.parametrize("patch", PREFILL)
def test_a_later_token_changes_no_earlier_block(patch: str) -> None:
    model, ids = llama(num_hidden_layers=1), prompt(61)
    with applied(model, patch, strict=True):
        before = hidden(model, ids)
        for token in (60, 48, 20):
            other = ids.clone()
            other[:, token:] = prompt(61 - token, seed=1)
            after = hidden(model, other)
            same = token if patch in STATIC else token // BLOCK * BLOCK
            assert torch.equal(after[:, :same], before[:, :same])
            assert not torch.equal(after[:, token], before[:, token])


def test_a_block_that_is_told_by_rows_before_it_knows_nothing_of_later_tokens() -> None:
    model, ids = llama(num_hidden_layers=1), prompt(61)
    settings = {**ROWS["prefill_rows"].working, "strict": True}
    with applied(model, "prefill_rows", settings, strict=True) as plug, plug.trace(plans=True) as events:
        before = hidden(model, ids)
        for token in range(30, 61, 3):
            other = ids.clone()
            other[:, token:] = prompt(61 - token, seed=token)
            after = hidden(model, other)
            assert torch.equal(after[:, :token], before[:, :token])
            assert not torch.equal(after[:, token], before[:, token])
    assert events[0].plan is not None and events[0].density == pytest.approx(0.43, abs=0.1)  # noqa: PT018


@pytest.mark.parametrize("tokens", [40, 45])
def test_rows_of_the_block_before_tell_where_it_is_strict(tokens: int) -> None:
    q, k, reads = tensors(tokens, tokens)
    got = sampled_past(q, k, BLOCK, 0, 4, 0.25, reads, reads, True)
    p = torch.nn.functional.pad(probabilities(q, k, reads), (0, -tokens % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)
    for block in range(1, tokens // BLOCK):
        rows = [block * BLOCK - back for back in (0, 2, 4, 6)]
        torch.testing.assert_close(got[0, :, block], p[0, :, rows].mean(1))
    torch.testing.assert_close(got[0, :, 0], p[0, :, 0])


@pytest.mark.parametrize("patch", [name for name in PREFILL if name != "triangle"])
def test_in_chunks_it_is_the_whole(patch: str) -> None:
    model, ids = llama(), prompt(70)
    with applied(model, patch, strict=True):
        whole = hidden(model, ids)
        cache, parts = hf.DynamicCache(config=model.config), []
        for chunk in ids.split(3 * BLOCK, 1):
            parts.append(hidden(model, chunk, **{compat.transformers.cache_keyword(type(model).forward): cache}))
    torch.testing.assert_close(torch.cat(parts, 1)[:, : 9 * BLOCK - 8], whole[:, : 9 * BLOCK - 8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("patch", PREFILL)
def test_a_padded_batch_is_its_rows(patch: str, side: str) -> None:
    model, rows = llama(), [prompt(50, seed=1), prompt(37, seed=2)]
    ids, mask = torch.zeros(2, 50, dtype=torch.int64), torch.zeros(2, 50, dtype=torch.int64)
    for place, row in enumerate(rows):
        held = slice(50 - row.shape[1], 50) if side == "left" else slice(0, row.shape[1])
        ids[place, held], mask[place, held] = row[0], 1
    with applied(model, patch, strict=True):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        together = hidden(model, ids, attention_mask=mask, position_ids=positions)
        for place, row in enumerate(rows):
            torch.testing.assert_close(together[place, mask[place].bool()], hidden(model, row)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", PREFILL)
def test_decoding_is_the_models_own_and_short_prompts_are_dense(patch: str) -> None:
    model, ids = llama(), prompt(40)
    stock = generate(model, {"input_ids": ids}, 5, return_dict_in_generate=True, output_scores=True)
    layers = model.config.num_hidden_layers
    with applied(model, patch, strict=True) as plug:
        generate(model, {"input_ids": ids}, 5)
        assert plug.report().served == {patch: layers, "dense": 4 * layers}
    with applied(model, patch, {**ROWS[patch].working, "min_tokens": 41}, strict=True) as plug:
        short = generate(model, {"input_ids": ids}, 5, return_dict_in_generate=True, output_scores=True)
        assert plug.report().served == {"dense": 5 * layers}
    for got, expected in zip(short.scores, stock.scores, strict=True):
        assert torch.equal(got, expected)


EIGHT_BITS = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
WAYS: list[dict[str, Any]] = [{"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 16}]
WAYS += [EIGHT_BITS] if hasattr(hf.cache_utils, "Fp8QuantizedLayer") else []


@pytest.mark.parametrize("more", WAYS, ids=str)
def test_what_reads_all_answers_as_the_model_does(more: dict[str, Any]) -> None:
    """Beams, a static cache, a prompt in chunks, a cache of 8 bits: through the kernel, with nothing left out."""
    model, ids = llama(), prompt(43, rows=2)
    stock = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 4, **more)
    with applied(model, "prefill_rows", dict(ROWS["prefill_rows"].faint or {}), strict=True) as plug:
        got = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 4, **more)
        assert plug.report().served["prefill_rows"]
    assert torch.equal(got, stock)


def test_beams_of_a_padded_batch_answer_as_the_model_does() -> None:
    """Its mask tells rows apart, and what is known of it is forgotten when the prompt is read: beams change places later."""
    model, ids = llama(), prompt(43, rows=2)
    ids[0, :9] = 0
    given = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    stock = generate(model, given, 6, num_beams=3)
    with applied(model, "prefill_rows", dict(ROWS["prefill_rows"].faint or {}), strict=True):
        assert torch.equal(generate(model, given, 6, num_beams=3), stock)


def test_calls_are_timed_where_a_trace_asks() -> None:
    model, ids = llama(), prompt(80)
    with applied(model, "stream") as plug:
        with plug.trace(timed=True) as events:
            generate(model, {"input_ids": ids}, 2)
        assert [event.patch for event in events] == ["stream"] * 4 + ["dense"] * 4
        assert all(event.ms is not None and event.ms > 0 for event in events)
        with plug.trace() as events:
            hidden(model, ids)
        assert all(event.ms is None for event in events)


def test_a_sliding_window_is_left_alone() -> None:
    torch.manual_seed(0)
    model = hf.MistralForCausalLM(hf.MistralConfig(**TEXT_CONFIG, sliding_window=16)).eval()
    ids = prompt(40)
    with torch.no_grad():
        stock = hidden(model, ids)
        with applied(model, "stream", strict=True) as plug:
            assert torch.equal(hidden(model, ids), stock)
            assert plug.report().served == {"dense": 4}
            assert "in 0 layers, of 0 with full attention among 4; 4 sliding_attention" in str(plug.report())


@pytest.mark.parametrize("name", HYBRIDS)
def test_rules_reach_the_layers_with_full_attention_alone_and_the_report_says_which(name: str) -> None:
    model, ids = build(name), prompt(61, rows=2)
    types = compat.transformers.layer_types(model.get_decoder().config)
    full = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
    assert 0 < len(full) < len(types)
    with torch.no_grad():
        stock = model(ids).logits
        with applied(model, "prefill_rows", strict=True) as plug, plug.trace() as events:
            changed = model(ids).logits
            report = plug.report()
        with applied(model, "prefill_rows", dict(ROWS["prefill_rows"].faint or {}), strict=True):
            torch.testing.assert_close(model(ids).logits, stock, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(changed, stock, atol=1e-4)
    assert [event.site.layer for event in events if event.patch == "prefill_rows"] == full
    assert f"in {len(full)} layers, of {len(full)} with full attention among {len(types)}" in report.reach[0]
    assert "At 61 tokens" in report.reach[0]


def test_the_ceiling_is_the_share_of_attention_in_the_arithmetic() -> None:
    model = llama(num_hidden_layers=2)
    with applied(model, "stream") as plug:
        hidden(model, prompt(100))
        (said,) = plug.report().reach
    weights = sum(x.numel() for name, x in model.model.layers.named_parameters() if "norm" not in name)
    attention = 2 * 2 * 5050 * 64  # layers, q.k and p.v, pairs, channels
    share = attention / (attention + 100 * weights)
    assert said.endswith(f"{share:.0%} of the arithmetic: at most {1 / (1 - share):.2f}x")


@pytest.mark.parametrize("patch", PREFILL)
def test_sequences_packed_into_a_row_run_dense_and_are_counted(patch: str) -> None:
    model, ids = llama(), prompt(40)
    positions = torch.cat([torch.arange(23), torch.arange(17)])[None]
    stock = hidden(model, ids, position_ids=positions, use_cache=False)
    with applied(model, patch) as plug:
        assert torch.equal(hidden(model, ids, position_ids=positions, use_cache=False), stock)
        assert not plug.report().served.get(patch)
        assert "the model's mask is not that of causal attention" in str(plug.report())


@pytest.mark.parametrize("patch", PREFILL)
def test_continuous_batching_is_refused(patch: str) -> None:
    model = llama()
    with applied(model, patch):
        small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)  # or it takes most of the machine's memory
        answers = model.generate_batch([[1, 2, 3], [4, 5]], continuous_batching_config=small, max_new_tokens=2)
    assert all("Use generate() instead of generate_batch()" in answer.error for answer in answers.values())


@pytest.mark.parametrize("patch", PREFILL)
def test_training_is_refused(patch: str) -> None:
    model = llama().train().requires_grad_(True)
    with applied(model, patch), pytest.raises(UnsupportedError, match="in training mode"):
        model(prompt(40))


def test_trace_tells_what_is_read() -> None:
    model = llama()
    with applied(model, "prefill_rows") as plug, plug.trace(plans=True) as events:
        hidden(model, prompt(80))
    assert len(events) == model.config.num_hidden_layers
    for event in events:
        assert event.plan is not None
        assert event.density == pytest.approx(float(event.plan.density().mean()))
        assert 0.2 < event.density < 0.5


@pytest.mark.parametrize(("last", "dense"), [(0, 0), (1, 1), (2, 1), (3, 2), (11, 3)])
def test_the_last_rows_read_all(last: int, dense: int) -> None:
    model = llama()  # 82 tokens: two are in the last block
    with (
        applied(model, "prefill_rows", {**ROWS["prefill_rows"].working, "last": last}) as plug,
        plug.trace(plans=True) as events,
    ):
        hidden(model, prompt(82))
    for event in events:
        assert event.plan is not None
        reads = event.plan.members.all(1)[0]  # [M, N], by all heads
        all_of_it = reads.sum(-1) == torch.arange(1, 12)
        assert all_of_it[11 - dense :].all()
        assert not all_of_it[8 : 11 - dense].any()


@pytest.mark.parametrize("grouped", [False, True])
def test_heads_read_as_much_as_a_table_says(grouped: bool) -> None:
    model = llama()
    values = torch.tensor([[0.1, 0.1, 1.0, 1.0], [1.0, 1.0, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3], [1.0, 1.0, 1.0, 1.0]])
    table = Table(values, ("layers", "heads"), key="density", origin=Origin())
    settings = {**ROWS["prefill_rows"].working, "density": table, "grouped": grouped}
    with applied(model, "prefill_rows", settings) as plug, plug.trace(plans=True) as events:
        hidden(model, prompt(160))
    for event, expected in zip(events, values, strict=True):
        assert event.plan is not None
        read = event.plan.density()[0]
        assert len(read) == (2 if grouped else 4)
        torch.testing.assert_close(read.float(), expected[:: 2 if grouped else 1], atol=0.06, rtol=0)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_powers_of_two_reach_what_their_number_of_ones_says(layers: int) -> None:
    x = torch.zeros(1, 1, 40 * BLOCK, 4)
    blocks = PromptBlocks(x, x, x, torch.ones(1, 40 * BLOCK, dtype=torch.bool), None, 1.0, 0, BLOCK, 0, 0)
    reads = Power({"block": BLOCK}).route(blocks).members[0, 0].double()
    reached = torch.linalg.matrix_power(reads, layers)[-1].flip(0) > 0
    assert reached.tolist() == [n.bit_count() <= layers for n in range(40)]


def test_gates_are_a_softmax_over_the_blocks_ahead() -> None:
    q, k, reads = tensors(45, 29)
    got = gated_past(q, k, BLOCK, 16, 0.25, reads[:, 16:], reads)
    means = torch.stack(
        [k[1, :, 8 * j : min(8 * j + 8, 42)].mean(1) for j in range(6)], 1
    )  # three keys of the last block are padding
    for block in range(3):
        ahead = 2 + block
        share = (0.25 * q[1, 3, 8 * block : 8 * block + 8] @ means[1, :ahead].mT).softmax(-1).mean(0)
        torch.testing.assert_close(got[1, 3, block, :ahead], share)
        assert not got[1, 3, block, ahead:].any()


def test_spans_stand_behind_candidates_that_thin_out() -> None:
    x = torch.zeros(1, 1, 40 * BLOCK, 4)
    blocks = PromptBlocks(x, x, x, torch.ones(1, 40 * BLOCK, dtype=torch.bool), None, 1.0, 0, BLOCK, 0, 0)
    reads = Superlinear({"block": BLOCK, "spans": 64}).route(blocks).members[0, 0]
    last = (39 - reads[39].nonzero()[:, 0]).tolist()
    expected = {back for i in range(1, 7) for back in range(i * i, i * i + 7)}  # a span of ceil(sqrt(39)) blocks
    assert set(last) - {0} == {back for back in expected if back <= 39}


def test_a_budget_of_keys_is_spent_and_large_values_come_first() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 2, 20 * BLOCK, 4)
    v = torch.randn(1, 1, 20 * BLOCK, 4, generator=g)
    v[:, :, 5 * BLOCK : 6 * BLOCK] *= 9
    blocks = PromptBlocks(q, q[:, :1], v, torch.ones(1, 20 * BLOCK, dtype=torch.bool), None, 1.0, 0, BLOCK, 0, 0)
    reads = DynamicMask({"block": BLOCK, "keys": 3 * BLOCK}).route(blocks).members[0]
    assert reads[:, 6:, 5].all()
    assert (reads.tril(-1).sum(-1)[:, 6:] == 3).all()


def tensors(tokens: int, queries: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, queries, 16, generator=g), torch.randn(2, 2, tokens, 16, generator=g)
    reads = torch.ones(2, tokens, dtype=torch.bool)
    reads[1, -3:] = False
    return q, k, reads


def probabilities(q: torch.Tensor, k: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    logits = 0.25 * q @ k.repeat_interleave(2, 1).mT
    return logits.masked_fill(~(causal & reads[:, None, None]), -torch.inf).softmax(-1)


@pytest.mark.parametrize(("tokens", "queries"), [(40, 40), (45, 45), (61, 29)])
def test_mass_of_all_rows_is_that_of_the_block(tokens: int, queries: int) -> None:
    q, k, reads = tensors(tokens, queries)
    causal = tokens - queries
    got = sampled_past(q, k, BLOCK, causal, BLOCK, 0.25, reads[:, causal:], reads)
    p = probabilities(q, k, reads) * reads[:, None, causal:, None]
    p = torch.nn.functional.pad(p, (0, -tokens % BLOCK, 0, -queries % BLOCK))
    by_block = p.unflatten(3, (-1, BLOCK)).sum(-1).unflatten(2, (-1, BLOCK))
    number = torch.nn.functional.pad(reads[:, causal:], (0, -queries % BLOCK)).unflatten(1, (-1, BLOCK)).sum(-1)
    full = (number == BLOCK)[:, None, :, None]  # of others, some rows stand twice
    torch.testing.assert_close(got * full, by_block.sum(3) / BLOCK * full)
    torch.testing.assert_close(got[0].sum(-1), torch.ones_like(got[0, ..., 0]))


def test_antidiagonals_by_token() -> None:
    q, k, reads = tensors(32, 16)
    got = antidiagonal_past(q, k, BLOCK, 16, 4, 0.25, reads[:, 16:], None)
    logits = 0.25 * q @ k.repeat_interleave(2, 1).mT
    tiles = torch.full((2, 4, 4, 8), -torch.inf)
    for i in range(4):
        for j in range(i + 5):
            tiles[:, :, i, j] = sum(logits[:, :, 4 * i + 3 - r, 4 * j + r] for r in range(4)) / 4
    share = tiles.softmax(-1).unflatten(3, (4, 2)).sum(-1).unflatten(2, (2, 2)).sum(3) / 2
    torch.testing.assert_close(got[0], share[0])


def test_scores_by_mean_keys_leave_padding_out() -> None:
    q, k, reads = tensors(32, 32)
    got = mean_past(q, k, BLOCK, 0, 0.25, reads, reads)
    means = k[1, :, 24:29].mean(1)  # three keys of the last block are padding, and so are three queries
    expected = (0.25 * q[1, 3, 24:29] @ means[1]).logsumexp(0)
    torch.testing.assert_close(got[1, 3, 3, 3], expected)
    assert torch.equal(got == -torch.inf, torch.ones(4, 4, dtype=torch.bool).triu(1).expand(2, 4, -1, -1))


BOTH = [
    {"patch": "stream", "with": {**(ROWS["stream"].working), "backend": "blocked"}},
    {"patch": "pai", "with": {"alpha": 4.0}},
]


def test_a_head_patch_stands_on_what_reads_the_prompt() -> None:
    """One layer: the rows that it reads anew are as if the prompt were read dense, all others as if it were not there."""
    model, given = build("llava", num_hidden_layers=1), inputs("llava", ((30, "I", 19),))

    def last_hidden(rules: list[dict[str, Any]]) -> torch.Tensor:
        with torch.no_grad(), accelplug.apply(model, {"rules": rules}, strict=True) as plug:
            out = model.base_model(**given).last_hidden_state
            assert plug.report().served == {rule["patch"]: 1 for rule in rules}
        return out

    below, above, both = last_hidden(BOTH[:1]), last_hidden(BOTH[1:]), last_hidden(BOTH)
    assert torch.equal(both[:, -1], above[:, -1])
    assert torch.equal(both[:, :-1], below[:, :-1])
    assert not torch.allclose(both[:, -1], below[:, -1], atol=1e-4)
    assert not torch.allclose(both[:, :-1], above[:, :-1], atol=1e-4)


def test_two_stages_of_a_recipe_are_chosen_for_themselves() -> None:
    model, given = build("llava"), inputs("llava", ((30, "I", 19),))
    rules = [{"where": {"layers": 0}, "patch": "dense"}, *({"where": {"layers": "1:"}, **rule} for rule in BOTH)]
    stock = generate(model, given)
    with accelplug.apply(model, {"rules": rules}, strict=True) as plug:
        generate(model, given, 3)
        assert plug.report().served == {"stream": 3, "pai": 3 * 3}
        placed = [(row.site.layer, row.name) for row in plug.where() if row.site is not None]
        assert placed == [(0, "dense"), *((layer, name) for layer in (1, 2, 3) for name in ("stream", "pai"))]
    assert torch.equal(generate(model, given), stock)
    with accelplug.apply(model, {"rules": BOTH}) as plug:  # without an image the prompt is read sparse all the same
        model(prompt(40))
        assert plug.report().served == {"stream": 4}
        assert any("no image" in reason for reason in plug.report().fallbacks)


def test_a_prompt_that_is_read_sparsely_is_decoded_sparsely() -> None:
    model, ids = llama(), prompt(40)
    pages = {"patch": "pages", "with": dict(ROWS["pages"].working)}
    with applied(model, "stream", strict=True):
        alone = hidden(model, ids)
    with accelplug.apply(model, {"rules": [BOTH[0], pages]}, strict=True) as plug:
        generate(model, {"input_ids": ids}, 5)
        assert plug.report().served == {"stream": 4, "pages": 16}
        torch.testing.assert_close(hidden(model, ids), alone)


@pytest.mark.parametrize("rules", [[*BOTH, BOTH[0]], [*BOTH, BOTH[1]], [*BOTH, {"where": {"layers": 0}, "patch": "dense"}]])
def test_a_rule_behind_one_of_its_own_stage_can_never_hold(rules: list[dict[str, Any]]) -> None:
    with pytest.raises(RecipeError, match="can never hold"):
        accelplug.apply(build("llava"), {"rules": rules})
