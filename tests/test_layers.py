"""Which layers read a prompt sparsely: prompts, costs, and a choice that keeps its budget."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

import accelplug
from accelplug.calibration.layers import (
    LayerKnobs,
    Passage,
    Trials,
    Tried,
    choice_of,
    choose_layers,
    divergence_of,
    passages,
    predictions,
    spans,
)
from accelplug.errors import AccelplugError
from accelplug.testing.language_models import TEXT_CONFIG

SETTINGS: dict[str, dict[str, Any]] = {
    "prefill_rows": {"block": 8, "sink": 0, "local": 0, "density": 0.4, "rows": 2, "backend": "blocked"},
    "stream": {"block": 8, "sink": 8, "local": 8, "backend": "blocked"},
}
KNOBS: dict[str, Any] = {"tokens": 256, "prompts": 1, "budget": 1.0, "modes": ("prefill_rows", "stream")}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT_CONFIG)).eval().requires_grad_(False)
    with torch.no_grad():  # sharper, so that it matters what is read
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 20
            layer.self_attn.v_proj.weight *= 20
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 490, (700,), generator=torch.Generator().manual_seed(0))


def test_a_prompt_ends_in_words_that_stood_earlier_and_what_follows_goes_on(ids: torch.Tensor) -> None:
    for number, passage in enumerate(passages(ids, LayerKnobs(**{**KNOBS, "prompts": 3}))):
        assert (len(passage.prompt), len(passage.behind)) == (256, 56)
        whole = torch.cat([passage.prompt[-8:], passage.behind[:24]])
        at = int((0.1, 0.5, 0.9, 0.1)[number] * (248 - 32))
        assert torch.equal(passage.prompt[at : at + 32], whole)
        first = number * (700 - 288) // 3
        assert torch.equal(passage.prompt[:248], ids[first : first + 248])
        assert torch.equal(passage.behind[24:], ids[first + 248 : first + 280])
    with pytest.raises(AccelplugError, match="a text of 288 tokens or more, got 100"):
        passages(ids[:100], LayerKnobs(**KNOBS))


@torch.no_grad()
def test_predictions_behind_a_prompt_are_those_of_one_forward(model: Any, ids: torch.Tensor) -> None:
    passage = Passage(ids[:40], ids[40:50])
    found = predictions(model, passage)
    expected = model(ids[None, :49]).logits[0, 39:].log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert divergence_of(found, found) == 0
    other = expected.roll(1, 0)
    torch.testing.assert_close(
        torch.tensor(divergence_of(expected, other)),
        torch.nn.functional.kl_div(other, expected, log_target=True, reduction="none").sum(-1).mean(),
    )


def test_the_choice_keeps_its_budget(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        trials = Trials(model, passages(ids, LayerKnobs(**KNOBS)), SETTINGS)
        alone = [trials.cost({layer: "stream"}, end=-1) for layer in range(4)]
        everything = trials.cost(dict.fromkeys(range(4), "stream"), end=-1)
    budget = (min(alone) + everything) / 2
    told: list[int] = []
    found = choose_layers(
        model, ids, LayerKnobs(**{**KNOBS, "budget": budget}), SETTINGS, lambda done, now="": told.append(int(done))
    )
    chosen = {
        layer: rule["patch"]
        for rule in found.rules
        for layer in range(4)
        if any(layer in range(*map(int, span.split(":"))) for span in rule["where"]["layers"])
    }
    assert chosen and chosen != dict.fromkeys(range(4), "stream")  # noqa: PT018
    with torch.no_grad():
        assert trials.cost(chosen, end=-1) <= budget
    assert f"{len(chosen)} of 4 layers" in found.told
    assert told == sorted(told)
    assert max(told) == 8
    plug = accelplug.apply(model, {"rules": found.rules})
    plug.remove()


def test_a_budget_that_nothing_keeps_is_refused(model: Any, ids: torch.Tensor) -> None:
    with pytest.raises(AccelplugError, match=r"within 1e-09 nats: the least is"):
        choose_layers(model, ids, LayerKnobs(**{**KNOBS, "budget": 1e-9, "group": 4}), SETTINGS, lambda done, now="": None)


def test_layers_take_the_way_that_saves_most_of_those_that_were_taken() -> None:
    steps = [Tried((0, 1), "a", 0.1, 0.5), Tried((1, 2), "b", 0.2, 0.7), Tried((0,), "c", 0.3, 0.4)]
    assert choice_of(steps[:1]) == {0: "a", 1: "a"}
    assert choice_of(steps) == {0: "a", 1: "b", 2: "b"}
    assert spans([0, 1, 2, 5, 7, 8]) == ["0:3", "5:6", "7:9"]


class Letters:
    """A tokenizer: a token a letter."""

    pad_token_id = 0

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[3 + ord(letter) % 400 for letter in text])


def test_calibrate_writes_a_recipe(model: Any, tmp_path: Path) -> None:
    text = "".join(chr(97 + number * number % 26) for number in range(400))
    options = {**KNOBS, "modes": ["prefill_rows"], "group": 2}
    config = SETTINGS["prefill_rows"]
    given: dict[str, Any] = {"config": config, "options": options, "processor": Letters(), "progress": False}
    recipe = accelplug.calibrate(model, "layers", text, path=tmp_path / "mine.yaml", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert recipe.rules[0].patch == "prefill_rows"
    assert recipe.rules[0].settings == config
    assert "Chosen on 1 prompts of 256 tokens" in recipe.summary
    with accelplug.apply(model, tmp_path / "mine.yaml") as plug:
        assert plug.recipe.cite == "arXiv 2406.15486"
    with pytest.raises(AccelplugError, match="calibrate layers reads prompts out of a text"):
        accelplug.calibrate(model, "layers", **given)
