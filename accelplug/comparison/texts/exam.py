"""What a language model is examined on: prompts of some lengths, whose contexts hold all tasks, made from a seed and nothing else."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from accelplug import files
from accelplug.comparison.arguments import require_whole
from accelplug.comparison.texts import associative, needle, ruler
from accelplug.comparison.texts.context import Context, Encode, Make, TokenQuestion, asked_of_task, stretches
from accelplug.comparison.texts.words import sentences
from accelplug.errors import AccelplugError, nearest
from accelplug.recipe import Recipe, Rule
from accelplug.registry import patch_class

IN_TEXT: Mapping[str, Make] = {"needle": needle.needles, "multivalue": ruler.multivalue, "tracking": ruler.tracking}
"""Tasks that plant sentences in a text."""
IN_LISTS: Mapping[str, Make] = {
    "multikey": ruler.multikey,
    "associative": associative.pairs,
    "common": ruler.common,
    "frequent": ruler.frequent,
}
"""Tasks that make sections of lines."""
TASKS = (*IN_TEXT, "nll", *IN_LISTS)
USUAL_TOKENS = 2048
SHORTEST = 512
"""Tokens in which all tasks find room."""


@dataclass(frozen=True)
class TextExam:
    """Prompts for a language model, and what is asked of it.

    For each length and trial two contexts: a text, in which sentences are planted, and lists. Questions share a context; see
    `ContextReader` for how they are put.

    Attributes
    ----------
    tokens : lengths of contexts, by default one at which all recipes are at work; questions and answers come behind, or within where
        the model's own bound is reached.
    depths : of the needle grid, 0 for the front and 1 for the end.
    tasks : of `TASKS`.
    text : a file of text that sentences are planted in and that goes on behind; None for sentences of our own.
    suffix : how many tokens of the text are weighed behind a context.
    trials : contexts of each kind a length.
    seed : of all that is drawn.
    anew : whether a context is read anew with every question, as one prompt.
    """

    tokens: Sequence[int] = ()
    depths: Sequence[float] = needle.NEEDLE_DEPTHS
    tasks: Sequence[str] = TASKS
    text: str | Path | None = None
    suffix: int = 128
    trials: int = 1
    seed: int = 0
    anew: bool = False

    def __post_init__(self) -> None:
        for name, least in {"suffix": 2, "trials": 1, "seed": 0}.items():
            require_whole(getattr(self, name), f"TextExam, {name}", least)
        for given in self.tokens:
            require_whole(given, "TextExam, tokens of a prompt", SHORTEST)
        for depth in self.depths or (None,):
            if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 1:
                raise AccelplugError(f"TextExam, depths: expected numbers from 0 to 1, got {depth!r}.")
        for task in self.tasks or ("",):
            if task not in TASKS:
                raise AccelplugError(
                    f"TextExam knows no task {task!r}{nearest(str(task), TASKS)}; it knows {', '.join(TASKS)}."
                )

    def at_work(self, recipes: Iterable[Recipe]) -> TextExam:
        """Return it with a length: its own, else `USUAL_TOKENS`, or as many as the recipes' patches need to be at work."""
        if self.tokens:
            return self
        return replace(self, tokens=(max([USUAL_TOKENS, *(_least(rule) for recipe in recipes for rule in recipe.rules)]),))

    @property
    def source(self) -> str:
        """What the text is, in words."""
        return "sentences of our own" if self.text is None else Path(self.text).name

    def contexts(self, tokenizer: Any, longest: int | None = None) -> list[Context]:
        """Return all contexts, the shortest first; with questions and answers none is longer than `longest`.

        Raises
        ------
        AccelplugError
            If the file of text cannot be read, or is too short.
        """
        written = None if self.text is None else files.read(self.text, "A file of text")
        made = []
        for tokens in sorted(self.tokens):
            for trial in range(self.trials):
                if set(self.tasks) & {*IN_TEXT, "nll"}:
                    made.append(self._text(tokenizer, tokens, trial, written, longest or sys.maxsize))
                if set(self.tasks) & set(IN_LISTS):
                    made.append(self._lists(tokenizer, tokens, trial, longest or sys.maxsize))
        return made

    def _rng(self, *what: str) -> Random:
        return Random(" ".join(what))

    def _asked(
        self, makes: Mapping[str, Make], room: int, key: str, tokens: int, encode: Encode
    ) -> tuple[list, list[TokenQuestion]]:
        """The parts of tasks, and their questions."""
        parts = {task: make(self._rng(key, task), room, encode) for task, make in makes.items() if task in self.tasks}
        asked = [
            asked_of_task(task, question, number, key, tokens, encode)
            for task, part in parts.items()
            for number, question in enumerate(part.questions)
        ]
        return list(parts.values()), asked

    def _text(self, tokenizer: Any, tokens: int, trial: int, written: str | None, longest: int) -> Context:
        """A text in which sentences are planted, and how it goes on."""
        key, encode = f"text {tokens}.{trial}, seed {self.seed}", _encode(tokenizer)
        makes: Mapping[str, Make] = {**IN_TEXT, "needle": partial(needle.needles, depths=self.depths)}
        parts, asked = self._asked(makes, tokens, key, tokens, encode)
        told = [(depth, encode(f" {line}")) for part in parts for depth, line in part.planted]
        suffix = self.suffix if "nll" in self.tasks else 0
        begin = _begin(tokenizer)
        whole = min(tokens, longest - max(_longest(asked), suffix))
        room = whole - len(begin) - sum(len(line) for _, line in told)
        if written is None:
            running = self._prose(room + suffix, encode, key)
        else:
            running = encode(_window(written, tokens, 97 * self.seed + trial))[: room + suffix]
        if room < tokens // 4 or len(running) < room + suffix:
            raise AccelplugError(
                f"{self.source}: {len(running)} tokens, expected {room + suffix} for a prompt of {tokens}. Give a longer text, or longer "
                "prompts for fewer depths."
            )
        ends = [place for place, token in enumerate(running[:room], 1) if _ends_sentence(tokenizer, token)]
        ids = list(running[:room])
        for depth, line in sorted(told, key=lambda one: -one[0]):
            place = min(ends, key=lambda end: abs(end - depth * room), default=round(depth * room))
            ids[place:place] = line
        if suffix:
            asked.append(stretches(running[room:], key, tokens))
        return Context(key, tokens, (*begin, *ids), tuple(asked))

    def _lists(self, tokenizer: Any, tokens: int, trial: int, longest: int) -> Context:
        """Sections of lines, each of an equal share, behind some sentences that fill the rest."""
        key, encode = f"lists {tokens}.{trial}, seed {self.seed}", _encode(tokenizer)
        chosen = {task: make for task, make in IN_LISTS.items() if task in self.tasks}
        begin, share = _begin(tokenizer), 0.8 * tokens / len(chosen)
        parts, asked = self._asked(chosen, int(share), key, tokens, encode)
        room = min(tokens, longest - _longest(asked)) - len(begin)
        sections = [token for part in parts for token in encode("\n".join(["", *part.lines, ""]))]
        if len(sections) > room:
            raise AccelplugError(
                f"Lists of {len(sections)} tokens do not fit a prompt of {tokens}. Give longer prompts, or fewer tasks."
            )
        return Context(key, tokens, (*begin, *self._prose(room - len(sections), encode, key), *sections), tuple(asked))

    def _prose(self, number: int, encode: Encode, key: str) -> list[int]:
        """So many tokens of our own sentences."""
        sentence = sentences(self._rng(key, "prose"))
        ids: list[int] = []
        while len(ids) < number:
            ids += encode(" " + " ".join(islice(sentence, 64)))
        return ids[:number]


