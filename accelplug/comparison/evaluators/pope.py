"""POPE: "Is there a dog in the image?", asked of things that are there and of things one might expect (arXiv 2305.10355)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from accelplug.comparison.evaluators.evaluator import Asked, Delta, Figure, Image, Parse, Question, Said
from accelplug.comparison.evaluators.statistics import (
    YesNo,
    mcc,
    mcnemar,
    paired_bootstrap,
    ratio,
    same_length,
    shifted,
    wilson,
)
from accelplug.errors import AccelplugError

Split = Literal["random", "popular", "adversarial"]
HARDEST: Split = "adversarial"
"""The split whose hallucination rate is reported first."""

_TOLD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_AN = re.compile(r"(?!u[^aeiou][aeiou]|eu|ewe|one\b)[aeiou]|hour|hono|heir", re.IGNORECASE)


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
    sampled = _sampled(things_by_image, images, min_things, rng)
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


def a_or_an(thing: str) -> str:
    """Return "a" or "an", by sound as far as the first letters tell it."""
    return "an" if _AN.match(thing) else "a"


def questions_sha256(questions: Sequence[Question]) -> str:
    """Return the SHA-256 of the questions in their order: copies of POPE differ, so a result names the one it was made with."""
    lines = (json.dumps(asdict(question), sort_keys=True) for question in questions)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_yes_no(answer: str, parse: Parse = "strict") -> bool | None:
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
    sentences = (_TOLD.findall(sentence.lower()) for sentence in re.split(r"[.!?\n]", answer))
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


def _sampled(
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
    return Question(image, f"Is there {a_or_an(thing)} {thing} in the image?", answer, thing, split)


@dataclass
class PopeFigures:
    """What answers to questions of yes and no are worth.

    Attributes
    ----------
    splits : figures by split; interval : Wilson's, of the hallucination rate on the hardest split.
    described : the hardest split answered by the descriptions, yes for what they mention (offline POPE).
    hallucination, described_hallucination : differences of rates on the hardest split to the stock model.
    matched : the stock model made to say yes as often as this row does, on the hardest split (see `statistics.shifted`).
    """

    splits: dict[str, YesNo]
    interval: tuple[float, float] = (math.nan, math.nan)
    described: YesNo | None = None
    hallucination: Delta | None = None
    described_hallucination: Delta | None = None
    matched: YesNo | None = None


class PopeEvaluator:
    """Questions of yes and no, of all splits; McNemar's test on all questions, each once, and on what descriptions mention."""

    name, title = "pope", "questions of yes and no: POPE"

    def score(self, asked: Asked, said: Said) -> PopeFigures | None:
        """See `Evaluator`."""
        if not said.replies:
            return None
        found = PopeFigures({split: score(truth_of(asked, split), answers_of(asked, said, split)) for split in said.replies})
        if HARDEST in said.replies:
            negatives = [
                yes
                for yes, question in zip(_said_yes_to(asked, said), asked.of(HARDEST), strict=True)
                if not question.answer
            ]
            found.interval = wilson(sum(negatives), len(negatives))
            if said.descriptions:
                found.described = score(truth_of(asked, HARDEST), _mentioned(asked, said))
        return found

    def hold(self, asked: Asked, stock: Said, said: Said, before: PopeFigures, figures: PopeFigures) -> dict[str, float]:
        """See `Evaluator`."""
        p = {"questions": mcnemar(*(list(_right(asked, one).values()) for one in (stock, said)))}
        yes = _said_yes_to(asked, said)
        figures.hallucination = _rate_difference(asked, _said_yes_to(asked, stock), yes)
        if HARDEST in stock.margins and HARDEST in said.margins:
            figures.matched = score(truth_of(asked, HARDEST), shifted(stock.margins[HARDEST], sum(yes)))
        if before.described and figures.described:
            pair, truth = [_mentioned(asked, one) for one in (stock, said)], truth_of(asked, HARDEST)
            p["described"] = mcnemar(*([a == b for a, b in zip(one, truth, strict=True)] for one in pair))
            figures.described_hallucination = _rate_difference(asked, *pair)
        return p

    def columns(self, figures: PopeFigures, holm: Mapping[str, float]) -> dict[str, str]:
        """See `Evaluator`."""
        hard, (low, high), p = figures.splits.get(HARDEST), figures.interval, holm.get("questions", math.nan)
        return {
            "hallucinates, adversarial": f"{hard.hallucination_rate:.1%} ({low:.1%} to {high:.1%})" if hard else "",
            "to stock": str(figures.hallucination or "") if hard else "",
            "p (Holm)": "" if math.isnan(p) else f"{p:.2g}",
            "F1": f"{hard.f1:.3f}" if hard else "",
            "MCC": f"{hard.mcc:.3f}" if hard else "",
            "yes": f"{hard.yes_ratio:.2f}" if hard else "",
            "offset MCC": f"{figures.matched.mcc:.3f}" if figures.matched else "",
        }

    def drawn(self, figures: PopeFigures) -> list[Figure]:
        """See `Evaluator`."""
        if (hard := figures.splits.get(HARDEST)) is None:
            return []
        return [
            Figure("hallucinates, adversarial questions", hard.hallucination_rate, "less", figures.hallucination),
            Figure("MCC, adversarial questions", hard.mcc, "more", share=False),
            Figure("says yes, adversarial questions", hard.yes_ratio),
        ]

    def summary(self, figures: PopeFigures | None, p: Mapping[str, float], holm: Mapping[str, float]) -> dict[str, Any]:
        """See `Evaluator`."""
        figures = figures or PopeFigures({})
        return {
            "pope": figures.splits,
            "hallucination_rate_interval": figures.interval,
            "hallucination_delta": figures.hallucination,
            "mcnemar_p": p.get("questions", math.nan),
            "holm_p": holm.get("questions", math.nan),
            "matched_offset": figures.matched,
            "described": figures.described,
            "described_hallucination_delta": figures.described_hallucination,
            "described_mcnemar_p": p.get("described", math.nan),
            "described_holm_p": holm.get("described", math.nan),
        }


