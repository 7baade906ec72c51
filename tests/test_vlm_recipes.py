"""Recipes of vision-language models: the one file for all of them comes to the numbers that were worked out for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import transformers

import accelplug
from accelplug.call import Clock, Site
from accelplug.errors import RecipeError
from accelplug.families.vlm import list_vlms
from accelplug.patches.heads.gift import Gift
from accelplug.recipe import ModelFacts, Recipe, load, matching_files, read_file, record_measurement, shipped_files
from tests import tiny_language_models


@dataclass(frozen=True)
class Model:
    """A released model, and which layers its recipes were given by hand.

    Attributes
    ----------
    text : ``model_type`` of its language model.
    vhr : how many of the last layers, beside the second.
    gift : the layer that is read, those that are enhanced (half-open), alpha.
    visual_bias, imbalance : layers, half-open.
    sink_dims : of var.
    """

    cls: str
    text: str
    depth: int
    width: int
    file: str
    vhr: int
    gift: tuple[int, tuple[int, int], float]
    visual_bias: tuple[int, int]
    sink_dims: Any = "auto"
    imbalance: tuple[int, int] | None = None
    more: dict[str, Any] = field(default_factory=dict)


LLAVA, INTERNVL = "LlavaForConditionalGeneration", "InternVLForConditionalGeneration"
QWEN2, QWEN25, QWEN3 = (f"Qwen{n}ForConditionalGeneration" for n in ("2VL", "2_5_VL", "3VL"))
MODELS = {
    "llava-1.5-7b": Model(LLAVA, "llama", 32, 4096, "llava-1.5-7b", 14, (11, (12, 23), 5.0), (9, 15), (1415, 2533), (2, 32)),
    "llava-1.5-13b": Model(
        LLAVA, "llama", 40, 5120, "llava-1.5-13b", 18, (10, (14, 21), 5.0), (9, 15), (2100, 4743), (2, 32)
    ),
    "llava-next": Model("LlavaNextForConditionalGeneration", "llama", 32, 4096, "vlm", 14, (11, (12, 23), 5.0), (9, 15)),
    "qwen2-vl-7b": Model(QWEN2, "qwen2_vl_text", 28, 3584, "qwen2-vl-7b", 12, (14, (5, 19), 4.0), (8, 13)),
    "qwen2.5-vl-3b": Model(QWEN25, "qwen2_5_vl_text", 36, 2048, "vlm-qwen", 16, (18, (6, 25), 5.0), (10, 17)),
    "qwen2.5-vl-7b": Model(QWEN25, "qwen2_5_vl_text", 28, 3584, "vlm-qwen", 12, (14, (5, 19), 5.0), (8, 13)),
    "qwen3-vl-8b": Model(QWEN3, "qwen3_vl_text", 36, 4096, "vlm-qwen", 16, (18, (6, 25), 5.0), (10, 17)),
    "internvl2-8b": Model(INTERNVL, "llama", 32, 4096, "vlm", 14, (11, (12, 23), 5.0), (9, 15)),
    "internvl3-8b": Model(INTERNVL, "qwen2", 28, 3584, "vlm-qwen", 12, (14, (5, 19), 5.0), (8, 13)),
    "gemma-3-4b": Model("Gemma3ForConditionalGeneration", "gemma3_text", 34, 2560, "vlm", 15, (12, (13, 24), 5.0), (10, 16)),
    "llava-scenes": Model(LLAVA, "llama", 8, 192, "llava-scenes", 4, (3, (3, 6), 5.0), (2, 4), "auto", (2, 8)),
}


def facts(model: Model) -> ModelFacts:
    """What the model's own config says, at its depth and width."""
    config = getattr(transformers, model.cls).config_class()
    config.text_config = transformers.AutoConfig.for_model(
        model.text, num_hidden_layers=model.depth, hidden_size=model.width
    )
    held = {f"text_config.{key}": value for key, value in config.to_dict()["text_config"].items()}
    return ModelFacts((model.cls,), held, vlm=True)


