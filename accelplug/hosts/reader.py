"""Reads the prompt of a forward: which tokens show which image, which are valid, which are asked for, and whose turn they are in."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelplug import compat
from accelplug.call import Prompt
from accelplug.chat import speakers, tokenizer_of
from accelplug.errors import ShapeError
from accelplug.families.vlm import Vlm
from accelplug.hosts.images import ImageEncoder
from accelplug.hosts.prompts import answering, number_images, opened, together, turns
from accelplug.hosts.stream import ASKED

logger = logging.getLogger("accelplug")

MARKED: ContextVar[tuple[PromptReader, Tensor] | None] = ContextVar("accelplug_mark", default=None)
"""Where the user says that images are, in this thread, and to whom."""


class PromptReader:
    """Describes the tokens of a language model's forwards.

    Parameters
    ----------
    base : the base model, whose image encoder says how many tokens each image takes.
    family : the vision-language family, None where it is not known.
    visual_tokens : the token that stands for each part of an image and of a video.
    needs : what the recipe's patches ask of the host.
    processor : the model's, None where it was not given.
    recipe : its name, for messages.
    """

    def __init__(
        self,
        base: Any,
        family: Vlm | None,
        visual_tokens: Mapping[str, int],
        needs: frozenset[str],
        processor: Any,
        recipe: str,
    ) -> None:
        self.base, self.family, self.visual_tokens, self.needs = base, family, visual_tokens, needs
        self.processor, self.recipe = processor, recipe
        self.images = ImageEncoder(base)
        self._said = False
        """Whether it was said that whose turn text is in is not known."""

    def mark(self, image: Tensor | None) -> None:
        """Take the images of this thread's prompts to be where `image` says, (B, S) bool or numbers from 1; None to look for them.

        Raises
        ------
        ShapeError
            If it has another shape or dtype.
        """
        if image is not None and (image.ndim != 2 or image.is_floating_point() or image.is_complex()):
            raise ShapeError(
                f"mark(): expected (B, S), True or a number from 1 where a token shows an image, got {image.dtype} of shape "
                f"{tuple(image.shape)}."
            )
        MARKED.set(None if image is None else (self, image))

    def read(
        self, known: Prompt | None, ids: Tensor | None, embeds: Tensor | None, inputs: dict[str, Any], past: int
    ) -> Prompt:
        """Describe the tokens of a sequence, those of this forward at its end.

        Parameters
        ----------
        known : what is known of those before; None where there are none.
        ids, embeds : (B, S_q) or (B, S_q, C), of this forward; one of them.
        inputs : arguments of the base model's forward.
        past : how many tokens stand before.
        """
        image = self._numbers(ids, embeds, past)
        new = image.shape[1]
        valid = self._valid(inputs, past, past + new, image)
        answers = answering(valid[:, past:], ASKED.get())
        if known is None:
            length = new - answers + 1 if isinstance(answers, int) else answers[:, :1] + 1
            return self._spoken(Prompt(image, valid, length, 0, answers, ids))
        before = pad(known.image[:, :past], (0, past - min(past, known.image.shape[1])))
        was_valid = pad(known.valid[:, :past], (0, past - min(past, known.valid.shape[1])), value=True)
        valid = torch.cat([was_valid, valid[:, past:]], 1)
        image = torch.where(image > 0, image + before.amax(-1, keepdim=True), image)
        prompt = Prompt(torch.cat([before, image], 1), valid, past + new, past, answers, _joined(known.ids, ids, past))
        return (
            replace(prompt, length=known.length, turns=_fitted(known.turns, past + new))
            if prompt.drafts
            else self._spoken(prompt)
        )

    def grown(self, known: Prompt, ids: Tensor, inputs: dict[str, Any]) -> Prompt:
        """Describe a prompt that is read anew, with the answer that was generated since: all of it is `ids` (B, S)."""
        more = ids.shape[1] - known.image.shape[1]
        valid = self._valid(inputs, 0, ids.shape[1], known.image)
        answers, spoken = answering(valid, more + 1), _fitted(known.turns, ids.shape[1])
        return Prompt(pad(known.image, (0, more)), valid, known.length, 0, answers, ids, spoken)

    @staticmethod
    def _valid(inputs: dict[str, Any], past: int, tokens: int, like: Tensor) -> Tensor:
        """Which of a sequence's tokens, those of the forward behind `past` others, are not padding: bool (B, tokens)."""
        valid = compat.transformers.valid_tokens(inputs.get("attention_mask"), past)
        if valid is None:
            return torch.ones(len(like), tokens, dtype=torch.bool, device=like.device)
        return pad(valid[:, :tokens], (0, max(0, tokens - valid.shape[1])), value=True)

    def _spoken(self, prompt: Prompt) -> Prompt:
        """The same, with whose turn its tokens are in, where a tokenizer or the family's own tokens say so."""
        processor = self.processor if "turns" in self.needs else None
        openings = self.family.turns if self.family is not None else {}
        if prompt.ids is None or not prompt.shows or not (processor or openings):
            found = None
        elif processor is not None:
            found = turns(prompt.ids, prompt.visual, prompt.valid, partial(speakers, tokenizer_of(processor)), alone=True)
        else:
            found = turns(prompt.ids, prompt.visual, prompt.valid, partial(opened, openings), alone=False)
        if found is None and "turns" in self.needs and bool(prompt.system.any()) and not self._said:
            self._said = True
            logger.warning(
                "%s: whose turn text is in cannot be told, so that all text ahead of the first image is taken for the system's. Pass "
                "the processor: accelplug.apply(model, recipe, processor=processor)",
                self.recipe,
            )
        return replace(prompt, turns=found)

    def _marked(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Numbers of images as they were marked, for these tokens (B, S, ...)."""
        rows, length = tokens.shape[:2]
        if image.shape[1] != length or rows % len(image):
            raise ShapeError(
                f"The images of a prompt of {rows} rows of {length} tokens were marked in {len(image)} of {image.shape[1]}. Mark them "
                "for every prompt anew, or take it back with plug.mark(image=None)."
            )
        numbers = number_images(image, []) if image.dtype == torch.bool else image.to(torch.int16)
        return numbers.repeat_interleave(rows // len(image), 0).to(tokens.device)

    def _numbers(self, ids: Tensor | None, embeds: Tensor | None, past: int) -> Tensor:
        """Number the images and videos of every row from 1: int16 (B, S_q)."""
        tokens = ids if ids is not None else embeds
        assert tokens is not None
        marked = MARKED.get()
        if marked is not None and marked[0] is self and not past:
            return self._marked(marked[1], tokens)
        numbers = [torch.zeros(tokens.shape[:2], dtype=torch.int16, device=tokens.device)]
        for kind, token in self.visual_tokens.items():
            if ids is not None:
                visual = ids == token
            else:
                visual = (tokens == self.base.get_input_embeddings()(torch.tensor(token, device=tokens.device))).all(-1)
            if bool(visual.any()):
                sizes = self.images.take(kind)
                numbers.append(number_images(visual, sizes if self.family is not None and self.family.by_image else []))
        return together(numbers[1:] or numbers)


def _fitted(turns: Tensor | None, tokens: int) -> Tensor | None:
    """Whose turn so many tokens are in: those that are not known go on with the last one."""
    if turns is None:
        return None
    return torch.cat([turns[:, :tokens], turns[:, -1:].expand(-1, max(0, tokens - turns.shape[1]))], 1)


def _joined(known: Tensor | None, new: Tensor | None, past: int) -> Tensor | None:
    """Token ids of a sequence that goes on; -1 for what was generated one by one and not kept."""
    if known is None or new is None:
        return None
    return torch.cat([pad(known[:, :past], (0, past - min(past, known.shape[1])), value=-1), new], 1)
