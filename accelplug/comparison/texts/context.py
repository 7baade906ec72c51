"""What a language model is asked about a text: contexts, and questions behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from accelplug.comparison.questions import Item

Encode = Callable[[str], list[int]]
"""Text to tokens, without special ones."""


@dataclass(frozen=True)
class TextItem(Item):
    """One thing that is scored: a reference that is to be said, or tokens that are to be likely.

    Attributes
    ----------
    group : what is resampled: the question, or the stretch of text.
    task : ``needle``, ``multikey`` ...
    tokens, depth : length of the prompt, and where in the context the answer stands, in [0, 1].
    context : key of the `Context` that it is about.
    """

    task: str = ""
    tokens: int = 0
    depth: float = 0.0
    context: str = ""


@dataclass(frozen=True)
class TaskQuestion:
    """What a task asks.

    Attributes
    ----------
    text : of the question, up to where the answer begins.
    answers : references, each of which is to be said; depth : where in the context the first of them stands.
    pairs : or, with nothing to say: what is fed token by token, each text with the reference that is weighed behind it.
    """

    text: str = ""
    answers: tuple[str, ...] = ()
    depth: float = 0.0
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Part:
    """What a task puts into a context: sentences at depths of the text, or a section of lines; and what it asks."""

    questions: tuple[TaskQuestion, ...]
    planted: tuple[tuple[float, str], ...] = ()
    lines: tuple[str, ...] = ()


Make = Callable[[Random, int, Encode], Part]
"""A task: what it puts where there is room for so many tokens."""


@dataclass(frozen=True)
class TokenQuestion:
    """A question in tokens.

    Attributes
    ----------
    ids : read behind the context in one go, but for the last, which is decoded as an answer is.
    room : how many tokens are said then; 0 where all of `ids` are fed one by one, and weighed in `spans`, one an item: (from, to).
    """

    ids: tuple[int, ...]
    items: tuple[TextItem, ...]
    room: int = 0
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Context:
    """What is read once, and what is asked about it; `tokens` is how long it was to be."""

    key: str
    tokens: int
    ids: tuple[int, ...]
    asked: tuple[TokenQuestion, ...]

    @property
    def items(self) -> list[TextItem]:
        """All that is scored."""
        return [item for question in self.asked for item in question.items]


def asked_of_task(
    task: str, question: TaskQuestion, number: int, context: str, tokens: int, encode: Encode
) -> TokenQuestion:
    """Return a task's question in tokens; `number` tells it from others about the context."""
    facts = {"task": task, "tokens": tokens, "context": context}
    if not question.pairs:
        items = tuple(
            TextItem(f"{context}, {task} {number}", question.text, answer, depth=question.depth, **facts)  # type: ignore[arg-type]
            for answer in question.answers
        )
        room = sum(len(encode(f" {answer}")) + 2 for answer in question.answers) + 8
        return TokenQuestion(tuple(encode(question.text)), items, room)
    ids: list[int] = []
    spans, weighed = [], []
    for i, (text, answer) in enumerate(question.pairs):
        ids += encode(text)
        first = len(ids)
        ids += encode(answer)
        spans.append((first, len(ids)))
        weighed.append(TextItem(f"{context}, {task} {number}.{i}", text, answer, **facts))  # type: ignore[arg-type]
    return TokenQuestion(tuple(ids), tuple(weighed), spans=tuple(spans))


def stretches(ids: Sequence[int], context: str, tokens: int, each: int = 16) -> TokenQuestion:
    """Return how a text goes on, token by token, weighed in stretches of `each` tokens."""
    spans = [(first, min(first + each, len(ids))) for first in range(0, len(ids), each)]
    items = [
        TextItem(f"{context}, stretch {i}", "", "", task="suffix", tokens=tokens, depth=1.0, context=context)
        for i in range(len(spans))
    ]
    return TokenQuestion(tuple(ids), tuple(items), spans=tuple(spans))
