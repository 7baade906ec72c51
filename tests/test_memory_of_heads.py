"""Heads that keep fewer keys: scores of heads, what a split layer reads, and that it follows its cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn.functional import scaled_dot_product_attention

import accelplug
from accelplug import compat
from accelplug.cli import main
from accelplug.comparison.texts.reader import kv_bytes
from accelplug.errors import AccelplugError, NoMatchError, RecipeError, UnsupportedError
from accelplug.kernels.head_scores import by_key_head, echo_and_induction, look_back, razor, rotated, unrotated
from accelplug.kernels.streaming import QUERIES_AT_ONCE, streaming_attention
from accelplug.table import Table
from accelplug.testing.language_models import TEXT_CONFIG, generate, word_processor

LAYERS, KEY_HEADS, SINK, WINDOW = 4, 2, 2, 4
SPLIT = Table(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.6], [0.0, 0.05]]), ("layers", "heads"))
"""By half of the heads: one of each kind in two layers, then both, then none."""
DUO: dict[str, Any] = {
    "patch": "duo",
    "with": {"scores": SPLIT, "keep": 0.5, "sink": SINK, "window": WINDOW, "slack": 4, "prompt": "stream"},
}
SNAP = {"patch": "snapkv", "with": {"capacity": 10, "window": 4, "pool": 3}}
READ_DENSE = {"patch": "duo", "with": {**DUO["with"], "prompt": "dense"}}
ALL = pytest.mark.parametrize("rule", [DUO, READ_DENSE, SNAP], ids=["duo", "duo, dense prompt", "snapkv"])


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT_CONFIG, **more})).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "q_proj" in name:
            weight.mul_(8)  # heads look somewhere
    return model


def prompt(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 490, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def on(model: Any, rule: dict[str, Any], **more: Any) -> accelplug.Plug:
    return accelplug.apply(model, {"rules": [rule]}, strict=True, **more)


def hidden(model: Any, ids: torch.Tensor, cache: Any = None, **more: Any) -> torch.Tensor:
    given = {} if cache is None else {compat.transformers.cache_keyword(type(model).forward): cache}
    return model.base_model(ids, **given, **more).last_hidden_state


def fresh(model: Any) -> Any:
    return hf.DynamicCache(config=model.config)


def streamed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sink: int, window: int, rest: bool
) -> torch.Tensor:
    """One query head over one key head, (S, D) each, token by token in float64."""
    out = []
    for r in range(len(q)):
        read = [j for j in range(r + 1) if j < sink or j > r - window]
        left = [j for j in range(r + 1) if j not in read]
        scores, values = k[read].double() @ q[r].double() * scale, v[read].double()
        if rest and left:
            mean = k[left].double().mean(0) @ q[r].double() * scale + torch.tensor(float(len(left))).double().log()
            scores, values = torch.cat([scores, mean[None]]), torch.cat([values, v[left].double().mean(0)[None]])
        out.append(scores.softmax(0) @ values)
    return torch.stack(out)


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("tokens", [3, 19, QUERIES_AT_ONCE + 21])
def test_streaming_attention_is_what_its_module_says(tokens: int, rest: bool) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, tokens, 8, generator=g) for heads in (4, 2, 2))
    number = torch.stack([torch.arange(tokens), torch.arange(tokens) - 2]).clamp(min=-1)  # two tokens of padding on the left
    sums = (torch.zeros(2, 2, 8), torch.zeros(2, 2, 8)) if rest else None
    got = streaming_attention(q, k, v, number, 0.3, 3, 5, sums)
    for row, head in ((0, 1), (1, 2)):
        first = int((number[row] < 0).sum())
        expected = streamed(q[row, head, first:], k[row, head // 2, first:], v[row, head // 2, first:], 0.3, 3, 5, rest)
        torch.testing.assert_close(got[row, head, first:].double(), expected, rtol=1e-4, atol=1e-5)
    assert not got[1, :, :2].any()


def test_scores_of_heads_know_a_head_that_copies_one_that_echoes_and_one_that_looks_back() -> None:
    period, dim, g = 6, 32, torch.Generator().manual_seed(0)
    ids = torch.cat([torch.tensor([6]), torch.arange(period).repeat(4)])
    code = torch.linalg.qr(torch.randn(dim, dim, generator=g))[0][:7] * 30
    behind = torch.cat([code[6:7], code[ids[:-1]]])  # what a key stands behind
    k = torch.stack([code[ids], behind])[None]
    q = torch.stack([code[ids], code[ids]])[None]
    echo, induction = echo_and_induction(q, k, 1.0, period)
    torch.testing.assert_close(induction, torch.tensor([0.0, 1.0]), atol=0.05, rtol=0)
    assert float(echo[0]) > 0.5 > 0.05 > float(echo[1])
    assert by_key_head(torch.tensor([1.0, 3.0, 2.0, 0.0]), 2).tolist() == [3.0, 2.0]
    ranked = razor(torch.tensor([[0.9, 0.1, 0.2]]), torch.tensor([[0.0, 0.8, 0.7]]), ratio=1.0)
    assert ranked[0].argsort(descending=True, stable=True).tolist() == [0, 1, 2]
    old, new = look_back(torch.eye(2) * 9, torch.eye(2).expand(2, -1, -1), 1.0)
    assert float(old) > 0.9 > 0.6 > float(new)


@pytest.mark.parametrize("neighbours", [False, True])
def test_rotary_positions_come_out_as_they_went_in(neighbours: bool) -> None:
    x, angle = torch.randn(2, 3, 5, 12), torch.rand(1, 5, 4)
    angle = angle.repeat_interleave(2, -1) if neighbours else angle.repeat(1, 1, 2)
    turned = rotated(x, 1.5 * angle.cos(), 1.5 * angle.sin())
    assert turned is not None
    back = unrotated(turned, 1.5 * angle.cos(), 1.5 * angle.sin())
    torch.testing.assert_close(back, x)
    assert unrotated(x, torch.rand(1, 5, 8), torch.rand(1, 5, 8)) is None


def test_calibrated_heads_are_tables_and_a_recipe_that_runs(tmp_path: Path) -> None:
    model, tokenizer = llama(), word_processor().tokenizer
    text, before = " ".join(f"w{i % 490}" for i in range(400)), torch.get_rng_state()
    options = {"tokens": 256, "needles": 2, "period": 32, "repeats": 3, "by": "needle"}
    given: dict[str, Any] = {
        "processor": tokenizer,
        "options": options,
        "config": {"sink": 2, "window": 8},
        "progress": False,
    }
    path = tmp_path / "mine.yaml"
    recipe = accelplug.calibrate(model, "heads", text, path=path, **given)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.model._forward_pre_hooks
    assert "query heads put over 0.3" in recipe.summary
    table = recipe.rules[0].settings["scores"]
    assert table.key == "needle"
    assert table.values.shape == (LAYERS, KEY_HEADS)
    assert bool((table.values > 0).all())
    with accelplug.apply(model, path, strict=True) as plug:
        generate(model, {"input_ids": prompt(40)}, 3)
        assert plug.report().served["duo"]
    model.config.dtype = torch.bfloat16  # heads are the same in any
    accelplug.apply(model, path).remove()
    model.config.dtype = torch.float32
    again = accelplug.calibrate(model, "heads", text, **given)
    assert torch.equal(again.rules[0].settings["scores"].values, table.values)
    free = accelplug.calibrate(model, "heads", options={"period": 32, "repeats": 3}, progress=False)
    assert free.rules[0].settings["scores"].key == "razor"
    with pytest.raises(AccelplugError, match="is there already"):
        accelplug.calibrate(model, "heads", text, path=path, **given)
    with pytest.raises(AccelplugError, match=r"hides needles in 256 tokens of text, and was given \d+"):
        accelplug.calibrate(model, "heads", "w1 w2", **given)
    with pytest.raises(AccelplugError, match="there is no score 'needle' without a text"):
        accelplug.calibrate(model, "heads", options={"by": "needle", "period": 32}, progress=False)
    with pytest.raises(NoMatchError, match="nothing that is calibrated on language models"):
        accelplug.calibrate(model, "sta", progress=False)


def test_the_command_line_scores_heads_and_tells_what_draws_attention(tmp_path: Path) -> None:
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    llama().save_pretrained(folder)
    word_processor().tokenizer.save_pretrained(folder)
    text.write_text(" ".join(f"w{i % 490}" for i in range(400)))
    knobs = [part for knob in ("tokens=256", "needles=2", "period=32", "keep=0.25") for part in ("--set", knob)]
    asked = ["calibrate", str(folder), "--patch", "heads", "--prompts", str(text), "-o", str(tmp_path / "mine.yaml"), *knobs]
    assert main(asked) == 0
    assert "keep: 0.25" in (tmp_path / "mine.yaml").read_text()
    assert main(["inspect", str(folder), "--text", str(text), "--report", str(tmp_path / "found.html")]) == 0
    assert "secondary sinks" in (tmp_path / "found.html").read_text()


@ALL
def test_a_later_token_changes_no_earlier_row_of_a_prompt(rule: dict[str, Any]) -> None:
    model, ids = llama(), prompt(31)
    with on(model, rule):
        before, other = hidden(model, ids), ids.clone()
        other[:, 20:] = prompt(11, seed=1)
        assert torch.equal(hidden(model, other)[:, :20], before[:, :20])


def test_in_chunks_and_one_by_one_it_is_the_whole() -> None:
    model, ids = llama(), prompt(40)
    with on(model, DUO):
        whole = hidden(model, ids)
        for sizes in ([40 - 7, 7], [9] * 4 + [4], [20] + [1] * 20):
            cache = fresh(model)
            parts = [hidden(model, chunk, cache) for chunk in ids.split(sizes, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
            assert cache.get_seq_length() == 40
        torch.testing.assert_close(hidden(model, ids, use_cache=False), whole)


@ALL
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows(rule: dict[str, Any], side: str) -> None:
    """The prompt, a further turn and single tokens behind it."""
    model, rows, more = llama(), [prompt(30, seed=1), prompt(21, seed=2)], prompt(6, rows=2, seed=3)
    ids, mask = torch.zeros(2, 30, dtype=torch.int64), torch.zeros(2, 36, dtype=torch.int64)
    for place, row in enumerate(rows):
        held = slice(30 - row.shape[1], 30) if side == "left" else slice(0, row.shape[1])
        ids[place, held], mask[place, held] = row[0], 1
    mask[:, 30:] = 1
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with on(model, rule):
        cache, together = fresh(model), []
        for at, new in (
            (slice(0, 30), ids),
            (slice(30, 34), more[:, :4]),
            (slice(34, 35), more[:, 4:5]),
            (slice(35, 36), more[:, 5:]),
        ):
            together.append(hidden(model, new, cache, attention_mask=mask[:, : at.stop], position_ids=position[:, at]))
        for place, row in enumerate(rows):
            cache = fresh(model)
            alone = [
                hidden(model, new, cache)
                for new in (row, more[place, None, :4], more[place, None, 4:5], more[place, None, 5:])
            ]
            found = torch.cat(together, 1)[place, mask[place].bool()]
            torch.testing.assert_close(found, torch.cat(alone, 1)[0], rtol=1e-4, atol=1e-5)


@ALL
@pytest.mark.parametrize(
    "more", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str
)
def test_beams_and_drafts_answer_as_a_model_that_keeps_what_they_read(rule: dict[str, Any], more: dict[str, Any]) -> None:
    """Against the same patch on a cache of its own for every token."""
    model, ids = llama(), prompt(24).repeat(1, 2)
    with on(model, rule):
        if "prompt_lookup_num_tokens" in more:
            expected = generate(model, {"input_ids": ids}, 8)
        else:
            expected = beams(model, ids, 4, more["num_beams"])[: more.get("num_return_sequences", 1)]
        got = generate(model, {"input_ids": ids}, 8 if "prompt_lookup_num_tokens" in more else 4, **more)
    assert torch.equal(got, expected)


def beams(model: Any, ids: torch.Tensor, tokens: int, number: int) -> torch.Tensor:
    """Beam search in which every beam's tokens are fed one by one behind its own reading of the prompt."""
    found = [(0.0, ids)]
    for _ in range(tokens):
        grown = []
        for score, sequence in found:
            cache = fresh(model)
            given = {compat.transformers.cache_keyword(type(model).forward): cache}
            logits = model(ids, **given).logits[0, -1]
            for at in range(ids.shape[1], sequence.shape[1]):
                logits = model(sequence[:, at : at + 1], **given).logits[0, -1]
            best = logits.log_softmax(-1).topk(number)
            grown += [(score + float(s), torch.cat([sequence, t.view(1, 1)], 1)) for s, t in zip(*best, strict=True)]
        found = sorted(grown, key=lambda pair: -pair[0])[:number]
    return torch.cat([sequence for _, sequence in found])


