"""Sparse prefill on language models: what is read, and that decoding, chunks, padding, beams and short prompts are as they must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import accelplug
from accelplug import compat
from accelplug.errors import UnsupportedError
from accelplug.kernels.past import antidiagonal_past, mean_past, sampled_past
from accelplug.patches.sparse.power import Power
from accelplug.patches.sparse.prefill import PromptBlocks
from accelplug.registry import list_patches
from accelplug.table import Origin, Table
from accelplug.testing.language_models import TEXT_CONFIG, generate
from tests.patch_rows import ROWS

PREFILL = [entry.name for entry in list_patches() if entry.family == "prefill"]
BLOCK = 8


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
            same = token if patch in ("stream", "triangle", "power") else token // BLOCK * BLOCK
            assert torch.equal(after[:, :same], before[:, :same])
            assert not torch.equal(after[:, token], before[:, token])


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


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 16}])
def test_what_reads_all_answers_as_the_model_does(more: dict[str, Any]) -> None:
    """Beams, a static cache, a prompt in chunks: through the kernel, with nothing left out."""
    model, ids = llama(), prompt(43, rows=2)
    stock = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 4, **more)
    with applied(model, "prefill_rows", dict(ROWS["prefill_rows"].faint or {}), strict=True) as plug:
        got = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 4, **more)
        assert plug.report().served["prefill_rows"]
    assert torch.equal(got, stock)


def test_a_sliding_window_is_left_alone() -> None:
    torch.manual_seed(0)
    model = hf.MistralForCausalLM(hf.MistralConfig(**TEXT_CONFIG, sliding_window=16)).eval()
    ids = prompt(40)
    with torch.no_grad():
        stock = hidden(model, ids)
        with applied(model, "stream") as plug:
            assert torch.equal(hidden(model, ids), stock)
            assert "mask is not that of causal attention" in str(plug.report()) or "a window of its own" in str(
                plug.report()
            )


def test_training_is_refused() -> None:
    model = llama().train().requires_grad_(True)
    with applied(model, "stream"), pytest.raises(UnsupportedError, match="in training mode"):
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
