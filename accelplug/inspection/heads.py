"""inspect() of what single heads do to a picture: one that is guided away from each, beside the one that is not."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from accelplug import compat, show
from accelplug.errors import AccelplugError, UnsupportedError
from accelplug.hosts.clips import clip_of
from accelplug.hosts.diffusers import DenoiserHost
from accelplug.hosts.host import Setup
from accelplug.inspection import drawing
from accelplug.patches.guidance.headhunter import Head, HeadHunter
from accelplug.plug import apply
from accelplug.show import Shown, table

if TYPE_CHECKING:
    from rich.table import Table

PICTURE = 256
"""Pixels of a picture on a page, at most."""
HEADS_STYLE = """
.heads { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px; margin: 12px 0; }
.heads figure { margin: 0; font-size: 13px; line-height: 1.35; color: var(--soft); }
.heads img { width: 100%; border-radius: 6px; margin-bottom: 5px; }
.heads b { display: block; color: var(--ink); font-weight: 500; }
"""


@dataclass(frozen=True, eq=False, repr=False)
class HeadsInspection(drawing.DrawsItself, Shown):
    """What guidance away from each head makes of one picture. Prints as a table; draws itself.

    Attributes
    ----------
    model, prompt : class of the pipeline, and what it was asked for.
    scale, u : of the guidance, as in `headhunter`.
    heads : (n,) layer and head of each, 0-based.
    moved : (n,) root mean square difference from the picture without guidance, over all frames, in levels of 255.
    picture : uint8 (H, W, 3), without guidance; of a clip its middle frame.
    pictures : (n,) of these, guided away from each head alone.
    """

    model: str
    prompt: str
    scale: float
    u: float
    heads: tuple[Head, ...]
    moved: np.ndarray
    picture: np.ndarray
    pictures: list[np.ndarray]

    @property
    def heading(self) -> str:
        return f"What single heads do in {self.model}"

    @property
    def said(self) -> str:
        """How the pictures were made, in a sentence."""
        return f"{self.prompt}: guided away from one head at a time, drawn {self.u:g} of the way to identity, at scale {self.scale:g}."

    def grid(self) -> np.ndarray:
        """Return `moved` by layer and head, float (layers, heads); 0 where there is no such head."""
        found = np.zeros((max(layer for layer, _ in self.heads) + 1, max(head for _, head in self.heads) + 1))
        for (layer, head), moved in zip(self.heads, self.moved, strict=True):
            found[layer, head] = moved
        return found

    def __rich__(self) -> Table:
        found = table(self.said, "layer", "picture moved by, head by head (levels of 255)")
        for layer in dict.fromkeys(layer for layer, _ in self.heads):
            own = [f"{m:.1f}" for (at, _), m in zip(self.heads, self.moved, strict=True) if at == layer]
            found.add_row(str(layer), ", ".join(own))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything but pictures as plain data."""
        held = super().to_dict()
        del held["picture"], held["pictures"]
        return held

    def figures(self) -> list[Image.Image]:
        """Draw the picture without guidance and those of all heads, and how far each is moved."""
        pictures = drawing.pictures_figure(self.heading, self.said, [self.picture, *self.pictures], self._names())
        moved = "How far each head moves the picture", "Root mean square, in levels of 255.", self.grid()
        return [pictures, drawing.heads_figure(range(len(self.grid())), moved)]

    def page(self) -> str:
        """Return one self-contained HTML page: the picture without guidance, those of all heads, and how far each is moved."""
        figures = "\n".join(
            f'<figure><img alt="" src="{drawing.inlined(_small(pixels))}"><b>{html.escape(name)}</b></figure>'
            for pixels, name in zip([self.picture, *self.pictures], self._names(), strict=True)
        )
        body = [
            f"<h1>{html.escape(self.heading)}</h1>",
            f'<p class="soft">{html.escape(self.said)}</p>',
            f'<div class="heads">{figures}</div>',
            show.as_elements(self),
        ]
        return show.framed(f"accelplug: {self.heading}", "\n".join(body), HEADS_STYLE)

    def _names(self) -> list[str]:
        each = zip(self.heads, self.moved, strict=True)
        return ["without guidance", *(f"layer {layer}, head {head}: {moved:.1f}" for (layer, head), moved in each)]


