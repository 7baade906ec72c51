"""Sparse decoding on language models: what a step reads, and that caches, padding, beams and drafts are as they must be."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers as hf
from torch import Tensor

import accelplug
from accelplug import compat
from accelplug.call import AttentionCall, Clock, Place, Prompt, Site
from accelplug.errors import UnsupportedError
from accelplug.kernels.kept import GrowingKeys, OffloadedKeys, RowOrder, rows_at
from accelplug.kernels.parts import joined, part
from accelplug.kernels.wave import cluster_keys, members
from accelplug.patches.sparse.decode import Decode
from accelplug.registry import list_patches, patch_class
from accelplug.testing.language_models import TEXT_CONFIG, generate
from tests.patch_rows import ROWS

DECODE = [entry.name for entry in list_patches() if entry.family == "decode"]
methods = pytest.mark.parametrize("patch", DECODE)
STEP = Clock(phase="decode")


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT_CONFIG, **more})).eval().requires_grad_(False)


def prompt(tokens: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 490, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def settings(patch: str, everything: bool = False) -> dict[str, Any]:
    """What reads some keys, or all of them; summaries of a few new tokens at a time."""
    row = ROWS[patch]
    return {**((row.faint if everything else row.working) or {}), **({} if patch == "pages" else {"update": 3})}


def applied(model: Any, patch: str, everything: bool = False, **more: Any) -> accelplug.Plug:
    rule = {"patch": patch, "with": {**settings(patch, everything), **more}}
    return accelplug.apply(model, {"rules": [rule]}, strict=True)


def cached(model: Any, cache: Any) -> dict[str, Any]:
    return {compat.transformers.cache_keyword(type(model).forward): cache}


def steps(model: Any, cache: Any, tokens: Tensor, **more: Any) -> Tensor:
    """Logits of steps over tokens (B, n), one at a time, behind what a cache has: (B, n, V)."""
    return torch.cat([model(token, **cached(model, cache), **more).logits for token in tokens.split(1, 1)], 1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------ whole models


@methods
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_what_reads_everything_is_the_model(patch: str, heads: int) -> None:
    model, ids, said = llama(num_key_value_heads=heads), prompt(37, 2), prompt(25, 2, seed=1)
    with torch.no_grad():
        cache = hf.DynamicCache(config=model.config)
        model(ids, **cached(model, cache))
        stock = steps(model, cache, said)
        with applied(model, patch, everything=True) as plug:
            cache = hf.DynamicCache(config=model.config)
            model(ids, **cached(model, cache))
            close(steps(model, cache, said), stock)
            assert plug.report().served == {"dense": 4, patch: 4 * 25}


@methods
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("everything", [False, True])
def test_a_padded_batch_is_its_rows(patch: str, side: str, everything: bool) -> None:
    model, rows, said = llama(), [prompt(33, seed=1), prompt(19, seed=2)], prompt(12, 2, seed=3)
    ids, mask = torch.zeros(2, 33, dtype=torch.int64), torch.zeros(2, 33, dtype=torch.int64)
    for place, row in enumerate(rows):
        held = slice(33 - row.shape[1], 33) if side == "left" else slice(0, row.shape[1])
        ids[place, held], mask[place, held] = row[0], 1
    with applied(model, patch, everything), torch.no_grad():
        cache, found = hf.DynamicCache(config=model.config), []
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **cached(model, cache))
        for token in said.split(1, 1):
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            at = mask.sum(-1, keepdim=True) - 1
            found.append(model(token, attention_mask=mask, position_ids=at, **cached(model, cache)).logits)
        for place, row in enumerate(rows):
            cache = hf.DynamicCache(config=model.config)
            model(row, **cached(model, cache))
            close(torch.cat(found, 1)[place], steps(model, cache, said[place : place + 1])[0])


@methods
@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 16},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=lambda more: ", ".join(more),
)
def test_what_reads_all_answers_as_the_model_does(patch: str, more: dict[str, Any]) -> None:
    """Beams, drafts that are taken back, a prompt in chunks, samples."""
    rows = 1 if "prompt_lookup_num_tokens" in more else 2
    model, ids = llama(), prompt(15, rows).repeat(1, 2)  # something to look up
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def said() -> Tensor:
        torch.manual_seed(7)
        return generate(model, given, 12, **more)

    stock = said()
    with applied(model, patch, everything=True) as plug:
        assert torch.equal(said(), stock)
        assert plug.report().served[patch]


@methods
def test_a_cache_goes_on_from_where_it_was(patch: str) -> None:
    """Copies of one prompt, tokens taken back, a new turn of several tokens: as if it had been read anew."""
    model, ids, one, two = llama(), prompt(30), prompt(9, seed=1), prompt(9, seed=2)
    with applied(model, patch, everything=True), torch.no_grad():
        cache = hf.DynamicCache(config=model.config)
        model(ids, **cached(model, cache))
        branch = copy.deepcopy(cache)
        for held, said in ((cache, one), (branch, two)):
            whole = model(torch.cat([ids, said], 1)).logits[:, 30:]
            close(steps(model, held, said), whole)
        cache.crop(-7)
        assert cache.get_seq_length() == 32
        close(steps(model, cache, two), model(torch.cat([ids, one[:, :2], two], 1)).logits[:, 32:])
        turn = model(one, **cached(model, cache)).logits
        whole = model(torch.cat([ids, one[:, :2], two, one, two], 1)).logits
        close(turn, whole[:, 41:50])
        close(steps(model, cache, two), whole[:, 50:])
        cache.crop(-45)  # into what was summarised
        close(steps(model, cache, two), model(torch.cat([ids[:, :14], two], 1)).logits[:, 14:])
        cache.reset()
        model(two, **cached(model, cache))
        close(steps(model, cache, one), model(torch.cat([two, one], 1)).logits[:, 9:])


@methods
@pytest.mark.parametrize(
    ("change", "rows"), [(("reorder_cache", torch.tensor([1, 0])), [1, 0]), (("batch_repeat_interleave", 2), [0, 0, 1, 1])]
)
def test_rows_of_a_cache_are_sorted_and_repeated(patch: str, change: tuple[str, Any], rows: list[int]) -> None:
    model, ids, said = llama(), prompt(30, 2), prompt(8, 2, seed=1)
    with applied(model, patch), torch.no_grad():
        cache = hf.DynamicCache(config=model.config)
        model(ids, **cached(model, cache))
        expected = steps(model, copy.deepcopy(cache), said)
        steps(model, cache, said[:, :4])
        getattr(cache, change[0])(change[1])
        close(steps(model, cache, said[rows, 4:]), expected[rows, 4:])


@methods
def test_rows_that_are_taken_out_go_on_with_the_models_own_attention(patch: str) -> None:
    model, ids, said = llama(), prompt(30, 2), prompt(8, 2, seed=1)
    rule = {"patch": patch, "with": settings(patch, everything=True)}
    with accelplug.apply(model, {"rules": [rule]}) as plug, torch.no_grad():
        cache = hf.DynamicCache(config=model.config)
        model(ids, **cached(model, cache))
        expected = steps(model, copy.deepcopy(cache), said)
        assert not plug.report().fallbacks
        cache.batch_select_indices(torch.tensor([1]))
        close(steps(model, cache, said[1:]), expected[1:])
        assert plug.report().fallbacks


@methods
def test_beside_a_patch_that_reads_the_prompt(patch: str) -> None:
    model, ids = llama(), prompt(40)
    reads, makes = ({"patch": name, "with": dict(ROWS[name].working)} for name in ("prefill_rows", patch))
    with accelplug.apply(model, {"rules": [reads, makes]}, strict=True) as plug:
        both = generate(model, {"input_ids": ids}, 5, return_dict_in_generate=True, output_scores=True).scores
        assert plug.report().served == {"prefill_rows": 4, patch: 4 * 4}
    with accelplug.apply(model, {"rules": [reads]}, strict=True):
        prompts = generate(model, {"input_ids": ids}, 5, return_dict_in_generate=True, output_scores=True).scores
    assert torch.equal(both[0], prompts[0])
    assert not torch.equal(both[1], prompts[1])


@methods
def test_short_sequences_are_dense_and_first_layers_too(patch: str) -> None:
    model, ids = llama(), prompt(30)
    stock = generate(model, {"input_ids": ids}, 5, return_dict_in_generate=True, output_scores=True)
    with applied(model, patch, min_tokens=99) as plug:
        short = generate(model, {"input_ids": ids}, 5, return_dict_in_generate=True, output_scores=True)
        assert plug.report().served == {"dense": 5 * 4}
    for got, expected in zip(short.scores, stock.scores, strict=True):
        assert torch.equal(got, expected)
    with applied(model, patch, min_tokens=33, dense_layers=1) as plug:
        generate(model, {"input_ids": ids}, 5)  # steps with 31, 32, 33, 34 tokens in the cache
        assert plug.report().served == {patch: 3 * 2, "dense": 5 * 4 - 3 * 2}


@methods
def test_a_cache_is_the_models_own_again_without_the_patch(patch: str) -> None:
    model, ids, said = llama(), prompt(30), prompt(6, seed=1)
    with torch.no_grad():
        stock = hf.DynamicCache(config=model.config)
        model(ids, **cached(model, stock))
        with applied(model, patch):
            cache = hf.DynamicCache(config=model.config)
            model(ids, **cached(model, cache))
            assert type(cache.layers[0]) is not hf.cache_utils.DynamicLayer
        assert {type(layer) for layer in cache.layers} == {hf.cache_utils.DynamicLayer}
        assert torch.equal(steps(model, cache, said), steps(model, stock, said))


@methods
@pytest.mark.parametrize("kind", ["static", "quantised", "offloaded"])
def test_other_caches_are_refused(patch: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name in ((torch, "Stream"), (torch.cuda, "default_stream")):
        monkeypatch.setattr(place, name, MagicMock())  # transformers asks for streams of CUDA on a CPU too
    model = llama()

    class Quantised(hf.cache_utils.DynamicLayer):
        """Stands for layers that hold keys in another form."""

    cache = {
        "static": lambda: hf.StaticCache(model.config, max_cache_len=40),
        "quantised": lambda: hf.Cache(layer_class_to_replicate=Quantised),
        "offloaded": lambda: hf.DynamicCache(config=model.config, offloading=True),
    }[kind]()
    with applied(model, patch), torch.no_grad(), pytest.raises(UnsupportedError, match="of a dynamic cache its own way"):
        model(prompt(30), **cached(model, cache))


@methods
def test_layers_with_a_window_are_left_alone(patch: str) -> None:
    torch.manual_seed(0)
    model = hf.MistralForCausalLM(hf.MistralConfig(**TEXT_CONFIG, sliding_window=16)).eval()
    ids = prompt(40)
    stock = generate(model, {"input_ids": ids})
    with accelplug.apply(model, {"rules": [{"patch": patch, "with": settings(patch)}]}) as plug:
        assert torch.equal(generate(model, {"input_ids": ids}), stock)
        assert "a window of its own" in str(plug.report())


@methods
def test_where_heads_look_is_not_told(patch: str) -> None:
    model, ids = llama(attn_implementation="eager"), prompt(30)
    with applied(model, patch), pytest.raises(UnsupportedError, match="output_attentions"):
        generate(model, {"input_ids": ids}, 3, return_dict_in_generate=True, output_attentions=True)


@methods
def test_trace_tells_what_is_read(patch: str) -> None:
    model, ids = llama(), prompt(60)
    with applied(model, patch) as plug, plug.trace() as events:
        generate(model, {"input_ids": ids}, 3)
    read = [event.density for event in events if event.patch == patch]
    assert len(read) == 2 * 4
    assert all(0.05 < density < 0.6 for density in read)


@methods
def test_half_precision(patch: str) -> None:
    model, ids = llama().bfloat16(), prompt(30, 2)
    stock = generate(model, {"input_ids": ids}, 5, return_dict_in_generate=True, output_scores=True)
    with applied(model, patch, everything=True):
        found = generate(model, {"input_ids": ids}, 5, return_dict_in_generate=True, output_scores=True)
    for got, expected in zip(found.scores, stock.scores, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, atol=0.02, rtol=0.05)


# --------------------------------------------------------------------------------------------------------------- one call


def call_of(kept: Any, q: Tensor) -> AttentionCall:
    keys, values = kept.whole()
    return AttentionCall(q, keys, values, None, 0.3, lambda: q, Place(), kept=kept)


def made(patch: str, **more: Any) -> Any:
    return patch_class(patch)({**settings(patch), "local": 5, "sink": 3, **more})


def params_of(method: Any, tokens: int) -> Any:
    valid = torch.ones(2, tokens, dtype=torch.bool)
    return method.prepare(Site("a", "decoder", "self", 0, 1), Prompt(valid.short() * 0, valid, tokens), STEP, {})


def random_call(method: Decode, tokens: int = 90, heads: int = 6) -> tuple[AttentionCall, Any]:
    g = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(2, each, n, 8, generator=g) for each, n in ((2, tokens), (2, tokens), (heads, 1)))
    params = params_of(method, tokens)
    return call_of(method.keep(k, v, params), q), params


@pytest.mark.parametrize("patch", ["pages", "retrieval"])
def test_it_is_attention_over_what_is_read(patch: str) -> None:
    method = made(patch)
    call, params = random_call(method)
    found = method.attend(call, params)
    weights = method.attend(
        AttentionCall(call.q, call.k, call.v, None, 0.3, call.dense, Place(), kept=_of_units(call)), params
    )
    read = weights > 0  # [2, 6, 1, 90]
    assert torch.equal(read[:, :3].any(1), read[:, 0]), "heads that share keys read the same ones"
    assert read[..., :3].all()
    assert read[..., -5:].all()
    share = float(read.float().mean())
    assert share == pytest.approx(method.inspect(call, params)[0], abs=1e-6)
    logits = 0.3 * call.q @ call.k.repeat_interleave(3, 1).mT
    expected = logits.masked_fill(~read, -torch.inf).softmax(-1) @ call.v.repeat_interleave(3, 1)
    torch.testing.assert_close(found, expected)


def _of_units(call: AttentionCall) -> Any:
    kept: Any = call.kept
    units = torch.eye(call.k.shape[2]).expand(2, 2, -1, -1)
    return type(kept)(call.k, units)


def test_pages_are_those_of_the_largest_bound() -> None:
    method = made("pages", page=8, budget=16)
    call, params = random_call(method)
    method.attend(call, params)
    kept: Any = call.kept
    lo, hi = kept.index["lo"], kept.index["hi"]
    assert lo.shape == (2, 2, 11, 8)  # 82 tokens between the front and the window, 8 a page
    logits = call.q.unflatten(1, (2, 3)).squeeze(-2) @ call.k[:, :, 3:-5].mT  # [2, 2, 3, 82]
    q = call.q.unflatten(1, (2, 3)).squeeze(-2)
    bound = torch.maximum(q[..., None, :] * lo[:, :, None], q[..., None, :] * hi[:, :, None]).sum(-1)
    for page in range(11):
        assert (logits[..., page * 8 : page * 8 + 8] <= bound[..., page, None] + 1e-5).all()
    best = (0.3 * bound).softmax(-1).sum(2).topk(2).indices.sort(-1).values
    units = _of_units(call)
    read = method.attend(AttentionCall(call.q, call.k, units.values, None, 0.3, call.dense, Place(), kept=units), params) > 0
    pages = torch.nn.functional.pad(read[:, ::3, 0, 3:-5], (0, 6)).unflatten(-1, (11, 8)).any(-1)
    assert torch.equal(pages.nonzero()[:, 2].view(2, 2, 2), best)


def test_clusters_make_three_zones() -> None:
    """Tokens of the first are read, of the next the mean stands for as many as there are, the others count for nothing."""
    method = made("clusters", cluster=8, exact=0.2, estimate=0.4, top_p=1.0)
    call, params = random_call(method)
    found = method.attend(call, params)
    kept: Any = call.kept
    index, q = kept.index, 0.3 * call.q.unflatten(1, (2, 3)).squeeze(-2)
    mass = (q @ index["centre"].mT + index["number"].log()[:, :, None]).softmax(-1).mean(2)
    order = mass.argsort(-1, descending=True)
    for row in range(2):
        for head in range(2):
            exact, estimated = order[row, head, :3].tolist(), order[row, head, 3:7].tolist()  # of 11 clusters
            tokens = [0, 1, 2, *range(85, 90)]
            for cluster in exact:
                first, number = (int(index[name][row, head, cluster]) for name in ("first", "number"))
                tokens += index["member"][row, head, first : first + number].tolist()
            keys = torch.cat([call.k[row, head, tokens], index["centre"][row, head, estimated]])
            values = torch.cat([call.v[row, head, tokens], index["mean"][row, head, estimated]])
            bias = torch.cat([torch.zeros(len(tokens)), index["number"][row, head, estimated].log()])
            expected = (q[row, head] @ keys.mT + bias).softmax(-1) @ values
            torch.testing.assert_close(found[row, 3 * head : 3 * head + 3, 0], expected)


def test_a_share_of_the_mass_bounds_what_clusters_read() -> None:
    few, many = (made("clusters", cluster=4, exact=1.0, top_p=top_p) for top_p in (0.3, 0.8))
    densities = [method.inspect(*random_call(method))[0] for method in (few, many)]
    assert densities[0] < densities[1] < 1


@pytest.mark.parametrize("patch", DECODE)
def test_a_key_that_stands_out_is_found(patch: str) -> None:
    method = made(patch)
    call, params = random_call(method)
    q, kept = call.q.clone(), call.kept
    call.k[:, :, 41] *= 6
    for head in range(2):
        q[:, 3 * head : 3 * head + 3] = call.k[:, head, 41][:, None, None]
    call = call_of(kept, q)
    torch.testing.assert_close(
        method.attend(call, params), call.v[:, :, 41:42].repeat_interleave(3, 1), atol=1e-3, rtol=1e-3
    )


@methods
def test_new_tokens_are_taken_in(patch: str) -> None:
    """Every token is read by every step, or in the summaries, once."""
    method = made(patch)
    call, params = random_call(method, 30)
    kept: Any = call.kept
    for _ in range(40):
        method.attend(call, params)
        kept.append(*torch.randn(2, 2, 2, 1, 8))
        call = call_of(kept, call.q)
    method.attend(call, params)
    end, number = int(kept.end.max()), "size" if patch == "pages" else "number"
    assert end == kept.indexed
    assert torch.equal(kept.index[number].sum(2), torch.full_like(kept.index[number].sum(2), end - 3))
    assert 5 <= kept.length - end < 5 + method.piece


# ---------------------------------------------------------------------------------------------------------------- kernels


def test_parts_joined_are_the_whole() -> None:
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 5)
    none = torch.full((1, 1, 7), -torch.inf)
    parts = [part(q, k[:, :, :3], v[:, :, :3]), part(q, k[:, :, 3:], v[:, :, 3:]), part(q, k[:, :, :7], v[:, :, :7], none)]
    torch.testing.assert_close(joined(parts), (q @ k.mT).softmax(-1) @ v)
    assert torch.equal(joined(parts[2:]), torch.zeros(2, 3, 4, 5))


@pytest.mark.parametrize("kind", ["plain", "view", "turned", "one for all"])
def test_rows_of_a_tensor(kind: str) -> None:
    x = {
        "plain": torch.randn(2, 3, 11, 4),
        "view": torch.randn(2, 3, 20, 4)[:, :, 5:16],
        "turned": torch.randn(2, 11, 3, 4).transpose(1, 2),
        "one for all": torch.randn(1, 1, 11, 4).expand(2, 3, -1, -1),
    }[kind]
    slots = torch.randint(11, (2, 3, 6))
    assert torch.equal(rows_at(x, slots), x.take_along_dim(slots[..., None], 2))


@pytest.mark.parametrize("kind", [GrowingKeys, OffloadedKeys])
def test_keys_grow_and_follow(kind: type[GrowingKeys]) -> None:
    k, v = torch.randn(2, 2, 700, 4), torch.randn(2, 2, 700, 3)
    with torch.inference_mode():
        kept = kind(k[:, :, :10], v[:, :, :10])
    for start, end in ((10, 11), (11, 400), (400, 700)):
        keys, values = kept.append(k[:, :, start:end], v[:, :, start:end])
        assert torch.equal(keys, k[:, :, :end])
        assert torch.equal(values, v[:, :, :end])
    kept.crop(600)
    kept.take_rows(torch.tensor([1, 1, 0]))
    assert kept.length == 600
    assert torch.equal(kept.whole()[0], k[[1, 1, 0], :, :600])
    assert torch.equal(copy.deepcopy(kept).whole()[1], v[[1, 1, 0], :, :600])


def test_tokens_by_rank() -> None:
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 0]], dtype=torch.bool)
    order = RowOrder.of(valid, True)
    ranks = torch.arange(5).expand(2, 5)
    assert order.slots_of(ranks).tolist() == [[2, 3, 4, 5, 6], [0, 1, 3, 5, 6]]
    assert order.slots_of(ranks[:, None].expand(-1, 3, -1))[1].tolist() == [[0, 1, 3, 5, 6]] * 3
    assert order.tokens(7).tolist() == [[5], [5]]


def test_clusters_hold_every_token_once() -> None:
    keys, values = torch.randn(2, 3, 50, 8), torch.randn(2, 3, 50, 4)
    ranks, held = torch.arange(50).expand(2, -1) + 100, torch.ones(2, 50, dtype=torch.bool)
    held[1, 40:] = False
    found = cluster_keys(keys, values, ranks, held, 8, 5)
    every = torch.arange(7).expand(2, 3, -1)
    tokens, real = members(found, every, torch.ones_like(every, dtype=torch.bool))
    for row, number in enumerate((50, 40)):
        for head in range(3):
            assert tokens[row, head][real[row, head]].sort().values.tolist() == list(range(100, 100 + number))
    some, real = members(found, every[..., 2:4], torch.tensor([True, False]).expand(2, 3, -1))
    inside = some[0, 1][real[0, 1]] - 100
    torch.testing.assert_close(keys[0, 1, inside].mean(0), found["centre"][0, 1, 2])
    torch.testing.assert_close(values[0, 1, inside].mean(0), found["mean"][0, 1, 2])
    assert len(inside) == found["number"][0, 1, 2]


def test_faiss_finds_the_best() -> None:
    pytest.importorskip("faiss", reason="faiss is absent: pip install faiss-cpu")
    by = [made("retrieval", search=search, probe=1.0, tokens=6) for search in ("faiss", "clusters")]
    calls = [random_call(method, heads=2) for method in by]

    def answers() -> list[Tensor]:
        return [method.attend(call_of(call.kept, call.q), params) for method, (call, params) in zip(by, calls, strict=True)]

    for _ in range(9):
        new = torch.randn(2, 2, 2, 1, 8)
        for call, _ in calls:
            call.kept.append(*new)
        torch.testing.assert_close(*answers())
    for call, _ in calls:
        kept: Any = call.kept
        kept.take_rows(torch.tensor([1, 1]))
        kept.forget()  # as faiss does by itself
    torch.testing.assert_close(*answers())
