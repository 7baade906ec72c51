"""AMBER (arXiv 2311.07397): counts of generated descriptions, CHAIR, Cover, Hal and Cog, and questions of yes and no.

The questions are scored as published. The counts are AMBER-like: AMBER also forgives a noun that spaCy's word vectors find similar
to one in the image, and finds nouns with a tagger. Neither is done here, so CHAIR and Hal tend to be higher than published, Cover and
Cog lower: compare before with after only. All else is as in the release: each word stands by itself ("baby" in "a baby elephant"
too), and is credited to the first thing that it is an association of before it is credited to the thing of its own name.

An exam that is not AMBER's own has no questions in its dimensions: existence are POPE's, each once, state, number and relation those that
MME asks about colour, count and position.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelplug.comparison.evaluators import pope
from accelplug.comparison.evaluators.chair import check_truth
from accelplug.comparison.evaluators.evaluator import Asked, Figure, Image, Parse, Question, Said
from accelplug.comparison.evaluators.statistics import ratio, same_length
from accelplug.comparison.evaluators.vocabulary import Vocabulary, inflect
from accelplug.errors import AccelplugError

DIMENSIONS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
"""The split of a question, what it is about, by the type that AMBER's annotations give it; state, number and action are attributes."""
ATTRIBUTE = ("state", "number", "action")
OF_MME = {"color": "state", "count": "number", "position": "relation"}
"""The dimension of MME's tasks, in exams that are not AMBER's own; its existence is among POPE's questions."""


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


@dataclass(frozen=True)
class NoClass:
    """Figures of answers where no is the class that is looked for; shares, NaN where undefined.

    Attributes
    ----------
    n : questions.
    unparsed : answers that are neither yes nor no; they are wrong.
    precision : right ones among the answers no; recall : answers no among the questions whose truth is no.
    """

    n: int
    unparsed: int
    accuracy: float
    precision: float
    recall: float
    f1: float

    @classmethod
    def of(cls, truth: Sequence[bool], answers: Sequence[bool | None]) -> NoClass:
        """Compare answers with the truth, question by question."""
        pairs = list(zip(truth, answers, strict=True))
        right = sum(answer is true for true, answer in pairs)
        found = sum(answer is False and not true for true, answer in pairs)
        said, there = sum(answer is False for answer in answers), sum(not true for true in truth)
        return cls(
            n=len(pairs),
            unparsed=sum(answer is None for answer in answers),
            accuracy=ratio(right, len(pairs)),
            precision=ratio(found, said),
            recall=ratio(found, there),
            f1=ratio(2 * found, said + there),
        )


@dataclass(frozen=True)
class Discriminative:
    """Figures of all questions, and by dimension, with ``attribute`` for state, number and action together."""

    all: NoClass
    dimensions: dict[str, NoClass]


@dataclass(frozen=True)
class Benchmark:
    """AMBER's own files, as far as they were asked for; images go by the names of their files.

    Attributes
    ----------
    truth, likely : image -> the things in it, and those that a model is likely to hallucinate there.
    questions : of yes and no; their split is the dimension.
    describe : what is asked for a description.
    """

    truth: dict[str, list[str]]
    likely: dict[str, list[str]]
    questions: tuple[Question, ...]
    associations: dict[str, list[str]]
    safe: frozenset[str]
    describe: str


