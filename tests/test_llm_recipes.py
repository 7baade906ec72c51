"""Recipes of language models: the one file for all decoders comes to the layers of each, and what was published is as published."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import transformers as hf

import accelplug
from accelplug.call import Clock, Site
from accelplug.recipe import ModelFacts, Recipe, load, matching_files, read_file, shipped_files
from accelplug.registry import patch_class
from tests.tiny_language_models import LLM, VLM, build

PREFILL = Clock(phase="prefill")


@dataclass(frozen=True)
class Released:
    """A released model.

    Attributes
    ----------
    cls, config : its class, and what its config has that tells it from others.
    depth : its number of layers.
    file : the recipe file that is for it.
    sparse : by recipe, layers, half-open, in which a prompt is read sparsely.
    settings : by recipe, as published.
    """

    cls: str
    config: dict[str, Any]
    depth: int
    file: str
    sparse: dict[str, tuple[int, int]]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


LLAMA = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
FLASH = {"block": 128, "sink": 256, "local": 512, "alpha": 0.1, "last": 8, "rest": "pool"}
TRIANGLE = {"sink": 8, "local": 512, "last": 128}
X = {"block": 128, "stride": 16, "tau": 0.9}
MODELS = {
    "llama-3.1-8b": Released(
        "LlamaForCausalLM",
        {"hidden_size": 4096, **LLAMA},
        32,
        "llama-3.1-8b",
        {"long": (3, 32), "flashprefill": (0, 32), "flashprefill-1": (0, 32), "xattention": (0, 32), "triangle": (16, 32)},
        {
            "flashprefill": FLASH,
            "flashprefill-1": {**FLASH, "alpha": 0.18, "last": 2, "rest": "drop"},
            "triangle": TRIANGLE,
            "xattention": X,
        },
    ),
    "llama-3.1-70b": Released(
        "LlamaForCausalLM",
        {"hidden_size": 8192, **LLAMA},
        80,
        "llm",
        {"long": (8, 80), "triangle": (40, 80)},
        {"xattention": X},
    ),
    "qwen2.5-7b": Released(
        "Qwen2ForCausalLM",
        {"hidden_size": 3584},
        28,
        "qwen2.5-7b",
        {"long": (3, 28), "triangle": (20, 28)},
        {"triangle": TRIANGLE},
    ),
    "qwen3-8b": Released(
        "Qwen3ForCausalLM",
        {"hidden_size": 4096},
        36,
        "qwen3-8b",
        {"long": (4, 36), "flashprefill": (0, 36)},
        {"flashprefill": FLASH},
    ),
    "qwen3-4b": Released("Qwen3ForCausalLM", {"hidden_size": 2560}, 36, "llm", {"long": (4, 36)}, {"flashprefill": FLASH}),
    "qwen3.5-9b": Released(
        "Qwen3_5ForCausalLM", {}, 32, "qwen3.5", {"long": (0, 32), "triangle": (16, 32)}, {"triangle": TRIANGLE}
    ),
    "mistral-7b": Released(
        "MistralForCausalLM",
        {"hidden_size": 4096},
        32,
        "mistral-7b",
        {"long": (3, 32), "triangle": (16, 32)},
        {"triangle": TRIANGLE},
    ),
    "gemma-3-27b": Released("Gemma3ForCausalLM", {}, 62, "gemma-3", {"long": (0, 62), "triangle": (31, 62)}),
    "smollm2-135m": Released(
        "LlamaForCausalLM", {"hidden_size": 576}, 30, "smollm2-135m", {"long": (0, 30), "triangle": (15, 30)}
    ),
    "olmo-3-7b": Released("Olmo3ForCausalLM", {}, 32, "llm", {"long": (3, 32)}),
}


def decided(recipe: Recipe, depth: int) -> dict[int, dict[str, Any]]:
    """Settings by layer that a patch reads a prompt with."""
    sites = [Site(f"layers.{i}.self_attn", "decoder", "self", i, depth) for i in range(depth)]
    found = [recipe.decide(site, None, PREFILL, stage="beneath") for site in sites]
    return {
        i: patch_class(decision.patch)(decision.config).config.model_dump()
        for i, decision in enumerate(found)
        if decision.patch is not None
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_the_layers_that_were_worked_out_for_it(name: str) -> None:
    model = MODELS[name]
    about = ModelFacts((model.cls,), {"num_hidden_layers": model.depth, **model.config}, llm=True)
    assert [file.model for file in matching_files(about)] == [model.file]
    for short, (first, end) in model.sparse.items():
        assert list(decided(load(short, about), model.depth)) == list(range(first, end)), short
    for short, settings in model.settings.items():
        assert all(found.items() >= settings.items() for found in decided(load(short, about), model.depth).values()), short


def test_a_file_for_a_model_has_the_recipes_of_all() -> None:
    files = {name: read_file(path) for name, path in shipped_files().items()}
    of_language = [
        file for file in files.values() if any(str(cls).endswith("ForCausalLM") for cls in [file.match.keys.get("class")])
    ]
    assert len(of_language) >= 4
    for file in [*of_language, files["vlm"]]:
        assert file.recipes.keys() >= files["llm"].recipes.keys()
    assert files["vlm"].default == "vhr"


@pytest.mark.parametrize("name", [*LLM, *VLM])
def test_any_decoder_takes_long(name: str) -> None:
    model = build(name)
    with accelplug.apply(model, "long") as plug:
        placed = {row.site.layer for row in plug.where() if row.site is not None and row.name == "prefill_rows"}
        assert placed
    if name in LLM:
        with accelplug.apply(model) as plug:
            assert plug.recipe.name.partition("/")[2] == "long"


def test_classes_that_recipes_name_are_there() -> None:
    for path in shipped_files().values():
        keys = read_file(path).match.keys
        for cls in [keys["class"]] if isinstance(keys.get("class"), str) else keys.get("class", []):
            if cls.endswith("ForCausalLM"):
                assert hasattr(hf, cls)
