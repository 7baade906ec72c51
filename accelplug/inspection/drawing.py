"""Drawings of where a model looks, made of plain arrays: heat maps on a picture; masses and heads, by layer."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from accelplug import files

SHEET, EDGE, GAP = 1600, 40, 16
"""Pixels: width of a figure, of its margin, and between what stands side by side."""
TITLES, HIGH, WIDE, GUTTER = 118, 330, 680, 60
"""Pixels: of the titles above, of a chart, and of the room for its scale on the left."""
PAPER, INK, SOFT, LINE = (255, 255, 255), (29, 32, 36), (100, 107, 117), (226, 227, 223)
SPANS = {"picture": (194, 87, 26), "system text": (150, 157, 166), "question": (45, 108, 223)}
"""Colours of what a prompt has: the picture, the text ahead of the user's turn, and what the user asks."""
MAPS = 6
"""Layers that heat maps are drawn for, spread over depth."""
PICTURES_WIDE = 6
"""Pictures side by side."""
MAPS_SAID = "Attention of the last token, with which the answer begins, mean over heads; each map has its own peak."
MASSES_SAID = "Of the last token, mean over heads."
HEADS_SAID = "How far a head's output moves without the picture. Marked: the upper half of a layer."
HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], np.float32)
"""Anchors of a perceptually even colour map, dark to light."""


def colours(x: np.ndarray) -> np.ndarray:
    """Return colours (..., 3) uint8 of values in [0, 1]."""
    place = np.clip(x, 0, 1) * (len(HEAT) - 1)
    return np.stack([np.interp(place, range(len(HEAT)), channel) for channel in HEAT.T], -1).round().astype(np.uint8)


def over_depth(layers: int, number: int = MAPS) -> list[int]:
    """Return up to `number` indices from the first layer to the last, evenly spaced."""
    return sorted({round(x) for x in np.linspace(0, layers - 1, min(number, layers))})


def stacked(figures: Sequence[Image.Image]) -> bytes:
    """Return figures one under another as a PNG file."""
    sheet = Image.new("RGB", (SHEET, sum(figure.height for figure in figures)), PAPER)
    top = 0
    for figure in figures:
        sheet.paste(figure, (0, top))
        top += figure.height
    return _png(sheet)


def inlined(figure: Image.Image) -> str:
    """Return a figure as the address that shows it in a page."""
    return "data:image/png;base64," + base64.b64encode(_png(figure)).decode()


def _png(figure: Image.Image) -> bytes:
    file = io.BytesIO()
    figure.save(file, "PNG", optimize=True)
    return file.getvalue()


