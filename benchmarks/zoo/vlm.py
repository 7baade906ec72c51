"""The bundled vision-language model before training: its words, its processor, its architecture."""

import itertools
import re
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from accelplug.zoo import scenes

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PATCH = 12
EXISTENCE = 0.95
"""Share of questions whether something is there."""
PRESENT = 0.75
"""Share of them where it is: as in the usual training data of such models, people ask about what they see."""
SYSTEM = "A chat about pictures."
TEMPLATE = (
    "{{ '<s>" + SYSTEM + "' }}{% for message in messages %}{{ ' USER: ' if message.role == 'user' else ' ASSISTANT: ' }}"
    "{% for part in message.content %}{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '</s>' if message.role == 'assistant' else '' }}{% endfor %}{{ ' ASSISTANT:' if add_generation_prompt else '' }}"
)


def words() -> tuple[str, ...]:
    """Every word of the template, the captions and the questions, in a fixed order."""
    texts = [SYSTEM, "user: assistant:", scenes.CAPTION_PROMPT, "Write a general description of the image.", "yes no."]
    texts += ["answer the question using a single word or phrase", "above below", *scenes.ROWS, *scenes.COLUMNS]
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 1_000_000, (3000,), generator=generator).tolist()
    for number in numbers:
        scene = scenes.sample(number)
        texts.append(scene.caption)
        texts += [q.text for q in questions(scene, number)]
    found = set(itertools.chain.from_iterable(re.findall(r"\w+|[^\w\s]", text.lower()) for text in texts))
    return (*SPECIAL, *sorted(found))


def questions(scene: scenes.Scene, seed: int, number: int = 8) -> list[scenes.Query]:
    """Training questions on a scene: mostly existence, absent kinds drawn evenly from all."""
    rng = np.random.default_rng(seed)
    asked: list[Any] = []
    absent = [kind for kind in scenes.KINDS if kind not in scene.kinds]
    while len(asked) < number:
        if rng.random() < EXISTENCE:
            pool = scene.kinds if rng.random() < PRESENT else absent
            asked.append(scenes.existence(scene, pool[rng.integers(len(pool))]))
        else:
            pair = scenes.attribute_pair(scene, ("colour", "count", "position")[rng.integers(3)], rng)
            if pair:
                asked.append(pair[rng.integers(2)])
    return asked


def make_processor() -> LlavaProcessor:
    """Whole words in lower case; pictures scaled to -1..1 and not resized, since they come at the model's size."""
    vocabulary = {word: i for i, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=True,
    )
    pictures = CLIPImageProcessorPil(
        size={"height": scenes.SIDE, "width": scenes.SIDE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        pictures,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    )


def make_model(vocabulary: dict[str, int]) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=scenes.SIDE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary["<image>"],
        image_seq_length=(scenes.SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        pad_token_id=vocabulary["<pad>"],
        eos_token_id=vocabulary["</s>"],
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)
