"""What inspect() says of a vision-language model that has read a prompt: where it looks, layer by layer."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from accelplug import files
from accelplug.inspection import drawing
from accelplug.kernels.vision import outliers
from accelplug.show import Shown, jsonable

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Group

SINK = 20.0
"""Normalised value in a sink dimension from which a token is a sink."""


@dataclass(frozen=True, eq=False, repr=False)
class VlmInspection(Shown):
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

    HEADINGS = (
        "layer",
        "image",
        "system",
        "question",
        "VAS",
        "V / S",
        "V / (V + Q)",
        "sinks",
        "aligned",
        "vision-aware heads",
    )

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

    def facts(self) -> dict[str, str]:
        """What holds of the whole model, in reading order."""
        heads = self.vhd.shape[1]
        counts = ", ".join(f"{n} {kind}" for kind, n in self.tokens.items())
        return {
            "model": f"{self.model} ({self.family}, {self.attention} attention)",
            "seen": f"{len(self.layers)} layers of {heads} heads; tokens of the first row: {counts}",
            "VAS": "unknown"
            if math.isnan(self.vas_mean)
            else f"{self.vas_mean:.2f}, image / (image + system), mean over layers",
            "attention to images": f"{self.visual_mass.mean():.1%}, mean over layers and heads",
            "sink dimensions": ", ".join(map(str, self.sink_dims)) or "none found",
            **{f"note {number}": note for number, note in enumerate(self.notes, 1)},
        }

    def rows(self) -> list[tuple[str, ...]]:
        """By layer: its number, masses, VAS and its ratio, share, sinks by phi and by cosine, and the three heads with the largest VHD."""
        out = []
        for i, layer in enumerate(self.layers):
            masses = (f"{x[i].mean():.1%}" for x in (self.visual_mass, self.system_mass, self.question_mass))
            vas, share = ("-" if math.isnan(x[i]) else f"{x[i]:.2f}" for x in (self.vas, self.visual_share))
            ratio = "-" if math.isnan(self.vas_ratio[i]) else f"{self.vas_ratio[i]:.3g}"
            ranked = np.argsort(-np.where(self.vision_heads[i], self.vhd[i], -1))[: min(3, int(self.vision_heads[i].sum()))]
            heads = ", ".join(map(str, ranked))
            sinks = (str(len(found[i])) for found in (self.visual_sinks, self.cosine_sinks))
            out.append((str(layer), *masses, vas, ratio, share, *sinks, heads))
        return out

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        table = Table("", "", title="where it looks", title_justify="left", show_header=False)
        for what, fact in self.facts().items():
            table.add_row(what, fact)
        layers = Table(title="attention of the last token, by layer", title_justify="left")
        for heading in self.HEADINGS:
            layers.add_column(heading, justify="right")
        for row in self.rows():
            layers.add_row(*row)
        return Group(table, layers)

    def _repr_html_(self) -> str:
        shown = "".join(f'<img style="max-width:100%" src="{drawing.inlined(figure)}">' for figure in self.figures())
        return super()._repr_html_() + shown

    def figures(self) -> list[Image]:
        """Draw where the last token looks: heat maps on each image of the first row; masses by layer, VHD by layer and head."""
        rule = f"phi of at least {SINK:g}" if self.sink_dims else "aligned with the first token"
        marks = f"Squares: sinks, {rule}." if any(map(len, self.sinks)) else "No sinks were found on it."
        images, begin, drawn = self.image_attention[0], 0, []
        for number, maps in enumerate(images, 1):
            title = "What the last token looks at" + (f": image {number} of {len(images)}" if len(images) > 1 else "")
            end = begin + maps.shape[1]
            sinks = [found[(begin <= found) & (found < end)] - begin for found in self.sinks]
            shown = self.pictures[number - 1], self.grids[number - 1]
            drawn.append(drawing.image_figure(maps, self.layers, sinks, *shown, title, marks))
            begin = end
        vas = "" if math.isnan(self.vas_mean) else f"; VAS {self.vas_mean:.2f}"
        masses = [x.mean(1) for x in (self.visual_mass, self.system_mass, self.question_mass)]
        under = f"Last token, mean over heads{vas}."
        return [*drawn, drawing.layer_figure(self.layers, masses, self.vhd, self.vision_heads, under)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but pictures as plain data; see `show.jsonable`."""
        held = super().to_dict()
        del held["pictures"]
        return {**held, "vas_mean": jsonable(self.vas_mean), "outliers": jsonable(self.outliers)}

    def to_png(self, path: str | Path) -> Path:
        """Write `figures`, one under another.

        Raises
        ------
        AccelplugError
            If it cannot be written.
        """
        return files.write(path, drawing.stacked(self.figures()))

    def page(self) -> str:
        """Return one self-contained HTML page with the drawings and the tables."""
        facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in self.facts().items())
        drawn = "".join(f'<div class="panel"><img alt="" src="{drawing.inlined(x)}"></div>' for x in self.figures())
        head = "".join(f"<th>{html.escape(x)}</th>" for x in self.HEADINGS)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in row) + "</tr>" for row in self.rows())
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        page = Path(__file__).with_name("looking.html").read_text(encoding="utf-8")
        page = page.replace("<!--FACTS-->", facts).replace("<!--FIGURES-->", drawn).replace("<!--TABLE-->", table)
        return page.replace("<!--TITLE-->", html.escape(f"Where {self.model} looks"))
