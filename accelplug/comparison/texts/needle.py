"""The needle grid: a number told at some depth of a text, and asked for (Kamradt's needle in a haystack, RULER's single needle).

All depths of a length stand in one text, each with a key of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from accelplug.comparison.texts.context import Encode, Part, TaskQuestion
from accelplug.comparison.texts.words import digits, distinct

NEEDLE = "One of the special magic numbers for {key} is: {value}."
ASK = (
    "\nWhat is the special magic number for {key} mentioned in the text above? "
    "The special magic number for {key} mentioned in the text above is"
)


def needles(rng: Random, room: int, encode: Encode, depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> Part:
    """A needle at each depth, 0 for the front and 1 for the end."""
    told = [(depth, key, digits(rng)) for depth, key in zip(depths, distinct(rng, len(depths)), strict=True)]
    planted = tuple((depth, NEEDLE.format(key=key, value=value)) for depth, key, value in told)
    return Part(tuple(TaskQuestion(ASK.format(key=key), (value,), depth) for depth, key, value in told), planted)
