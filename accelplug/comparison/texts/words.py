"""Words and sentences of our own: what contexts are filled with, and what is hidden in them. Nothing of it was written by others.

All is drawn from a `random.Random`, whose draws are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


def listed(text: str, between: str = " ") -> tuple[str, ...]:
    """A list that is written as one text."""
    return tuple(text.split(between))


ADJECTIVES = listed(
    "amber bitter bold brave brisk broad calm clear clever cold crisp curious dark deep distant dusty eager early "
    "fair faint fierce gentle golden grand green grey hidden hollow honest humble idle keen kind late lively lonely "
    "loud lucky mellow mild modest narrow noble old pale patient plain proud quick quiet rare rough rusty sharp shy "
    "silent silver simple slender slow small smooth soft solemn steady strange strong sudden sunny sweet tall tame "
    "tender tidy tiny vast warm wild wise young"
)
NOUNS = listed(
    "anchor apple arrow barn basket bell berry boat bottle branch bridge brook bucket candle canyon castle chair "
    "cherry cliff clock cloud coat copper cradle crown desert door drum eagle engine falcon feather fence field "
    "flame flute forest fountain fox garden gate glacier hammer harbour harp hill honey horse island jacket kettle "
    "ladder lake lantern leaf lemon letter lion maple marble market meadow mill mirror moon mountain needle oak "
    "ocean orchard otter paddle palace pebble pepper pine planet plum pocket pond rabbit raven ribbon river robin "
    "saddle salmon shell ship spoon spring stone storm stove swan table temple thunder ticket tower valley velvet "
    "violin wagon walnut whistle willow window winter wolf wool"
)
PEOPLE = listed(
    "the miller|the miller's daughter|an old sailor|the schoolteacher|the baker's son|a travelling merchant|"
    "the innkeeper|the clerk|two carpenters|the gardener|a young doctor|the ferryman|the widow from the hill|"
    "a group of students|the postman|the shepherd|the printer|the night watchman|a stranger in a long coat|"
    "the librarian",
    "|",
)
DEEDS = listed(
    "carried|repaired|painted|described|forgot|borrowed|counted|hid|found|bought|lost|drew|sold|mended|weighed|"
    "cleaned|praised|wrapped|measured|returned",
    "|",
)
PLACES = listed(
    "by the harbour|behind the church|at the edge of the forest|on the market square|in the back of the shop|"
    "under the stone bridge|near the mill|on the road to the coast|in the upper room|beside the well|along the river|"
    "at the top of the stairs|in front of the town hall|close to the old wall|at the end of the lane",
    "|",
)
TIMES = listed(
    "That morning|In the early spring|After the long rain|On the second day|Before the bells rang|"
    "Late in the evening|When the fair was over|Some weeks later|During the harvest|At noon|Once again|"
    "In the following year|While the others slept|As it grew dark|Not long ago",
    "|",
)
ENDINGS = listed(
    "and nobody asked why|because the winter was near|though it was hardly worth the trouble|"
    "so that the children could see it|as had been agreed|and went home without a word|while the rain kept falling|"
    "for the price of a loaf of bread|and told the story for years|until the lamps were lit|but never spoke of it|"
    "as if nothing had happened",
    "|",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
RUN = 12
"""Sentences that a few people and things stay for, so that what comes can be told from what was."""


def name(rng: Random) -> str:
    """An adjective and a noun: ``gentle-river``."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def distinct(rng: Random, number: int, draw: object = name) -> list[str]:
    """So many different names, or what else `draw` gives."""
    found: dict[str, None] = {}
    while len(found) < number:
        found[draw(rng)] = None  # type: ignore[operator]
    return list(found)


def digits(rng: Random, length: int = 7) -> str:
    """A number of so many digits, the first of which is not 0."""
    return str(rng.randrange(10 ** (length - 1), 10**length))


def letters(rng: Random, length: int) -> str:
    """A word that means nothing."""
    return "".join(rng.choice(LETTERS) for _ in range(length))


def sentences(rng: Random) -> Iterator[str]:
    """Sentences without an end, told of a few people and things at a time."""
    while True:
        people, things = rng.sample(PEOPLE, 3), [f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(4)]
        for _ in range(RUN):
            told = f"{rng.choice(people)} {rng.choice(DEEDS)} the {rng.choice(things)}"
            place, ending = f" {rng.choice(PLACES)}", f", {rng.choice(ENDINGS)}"
            said = f"{told}{place if rng.random() < 0.6 else ''}{ending if rng.random() < 0.5 else ''}."
            yield f"{rng.choice(TIMES)} {said}" if rng.random() < 0.5 else said[0].upper() + said[1:]
