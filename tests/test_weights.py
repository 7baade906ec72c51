"""The real weights that `accelplug fetch` brings do what they were trained for, and compute what their own files compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PLAIN = (
    "The sun rises in the east and sets in the west. Water freezes at zero degrees Celsius and boils at one hundred degrees. "
    "Most people sleep at night and work during the day."
)


@pytest.fixture(scope="module")
def language(fetched: Callable[[str], Path]) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = fetched("smollm2-135m")
    model, told = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not told["missing_keys"]
    return model.float(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_smollm2_knows_english(language: tuple[Any, Any]) -> None:
    model, tokenizer = language
    ids = tokenizer(PLAIN, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = math.exp(model(ids, labels=ids).loss)
    assert 8 < perplexity < 13  # 10.5; with the rows of q and k in the order of their file, 36


def test_smollm2_answers_in_its_chat_format(language: tuple[Any, Any]) -> None:
    model, tokenizer = language
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert tokenizer.decode(asked["input_ids"][0]).endswith("one sentence.<|im_end|>\n<|im_start|>assistant\n")
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"  # and it stops


@pytest.mark.parametrize(
    "text", [PLAIN, "12345 it's  a\n\ntest   7 ünïcödé 你好 🎉\n\tdef f(x): return x+1", "<|im_start|>user\nhi"]
)
def test_its_tokenizer_gives_back_what_it_was_given(language: tuple[Any, Any], text: str) -> None:
    _, tokenizer = language
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 49_152


def waves() -> torch.Tensor:
    """A picture (1, 3, 224, 224) that is the same everywhere."""
    t = torch.linspace(-2, 2, 224)
    return (torch.sin(3 * t)[:, None] * torch.cos(2 * t)).expand(1, 3, -1, -1).contiguous()


# What onnxruntime 1.32 computes from the file in the wheel: tokens 0, 1, 100, 256 of `waves`, their first four features.
FEATURES = [
    [-0.5012894, 0.22453932, 0.4850123, -4.892418],
    [-0.5573164, -0.86162376, -1.5079275, -4.2577615],
    [-0.41502804, 2.5704143, -1.4636819, -4.7583647],
    [-0.6647218, 0.58108735, -1.1156447, -4.289547],
]


def test_dinov2_computes_what_its_file_computes(fetched: Callable[[str], Path]) -> None:
    from transformers import Dinov2Model

    model, told = Dinov2Model.from_pretrained(fetched("dinov2-small"), local_files_only=True, output_loading_info=True)
    assert not told["missing_keys"]
    with torch.no_grad():
        features = model.eval()(waves()).last_hidden_state
    torch.testing.assert_close(features[0, [0, 1, 100, 256], :4], torch.tensor(FEATURES), atol=2e-4, rtol=0)


# The same of the terrains of seed 0, 128 x 128, difficulties 1 and 50: every 32nd row and column.
TERRAINS = [
    [
        [-0.52757, -0.55844, -0.6915, -0.74629],
        [-0.56368, -0.71403, -0.6814, -0.78977],
        [-0.59587, -0.66281, -0.66331, -0.7242],
        [-0.43862, -0.65175, -0.72668, -0.67324],
    ],
    [
        [-0.51495, -0.69416, -0.66864, -0.68157],
        [-0.34868, -0.54109, -0.69687, -0.68263],
        [-0.24547, -0.68215, -0.675, -0.6036],
        [-0.28361, -0.69903, -0.73836, -0.72786],
    ],
]


def test_the_terrain_pipeline_draws_what_its_file_draws(fetched: Callable[[str], Path]) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(fetched("terrain-unet"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(0)
    made = pipe(batch_size=2, class_labels=[0, 49], num_inference_steps=1, generator=seeded, output_type="pt").images
    heights = 2 * made[:, 0] - 1
    torch.testing.assert_close(heights[:, ::32, ::32], torch.tensor(TERRAINS), atol=2e-4, rtol=0)
    steep = heights.diff(dim=-1).abs().mean((1, 2))
    assert (steep < 0.02 * (heights.amax() - heights.amin())).all()  # land, not noise
