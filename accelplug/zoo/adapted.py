"""Models put together of fetched weights and of what was trained to join them: a LLaVA of SmolLM2-135M and DINOv2-small.

What ships is an adapter: the projector, and low-rank additions to the linear layers of the decoder, ``W + up @ down`` (LoRA, arXiv
2106.09685). With the fetched parts it makes a folder in the cache, which `from_pretrained` reads like any other; there the additions
are merged into the weights.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelplug import files
from accelplug.errors import NoMatchError
from accelplug.zoo.wheels import folder_of

if TYPE_CHECKING:
    from torch import Tensor

MADE_OF = {"llava-smollm2": ("smollm2-135m", "dinov2-small")}
"""By the name of a model: the decoder and the vision tower that are fetched."""
ADAPTER = "adapter.safetensors"
PIXELS = 112
"""Height and width of a picture as the tower sees it: 8 x 8 = 64 tokens."""
FEATURES = -6
"""Which of the tower's hidden states is read. In the last ones a patch tells less of itself: see benchmarks/zoo/train_adapter.py."""
IMAGE_TOKEN, UNUSED = "<image>", "<empty_output>"
"""The image token, and the special token of SmolLM2 that it takes the place of: chats have no use for that one."""
CHAT_FORMAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ '"
    + IMAGE_TOKEN
    + "\n' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def shipped() -> tuple[str, ...]:
    """Return the models whose adapter comes with the package."""
    return tuple(name for name in MADE_OF if (Path(__file__).parent / name / ADAPTER).is_file())


def composed(name: str) -> Path:
    """Return the folder of a model whose adapter is shipped; put together the first time, in the cache.

    Raises
    ------
    NoMatchError
        If a part was not fetched yet.
    AccelplugError
        If the cache cannot be written to.
    """
    from safetensors.torch import load

    adapter = (Path(__file__).parent / name / ADAPTER).read_bytes()
    folder = files.cache_folder() / "weights" / f"{name}-{_digest(adapter)}"
    if not folder.is_dir():
        write_adapted(load(adapter), folder, *parts(name))
    return folder


def parts(name: str) -> list[Path]:
    """Return the folders of a model's decoder and vision tower.

    Raises
    ------
    NoMatchError
        If one of them was not fetched yet.
    """
    folders = [folder_of(part) for part in MADE_OF[name]]
    if missing := [part for part, folder in zip(MADE_OF[name], folders, strict=True) if not folder.is_dir()]:
        raise NoMatchError(
            f"{name} is made of weights that are not on this machine: expected {', '.join(MADE_OF[name])}. "
            f"Run `accelplug fetch {' '.join(missing)}` first."
        )
    return folders


def write_adapted(adapter: Mapping[str, Tensor], folder: Path, decoder: Path, tower: Path) -> None:
    """Put a model together in a folder, whole or not at all.

    Parameters
    ----------
    adapter : ``projector.NAME`` of the `LlavaForConditionalGeneration`, and ``LAYER.down`` (rank, in) and ``LAYER.up`` (out, rank)
        of the decoder's linear layers; without these the decoder is as it was fetched.
    decoder, tower : folders of a `LlamaForCausalLM` with its tokenizer, and of a `Dinov2Model`.
    """
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
    made.mkdir()
    try:
        save_file(_weights(adapter, decoder, tower), made / "model.safetensors", {"format": "pt"})
        text, vision = (json.loads((part / "config.json").read_text()) for part in (decoder, tower))
        tokenizer = json.loads((decoder / "tokenizer.json").read_text().replace(f'"{UNUSED}"', f'"{IMAGE_TOKEN}"'))
        settings = json.loads((decoder / "tokenizer_config.json").read_text())
        token = tokenizer["model"]["vocab"][IMAGE_TOKEN]
        patch = vision["patch_size"]
        for name, content in {
            "config.json": _config(text, vision, token),
            "generation_config.json": {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": {
                **settings,
                "chat_template": CHAT_FORMAT,
                "padding_side": "left",
                "additional_special_tokens": [IMAGE_TOKEN],
            },
            "preprocessor_config.json": _image_processor(tower),
            "processor_config.json": {
                "processor_class": "LlavaProcessor",
                "patch_size": patch,
                "image_token": IMAGE_TOKEN,
                "num_additional_image_tokens": 1,
                "vision_feature_select_strategy": "default",
            },
        }.items():
            files.write(made / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        files.write(made / "chat_template.jinja", CHAT_FORMAT)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and made the same
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _weights(adapter: Mapping[str, Tensor], decoder: Path, tower: Path) -> dict[str, Tensor]:
    """All weights under the names of published checkpoints, in bfloat16."""
    import torch
    from safetensors.torch import load_file

    weights = {f"language_model.{name}": weight for name, weight in load_file(decoder / "model.safetensors").items()}
    weights |= {f"vision_tower.{name}": weight for name, weight in load_file(tower / "model.safetensors").items()}
    for name, weight in adapter.items():
        if name.startswith("projector."):
            weights[f"multi_modal_{name}"] = weight
        elif name.endswith(".down"):
            layer = name.removesuffix(".down")
            added = adapter[f"{layer}.up"].float() @ weight.float()
            weights[f"language_model.model.{layer}.weight"] = weights[f"language_model.model.{layer}.weight"].float() + added
    return {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}


def _config(text: dict[str, Any], vision: dict[str, Any], token: int) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision,
        "image_token_index": token,
        "image_seq_length": (PIXELS // vision["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": FEATURES,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "pad_token_id": text["pad_token_id"],
        "eos_token_id": text["eos_token_id"],
        "dtype": "bfloat16",
    }


def _image_processor(tower: Path) -> dict[str, Any]:
    """The tower's image processor, at the size of this model and without a crop: what stands at the edge is asked for too."""
    size = {"height": PIXELS, "width": PIXELS}
    return {
        **json.loads((tower / "preprocessor_config.json").read_text()),
        "image_processor_type": "CLIPImageProcessor",
        "size": size,
        "crop_size": size,
        "do_center_crop": False,
    }


def _digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()[:12]
