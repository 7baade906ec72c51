"""Moving shapes: the scenes, the captions and the detector of the bundled text-to-video model.

A caption names one or two coloured shapes and where each of them goes: ``"a red square moves left, a blue circle moves
up"``. A :class:`Scene` adds what the caption leaves open (how large, where, how far) and :func:`render` draws it at any
number of frames and any size. :func:`detect` goes the other way, by plain image processing, so that what a model made
can be held against what it was asked for.

The shape named first is on the left. This rule is part of the data: it spares a small model the choice.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

BACKGROUND = (24, 26, 34)  # red, green, blue in 0..255
COLOURS = {"red": (230, 60, 60), "green": (60, 200, 90), "blue": (70, 110, 240), "yellow": (240, 205, 60)}
KINDS = ("square", "circle", "triangle")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # unit steps in (height, width)


@dataclass(frozen=True, order=True)
class Shape:
    """What a caption says about one shape."""

    colour: str
    kind: str
    direction: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.kind} moves {self.direction}"


@dataclass(frozen=True)
class Body:
    """A shape with everything that its caption leaves open.

    Attributes
    ----------
    shape : Shape
    size, travel : float
        Side length and way covered over the clip, in units of the canvas (see `_unit`).
    y, x : float
        Where the path lies between the two ends of its free range, each in 0..1.
    """

    shape: Shape
    size: float
    travel: float
    y: float
    x: float


@dataclass(frozen=True)
class Scene:
    """One or two bodies, the one on the left first."""

    bodies: tuple[Body, ...]

    @property
    def caption(self) -> str:
        return caption(body.shape for body in self.bodies)


def caption(shapes: Iterable[Shape]) -> str:
    """The caption of some shapes, the one on the left first."""
    return ", ".join(map(str, shapes))


def parse(text: str) -> tuple[Shape, ...]:
    """The shapes that a caption names, in its order."""
    shapes = []
    for clause in text.lower().split(","):
        words = clause.split()
        if len(words) != 5 or words[0] != "a" or words[3] != "moves":
            raise ValueError(f"not a caption of shapes: {text!r}")
        if words[1] not in COLOURS or words[2] not in KINDS or words[4] not in DIRECTIONS:
            raise ValueError(f"unknown word in {text!r}")
        shapes.append(Shape(words[1], words[2], words[4]))
    return tuple(shapes)


def _held_out() -> tuple[str, ...]:
    """50 of the 864 pairs, spread evenly over all of them, by arithmetic alone so that they stay the same for ever."""
    pairs = [pair for pair in itertools.combinations(SHAPES, 2) if pair[0].colour != pair[1].colour]
    picked = [pairs[(i * 331 + 7) % len(pairs)] for i in range(50)]  # 331 and 864 share no factor: 50 different pairs
    return tuple(caption(pair if i % 2 else pair[::-1]) for i, pair in enumerate(picked))


SHAPES = tuple(Shape(*words) for words in itertools.product(COLOURS, KINDS, DIRECTIONS))
HELD_OUT_CAPTIONS = _held_out()
_HELD_OUT_PAIRS = frozenset(frozenset(parse(text)) for text in HELD_OUT_CAPTIONS)


def sample_caption(rng: np.random.Generator, singles: float = 0.3) -> str:
    """A random caption for training: never one of the held-out pairs, in neither order.

    Parameters
    ----------
    rng : numpy.random.Generator
    singles : float
        Share of captions with only one shape.
    """
    first = SHAPES[rng.integers(len(SHAPES))]
    if rng.random() < singles:
        return caption([first])
    while True:
        second = SHAPES[rng.integers(len(SHAPES))]
        if second.colour != first.colour and frozenset((first, second)) not in _HELD_OUT_PAIRS:
            return caption([first, second])


def sample_scene(rng: np.random.Generator, text: str | None = None, size: tuple[float, float] = (0.24, 0.4)) -> Scene:
    """A random scene for a caption, or for a random caption of the training set.

    Parameters
    ----------
    rng : numpy.random.Generator
    text : str, optional
    size : (float, float)
        Range of side lengths, in units of the canvas. At most 0.4, so that two shapes never meet.
    """
    shapes = parse(sample_caption(rng) if text is None else text)
    return Scene(
        tuple(Body(shape, rng.uniform(*size), rng.uniform(0.18, 0.22), rng.random(), rng.random()) for shape in shapes)
    )


def _unit(height: int, width: int) -> float:
    """The length, in pixels, that sizes are measured in: two shapes of 0.4 that move by 0.22 fit side by side."""
    return min(height, 0.8 * width)


def _distance(kind: str, dy: np.ndarray, dx: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels from the outline of a shape that fills a box of side ``2 * radius``; inside is < 0."""
    if kind == "square":
        return np.maximum(np.abs(dy), np.abs(dx)) - radius
    if kind == "circle":
        return np.hypot(dy, dx) - radius
    return np.maximum(dy - radius, (2 * np.abs(dx) - dy - radius) / np.sqrt(5))


