"""What inspect() says of a vision-language model that has read a prompt: where it looks, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from accelplug.inspection import drawing
from accelplug.inspection.page import looking_page
from accelplug.kernels.vision import outliers
from accelplug.show import Shown, jsonable, table

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Group
    from rich.table import Table

SINK = 20.0
"""Normalised value in a sink dimension from which a token is a sink."""
EXPLAINED = {
    "picture : system": "the picture's part of what question tokens give to it and to the system text (Visual Attention Score)",
    "picture : question": "its part of what they give to it and to the question",
    "sinks": "tokens of the picture that draw attention whatever they show",
    "heads": "those that the picture changes most (vision-aware heads)",
}
"""What stands in the table beside the masses, and what it is."""


@dataclass(frozen=True, eq=False, repr=False)
class VlmInspection(drawing.DrawsItself, Shown):
    """Where a vision-language model looks when it is about to answer. Prints as tables; draws itself.

    Means are over the rows of the batch that show an image. L counts the layers whose attention can be entered, H query heads.
    All attention is after the softmax, recomputed in float32 from the queries and keys of the model's own forward.

    Attributes
    ----------
    model, family, attention : class, vision-language family, attention implementation in use.
    layers : (L,) numbers of the layers.
    visual_mass, system_mass, question_mass : (L, H) attention of the last token to the images, to the text ahead of the first
        image, and to the text behind it; each in [0, 1].
    vas : (L,) Visual Attention Score as a share, P_V / (P_V + P_S) in [0, 1]: attention to images beside that to the system
        text, mean over heads and question tokens; 0.5 is equal attention. A head that reads neither is left out, and so is a token
        whose window has not both; NaN where none is left. `vas_mean` is its mean over layers.
    vas_ratio : (L,) the score as published, mean over heads and question tokens of P_V / P_S. It has no bound: one head that
        does not read the system text sets it (inf where its P_S underflows), which is why `vas` comes first.
    visual_share : (L,) P_V / (P_V + P_Q) in [0, 1], attention to images beside that to the question, meant likewise.
    image_attention : by row, by image: (L, tokens), attention of the last token, mean over heads.
    sink_dims : dimensions of the residual stream in which the first token is massive, the largest first; at most four.
    phi : (L, tokens) of the first row without padding: largest normalised size in a sink dimension of what enters the layer;
        0 where no sink dimension was found.
    visual_sinks, cosine_sinks : by layer, which image tokens of the first row (from 0, its images one after the other) have a
        phi of at least `SINK`, and which point where its first token points (cosine over `ALIGNED`).
    vhd, ta : (L, H) vision-aware head divergence: how far the head's output at the last token is from its output without the
        images, and the squared norm of the latter.
    vision_heads : bool (L, H), the upper half of each layer by VHD, `outliers` counted as 0.
    tokens : how many real tokens of each kind the first row has: image, system, question.
    pictures, grids : of the first row's images: uint8 (H, W, 3) or None where pixels do not show it; token rows and columns
        or None where they lie on no single grid. Frames of a video lie one under another.
    notes : what could not be said, and why.
    origin : name that the model was loaded by.
    picture_name, question, answer : of the first picture, and what was asked and said about it, where that is known.
    """

    model: str
    family: str
    attention: str
    layers: tuple[int, ...]
    visual_mass: np.ndarray
    system_mass: np.ndarray
    question_mass: np.ndarray
    vas: np.ndarray
    vas_ratio: np.ndarray
    visual_share: np.ndarray
    image_attention: list[list[np.ndarray]]
    sink_dims: tuple[int, ...]
    phi: np.ndarray
    visual_sinks: list[np.ndarray]
    cosine_sinks: list[np.ndarray]
    vhd: np.ndarray
    ta: np.ndarray
    vision_heads: np.ndarray
    tokens: dict[str, int]
    pictures: list[np.ndarray | None] = field(default_factory=list)
    grids: list[tuple[int, int] | None] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    origin: str = ""
    picture_name: str = ""
    question: str = ""
    answer: str = ""

    @property
    def vas_mean(self) -> float:
        """Mean of `vas` over layers; NaN without system text."""
        known = self.vas[np.isfinite(self.vas)]
        return float(known.mean()) if known.size else math.nan

    @property
    def outliers(self) -> np.ndarray:
        """Bool (L, H): heads whose VHD and TA are both over the layer's mean + standard deviation; they fire without the image."""
        return outliers(torch.from_numpy(self.vhd), torch.from_numpy(self.ta)).numpy()

    @property
    def sinks(self) -> list[np.ndarray]:
        """What is marked as sinks: by phi where sink dimensions were found, else by cosine."""
        return self.visual_sinks if self.sink_dims else self.cosine_sinks

    @property
    def marks(self) -> str:
        """What the squares on the maps are."""
        found = any(map(len, self.sinks))
        return "Squares: sinks, tokens that draw attention whatever they show." if found else "None of its tokens is a sink."

    @property
    def masses(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Attention of the last token to pictures, system text and question, (L,) each: the mean over heads."""
        return self.visual_mass.mean(1), self.system_mass.mean(1), self.question_mass.mean(1)

    def facts(self) -> dict[str, str]:
        """What was asked, and what holds of the whole model, in reading order; what is not known is left out."""
        both = "" if math.isnan(self.vas_mean) else f"; {self.vas_mean:.0%} of what it and the system text get"
        told = {
            "model": f"{self.origin} ({self.model})" if self.origin else self.model,
            "picture": self.picture_name,
            "question": self.question,
            "answer": self.answer,
            "attention to the picture": f"{self.visual_mass.mean():.1%}, mean over layers and heads{both}",
            "read by": f"{len(self.layers)} layers of {self.vhd.shape[1]} heads, {self.attention} attention",
            "tokens": ", ".join(f"{n} {name}" for n, name in zip(self.tokens.values(), drawing.SPANS, strict=True)),
            "sinks are told by": f"dimensions {', '.join(map(str, self.sink_dims))} of the hidden state"
            if self.sink_dims
            else "",
            **{f"note {number}": note for number, note in enumerate(self.notes, 1)},
        }
        return {what: fact for what, fact in told.items() if fact}

    def table(self) -> Table:
        """Return the figures by layer: masses, the picture's shares, sinks, and the three heads with the largest VHD."""
        from rich.box import SIMPLE_HEAD

        lines = table("by layer", "layer", *drawing.SPANS, *EXPLAINED, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        explained = {", ".join(drawing.SPANS): "attention of the last token, mean over heads", **EXPLAINED}
        lines.caption = "\n".join(f"{heading}: {said}" for heading, said in explained.items())
        for column in lines.columns:
            column.justify = "right"
        for i, layer in enumerate(self.layers):
            masses = (f"{mass[i]:.1%}" for mass in self.masses)
            shares = ("" if math.isnan(x[i]) else f"{x[i]:.0%}" for x in (self.vas, self.visual_share))
            ranked = np.argsort(-np.where(self.vision_heads[i], self.vhd[i], -1))[: min(3, int(self.vision_heads[i].sum()))]
            lines.add_row(str(layer), *masses, *shares, str(len(self.sinks[i])), ", ".join(map(str, ranked)))
        return lines

    def __rich__(self) -> Group:
        from rich.console import Group

        facts = table("where it looks", "", "", names=False, show_header=False)
        for what, fact in self.facts().items():
            facts.add_row(what, fact)
        return Group(facts, self.table())

    def _repr_html_(self) -> str:
        shown = "".join(f'<img style="max-width:100%" src="{drawing.inlined(figure)}">' for figure in self.figures())
        return super()._repr_html_() + shown

    def looks(self) -> Iterator[dict[str, Any]]:
        """Yield what is drawn of each image of the first row; see `drawing.heat_maps`."""
        begin = 0
        for maps, picture, grid in zip(self.image_attention[0], self.pictures, self.grids, strict=True):
            end = begin + maps.shape[1]
            sinks = [found[(begin <= found) & (found < end)] - begin for found in self.sinks]
            yield {"attention": maps, "layers": self.layers, "sinks": sinks, "picture": picture, "grid": grid}
            begin = end

    def figures(self) -> list[Image]:
        """Draw where the last token looks: heat maps on each image of the first row; masses by layer, VHD by layer and head."""
        looks = list(self.looks())
        drawn = [
            drawing.image_figure(
                "What the last token looks at" + (f": image {number} of {len(looks)}" if len(looks) > 1 else ""),
                self.marks,
                **look,
            )
            for number, look in enumerate(looks, 1)
        ]
        return [*drawn, drawing.layer_figure(self.layers, self.masses, self.vhd, self.vision_heads)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but pictures as plain data; see `show.jsonable`."""
        held = super().to_dict()
        del held["pictures"]
        return {**held, "vas_mean": jsonable(self.vas_mean), "outliers": jsonable(self.outliers)}

    def page(self) -> str:
        """Return one self-contained HTML page: what was asked, maps on the pictures, attention and heads by layer, all figures."""
        return looking_page(self)