@ALL
def test_a_cache_is_copied_cropped_sorted_and_repeated(rule: dict[str, Any]) -> None:
    model, ids, more = llama(), prompt(30, rows=2), prompt(3, rows=2, seed=5)
    with on(model, rule):
        cache = fresh(model)
        hidden(model, ids, cache)
        branch = copy.deepcopy(cache)
        once = hidden(model, more, cache)
        cache.crop(-3)
        assert cache.get_seq_length() == 30
        torch.testing.assert_close(hidden(model, more, cache), once)
        branch.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(hidden(model, more.flip(0), branch), once.flip(0))
        branch.batch_repeat_interleave(2)
        branch.batch_select_indices(torch.tensor([0, 2]))
        again = hidden(model, more.flip(0), branch)
        torch.testing.assert_close(again, hidden(model, more, cache).flip(0))
        with pytest.raises(UnsupportedError, match="cannot be taken back"):
            cache.crop(-24)


def test_keys_are_freed() -> None:
    model, ids = llama(), prompt(400)
    dense = fresh(model)
    hidden(model, ids, dense)
    full = kv_bytes(dense)
    token = full // 400 // LAYERS // KEY_HEADS
    with on(model, DUO):
        cache = fresh(model)
        hidden(model, ids, cache)
        near = SINK + WINDOW + 2 * 4
        assert kv_bytes(cache) <= 4 * 400 * token + 4 * near * token + 64 * LAYERS * near + 8 * LAYERS * KEY_HEADS * 16 * 4
    with on(model, SNAP):
        cache = fresh(model)
        hidden(model, ids, cache)
        assert kv_bytes(cache) <= full * 10 // 400 + 64 * LAYERS * 10


