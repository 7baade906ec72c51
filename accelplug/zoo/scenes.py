"""Scenes of coloured shapes: the pictures, captions and questions of the bundled vision-language model.

A :class:`Scene` is the truth: which things there are, their colours, sizes and places. Everything else follows from it by
arithmetic: the picture, a long caption, yes/no questions. Things come in themes, so that some often stand together (a star
seldom stands without a moon); many are small, pale and drawn on noise. A model that learns such pictures also learns to
expect what is usual, and says so where it should have looked: the hallucination that the attention patches treat.

Scenes are numbered. The numbers of :data:`SPLITS` are frozen, training takes others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96
"""Height and width of a picture, in pixels."""

THEMES = {
    "sky": ("star", "moon", "ring", "circle"),
    "village": ("house", "tree", "flag", "arrow"),
    "table": ("cup", "heart", "diamond", "cross"),
    "blocks": ("square", "triangle", "hexagon", "bar"),
}
KINDS = tuple(kind for kinds in THEMES.values() for kind in kinds)
COLOURS = {
    "red": (215, 60, 55),
    "green": (60, 180, 85),
    "blue": (70, 105, 230),
    "yellow": (230, 200, 60),
    "purple": (160, 80, 200),
    "orange": (240, 140, 45),
}
SPLITS = {"dev": range(10_000_000, 10_000_200), "test": range(20_000_000, 20_000_300)}
"""Numbers of the scenes that are kept from training: `dev` to choose settings on, `test` to report."""

USUAL, ODD = 0.75, 0.05
"""How often a kind stands in a scene of its own theme, and of another."""

CAPTION_PROMPT = "Please describe this image in detail."
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")


def article(word: str) -> str:
    """``a`` or ``an``."""
    return "an" if word[0] in "aeiou" else "a"


def plural(kind: str) -> str:
    """More than one of a kind."""
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


@dataclass(frozen=True)
class Thing:
    """One shape: where its centre is and half its side, in pixels; how far its colour stands out, 0..1."""

    kind: str
    colour: str
    y: float
    x: float
    radius: float
    contrast: float

    @property
    def place(self) -> str:
        """One of nine places: ``at the top left``, ``on the right``, ``in the center``."""
        row, column = ROWS[int(3 * self.y / SIDE)], COLUMNS[int(3 * self.x / SIDE)]
        if not row:
            return f"on the {column}" if column else "in the center"
        return f"at the {row} {column}".rstrip()

    @property
    def size(self) -> str:
        """``small``, ``large``, or nothing in between."""
        return "small" if self.radius < 7.5 else "large" if self.radius > 12 else ""

    def __str__(self) -> str:
        words = (article(self.size or self.colour), self.size, self.colour, self.kind, self.place)
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Scene:
    """The things of a picture, the largest first."""

    number: int
    things: tuple[Thing, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that are there, each once, the largest first."""
        return tuple(dict.fromkeys(thing.kind for thing in self.things))

    def count(self, kind: str) -> int:
        """How many things of a kind there are."""
        return sum(thing.kind == kind for thing in self.things)

    @property
    def caption(self) -> str:
        """Every thing with its size, colour and place, and how the largest two lie to each other."""
        listed = [str(thing) for thing in self.things]
        text = f"The image shows {', '.join(listed[:-1])} and {listed[-1]}."
        first, second = self.things[:2]
        if abs(first.y - second.y) > abs(first.x - second.x):
            relation = "above" if first.y < second.y else "below"
        else:
            relation = "left of" if first.x < second.x else "right of"
        return f"{text} The {first.colour} {first.kind} is {relation} the {second.colour} {second.kind}."


def sample(number: int, usual: float = USUAL) -> Scene:
    """The scene of that number; the same for ever. `usual` : how often a kind stands in a scene of its own theme."""
    rng = np.random.default_rng(number)
    theme = list(THEMES)[rng.integers(len(THEMES))]
    chance = {kind: usual if kind in THEMES[theme] else ODD for kind in KINDS}
    kinds: list[str] = []
    while len(kinds) < 2:
        kinds = [kind for kind in KINDS if rng.random() < chance[kind]]
    kinds += [kind for kind in kinds if rng.random() < 0.15]
    things: list[Thing] = []
    for kind in rng.permutation(kinds)[:7]:
        radius = float(np.exp(rng.uniform(math.log(4.5), math.log(16))))
        for _ in range(60):  # a free place; a crowded scene has fewer things
            y, x = rng.uniform(radius + 1, SIDE - radius - 1, 2)
            if all(math.hypot(y - t.y, x - t.x) > 1.1 * (radius + t.radius) for t in things):
                colour = list(COLOURS)[rng.integers(len(COLOURS))]
                things.append(Thing(str(kind), colour, float(y), float(x), radius, float(rng.uniform(0.35, 1.0))))
                break
    return Scene(number, tuple(sorted(things, key=lambda thing: -thing.radius)))


# -------------------------------------------------------------------------------------------------------------- drawing

Points = Sequence[tuple[float, float]]


def _polar(corners: int, radii: Sequence[float]) -> Points:
    angles = (2 * math.pi * i / corners - math.pi / 2 for i in range(corners))
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _heart() -> Points:
    turns = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


