"""Before and after on pictures: what recipes do to the features of an image encoder, to its speed and its memory."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from accelplug import show
from accelplug.comparison import arguments
from accelplug.comparison.environment import environment, timed_runs
from accelplug.comparison.pictures import Laid, Pictures, laid_out
from accelplug.comparison.rows import DENSE_ROW, Quantiles
from accelplug.errors import AccelplugError
from accelplug.hosts.gate import Verdict
from accelplug.hosts.models import towers_of
from accelplug.inspection import drawing
from accelplug.plug import apply
from accelplug.recipe import Recipe
from accelplug.show import Shown, Tell, jsonable, table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

REPEATS = 3
"""Timed forwards of every picture with every recipe, beside as many dense ones ahead of them and behind them."""
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
class OnPicture:
    """One row on one picture.

    Attributes
    ----------
    picture : its name.
    tokens : of the sequence.
    ms : milliseconds of each timed forward; `dense_ms` of dense ones around them.
    cosine : of the features of each patch to the dense ones, row by row; in [-1, 1].
    special : the least cosine of the tokens ahead of the patches; NaN without such.
    matched : share of the patches whose most alike one, in the altered picture, stands where it belongs; NaN where that was not tried.
    grid : rows and columns of patches.
    """

    picture: str
    tokens: int
    ms: list[float]
    dense_ms: list[float]
    cosine: np.ndarray
    special: float
    matched: float
    grid: tuple[int, int]

    @property
    def gain(self) -> float:
        """How much faster than dense, by medians."""
        return statistics.median(self.dense_ms) / statistics.median(self.ms)


@dataclass
class FeatureRow:
    """One line of the table: the dense encoder, or a recipe.

    Attributes
    ----------
    rules : the recipe as text for people.
    density : fraction of (query, key) pairs computed, pooled keys counted, mean over all layers.
    peak_mib : most memory in a timed forward, MiB; None where the system does not tell.
    notes : what ran dense all the same, and why.
    """

    name: str
    kind: str
    rules: str = ""
    on: list[OnPicture] = field(default_factory=list)
    density: float | None = None
    peak_mib: float | None = None
    notes: list[str] = field(default_factory=list)

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
class FeatureComparison(Shown):
    """What `compare` found on an image encoder. Prints as a table; writes JSON or a page with heat maps.

    Attributes
    ----------
    rows : dense first.
    shown : by picture, uint8 (H, W, 3) as the encoder saw it; not part of the JSON.
    generated : whether the pictures are drawn scenes: a photograph may fare otherwise.
    """

    model: str
    generated: bool
    environment: dict[str, Any]
    rows: list[FeatureRow]
    shown: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> FeatureRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise AccelplugError(f"There is no row {name!r}; there are {', '.join(row.name for row in self.rows)}.")

    @property
    def heading(self) -> str:
        """What ran where."""
        return f"{self.model} on {self.environment.get('device', 'a device that was not noted')}"

    @property
    def verdict(self) -> str:
        """Every recipe in a few words."""
        recipes = [row for row in self.rows if row.kind == "recipe"]
        said = [f"{row.name}: {pace(row.gain.p50)}, cosine {row.cosine:.4f}" for row in recipes]
        return "; ".join(said) or "Dense only: nothing to compare."

    @property
    def on(self) -> str:
        """The pictures in words."""
        what = "drawn scenes, no photographs" if self.generated else "pictures"
        sizes = {f"{one.grid[0]} x {one.grid[1]} patches" for one in self.rows[0].on}
        return f"{len(self.rows[0].on)} {what} of {', '.join(sorted(sizes))}"

    def table(self) -> Table:
        """Return the figures as a rich table."""
        from rich.box import SIMPLE_HEAD

        from accelplug.comparison.report import filled_columns

        headings, lines = filled_columns(HEADINGS, [_feature_cells(row) for row in self.rows])
        found = table(self.verdict, *headings, caption=f"{self.on}. {COLUMNS_SAID}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in found.columns[1:]:
            column.justify = "right"
        for cells in lines:
            found.add_row(*cells)
        return found

    def __rich__(self) -> Group:
        from rich.console import Group

        notes = [f"{row.name}: {note}" for row in self.rows for note in row.notes]
        return Group(f"[bold]{self.heading}[/]", self.table(), *notes)

    def maps(self) -> Iterator[tuple[str, str, Any]]:
        """Yield (picture, row, image of PIL's): where features differ, 1 - cosine of each patch, on the picture; each has its own peak."""
        from PIL import Image

        for row in (row for row in self.rows if row.kind == "recipe"):
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


def pace(gain: float) -> str:
    """Return how much faster, or slower, in words."""
    return f"{gain:.2f}x faster" if gain >= 1 else f"{1 / gain:.2f}x slower"


def _feature_cells(row: FeatureRow) -> list[str]:
    """One line of the table, as text."""
    dense = row.kind == DENSE_ROW
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
    rows = [
        FeatureRow(DENSE_ROW, DENSE_ROW),
        *(FeatureRow(row, "recipe", rules_of(recipe)) for row, recipe in recipes.items()),
    ]
    shown = {}
    with show.progress("comparing", len(pictures.opened) * len(rows), progress) as study.tell:
        for picture, opened in pictures.opened.items():
            laid, altered = (laid_out(tower, family, opened, pictures.size, processor, altered=a) for a in (False, True))
            shown[picture] = laid.shown
            study.run(picture, laid, altered, list(zip(rows, [None, *recipes.values()], strict=True)))
    return FeatureComparison(type(model).__name__, pictures.generated, environment(model), rows, shown)


def rules_of(recipe: Recipe) -> str:
    """Return a recipe's rules as text for people."""
    return "\n".join(recipe.describe().split("\n")[1:])


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
            with nullcontext() if recipe is None else apply(self.model, recipe, gate="report") as plug:
                with nullcontext([]) if plug is None else plug.trace() as events:
                    found = features(self.tower, laid)
                ms = self._timed(row, laid)
                matched = _matched(found, features(self.tower, altered), laid.grid) if self.matching else math.nan
                if plug is not None:
                    row.notes = [*plug.report().left_dense, *forced_notes(plug.choices["verdicts"])]
                    layers = max((event.site.layers for event in events), default=0)
                    read = [1.0 if event.density is None else event.density for event in events]
                    row.density = (sum(read) + layers - len(read)) / layers if layers else None
            dense = dense or found
            after = ms if recipe is None else self._timed(None, laid)
            cosine = (normalize(found.patches, dim=-1) * normalize(dense.patches, dim=-1)).sum(-1).numpy()
            special = (normalize(found.ahead, dim=-1) * normalize(dense.ahead, dim=-1)).sum(-1)
            least = float(special.min()) if len(special) else math.nan
            tokens = laid.ahead + len(laid.places)
            row.on.append(OnPicture(picture, tokens, ms, before + after, cosine, least, matched, laid.grid))
            before = after

    def _timed(self, row: FeatureRow | None, laid: Laid) -> list[float]:
        """Milliseconds of forwards; their peak goes into the row."""
        device = next(self.tower.parameters()).device
        ms, peak = timed_runs(lambda: output_of(self.tower, laid), device, self.repeats)
        if peak is not None and row is not None:
            row.peak_mib = max(row.peak_mib or 0.0, peak)
        return ms


def forced_notes(verdicts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what `apply` would leave dense, and was forced here."""
    told = [Verdict.from_dict(one) for one in verdicts]
    return [f"forced here, where apply() would leave it dense: {one.reason}" for one in told if not one.pays]


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
