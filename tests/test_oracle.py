"""Head patches on whole models against plain float64 probabilities: prompts and every step of their answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import accelplug
from accelplug import zoo
from accelplug.comparison.exam import Exam
from accelplug.errors import FallbackError, UnsupportedError
from accelplug.testing.language_models import (
    IMAGE,
    OPEN,
    TEXT_CONFIG,
    TOWER_CONFIG,
    VIDEO,
    forward,
    generate,
)
from tests.eager_oracle import METHODS, Inputs, Look, Method, Oracle, Telling, Vhr, extended, mass
from tests.test_flash_attention import kernel  # noqa: F401
from tests.tiny_language_models import TWO_ROWS, VIDEOS, VLM, build, inputs, looked, right_padded

WORKING: dict[str, dict[str, Any]] = {
    "visual_bias": {"image_weight": 6.0, "system_weight": 0.3},
    "var": {
        "move_fraction": 0.6,
        "sink_dims": [5, 9],
        "sink_threshold": 1.2,
        "min_visual_mass": 0.1,
        "min_nonsink_ratio": 0.4,
    },
    "vhr": {"gain": 2.0},
    "gift": {"saliency_layer": 1, "enhance": [2, 4], "alpha": 3.0},
    "pai": {"alpha": 2.0},
    "imbalance": {"local_alpha": 4.0, "summary_alpha": 2.0},
}
STEERING: dict[str, dict[str, Any]] = {
    "adaptive_boost": {"alpha": 0.6, "scale": 0.9, "image_boost": 1.8, "text_divisor": 1.5},
    "ilvad": {"enhance": [1, 4], "tau": 1.2, "alpha": 2.0, "beta": 0.3, "tokens": 4},
    "adhh": {"heads": [[0, 1], [1, 0], [1, 3], [2, 2], [3, 0]], "threshold": 0.3},
    "spin": {"keep_share": 0.8, "gain": 0.1},
    "farsight": {"sigma": 0.3, "strength": 20.0},
}
"""Patches that fewer models are tried with, in tests/test_steering.py."""
SETTINGS = WORKING | STEERING
TOWER = {"llava"}
"""Families whose vision tower has a class token and one image token a patch, which imbalance needs."""
STEPS = 4
CLOSE: dict[str, Any] = {"atol": 5e-6, "rtol": 0.0}
NEVER = -1e30
"""Logits of words that a model never says are the least that its dtype has: no less counts."""


def llava_mistral() -> Any:
    """LLaVA on a decoder with windows of 12 in all layers."""
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER_CONFIG, projection_dim=32),
        text_config=hf.MistralConfig(**TEXT_CONFIG, sliding_window=12),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=16,
    )
    return hf.LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def sharp(name: str) -> Any:
    """A tiny model in float64 whose heads look at some tokens and not at others."""
    return sharpened(llava_mistral() if name == "llava_mistral" else build(name))


def sharpened(model: Any) -> Any:
    """A model with such heads, in float64."""
    model = model.eval().requires_grad_(False).double()
    for path, parameter in model.get_decoder().named_parameters():
        if path.endswith(("q_proj.weight", "k_proj.weight", "q_b_proj.weight")):
            parameter.mul_(8)
        if path.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.add_(1)
    return model


def double(given: Inputs) -> Inputs:
    """Pixels in float64."""
    return {key: x.double() if x.is_floating_point() else x for key, x in given.items()}


def answered(model: Any, given: Inputs, **how: Any) -> tuple[Tensor, Tensor]:
    """Ids (B, S) of prompts and answers, and the logits (B, steps, V) that the answers were taken from."""
    plain = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    more = {"suppress_tokens": [IMAGE, VIDEO], "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    out = model.generate(**given, **{**plain, **more, **how})
    logits = torch.stack(out.logits, 1)
    if how.get("num_beams", 1) > 1:
        logits = logits[out.beam_indices, torch.arange(logits.shape[1])]
    return out.sequences, logits.double().clamp(min=NEVER)


def patched(
    model: Any, patch: str, config: dict[str, Any] | None = None, layers: tuple[int, int] = (0, 4)
) -> accelplug.Plug:
    """A plug with a patch in some layers, half-open, that counts every fallback as an error."""
    rule = {"patch": patch, "with": SETTINGS[patch] | (config or {}), "where": {"layers": f"{layers[0]}:{layers[1]}"}}
    return accelplug.apply(model, rule, strict=True)


def method(patch: str, config: dict[str, Any] | None = None) -> Method:
    """What the oracle has for a patch."""
    return METHODS[patch](**SETTINGS[patch] | (config or {}))


def stepwise(model: Any, given: Inputs, pieces: list[Tensor]) -> Tensor:
    """Logits (B, S, V) of a prompt, and of pieces (B, n) of ids that follow it, one after the other on its cache."""
    cache, mask = hf.DynamicCache(config=model.config.get_text_config()), given["attention_mask"]
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None
    logits = [model(**given, cache=cache).logits]
    for ids in pieces:
        mask, more = torch.cat([mask, torch.ones_like(ids)], 1), {}
        if hasattr(model.base_model, "rope_deltas"):  # which these models do not add by themselves where there is padding
            at = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :] + model.base_model.rope_deltas
            more["position_ids"] = at.expand(3, -1, -1)
        logits.append(model(input_ids=ids, attention_mask=mask, cache=cache, **more).logits)
    return torch.cat(logits, 1).double()


def hold(
    model: Any,
    patch: str,
    given: Inputs,
    config: dict[str, Any] | None = None,
    layers: tuple[int, int] = (0, 4),
    attention: str = "sdpa",
    **how: Any,
) -> None:
    """Assert that a patched model says of a prompt, and at every step of its answer, what the oracle says.

    Parameters
    ----------
    config, layers : the patch's, if not those of `WORKING`, and where it is, half-open.
    attention : the model's own, which the patch rides on. transformers' eager one has a softmax in float32 that cannot read a mask of
        float64, so that a model runs in float32 there.
    how : how the answer is generated.
    """
    eager, oracle = attention == "eager", Oracle(model)
    model, given = (model.float(), given) if eager else (model, double(given))
    close: dict[str, Any] = {"atol": 2e-5, "rtol": 0.0} if eager else CLOSE
    model.config.get_text_config()._attn_implementation = attention
    with patched(model, patch, config, layers):
        prompt = forward(model, given).clamp(min=NEVER)
        ids, steps = answered(model, given, **how)
    expected, stock = (
        oracle.answer(*way, given, ids, *where).clamp(min=NEVER)
        for way, where in (((method(patch, config),), (range(*layers),)), ((Method(),), ()))
    )
    asked, valid = given["input_ids"].shape[1], given["attention_mask"].bool()
    torch.testing.assert_close(prompt[valid].double(), expected[:, :asked][valid], **close)
    torch.testing.assert_close(steps, expected[:, asked - 1 : -1], **close)
    effect = (expected - stock)[:, asked - 1 :].abs().amax((1, 2))
    shown = ((given["input_ids"] == IMAGE) | (given["input_ids"] == VIDEO)).any(-1)
    assert torch.equal(effect > 1e-3, shown), effect


@pytest.mark.parametrize("name", VLM)
def test_without_a_method_it_is_the_stock_model(name: str) -> None:
    model = sharp(name)
    for rows in (TWO_ROWS, ((3, "V", 6), (2, "I", 3, "V", 5))) if name in VIDEOS else (TWO_ROWS,):
        given = double(inputs(name, rows))
        asked, valid = given["input_ids"].shape[1], given["attention_mask"].bool()
        ids, steps = answered(model, given)
        expected = Oracle(model).answer(Method(), given, ids)
        torch.testing.assert_close(forward(model, given)[valid], expected[:, :asked][valid], **CLOSE)
        torch.testing.assert_close(steps, expected[:, asked - 1 : -1], **CLOSE)


PAIRS = [(patch, name) for patch in WORKING for name in VLM if patch != "imbalance" or name in TOWER]


@pytest.mark.parametrize(("patch", "name"), PAIRS)
def test_every_patch_on_every_family(patch: str, name: str) -> None:
    """A batch padded on the left, whose second row shows two images; grouped heads; Gemma 3's windows of 8."""
    hold(sharp(name), patch, inputs(name))