def render(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    """Draw a scene with smooth edges.

    Returns
    -------
    numpy.ndarray
        uint8 of shape (frames, height, width, 3).
    """
    clip = np.broadcast_to(np.asarray(BACKGROUND, np.float32), (frames, height, width, 3)).copy()
    time = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None]
    rows, columns = np.ogrid[0.5:height, 0.5:width]
    column_width = width / max(1, len(scene.bodies))  # every body stays in its own part of the canvas
    for index, body in enumerate(scene.bodies):
        step_y, step_x = DIRECTIONS[body.shape.direction]
        radius, travel = body.size * _unit(height, width) / 2, body.travel * _unit(height, width)
        start_y, start_x = max(0, -step_y) * travel, max(0, -step_x) * travel
        free_y = height - 2 * radius - abs(step_y) * travel
        free_x = column_width - 2 * radius - abs(step_x) * travel
        centre_y = radius + start_y + body.y * free_y + time * step_y * travel
        centre_x = radius + start_x + body.x * free_x + time * step_x * travel + index * column_width
        distance = _distance(body.shape.kind, rows[None] - centre_y, columns[None] - centre_x, radius)
        coverage = np.clip(0.5 - distance, 0, 1)[..., None].astype(np.float32)
        clip += coverage * (np.asarray(COLOURS[body.shape.colour], np.float32) - clip)
    return np.rint(clip).astype(np.uint8)


def _coverage(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every pixel of (frames, height, width): how far it is from the background towards its colour, and which one.

    A pixel on an edge is a blend of a colour and the background: its direction away from the background tells which
    colour, its length how much of it.
    """
    offset = clip.astype(np.float32) - np.asarray(BACKGROUND, np.float32)
    palette = np.asarray(list(COLOURS.values()), np.float32) - np.asarray(BACKGROUND, np.float32)
    length = np.linalg.norm(palette, axis=1)
    along = offset @ (palette / length[:, None]).T
    colour = along.argmax(axis=-1)
    return np.take_along_axis(along / length, colour[..., None], axis=-1)[..., 0], colour


def foreground(clip: np.ndarray) -> np.ndarray:
    """Where the shapes are: bool of shape (frames, height, width) for a uint8 clip of (frames, height, width, 3)."""
    return _coverage(clip)[0] > 0.5


def _component(mask: np.ndarray) -> np.ndarray:
    """The connected part, in space and time, of a (frames, height, width) mask that holds the mask's densest spot.

    A moving shape overlaps with itself a frame later, so that one part is one shape, followed through the clip.
    """
    _, height, width = mask.shape
    reach = max(1, min(height, width) // 16)
    padded = np.pad(mask, ((0, 0), (reach + 1, reach), (reach + 1, reach))).astype(np.int32)
    total = padded.cumsum(axis=1).cumsum(axis=2)
    span = 2 * reach + 1
    density = total[:, span:, span:] - total[:, :-span, span:] - total[:, span:, :-span] + total[:, :-span, :-span]
    part = np.zeros_like(mask)
    part.flat[np.where(mask, density, -1).argmax()] = True
    part &= mask
    while True:
        grown = part.copy()
        grown[1:] |= part[:-1]
        grown[:-1] |= part[1:]
        grown[:, 1:] |= part[:, :-1]
        grown[:, :-1] |= part[:, 1:]
        grown[:, :, 1:] |= part[:, :, :-1]
        grown[:, :, :-1] |= part[:, :, 1:]
        grown &= mask
        if np.array_equal(grown, part):
            return part
        part = grown


def _kind(part: np.ndarray) -> str:
    """The kind whose outline in the part's own box overlaps best with it; `part` is (height, width)."""
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    box = part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    dy = (np.arange(box.shape[0]) + 0.5) / box.shape[0] * 2 - 1
    dx = (np.arange(box.shape[1]) + 0.5) / box.shape[1] * 2 - 1

    def overlap(kind: str) -> float:
        outline = _distance(kind, dy[:, None], dx[None], 1.0) < 0
        return (box & outline).sum() / (box | outline).sum()

    return max(KINDS, key=overlap)


def _describe(colour: str, part: np.ndarray) -> Shape | None:
    """The shape that a part of the clip, (frames, height, width), shows; None where it is not there or stands still."""
    frames, height, width = part.shape
    area = part.sum(axis=(1, 2))
    seen = np.flatnonzero(area > 0.004 * height * width)
    if len(seen) < max(2, 0.75 * frames):
        return None
    kinds = [_kind(part[frame]) for frame in seen]
    rows = part[seen].sum(axis=2) @ np.arange(height) / area[seen]
    columns = part[seen].sum(axis=1) @ np.arange(width) / area[seen]
    ends = max(1, len(seen) // 6)
    way_y = rows[-ends:].mean() - rows[:ends].mean()
    way_x = columns[-ends:].mean() - columns[:ends].mean()
    if max(abs(way_y), abs(way_x)) < 0.04 * _unit(height, width):
        return None
    vertical = abs(way_y) > abs(way_x)
    direction = ("down" if way_y > 0 else "up") if vertical else ("right" if way_x > 0 else "left")
    return Shape(colour, max(KINDS, key=kinds.count), direction)


def detect(clip: np.ndarray) -> tuple[Shape, ...]:
    """The moving shapes in a clip, sorted.

    Every colour is looked through twice, so that a shape too many does not go unnoticed.

    Parameters
    ----------
    clip : numpy.ndarray
        uint8 of shape (frames, height, width, 3).
    """
    coverage, nearest = _coverage(clip)
    found = []
    for index, colour in enumerate(COLOURS):
        mask = (coverage > 0.5) & (nearest == index)
        for _ in range(2):
            part = _component(mask)
            found.append(_describe(colour, part))
            mask &= ~part
    return tuple(sorted(shape for shape in found if shape is not None))


def agreement(clip: np.ndarray, text: str) -> bool:
    """Whether a uint8 clip of shape (frames, height, width, 3) shows what its caption says, and nothing besides."""
    return detect(clip) == tuple(sorted(parse(text)))
