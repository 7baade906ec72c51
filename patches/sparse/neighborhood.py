"""Neighbourhood attention: every query reads a window around it, on a grid of frames, rows and columns.

Generalized neighbourhood attention (arXiv 2504.16922), a product of windows over frames, rows and columns.

On an axis of L positions with window w and stride s, position i follows ``leader = min(i // s * s + s // 2, L - 1)``
and reads the w positions from ``leader - w // 2``, shifted inside at the borders, so that every query keeps exactly w.
On a causal axis ``leader = min(i // s * s + s - 1, L - 1)``, and i reads ``[max(leader - w + 1, 0), i]``. With dilation
d, all this happens among the positions of one residue mod d.

Settings give the family, b a block's size on an axis:

* neighbourhood attention: stride 1; dilated (arXiv 2209.15001): dilation;
* sliding tiles (arXiv 2502.04507): window and stride in multiples of the tile, an odd number of them; then tiles are read
  whole or not at all;
* halo attention (HaloNet, arXiv 2103.12731): stride b, window b + 2 * halo, border cut;
* window attention (Swin, arXiv 2103.14030, unshifted): window = stride = b, border cut;
* MaxViT (arXiv 2204.01697): its blocks are window attention; its grid of G positions an axis is window full, dilation L / G.
  The published model has them in layers by turns. To read both key sets in one softmax, give the first and ``grid`` L / G.

Tiles are cut, not padded, at the far border. ``mask: tile`` reads a superset: every tile that a window touches, whole.

Experimental with the rest dropped: whole runs of the bundled model (blocks of 16) then come no nearer to dense than with
random blocks, 16.5 and 16.8 dB of foreground PSNR at density .40. With it pooled they do: 19.0 and 17.6 at .44.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from accelplug.call import Layout
from accelplug.patches.base import Positive
from accelplug.patches.sparse.windows import Axis, Extent, WindowConfig, Windowed


class Neighborhood(Windowed):
    """Every query reads a product of windows over frames, rows and columns."""

    class Config(WindowConfig):
        """Triples are frames, rows, columns."""

        window: tuple[Extent, Extent, Extent] = Field(
            ("full", 24, 24),
            description="Keys that a query reads on each axis; full for the whole axis (its residue, if dilated); more is cut to it.",
        )
        stride: tuple[Positive, Positive, Positive] = Field(
            (1, 1, 1), description="Neighbours that share one window on each axis; 1 slides, the window's size partitions."
        )
        dilation: tuple[Positive, Positive, Positive] = Field((1, 1, 1), description="Steps between the keys of a window.")
        causal: tuple[bool, bool, bool] = Field((False, False, False), description="Axes on which nothing ahead is read.")
        border: Literal["shift", "cut"] = Field(
            "shift",
            description="Windows across a border: shift moves them inside, cut loses what lies beyond (halo attention).",
        )
        grid: tuple[Positive, Positive, Positive] | None = Field(
            None,
            description="Also read the keys that lie this many steps, or a multiple, away on each axis (MaxViT); mask: tile.",
        )

        @model_validator(mode="after")
        def _windows_fit(self) -> Self:
            for window, stride in zip(self.window, self.stride, strict=True):
                if window != "full" and stride > window:
                    raise ValueError(
                        f"stride {stride} is more than window {window}: keys between two windows would never be read"
                    )
            if self.grid and (self.mask != "tile" or self.dilation != (1, 1, 1)):
                raise ValueError(
                    f"grid {self.grid} is read by whole tiles beside an undilated window: give mask: tile and no dilation, "
                    f"got mask: {self.mask}, dilation: {self.dilation}"
                )
            return self

    config: Config

    def axes(self, layout: Layout) -> tuple[Axis, ...]:
        config = self.config
        cut = [config.border == "cut"] * 3
        return tuple(map(Axis.fit, layout.grid_thw, config.window, config.stride, config.dilation, config.causal, cut))

    @property
    def grid(self) -> tuple[int, ...] | None:
        return self.config.grid

    def neutral(self, layout: Layout) -> bool:
        return self.config.grid == (1, 1, 1) or super().neutral(layout)
