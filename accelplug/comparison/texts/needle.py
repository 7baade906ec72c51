"""The needle grid: a number told at some depth of a text, and asked for (Kamradt's needle in a haystack, RULER's single needle).

All depths of a length stand in one text. Each needle is of another kind and has a key of its own, so that one is hardly taken for
another: what is asked is whether the model reads that far, not whether it tells needles apart (that is ``multikey``).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from accelplug.comparison.texts.context import Encode, Part, TaskQuestion
from accelplug.comparison.texts.words import digits, distinct

NEEDLE_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SUBJECTS = (
    "secret code",
    "telephone number",
    "catalogue number",
    "prize",
    "weight in grams",
    "account number",
    "licence plate",
    "distance in metres",
)
ASK_NEEDLE = "\nQuestion: What is the {what}? Answer: The {what} is"


def needles(rng: Random, room: int, encode: Encode, depths: Sequence[float] = NEEDLE_DEPTHS) -> Part:
    """A needle at each depth, 0 for the front and 1 for the end."""
    subjects = rng.sample(SUBJECTS, len(SUBJECTS))
    told = [
        (depth, f"{subjects[i % len(subjects)]} of {key}", digits(rng))
        for i, (depth, key) in enumerate(zip(depths, distinct(rng, len(depths)), strict=True))
    ]
    planted = tuple((depth, f"The {what} is {value}.") for depth, what, value in told)
    return Part(tuple(TaskQuestion(ASK_NEEDLE.format(what=what), (value,), depth) for depth, what, value in told), planted)
