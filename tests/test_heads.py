"""The mathematics of the head patches: the identities they rest on, in float64, and each method against its plain form."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from accelplug.call import AttentionCall, Clock, Place, Prompt, Site
from accelplug.kernels import spans
from accelplug.kernels.vision import divergence, normalised, vision_aware
from accelplug.patches.heads import gift, imbalance, pai, var
from accelplug.patches.heads.visual_bias import VisualBias

SITE = Site("layers.0.self_attn", "decoder", "self", 0, 4)
PREFILL, DECODE = Clock(phase="prefill"), Clock(phase="decode")
B, H, KV, S, D, DV = 2, 4, 2, 23, 16, 24
VISUAL = slice(4, 13)
TIGHT: dict[str, Any] = {"atol": 1e-12, "rtol": 0.0}


def make(dtype: torch.dtype = torch.float64, queries: int = S, heads: int = H, kv: int = KV, keys: int = S) -> AttentionCall:
    """A causal call with grouped heads; the last `queries` of `keys` positions ask."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, heads, queries, D, generator=generator, dtype=torch.float64)
    k = torch.randn(B, kv, keys, D, generator=generator, dtype=torch.float64)
    v = torch.randn(B, kv, keys, DV, generator=generator, dtype=torch.float64)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    keep = torch.ones(keys, keys, dtype=torch.bool).tril()[-queries:]

    def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=D**-0.5, enable_gqa=True)

    mask = keep[None, None].expand(B, 1, -1, -1)
    return AttentionCall(q, k, v, mask, D**-0.5, dense, Place(first_query=keys - queries))


def prompt(length: int = S, rows: int = S, **more: Any) -> Prompt:
    """Two rows: one image at VISUAL; the second row has two tokens of padding and one image more."""
    image = torch.zeros(B, length, dtype=torch.int16)
    image[:, VISUAL] = 1
    image[1, 15:18] = 2
    valid = torch.ones(B, length, dtype=torch.bool)
    valid[1, :2] = False
    return Prompt(image, valid, length, length - rows, **more)


def probabilities(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """All of p (B, H, S_q, S_k), and values by query head, in the call's dtype."""
    groups = call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (call.k, call.v))
    scores = (call.q @ k.mT * call.scale).masked_fill(~call.mask, -math.inf)
    return scores.softmax(-1), v


# ------------------------------------------------------------------------------------------------------------ primitives


def test_weighting_and_renormalising_is_a_bias_in_two_more_dimensions() -> None:
    call, layout = make(), prompt()
    p, v = probabilities(call)
    weight = torch.where(layout.visual[:, None, None] & layout.rows[:, None, :, None], 3.0, 1.0)
    expected = (p * weight / (p * weight).sum(-1, keepdim=True)) @ v
    rows = layout.rows[:, None, :, None].double() * math.log(3.0)
    q, k = spans.biased(call, rows, layout.visual[..., None].double())
    torch.testing.assert_close(call.dense(q, k), expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_loses_no_more_than_the_dtype_does(dtype: torch.dtype) -> None:
    exact, call = make(), make(dtype)
    rows, columns = torch.full((1, 1, 1, 1), math.log(1.15)), prompt().visual[..., None].float()
    q, k = spans.biased(call, rows, columns)
    reference = exact.dense(*spans.biased(exact, rows.double(), columns.double()))
    plain = (call.dense().double() - exact.dense()).abs().max()
    assert (call.dense(q, k).double() - reference).abs().max() <= 2 * plain


def test_indicator_values_are_span_masses() -> None:
    call, layout = make(), prompt()
    p, _ = probabilities(call)
    span = torch.stack([layout.visual, layout.system], -1)
    out, masses = spans.with_masses(call, span)
    torch.testing.assert_close(out, call.dense(), **TIGHT)
    torch.testing.assert_close(masses.double(), p @ span[:, None].double(), atol=1e-6, rtol=0)


def test_part_of_the_output_from_a_span() -> None:
    call, layout = make(), prompt()
    p, v = probabilities(call)
    expected = (p * layout.visual[:, None, None]) @ v
    torch.testing.assert_close(call.dense(v=spans.only(call.v, layout.visual)), expected, **TIGHT)


def test_zeroing_a_span_without_renormalising_is_taking_its_part_off() -> None:
    call, layout = make(), prompt()
    p, v = probabilities(call)
    zeroed = (p * ~layout.system[:, None, None]) @ v
    torch.testing.assert_close(call.dense() - call.dense(v=spans.only(call.v, layout.system)), zeroed, **TIGHT)


@pytest.mark.parametrize("rows", [1, 3, S])
def test_last_rows(rows: int) -> None:
    call = make()
    p, v = probabilities(call)
    torch.testing.assert_close(spans.row_attention(call, rows).double(), p[:, :, -rows:], atol=1e-6, rtol=0)
    read = spans.read_rows(call, spans.row_attention(call, rows))
    torch.testing.assert_close(read, (p @ v)[:, :, -rows:], atol=1e-5, rtol=0)
    tail = spans.last(call, rows)
    torch.testing.assert_close(tail.dense(), call.dense()[:, :, -rows:], **TIGHT)
    torch.testing.assert_close(spans.replace_rows(call, tail.dense(), rows), call.dense(), **TIGHT)


@pytest.mark.parametrize("form", ["none", "flash", "bool", "additive"])
def test_masks_of_every_form_say_the_same(form: str) -> None:
    call, valid = make(), prompt().valid
    keep = (call.mask & valid[:, None, None]) if form != "none" else call.mask
    additive = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, torch.finfo(torch.float32).min)
    mask = {"none": None, "flash": valid, "bool": keep, "additive": additive}[form]
    found = spans.keep_rows(replace(call, mask=mask), 5)
    found = found if found.dtype == torch.bool else found > -1
    assert torch.equal(found.expand(B, 1, 5, S), keep[:, :, -5:].expand(B, 1, 5, S))


