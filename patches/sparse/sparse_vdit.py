"""Sparse-vDiT: every head reads everything, nothing, a diagonal, many diagonals or stripes, as an offline search found.

Sparse-vDiT (arXiv 2506.03065): one of five ways to read for each head, by step and layer, from a search on dense runs.

* ``full``, ``skip``: all keys; none, the output is 0.
* ``diagonal``: keys within w of the query in raster order, frame by frame.
* ``multi_diagonal``: the same band in token-major order, where the frames of one place lie side by side; seen in raster
  order it is one short diagonal per pair of frames.
* ``stripe``: the same keys for all queries.

Neither widths nor stripe sets are published. Here ``w = S (1 - sqrt(1 - d))`` of S visual tokens, which is what a band of
density d needs (as in SVG, arXiv 2502.01776), in whole blocks; stripes are whole blocks, evenly spaced from the first one.

Text is read by all rows but those of skipped heads, and reads all. Heads of all modes run in one kernel call.

*The search*: of the modes i, with density d_i, the one with least ``L_i = e_i + lam * d_i``.

A head stays full where even the least loss of the other modes exceeds eps. The published e_i is the mean squared error of
the head's output, whose size differs by head, layer and model, so that one eps = 1 means something else in each. Here it
is divided by the mean square of the dense output, so that skipping a head costs exactly 1, and a loss of lam is what a
full head has: with eps = lam a head leaves full only where it gains.

One mode for all heads is a test's setting, not the method: on the bundled model (blocks of 16) many diagonals everywhere err
by .55 and .33 at densities of .19 and .29, where random blocks err by .39 and .32, and calibrated modes by .25 and .16.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import Clock, Layout, Site
from accelplug.kernels.orders import Tiles, tiles
from accelplug.kernels.static import band, band_width
from accelplug.patches.calibration import CalibrationConfig
from accelplug.patches.sparse.per_head import PerHead, WayErrors, Ways
from accelplug.patches.sparse.template import BlockConfig
from accelplug.table import Table

Mode = Literal["full", "skip", "diagonal", "multi_diagonal", "stripe"]
MODES = get_args(Mode)
FULL, SKIP = MODES.index("full"), MODES.index("skip")


class SparseVditSearch(WayErrors):
    """Find the mode with the least loss, per span of steps, layer and head."""

    class Config(CalibrationConfig):
        """`lam` is as published; eps is not comparable, for errors are normalised here."""

        lam: float = Field(0.5, ge=0.0, description="What reading everything costs, in units of the relative error.")
        eps: float = Field(
            0.5, ge=0.0, description="Loss above which a head stays full; at lam, a mode that costs as full does."
        )

    config: Config
    axes = {"modes": ("steps", "layers", "heads")}  # noqa: RUF012

    def tables(self) -> dict[str, Tensor]:
        loss = self.mean("error") + self.config.lam * self.mean("density")  # [buckets, layers, H, W]
        loss[..., FULL] = math.inf
        least, mode = loss.nan_to_num(nan=math.inf).min(-1)
        return {"modes": mode.masked_fill(least > self.config.eps, FULL).to(torch.uint8)}


class SparseVdit(PerHead):
    """Every head reads everything, nothing, a diagonal, many diagonals or stripes."""

    class Config(BlockConfig):
        """Widths and stripes are not published: ours follow from the densities."""

        modes: Mode | Table = Field(
            "diagonal",
            description="One mode for all heads, or a table (steps, layers, heads) of their numbers, full being 0.",
        )
        diagonal: float = Field(0.3, gt=0.0, le=1.0, description="Share of the keys that diagonal heads read.")
        multi_diagonal: float = Field(0.3, gt=0.0, le=1.0, description="Share of the keys that multi-diagonal heads read.")
        stripe: float = Field(0.3, gt=0.0, le=1.0, description="Share of the keys that stripe heads read.")

    config: Config
    Calibration = SparseVditSearch
    writes = ()  # the plan is made for each layer, of its modes

    def choice(self, site: Site, clock: Clock) -> Tensor | None:
        modes = self.config.modes
        choice = modes.at(site, clock).long() if isinstance(modes, Table) else torch.tensor([MODES.index(modes)])
        return None if (choice == FULL).all() else choice

    def ways(self, layout: Layout) -> Ways:
        raster, token_major = (tiles(layout, order, self.config.unit) for order in ("thw", "hwt"))
        members = torch.stack([self.reads(mode, raster) for mode in MODES])
        skipped = torch.arange(len(MODES))[None] == SKIP
        orders = [token_major if mode == "multi_diagonal" else raster for mode in MODES]
        return Ways(Tiles.per_head(orders), self.plan(members[None], raster, skipped=skipped))

    def reads(self, mode: str, tiles: Tiles) -> Tensor:
        """Return which blocks of `unit` slots a mode reads, bool (U, U); text is not looked at."""
        unit, number = self.config.unit, tiles.slots // self.config.unit
        if mode in ("full", "skip"):
            return torch.full((number, number), mode == "full")
        if mode == "stripe":
            visual = tiles.visual_slots // unit
            stripes = max(round(self.config.stripe * visual), 1)
            return torch.isin(torch.arange(number), torch.arange(stripes) * visual // stripes).expand(number, -1)
        return band(tiles.slots, unit, unit, band_width(tiles.layout.visual, getattr(self.config, mode)))