@ALL
def test_a_layer_is_freed_before_the_next_is_read(rule: dict[str, Any]) -> None:
    model, ids = llama(), prompt(400)
    cache, held = fresh(model), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: held.append(kv_bytes(cache)))
    hidden(model, ids, cache)
    stock, cache = held[-1], fresh(model)
    held.clear()
    with on(model, {**rule, "with": {**rule["with"], "scores": 0.0}} if rule["patch"] == "duo" else rule):
        hidden(model, ids, cache)
    assert max(held) < stock // 4, "more than one layer's keys were there at a time"


def test_everything_kept_is_dense() -> None:
    model, ids = llama(), prompt(40)
    stock = generate(model, {"input_ids": ids}, 6, return_dict_in_generate=True, output_scores=True)
    wide = {"patch": "duo", "with": {"scores": SPLIT, "window": 99, "prompt": "stream"}}
    with on(model, wide):
        got = generate(model, {"input_ids": ids}, 6, return_dict_in_generate=True, output_scores=True)
    for a, b in zip(got.scores, stock.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_snapkv_keeps_what_the_last_tokens_look_at() -> None:
    """Against a mask on a dense cache, chosen anew from eager attention."""
    model, ids, more = llama(num_hidden_layers=1), prompt(40), prompt(1, seed=7)
    model.set_attn_implementation("eager")
    p = model(ids, output_attentions=True).attentions[0][0]  # [H, S, S]
    votes = p[:, -4:, :-4].mean(1)
    votes = torch.nn.functional.avg_pool1d(votes, 3, 1, 1).unflatten(0, (KEY_HEADS, -1)).mean(1)
    kept = torch.cat([votes.topk(6, -1).indices, torch.arange(36, 41).expand(KEY_HEADS, -1)], 1)
    seen: list[torch.Tensor] = []

    handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, a, o: seen.append(a[0]))
    cache = fresh(model)
    hidden(model, ids, cache)
    hidden(model, more, cache)
    k, v = cache.layers[0].keys, cache.layers[0].values
    seen.clear()
    with on(model, SNAP):
        cache = fresh(model)
        hidden(model, ids, cache)
        hidden(model, more, cache)
    handle.remove()
    with torch.no_grad():
        layer = model.model.layers[0]
        x = layer.input_layernorm(model.model.embed_tokens(more))
        q = layer.self_attn.q_proj(x).view(1, 1, 4, -1).transpose(1, 2)
        cos, sin = model.model.rotary_emb(x, torch.tensor([[40]]))
        q = rotated(q, cos, sin)
        keys, values = (t[0].take_along_dim(kept[..., None], 1).repeat_interleave(2, 0)[None] for t in (k, v))
        expected = scaled_dot_product_attention(q, keys, values)
    torch.testing.assert_close(seen[-1].view(4, -1), expected[0, :, 0], rtol=1e-4, atol=1e-5)


