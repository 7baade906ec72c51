"""POPE: "Is there a dog in the image?", asked of things that are there and of things one might expect (arXiv 2305.10355)."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np

from accelplug.comparison.evaluators.statistics import YesNo, mcc, ratio, same_length
from accelplug.errors import AccelplugError

Image = TypeVar("Image", str, int)
Split = Literal["random", "popular", "adversarial"]
Parse = Literal["strict", "official"]
"""How answers are read; see `parse`."""

# Copies of the data set misspell "image" and continue after the question mark.
_QUESTION = re.compile(r"is there an? (?P<thing>.+?) in the im\w+\?", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_AN = re.compile(r"(?!u[^aeiou][aeiou]|eu|ewe|one\b)[aeiou]|hour|hono|heir", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """One question about one image: is the thing there."""

    image: str | int
    text: str
    answer: bool
    thing: str
    split: str


def build(
    things_by_image: Mapping[Image, Sequence[str]],
    split: Split,
    *,
    images: int = 500,
    min_things: int = 3,
    per_image: int = 3,
    seed: int = 0,
) -> list[Question]:
    """Ask for the first things of sampled images, and after each for one that is not there.

    What is not there and was not asked yet is drawn uniformly (``random``), is what most images have (``popular``), or what
    most images with the thing just asked for have (``adversarial``). All counts are over the sampled images; ties go by name.
    Where nothing is left that ever occurs with the thing, it is drawn uniformly. A seed samples the same images for all splits.

    Parameters
    ----------
    things_by_image : image -> things in it, in the order of the annotations; repetitions are ignored.
    images : how many are sampled.
    min_things : only images with at least so many things are.
    per_image : how many things of an image are asked for.

    Returns
    -------
    list of Question, length images * 2 * per_image
        Image by image; yes and no alternate.

    Raises
    ------
    AccelplugError
        Unknown split, fewer than `per_image` things to ask for, too few images, or an image that has all there is.
    """
    if split not in get_args(Split):
        raise AccelplugError(f"POPE split {split!r}: expected one of {list(get_args(Split))}.")
    if min_things < per_image:
        raise AccelplugError(f"POPE asks for {per_image} things of an image but min_things is {min_things}; raise it.")
    rng = np.random.default_rng(seed)
    sampled = _sample(things_by_image, images, min_things, rng)
    popular = Counter(thing for things in sampled.values() for thing in things)
    together = _co_occurrence(sampled.values())
    questions = []
    for image, things in sampled.items():
        free = {thing for thing in popular if thing not in things}
        for thing in things[:per_image]:
            counts = {"random": Counter[str](), "popular": popular, "adversarial": together[thing]}[split]
            absent = _absent(image, free, counts, rng)
            free.remove(absent)
            questions += [_ask(image, thing, True, split), _ask(image, absent, False, split)]
    return questions


def article(thing: str) -> str:
    """Return "a" or "an", by sound as far as the first letters tell it."""
    return "an" if _AN.match(thing) else "a"


def digest(questions: Sequence[Question]) -> str:
    """Return the SHA-256 of the questions in their order: copies of POPE differ, so a result names the one it was made with."""
    lines = (json.dumps(asdict(question), sort_keys=True) for question in questions)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read(path: str | Path) -> list[Question]:
    """Read a question file of RUCAIBox/POPE: JSON lines with image, text and label.

    The split is the last word of the file's name, as in ``coco_pope_random.json``.

    Raises
    ------
    AccelplugError
        There is no such file, or a line of it is no such question.
    """
    path = Path(path)
    if not path.is_file():
        raise AccelplugError(
            f"POPE questions: expected a file of JSON lines, {path} is none; github.com/RUCAIBox/POPE has them."
        )
    split = path.stem.rsplit("_", 1)[-1]
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return [_read_line(line, split, f"{path}, line {number}") for number, line in lines if line.strip()]


def parse(answer: str, parse: Parse = "strict") -> bool | None:
    """Read an answer: True for yes, False for no, None if it is unparsed.

    ``strict``: the first word decides if it is yes or no, in any case and behind any punctuation. Otherwise the words yes, no and not
    of the first sentence do, unless they contradict each other. "Nope", "isn't" and a sentence that merely affirms are unparsed.
    ``official``: as the release does, for published figures. Up to the first full stop, without commas, one of the words No, no and
    not between blanks makes it a no; all else is a yes, "NO", "Nope" and an empty answer too.

    Raises
    ------
    AccelplugError
        If there is no such way to read it.
    """
    if parse not in get_args(Parse):
        raise AccelplugError(f"Answers are read in one of the ways {', '.join(get_args(Parse))}, got {parse!r}.")
    if parse == "official":
        return {"No", "no", "not"}.isdisjoint(answer.partition(".")[0].replace(",", "").split(" "))
    sentences = (_WORD.findall(sentence.lower()) for sentence in re.split(r"[.!?\n]", answer))
    words = next(filter(None, sentences), [""])
    said = {"yes": {True}, "no": {False}}.get(words[0]) or {word == "yes" for word in words if word in ("yes", "no", "not")}
    return said.pop() if len(said) == 1 else None


def score(truth: Sequence[bool], answers: Sequence[bool | None]) -> YesNo:
    """Compare parsed answers with the truth, question by question.

    Raises
    ------
    AccelplugError
        There are not as many answers as questions.
    """
    same_length("A score of yes/no answers", truth, answers)
    count = Counter((bool(true), answer) for true, answer in zip(truth, answers, strict=True))
    tp, tn, fp = count[True, True], count[False, False], count[False, True]
    yes, no = (sum(count[true, answer] for answer in (True, False, None)) for true in (True, False))
    unparsed = count[True, None] + count[False, None]
    return YesNo(
        n=yes + no,
        unparsed=unparsed,
        accuracy=ratio(tp + tn, yes + no),
        precision=ratio(tp, tp + fp),
        recall=ratio(tp, yes),
        f1=ratio(2 * tp, tp + fp + yes),
        yes_ratio=ratio(tp + fp, yes + no - unparsed),
        mcc=mcc(tp, no - tn, yes - tp, tn),
        hallucination_rate=ratio(fp, no),
    )


def _sample(
    things_by_image: Mapping[Image, Sequence[str]], images: int, min_things: int, rng: np.random.Generator
) -> dict[Image, list[str]]:
    distinct = {image: list(dict.fromkeys(things)) for image, things in things_by_image.items()}
    enough = [image for image, things in distinct.items() if len(things) >= min_things]
    if len(enough) < images:
        raise AccelplugError(
            f"POPE samples {images} images with {min_things} things or more, got {len(enough)} of {len(distinct)}; "
            f"pass images={len(enough)} or fewer."
        )
    return {enough[i]: distinct[enough[i]] for i in rng.permutation(len(enough))[:images].tolist()}


def _co_occurrence(images: Iterable[list[str]]) -> defaultdict[str, Counter[str]]:
    together: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for things in images:
        for thing in things:
            together[thing].update(things)
    return together


def _absent(image: str | int, free: set[str], counts: Counter[str], rng: np.random.Generator) -> str:
    if not free:
        raise AccelplugError(
            f"POPE needs a thing that is not in image {image!r}, but it has, or was asked for, all that the sampled images have; "
            "sample more images or ask for fewer things of each."
        )
    names = sorted(free)
    most = max(names, key=lambda name: counts[name])
    return most if counts[most] else names[rng.integers(len(names))]


def _ask(image: str | int, thing: str, answer: bool, split: str) -> Question:
    return Question(image, f"Is there {article(thing)} {thing} in the image?", answer, thing, split)


def _read_line(line: str, split: str, where: str) -> Question:
    try:
        entry = json.loads(line)
        image, text, label = entry["image"], entry["text"], entry["label"]
        thing = _QUESTION.match(text)
    except (ValueError, KeyError, TypeError) as error:
        raise AccelplugError(f"{where}: expected a JSON object with image, text and label, got {line[:80]!r}.") from error
    if thing is None or label not in ("yes", "no"):
        raise AccelplugError(
            f'{where}: expected "Is there a ... in the image?" with label yes or no, got {text!r}, {label!r}.'
        )
    return Question(image, text, label == "yes", thing["thing"], split)
