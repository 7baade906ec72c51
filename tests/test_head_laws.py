"""Laws of the head patches: what is hidden stays hidden, low precision is the model's alone, and what cannot work is told at apply."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import pad

import accelplug
from accelplug.call import AttentionCall, Clock, Place, Prompt, Site
from accelplug.errors import AccelplugError, FallbackError
from accelplug.hosts.blind import Blind
from accelplug.kernels import spans
from accelplug.patches.guidance.contrast import contrasted
from accelplug.registry import patch_class
from accelplug.testing.language_models import IMAGE, TEXT_CONFIG, TOWER_CONFIG, forward, generate
from tests.patch_rows import ROWS
from tests.test_flash_attention import kernel  # noqa: F401
from tests.test_language_host import WORKING
from tests.test_oracle import sharp
from tests.tiny_language_models import build, held, inputs, right_padded

B, H, KV, S, D = 2, 4, 2, 24, 16
WINDOW = 9
VISUAL = slice(4, 17)
SITE = Site("layers.2.self_attn", "decoder", "self", 2, 4)
PREFILL, DECODE = Clock(phase="prefill"), Clock(phase="decode")
ALONE = {name: settings for name, settings in WORKING.items() if name != "vhr"} | {
    "gift": {**WORKING["gift"], "enhance": [2, 4]}  # behind the layer that is read, as the site is
}
"""Working settings of those that read nothing but their call."""
FORMS = ("bool", "lowest", "infinite", "large", "told", "window")


def prompt(queries: int) -> Prompt:
    """One image in either row; the second has three tokens of padding ahead."""
    image = torch.zeros(B, S, dtype=torch.int16)
    image[:, VISUAL] = 1
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, :3] = False
    return Prompt(image, valid, S, S - queries if queries < S else 0, min(queries, 3))


def readable(form: str) -> Tensor:
    """Which keys every query may read: bool (B, S, S). Some image keys are hidden from the last queries."""
    at = torch.arange(S)
    keep = (at <= at[:, None]) & prompt(S).valid[:, None]
    if form == "window":
        return keep & (at > at[:, None] - WINDOW)
    if form != "told":
        keep[:, 15:, 6:9] = False
    return keep


def make(form: str, queries: int, dtype: torch.dtype, seed: int = 0) -> AttentionCall:
    """A call in which keys are hidden in one of the forms that masks have; answered plainly."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (4 * torch.randn(B, n, S, D, generator=generator) for n in (H, KV, KV))
    q, k, v = q[:, :, -queries:].to(dtype), k.to(dtype), v.to(dtype)
    keep = readable(form)[:, None, -queries:]
    hidden = {"lowest": torch.finfo(dtype).min, "infinite": -math.inf, "large": -1e4}
    mask: Tensor | None = keep
    if form in hidden:
        mask = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, hidden[form])
    if form in ("told", "window"):
        mask = prompt(S).valid

    def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
        k, v = (x.repeat_interleave(H // KV, 1).float() for x in (k, v))
        scores = (q.float() @ k.mT * D**-0.5).masked_fill(~keep, -math.inf)
        return (scores.softmax(-1).nan_to_num(0.0) @ v).to(dtype)

    place = Place(S - queries, answers=min(queries, 3), window=WINDOW if form == "window" else None)
    return AttentionCall(q, k, v, mask, D**-0.5, dense, place)


def answered(name: str, call: AttentionCall, queries: int) -> Tensor:
    """What a patch makes of the last rows that answer, once it has read the prompt."""
    patch, layout, whole = patch_class(name)(ALONE[name]), prompt(queries), make("bool", S, torch.float32)
    hidden = torch.randn(B, S, 32, generator=torch.Generator().manual_seed(1))
    maps = tuple(torch.rand(B, S, generator=torch.Generator().manual_seed(i)) * prompt(S).visual for i in (2, 3))
    state: dict[str, Any] = {"vision_attention": maps}
    clock = PREFILL if queries > 1 else DECODE
    if name == "gift":
        patch.attend(whole, patch.prepare(replace(SITE, layer=1), prompt(S), PREFILL, state))
    elif queries < S:
        patch.attend(replace(whole, hidden=hidden), patch.prepare(SITE, prompt(S), PREFILL, state))
    call = replace(call, hidden=hidden[:, -queries:])
    out = patch.attend(call, patch.prepare(SITE, layout, clock, state))
    assert not torch.equal(out, call.dense())
    return out[:, :, -3:]


AT = [(name, queries) for name in ALONE for queries in (S, 3, 1) if name != "farsight" or queries == S]
"""What changes a prompt alone has no say in a step, or of drafts."""


@pytest.mark.parametrize(("name", "queries"), AT)
@pytest.mark.parametrize("form", FORMS)
def test_what_a_mask_hides_has_no_say_at_all(name: str, form: str, queries: int) -> None:
    """Other keys and values where no row that answers may read: the same result, bit for bit."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call, other = make(form, queries, dtype), make(form, queries, dtype, seed=5)
        seen = readable(form)[:, -min(queries, 3) :].any(1)[:, None, :, None]
        hidden_image = ~seen[:, 0, :, 0] & prompt(S).visual
        assert bool(hidden_image.any()) or form == "told"
        k, v = (torch.where(seen, mine, theirs) for mine, theirs in ((call.k, other.k), (call.v, other.v)))
        changed = make(form, queries, dtype)
        inner = changed.dense
        changed = replace(changed, k=k, v=v, dense=lambda q=call.q, k=k, v=v, inner=inner: inner(q, k, v))
        out = answered(name, call, queries)
        assert bool(out.isfinite().all())
        assert torch.equal(answered(name, changed, queries), out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [S, 5, 1])
def test_rows_computed_anew_are_the_model_s_own(form: str, rows: int) -> None:
    call = make(form, S, torch.float32)
    p, valid = spans.row_attention(call, rows), prompt(S).valid[:, None, -rows:].expand(B, H, rows)
    hidden = ~readable(form)[:, None, -rows:].expand_as(p)
    assert (p[hidden & valid[..., None]] == 0).all()
    torch.testing.assert_close(spans.read_rows(call, p)[valid], call.dense()[:, :, -rows:][valid], atol=1e-5, rtol=1e-5)


def test_a_mask_of_a_static_cache_is_shorter_than_its_keys() -> None:
    call = make("told", 1, torch.float32)
    longer = replace(call, k=pad(call.k, (0, 0, 0, 9)), v=pad(call.v, (0, 0, 0, 9)))
    for window in (None, WINDOW):
        place = replace(call.place, window=window)
        p, short = (spans.row_attention(replace(x, place=place)) for x in (longer, call))
        assert torch.equal(p[..., S:], torch.zeros(B, H, 1, 9))
        torch.testing.assert_close(p[..., :S], short)
        assert ((short > 0).sum(-1) <= (window or S)).all()


def test_without_causality_a_query_reads_behind_itself() -> None:
    call = replace(make("told", S, torch.float32), mask=None, place=Place(causal=False))
    assert (spans.row_attention(call, 5) > 0).all()
    near = spans.row_attention(replace(call, place=Place(causal=False, window=3)), S) > 0
    at = torch.arange(S)
    assert torch.equal(near[0, 0], (at - at[:, None]).abs() < 3)


@pytest.mark.parametrize("held_as", ["dynamic", "whole", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("name", ["llava_mistral", "gemma3"])
@pytest.mark.usefixtures("kernel")
def test_at_a_strength_near_nothing_every_patch_is_the_stock_model(name: str, attention: str, held_as: str) -> None:
    """Its way through every call all the same: prompts padded on both sides, windows, and steps on every kind of cache."""
    if (name, attention) == ("gemma3", "flash_attention_2"):
        return  # refused by transformers
    model = sharp(name).float()
    config = model.config.get_text_config()
    config._attn_implementation = attention
    left = inputs("gemma3" if name == "gemma3" else "llava")
    for given in (left, right_padded(left)):
        plain = _steps(model, given, held_as)
        for patch in WORKING:
            if patch == "imbalance" and name == "gemma3":
                continue  # whose tower has no class token
            with accelplug.apply(model, ROWS[patch].recipe(ROWS[patch].faint), strict=True) as plug:
                found = _steps(model, given, held_as)
                assert plug.report().served[patch]
            torch.testing.assert_close(found, plain, atol=3e-5, rtol=0)


def _steps(model: Any, given: dict[str, Tensor], held_as: str) -> Tensor:
    """Logits of a prompt's tokens and of three more, one by one, on a cache: (tokens that are no padding, vocabulary)."""
    config, mask = model.config.get_text_config(), given["attention_mask"]
    cache = {
        "dynamic": lambda: hf.DynamicCache(config=config),  # which drops what has left a window
        "whole": hf.DynamicCache,
        "static": lambda: hf.StaticCache(config=config, max_cache_len=80),
    }[held_as]()
    logits = [model(**given, **held(cache)).logits[mask.bool()]]
    for token in (21, 22, 23):
        mask = pad(mask, (0, 1), value=1)
        ids, at = torch.full((len(mask), 1), token), (mask.cumsum(-1) - 1)[:, -1:]
        logits.append(model(input_ids=ids, attention_mask=mask, position_ids=at, **held(cache)).logits[:, 0])
    return torch.cat(logits)


# ------------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_computed_anew_are_float32_under_autocast(dtype: torch.dtype) -> None:
    call = make("lowest", S, torch.float32)
    p, masses = spans.row_attention(call, 5), prompt(S).visual[..., None].float()
    exact = p, spans.read_rows(call, p), spans.on_spans(call, p, masses)
    with torch.autocast("cpu", dtype):
        inside = spans.row_attention(call, 5), spans.read_rows(call, p), spans.on_spans(call, p, masses)
    assert all(torch.equal(a, b) for a, b in zip(exact, inside, strict=True))


@pytest.mark.parametrize("name", ALONE)
def test_under_autocast_a_model_moves_as_it_does_without(name: str) -> None:
    """A patch's effect survives autocast: what is left of it is what the model itself loses."""
    model, given = build("llava"), inputs("llava")
    recipe = {"patch": name, "with": {**ALONE[name], **({"alpha": 3.0} if name in ("gift", "pai") else {})}}
    valid = given["attention_mask"].bool()

    def run(patched: bool, cast: bool) -> Tensor:
        plug = accelplug.apply(model, recipe, strict=True) if patched else None
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                out = forward(model, given)
                generate(model, given, 3)
        finally:
            if plug is not None:
                plug.remove()
        return out[valid].float()

    plain, cast, moved, both = run(False, False), run(False, True), run(True, False), run(True, True)
    assert bool(both.isfinite().all())
    assert (both - moved).norm() < 3 * (cast - plain).norm()


# ------------------------------------------------------------------------------------------------------------ told early


def paligemma2() -> Any:
    """A tiny PaliGemma 2, whose language model caps its scores."""
    torch.manual_seed(0)
    vision = {key: value for key, value in TOWER_CONFIG.items() if key != "projection_dim"}
    config = hf.PaliGemmaConfig(
        vision_config={**vision, "vision_use_head": False, "projection_dim": 64},
        text_config={
            "model_type": "gemma2",
            **TEXT_CONFIG,
            "head_dim": 16,
            "attn_logit_softcapping": 5.0,
            "sliding_window": 8,
        },
        image_token_index=IMAGE,
        projection_dim=64,
    )
    return hf.PaliGemmaForConditionalGeneration(config).eval().requires_grad_(False)


def prefixed() -> dict[str, Tensor]:
    """A prompt of PaliGemma's, all of which reads itself both ways."""
    ids = torch.tensor([[IMAGE] * 16 + [1, 7, 8, 9, 10]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": pixels,
    }


def test_without_its_image_a_prompt_reads_itself_as_it_does_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """PaliGemma's prompts read themselves both ways, by their token types."""
    model, given, outputs, made = paligemma2(), prefixed(), {}, []
    model.set_attn_implementation({"text_config": "eager"})
    text = {name: given[name][:, 16:] for name in ("input_ids", "attention_mask", "token_type_ids")}
    for layer in model.get_decoder().layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.update({module: args[0][:, -1]}))
    alone = forward(model, {**text, "position_ids": torch.arange(5)[None]})[:, -1]
    *_, last = outputs.values()
    original = Blind.__init__
    monkeypatch.setattr(Blind, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    with accelplug.apply(model, {"patch": "vhr", "where": {"layers": 3}}, strict=True):
        forward(model, given)
    assert torch.equal(made[0].heads(3), last.reshape(1, 4, 16))
    with accelplug.apply(model, {"patch": "contrast", "with": {"gamma": 3.0, "cutoff": 0.0}}):
        out = generate(model, given, 1, return_dict_in_generate=True, output_scores=True, output_logits=True)
    torch.testing.assert_close(out.scores[0], contrasted(out.logits[0], alone, 3.0, 0.0))


@pytest.mark.parametrize("name", ["visual_bias", "var", "gift", "pai"])
def test_a_soft_cap_is_told_and_leaves_calls_dense(name: str) -> None:
    model, given = paligemma2(), prefixed()
    model.set_attn_implementation({"text_config": "eager"})
    plain, recipe = forward(model, given), {"patch": name, "with": ALONE[name]}
    with accelplug.apply(model, recipe) as plug:
        assert torch.equal(forward(model, given), plain)
        assert any("cap" in reason for reason in plug.report().fallbacks)
    with accelplug.apply(model, recipe, strict=True), pytest.raises(FallbackError, match="cap"):
        forward(model, given)


@pytest.mark.parametrize(
    ("patch", "config", "layers", "said"),
    [
        ("gift", {"saliency_layer": 1, "enhance": [2, 4]}, "2:", "saliency_layer"),
        ("gift", {"saliency_layer": 11, "enhance": [2, 4]}, "0:", "saliency_layer"),
        ("gift", {"saliency_layer": 1, "enhance": [2, 5]}, "0:", "enhance"),
        ("gift", {"saliency_layer": 1, "enhance": [2, 4]}, "0:2", "enhance"),
        ("gift", {"saliency_layer": 1, "enhance": [3, 3]}, "0:", "enhance"),
        ("gift", {"saliency_layer": 1, "enhance": [-1, 3]}, "0:", "enhance"),
        ("visual_bias", {"heads": [0, 4]}, "0:", "heads"),
        ("visual_bias", {"heads": [-1]}, "0:", "heads"),
        ("visual_bias", {"heads": []}, "0:", "heads"),
        ("visual_bias", {"control_seed": 2**70}, "0:", "control_seed"),
        ("vhr", {"control_seed": -1}, "0:", "control_seed"),
        ("var", {"sink_dims": [64]}, "0:", "sink_dims"),
        ("var", {"sink_dims": [-3]}, "0:", "sink_dims"),
        ("var", {"sink_dims": []}, "0:", "sink_dims"),
        ("var", {"move_fraction": 1.5}, "0:", "move_fraction"),
        ("pai", {"alpha": -0.1}, "0:", "alpha"),
        ("imbalance", {"local_share": 0.0}, "0:", "local_share"),
        ("carve", {"layers": [2, 9]}, None, "2 to 8"),
        ("agla", {"layers": [4, 5]}, None, "4 to 4"),
        ("contrast", {"gamma": -1.0}, None, "gamma"),
    ],
)
def test_what_cannot_work_is_told_at_apply(patch: str, config: dict[str, Any], layers: str | None, said: str) -> None:
    model = build("llava")
    with pytest.raises(AccelplugError, match=said):
        accelplug.apply(model, {"patch": patch, "with": config, **({"where": {"layers": layers}} if layers else {})})
    assert not any("accelplug" in str(key) for module in model.modules() for key in vars(module))


@pytest.mark.parametrize("name", ["visual_bias", "var", "vhr", "gift", "pai", "imbalance", "carve", "agla", "contrast"])
def test_no_field_takes_nan_or_an_infinity(name: str) -> None:
    cls = patch_class(name)
    values: tuple[Any, ...] = (math.nan, math.inf, -math.inf, [math.nan, math.nan], {})
    for field, value in itertools.product(cls.Config.model_fields, values):
        with pytest.raises(ValueError, match=field):
            cls({field: value})


def test_vhr_reads_a_prompt_without_an_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = Blind.__init__
    monkeypatch.setattr(Blind, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    model, text, both = build("llava"), inputs("llava", ((9,), (5,))), inputs("llava", ((3, "I", 6), (9,)))
    plain = forward(model, text)
    with accelplug.apply(model, {"patch": "vhr"}):
        assert torch.equal(forward(model, text), plain)
        assert not made
        forward(model, both)
        assert len(made) == 1


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_var_does_not_choose_are_the_model_s_own(form: str) -> None:
    """Bit for bit, and padding too: what a kernel makes of rows that may read nothing is not ours to change."""
    state: dict[str, Any] = {}
    call = make(form, S, torch.float32)
    patch = patch_class("var")({**ALONE["var"], "min_visual_mass": 0.5})
    hidden = torch.randn(B, S, 32, generator=torch.Generator().manual_seed(1))
    out = patch.attend(replace(call, hidden=hidden), patch.prepare(SITE, replace(prompt(S), answers=1), PREFILL, state))
    seen = (spans.row_attention(call, S) * prompt(S).visual[:, None, None]).sum(-1)  # [B, H, S]
    chosen = (seen >= 0.5) & prompt(S).rows[:, None]
    assert bool(chosen.any())
    assert torch.equal(out[~chosen], call.dense()[~chosen])
    assert not torch.equal(out[chosen], call.dense()[chosen])


def test_gift_counts_a_window_that_holds_no_image() -> None:
    """Where the layer that is read does not see the image, nothing is enhanced, and that is told."""
    model, given = sharp("gemma3").float(), inputs("gemma3", ((3, "I", 30),))
    given["input_ids"][:, -20:] = given["input_ids"][:, -20:].clamp(min=7)
    plain, recipe = forward(model, given), {"patch": "gift", "with": {"saliency_layer": 0, "enhance": [1, 4]}}
    with accelplug.apply(model, recipe, processor=_Marks(given["input_ids"][0, -20:].tolist())) as plug:
        assert torch.equal(forward(model, given), plain)
        assert any("window" in reason for reason in plug.report().fallbacks)


class _Marks:
    """A tokenizer of which some tokens are words, and all others are special."""

    def __init__(self, words: list[int]) -> None:
        self.words = words
        self.all_special_ids = [*set(range(512)) - set(words)]

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"word{i}" for i in ids)


def test_packed_sequences_are_counted_and_dense() -> None:
    model, given = build("llava"), inputs("llava", ((3, "I", 6),))
    given["cu_seq_lens_q"] = torch.tensor([0, 9, given["input_ids"].shape[1]], dtype=torch.int32)
    plain = forward(model, given)
    with accelplug.apply(model, {"patch": "pai", "with": {"alpha": 5.0}}) as plug:
        assert torch.equal(forward(model, given), plain)
        assert any("packed" in reason for reason in plug.report().fallbacks)