@ALL
def test_what_cannot_work_is_refused_in_words(rule: dict[str, Any]) -> None:
    model, ids = llama(), prompt(30)
    with on(model, rule):
        with pytest.raises(UnsupportedError, match="StaticLayer"):
            generate(model, {"input_ids": ids}, 3, cache_implementation="static")
        pieces = {"prefill_chunk_size": 8}
        if rule is SNAP:
            with pytest.raises(UnsupportedError, match="in pieces of 8 tokens"):
                generate(model, {"input_ids": ids}, 3, **pieces)
        elif rule is DUO:
            assert torch.equal(generate(model, {"input_ids": ids}, 3, **pieces), generate(model, {"input_ids": ids}, 3))
        cache = fresh(model)
        hidden(model, ids, cache)
    with pytest.raises(UnsupportedError, match="new cache"):
        hidden(model, prompt(1), cache)


def test_a_table_of_other_heads_is_refused() -> None:
    model = llama()
    for shape, said in (((3, 2), "rows for 3 layers"), ((4, 3), "3 key heads")):
        rule = {"patch": "duo", "with": {"scores": Table(torch.rand(shape), ("layers", "heads")), "window": 4}}
        with pytest.raises(RecipeError, match=said), accelplug.apply(model, {"rules": [rule]}):
            hidden(model, prompt(9))
