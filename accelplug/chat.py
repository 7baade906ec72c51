"""One question to a language or vision-language model: the picture upright, the chat template, padding on the left, greedy decoding.

And what a model makes of an answer that it is given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accelplug.errors import AccelplugError

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""What is kept of a checkpoint's generation config: which tokens are which, not how to decode."""


def open_picture(held: Any) -> Any:
    """Return a picture as an upright RGB image of PIL's: turned as its EXIF data say, 16 bits brought to 8, transparency dropped.

    Parameters
    ----------
    held : a PIL image, or the path of a file.

    Raises
    ------
    AccelplugError
        If the file cannot be read, or its numbers have no range that is known.
    """
    from PIL import Image, ImageOps

    if not isinstance(held, str | Path) and not hasattr(held, "convert"):
        raise AccelplugError(f"A picture is a PIL image or the path of one, got {type(held).__name__}.")
    try:
        image = ImageOps.exif_transpose(Image.open(held) if isinstance(held, str | Path) else held)
        return _eight_bits(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        named = held if isinstance(held, str | Path) else type(held).__name__
        raise AccelplugError(f"{named} cannot be read as a picture: {error}. Give a PNG or JPEG file.") from error


def require_files(pictures: Sequence[str | Path]) -> None:
    """Raise AccelplugError unless all files of pictures are there, ahead of the work with them."""
    if missing := [path for path in pictures if not Path(path).is_file()]:
        raise AccelplugError(
            f"{missing[0]} is not a file, one of {len(missing)} pictures of {len(pictures)} that are not there."
        )


def _eight_bits(image: Any) -> Any:
    """Grey of 16 bits as 8 bits, which PIL would clip to white."""
    import numpy as np
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"mode {image.mode!r} does not say which number is white")
    return Image.fromarray((values // 257).astype(np.uint8))


def tokenizer_of(processor: Any) -> Any:
    """Return a processor's tokenizer; of a tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def prompt(processor: Any, text: str, picture: bool = False, answer: str | None = None) -> str:
    """Return a question as a chat, by the processor's template where it has one, up to where the answer begins, or with an answer."""
    if not getattr(processor, "chat_template", None):
        image = f"{getattr(processor, 'image_token', '<image>')}\n" if picture else ""
        return f"{image}{text}" + ("" if answer is None else f" {answer}")
    return templated(processor, text, picture, answer)


def templated(processor: Any, text: str, picture: bool = False, answer: str | None = None) -> str:
    """Return a question as the processor's chat template writes it.

    Raises
    ------
    ValueError
        If it has none that can be used.
    """
    in_parts = processor is not tokenizer_of(processor)

    def turn(role: str, text: str, picture: bool = False) -> dict[str, Any]:
        parts = [{"type": "image"}] * picture + [{"type": "text", "text": text}]
        return {"role": role, "content": parts if in_parts else text}

    turns = [turn("user", text, picture)] + ([] if answer is None else [turn("assistant", answer)])
    return processor.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=False)


def tokenized(processor: Any, prompts: Sequence[str], pictures: Sequence[Any] | None = None) -> dict[str, Any]:
    """Return the inputs of a model for prompts, padded on the left, each with its picture if `pictures` are given.

    Raises
    ------
    AccelplugError
        If several prompts are padded and no token is set for it, or the processor refuses them.
    """
    tokenizer = tokenizer_of(processor)
    if pictures is None:
        # A chat template writes all special tokens itself.
        bare = not getattr(processor, "chat_template", None)
        return padded_left(tokenizer, [tokenizer(text, add_special_tokens=bare).input_ids for text in prompts])
    if tokenizer.pad_token_id is None and len(prompts) > 1:
        raise AccelplugError(
            f"{type(tokenizer).__name__} has no token to pad prompts with; set processor.tokenizer.pad_token, to its eos_token say."
        )
    # Some templates begin with the token that the tokenizer would put there once more.
    bos: str = getattr(tokenizer, "bos_token", None) or ""
    begun = bool(bos) and all(text.startswith(bos) for text in prompts)
    more: dict[str, Any] = {"add_special_tokens": False} if begun else {}
    several = {} if len(prompts) == 1 else {"padding": True, "padding_side": "left"}
    images = [[picture] for picture in pictures]
    try:
        return dict(processor(text=list(prompts), images=images, return_tensors="pt", **several, **more))
    except (TypeError, ValueError) as error:
        raise AccelplugError(
            f"{type(processor).__name__} cannot make inputs of {len(prompts)} prompts with a picture each: {error} Pass the model's "
            "own processor, and no text that holds its image token."
        ) from error


def padded_left(tokenizer: Any, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` (B, S) of prompts of different length, padded on the left."""
    width, pad = max(map(len, rows)), padding(tokenizer) or 0
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


MARK = "\x00"
"""What stands for a special token in a text that is spelled token by token."""


def spelled(tokenizer: Any, ids: Sequence[int | None]) -> tuple[str, list[slice]]:
    """Return the text of tokens, special ones and None as `MARK`, and which of its characters each of them stands for.

    A character that several tokens make together is each one's.
    """
    special = {*getattr(tokenizer, "all_special_ids", ()), *getattr(tokenizer, "added_tokens_decoder", ())}
    text, spans, begin, shown, waiting = "", list[slice](), 0, 0, 0
    for i, token in enumerate(ids):
        if token is None or token in special:
            piece, begin, shown = MARK, i + 1, 0
        else:
            whole = tokenizer.decode(list(ids[begin : i + 1]))
            if whole.endswith("\ufffd"):  # the first bytes of a character
                waiting += 1
                continue
            piece = whole[shown:]
            begin, shown = (i, len(tokenizer.decode([token]))) if i - begin >= 16 else (begin, len(whole))
        spans += [slice(len(text), len(text) + len(piece))] * (waiting + 1)
        text, waiting = text + piece, 0
    return text, spans + [slice(len(text), len(text))] * waiting


TEMPLATE_WORDS = re.compile(
    rf"{MARK}\s*(?P<opened>user|assistant|human|model|system)(?=\s*\n|{MARK})"  # of a turn that a special token opens
    r"|\b(?P<written>(?i:user|assistant|human|system|gpt))\s*:"
    rf"|(?P<instruction>\[/?INST\])|\#\#\#|{MARK}"
)
"""What a chat template says itself, in a text that is `spelled`; a group is matched where it says who speaks."""
_SPEAKERS = {"user": 1, "human": 1, "[inst]": 1, "assistant": -1, "model": -1, "gpt": -1, "[/inst]": -1, "system": 0}


def speakers(tokenizer: Any, ids: Sequence[int]) -> tuple[list[int | None], list[bool]]:
    """Say who begins to speak at each token (1 the user, -1 the model, 0 the system; None where it goes on), and whether the chat
    template says it."""
    text, spans = spelled(tokenizer, ids)
    begins: list[int | None] = [None] * len(spans)
    template = [False] * len(text)
    uncased = text.islower()
    for found in TEMPLATE_WORDS.finditer(text):
        if (found["written"] or "").islower() and not uncased:  # such as a question's "operating system:"
            continue
        template[slice(*found.span())] = [True] * len(found[0])
        if (name := found["opened"] or found["written"] or found["instruction"]) is not None:
            first = next(i for i, span in enumerate(spans) if span.stop > found.start())
            begins[first] = _SPEAKERS[name.lower()]
    return begins, [all(template[i] or text[i].isspace() for i in range(span.start, span.stop)) for span in spans]


def padding(tokenizer: Any) -> int | None:
    """Return the token that a tokenizer pads with, or the one that it ends with, or None."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def yes_no_margins(tokenizer: Any, logits: torch.Tensor) -> list[float]:
    """Return the best logit of a yes over the best of a no, for logits (B, vocabulary) of the token that an answer begins with."""
    yes, no = (_first_tokens(tokenizer, word) for word in ("yes", "no"))
    both = yes & no  # such as a blank of its own: it begins either answer
    best = [logits.float()[:, sorted(tokens - both or tokens)].amax(-1) for tokens in (yes, no)]
    return (best[0] - best[1]).tolist()


def _first_tokens(tokenizer: Any, word: str) -> set[int]:
    """Tokens by which an answer may begin with a word, in any spelling; the whole word's, if any spelling is one token."""
    forms = {form for base in (word, word.capitalize(), word.upper()) for form in (base, f" {base}")}
    ids = [found for form in forms if (found := tokenizer(form, add_special_tokens=False).input_ids)]
    return {found[0] for found in ids if len(found) == 1} or {found[0] for found in ids}


@contextmanager
def greedy(model: Any) -> Iterator[None]:
    """Decode greedily inside, whatever the checkpoint's generation config says: beams, sampling, penalties, forced tokens, lengths.

    `generate` takes what an argument leaves open from the model's own config, so that one is replaced by a fresh one of the same
    class, with the ids of tokens only, and put back in the end.
    """
    held = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    try:
        for module, config in held:
            kept = {name: value for name in TOKEN_IDS if (value := getattr(config, name, None)) is not None}
            module.generation_config = type(config)(**kept)
        yield
    finally:
        for module, config in held:
            module.generation_config = config


@dataclass
class Chat:
    """A model that is put questions to, as it is: stock or with a recipe on.

    Attributes
    ----------
    processor : the model's; a tokenizer for a model of text alone.
    """

    model: Any
    processor: Any

    def __post_init__(self) -> None:
        self.tokenizer = tokenizer_of(self.processor)
        ends = self.model.generation_config.eos_token_id
        end = ends[0] if isinstance(ends, list | tuple) else ends
        self.pad = next(token for token in (padding(self.tokenizer), end, 0) if token is not None)

    def questions(self, texts: Sequence[str], pictures: Sequence[Any] | None = None) -> dict[str, Any]:
        """Return the model's inputs for questions, each a turn of a chat, with its picture if `pictures` are given."""
        return self.inputs([prompt(self.processor, text, pictures is not None) for text in texts], pictures)

    def inputs(self, prompts: Sequence[str], pictures: Sequence[Any] | None = None) -> dict[str, Any]:
        """Return the model's inputs on its device and in its dtype."""
        made = tokenized(self.processor, prompts, pictures)
        tensors = {name: value.to(self.model.device) for name, value in made.items() if isinstance(value, torch.Tensor)}
        return made | {n: x.to(self.model.dtype) if x.is_floating_point() else x for n, x in tensors.items()}

    def generate(self, inputs: dict[str, Any], tokens: int, **more: Any) -> Any:
        """Return what the model's `generate` does, greedily, of at most so many new tokens."""
        with greedy(self.model):
            return self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=self.pad, **more)

    def say(self, inputs: dict[str, Any], tokens: int) -> tuple[list[str], list[float]]:
        """Return answers as text, and by how much each begins with a yes rather than with a no."""
        out = self.generate(inputs, tokens, output_logits=True, return_dict_in_generate=True)
        return self.texts(inputs, out.sequences), yes_no_margins(self.tokenizer, out.logits[0])

    def texts(self, inputs: dict[str, Any], sequences: torch.Tensor) -> list[str]:
        """Return what was said behind the prompts, without special tokens."""
        new = sequences[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def reference(self, text: str, answer: str, picture: bool) -> list[int]:
        """Return the tokens of an answer as it stands behind its question, without an end."""
        asked, whole = prompt(self.processor, text, picture), prompt(self.processor, text, picture, answer)
        stop = whole.find(answer, len(asked))
        if whole.startswith(asked) and stop >= 0:
            behind = whole[len(asked) : stop + len(answer)]
        else:
            behind = answer if asked[-1:].isspace() else f" {answer}"
        alone, both = (self.tokenizer(part, add_special_tokens=False).input_ids for part in (asked, asked + behind))
        if both[: len(alone)] == alone:
            return both[len(alone) :]
        return self.tokenizer(behind, add_special_tokens=False).input_ids

    def weigh(self, inputs: dict[str, Any], references: Sequence[Sequence[int]]) -> list[float]:
        """Return the negative log-likelihood of each reference, nats.

        They are generated token by token, since patches tell a prompt from an answer.
        """
        forced = Forced(references, self.pad)
        # A reference may hold what an answer would end with.
        self.generate(inputs, max(map(len, references)), logits_processor=[forced], eos_token_id=None)
        return forced.nll


class Forced:
    """A logits processor that has every row say its reference, and `filler` behind it; `nll` adds up what the tokens cost, in nats."""

    def __init__(self, references: Sequence[Sequence[int]], filler: int) -> None:
        self.references, self.filler, self.step = references, filler, 0
        self.nll = [0.0] * len(references)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take scores (B, vocabulary), return them -inf but for the next token of each reference."""
        logs = scores.float().log_softmax(-1)
        forced = torch.full_like(scores, -math.inf)
        for row, reference in enumerate(self.references):
            token = reference[self.step] if self.step < len(reference) else self.filler
            forced[row, token] = 0.0
            if self.step < len(reference):
                self.nll[row] -= float(logs[row, token])
        self.step += 1
        return forced
