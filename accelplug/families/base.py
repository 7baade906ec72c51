"""What a model's tokens mean: a `Family` says which attention modules a denoiser has, and how its tokens lie.

A family is data. Its geometry is a pure function of the shapes of forward's arguments; what it does not recognise is None,
and runs dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from accelplug.call import Kind, Layout

Inputs = Mapping[str, Any]
"""Arguments of the denoiser's forward by name, as bound by its signature. Those left at their default are absent."""

Sites = tuple[tuple[str, Kind], ...]
"""(glob of a module path, kind)."""

SELF_AND_CROSS: Sites = (("transformer_blocks.*.attn1", "self"), ("transformer_blocks.*.attn2", "cross"))
"""Blocks with self-attention, then cross-attention to the text."""
DOUBLE_AND_SINGLE: Sites = (("transformer_blocks.*.attn", "joint"), ("single_transformer_blocks.*.attn", "joint"))
"""Double blocks, which have weights for the text and for the rest each, then single ones."""

Grid = tuple[int, int, int]
"""Latent frames, patch rows, patch columns."""


@dataclass(frozen=True)
class Geometry:
    """What one forward's inputs say about its tokens.

    Attributes
    ----------
    grid_thw : latent frames, patch rows, patch columns of the visual run.
    text : fewest and most text tokens that stand in joint attention beside it.
    text_first : whether they stand ahead of it.
    ahead, behind : other tokens that stand ahead of all these and behind them, of a history, reference images or the model's own: read and
        answered densely, as text is.
    unasked : tokens at the start and at the end of the sequence that are keys alone, as in `Layout`.
    read : text tokens that cross-attention reads; 0 where that is not known.
    """

    grid_thw: Grid
    text: tuple[int, int] = (0, 0)
    text_first: bool = False
    ahead: int = 0
    behind: int = 0
    unasked: tuple[int, int] = (0, 0)
    read: int = 0

    def longest(self, kind: Kind) -> int:
        """Return how many tokens a call of `kind` has with the most text."""
        beside = {"joint": self.ahead + self.text[1] + self.behind, "cross": self.read}
        return math.prod(self.grid_thw) + beside.get(kind, 0)

    def layout(self, kind: Kind, length: int) -> Layout | None:
        """Return the layout of a call of `kind` with `length` tokens, or None where the count does not add up."""
        layout = Layout(self.grid_thw)
        if kind == "self":
            return layout if length == layout.visual else None
        if kind == "cross":
            return Layout(self.grid_thw, text_after=self.read, crossed=True) if self.read else None
        text = length - layout.visual - self.ahead - self.behind
        if kind != "joint" or not self.text[0] <= text <= self.text[1]:
            return None
        before, after = (text, 0) if self.text_first else (0, text)
        return Layout(self.grid_thw, self.ahead + before, after + self.behind, self.unasked)


@dataclass(frozen=True)
class AnyOrder:
    """Blocks that take their tokens in any order and give them back in it: an order shared by many is then applied once.

    Position reaches them by arguments alone, and nothing but attention mixes tokens: self-attention without a mask, sparse or dense,
    which permutes with its tokens, and cross-attention to text, whose queries do not know each other. Between two blocks nothing
    happens to the tokens. Classes are named exactly: a class that derives from one of them may do more.

    Attributes
    ----------
    denoiser : class of the denoiser.
    blocks : name of its list of blocks.
    block : class of these.
    processor : class of every attention processor in them.
    arguments : (name, dimensions) of the blocks' arguments that hold one entry per token, along axis 1, where they have that many
        dimensions; tensors or tuples of them. The first is what a block returns.
    """

    denoiser: str
    blocks: str
    block: str
    processor: str
    arguments: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Rotary:
    """Where a denoiser has the cosines and sines from that turn queries and keys.

    Each is (S, D) or (1, S, 1, D). A frame's angles stand in the first channels, each of them twice.

    Attributes
    ----------
    channels : config -> channels of a head that tell frames apart.
    base : config -> of the frequencies.
    module : path of the module that makes them of the latents (B, C, T, H, W).
    argument : name of the argument by which the denoiser is given them, if it is; then there is not such a module.
    turns : config -> whether the denoiser does this at all.
    """

    channels: Callable[[Any], int]
    base: Callable[[Any], float]
    module: str = "rope"
    argument: str = ""
    turns: Callable[[Any], bool] = lambda config: True


