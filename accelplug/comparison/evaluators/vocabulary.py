"""The words that mention things in a text, and how they are told apart.

Words are told apart as in CHAIR's release: "o'clock" is one word, and so is a hyphenated one, whose parts mention nothing ("a
dog-shaped cloud"); terms have one word or two, so that a stove top oven is a stove and an oven. Three things differ. A hyphenated word
that is a term written with a blank is that term ("teddy-bear"). Punctuation of any kind parts words, a slash or an asterisk too.
Nothing is left out that a tagger or lemmatiser would take for another word.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelplug.errors import AccelplugError, UnsupportedError, worded

_TOKEN = re.compile(r"\w+(?:[-\u2010\u2011'\u2019]\w+)*|[^\w\s]")
"""A word with the hyphens and apostrophes in it, or a mark, which no term reaches across."""
_ENDING = re.compile(r"(?:n['\u2019]t|['\u2019](?:s|re|ve|ll|d|m))$")
"""What a contraction or a possessive adds."""
_HYPHEN = re.compile("[-\u2010\u2011]")

# The animals that a caption calls baby or adult, which alone would be persons.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
COCO_COMPOUNDS = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "train track": "track",
}
"""CHAIR's two words -> the one that they count as; nothing is mentioned if that is not a word of the vocabulary."""


@dataclass(frozen=True)
class Mention:
    """Words of a text that are a term of the vocabulary, and what they count as.

    Attributes
    ----------
    begin, end : where they stand, in characters of the text in lower case; said : the words as they stand there.
    term : the term that they were taken for, in the singular.
    name : the class that is counted; None where nothing is, such as for "train track".
    """

    begin: int
    end: int
    said: str
    term: str
    name: str | None


def inflect(word: str) -> str:
    """Return the singular by the package inflect, or the word itself if it is not a plural.

    Raises
    ------
    UnsupportedError
        The package is not installed.
    """
    return _engine().singular_noun(word) or word


class Vocabulary:
    """The words that mention a class of objects.

    Parameters
    ----------
    synonyms : class -> its other words, each of one word or more; the class is a word of its own.
    singular : undoes plurals of words that are not in the vocabulary as they are; None if it lists all forms.
    compounds : two words -> the one that they count as, such as `COCO_COMPOUNDS`; beside "toilet seat" a seat is none of its own.

    Raises
    ------
    AccelplugError
        A word stands for two classes.
    """

    def __init__(
        self,
        synonyms: Mapping[str, Sequence[str]],
        singular: Callable[[str], str] | None,
        compounds: Mapping[str, str] | None = None,
    ) -> None:
        self.classes = tuple(synonyms)
        self.singulariser = getattr(singular, "__name__", type(singular).__name__) if singular else "none"
        own = _classes_of_terms(synonyms)
        self._class_of: dict[str, str | None] = {term: own.get(word) for term, word in (compounds or {}).items()}
        self._class_of.update(own)
        self._words = {word for term in own for word in term.split()}
        self._longest = max((term.count(" ") + 1 for term in self._class_of), default=1)
        self._singular = functools.cache(singular or (lambda word: word))

    @classmethod
    def coco(cls) -> Vocabulary:
        """Return the 80 classes of COCO with a list of words compiled for accelplug.

        What is counted with it is CHAIR-like: it tells before from after, but does not compare with published figures. For
        those, `read` the list of the publication. Singulars are by inflect.
        """
        from accelplug.comparison.evaluators.coco_words import COCO_WORDS

        return cls({name: _split(words) for name, words in COCO_WORDS.items()}, inflect, COCO_COMPOUNDS)

    @classmethod
    def read(cls, path: str | Path, singular: Callable[[str], str] | None = inflect) -> Vocabulary:
        """Read a list of words for CHAIR: a class a line, words separated by commas, the class first.

        As in the release a term of three words or more is none: its words count by themselves.

        Raises
        ------
        AccelplugError
            There is no such file, or it repeats a class, or has a word for two.
        """
        path = Path(path)
        if not path.is_file():
            raise AccelplugError(
                f"A vocabulary is a file with a class a line, {path} is none; Vocabulary.coco() needs no file."
            )
        lines = [words for line in path.read_text(encoding="utf-8").splitlines() if (words := _split(line))]
        synonyms = {name: [word for word in words if len(word.split()) <= 2] for name, *words in lines}
        if len(synonyms) < len(lines):
            raise AccelplugError(
                f"{path}: expected each class on one line, got {len(lines)} lines of {len(synonyms)} classes."
            )
        return cls(synonyms, singular, COCO_COMPOUNDS)

    def mentions(self, text: str) -> list[str]:
        """Return the classes that a text mentions, in its order and with repetitions.

        The longest term wins ("hot dog" is not a dog); with COCO's compounds a baby elephant is an elephant only, and a seat beside a
        toilet is none. Words are taken as nouns, whatever they are in the sentence.
        """
        return [mention.name for mention in self.found(text) if mention.name is not None]

    def found(self, text: str) -> list[Mention]:
        """Return the words of a text that are terms, counted or not, in its order; see `mentions`."""
        found = list(self._terms(text.lower()))
        if "toilet seat" in self._class_of and any(mention.term == "toilet" for mention in found):
            found = [replace(mention, name=None) if mention.term == "seat" else mention for mention in found]
        return found

    def _terms(self, text: str) -> Iterator[Mention]:
        spans = [match.span() for match in _TOKEN.finditer(text)]
        tokens = [self._normal(text[begin:end]) for begin, end in spans]
        at = 0
        while at < len(tokens):
            candidates = ((size, " ".join(tokens[at : at + size])) for size in range(self._longest, 0, -1))
            size, term = next(((size, term) for size, term in candidates if term in self._class_of), (1, None))
            if term is not None:
                begin, end = spans[at][0], spans[min(at + size, len(spans)) - 1][1]
                yield Mention(begin, end, text[begin:end], term, self._class_of[term])
            at += size

    def _normal(self, token: str) -> str:
        """A token in the form of terms: in the singular, its hyphens as blanks."""
        # Known words first: a singulariser may take "bus" for a plural.
        return " ".join(
            word if word in self._words or not word.isalpha() else self._singular(word)
            for word in _HYPHEN.split(_ENDING.sub("", token))
        )


def _classes_of_terms(synonyms: Mapping[str, Sequence[str]]) -> dict[str, str]:
    classes: dict[str, str] = {}
    for name, words in synonyms.items():
        for term in (" ".join(word.lower().replace("-", " ").split()) for word in (name, *words)):
            if (other := classes.setdefault(term, name)) != name:
                raise AccelplugError(f"Vocabulary: {term!r} stands for {other!r} and {name!r}; leave it in one of them.")
    return classes


def _split(line: str) -> list[str]:
    return [word.strip() for word in line.split(",") if word.strip()]


@functools.cache
def _engine() -> Any:
    try:
        return importlib.import_module("inflect").engine()
    except ImportError as error:
        raise UnsupportedError(
            "Plurals are undone by the package inflect, which is not installed; `pip install inflect`"
            + worded(", or pass singular=None with a vocabulary that lists all forms.", ".")
        ) from error
