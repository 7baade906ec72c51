"""inspect() of a language model that reads a text: sinks, distances and influence, against eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import accelplug
from accelplug.call import AttentionCall, Place
from accelplug.errors import AlreadyAppliedError, ShapeError, UnsupportedError
from accelplug.inspection.text import FURTHEST, NEAREST, WINDOW, TextInspection
from accelplug.kernels.sinks import ROWS_AT_ONCE, kinds, looks, sinks
from accelplug.testing.language_models import TEXT_CONFIG, word_processor


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT_CONFIG, **more})).eval().requires_grad_(False)


def test_sinks_are_told_by_the_direction_of_the_first_while_it_is_large() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, sink = torch.randn(24, 10, 64, generator=g), torch.randn(64, generator=g)
    hidden[4:20, 1] = 30 * sink  # the largest of the first three
    hidden[4:20, 5], hidden[8:14, 7], hidden[8:10, 8] = -9 * sink, 9 * sink, 9 * sink
    hidden[:, 9] = sink  # before and after, too, where it is nothing
    first, lives, alike = sinks(hidden)
    assert first == 1
    assert lives == range(4, 20)
    assert alike.sum(0).tolist() == [0, 16, 0, 0, 0, 16, 0, 6, 2, 16]
    lasting, secondary = kinds(alike)
    assert lasting.nonzero()[:, 0].tolist() == [1, 5, 9]
    assert secondary.nonzero()[:, 0].tolist() == [7]


@pytest.mark.parametrize("tokens", [7, ROWS_AT_ONCE + 9])
def test_distances_and_influence_are_those_of_eager_attention(tokens: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, tokens, 8, generator=g), torch.randn(1, 2, tokens, 8, generator=g)
    call = AttentionCall(q, k, k, None, 0.5, lambda: q, Place())
    clipped, distance, influence, received = looks(call, 4, 2, 5)
    p = (q @ k.repeat_interleave(2, 1).mT * 0.5 + torch.full((tokens, tokens), -torch.inf).triu(1)).softmax(-1)[0].double()
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)
    torch.testing.assert_close(clipped.double(), (p * back.clamp(0, 4)).sum((1, 2)) / tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(distance.double(), (p * back.clamp(min=0)).sum((1, 2)) / tokens, rtol=1e-4, atol=1e-4)
    band = (back >= 2) & (back <= 5)
    torch.testing.assert_close(influence.double(), (p * band).sum(1) / band.sum(0).clamp(min=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(received.double(), p.sum(1) / (back >= 0).sum(0), rtol=1e-4, atol=1e-6)


def test_a_text_is_read_and_told(tmp_path: Path) -> None:
    model, tokenizer = llama(num_hidden_layers=6), word_processor().tokenizer
    inputs = tokenizer(" ".join(f"w{i % 90}" for i in range(70)), return_tensors="pt")
    found = accelplug.inspect(model, inputs, tokenizer)
    assert isinstance(found, TextInspection)
    assert found.words[3] == "w3"
    assert found.distance.shape == found.reach.shape == found.primary_mass.shape == (6, 4)
    assert found.influence.shape == (70,)
    assert (found.distance <= WINDOW).all()
    assert (found.distance <= found.reach + 1e-6).all()
    assert not found.influence[70 - NEAREST :].any()
    assert found.influence[: 70 - FURTHEST].all()
    model.set_attn_implementation("eager")
    p = model(inputs["input_ids"], output_attentions=True).attentions
    mass = torch.stack([x[0][..., torch.from_numpy(found.primary)].sum(-1).mean(-1) for x in p])
    np.testing.assert_allclose(found.primary_mass, mass.detach().numpy(), rtol=1e-3, atol=1e-5)
    for suffix in ("html", "json"):
        getattr(found, f"to_{suffix}")(tmp_path / f"found.{suffix}")
    assert found.to_png(tmp_path / "found.png").stat().st_size > 1000
    assert "secondary sinks" in str(found)
    padded = {"input_ids": torch.nn.functional.pad(inputs["input_ids"], (3, 0)), "attention_mask": torch.ones(1, 73).long()}
    padded["attention_mask"][:, :3] = 0
    again = accelplug.inspect(model, padded)
    assert isinstance(again, TextInspection)
    np.testing.assert_allclose(again.reach, found.reach, rtol=1e-5)


def test_what_cannot_be_told_is_refused_in_words() -> None:
    model, ids = llama(), torch.tensor([[5]])
    with pytest.raises(ShapeError, match="two tokens or more, got 1"):
        accelplug.inspect(model, {"input_ids": ids})
    with accelplug.apply(model, {"patch": "stream"}), pytest.raises(AlreadyAppliedError, match="reads a stock model"):
        accelplug.inspect(model, {"input_ids": ids.expand(1, 9)})
    slides = hf.MistralForCausalLM(hf.MistralConfig(**TEXT_CONFIG, sliding_window=4)).eval()
    with pytest.raises(UnsupportedError, match="slides a window"):
        accelplug.inspect(slides, {"input_ids": ids.expand(1, 9)})
