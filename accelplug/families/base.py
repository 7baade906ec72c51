"""What a model's tokens mean: a `Family` says which attention modules a denoiser has, and how its tokens lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from accelplug.call import Kind, Layout

Inputs = Mapping[str, Any]
"""Arguments of the denoiser's forward by name, as bound by its signature."""


@dataclass(frozen=True)
class Geometry:
    """What one forward's inputs say about its tokens.

    Attributes
    ----------
    grid_thw : latent frames, patch rows, patch columns of the visual run.
    text : fewest and most text tokens that stand in joint attention beside it.
    text_first : whether they stand ahead of it.
    """

    grid_thw: tuple[int, int, int]
    text: tuple[int, int] = (0, 0)
    text_first: bool = False

    def layout(self, kind: Kind, length: int) -> Layout | None:
        """Return the layout of a call of `kind` with `length` tokens, or None where the count does not add up."""
        layout = Layout(self.grid_thw)
        text = length - layout.visual
        if kind == "self":
            return layout if text == 0 else None
        if kind != "joint" or not self.text[0] <= text <= self.text[1]:
            return None
        return Layout(self.grid_thw, text_before=text) if self.text_first else Layout(self.grid_thw, text_after=text)


@dataclass(frozen=True)
class Family:
    """Data about one family of denoisers.

    Attributes
    ----------
    name : short name, the file's name or an own one.
    classes : names of the denoiser classes.
    sites : (glob of the attention module's path, kind) in the order of execution; the first that fits wins, and layers are
        counted over the entries whose kind is self or joint. Modules that no entry fits (refiners, audio) are left alone.
    geometry : (config, inputs) -> Geometry, or None where these inputs are not understood. Reads shapes where it can.
    level : None, or the class names of sub-modules whose own input gives the grid (UNets: one resolution a block); then
        `geometry` gets that sub-module's config and inputs.
    outer_mask : masks (B, 1, S, S) of this family are outer products of one key validity; their first row is that.
    refuse : why this family's self-attention cannot be patched (linear attention), or None.
    status : how well it is known: ``verified`` (a real pipeline run), ``layout`` (tiny model), or ``dense``.
    """

    name: str
    classes: tuple[str, ...]
    sites: tuple[tuple[str, Kind], ...]
    geometry: Callable[[Any, Inputs], Geometry | None]
    level: tuple[str, ...] = ()
    outer_mask: bool = False
    refuse: str | None = None
    status: str = "layout"
