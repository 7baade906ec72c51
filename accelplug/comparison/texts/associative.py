"""Multi-query associative recall: pairs of words, then some of the keys in another order, each followed by its value.

After Arora et al., "Zoology" (arXiv 2312.04927): one reading, many queries. Every query is answered for the model before the next one
comes, so each stands for itself; it is right where every token of the value is the likeliest.
"""

from __future__ import annotations

from random import Random

from accelplug.comparison.texts.context import Encode, Part, TaskQuestion
from accelplug.comparison.texts.words import NOUNS, distinct

QUERIES = 8


def pairs(rng: Random, room: int, encode: Encode) -> Part:
    """As many pairs as there is room for, on lines ``gentle-river: stone``."""
    keys = distinct(rng, max(QUERIES, room // (len(encode("\ngentle-river: stone")) + 1)))
    told = [(key, rng.choice(NOUNS)) for key in keys]
    queries = tuple((f"\n{key}:", f" {value}") for key, value in rng.sample(told, QUERIES))
    asked = (("\nThe same pairs once more, in another order:" + queries[0][0], queries[0][1]), *queries[1:])
    return Part((TaskQuestion(pairs=asked),), lines=("Pairs of words:", *(f"{key}: {value}" for key, value in told)))