def pooled(asked: Asked, said: Said) -> YesNo:
    """Return the figures of all splits together."""
    truth = [true for split in said.replies for true in truth_of(asked, split)]
    return score(truth, [answer for split in said.replies for answer in answers_of(asked, said, split)])


def truth_of(asked: Asked, split: str) -> list[bool]:
    """Return what should be answered to the questions of a split."""
    return [question.answer for question in asked.of(split)]


def answers_of(asked: Asked, said: Said, split: str) -> list[bool | None]:
    """Return the answers to the questions of a split, as they are read."""
    return [asked.read(answer) for answer in said.replies.get(split, [])]


def _said_yes_to(asked: Asked, said: Said) -> list[bool]:
    """Whether each question of the hardest split was answered with yes."""
    return [answer is True for answer in answers_of(asked, said, HARDEST)]


def _mentioned(asked: Asked, said: Said) -> list[bool]:
    """Whether the description mentions what each question of the hardest split asks for."""
    mentions = {key: set(asked.vocabulary.mentions(text)) for key, text in said.descriptions.items()}
    return [question.thing in mentions[question.image] for question in asked.of(HARDEST)]


def _right(asked: Asked, said: Said) -> dict[tuple[Any, str], bool]:
    """Whether each question was answered as it should be; splits ask for the same things that are there, and those count once."""
    found: dict[tuple[Any, str], bool] = {}
    for split in said.replies:
        for question, answer in zip(asked.of(split), answers_of(asked, said, split), strict=True):
            found.setdefault((question.image, question.text), answer is question.answer)
    return found


def _rate_difference(asked: Asked, first: Sequence[bool], second: Sequence[bool]) -> Delta:
    """Difference of hallucination rates on the hardest split, from who said yes, resampled over pictures."""
    by_image: dict[Any, list[tuple[bool, bool]]] = {}
    for question, *pair in zip(asked.of(HARDEST), first, second, strict=True):
        if not question.answer:
            by_image.setdefault(question.image, []).append((pair[0], pair[1]))

    def difference(items: Sequence[list[tuple[bool, bool]]]) -> float:
        pairs = np.array([pair for item in items for pair in item], dtype=float)
        return float((pairs[:, 1] - pairs[:, 0]).mean()) if len(pairs) else math.nan

    return Delta(*paired_bootstrap(difference, list(by_image.values())))
