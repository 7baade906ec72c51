"""AMBER-like counts of generated descriptions: CHAIR, Cover, Hal and Cog (arXiv 2311.07397).

AMBER also forgives a noun that spaCy's word vectors find similar to one in the image, and finds nouns with a tagger. Neither is
done here, so CHAIR and Hal tend to be higher than published, Cover and Cog lower: compare before with after only.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from accelplug.comparison.evaluators.chair import Vocabulary, check_truth, inflect
from accelplug.comparison.evaluators.statistics import ratio
from accelplug.errors import AccelplugError

Image = TypeVar("Image", str, int)


@dataclass(frozen=True)
class ResponseRow:
    """What one response names.

    Attributes
    ----------
    nouns : words of the vocabulary, with repetitions; `hallucinated` are those that nothing in the image accounts for.
    covered, truth : how many things of the image are named, and how many there are.
    foreseen, likely : how many of the likely hallucinations are named, and how many there are.
    """

    image: str | int
    nouns: tuple[str, ...]
    hallucinated: tuple[str, ...]
    covered: int
    truth: int
    foreseen: int
    likely: int


@dataclass(frozen=True)
class Amber:
    """Figures over responses; shares of sums over all images, NaN where undefined.

    Attributes
    ----------
    chair : hallucinated among all nouns of the vocabulary, with repetitions.
    cover : things in the images that are named.
    hal : responses with a hallucinated noun.
    cog : likely hallucinations that are named.
    """

    chair: float
    cover: float
    hal: float
    cog: float
    n_nouns: int
    n_responses: int
    singulariser: str
    rows: tuple[ResponseRow, ...] = field(repr=False)

    @classmethod
    def of(cls, rows: Sequence[ResponseRow], singulariser: str) -> Amber:
        """Sum up rows, or a resample of them."""
        nouns = sum(len(row.nouns) for row in rows)
        return cls(
            chair=ratio(sum(len(row.hallucinated) for row in rows), nouns),
            cover=ratio(sum(row.covered for row in rows), sum(row.truth for row in rows)),
            hal=ratio(sum(bool(row.hallucinated) for row in rows), len(rows)),
            cog=ratio(sum(row.foreseen for row in rows), sum(row.likely for row in rows)),
            n_nouns=nouns,
            n_responses=len(rows),
            singulariser=singulariser,
            rows=tuple(rows),
        )


def read_associations(path: str | Path) -> dict[str, list[str]]:
    """Read AMBER's ``relation.json``: a word -> the words that may stand for it.

    Raises
    ------
    AccelplugError
        There is no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise AccelplugError(f"Associations: expected AMBER's relation.json, {path} is no file; they are optional.")
    try:
        return {str(word): [str(other) for other in others] for word, others in json.loads(path.read_text("utf-8")).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise AccelplugError(
            f"{path}: expected one JSON object of word -> list of words, as AMBER's relation.json."
        ) from error


def vocabulary(associations: Mapping[str, Sequence[str]]) -> Vocabulary:
    """Return the nouns that AMBER looks at: all words of its associations, each a class of its own, with inflect's singulars."""
    words = {word for word, others in associations.items() for word in (word, *others)}
    return Vocabulary(dict.fromkeys(sorted(words), ()), inflect)


def score(
    responses: Mapping[Image, str],
    truth: Mapping[Image, Collection[str]],
    vocabulary: Vocabulary,
    *,
    likely: Mapping[Image, Collection[str]] | None = None,
    associations: Mapping[str, Sequence[str]] | None = None,
    safe: Collection[str] = (),
) -> Amber:
    """Count what responses name of their images, and what else.

    Parameters
    ----------
    responses : image -> what was said of it.
    truth : image -> the things in it.
    likely : image -> the things a model is likely to hallucinate there.
    associations : a thing -> other words that stand for it; a noun stands for the first thing of an image that it fits.
    safe : nouns that are never hallucinated and cover nothing.

    Raises
    ------
    AccelplugError
        An image has no truth.
    """
    check_truth(responses, truth)
    rows = []
    for image, response in responses.items():
        nouns = tuple(vocabulary.mentions(response))
        there = _stands_for(truth[image], associations or {})
        expected = _stands_for((likely or {}).get(image, ()), associations or {})
        others = tuple(noun for noun in nouns if noun not in there and noun not in safe)
        covered = {there[noun] for noun in nouns if noun in there and noun not in safe}
        foreseen = {expected[noun] for noun in others if noun in expected}
        counts = len(covered), len(set(there.values())), len(foreseen), len(set(expected.values()))
        rows.append(ResponseRow(image, nouns, others, *counts))
    return Amber.of(rows, vocabulary.singulariser)


def _stands_for(things: Collection[str], associations: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return word -> the thing it stands for; a thing stands for itself before others do."""
    others = {word: thing for thing in reversed(list(things)) for word in associations.get(thing, ())}
    return others | {thing: thing for thing in things}