def decided(recipe: Recipe, depth: int) -> dict[int, dict[str, Any]]:
    """Settings by layer that a patch is on."""
    sites = [Site(f"layers.{i}.self_attn", "language_model", "self", i, depth) for i in range(depth)]
    found = [recipe.decide(site, None, Clock(phase="prefill")) for site in sites]
    return {i: dict(decision.config) for i, decision in enumerate(found) if decision.patch is not None}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_the_layers_that_were_worked_out_for_it(name: str) -> None:
    model = MODELS[name]
    about = facts(model)
    assert [file.model for file in matching_files(about)] == [model.file]
    assert load(None, about).name == f"{model.file}/vhr"
    layers = {short: decided(load(short, about), model.depth) for short in ("vhr", "var", "gift", "visual_bias", "pai")}
    assert [*layers["vhr"]] == [1, *range(model.depth - model.vhr, model.depth)]
    assert all(settings == {"gain": 2.0} for settings in layers["vhr"].values())

    assert [*layers["var"]] == [*range(2, model.depth - 1)]
    for settings in layers["var"].values():
        assert settings["sink_dims"] == (model.sink_dims if model.sink_dims == "auto" else [*model.sink_dims])
        assert (settings["move_fraction"], settings["min_nonsink_ratio"]) == (0.6, 0.5)
        assert settings.get("sink_threshold", 20.0) == (4.3 if name == "llava-scenes" else 20.0)

    saliency, enhance, alpha = model.gift
    assert [*layers["gift"]] == [*range(min(saliency, enhance[0]), max(saliency + 1, enhance[1]))]
    for settings in layers["gift"].values():
        config = Gift.Config(**settings)
        assert (config.saliency_layer, config.enhance, config.alpha) == (saliency, enhance, alpha)

    assert [*layers["visual_bias"]] == [*range(*model.visual_bias)]
    assert all(x == {"image_weight": 1.15, "system_weight": 0.95} for x in layers["visual_bias"].values())
    assert [*layers["pai"]] == [*range(2, model.depth)]
    assert decided(load("pai_contrast", about), model.depth) == layers["pai"]
    assert [rule.patch for short in ("carve", "agla") for rule in load(short, about).rules] == ["carve", "agla"]

    (file,) = matching_files(about)
    assert ("imbalance" in file.recipes) == (model.imbalance is not None)
    if model.imbalance is not None:
        assert [*decided(load("imbalance", about), model.depth)] == [*range(*model.imbalance)]


def test_any_class_that_is_known_has_recipes() -> None:
    for family in list_vlms():
        for cls in family.classes:
            about = ModelFacts((cls,), {"text_config.num_hidden_layers": 24}, vlm=True)
            assert load(None, about).name == "vlm/vhr"
            assert [*decided(load("vlm/gift", about), 24)] == [*range(8, 17)]


def test_a_file_with_a_base_has_its_recipes_under_its_own_name() -> None:
    files = {name: read_file(path) for name, path in shipped_files().items()}
    general = files["vlm"]
    for name in ("vlm-qwen", "qwen2-vl-7b", "llava-1.5-7b", "llava-1.5-13b", "llava-scenes"):
        file = files[name]
        assert file.recipes.keys() >= general.recipes.keys()
        assert file.default == general.default
        assert all(recipe.name == f"{name}/{short}" for short, recipe in file.recipes.items())
        assert all(recipe.match == file.match for recipe in file.recipes.values())


OWN = """schema: 1
model: mine
base: vlm
match: {class: Mine}
recipes:
  vhr:
    rules: [{patch: vhr, with: {gain: 3.0}}]
"""


def test_a_base_is_a_shipped_file_and_keeps_its_own_measurements(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(OWN)
    file = read_file(path)
    assert file.recipe().name == "mine/vhr"
    assert file.recipe().rules[0].settings == {"gain": 3.0}
    assert file.recipe("pai").model == "mine"
    ms = {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    row = {"date": "2026-01-01", "device": "a", "versions": {}, "seeds": [0], "dense_ms": ms, "ms": ms}
    with pytest.raises(RecipeError, match=r"'pai' stands in .*vlm\.yaml, its base"):
        record_measurement(path, "pai", row)
    assert path.read_text() == OWN
    path.write_text(OWN.replace("base: vlm", "base: vml"))
    with pytest.raises(RecipeError, match=r"line 3: base: there is no recipe file 'vml' \(nearest: .*vlm"):
        read_file(path)
    path.write_text(OWN.replace("base: vlm\n", ""))
    with pytest.raises(RecipeError, match="the key 'default' is missing"):
        read_file(path)


def test_a_patch_that_is_on_has_numbers_of_layers() -> None:
    with accelplug.apply(tiny_language_models.build("qwen2_5_vl"), "gift") as plug:
        rows = [row for row in plug.where().rows if row.patch is not None]
    assert plug.recipe.name == "vlm-qwen/gift"
    assert [row.site.layer for row in rows] == [1, 2]
    configs: list[Any] = [row.patch.config for row in rows]
    assert {(config.saliency_layer, config.enhance) for config in configs} == {(2, (1, 3))}