@pytest.mark.parametrize("patch", WORKING)
@pytest.mark.parametrize(
    "how",
    [{"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}],
    ids=["beams", "static", "without a cache"],
)
def test_every_way_to_generate(patch: str, how: dict[str, Any]) -> None:
    for name in ("llava",) if patch == "imbalance" else ("llava", "qwen2_5_vl", "gemma3"):
        hold(sharp(name), patch, inputs(name), **how)


@pytest.mark.parametrize("patch", WORKING)
def test_drafts_that_are_verified(patch: str) -> None:
    hold(sharp("llava"), patch, inputs("llava", ((3, "I", 6),)), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("patch", WORKING)
@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
@pytest.mark.usefixtures("kernel")
def test_every_attention_of_the_models_own(patch: str, attention: str) -> None:
    for name in ("llava",) if patch == "imbalance" else ("llava", "qwen2_5_vl"):
        hold(sharp(name), patch, inputs(name), attention=attention)


@pytest.mark.parametrize("patch", WORKING)
@pytest.mark.parametrize("way", ["sdpa", "eager", "flash_attention_2", "static"])
@pytest.mark.usefixtures("kernel")
def test_windows_shorter_than_prompts_and_answers(patch: str, way: str) -> None:
    """The image leaves the window while the answer goes on."""
    given = inputs("llava", ((3, "I", 5), (4, "I", 2, "I", 3)))
    how = {"cache_implementation": "static", "disable_compile": True} if way == "static" else {"attention": way}
    hold(sharp("llava_mistral"), patch, given, max_new_tokens=14, **how)


@pytest.mark.parametrize("patch", WORKING)
def test_a_row_without_an_image(patch: str) -> None:
    hold(sharp("llava"), patch, inputs("llava", ((3, "I", 6), (25,))))


@pytest.mark.parametrize("patch", WORKING)
def test_some_layers_alone(patch: str) -> None:
    hold(sharp("llava"), patch, inputs("llava"), layers=(1, 3))


@pytest.mark.parametrize(
    ("patch", "config"),
    [
        ("vhr", {"gain": 0.5, "drop_outliers": False}),
        ("gift", {"balance": 0.5, "head_share": 0.25}),
        ("gift", {"saliency_layer": 3, "enhance": [0, 4]}),
        ("gift", {"saliency_layer": 2, "enhance": [2, 3]}),
        ("imbalance", {"local_share": 0.5, "head_share": 0.5}),
        ("visual_bias", {"heads": [1, 2]}),
        ("var", {"move_fraction": 1.0, "min_nonsink_ratio": 0.7}),
    ],
)
def test_every_knob(patch: str, config: dict[str, Any]) -> None:
    hold(sharp("llava"), patch, inputs("llava"), config)


@pytest.mark.parametrize(("patch", "name"), [pair for pair in PAIRS if pair[1] in ("llava", "qwen2_5_vl", "gemma3")])
@pytest.mark.parametrize("hidden", ["left", "right", "inside"])
def test_pieces_one_after_the_other_on_a_cache(patch: str, name: str, hidden: str) -> None:
    """Padding on both sides, or image tokens that nobody may read; an answer token by token, and a second turn, which is refused
    where a prompt must be whole."""
    model, given, whole = sharp(name), double(inputs(name)), patch in ("vhr", "gift")
    given = right_padded(given) if hidden == "right" else given
    if hidden == "inside" and name != "qwen2_5_vl":  # which lays positions over all of an image's tokens
        given["attention_mask"][:, (given["input_ids"] == IMAGE).all(0).nonzero()[:2]] = 0
    pieces = [torch.randint(3, 490, (2, n)) for n in ((1, 1) if whole else (1, 1, 4, 1, 1))]
    oracle, ids = Oracle(model), torch.cat([given["input_ids"], *pieces], 1)
    asked = torch.cat(
        [given["input_ids"].new_full((x.shape[1],), x.shape[1] > 1) for x in (given["input_ids"], *pieces)]
    ).bool()
    valid = extended(given, ids)["attention_mask"].bool()
    with patched(model, patch):
        found = stepwise(model, given, pieces)
        if whole:
            with pytest.raises(UnsupportedError, match="whole prompt"):
                stepwise(model, given, [pieces[0].repeat(1, 4)])
    torch.testing.assert_close(found[valid], oracle.answer(method(patch), given, ids, asked=asked)[valid], **CLOSE)


@pytest.mark.parametrize(("patch", "config"), [*((patch, {}) for patch in WORKING), ("imbalance", {"head_share": 0.5})])
@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_that_labels_name(patch: str, config: dict[str, Any], side: str) -> None:
    """A prompt and its answer in one forward: rows ahead of a label answer, each by itself."""
    model, given = sharp("llava"), double(inputs("llava"))
    asked = given["input_ids"].shape[1]
    whole = extended(given, torch.cat([given["input_ids"], torch.randint(3, 490, (2, 4))], 1))
    whole["labels"] = whole["input_ids"].masked_fill(torch.arange(asked + 4) < asked, -100)
    oracle, valid = Oracle(model), whole["attention_mask"].bool()
    expected = oracle.answer(method(patch, config), given, whole["input_ids"])
    moved = right_padded(whole) if side == "right" else whole
    with patched(model, patch, config):
        found = forward(model, moved)
    for row in range(2):  # but for the last token, whose next one nobody asks for
        here, there = moved["attention_mask"][row].bool(), valid[row]
        torch.testing.assert_close(found[row, here][:-1], expected[row, there][:-1], **CLOSE)


@pytest.mark.parametrize("patch", WORKING)
def test_a_prompt_in_chunks(patch: str) -> None:
    """The first of them is all padding in the shorter row. Patches that act on its last row are refused."""
    model, given = sharp("llava"), inputs("llava")
    if patch in ("visual_bias", "var"):
        hold(model, patch, given, prefill_chunk_size=9)
    else:
        with (
            patched(model, patch),
            pytest.raises((UnsupportedError, FallbackError), match=r"pieces|prefill_chunk_size|no gaze"),
        ):
            answered(model, double(given), prefill_chunk_size=9)


@pytest.mark.parametrize("patch", [patch for patch in WORKING if patch != "imbalance"])
@pytest.mark.parametrize("name", VIDEOS)
def test_videos(patch: str, name: str) -> None:
    """Alone, two of them, and beside an image."""
    hold(sharp(name), patch, inputs(name, ((3, "V", 6), (2, "I", 3, "V", 5), (2, "V", 2, "V", 4))))


@pytest.mark.parametrize("patch", ["visual_bias", "var", "pai", "imbalance"])
def test_an_image_in_a_second_turn(patch: str) -> None:
    model, whole = sharp("llava"), double(inputs("llava", ((3, "I", 6, "I", 5),)))
    said, cut = torch.randint(3, 490, (1, 2)), int((whole["input_ids"][0] == OPEN).nonzero().max())
    first, second = whole["input_ids"].tensor_split([cut], 1)
    ids = torch.cat([first, said, second], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": whole["pixel_values"]}
    asked = torch.ones(ids.shape[1], dtype=torch.bool)
    asked[cut : cut + 2] = False
    expected = Oracle(model).answer(method(patch), given, asked=asked)
    cache = hf.DynamicCache(config=model.config.get_text_config())
    pieces = [
        (first, whole["pixel_values"][:1]),
        (said[:, :1], None),
        (said[:, 1:], None),
        (second, whole["pixel_values"][1:]),
    ]
    with patched(model, patch):
        found = [model(input_ids=ids, pixel_values=pixels, cache=cache).logits for ids, pixels in pieces]
    torch.testing.assert_close(torch.cat(found, 1), expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("qwen3_vl", {}),  # whose first layers are given more of the image
        ("gemma3", {"cache_implementation": "static", "disable_compile": True}),
        ("llava", {"num_beams": 2}),
        ("llava_mistral", {}),
    ],
)
def test_a_gaze_that_is_read_ahead(name: str, how: dict[str, Any]) -> None:
    """The layer that is read stands behind those that are enhanced: the first token of the answer is enhanced all the same."""
    hold(
        sharp(name), "gift", inputs("llava" if "mistral" in name else name), {"saliency_layer": 3, "enhance": [0, 3]}, **how
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_contrast_with_the_text_alone(name: str) -> None:
    """PAI whole: ``z_text + gamma (z - z_text)`` among likely tokens, the text's branch stock."""
    model, given, gamma, cutoff = sharp(name), double(inputs(name)), 1.5, 0.9
    rules = [{"patch": "pai", "with": WORKING["pai"]}, {"patch": "contrast", "with": {"gamma": gamma, "cutoff": cutoff}}]
    with accelplug.apply(model, {"rules": rules}, strict=True):
        plain = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(**given, **plain, return_dict_in_generate=True, output_scores=True)
    oracle, asked = Oracle(model), given["input_ids"].shape[1]
    z = oracle.answer(method("pai"), given, out.sequences)[:, asked - 1 : -1].log_softmax(-1)
    for row, ids in enumerate(out.sequences):
        keep = torch.ones_like(ids, dtype=torch.bool)
        keep[:asked] = given["attention_mask"][row].bool() & (ids[:asked] != IMAGE)
        text = {"input_ids": ids[None, keep], "attention_mask": torch.ones(1, int(keep.sum()), dtype=torch.long)}
        blind = oracle.answer(Method(), text)[0, -STEPS - 1 : -1].log_softmax(-1)
        best = z[row].amax(-1, keepdim=True)
        mixed = torch.where(z[row] >= best + math.log(cutoff), blind + gamma * (z[row] - blind), -torch.inf)
        found = torch.stack(out.scores, 1)[row].double()
        assert (found.isfinite().sum(-1) > 1).any()
        torch.testing.assert_close(found, mixed, **CLOSE)


@pytest.mark.parametrize("name", list(VLM))
def test_where_inspect_says_that_a_model_looks(name: str) -> None:
    model, given = sharp(name), double(inputs(name))
    said, look, heads, oracle = looked(model, given), Look(), method("vhr", {"gain": 1.0}), Oracle(model)
    assert isinstance(heads, Vhr)
    oracle.answer(look, given)
    oracle.answer(heads, given)
    close: dict[str, Any] = {"atol": 2e-6, "rtol": 0.0, "check_dtype": False}
    for layer, call in look.calls.items():
        tokens, reach = call.tokens, call.scores.isfinite()
        for span, found in zip(
            (tokens.visual, tokens.system, tokens.question),
            (said.visual_mass, said.system_mass, said.question_mass),
            strict=True,
        ):
            torch.testing.assert_close(torch.tensor(found[layer]), mass(call.p, span)[:, :, -1].mean(0), **close)
        shares = []
        for b in range(2):
            rows = [
                i
                for i in tokens.question[b].nonzero().flatten().tolist()
                if all((reach[b, 0, i] & span[b]).any() for span in (tokens.visual, tokens.system))
            ]
            on_image, on_system = (mass(call.p, span)[b][:, rows] for span in (tokens.visual, tokens.system))
            shares.append((on_image / (on_image + on_system)).mean())
        torch.testing.assert_close(torch.tensor(said.vas[layer]), torch.stack(shares).nanmean(), equal_nan=True, **close)
        torch.testing.assert_close(torch.tensor(said.vhd[layer]), heads.divergence[layer].mean(0), **{**close, "atol": 1e-5})


@pytest.mark.parametrize(("patch", "name"), [pair for pair in PAIRS if pair[1] in ("llava", "qwen2_5_vl", "gemma3")])
def test_attention_and_hidden_states_that_are_asked_for(patch: str, name: str) -> None:
    """Those of the patched model, in as many layers as it has; sdpa and flash attention tell none, patched or not."""
    model, given = sharp(name), inputs(name)
    oracle, asked, valid = Oracle(model), given["input_ids"].shape[1], given["attention_mask"].bool()
    model = model.float()
    model.set_attn_implementation({"text_config": "eager"})
    more = {"output_attentions": True, "output_hidden_states": True}
    with patched(model, patch):
        if hasattr(model.base_model, "rope_deltas"):
            model.base_model.rope_deltas = None
        found = model(**given, **more)
        plain = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        said = model.generate(**given, **plain, **more, suppress_tokens=[IMAGE, VIDEO], return_dict_in_generate=True)
    telling = Telling(method(patch))
    close: dict[str, Any] = {"atol": 2e-5, "rtol": 0.0}
    oracle.answer(telling, given, said.sequences)
    assert len(found.attentions) == len(found.hidden_states) - 1 == 4
    for layer in range(4):
        attention = telling.attention[layer].transpose(1, 2)  # [B, S, H, S]
        torch.testing.assert_close(
            found.attentions[layer].transpose(1, 2)[valid].double(), attention[:, :asked, :, :asked][valid], **close
        )
        torch.testing.assert_close(
            found.hidden_states[layer][valid].double(), telling.hidden[layer][:, :asked][valid], atol=1e-4, rtol=1e-4
        )
        for step in range(1, STEPS):
            at = said.attentions[step][layer][:, :, 0].double()
            end = asked + step
            torch.testing.assert_close(at, attention[:, end - 1, :, end - at.shape[-1] : end], **close)
    flat = sharp(name)
    with patched(flat, patch):
        assert not flat(**double(given), output_attentions=True).attentions


def test_sinks_in_dimensions_of_the_first_token() -> None:
    """A first token that is massive in two dimensions, in which some image tokens are large, too."""
    model, given = sharp("llava"), inputs("llava")
    embeddings = model.get_input_embeddings().weight
    embeddings[1], embeddings[1, [5, 9]] = 0.01 * embeddings[1], torch.tensor([80.0, 100.0], dtype=torch.float64)
    first = given["attention_mask"].argmax(-1)
    given["input_ids"][torch.arange(2), first] = 1
    hold(model, "var", given, {"sink_dims": "auto"})


SCENES = (("Is there a diamond", "in the image?"), ("Is there a large red diamond at the bottom left", "of the image?"))
CONTENT = {"diamond", "image", "large", "red", "bottom", "left"}


@pytest.mark.parametrize("name", ["visual_bias", "vhr", "gift", "pai", "imbalance"])
@pytest.mark.parametrize("order", ["behind", "around", "ahead"])
def test_shipped_recipes_on_the_bundled_model(name: str, order: str) -> None:
    """Trained heads, and a processor that tells the system's words, the question's and the template's; questions on each side."""
    folder = zoo.path("llava-scenes")
    model, processor = hf.AutoModelForImageTextToText.from_pretrained(folder), hf.AutoProcessor.from_pretrained(folder)
    exam, texts = Exam.scenes(2), []
    for parts in SCENES:
        whole, *says = ({"type": "text", "text": text} for text in (" ".join(parts), *parts))
        image = {"type": "image"}
        turn = {"behind": [image, whole], "around": [says[0], image, says[1]], "ahead": [whole, image]}[order]
        texts.append(processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True))
    pictures = [[exam.picture(key)] for key in exam.pictures]
    given = dict(processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt"))
    model, given = model.eval().requires_grad_(False).double(), double(given)
    oracle, asked, valid = Oracle(model), given["input_ids"].shape[1], given["attention_mask"].bool()
    if name == "gift" and order == "ahead":  # words that cannot look at the image
        with accelplug.apply(model, name, processor=processor) as plug:
            generate(model, given)
        assert any("no gaze" in reason for reason in plug.report().fallbacks)
        return
    with accelplug.apply(model, name, processor=processor, strict=True) as plug:
        placed = {row.site.layer: row.patch for row in plug.where() if row.site and row.site.layer is not None and row.patch}
        layers, config = list(placed), placed[max(placed)].config.model_dump(exclude={"control_seed"})
        prompt = forward(model, given)
        ids, steps = answered(model, given, suppress_tokens=[model.config.image_token_id])
    said = [[processor.decode([token]) for token in row] for row in given["input_ids"].tolist()]
    opened = torch.tensor([[word == "user" for word in row] for row in said]).cumsum(-1) > 0
    written = torch.tensor([[word not in ("user", "assistant", ":", "<image>") for word in row] for row in said]) & valid
    behind = (given["input_ids"] == model.config.image_token_id).cumsum(-1) > 0
    carries = torch.tensor([[word in CONTENT for word in row] for row in said])
    oracle.told = {"system": ~opened & valid, "question": opened & written, "content": opened & behind & carries}
    expected = oracle.answer(METHODS[name](**config), given, ids, layers)
    stock = oracle.answer(Method(), given, ids)
    close: dict[str, Any] = {"atol": 3e-5, "rtol": 0.0}  # logits of 20
    torch.testing.assert_close(prompt[valid], expected[:, :asked][valid], **close)
    torch.testing.assert_close(steps, expected[:, asked - 1 : -1], **close)
    assert ((expected - stock)[:, asked - 1 :].abs().amax((1, 2)) > 1e-3).all()
