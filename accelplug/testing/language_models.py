"""Tiny vision-language models with random weights, in the real classes of transformers, and prompts of random tokens for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from accelplug.testing.models import Arguments, Built

IMAGE, VIDEO, OPEN, CLOSE = 500, 501, 502, 503
TEXT_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": OPEN, "vision_end_token_id": CLOSE}
TokenRows = Sequence[Sequence[int | str]]
"""Per row, how many text tokens, "I" for an image, "V" for a video."""
AN_IMAGE_EACH: TokenRows = ((3, "I", 6), (2, "I", 4))


def llava_model(**text: Any) -> Any:
    """A LLaVA; `text` are settings of its language model."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER_CONFIG, projection_dim=32),
        text_config=hf.LlamaConfig(**{**TEXT_CONFIG, **text}),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=16,
    )
    return hf.LlavaForConditionalGeneration(config)


def qwen2_5_vl_model() -> Any:
    """A Qwen2.5-VL: positions in three dimensions, images of any size."""
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 8, "intermediate_size": 64}
    config = hf.Qwen2_5_VLConfig(
        text_config={**TEXT_CONFIG, "rope_parameters": MROPE},
        vision_config={**vision, "spatial_merge_size": 2, "window_size": 32, "fullatt_block_indexes": [1]},
        **QWEN_IDS,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def padded_rows(rows: TokenRows, shown: Mapping[str, Iterator[list[int]]], generator: torch.Generator) -> dict[str, Tensor]:
    """Return ids and mask (B, S), padded on the left: as many random text tokens as a number says, and what `shown` has for a letter."""
    sequences = []
    for row in rows:
        ids: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(3, 490, (part,), generator=generator).tolist()
            else:
                ids += next(shown[part])
        sequences.append(ids)
    longest = max(map(len, sequences))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in sequences]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in sequences]),
    }


def image_tokens(number: int) -> list[int]:
    """Return an image of so many tokens, between its marks."""
    return [OPEN, *[IMAGE] * number, CLOSE]


def llava() -> Built:
    """Two rows of text with an image each, in a batch that is padded."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return llava_model(), {**padded_rows(AN_IMAGE_EACH, {"I": repeat(image_tokens(16))}, generator), "pixel_values": pixels}


def qwen2_5_vl() -> Built:
    """The same, with images of two sizes, whose two frames are alike as in a still picture."""
    generator = torch.Generator().manual_seed(3)
    grids = torch.tensor([[1, 4, 6], [1, 8, 4]])
    patches = int(grids.prod(-1).sum())
    pixels = torch.randn(patches, 3, 1, 8, 8, generator=generator).expand(-1, -1, 2, -1, -1).reshape(patches, -1)
    given = padded_rows(AN_IMAGE_EACH, {"I": iter([image_tokens(6), image_tokens(8)])}, generator)
    kinds = (given["input_ids"] == IMAGE).int()
    return qwen2_5_vl_model(), {**given, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds}


LANGUAGE_MODELS_TRIED: dict[str, Callable[[], Built]] = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}
"""Images as so many tokens each, and images as grids of any size."""

CHAT_TEMPLATE = (
    "{% for m in messages %}w1 {% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} w2{% endif %}"
)


def word_processor() -> Any:
    """Return LLaVA's own processor on a vocabulary of words w0, w1, ...; its prompts suit both tiny models."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(496)), "<image>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    square = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(**square),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_language_model(make: Callable[[], Built]) -> Built:
    """Return (model, keyword arguments of its forward): always the same weights, ready for inference."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = make()
    return model.eval().requires_grad_(False), inputs


def generate(model: Any, inputs: Mapping[str, Any], tokens: int = 6, **more: Any) -> Any:
    """Return what `generate` does: greedy tokens that never stop early, int64 (B, S + tokens)."""
    plain = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**inputs, **{**plain, **more})


def forward(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the logits of a plain forward, (B, S, vocabulary). Qwen models remember an offset from call to call, which is cleared."""
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None
    with torch.no_grad():
        return model(**inputs).logits


def answer_of(model: Any, inputs: Arguments) -> Tensor:
    """Return the logits of a prompt's tokens, (N, vocabulary), and behind them the scores of four greedy tokens of each row."""
    logits = forward(model, inputs)[inputs["attention_mask"].bool()]
    said = generate(model, inputs, 4, return_dict_in_generate=True, output_scores=True)
    return torch.cat([logits, *(step.clamp(min=-1e4).to(logits) for step in said.scores)])


def row_of(inputs: Arguments, row: int) -> Arguments:
    """Return one row of LLaVA's inputs, an image each, without its padding."""
    kept = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, kept] for name in ("input_ids", "attention_mask")}
    return {**alone, "pixel_values": inputs["pixel_values"][row : row + 1]}