def _figure(height: int, title: str, under: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (SHEET, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (EDGE, 30), title, 28)
    _text(draw, (EDGE, 70), under, 18, SOFT)
    return sheet, draw


def _text(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, ink: Any = INK, anchor: str = "la"
) -> None:
    draw.text(at, text, ink, _font(size), anchor)


def _scale(sheet: Image.Image, draw: ImageDraw.ImageDraw, right: int, top: int, largest: str) -> None:
    """A colour bar that ends at `right`."""
    end = right - round(draw.textlength(largest, _font(18))) - 8
    bar = np.broadcast_to(colours(np.linspace(0, 1, 160)), (16, 160, 3))
    sheet.paste(Image.fromarray(np.ascontiguousarray(bar)), (end - 160, top))
    _text(draw, (end - 168, top + 8), "0", 18, SOFT, "rm")
    _text(draw, (right, top + 8), largest, 18, SOFT, "rm")


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def heat_maps(
    attention: np.ndarray,
    layers: Sequence[int],
    sinks: Sequence[np.ndarray],
    picture: np.ndarray | None,
    grid: tuple[int, int] | None,
    width: int,
) -> tuple[list[Image.Image], list[tuple[str, str]]]:
    """Draw an image, and on it the attention to it in a few layers from the first to the last.

    Parameters
    ----------
    attention : (L, tokens), attention to the image's tokens.
    layers : numbers of the L layers.
    sinks : by layer, the tokens that are marked.
    picture : uint8 (H, W, 3), or None for a grey ground.
    grid : rows and columns of the tokens; None where they lie on no single grid: they are drawn in reading order, on grey.
    width : pixels of a map; tall ones are narrower.

    Returns
    -------
    maps, captions : the image and the maps; what each shows, and more about it.
    """
    lie = f"{attention.shape[1]} tokens, reading order" if grid is None else f"{grid[1]} x {grid[0]} tokens"
    if grid is None:
        columns = math.ceil(math.sqrt(attention.shape[1]))
        grid, picture = (-(-attention.shape[1] // columns), columns), None
    shape = picture.shape[:2] if picture is not None else grid
    shrink = max(1.0, shape[0] / shape[1] / 1.6)
    size = round(width / shrink), max(1, round(width / shrink * shape[0] / shape[1]))
    ground = Image.new("RGB", size, (150, 150, 150))
    if picture is not None:
        ground = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
    maps, captions = [ground], [("picture" if picture is not None else "picture not shown", lie)]
    for layer in over_depth(len(attention)):
        heat = attention[layer]
        maps.append(overlay(ground, heat, grid))
        for token in sinks[layer]:
            _mark(ImageDraw.Draw(maps[-1]), size, grid, int(token))
        captions.append((f"layer {layers[layer]}", f"picture {heat.sum():.1%}, peak {heat.max():.1%}"))
    return maps, captions


def image_figure(title: str, marks: str, **look: Any) -> Image.Image:
    """Draw what `heat_maps` gives side by side, with what the `marks` say."""
    pitch = (SHEET - 2 * EDGE - MAPS * GAP) // (MAPS + 1)
    maps, captions = heat_maps(**look, width=pitch)
    high = maps[0].height
    sheet, draw = _figure(TITLES + high + 66, title, f"{MAPS_SAID} {marks}")
    _scale(sheet, draw, SHEET - EDGE, 38, "peak")
    for place, (drawn, (name, more)) in enumerate(zip(maps, captions, strict=True)):
        left = EDGE + place * (pitch + GAP)
        sheet.paste(drawn, (left, TITLES))
        _text(draw, (left, TITLES + high + 8), name, 20)
        _text(draw, (left, TITLES + high + 34), more, 17, SOFT)
    return sheet


def pictures_figure(title: str, under: str, pictures: Sequence[np.ndarray], names: Sequence[str]) -> Image.Image:
    """Draw pictures of one size, uint8 (H, W, 3) each, in rows of `PICTURES_WIDE`, with a name under each."""
    pitch = (SHEET - 2 * EDGE - (PICTURES_WIDE - 1) * GAP) // PICTURES_WIDE
    high = round(pitch * pictures[0].shape[0] / pictures[0].shape[1])
    sheet, draw = _figure(TITLES + math.ceil(len(pictures) / PICTURES_WIDE) * (high + 44), title, under)
    for place, (pixels, name) in enumerate(zip(pictures, names, strict=True)):
        row, column = divmod(place, PICTURES_WIDE)
        left, top = EDGE + column * (pitch + GAP), TITLES + row * (high + 44)
        sheet.paste(Image.fromarray(pixels).resize((pitch, high), Image.Resampling.LANCZOS), (left, top))
        _text(draw, (left, top + high + 8), name, 18)
    return sheet


def overlay(ground: Image.Image, heat: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """A heat map on a dimmed picture; where there is more, less of the picture shows."""
    cells = np.zeros(grid, np.float32)
    cells.flat[: len(heat)] = heat / max(float(heat.max()), 1e-12)
    strength = Image.fromarray(np.round(255 * (0.35 + 0.55 * cells)).astype(np.uint8)).resize(ground.size, 0)
    dim = ground.convert("L").point(lambda x: 0.75 * x).convert("RGB")
    return Image.composite(Image.fromarray(colours(cells)).resize(ground.size, 0), dim, strength)


def _mark(draw: ImageDraw.ImageDraw, size: tuple[int, int], grid: tuple[int, int], token: int) -> None:
    row, column = divmod(token, grid[1])
    height, width = size[1] / grid[0], size[0] / grid[1]
    x, y, half = (column + 0.5) * width, (row + 0.5) * height, max(3.0, min(5.0, min(height, width) / 4))
    draw.rectangle((x - half, y - half, x + half, y + half), outline=(90, 240, 250), width=2)


def layer_figure(layers: Sequence[int], masses: Sequence[np.ndarray], vhd: np.ndarray, chosen: np.ndarray) -> Image.Image:
    """Draw masses of the three spans by layer, and VHD by layer and head, side by side.

    Parameters
    ----------
    layers : numbers of the L layers.
    masses : (L,) each, in [0, 1]: attention to what `SPANS` names.
    vhd : (L, H), vision-aware head divergence.
    chosen : bool (L, H), heads that get a dot.
    """
    sheet, draw = _figure(TITLES + HIGH + 80, "Attention by layer", MASSES_SAID)
    _masses(draw, EDGE + GUTTER, layers, masses)
    _heads(sheet, draw, SHEET - EDGE - WIDE, layers, vhd, chosen)
    return sheet


def _masses(draw: ImageDraw.ImageDraw, left: int, layers: Sequence[int], masses: Sequence[np.ndarray]) -> None:
    """Bars by layer, the spans one on another."""
    at = left + WIDE
    for name, ink in reversed(SPANS.items()):
        at -= round(draw.textlength(name, _font(18)))
        _text(draw, (at, 48), name, 18, SOFT, "lm")
        draw.rectangle((at - 24, 40, at - 8, 56), fill=ink)
        at -= 46
    for part in (0, 0.5, 1):
        y = TITLES + HIGH * (1 - part)
        draw.line((left - 6, y, left + WIDE, y), fill=LINE)
        _text(draw, (left - 10, y), f"{part:.0%}", 17, SOFT, "rm")
    pitch = WIDE / len(layers)
    space = min(6.0, pitch / 5)
    for i in range(len(layers)):
        floor = float(TITLES + HIGH)
        for mass, ink in zip(masses, SPANS.values(), strict=True):
            roof = floor - HIGH * float(mass[i])
            if floor - roof >= 1:
                draw.rectangle((left + i * pitch + space / 2, roof, left + (i + 1) * pitch - space / 2, floor - 1), fill=ink)
            floor = roof
    _layer_ticks(draw, layers, left, pitch)


def _heads(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    left: int,
    layers: Sequence[int],
    vhd: np.ndarray,
    chosen: np.ndarray,
) -> None:
    """A cell for each layer and head, as light as the head's VHD is large."""
    _text(draw, (left - GUTTER, 30), "What the picture changes in each head", 28)
    _text(draw, (left - GUTTER, 70), HEADS_SAID, 18, SOFT)
    largest = max(float(vhd.max()), 1e-12)
    _scale(sheet, draw, SHEET - EDGE, 38, f"{largest:.2g}")
    _squares(draw, left, layers, vhd / largest, chosen)


def heads_figure(layers: Sequence[int], *panels: tuple[str, str, np.ndarray]) -> Image.Image:
    """Draw a value by layer and head, or two of them side by side.

    Parameters
    ----------
    layers : numbers of the L layers.
    panels : title, the line under it, and values (L, H) of 0 or more; each has its own peak.
    """
    sheet, draw = _figure(TITLES + HIGH + 80, "", "")
    for left, (title, says, values) in zip((EDGE + GUTTER, SHEET - EDGE - WIDE), panels, strict=False):
        largest = max(float(values.max()), 1e-12)
        _text(draw, (left - GUTTER, 30), title, 28)
        _text(draw, (left - GUTTER, 70), says, 18, SOFT)
        _scale(sheet, draw, left + WIDE, 38, f"{largest:.2g}")
        _squares(draw, left, layers, values / largest, np.zeros(values.shape, bool))
    return sheet


def _squares(draw: ImageDraw.ImageDraw, left: int, layers: Sequence[int], shares: np.ndarray, chosen: np.ndarray) -> None:
    """A cell for each layer and head, as light as its share (L, H) of the largest; a dot on those that are chosen."""
    depth, heads = shares.shape
    pitch, tall = WIDE / depth, HIGH / heads
    for i in range(depth):
        for h in range(heads):
            value = shares[i, h]
            box = left + i * pitch, TITLES + h * tall, left + (i + 1) * pitch - 1, TITLES + (h + 1) * tall - 1
            draw.rectangle(box, fill=tuple(colours(value).tolist()))
            if chosen[i, h] and min(pitch, tall) >= 6:
                x, y, r = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, min(5.0, min(pitch, tall) / 4)
                draw.ellipse((x - r, y - r, x + r, y + r), fill=INK if value > 0.6 else PAPER)
    for h in range(0, heads, max(1, -(-heads // 16))):
        _text(draw, (left - 10, TITLES + (h + 0.5) * tall), str(h), 17, SOFT, "rm")
    _text(draw, (left - 10, TITLES + HIGH + 8), "head", 17, SOFT, "ra")
    _layer_ticks(draw, layers, left, pitch)


def _layer_ticks(draw: ImageDraw.ImageDraw, layers: Sequence[int], left: int, pitch: float) -> None:
    for i in range(0, len(layers), max(1, math.ceil(34 / pitch))):
        _text(draw, (left + (i + 0.5) * pitch, TITLES + HIGH + 8), str(layers[i]), 17, SOFT, "ma")
    _text(draw, (left + len(layers) * pitch / 2, TITLES + HIGH + 34), "layer", 17, SOFT, "ma")


class DrawsItself:
    """A result that draws itself; a subclass says how, by `figures`."""

    def figures(self) -> list[Image.Image]:
        """Return what is drawn of it."""
        raise NotImplementedError

    def to_png(self, path: str | Path) -> Path:
        """Write `figures`, one under another.

        Raises
        ------
        AccelplugError
            If it cannot be written.
        """
        return files.write(path, stacked(self.figures()))
