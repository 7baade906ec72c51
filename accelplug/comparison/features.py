"""Before and after on pictures: what recipes do to the features of an image encoder, to its speed and its memory."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from accelplug import show
from accelplug.comparison import arguments
from accelplug.comparison.environment import environment, timed_runs
from accelplug.comparison.forwards import REPEATS, ForwardRow, OfForwards, OnCase, pace
from accelplug.comparison.pictures import Laid, Pictures, laid_out
from accelplug.comparison.rows import Quantiles
from accelplug.hosts.models import towers_of
from accelplug.inspection import drawing
from accelplug.recipe import Recipe
from accelplug.show import Shown, Tell, jsonable

if TYPE_CHECKING:
    from rich.table import Table

NEAR = 1
"""Patches, by rows and by columns, within which a match counts as right."""
MAP_PIXELS = 480
"""Width of a heat map on the page."""


@dataclass(frozen=True)
class Features:
    """What an encoder makes of a picture: float32 (N, C) for its N patches, row by row, and (T, C) for the tokens ahead of them."""

    patches: Tensor
    ahead: Tensor


@dataclass
class OnPicture(OnCase):
    """One row on one picture.

    Attributes
    ----------
    picture : its name.
    tokens : of the sequence.
    cosine : of the features of each patch to the dense ones, row by row; in [-1, 1].
    special : the least cosine of the tokens ahead of the patches; NaN without such.
    matched : share of the patches whose most alike one, in the altered picture, stands where it belongs; NaN where that was not tried.
    grid : rows and columns of patches.
    """

    picture: str
    tokens: int
    cosine: np.ndarray
    special: float
    matched: float
    grid: tuple[int, int]


@dataclass
class FeatureRow(ForwardRow):
    """One line of the table: the dense encoder, or a recipe."""

    on: list[OnPicture] = field(default_factory=list)

    @property
    def ms(self) -> Quantiles:
        """Milliseconds of a forward, over pictures."""
        return Quantiles.of([statistics.median(one.ms) for one in self.on])

    @property
    def gain(self) -> Quantiles:
        """How much faster than dense, over pictures."""
        return Quantiles.of([one.gain for one in self.on])

    @property
    def cosine(self) -> float:
        """Mean cosine of patch features to dense ones, over all pictures."""
        return float(np.concatenate([one.cosine for one in self.on]).mean())

    @property
    def worst_picture(self) -> float:
        """The least mean of a picture."""
        return min(float(one.cosine.mean()) for one in self.on)

    @property
    def worst_patch(self) -> float:
        """The least cosine of a patch."""
        return min(float(one.cosine.min()) for one in self.on)

    @property
    def special(self) -> float:
        """The least cosine of a token ahead of the patches; NaN without such."""
        return min(one.special for one in self.on)

    @property
    def matched(self) -> float:
        """Share of patches that match, over pictures."""
        return statistics.fmean(one.matched for one in self.on)


@dataclass(repr=False)
class FeatureComparison(OfForwards, Shown):
    """What `compare` found on an image encoder. Prints as a table; writes JSON or a page with heat maps.

    Attributes
    ----------
    shown : by picture, uint8 (H, W, 3) as the encoder saw it; not part of the JSON.
    generated : whether the pictures are drawn scenes: a photograph may fare otherwise.
    """

    rows: list[FeatureRow]
    shown: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def said(self, row: FeatureRow) -> str:
        """Say a recipe in a few words."""
        return f"{row.name}: {pace(row.gain.p50)}, cosine {row.cosine:.4f}"

    @property
    def on(self) -> str:
        """The pictures in words."""
        what = "drawn scenes, no photographs" if self.generated else "pictures"
        sizes = {f"{one.grid[0]} x {one.grid[1]} patches" for one in self.rows[0].on}
        return f"{len(self.rows[0].on)} {what} of {', '.join(sorted(sizes))}"

    def table(self) -> Table:
        """Return the figures as a rich table."""
        return self.table_of(HEADINGS, _feature_cells, f"{self.on}. {COLUMNS_SAID}")

    def maps(self) -> Iterator[tuple[str, str, Any]]:
        """Yield (picture, row, image of PIL's): where features differ, 1 - cosine of each patch, on the picture; each has its own peak."""
        from PIL import Image

        for row in (row for row in self.rows if not row.dense):
            for one in row.on:
                ground = Image.fromarray(self.shown[one.picture])
                size = MAP_PIXELS, max(1, round(MAP_PIXELS * ground.height / ground.width))
                yield one.picture, row.name, drawing.overlay(ground.resize(size), (1 - one.cosine).clip(min=0), one.grid)

    def page(self) -> str:
        """Return one self-contained page: the table, and where features differ on every picture."""
        cards = "".join(
            f'<div class="card"><img alt="" src="{drawing.inlined(drawn)}">{html.escape(f"{picture}, {row}")}<br>'
            f"peak {1 - float(self._found(row, picture).cosine.min()):.4f}</div>\n"
            for picture, row, drawn in self.maps()
        )
        body = [
            f'<div class="soft">{html.escape(self.heading)}</div>',
            f"<h1>{html.escape(self.verdict)}</h1>",
            show.as_elements(self.table()),
            "<h2>Where features differ</h2>",
            '<p class="soft">1 - cosine of each patch to the dense one; each map has its own peak.</p>',
            f'<div class="cards">{cards}</div>',
            "<h2>Where this was measured</h2>",
            f'<div class="panel">{show.as_definitions(self.environment)}</div>',
        ]
        return show.framed(f"accelplug: {self.heading}", "\n".join(body), MAPS_STYLE)

    def _found(self, row: str, picture: str) -> OnPicture:
        return next(one for one in self[row].on if one.picture == picture)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data; cosines in short, without the maps."""
        return jsonable(
            {
                "model": self.model,
                "generated": self.generated,
                "environment": self.environment,
                "rows": [_summary(row) for row in self.rows],
            }
        )


HEADINGS = (
    "run",
    "ms",
    "speed-up",
    "density",
    "cosine",
    "worst picture",
    "worst patch",
    "special tokens",
    "matched",
    "peak MiB",
)
COLUMNS_SAID = (
    "cosine: of patch features to dense ones, mean over patches. special tokens: the least of the class token's and the registers'. "
    "matched: patches whose most alike one, in the picture mirrored and a fifth darker, is the same or next to it"
)
MAPS_STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); gap: 14px; margin: 12px 0; }
.card { font-size: 14px; line-height: 1.4; }
.card img { border-radius: 6px; margin-bottom: 6px; width: 100%; }
"""


def _feature_cells(row: FeatureRow) -> list[str]:
    """One line of the table, as text."""
    dense = row.dense
    spread = f" ({row.gain.p20:.2f}-{row.gain.p80:.2f})" if len(row.on) > 1 else ""
    quality = (row.cosine, row.worst_picture, row.worst_patch, row.special)
    return [
        row.name,
        f"{row.ms.p50:.0f}",
        "" if dense else f"{row.gain.p50:.2f}x{spread}",
        "" if row.density is None else f"{row.density:.3f}",
        *("" if dense or math.isnan(value) else f"{value:.4f}" for value in quality),
        "" if math.isnan(row.matched) else f"{row.matched:.1%}",
        "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
    ]


def _summary(row: FeatureRow) -> dict[str, Any]:
    """A row without its maps."""
    names = ("gain", "cosine", "worst_picture", "worst_patch", "special", "matched")
    on = [{name: value for name, value in vars(one).items() if name != "cosine"} for one in row.on]
    cosines = [{"mean": float(one.cosine.mean()), "worst": float(one.cosine.min())} for one in row.on]
    told = {name: value for name, value in vars(row).items() if name != "on"} | {name: getattr(row, name) for name in names}
    return {**told, "on": [{**one, "cosine": cosine} for one, cosine in zip(on, cosines, strict=True)]}


def compare_features(
    model: Any,
    recipes: Mapping[str, Recipe],
    pictures: Pictures,
    processor: Any = None,
    *,
    repeats: int = REPEATS,
    matching: bool = True,
    progress: bool = True,
) -> FeatureComparison:
    """Run an image encoder dense and with recipes on the same pictures, one at a time.

    The first tower of a model is run, without its heads. Every recipe is forced (``gate="report"``): what `apply` would
    leave dense is told. Its forwards are timed between dense ones, with the kernels that were seen to be fastest.

    Parameters
    ----------
    model : an image encoder; it is left as it was.
    recipes : by the names of their rows.
    pictures : what it is run on.
    processor : its image processor, for mean and deviation of the colours.
    repeats : timed forwards of each picture with each recipe, 1 or more.
    matching : whether patches are looked for in an altered copy of each picture, which takes one forward more.
    """
    arguments.require_whole(repeats, "compare, repeats", 1)
    tower, family = next(iter(towers_of(model).values()))
    study = _Study(model, tower, repeats, matching)
    rows = FeatureRow.of(recipes)
    shown = {}
    with show.progress("comparing", len(pictures.opened) * len(rows), progress) as study.tell:
        for picture, opened in pictures.opened.items():
            laid, altered = (laid_out(tower, family, opened, pictures.size, processor, altered=a) for a in (False, True))
            shown[picture] = laid.shown
            study.run(picture, laid, altered, list(zip(rows, [None, *recipes.values()], strict=True)))
    return FeatureComparison(type(model).__name__, pictures.generated, environment(model), rows, shown)


@dataclass
class _Study:
    """The runs of one comparison."""

    model: Any
    tower: nn.Module
    repeats: int
    matching: bool
    tell: Tell = show.silent
    done: int = 0

    def run(self, picture: str, laid: Laid, altered: Laid, rows: Sequence[tuple[FeatureRow, Recipe | None]]) -> None:
        """Run every row on one picture."""
        dense: Features | None = None
        before: list[float] = []
        for row, recipe in rows:
            self.tell(self.done, f"{row.name} on {picture}")
            self.done += 1
            forward = partial(output_of, self.tower, laid)
            with row.applied(self.model, recipe) as noted:
                found = noted(lambda: features(self.tower, laid))
                ms = row.timed(forward, self.device, self.repeats)
                matched = _matched(found, features(self.tower, altered), laid.grid) if self.matching else math.nan
            dense = dense or found
            after = ms if recipe is None else timed_runs(forward, self.device, self.repeats)[0]
            cosine = (normalize(found.patches, dim=-1) * normalize(dense.patches, dim=-1)).sum(-1).numpy()
            special = (normalize(found.ahead, dim=-1) * normalize(dense.ahead, dim=-1)).sum(-1)
            least = float(special.min()) if len(special) else math.nan
            tokens = laid.ahead + len(laid.places)
            row.on.append(OnPicture(ms, before + after, picture, tokens, cosine, least, matched, laid.grid))
            before = after

    @property
    def device(self) -> torch.device:
        """Where the tower is."""
        return next(self.tower.parameters()).device


def output_of(tower: nn.Module, laid: Laid) -> Any:
    """Run a tower on a picture."""
    with torch.no_grad():
        return tower(**laid.inputs)


def features(tower: nn.Module, laid: Laid) -> Features:
    """Return the features of a picture, on the CPU: of the last layer, as the tower gives them."""
    out = output_of(tower, laid)
    maps = getattr(out, "feature_maps", None)
    if maps is not None:  # a backbone's last stage (1, C, R, K), without the tokens ahead
        patches = maps[-1][0].flatten(1).T.float().cpu()
        return Features(patches, patches[:0])
    states = out.last_hidden_state
    states = (states[0] if states.ndim == 3 else states).float().cpu()
    return Features(states[laid.places], states[: laid.ahead])


def _matched(found: Features, altered: Features, grid: tuple[int, int]) -> float:
    """Share of patches whose most alike one in the mirrored picture is their own, or next to it."""
    alike = (normalize(found.patches, dim=-1) @ normalize(altered.patches, dim=-1).T).argmax(-1)
    place = torch.arange(len(alike))
    rows, columns = place // grid[1], grid[1] - 1 - place % grid[1]
    near = ((alike // grid[1] - rows).abs() <= NEAR) & ((alike % grid[1] - columns).abs() <= NEAR)
    return float(near.float().mean())
