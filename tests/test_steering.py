"""Further methods that aim a model's attention at its image, on whole models against plain float64 probabilities.

Their sisters are tried on every family and in every way, in tests/test_oracle.py; these on the ways that differ by what a method reads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import accelplug
from accelplug.errors import FallbackError, UnsupportedError
from accelplug.testing.language_models import forward, generate
from tests.eager_oracle import AdaptiveBoost, Ilvad, Method
from tests.test_oracle import CLOSE, Oracle, answered, double, extended, hold, method, patched, sharp, stepwise
from tests.tiny_language_models import inputs, right_padded

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "vaf": ("visual_bias", {"weigh": "scores", "image_weight": 1.6, "system_weight": 0.5}),
    "vaf, some heads": ("visual_bias", {"weigh": "scores", "image_weight": 1.6, "heads": [1, 2]}),
    "hgai": ("pai", {"sizes": "mean"}),
    "adhh": ("adhh", {}),
    "spin": ("spin", {}),
    "farsight": ("farsight", {}),
}
methods = pytest.mark.parametrize(("patch", "config"), METHODS.values(), ids=METHODS)


@methods
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_prompts_and_answers(name: str, patch: str, config: dict[str, Any]) -> None:
    """A batch padded on the left, whose second row shows two images; grouped heads; Gemma 3's windows of 8.

    Its images are nothing ahead of its first layer, where all heads have equal scores.
    """
    hold(sharp(name), patch, inputs(name), config, layers=(int(name == "gemma3"), 4))


@methods
@pytest.mark.parametrize(
    "how",
    [{"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}],
    ids=["beams", "static", "without a cache"],
)
def test_ways_to_generate(patch: str, config: dict[str, Any], how: dict[str, Any]) -> None:
    hold(sharp("qwen2_5_vl"), patch, inputs("qwen2_5_vl"), config, **how)


@methods
def test_an_image_leaves_the_window_while_the_answer_goes_on(patch: str, config: dict[str, Any]) -> None:
    given = inputs("llava", ((3, "I", 5), (4, "I", 2, "I", 3)))
    hold(sharp("llava_mistral"), patch, given, config, max_new_tokens=14)


@methods
def test_some_layers_drafts_and_a_row_without_an_image(patch: str, config: dict[str, Any]) -> None:
    hold(sharp("llava"), patch, inputs("llava", ((3, "I", 6),)), config, prompt_lookup_num_tokens=3)
    hold(sharp("llava"), patch, inputs("llava", ((3, "I", 6), (25,))), config, layers=(1, 3))


@pytest.mark.parametrize(("patch", "config"), [one for one in METHODS.values() if one[0] != "farsight"])
def test_padding_behind_the_prompt_and_a_second_turn(patch: str, config: dict[str, Any]) -> None:
    model, given = sharp("llava"), right_padded(double(inputs("llava")))
    pieces = [torch.randint(3, 490, (2, n)) for n in (1, 1, 4, 1, 1)]
    oracle, ids = Oracle(model), torch.cat([given["input_ids"], *pieces], 1)
    asked = [given["input_ids"].new_full((x.shape[1],), x.shape[1] > 1) for x in (given["input_ids"], *pieces)]
    valid = extended(given, ids)["attention_mask"].bool()
    with patched(model, patch, config):
        found = stepwise(model, given, pieces)
    expected = oracle.answer(method(patch, config), given, ids, asked=torch.cat(asked).bool())
    torch.testing.assert_close(found[valid], expected[valid], **CLOSE)


def test_registers_without_a_cache_and_behind_padding() -> None:
    """As released, all that was answered has registers too. A new turn is refused."""
    model, given = sharp("llava"), double(inputs("llava"))
    oracle, padded = Oracle(model), right_padded(given)
    with patched(model, "farsight", {"answer_rows": True}):
        found = forward(model, padded)
        ids, steps = answered(model, given, use_cache=False)
        with pytest.raises(UnsupportedError, match="in pieces"):
            stepwise(model, given, [torch.randint(3, 490, (2, n)) for n in (1, 4)])
    valid = padded["attention_mask"].bool()
    torch.testing.assert_close(found[valid], oracle.answer(method("farsight"), padded)[valid], **CLOSE)
    for step in range(steps.shape[1]):
        read = extended(given, ids[:, : given["input_ids"].shape[1] + step])
        torch.testing.assert_close(steps[:, step], oracle.answer(method("farsight"), read)[:, -1], **CLOSE)


# ---------------------------------------------------------------------------------------------- as an answer goes on


STEPPED = [
    ("llava", ((3, "I", 6), (4, "I", 2, "I", 3)), {}),
    ("qwen2_5_vl", ((3, "I", 6), (4, "I", 2, "I", 3)), {"cache_implementation": "static", "disable_compile": True}),
    ("gemma3", ((3, "I", 6), (4, "I", 2, "I", 3)), {}),
    ("llava_mistral", ((3, "I", 5), (4, "I", 2, "I", 3)), {"max_new_tokens": 6}),
    ("llava", ((3, "I", 6), (25,)), {}),
]


@pytest.mark.parametrize(
    ("patch", "name", "rows", "how"),
    [("adaptive_boost", *one) for one in STEPPED] + [("ilvad", *one) for one in STEPPED if one[0] != "gemma3"],
)
def test_what_a_step_does_follows_the_steps_before(patch: str, name: str, rows: Any, how: dict[str, Any]) -> None:
    """Padded on the left, several images, grouped heads, windows, a static cache, a row without an image. A prompt by itself is stock.

    Where all heads are equal, as on Gemma 3's images, or have nothing but text in their window, which of them are
    the upper half is anybody's guess.
    """
    model, given = sharp(name), double(inputs("llava" if "mistral" in name else name, rows))
    oracle, following = Oracle(model), method(patch)
    assert isinstance(following, AdaptiveBoost | Ilvad)
    with patched(model, patch):
        prompt = forward(model, given)
        ids, steps = answered(model, given, **how)
    asked, valid = given["input_ids"].shape[1], given["attention_mask"].bool()
    expected = following.follow(oracle, given, ids, torch.arange(ids.shape[1]) < asked, range(4))
    stock = oracle.answer(Method(), given, ids)
    torch.testing.assert_close(prompt[valid], stock[:, :asked][valid], **CLOSE)
    torch.testing.assert_close(steps, expected[:, asked - 1 : -1], **CLOSE)
    effect = (expected - stock)[:, asked - 1 :].abs().amax((1, 2))
    assert torch.equal(effect > 1e-3, torch.tensor(["I" in row for row in rows])), effect


def test_padding_behind_a_prompt_whose_answer_is_boosted() -> None:
    model, given = sharp("llava"), right_padded(double(inputs("llava")))
    pieces = [torch.randint(3, 490, (2, 1)) for _ in range(3)]
    oracle, ids = Oracle(model), torch.cat([given["input_ids"], *pieces], 1)
    asked = torch.arange(ids.shape[1]) < given["input_ids"].shape[1]
    with patched(model, "adaptive_boost"):
        found = stepwise(model, given, pieces)
    boost = method("adaptive_boost")
    assert isinstance(boost, AdaptiveBoost)
    valid = extended(given, ids)["attention_mask"].bool()
    torch.testing.assert_close(found[valid], boost.follow(oracle, given, ids, asked, range(4))[valid], **CLOSE)


def test_where_no_step_is_told_what_the_last_one_gave() -> None:
    model, given = sharp("llava").float(), inputs("llava")
    for patch in ("adaptive_boost", "ilvad"):
        for how in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
            with patched(model, patch), pytest.raises(UnsupportedError, match="in step"):
                generate(model, given, **how)
    with (
        accelplug.apply(model, {"patch": "adaptive_boost"}, strict=True),
        pytest.raises(FallbackError, match="answered in this"),
    ):
        generate(model, given, use_cache=False)