def heads_of(pipe: Any) -> dict[int, int]:
    """Return how many heads each layer of a pipeline's denoiser has that rules can name; of several denoisers, which must have the same.

    Raises
    ------
    UnsupportedError
        If denoisers have other heads, or one does not say how many there are.
    """
    parts = DenoiserHost.parts(pipe)
    heads, *others = map(_heads_of, DenoiserHost.of(pipe, parts, Setup()))
    if not heads or None in heads.values() or any(other != heads for other in others):
        what = (
            f"{', '.join(parts)}, whose heads are not the same"
            if others
            else "attention that does not say how many heads it has"
        )
        raise UnsupportedError(f"Heads are tried one by one, by layer and number, and {type(pipe).__name__} has {what}.")
    return {layer: int(number or 0) for layer, number in sorted(heads.items())}


def _heads_of(host: DenoiserHost) -> dict[int, int | None]:
    return {
        record.site.layer: getattr(record.module, "heads", None) or getattr(record.module, "num_heads", None)
        for record in host.records
        if record.site is not None and record.site.kind in ("self", "joint") and record.site.layer is not None
    }


def inspect_heads(pipe: Any, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> HeadsInspection:
    """Make a picture, and one guided away from each head alone; see `accelplug.inspect`.

    Parameters
    ----------
    inputs : arguments of the pipeline's call, the prompt among them.
    settings : of `headhunter`, but for heads; layers: whose heads are tried, all if left out; seed: of every picture, 0 if left out.

    Raises
    ------
    AccelplugError
        If no layer is left, or a setting is wrong.
    UnsupportedError
        If it is not a whole pipeline.
    """
    if not (DenoiserHost.knows(pipe) and "compare" in DenoiserHost.abilities_of(pipe)):
        raise UnsupportedError(
            f"inspect, heads: expected a whole pipeline, which makes pictures, got {type(pipe).__name__}."
        )
    layers, seed = settings.get("layers"), settings.get("seed", 0)
    guidance = {key: value for key, value in settings.items() if key not in ("layers", "seed", "heads")}
    config = HeadHunter({**guidance, "heads": "all"}).config
    number = heads_of(pipe)
    tried = [(layer, head) for layer, n in number.items() if layers is None or layer in layers for head in range(n)]
    if not tried:
        raise AccelplugError(
            f"inspect, layers: none of {layers} is one of the {len(number)} layers of {type(pipe).__name__}."
        )

    def made(head: Head | None) -> np.ndarray:
        rule = {"patch": "dense"} if head is None else {"patch": "headhunter", "with": {**guidance, "heads": [list(head)]}}
        with apply(pipe, {"rules": [rule]}, gate="off", deterministic=True):
            clip, _ = clip_of(pipe, {**inputs, "generator": torch.Generator("cpu").manual_seed(seed)})
        return clip

    pictures, moved = [], []
    with show.progress("inspecting", len(tried) + 1) as tell, compat.diffusers.quiet(pipe), torch.no_grad():
        stock = made(None)
        for place, head in enumerate(tried):
            tell(place + 1, f"layer {head[0]}, head {head[1]}")
            clip = made(head)
            pictures.append(_middle_frame(clip))
            moved.append(255 * float(np.sqrt(np.mean((clip - stock) ** 2))))
    prompt = str(inputs.get("prompt", "a picture"))
    name = type(pipe).__name__
    return HeadsInspection(
        name, prompt, config.scale, config.u, tuple(tried), np.array(moved), _middle_frame(stock), pictures
    )


def _middle_frame(clip: np.ndarray) -> np.ndarray:
    """The middle frame of a clip in [0, 1], uint8."""
    return (clip[len(clip) // 2] * 255).round().clip(0, 255).astype(np.uint8)


def _small(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(pixels)
    picture.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    return picture