def test_positions_fit_windows_and_static_caches() -> None:
    call, known = make(), torch.arange(S)[None]
    window = replace(call, k=call.k[:, :, 5:], place=Place(first_key=5))
    assert torch.equal(spans.fit(known, window), known[:, 5:])
    static = replace(call, k=pad(call.k, (0, 0, 0, 4)))
    assert torch.equal(spans.fit(known, static), pad(known, (0, 4)))


def test_one_query_with_a_bias() -> None:
    call = make(queries=1)
    bias = torch.randn(B, H, 1, S, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = H // KV
    scores = call.q @ call.k.repeat_interleave(groups, 1).mT * call.scale + bias
    expected = scores.softmax(-1) @ call.v.repeat_interleave(groups, 1)
    torch.testing.assert_close(spans.decode_biased(call, bias), expected, **TIGHT)


# --------------------------------------------------------------------------------------------------------------- prompts


def test_spans_of_a_prompt() -> None:
    layout = prompt()
    assert layout.visual[0].nonzero().flatten().tolist() == [*range(4, 13)]
    assert layout.system[0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert layout.system[1].nonzero().flatten().tolist() == [2, 3]  # padding is not text
    assert layout.later[0].nonzero().flatten().tolist() == [*range(13, S)]
    assert layout.later[1].nonzero().flatten().tolist() == [13, 14, *range(18, S)]
    decoded = replace(layout, length=S - 3)
    assert decoded.question[0].nonzero().flatten().tolist() == [*range(13, S - 3)]
    assert replace(layout, past=S - 2).rows.shape == (B, 2)
    blind = Prompt(torch.zeros(1, 5, dtype=torch.int16), torch.ones(1, 5, dtype=torch.bool), 5)
    assert not blind.later.any()
    assert not blind.system.any()


# --------------------------------------------------------------------------------------------------------------- methods


def weighted(call: AttentionCall, weight: Tensor) -> Tensor:
    """Multiply attention by a weight and renormalise, plainly."""
    p, v = probabilities(call)
    p = p * weight
    return (p / p.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("queries", [S, 1])
def test_visual_bias_is_weighting(queries: int) -> None:
    call, layout = make(queries=queries), prompt()
    patch = VisualBias({"image_weight": 2.5, "system_weight": 0.5, "heads": [1, 3]})
    params = patch.prepare(SITE, layout, PREFILL if queries > 1 else DECODE, {})
    rows = layout.later if queries > 1 else torch.ones(B, 1, dtype=torch.bool)
    chosen = torch.tensor([False, True, False, True])[None, :, None, None] & rows[:, None, :, None]
    weight = torch.where(layout.visual[:, None, None], 2.5, torch.where(layout.system[:, None, None], 0.5, 1.0))
    expected = weighted(call, torch.where(chosen, weight, 1.0).double())
    torch.testing.assert_close(patch.attend(call, params), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("queries", [S, 1])
def test_var_is_redistribution_head_by_head_and_row_by_row(queries: int) -> None:
    call, layout = make(queries=queries), prompt()
    hidden = 0.1 * torch.randn(B, S, 32, generator=torch.Generator().manual_seed(2))
    for row, token in ((0, 0), (0, 6), (0, 9), (1, 2), (1, 16), (1, 20)):  # text and image tokens
        hidden[row, token, 5] = 60.0
    sinks = torch.zeros(B, S, dtype=torch.bool)
    sinks[0, [0, 6, 9]] = True
    sinks[1, [2, 16, 20]] = True
    patch: Any = var.Var({"min_nonsink_ratio": 0.6, "min_visual_mass": 0.3, "sink_threshold": 4.0})
    state: dict = {}
    full = make()
    out = patch.attend(replace(full, hidden=hidden), patch.prepare(SITE, layout, PREFILL, state))
    assert torch.equal(state["sinks 0"], sinks)
    if queries == 1:
        out = patch.attend(call, patch.prepare(SITE, layout, DECODE, state))
    p, v = probabilities(call)
    new, selected = p.clone(), 0
    for b in range(B):
        rest = layout.visual[b] & ~sinks[b]
        for h in range(H):
            for i in range(queries):
                on_image = p[b, h, i, layout.visual[b]].sum()
                asks = queries == 1 or layout.later[b, i]
                if not asks or on_image < 0.3 or p[b, h, i, rest].sum() < 0.6 * on_image:
                    continue
                selected += 1
                moved = 0.6 * p[b, h, i, sinks[b]].sum()
                new[b, h, i, sinks[b]] *= 0.4
                new[b, h, i, rest] += moved * p[b, h, i, rest] / p[b, h, i, rest].sum()
    assert selected
    torch.testing.assert_close(new.sum(-1), torch.ones_like(new.sum(-1)), **TIGHT)
    torch.testing.assert_close(out, new @ v, atol=1e-6, rtol=0)


def test_var_finds_dimensions_and_leaves_layers_alone_whose_image_has_no_sink() -> None:
    first = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)) * 0.01
    first[0, [7, 11]] = torch.tensor([50.0, -40.0])
    assert var.massive_dims(normalised(first), 4.0)[0].nonzero().flatten().tolist() == [7, 11]
    assert not var.massive_dims(normalised(torch.ones(1, 64)), 4.0).any()
    state: dict[str, Any] = {}
    call, layout = make(), prompt()
    hidden = 0.1 * torch.randn(B, S, 32, generator=torch.Generator().manual_seed(2))
    hidden[:, [0, 2], 5] = 60.0  # the first token alone
    patch: Any = var.Var({"sink_threshold": 4.0})
    out = patch.attend(replace(call, hidden=hidden), patch.prepare(SITE, layout, PREFILL, state))
    assert torch.equal(out, call.dense())
    assert patch.prepare(SITE, layout, DECODE, state) is None


def test_vhr_takes_the_upper_half_without_outliers() -> None:
    vhd = torch.tensor([[1.0, 2.0, 3.0, 4.0, 50.0, 2.5]])
    ta = torch.tensor([[1.0, 1.0, 1.0, 1.0, 90.0, 1.0]])
    assert vision_aware(vhd, ta).tolist() == [
        [False, False, True, True, False, True]
    ]  # without the outlier: 2 is the median
    assert vision_aware(vhd, ta, drop_outliers=False).tolist() == [[False, False, True, True, True, False]]
    seeing, blind = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    d, t = divergence(seeing, blind)
    torch.testing.assert_close(d, ((seeing - blind) ** 2).sum(-1).sqrt())
    torch.testing.assert_close(t, (blind**2).sum(-1))


@pytest.mark.parametrize("answers", [1, 3])
def test_pai_raises_signed_scores_in_answering_rows(answers: int) -> None:
    call, layout = make(), prompt()
    call = replace(call, place=replace(call.place, answers=answers))
    out = pai.Pai({"alpha": 0.5}).attend(call, pai.Pai({"alpha": 0.5}).prepare(SITE, layout, PREFILL, {}))
    groups = H // KV
    scores = call.q @ call.k.repeat_interleave(groups, 1).mT * call.scale
    scores[:, :, -answers:] += 0.5 * (scores.abs() * layout.visual[:, None, None])[:, :, -answers:]
    expected = scores.masked_fill(~call.mask, -math.inf).softmax(-1) @ call.v.repeat_interleave(groups, 1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("at_a_time", [128, 3])
def test_gift_reads_the_gaze_and_shifts_the_answer(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gift, "QUESTION_ROWS", at_a_time)
    state: dict[str, Any] = {}
    call, layout = make(), prompt()
    patch: Any = gift.Gift({"saliency_layer": 0, "enhance": [1, 4], "alpha": 2.0})
    assert torch.equal(patch.attend(call, patch.prepare(SITE, layout, PREFILL, state)), call.dense())
    p, v = probabilities(call)
    weight = state["gaze"].weight.double()
    assert weight.shape == (B, S)
    assert (weight[~layout.visual] == 1).all()
    for b in range(B):
        inside = weight[b, layout.visual[b]].log() / 2
        assert inside.min() == pytest.approx(0, abs=1e-5)
        assert inside.max() == pytest.approx(1, abs=1e-5)
        moves = torch.zeros(H, S, dtype=torch.float64)
        for i in layout.question[b].nonzero().flatten().tolist():
            moves += (p[b, :, i] - p[b, :, i - 1]).clamp(min=0) * layout.visual[b]
        heads = moves.sum(-1).topk(H // 2).indices
        gaze = moves[heads].mean(0)[layout.visual[b]]
        gaze = gaze.clamp(max=gaze.mean() + 3 * gaze.std(correction=0))
        torch.testing.assert_close(inside, (gaze - gaze.min()) / (gaze.max() - gaze.min()), atol=1e-4, rtol=0)
    site = replace(SITE, layer=2)
    step = make(queries=1)
    out = patch.attend(step, patch.prepare(site, layout, DECODE, state))
    p, v = probabilities(step)
    new = p.clone()
    for b in range(B):
        seen, asked = (p[b, :, 0, span[b]].sum(-1) for span in (layout.visual, layout.question))
        lookers, askers = seen.topk(H // 2).indices, asked.topk(H // 2).indices
        new[b, lookers] *= weight[b]
        grown = new[b, lookers][..., layout.visual[b]].sum() / seen[lookers].sum()
        question = torch.where(layout.question[b], grown, 1.0)
        new[b, askers] *= question
    new = new / new.sum(-1, keepdim=True)
    torch.testing.assert_close(out, new @ v, atol=1e-5, rtol=0)


TEMPLATES = {
    "vicuna": "<s>USER: <image>\n{} ASSISTANT:",
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>{}<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "<s>[INST] <image>\n{} [/INST]",
    "gemma": "<s><|im_start|>user\n\n<image>\n\n{}<|im_end|>\n<|im_start|>model\n",
}


def of_bytes() -> Any:
    """A tokenizer whose tokens are bytes: nothing is shorter."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<image>", "<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.mark.parametrize("template", TEMPLATES)
def test_gift_tells_words_that_carry_content_from_others_and_from_the_template(template: str) -> None:
    tokenizer, asked = (
        of_bytes(),
        "Isn't there a tyrannosaurus\u2019s tail, caf\u00e9 \u65e5\u672c or model_2 beside the User's house?",
    )
    whole = TEMPLATES[template].format(asked)
    ids = tokenizer(whole)["input_ids"]
    written, content = gift.words(tokenizer, ids)
    behind = ids.index(tokenizer.convert_tokens_to_ids("<image>"))

    def of(flags: list[bool]) -> str:
        """The bytes of marked tokens behind the image, others as blanks."""
        kept = [i if flag else tokenizer(" ")["input_ids"][0] for i, flag in zip(ids, flags, strict=True)]
        return " ".join(tokenizer.decode(kept[behind:]).split())

    assert of(written) == asked
    assert of(content) == "tyrannosaurus\u2019s tail caf\u00e9 \u65e5\u672c model 2 beside User's house"


def test_gift_counts_words_of_the_question_alone() -> None:
    """With a tokenizer, neither the template nor a stop word moves the map; without one, all text does."""
    tokenizer, (call, layout) = of_bytes(), (make(), prompt())
    ids = torch.zeros(B, S, dtype=torch.long)
    ids[:, 13:] = torch.tensor(tokenizer("of red  ux")["input_ids"])
    state: dict[str, Any] = {}
    layout = replace(layout, ids=ids)
    patch: Any = gift.Gift({"saliency_layer": 0, "enhance": [1, 4]})
    assert torch.equal(patch.words(layout)[1], layout.question)
    patch.processor = tokenizer
    question, content = patch.words(layout)
    assert question[0].nonzero().flatten().tolist() == [13, 14, 16, 17, 18, 21, 22]
    assert content[0].nonzero().flatten().tolist() == [16, 17, 18, 21, 22]
    assert not content[1, 15:18].any()  # of the second image
    site, params = replace(SITE, layer=2), patch.prepare(SITE, replace(layout, ids=None), PREFILL, state)
    patch.attend(call, params)
    assert "embeddings" in patch.prepare(site, layout, PREFILL, state)
    assert patch.prepare(site, layout, DECODE, state) is None


def test_imbalance_tells_local_patches_from_summaries() -> None:
    first = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.1, 0.1, 0.1, 0.1])
    late = torch.tensor([0.1, 0.1, 0.1, 5.0, 0.1, 0.1, 0.1, 0.1])
    local, summary = imbalance.streams(first, late, 0.25)
    assert local.nonzero().flatten().tolist() == [0]  # 3 is a summary
    assert summary.nonzero().flatten().tolist() == [3]
    layout = prompt()
    maps = torch.zeros(B, S), torch.zeros(B, S)
    for map_, values in zip(maps, (first, late), strict=True):
        map_[0, 4:12] = values
        map_[:, 12] = 0.1
        map_[1] = map_[0]
    patch = imbalance.Imbalance({"local_share": 0.12})
    params = patch.prepare(SITE, layout, PREFILL, {"vision_attention": maps})
    assert params.share[0, 4] == pytest.approx(0.7)
    assert params.share[0, 7] == pytest.approx(0.3)
    assert params.share[0].count_nonzero() == 2


def test_sink_registers_shrink_a_head_by_one_number() -> None:
    """FarSight's upper triangle of registers is a factor on the head's output: what a sink logit does."""
    call = make()
    groups, sigma = H // KV, 0.3
    scores = call.q @ call.k.repeat_interleave(groups, 1).mT * call.scale
    ahead = torch.arange(S)[None] - torch.arange(S)[:, None]
    registers = torch.where(ahead > 0, -ahead.double() * sigma, scores)
    explicit = (registers.softmax(-1) * (ahead <= 0)) @ call.v.repeat_interleave(groups, 1)
    lse = scores.masked_fill(ahead > 0, -math.inf).logsumexp(-1)
    extra = torch.stack([torch.exp(-sigma * torch.arange(1, S - i, dtype=torch.float64)).sum() for i in range(S)]).log()
    factor = torch.exp(lse - torch.logaddexp(lse, extra))
    torch.testing.assert_close(call.dense() * factor[..., None], explicit, **TIGHT)


def test_summed_keys_give_summed_scores() -> None:
    """SPIN's head score needs one dot product: q . sum(k) is the sum of q . k."""
    call, layout = make(queries=1), prompt()
    k = call.k.repeat_interleave(H // KV, 1)
    summed = ((call.q @ k.mT * call.scale)[:, :, 0] * layout.visual[:, None]).sum(-1)
    once = (call.q[:, :, 0] * (k * layout.visual[:, None, :, None]).sum(2)).sum(-1) * call.scale
    torch.testing.assert_close(once, summed, **TIGHT)
