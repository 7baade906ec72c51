"""Questions with reference answers: what a language or vision-language model says, and how likely it finds the reference."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelplug.chat import Chat, open_picture, require_files
from accelplug.comparison.evaluators import pope
from accelplug.comparison.evaluators.evaluator import Parse
from accelplug.comparison.evaluators.statistics import ratio, shifted
from accelplug.comparison.exam import Exam
from accelplug.errors import AccelplugError
from accelplug.files import path_of


@dataclass(frozen=True)
class Item:
    """A question and its reference answer.

    Attributes
    ----------
    group : what the question is about: a picture's key, or the question's own number. Groups are drawn whole.
    picture : a PIL image, the path of one, or None for text alone.
    truth : True or False where the reference is yes or no, else None.
    """

    group: Any
    text: str
    answer: str
    picture: Any = None

    @property
    def truth(self) -> bool | None:
        return {"yes": True, "no": False}.get(self.answer.strip(" .").lower())

    def shown(self) -> Any:
        """Return the picture as an upright RGB image of PIL's."""
        return open_picture(self.picture)


@dataclass(frozen=True)
class Reply:
    """What came of a question.

    Attributes
    ----------
    said : the answer as text; None where only likelihoods were asked for.
    yes : the answer read as yes or no, None if it is neither; right : whether it is the reference (see `is_right`).
    margin : best logit of a yes over best of a no, where an answer begins; NaN where the reference is neither.
    nll : negative log-likelihood of the reference, nats, summed over its `tokens`; NaN where it was not asked for.
    """

    said: str | None
    yes: bool | None
    right: bool
    margin: float
    nll: float
    tokens: int


def items(given: Exam | Sequence[Mapping[str, Any]]) -> tuple[Item, ...]:
    """Return the questions of an exam, or those given as ``{"text": ..., "answer": ..., "image": PIL image or path}``, image optional.

    Each counts once: POPE's splits share the questions whose answer is yes, and what is asked twice is no more evidence.

    Raises
    ------
    AccelplugError
        If there are none, a key is missing or unknown, or some show a picture and some do not.
    """
    if isinstance(given, Exam):
        made = [Item(q.image, q.text, "yes" if q.answer else "no", given.pictures[q.image]) for q in given.questions]
    else:
        for entry in given:
            fits = isinstance(entry, Mapping) and {"text", "answer"} <= set(entry) <= {"text", "answer", "image"}
            texts = [entry["text"], _reference_text(entry["answer"])] if fits else []
            if not fits or not all(isinstance(text, str) and text.strip() for text in texts):
                got = f"the keys {', '.join(map(str, entry))}" if isinstance(entry, Mapping) else type(entry).__name__
                got += f" with {texts[0]!r}, {texts[1]!r}"[:200] if fits else ""
                raise AccelplugError(
                    f"A question is a mapping with text, answer and, for a picture, image, neither text empty; got {got}."
                )
            if not isinstance(entry.get("image"), str | Path | None) and not hasattr(entry["image"], "convert"):
                raise AccelplugError(f"image: expected a PIL image or the path of one, got {type(entry['image']).__name__}.")
        made = [
            Item(_group(i, entry), entry["text"], _reference_text(entry["answer"]), entry.get("image"))
            for i, entry in enumerate(given)
        ]
    if not made or len({item.picture is None for item in made}) > 1:
        raise AccelplugError(
            "Expected questions that all show a picture, or none of them, got " + ("a mixture." if made else "none.")
        )
    return tuple({(_key(item.picture), item.text, item.answer): item for item in made}.values())


def require_pictures(asked: Sequence[Item]) -> None:
    """Raise AccelplugError unless the pictures of all questions are there."""
    require_files([item.picture for item in asked if isinstance(item.picture, str | Path)])


def _reference_text(given: Any) -> Any:
    """A reference as text: True is yes, and numbers are written out; anything else as it is."""
    if isinstance(given, bool):
        return "yes" if given else "no"
    return str(given) if isinstance(given, int | float) else given


def _group(number: int, entry: Mapping[str, Any]) -> Any:
    return number if (key := _key(entry.get("image"))) is None else key