def read_folder(folder: str | Path) -> Benchmark:
    """Read the folder ``data`` of junyangwang0410/AMBER: annotations, queries, associations and safe words.

    Raises
    ------
    AccelplugError
        A file is missing, or holds something else.
    """
    folder = Path(folder)
    annotations = {entry["id"]: entry for entry in _entries(folder / "annotations.json", "id", "type", "truth")}
    truth, likely, questions, describe = {}, {}, [], "Describe this image."
    path = folder / "query" / "query_all.json"
    for query in _entries(path, "id", "image", "query"):
        number, image, text = query["id"], query["image"], query["query"]
        found = annotations.get(number, {})
        kind, answer = found.get("type"), found.get("truth")
        if kind == "generative" and isinstance(answer, list):
            truth[image], likely[image], describe = answer, list(found.get("hallu", ())), text
        elif kind in DIMENSIONS and answer in ("yes", "no"):
            questions.append(Question(image, text, answer == "yes", "", DIMENSIONS[kind]))
        else:
            raise AccelplugError(
                f"{path}: expected annotations of query {number}, with the things in the image or yes or no, got {found!r}; "
                "are both files of one release?"
            )
    try:
        safe = frozenset((folder / "safe_words.txt").read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise AccelplugError(f"AMBER: expected {folder / 'safe_words.txt'}, a word a line: {error}.") from error
    return Benchmark(truth, likely, tuple(questions), read_associations(folder / "relation.json"), safe, describe)


def _entries(path: Path, *keys: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not all(set(keys) <= set(entry) for entry in entries):
            raise ValueError(f"an entry lacks one of {', '.join(keys)}")
    except (OSError, ValueError, TypeError) as error:
        raise AccelplugError(
            f"{path}: expected AMBER's list of objects with {', '.join(keys)}: {error}; take the folder data of "
            "github.com/junyangwang0410/AMBER."
        ) from error
    return entries


def read_answer(answer: str, parse: Parse = "strict") -> bool | None:
    """Read an answer: ``strict`` as `pope.read_yes_no` does; ``official`` as AMBER's release, which takes "Yes" and "No" alone."""
    return {"Yes": True, "No": False}.get(answer) if parse == "official" else pope.read_yes_no(answer, parse)


def discriminate(questions: Sequence[Question], answers: Sequence[str], parse: Parse = "strict") -> Discriminative:
    """Score answers to AMBER's questions of yes and no.

    Parameters
    ----------
    answers : what was said to each question.
    parse : how it is read; see `read_answer`.

    Raises
    ------
    AccelplugError
        There are not as many answers as questions.
    """
    same_length("A score of AMBER's questions", questions, answers)
    return _discriminated(
        (question.split, question.answer, read_answer(answer, parse))
        for question, answer in zip(questions, answers, strict=True)
    )


def _discriminated(answered: Iterable[tuple[str, bool, bool | None]]) -> Discriminative:
    """Figures of what was answered: the dimension of a question, its truth, and the answer as it was read."""
    found = list(answered)

    def of(dimensions: Collection[str]) -> NoClass:
        kept = [(truth, answer) for dimension, truth, answer in found if dimension in dimensions]
        return NoClass.of([truth for truth, _ in kept], [answer for _, answer in kept])

    there = list(dict.fromkeys(dimension for dimension, *_ in found))
    groups = {name: (name,) for name in there} | ({"attribute": ATTRIBUTE} if set(ATTRIBUTE) & set(there) else {})
    return Discriminative(of(there), {name: of(dimensions) for name, dimensions in groups.items()})


def amber_score(chair: float, f1: float) -> float:
    """Return the AMBER score, at most 100, from shares: the mean of what CHAIR leaves and of F1 of the class no on all questions."""
    return 100 * (1 - chair + f1) / 2


def read_associations(path: str | Path) -> dict[str, list[str]]:
    """Read AMBER's ``relation.json``: a word -> the words that may stand for it.

    Raises
    ------
    AccelplugError
        There is no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise AccelplugError(f"Associations: expected AMBER's relation.json, {path} is not a file; they are optional.")
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
    associations : a thing -> other words that stand for it. A noun stands for the first thing of an image whose associations have it,
        else for the first of its own name; a thing that is named twice in the truth counts twice.
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
        counts = len(covered), len(truth[image]), len(foreseen), len((likely or {}).get(image, ()))
        rows.append(ResponseRow(image, nouns, others, *counts))
    return Amber.of(rows, vocabulary.singulariser)


def how_counted(
    noun: str,
    truth: Collection[str],
    likely: Collection[str],
    associations: Mapping[str, Sequence[str]],
    safe: Collection[str],
) -> str:
    """Say in words how `score` counts a noun in the response to one image."""
    if noun in safe:
        return "safe: a noun, never hallucinated, and covers nothing"
    for things, how in ((truth, "in the picture: covers"), (likely, "hallucinated, and foreseen:")):
        if (place := _stands_for(things, associations).get(noun)) is not None:
            return f"{how} {(things if isinstance(things, Sequence) else sorted(things))[place]}"
    return "hallucinated"


def _stands_for(things: Collection[str], associations: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return word -> the place of the thing that it stands for; sets, which have no order, go by name."""
    placed = list(enumerate(things if isinstance(things, Sequence) else sorted(things)))[::-1]
    own = {thing: place for place, thing in placed}
    return own | {word: place for place, thing in placed for word in associations.get(thing, ())}


@dataclass
class AmberFigures:
    """What AMBER says of a row.

    Attributes
    ----------
    shares : counts of descriptions (chair, cover, hal, cog); of its questions accuracy and figures of the class no; with both, the score.
    dimensions : figures of its questions by dimension.
    """

    shares: dict[str, float] = field(default_factory=dict)
    dimensions: dict[str, NoClass] = field(default_factory=dict)


class AmberEvaluator:
    """Descriptions of any exam, and questions in AMBER's dimensions: its own, else POPE's and MME's."""

    name, title = "amber", "descriptions and questions: AMBER"

    def score(self, asked: Asked, said: Said) -> AmberFigures | None:
        """See `Evaluator`."""
        found = AmberFigures()
        if answered := list(_answered(asked, said)):
            no = _discriminated(answered)
            found.shares |= {name: getattr(no.all, name) for name in ("accuracy", "precision", "recall", "f1")}
            found.dimensions = no.dimensions
        if said.descriptions:
            counts = score(
                said.descriptions,
                asked.truth,
                asked.vocabulary,
                likely=asked.likely or None,
                associations=asked.associations,
                safe=asked.safe,
            )
            found.shares |= {name: getattr(counts, name) for name in ("chair", "cover", "hal", "cog")}
            if answered:
                found.shares["score"] = amber_score(counts.chair, no.all.f1)
        return found if found.shares else None

    def hold(self, asked: Asked, stock: Said, said: Said, before: AmberFigures, figures: AmberFigures) -> dict[str, float]:
        """See `Evaluator`; the counts have no test, and the questions are among those that `pope` tests."""
        return {}

    def columns(self, figures: AmberFigures, holm: Mapping[str, float]) -> dict[str, str]:
        """See `Evaluator`; shown where the exam says which hallucinations are likely, as AMBER and generated scenes do."""
        if math.isnan(figures.shares.get("cog", math.nan)):
            return {}
        named = {"CHAIR": "chair", "Cover": "cover", "Hal": "hal", "Cog": "cog", "F1 of no": "f1"}
        known = {name: value for name, value in figures.shares.items() if not math.isnan(value)}
        cells = {heading: f"{known[name]:.1%}" for heading, name in named.items() if name in known}
        return cells | ({"AMBER": f"{known['score']:.1f}"} if "score" in known else {})

    def drawn(self, figures: AmberFigures) -> list[Figure]:
        """See `Evaluator`; as `columns`, but CHAIR, which `chair` draws with its interval where it can."""
        if not self.columns(figures, {}):
            return []
        shares = figures.shares
        return [
            Figure("AMBER, of 100", shares.get("score", math.nan), "more", share=False),
            Figure("AMBER Cover, things that descriptions name", shares["cover"], "more"),
            Figure("AMBER Hal, descriptions that hallucinate", shares["hal"], "less"),
            Figure("AMBER Cog, likely hallucinations that are named", shares["cog"], "less"),
        ]

    def summary(self, figures: AmberFigures | None, p: Mapping[str, float], holm: Mapping[str, float]) -> dict[str, Any]:
        """See `Evaluator`."""
        figures = figures or AmberFigures()
        return {"amber": figures.shares, "amber_dimensions": figures.dimensions}


def _answered(asked: Asked, said: Said) -> Iterator[tuple[str, bool, bool | None]]:
    """The dimension of each question, its truth, and the answer as it was read."""
    seen = set()
    for split, replies in said.replies.items():
        for question, reply in zip(asked.of(split), replies, strict=True):
            if split in DIMENSIONS.values():
                yield split, question.answer, asked.read(reply)
            elif (once := (question.image, question.text)) not in seen:
                seen.add(once)
                yield "existence", question.answer, asked.read(reply)
    for (task, *_), (yes, no) in zip(asked.pairs, said.pairs, strict=bool(said.pairs)):
        if task in OF_MME:
            yield OF_MME[task], True, asked.read(yes)
            yield OF_MME[task], False, asked.read(no)
