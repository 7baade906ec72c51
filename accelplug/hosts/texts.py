"""Several prompts in one, ``"a red circle | a blue square"``: each is encoded for itself, and it is known which tokens are whose.

While a patch is on that asks for it, the pipeline's own ``encode_prompt`` is called once for each part of a prompt, and what it returns is
put together: texts (B, S, C) and their masks (B, S) one behind the other, and what sums up a text (B, C) as the mean of the parts. A
negative prompt comes once for each part too, so that both branches have as many tokens; parts may be written in it as well.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from accelplug.bounded import Bounded
from accelplug.call import Layout
from accelplug.errors import AccelplugError, UnsupportedError
from accelplug.hosts.undo import Undo

SEPARATOR = "|"
WORDED = ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
"""Arguments that hold prompts."""


class _OfPrompts(threading.local):
    """What the prompts of a thread came to: tokens of all parts -> of each."""

    def __init__(self) -> None:
        self.parts: Bounded[int, tuple[int, ...]] = Bounded(64)


class Texts:
    """The prompts of one pipeline.

    Parameters
    ----------
    model : the pipeline; of a bare denoiser nothing is known.

    Raises
    ------
    UnsupportedError
        If a pipeline encodes its prompts elsewhere than in ``encode_prompt``.
    """

    def __init__(self, model: Any) -> None:
        self._pipe, self._told = weakref.ref(model), _OfPrompts()
        self._standing: Any = None
        self._bare = isinstance(model, nn.Module)
        if not self._bare and not callable(getattr(model, "encode_prompt", None)):
            raise UnsupportedError(
                f"Several prompts in one are for pipelines with encode_prompt(), which {type(model).__name__} has not. Join embeddings "
                "yourself, set tokens in the rule, and apply the recipe to the denoiser alone."
            )

    def install(self, undo: Undo) -> None:
        """Stand before ``encode_prompt``, once for all denoisers."""
        pipe = self._pipe()
        if not self._bare and pipe is not None and self._standing is None:
            self._standing = self._encoding(pipe.encode_prompt)
            undo.put(pipe, "encode_prompt", self._standing)

    def told(self, layout: Layout) -> Layout | None:
        """Return a layout with the tokens of each prompt, where they are known; None where they were, and are others."""
        if not len(self._told.parts) or not layout.text:
            return layout
        parts = self._told.parts.peek(layout.text)
        return None if parts is None else replace(layout, texts=parts)

    def _encoding(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        signature, told = inspect.signature(encode), self._told

        @functools.wraps(encode)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            split = {name: _between_bars(given[name]) for name in WORDED if given.get(name) is not None}
            number = max(map(len, split.values()), default=1)
            if wrong := [name for name, parts in split.items() if len(parts) not in (1, number)]:
                raise AccelplugError(
                    f"{wrong[0]}: expected {number} prompts between {SEPARATOR!r}, or one for all, got {len(split[wrong[0]])}."
                )
            found = [encode(*args, **kwargs)] if number == 1 else []
            for turn in range(number) if number > 1 else ():
                bound = signature.bind(*args, **kwargs)
                bound.arguments.update({name: parts[turn % len(parts)] for name, parts in split.items()})
                found.append(encode(*bound.args, **bound.kwargs))
            for text in _texts_in(found) if split else ():
                told.parts.put(sum(text), text)
            return found[0] if number == 1 else _put_together(found)

        return encode_prompt


def _between_bars(given: Any) -> list[Any]:
    """The parts of a prompt, or of a list of prompts with as many parts each."""
    if isinstance(given, str):
        return [part.strip() for part in given.split(SEPARATOR)]
    rows = [_between_bars(prompt) for prompt in given]
    if len({len(row) for row in rows}) > 1:
        raise AccelplugError(
            f"prompt: expected as many prompts between {SEPARATOR!r} in every row of a batch, got {[len(row) for row in rows]}."
        )
    return [list(part) for part in zip(*rows, strict=True)]


def _texts_in(found: Sequence[Any]) -> list[tuple[int, ...]]:
    """How many tokens each part has, for every text (B, S, C) that was returned."""
    columns = zip(*(each if isinstance(each, tuple) else (each,) for each in found), strict=True)
    return [tuple(x.shape[1] for x in column) for column in columns if isinstance(column[0], Tensor) and column[0].ndim == 3]


def _put_together(found: Sequence[Any], tokens: int = 0) -> Any:
    """What several calls returned, as one. `tokens`: of the first prompt's text."""
    first = found[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        tokens = next((parts[0] for parts in _texts_in(found)), 0)
        return tuple(_put_together(column, tokens) for column in zip(*found, strict=True))
    if isinstance(first, Tensor) and (first.ndim == 3 or (first.ndim == 2 and not first.is_floating_point())):
        return torch.cat(list(found), 1)
    if isinstance(first, Tensor) and first.ndim == 2 and len(first) == tokens:  # positions of the text, once for a batch
        return torch.cat(list(found))
    if isinstance(first, Tensor) and first.ndim == 2:
        return torch.stack(list(found)).mean(0)
    raise UnsupportedError(
        f"Several prompts in one: expected texts, masks and summaries from encode_prompt(), got {type(first).__name__}"
        f"{' ' + str(tuple(first.shape)) if isinstance(first, Tensor) else ''}. This pipeline takes one prompt."
    )
