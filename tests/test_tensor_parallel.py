"""Heads are numbered over all ranks: two processes on the CPU answer as one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import accelplug
from accelplug.call import AttentionCall
from accelplug.hosts.stream import watching
from accelplug.table import Table
from accelplug.testing.language_models import forward, generate
from tests.tiny_language_models import build, inputs
from tests.two_ranks import together

SCORES = Table(torch.tensor([[0.5, 0.1], [0.4, 0.3], [0.2, 0.6], [0.7, 0.8]]), ("layers", "heads"))
"""Of key heads: some layers have one of them on a rank that is unlike the other's."""
RECIPES = (
    {"patch": "duo", "with": {"scores": SCORES, "sink": 1, "window": 4, "prompt": "stream"}},
    {"patch": "moh", "with": {"outputs": SCORES, "skip": 0.3}},
    {"patch": "visual_bias", "with": {"image_weight": 6.0, "heads": [1, 3]}},
    {"patch": "vhr", "with": {"gain": 2.0}},
    {"patch": "gift", "with": {"saliency_layer": 1, "enhance": [0, 4]}},
    {"patch": "imbalance", "with": {"local_alpha": 4.0, "head_share": 0.25}},
    {"patch": "pai", "with": {"alpha": 4.0}},
    {
        "patch": "var",
        "with": {"sink_dims": [3, 7], "sink_threshold": 1.5, "min_visual_mass": 0.01, "min_nonsink_ratio": 0.0},
    },
    {"patch": "pai", "with": {"alpha": 4.0, "sizes": "mean"}},
    {"patch": "adhh", "with": {"heads": [[0, 1], [1, 3], [2, 2], [3, 0]], "threshold": 0.0}},
    {"patch": "spin", "with": {"keep_share": 0.5, "gain": 0.1}},
    {"patch": "farsight", "with": {"sigma": 0.3, "strength": 20.0}},
)
ANSWERING = (
    {"patch": "adaptive_boost", "with": {"image_boost": 4.0, "text_divisor": 4.0}},
    {"patch": "ilvad", "with": {"enhance": [0, 4], "tau": 1.0, "alpha": 3.0}},
)
"""Which change the steps of an answer alone."""


def answered(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (B, steps, V) of three tokens; of these models the first is far from the second."""
    return torch.stack(generate(model, given, 3, return_dict_in_generate=True, output_logits=True).logits, 1)


def work(rank: int, folder: str) -> list[torch.Tensor]:
    from transformers import LlavaForConditionalGeneration
    from transformers.distributed import DistributedConfig

    model = LlavaForConditionalGeneration.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    given = inputs("llava")
    found = [forward(model, given)]
    for recipe in RECIPES:
        first_heads: set[int] = set()

        def look(record: Any, call: AttentionCall, *_: object, seen: set[int] = first_heads) -> None:
            assert call.place is not None
            seen.add(call.place.first_head)

        with accelplug.apply(model, recipe), watching(look):
            found.append(forward(model, given))
        assert first_heads == {2 * rank}
    for recipe in ANSWERING:
        with accelplug.apply(model, recipe, strict=True):
            found.append(answered(model, given))
    found.append(forward(model, given))
    return found


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no distributed package")
def test_two_ranks_answer_as_one(tmp_path: Path) -> None:
    model, given = build("llava"), inputs("llava")
    expected = [forward(model, given)]
    for recipe in RECIPES:
        with accelplug.apply(model, recipe):
            expected.append(forward(model, given))
    said = []
    for recipe in ANSWERING:
        with accelplug.apply(model, recipe, strict=True):
            said.append(answered(model, given))
        assert not torch.equal(said[-1], answered(model, given)), recipe
    model.save_pretrained(tmp_path)
    valid = given["attention_mask"].bool()
    for *changed, after in together(work, tmp_path):
        assert torch.equal(changed[0], after)
        for found, wanted in zip(changed[: len(expected)], expected, strict=True):
            torch.testing.assert_close(found[valid], wanted[valid], atol=2e-5, rtol=1e-4)
        for found, wanted in zip(changed[len(expected) :], said, strict=True):
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