def _key(picture: Any) -> Any:
    return str(picture) if isinstance(picture, str | Path) else None if picture is None else id(picture)


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """Read questions from JSON lines of text, answer and image; paths of images count from the file's folder.

    Raises
    ------
    AccelplugError
        If the file cannot be read.
    """
    path = path_of(path, "A file of questions")
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [
            {**entry, "image": str(path.parent / entry["image"])} if "image" in entry else dict(entry) for entry in entries
        ]
    except (OSError, ValueError, TypeError) as error:
        raise AccelplugError(
            f'{path}: expected JSON lines like {{"text": "...", "answer": "...", "image": "a.jpg"}}: {error}.'
        ) from error


def digest(asked: Sequence[Item]) -> str:
    """Return 16 hex digits for questions in their order; of pictures in memory their pixels count."""
    sha = hashlib.sha256()
    for item in asked:
        seen = str(item.picture) if isinstance(item.picture, str | Path | None) else item.picture.tobytes()
        sha.update(repr((item.text, item.answer)).encode() + (seen.encode() if isinstance(seen, str) else seen))
    return sha.hexdigest()[:16]


def is_right(item: Item, said: str, parse: Parse = "strict") -> bool:
    """Whether an answer is the reference: read as POPE does for yes and no, else it begins with the reference's words."""
    if item.truth is not None:
        return pope.read_yes_no(said, parse) is item.truth
    wanted = _words(item.answer)
    return _words(said)[: len(wanted)] == wanted if wanted else said.strip().startswith(item.answer.strip())


def _words(text: str) -> list[str]:
    """Words and numbers, with their minus; no marks."""
    return re.findall(r"(?:(?<!\w)-(?=\d))?\w+", text.lower().replace("\u2212", "-"))


def shifted_accuracy(asked: Sequence[Item], stock: Sequence[Reply], replies: Sequence[Reply]) -> float:
    """Accuracy on yes and no of the stock model, made to say yes as often as `replies` do by `shifted`; NaN without such questions."""
    polar = [(i.truth, s.margin, r.yes) for i, s, r in zip(asked, stock, replies, strict=True) if i.truth is not None]
    said_yes = shifted([margin for _, margin, _ in polar], sum(yes is True for _, _, yes in polar))
    return ratio(sum(yes == truth for yes, (truth, _, _) in zip(said_yes, polar, strict=True)), len(polar))


@dataclass
class Asker:
    """Puts questions to a model, greedily, as it is: stock or with a recipe on.

    Attributes
    ----------
    processor : the model's; a tokenizer for a model of text alone.
    says, likelihoods : whether answers are generated, and whether references are weighed.
    parse : how answers of yes and no are read (see `pope.read_yes_no`).
    """

    model: Any
    processor: Any
    says: bool = True
    likelihoods: bool = False
    parse: Parse = "strict"

    def __post_init__(self) -> None:
        self.chat = Chat(self.model, self.processor)

    def ask(self, asked: Sequence[Item]) -> list[Reply]:
        """Return a reply to each question, all in one batch."""
        pictures = None if asked[0].picture is None else [item.shown() for item in asked]
        inputs = self.chat.questions([item.text for item in asked], pictures)
        references = [self.chat.reference(item.text, item.answer, pictures is not None) for item in asked]
        said: list[str] | list[None] = [None] * len(asked)
        margins, nll = [math.nan] * len(asked), [math.nan] * len(asked)
        if self.says:
            longest = 0 if all(item.truth is not None for item in asked) else max(map(len, references))
            said, margins = self.chat.say(inputs, longest + 4)
        if self.likelihoods:
            nll = self.chat.weigh(inputs, references)
        return [
            Reply(
                text,
                None if text is None else pope.read_yes_no(text, self.parse),
                text is not None and is_right(item, text, self.parse),
                margin if item.truth is not None else math.nan,
                cost,
                len(reference) if self.likelihoods else 0,
            )
            for item, text, margin, cost, reference in zip(asked, said, margins, nll, references, strict=True)
        ]
