"""The adapter of lmms-eval, against a stand-in with the names that its registry and its models have (75571cf)."""

from __future__ import annotations

import importlib
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from accelplug.chat import Chat
from accelplug.errors import AccelplugError
from accelplug.zoo import path, scenes

ADAPTER = "accelplug.integrations.lmms_eval"


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Lmms:
    """What all its models are."""

    is_simple = True


class LlavaHf(Lmms):
    """Loads as the real one does: unknown arguments are refused, the processor has a private name, the model is a property."""

    def __init__(self, pretrained: str = "", batch_size: int = 1, **kwargs: Any) -> None:
        assert kwargs == {}, f"Unexpected kwargs: {kwargs}"
        self._model = AutoModelForImageTextToText.from_pretrained(pretrained).eval()
        self._image_processor = AutoProcessor.from_pretrained(pretrained)

    @property
    def model(self) -> Any:
        return self._model

    def generate_until(self, requests: list[tuple[str, Image.Image]]) -> list[str]:
        chat = Chat(self.model, self._image_processor)
        inputs = chat.questions([text for text, _ in requests], [picture for _, picture in requests])
        return chat.texts(inputs, chat.generate(inputs, 24))


class ChatLlavaHf(LlavaHf):
    is_simple = False


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModelManifest]:
    """The stand-in, as an installed package; gives the manifests of its registry."""
    registry: dict[str, ModelManifest] = {}
    made: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.models": {
            "AVAILABLE_SIMPLE_MODELS": {"llava_hf": "LlavaHf", "qwen2_vl": "Qwen2_VL", "gpt": "Gpt"},
            "AVAILABLE_CHAT_TEMPLATE_MODELS": {"llava_hf": "LlavaHf", "huggingface": "Huggingface"},
            "get_model_manifest": registry.__getitem__,
        },
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.models.simple.llava_hf": {"LlavaHf": LlavaHf},
        "lmms_eval.models.chat.llava_hf": {"LlavaHf": ChatLlavaHf},
    }
    for name, content in made.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, leaf = name.rpartition(".")
        if parent in made:
            monkeypatch.setattr(sys.modules[parent], leaf, module, raising=False)
    for kind in ("simple", "chat"):
        monkeypatch.setitem(sys.modules, f"lmms_eval.models.{kind}", ModuleType(kind))
    own = ModelManifest("llava_hf", "lmms_eval.models.simple.llava_hf.LlavaHf", "lmms_eval.models.chat.llava_hf.LlavaHf")
    registry[own.model_id] = own
    return registry


def entry_point() -> Any:
    """What the package's entry point gives."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["accelplug"].partition(":")
    return getattr(importlib.import_module(module), name)


def class_of(class_path: str) -> Any:
    """Import a class by its path, as the registry does."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_entry_point_gives_what_the_release_has(harness: dict[str, ModelManifest]) -> None:
    found = {manifest.model_id: manifest for manifest in entry_point()()}
    assert found == {
        "accelplug_llava_hf": ModelManifest("accelplug_llava_hf", f"{ADAPTER}.simple_llava_hf", f"{ADAPTER}.chat_llava_hf"),
        "accelplug_qwen2_vl": ModelManifest("accelplug_qwen2_vl", f"{ADAPTER}.simple_qwen2_vl"),
        "accelplug_huggingface": ModelManifest("accelplug_huggingface", None, f"{ADAPTER}.chat_huggingface"),
    }


@pytest.mark.parametrize(("kind", "simple"), [("simple", True), ("chat", False)])
def test_a_wrapped_model_answers_with_its_recipe_on(harness: dict[str, ModelManifest], kind: str, simple: bool) -> None:
    folder = str(path("llava-scenes"))
    wrapped = class_of(f"{ADAPTER}.{kind}_llava_hf")
    assert issubclass(wrapped, Lmms)
    assert wrapped.is_simple is simple
    scene = scenes.sample(scenes.SPLITS["dev"][0])
    asked = [(scenes.CAPTION_PROMPT, Image.fromarray(scenes.render(scene)[0]))]
    stock = LlavaHf(pretrained=folder).generate_until(asked)
    louder = wrapped(pretrained=folder, batch_size=1, recipe="visual_bias")
    louder.generate_until(asked)
    assert louder.plug.report().served
    quiet = wrapped(pretrained=folder, recipe="vhr")
    assert quiet.generate_until(asked)
    for model in (louder, quiet):
        model.plug.remove()
        assert model.generate_until(asked) == stock


def test_what_it_refuses(harness: dict[str, ModelManifest]) -> None:
    wrapped = class_of(f"{ADAPTER}.simple_llava_hf")
    with pytest.raises(AccelplugError, match=r"accelplug_llava_hf.*recipe=NAME"):
        wrapped(pretrained="nowhere")
    with pytest.raises(AttributeError, match="no attribute 'simple_gpt'"):
        class_of(f"{ADAPTER}.simple_gpt")
