"""The words of the captions: a tokenizer of whole words and a small UMT5 encoder.

The encoder is trained by itself, before the denoiser: out of every word it has to tell the shape that the word belongs
to. So all that a caption binds together (this colour, that shape, this way) is in each word already, and the denoiser
need not find it out from noisy pixels. It takes a minute.
"""

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from accelplug.zoo.shapes import COLOURS, DIRECTIONS, KINDS, parse, sample_caption
from benchmarks.zoo.common import load, save

CHECKPOINT = "text.pt"
WORDS = ("<pad>", "</s>", "<unk>", ",", "a", "moves", *COLOURS, *KINDS, *DIRECTIONS)
TOKENS = 12  # of the longest caption: two clauses of five words, the comma, the end
_CLASSES = {"colour": tuple(COLOURS), "kind": KINDS, "direction": tuple(DIRECTIONS), "place": ("only", "first", "second")}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words in lower case; every caption ends in ``</s>``, and an empty one is nothing else."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", WORDS.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(WORDS),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            pad_token_id=WORDS.index("<pad>"),
            eos_token_id=WORDS.index("</s>"),
        )
    )


def embed(encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Embeddings as the pipeline makes them, with a single padding token: (batch, TOKENS + 1, 64), zeros as padding."""
    inputs = tokenizer(captions, padding="max_length", max_length=TOKENS + 1, return_tensors="pt")
    inputs = inputs.to(encoder.device)
    hidden = encoder(inputs.input_ids, inputs.attention_mask).last_hidden_state
    return hidden * inputs.attention_mask[..., None]


def _targets(captions: list[str]) -> torch.Tensor:
    """For every word the classes of its shape, (batch, TOKENS + 1, 4); -100 on the comma, the end and the padding."""
    targets = torch.full((len(captions), TOKENS + 1, len(_CLASSES)), -100)
    for row, text in enumerate(captions):
        shapes = parse(text)
        for index, shape in enumerate(shapes):
            place = "only" if len(shapes) == 1 else ("first", "second")[index]
            words = (shape.colour, shape.kind, shape.direction, place)
            classes = [names.index(word) for names, word in zip(_CLASSES.values(), words, strict=True)]
            targets[row, 6 * index : 6 * index + 5] = torch.tensor(classes)
    return targets


def trained_encoder(steps: int = 1500) -> UMT5EncoderModel:
    """The encoder of the checkpoint; trained first if there is none."""
    encoder = make_encoder()
    if state := load(CHECKPOINT):
        encoder.load_state_dict(state)
        return encoder.eval().requires_grad_(False)
    torch.manual_seed(0)
    rng, tokenizer = np.random.default_rng(0), make_tokenizer()
    encoder = make_encoder()
    heads = nn.Linear(encoder.config.d_model, sum(map(len, _CLASSES.values())))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for step in range(steps):
        captions = [sample_caption(rng) for _ in range(32)]
        scores = heads(embed(encoder, tokenizer, captions)).split([len(names) for names in _CLASSES.values()], dim=-1)
        targets = _targets(captions).unbind(-1)
        pairs = zip(scores, targets, strict=True)
        loss = torch.stack(
            [nn.functional.cross_entropy(score.flatten(0, 1), target.flatten()) for score, target in pairs]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"text step {step + 1} loss {loss.item():.4f}", flush=True)
    save(encoder.state_dict(), CHECKPOINT)
    return encoder.eval().requires_grad_(False)