def _longest(asked: Sequence[TokenQuestion]) -> int:
    return max((len(question.ids) + question.room for question in asked), default=0)


def _window(text: str, tokens: int, number: int) -> str:
    """A stretch of a text with letters enough for so many tokens: from a third of it on, each behind the one before, and round."""
    letters = 8 * (tokens + SHORTEST)
    first = (len(text) // 3 + number * letters) % max(len(text) - letters, 1)
    return text[first:][:letters]


def _least(rule: Rule) -> int:
    """How many tokens a prompt must have for a rule's patch to be at work, where it says so."""
    if rule.entry is None:
        return 0
    cls = patch_class(rule.name) if rule.instance is None else type(rule.instance)
    known = cls.Config.model_fields.get("min_tokens")
    found = rule.values.get("min_tokens", 0 if known is None else known.default)
    return found if isinstance(found, int) else 0


def _encode(tokenizer: Any) -> Encode:
    return lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)


def _begin(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts in front of a text of its own accord."""
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    return tuple(whole[: next((i for i, token in enumerate(whole) if token == plain[0]), 0)])


def _ends_sentence(tokenizer: Any, token: int) -> bool:
    """Whether a token ends a sentence or a line."""
    return re.search(r"[.!?][\"'\u201d]?\s*$|\n", tokenizer.decode([token])) is not None