def patch_thw(config: Any) -> Grid:
    """Return how many latent frames, rows and columns make one token, from ``patch_size`` and ``patch_size_t``."""
    size = getattr(config, "patch_size", None) or 1
    if not isinstance(size, int):
        *frames, rows, columns = size
        return (frames[0] if frames else 1), rows, columns
    return getattr(config, "patch_size_t", None) or 1, size, size


def two_by_two(config: Any) -> Grid:
    """Pipelines pack 2 x 2 latents into a token, whatever the config says."""
    return 1, 2, 2


def unsaid(config: Any) -> None:
    """A model of which nobody can say ahead what makes a token."""


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
    outer_mask : masks (B, 1, S, S) of this family are outer products of one key validity; the row of a visual token is that.
    text_apart : whether the tokens ahead of the grid ask in calls of their own, of the keys ahead of them alone; these stay dense.
    any_order : blocks that take their tokens in any order, or None where that is not known of them.
    rotary : where positions become angles, or None where that is not known of them.
    split_apart : whether context parallelism splits text and grid each for itself, so that every rank has a share of both.
    patch : config -> latent frames, rows and columns that make one token, None where it does not say.
    timestep : what pipelines hand to the denoiser of their scheduler's timesteps, keys of `accelplug.hosts.clock.SCALES`, the
        likeliest first.
    latents : name of the argument that holds the latents, or a list of them; None where they are the first tensor of numbers.
    conditional : where pipelines have the conditional branch of guidance: in the first or the second half of a batch that holds both
        branches, or apart, in a forward of its own.
    chained : whether what blocks give reaches the next one alone, and as they return it, so that a forward can begin at any of them.
    status : how well it is known: ``verified`` (a real pipeline run), ``layout`` (tiny model), or ``dense``.
    """

    name: str
    classes: tuple[str, ...]
    sites: Sites
    geometry: Callable[[Any, Inputs], Geometry | None]
    level: tuple[str, ...] = ()
    outer_mask: bool = False
    text_apart: bool = False
    any_order: AnyOrder | None = None
    rotary: Rotary | None = None
    split_apart: bool = False
    patch: Callable[[Any], Grid | None] = patch_thw
    timestep: tuple[str, ...] = ("timestep", "unit")
    latents: str | None = None
    conditional: Literal["first", "second", "apart"] = "second"
    chained: bool = False
    status: Literal["verified", "layout", "dense"] = "layout"

    @property
    def chain(self) -> tuple[str, ...]:
        """Names of the lists of blocks that are chained, in the order of execution."""
        return tuple(dict.fromkeys(pattern.partition(".")[0] for pattern, _ in self.sites)) if self.chained else ()


# ------------------------------------------------------------------------------------------------------------- sites


def site_kinds(family: Family, paths: Iterable[str]) -> tuple[dict[str, tuple[Kind, int | None]], int]:
    """Say what stands at each module path.

    Returns
    -------
    kinds : path -> (kind, layer) for the paths that an entry of ``family.sites`` fits. Only self and joint sites have a
        layer: the number of their block, counted on over the family's block lists in the order of its sites, so that two
        attentions of one block share it. A UNet has no such lists; there it is the ordinal among those sites.
    layers : number of layers.
    """
    found: list[tuple[int, str, Kind]] = []
    for path in paths:
        entry = next((i for i, (pattern, _) in enumerate(family.sites) if fnmatchcase(path, pattern)), None)
        if entry is not None:
            found.append((entry, path, family.sites[entry][1]))
    found.sort(key=lambda site: site[0])  # stable: within an entry, the order of the modules

    kinds: dict[str, tuple[Kind, int | None]] = {path: (kind, None) for _, path, kind in found}
    layered = [(path, kind) for _, path, kind in found if kind in ("self", "joint")]
    if family.level:
        kinds.update({path: (kind, ordinal) for ordinal, (path, kind) in enumerate(layered)})
        return kinds, len(layered)

    lengths: dict[str, int] = {}
    for path, _ in layered:
        blocks, number = _block_of(path)
        lengths[blocks] = max(lengths.get(blocks, 0), number + 1)
    offsets, layers = {}, 0
    for blocks, length in lengths.items():
        offsets[blocks] = layers
        layers += length
    for path, kind in layered:
        blocks, number = _block_of(path)
        kinds[path] = (kind, offsets[blocks] + number)
    return kinds, layers


def _block_of(path: str) -> tuple[str, int]:
    """Split ``transformer_blocks.3.attn`` into the name of the block list and the number of the block."""
    parts = path.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:number]), int(parts[number])


# ---------------------------------------------------------------------------------------------------------- geometry


def shape_of(inputs: Inputs, name: str, ndim: int) -> tuple[int, ...] | None:
    """Return the shape of the tensor argument `name`, or None where it is not a tensor of `ndim` dimensions."""
    shape = getattr(inputs.get(name), "shape", None)
    return tuple(int(n) for n in shape) if shape is not None and len(shape) == ndim else None


def latent_grid(config: Any, inputs: Inputs, axes: str, name: str = "hidden_states") -> Grid | None:
    """Return the grid of the latents `name`; `axes` names their dimensions, ``"bcthw"``. A last part-patch is cut off."""
    shape = shape_of(inputs, name, len(axes))
    if shape is None:
        return None
    size = dict(zip(axes, shape, strict=True))
    frames, rows, columns = patch_thw(config)
    return size.get("t", 1) // frames, size["h"] // rows, size["w"] // columns


def latents(
    axes: str,
    *,
    name: str = "hidden_states",
    text: tuple[str, ...] = (),
    more_text: tuple[str, ...] = (),
    text_first: bool = False,
    text_drops: bool = False,
    ahead: int = 0,
    read: str | None = None,
) -> Callable[[Any, Inputs], Geometry | None]:
    """Return the geometry of a denoiser that cuts latents into patches, t-major, then rows, then columns.

    Parameters
    ----------
    axes : dimensions of the latents, ``"bcthw"``.
    name : argument that holds them.
    text : arguments (B, S, C) whose tokens stand beside them in joint attention.
    more_text : such arguments that may be absent.
    text_first : whether the text stands ahead of them.
    text_drops : whether the model leaves out padded text, so that fewer text tokens come than went in.
    ahead : tokens that the model puts ahead of them all.
    read : argument (B, S, C) whose tokens cross-attention reads, and no others.
    """

    def geometry(config: Any, inputs: Inputs) -> Geometry | None:
        grid = latent_grid(config, inputs, axes, name)
        given = (*text, *(argument for argument in more_text if inputs.get(argument) is not None))
        shapes = [shape_of(inputs, argument, 3) for argument in given]
        if grid is None or None in shapes:
            return None
        tokens = sum(shape[1] for shape in shapes if shape)
        seen = shape_of(inputs, read, 3) if read is not None else None
        return Geometry(grid, (0 if text_drops else tokens, tokens), text_first, ahead, read=seen[1] if seen else 0)

    return geometry


def history_tokens(inputs: Inputs, patches: Mapping[str, Grid]) -> int | None:
    """Return how many tokens a history makes that stands ahead of the latents, or None where it is not understood.

    Parameters
    ----------
    patches : argument that holds a part of it, (B, C, T, H, W) -> latent frames, rows and columns that make one token of it, the last ones
        padded. A part without its ``indices_...`` is not there.
    """
    tokens = 0
    for name, patch in patches.items():
        if inputs.get(name) is None or inputs.get(f"indices_{name}") is None:
            continue
        if (shape := shape_of(inputs, name, 5)) is None:
            return None
        tokens += math.prod(-(-size // by) for size, by in zip(shape[2:], patch, strict=True))
    return tokens


def unknown(config: Any, inputs: Inputs) -> None:
    """Geometry of a denoiser whose tokens lie on no grid: dense."""
