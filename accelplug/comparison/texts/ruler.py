"""RULER's synthetic tasks (arXiv 2404.06654, its release's constructions), with word lists of our own and sizes of our own.

* ``multivalue``: one key with four numbers. ``multikey``: nothing but needles, of which three are asked for.
* ``tracking``: a chain of assignments ``VAR B = VAR A``: which variables have the value that the first was given?
* ``common``: a numbered list in which a few words stand often and all others once. ``frequent``: coded words whose counts fall off as
  ``k^-2``; the most frequent one is dots, and the next three are asked for.

An answer counts by the share of its references that it contains. Room is in tokens.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from random import Random

from accelplug.comparison.texts.context import Encode, Part, TaskQuestion
from accelplug.comparison.texts.words import ADJECTIVES, NOUNS, digits, distinct, letters, name

NEEDLE = "One of the special magic numbers for {key} is: {value}."
ASK = (
    "\nWhat is the special magic number for {key} mentioned in the text above? "
    "The special magic number for {key} mentioned in the text above is"
)
VALUES = 4
HOPS = 4
OFTEN, LIST_SHARE = 5, 0.5
"""Words that stand often, and the share of the list that they make."""
KEYS_ASKED = 3


def multivalue(rng: Random, room: int, encode: Encode) -> Part:
    """One key with several numbers, at random depths."""
    key, values = name(rng), distinct(rng, VALUES, digits)
    depths = sorted(rng.random() for _ in values)
    planted = tuple((depth, NEEDLE.format(key=key, value=value)) for depth, value in zip(depths, values, strict=True))
    ask = (
        f"\nWhat are all the special magic numbers for {key} mentioned in the text above? "
        f"The special magic numbers for {key} mentioned in the text above are"
    )
    return Part((TaskQuestion(ask, tuple(values), depths[0]),), planted)


def tracking(rng: Random, room: int, encode: Encode) -> Part:
    """A chain of assignments, in order, at random depths."""
    value, variables = digits(rng, 5), [word.upper() for word in distinct(rng, HOPS + 1, partial(letters, length=5))]
    depths = sorted(rng.random() for _ in variables)
    lines = [f"VAR {variables[0]} = {value}."]
    lines += [f"VAR {new} = VAR {old}." for old, new in pairwise(variables)]
    ask = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain of "
        f"variable assignment in the text above, {len(variables)} variables are assigned the value {value}, they are:"
    )
    return Part((TaskQuestion(ask, tuple(variables), depths[0]),), tuple(zip(depths, lines, strict=True)))


def multikey(rng: Random, room: int, encode: Encode) -> Part:
    """Nothing but needles."""
    sample = NEEDLE.format(key="gentle-river", value="1234567")
    keys = distinct(rng, max(KEYS_ASKED, room // (len(encode(f"\n{sample}")) + 1)))
    values = [digits(rng) for _ in keys]
    chosen = sorted(rng.sample(range(len(keys)), KEYS_ASKED))
    asked = tuple(TaskQuestion(ASK.format(key=keys[i]), (values[i],), i / len(keys)) for i in chosen)
    lines = tuple(NEEDLE.format(key=key, value=value) for key, value in zip(keys, values, strict=True))
    return Part(asked, lines=lines)


def common(rng: Random, room: int, encode: Encode) -> Part:
    """A numbered list in which a few words stand often."""
    number = max(4 * OFTEN, room // len(encode("\n100. candle")))
    times = max(2, round(LIST_SHARE * number / OFTEN))
    often = rng.sample(NOUNS, OFTEN)
    rare = rng.sample(others := [word for word in (*ADJECTIVES, *NOUNS) if word not in often], len(others))
    listed = [*(often * times), *(rare[i % len(rare)] for i in range(number - times * OFTEN))]
    rng.shuffle(listed)
    ask = (
        f"\nQuestion: What are the {OFTEN} most common words in the list above? "
        f"Answer: The top {OFTEN} words that appear most often in the list are:"
    )
    lines = ("A numbered list of words, some of which appear more often than others:",)
    return Part((TaskQuestion(ask, tuple(often)),), lines=lines + tuple(f"{i}. {word}" for i, word in enumerate(listed, 1)))


def frequent(rng: Random, room: int, encode: Encode) -> Part:
    """Coded words, the k-th of them ``n k^-2 / zeta(2)`` times."""
    number = max(24, room // len(encode(" abcxyz")))
    ranked = ["...", *distinct(rng, number, partial(letters, length=6))]
    counts = [max(int(number * rank**-2 / 1.6449), 1 if rank < 5 else 0) for rank in range(1, len(ranked) + 1)]
    counts[4:] = [min(count, counts[3] - 1) for count in counts[4:]]  # the third stands out
    text = [word for word, times in zip(ranked, counts, strict=True) for _ in range(times)]
    rng.shuffle(text)
    ask = (
        "\nQuestion: What are the three most frequently appeared words in the coded text above, dots aside? Answer: According to the "
        "coded text above, the three most frequently appeared words are:"
    )
    lines = ("A coded text:", " ".join(text))
    return Part((TaskQuestion(ask, tuple(ranked[1:4])),), lines=lines)
