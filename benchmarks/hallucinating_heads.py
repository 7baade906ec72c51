"""Which heads of a model hallucinate: the list that `adhh` needs, and that was published for LLaVA-1.5 alone.

``python -m benchmarks.hallucinating_heads``: about two minutes on two cores. Pictures of the dev split are described by the stock model.
With g a factor on a head's output, a head's influence is what leaving it out takes from the log-probability of words for what is not
there, over what it takes from that of words for what is, each a mean. AD-HH leaves heads out one by one, a forward each; here it is told
to first order for all of them at once, by the derivative at g = 1. As many are listed, of all heads, as for LLaVA-1.5-7B: 20 of 1,024.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from accelplug.chat import Chat, spelled
from accelplug.comparison.exam import Exam
from accelplug.zoo import path

LISTED = 20 / 1024


@contextmanager
def weighed(model: Any, gains: Tensor) -> Iterator[None]:
    """Multiply the outputs of all heads by gains (layers, heads) inside."""

    def weigh(gain: Tensor, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((args[0].unflatten(-1, (len(gain), -1)) * gain[:, None].to(args[0])).flatten(-2),)

    layers = model.get_decoder().layers
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(partial(weigh, gain))
        for layer, gain in zip(layers, gains, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def influence(model: Any, inputs: dict[str, Any], marks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the derivatives by each head's gain (layers, heads) of the summed log-probabilities of two sets of tokens, bool (B, S)."""
    config = model.config.get_text_config()
    gains = torch.ones(config.num_hidden_layers, config.num_attention_heads, device=model.device, requires_grad=True)
    with weighed(model, gains):
        logs = model(**inputs).logits[:, :-1].float().log_softmax(-1)
    said = logs.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    first, second = ((said * mark[:, 1:]).sum() for mark in marks)
    (one,), (other,) = torch.autograd.grad(first, gains, retain_graph=True), torch.autograd.grad(second, gains)
    return one, other


def mentions(tokenizer: Any, ids: list[int], exam: Exam, key: Any) -> Iterator[tuple[int, bool]]:
    """For each thing that a description mentions: the token that its word begins with, and whether it is there."""
    text, spans = spelled(tokenizer, ids)
    for mention in exam.vocabulary.found(text):
        if mention.name is not None:
            yield next(i for i, span in enumerate(spans) if span.stop > mention.begin), mention.name in exam.truth[key]


def hallucinating_heads(model: Any, processor: Any, exam: Exam, batch: int = 16) -> list[list[int]]:
    """Return the heads, [layer, head], that raise words for what is not there most over words for what is, the first the most.

    None where no description says what is not there.

    Parameters
    ----------
    model : a vision-language model whose prompts are ids, a mask and pixels alone, such as LLaVA.
    exam : whose pictures are described.
    """
    chat, keys = Chat(model, processor), list(exam.pictures)
    model.requires_grad_(False)
    sums, counts = [torch.zeros(()), torch.zeros(())], [0, 0]
    for begin in range(0, len(keys), batch):
        some = keys[begin : begin + batch]
        inputs = chat.questions([exam.describe] * len(some), [exam.picture(key) for key in some])
        asked, out = inputs["input_ids"].shape[1], chat.generate(inputs, exam.max_new_tokens)
        marks = torch.zeros(2, *out.shape, dtype=torch.bool, device=out.device)
        for row, key in enumerate(some):
            for at, there in mentions(chat.tokenizer, out[row, asked:].tolist(), exam, key):
                marks[int(there), row, asked + at] = True
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, out.shape[1] - asked), value=1)
        found = influence(model, {**inputs, "input_ids": out, "attention_mask": mask}, (marks[0], marks[1]))
        sums = [total + x.cpu() for total, x in zip(sums, found, strict=True)]
        counts = [count + int(mark.sum()) for count, mark in zip(counts, marks, strict=True)]
    if not counts[0]:
        return []
    heads = sums[0] / counts[0] - sums[1] / max(1, counts[1])
    best = heads.flatten().topk(max(1, round(LISTED * heads.numel()))).indices.tolist()
    return [[i // heads.shape[1], i % heads.shape[1]] for i in best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llava-scenes", help="of the zoo, by its name")
    parser.add_argument("--pictures", type=int, default=64)
    options = parser.parse_args()
    folder = path(options.model)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    print(json.dumps(hallucinating_heads(model, processor, Exam.scenes(options.pictures, "dev"))))


if __name__ == "__main__":
    main()
