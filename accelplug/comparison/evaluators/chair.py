"""CHAIR: which of the objects that a caption mentions are not in the image (arXiv 1809.02156).

The figures depend on the list of words and on how plurals are undone (see `vocabulary`); a result names the latter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from accelplug.comparison.evaluators.evaluator import Asked, Delta, Figure, Image, Said
from accelplug.comparison.evaluators.statistics import paired_bootstrap, ratio
from accelplug.comparison.evaluators.vocabulary import Vocabulary
from accelplug.errors import AccelplugError


@dataclass(frozen=True)
class CaptionRow:
    """What one caption mentions.

    Attributes
    ----------
    words : length of the caption.
    mentions : classes in order, with repetitions; `hallucinated` are those that are not in the image.
    named, matched : how many different classes it mentions, and how many of them are in the image.
    truth : how many classes are in the image.
    """

    image: str | int
    words: int
    mentions: tuple[str, ...]
    hallucinated: tuple[str, ...]
    named: int
    matched: int
    truth: int


@dataclass
class Chair:
    """Figures over captions; shares, NaN where undefined.

    Attributes
    ----------
    chair_s : captions with a hallucinated mention.
    chair_i : hallucinated among all mentions, with repetitions.
    recall : classes in the images that are mentioned; sums over all images.
    precision : classes mentioned that are in the image; sums over all images, without repetitions.
    mean_words : words a caption, separated by blanks.
    delta : of `chair_i`, to the stock model.
    """

    chair_s: float
    chair_i: float
    recall: float
    precision: float
    f1: float
    mean_words: float
    n_mentions: int
    n_captions: int
    singulariser: str
    rows: tuple[CaptionRow, ...] = field(repr=False)
    delta: Delta | None = None

    @classmethod
    def of(cls, rows: Sequence[CaptionRow], singulariser: str) -> Chair:
        """Sum up rows, or a resample of them."""
        mentions = sum(len(row.mentions) for row in rows)
        matched, named, truth = (sum(getattr(row, what) for row in rows) for what in ("matched", "named", "truth"))
        return cls(
            chair_s=ratio(sum(bool(row.hallucinated) for row in rows), len(rows)),
            chair_i=ratio(sum(len(row.hallucinated) for row in rows), mentions),
            recall=ratio(matched, truth),
            precision=ratio(matched, named),
            f1=ratio(2 * matched, named + truth),
            mean_words=ratio(sum(row.words for row in rows), len(rows)),
            n_mentions=mentions,
            n_captions=len(rows),
            singulariser=singulariser,
            rows=tuple(rows),
        )


def score(captions: Mapping[Image, str], truth: Mapping[Image, Collection[str]], vocabulary: Vocabulary) -> Chair:
    """Compare what captions mention with what is in their images.

    Parameters
    ----------
    captions : image -> what was said of it.
    truth : image -> the classes in it; it may have more images.

    Raises
    ------
    AccelplugError
        An image has no truth, or its truth a class that the vocabulary lacks.
    """
    check_truth(captions, truth)
    named = {name for image in captions for name in truth[image]}
    if unknown := sorted(named - set(vocabulary.classes)):
        raise AccelplugError(
            f"CHAIR: expected the truth in the {len(vocabulary.classes)} classes of the vocabulary, got {unknown[:5]} besides; "
            "no caption could ever mention these, so add them to the vocabulary or drop them."
        )
    rows = [_row(image, caption, set(truth[image]), vocabulary) for image, caption in captions.items()]
    return Chair.of(rows, vocabulary.singulariser)


def check_truth(texts: Mapping[Image, str], truth: Mapping[Image, Collection[str]]) -> None:
    """Raise AccelplugError unless each text's image has a truth."""
    if missing := [image for image in texts if image not in truth]:
        raise AccelplugError(
            f"Expected the truth of all {len(texts)} images, got none for {len(missing)}, such as {missing[0]!r}; "
            "are the names or numbers of the images of one kind in both?"
        )


def _row(image: str | int, caption: str, truth: set[str], vocabulary: Vocabulary) -> CaptionRow:
    mentions = tuple(vocabulary.mentions(caption))
    return CaptionRow(
        image=image,
        words=len(caption.split()),
        mentions=mentions,
        hallucinated=tuple(name for name in mentions if name not in truth),
        named=len(set(mentions)),
        matched=len(truth.intersection(mentions)),
        truth=len(truth),
    )


class ChairEvaluator:
    """Descriptions, where the exam has classes; AMBER, which has words alone, is scored by itself."""

    name, title = "chair", "descriptions: CHAIR"

    def score(self, asked: Asked, said: Said) -> Chair | None:
        """See `Evaluator`."""
        if not said.descriptions or asked.associations:
            return None
        return score(said.descriptions, asked.truth, asked.vocabulary)

    def hold(self, asked: Asked, stock: Said, said: Said, before: Chair, figures: Chair) -> dict[str, float]:
        """See `Evaluator`."""
        counts = [
            [(len(row.hallucinated), len(row.mentions)) for row in pair]
            for pair in zip(before.rows, figures.rows, strict=True)
        ]

        def difference(items: Sequence[list[tuple[int, int]]]) -> float:
            sums = np.array(items, dtype=float).sum(0)
            return float(sums[1, 0] / sums[1, 1] - sums[0, 0] / sums[0, 1]) if (sums[:, 1] > 0).all() else math.nan

        figures.delta = Delta(*paired_bootstrap(difference, counts))
        return {}

    def columns(self, figures: Chair, holm: Mapping[str, float]) -> dict[str, str]:
        """See `Evaluator`."""
        return {
            "CHAIR_I": "" if math.isnan(figures.chair_i) else f"{figures.chair_i:.1%}",
            "to stock": str(figures.delta or ""),
            "recall": f"{figures.recall:.2f}",
            "words": f"{figures.mean_words:.1f}",
        }

    def drawn(self, figures: Chair) -> list[Figure]:
        """See `Evaluator`."""
        return [
            Figure("CHAIR_I, hallucinated of what descriptions mention", figures.chair_i, "less", figures.delta),
            Figure("recall of descriptions", figures.recall, "more"),
            Figure("words a description", figures.mean_words, share=False),
        ]

    def summary(self, figures: Chair | None, p: Mapping[str, float], holm: Mapping[str, float]) -> dict[str, Any]:
        """See `Evaluator`."""
        if figures is None:
            return {"chair": None, "chair_i_delta": None}
        shown = {name: value for name, value in vars(figures).items() if name not in ("rows", "delta")}
        return {"chair": shown, "chair_i_delta": figures.delta}