_T = 1 / 3
_OUTLINES: dict[str, Points] = {  # (x, y) in a box of -1..1, y downwards
    "circle": _polar(40, [1]),
    "ring": _polar(40, [1]),
    "moon": _polar(40, [1]),
    "star": _polar(10, [1, 0.42]),
    "hexagon": _polar(6, [1]),
    "diamond": [(0, -1), (0.65, 0), (0, 1), (-0.65, 0)],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "bar": [(-1, -0.35), (1, -0.35), (1, 0.35), (-1, 0.35)],
    "triangle": [(0, -0.9), (1, 0.85), (-1, 0.85)],
    "cross": [
        *((-_T, -1), (_T, -1), (_T, -_T), (1, -_T), (1, _T), (_T, _T)),
        *((_T, 1), (-_T, 1), (-_T, _T), (-1, _T), (-1, -_T), (-_T, -_T)),
    ],
    "arrow": [(1, 0), (0.1, -0.8), (0.1, -0.3), (-1, -0.3), (-1, 0.3), (0.1, 0.3), (0.1, 0.8)],
    "house": [(0, -1), (1, -0.15), (0.75, -0.15), (0.75, 1), (-0.75, 1), (-0.75, -0.15), (-1, -0.15)],
    "tree": [(0, -1), (0.8, 0.4), (0.2, 0.4), (0.2, 1), (-0.2, 1), (-0.2, 0.4), (-0.8, 0.4)],
    "flag": [(-0.75, -1), (0.95, -0.45), (-0.45, 0.1), (-0.45, 1), (-0.75, 1)],
    "cup": [(-0.8, -0.7), (0.5, -0.7), (0.95, -0.35), (0.95, 0.15), (0.4, 0.4), (0.3, 0.85), (-0.6, 0.85)],
    "heart": _heart(),
}
_HOLES: dict[str, Points] = {
    "ring": _polar(40, [0.55]),
    "moon": [(x * 0.85 + 0.5, y * 0.85 - 0.15) for x, y in _polar(40, [1])],
    "cup": [(0.55, -0.35), (0.75, -0.25), (0.75, 0.05), (0.45, 0.15)],
}
_FINE = 4  # drawn this much larger, then averaged: smooth edges


def _coverage(thing: Thing) -> np.ndarray:
    """How much of every pixel a thing covers: float32 (SIDE, SIDE) in 0..1."""
    canvas = Image.new("L", (SIDE * _FINE, SIDE * _FINE))
    draw = ImageDraw.Draw(canvas)
    for outlines, ink in ((_OUTLINES, 255), (_HOLES, 0)):
        if thing.kind in outlines:
            r = thing.radius
            draw.polygon([(_FINE * (thing.x + r * x), _FINE * (thing.y + r * y)) for x, y in outlines[thing.kind]], fill=ink)
    fine = np.asarray(canvas, np.float32).reshape(SIDE, _FINE, SIDE, _FINE)
    return fine.mean(axis=(1, 3)) / 255


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Returns
    -------
    picture : uint8 (SIDE, SIDE, 3).
    owner : int8 (SIDE, SIDE), which thing of the scene a pixel shows, -1 for none.
    """
    rng = np.random.default_rng(scene.number + 1)
    ground = rng.uniform(80, 150) + rng.uniform(-25, 25, 3)
    tilt = np.linspace(-1, 1, SIDE, dtype=np.float32)
    picture = ground + rng.uniform(-20, 20) * tilt[:, None, None] + rng.uniform(-20, 20) * tilt[None, :, None]
    owner = np.full((SIDE, SIDE), -1, np.int8)
    for index, thing in enumerate(scene.things):
        coverage = _coverage(thing)
        ink = np.asarray(COLOURS[thing.colour], np.float32)
        picture = picture + thing.contrast * coverage[..., None] * (ink - picture)
        owner[coverage > 0.5] = index
    picture = picture + rng.normal(0, 16, (SIDE, SIDE, 3))
    return np.rint(np.clip(picture, 0, 255)).astype(np.uint8), owner


# ------------------------------------------------------------------------------------------------------------ questions


@dataclass(frozen=True)
class Query:
    """A yes/no question about a scene. `task`: existence, colour, count or position."""

    task: str
    text: str
    answer: bool


def existence(scene: Scene, kind: str) -> Query:
    """Whether a kind is there."""
    return Query("existence", f"Is there {article(kind)} {kind} in the image?", kind in scene.kinds)


def attribute_pair(scene: Scene, task: str, rng: np.random.Generator) -> tuple[Query, Query] | None:
    """Two questions of a task about one thing, the first true and the second false; None where the scene has no thing for it."""
    single = [thing for thing in scene.things if scene.count(thing.kind) == 1]
    if task == "count":
        kind = scene.kinds[rng.integers(len(scene.kinds))]
        number = min(scene.count(kind), 2)

        def text(n: int) -> str:
            return f"Is there only one {kind} in the image?" if n == 1 else f"Are there two {plural(kind)} in the image?"

        return Query(task, text(number), True), Query(task, text(3 - number), False)
    if not single:
        return None
    thing = single[rng.integers(len(single))]
    if task == "colour":
        other = [colour for colour in COLOURS if colour != thing.colour][rng.integers(len(COLOURS) - 1)]
        return (
            Query(task, f"Is the {thing.kind} {thing.colour}?", True),
            Query(task, f"Is the {thing.kind} {other}?", False),
        )
    vertical = rng.random() < 0.5
    near, far = (thing.y, ("top", "bottom")) if vertical else (thing.x, ("left", "right"))
    if abs(near / SIDE - 0.5) < 0.1:
        return None
    right, wrong = far if near < SIDE / 2 else far[::-1]
    ask = f"Is the {thing.kind} in the {{}} half of the image?"
    return Query(task, ask.format(right), True), Query(task, ask.format(wrong), False)
