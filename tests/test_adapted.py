"""Models put together of fetched parts and an adapter: the whole is the parts, with the additions in the decoder's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

import accelplug
from accelplug import loading, zoo
from accelplug.errors import NoMatchError
from accelplug.hosts.images import VisionTower
from accelplug.weights import fetch
from accelplug.zoo import adapted
from accelplug.zoo.wheels import folder_of

WIDTH, SEEN, RANK = 64, 32, 2
NAME = "llava-smollm2"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A tiny decoder with its tokenizer and a tiny tower, where `fetch` would put them."""
    monkeypatch.setenv("ACCELPLUG_CACHE", str(tmp_path))
    decoder, tower = map(folder_of, adapted.MADE_OF[NAME])
    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", adapted.UNUSED]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(text).save_pretrained(decoder)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(decoder / "tokenizer.json"))
    named = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[2], "unk_token": special[0]}
    (decoder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    vision = Dinov2Config(hidden_size=SEEN, num_hidden_layers=6, num_attention_heads=2, patch_size=14, image_size=56)
    Dinov2Model(vision).save_pretrained(tower)
    (tower / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return [decoder, tower]


def adapter() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "projector.linear_1.weight": torch.randn(WIDTH, SEEN) / 6,
        "projector.linear_1.bias": torch.zeros(WIDTH),
        "projector.linear_2.weight": torch.randn(WIDTH, WIDTH) / 8,
        "projector.linear_2.bias": torch.zeros(WIDTH),
        "layers.1.self_attn.q_proj.down": torch.randn(RANK, WIDTH),
        "layers.1.self_attn.q_proj.up": torch.randn(WIDTH, RANK),
    }


def test_the_whole_is_its_parts_and_the_additions(parts: list[Path], tmp_path: Path) -> None:
    given = adapter()
    adapted.write_adapted(given, tmp_path / "whole", *parts)
    model, processor = loading.language_model(tmp_path / "whole")
    text, tower = load_file(parts[0] / "model.safetensors"), Dinov2Model.from_pretrained(parts[1])
    name = "layers.1.self_attn.q_proj"
    added = (given[f"{name}.up"] @ given[f"{name}.down"] + text[f"model.{name}.weight"]).bfloat16()
    torch.testing.assert_close(model.model.language_model.get_parameter(f"{name}.weight"), added)
    untouched = model.model.language_model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(untouched, text["model.layers.0.self_attn.q_proj.weight"].bfloat16())
    for one, other in zip(model.model.vision_tower.parameters(), tower.parameters(), strict=True):
        torch.testing.assert_close(one, other.bfloat16())
    assert model.lm_head.weight is model.get_input_embeddings().weight

    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a dog?"}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n<image>\nIs there a dog?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=[prompt], images=[[Image.new("RGB", (96, 96))]], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == (adapted.PIXELS // 14) ** 2
    assert model(**inputs.to(torch.bfloat16)).logits.isfinite().all()


def test_the_class_token_of_the_tower_is_read(parts: list[Path], tmp_path: Path) -> None:
    adapted.write_adapted(adapter(), tmp_path / "whole", *parts)
    model, _ = loading.language_model(tmp_path / "whole", "float32")
    pixels = torch.randn(2, 3, adapted.PIXELS, adapted.PIXELS)
    visual = torch.ones(2, (adapted.PIXELS // 14) ** 2, dtype=torch.bool)
    with accelplug.apply(model, {"patch": "imbalance"}, gate="off"), torch.no_grad():
        model.model.get_image_features(pixel_values=pixels)
        first, late = VisionTower.take(visual)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    maps = tower(pixels, output_attentions=True).attentions
    torch.testing.assert_close(first, maps[0][:, :, 0, 1:].sum(1))
    torch.testing.assert_close(late, maps[-2][:, :, 0, 1:].sum(1))


def test_a_shipped_adapter_is_put_together_once(parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "package"
    (shipped / NAME).mkdir(parents=True)
    save_file(adapter(), shipped / NAME / adapted.ADAPTER)
    monkeypatch.setattr(adapted, "__file__", str(shipped / "adapted.py"))
    assert adapted.shipped() == (NAME,)
    monkeypatch.setattr(zoo, "KNOWN_MODELS", (*zoo.BUNDLED, NAME, *zoo.WHEELS))
    folder = zoo.path(NAME)
    assert folder.parent == parts[0].parent
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert zoo.path(NAME) == fetch(NAME) == folder  # its parts are there
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_parts_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELPLUG_CACHE", str(tmp_path))
    with pytest.raises(NoMatchError, match="accelplug fetch smollm2-135m dinov2-small"):
        adapted.parts(NAME)
