"""Before and after on scenes: what recipes do to the poses and points of a geometry transformer, to its speed, memory and growth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelplug import show
from accelplug.comparison import arguments
from accelplug.comparison.environment import environment, timed_runs
from accelplug.comparison.forwards import REPEATS, ForwardRow, OfForwards, OnCase, pace
from accelplug.errors import AccelplugError, UnsupportedError
from accelplug.recipe import Recipe
from accelplug.show import Shown, jsonable
from accelplug.zoo.rooms import rays, render, rotation_of, sample_path, sample_room

if TYPE_CHECKING:
    from rich.table import Table

POINTS = 2_000
"""Points of a scene that its chamfer distance is made of, evenly spread over pixels and frames."""


@dataclass(frozen=True)
class Reconstruction:
    """Where cameras stand and what they see.

    Attributes
    ----------
    poses : float32 (S, 4, 4), from the world's coordinates to each camera's.
    points : float32 (S, H, W, 3), what each pixel shows, in its camera's coordinates: x to the right, y down, z along the view.
    """

    poses: Tensor
    points: Tensor

    @property
    def relative(self) -> Tensor:
        """Poses from the first camera's coordinates, (S, 4, 4)."""
        return self.poses @ torch.linalg.inv(self.poses[:1])

    def cloud(self, scale: float = 1.0) -> Tensor:
        """Return `POINTS` points at most in the first camera's coordinates, (n, 3)."""
        pose = self.relative
        flat = self.points.flatten(1, 2) - pose[:, None, :3, 3]
        world = (flat @ pose[:, :3, :3]).flatten(0, 1)  # rows times R are R^T times columns
        return scale * world[:: math.ceil(len(world) / POINTS)]


@dataclass(frozen=True)
class Deviation:
    """How far one reconstruction is from another.

    Attributes
    ----------
    rotation_deg, direction_deg : mean angles between rotations, and between directions of translation, of frames behind the first.
    depth : mean relative error of depth, once its median is made that of the other.
    chamfer : mean distance of each point to the nearest of the other, both ways, in units of the other's mean depth.
    """

    rotation_deg: float
    direction_deg: float
    depth: float
    chamfer: float


def deviation_of(found: Reconstruction, wanted: Reconstruction) -> Deviation:
    """Hold a reconstruction against another of the same frames; the scale of the first is free."""
    one, other = found.relative[1:], wanted.relative[1:]
    trace = (one[:, :3, :3] * other[:, :3, :3]).sum((-2, -1))
    rotation = ((trace - 1) / 2).clamp(-1, 1).arccos()
    direction = torch.cosine_similarity(one[:, :3, 3], other[:, :3, 3], dim=-1).clamp(-1, 1).arccos()
    depth, truth = found.points[..., 2], wanted.points[..., 2]
    scale = float((truth / depth.clamp(min=1e-6)).median())
    apart = torch.cdist(found.cloud(scale), wanted.cloud())
    chamfer = (apart.min(1).values.mean() + apart.min(0).values.mean()) / 2 / truth.mean()
    return Deviation(
        math.degrees(float(rotation.mean())),
        math.degrees(float(direction.mean())),
        float(((scale * depth - truth).abs() / truth).mean()),
        float(chamfer),
    )


@dataclass(frozen=True, eq=False)
class Walk:
    """Pictures of one scene.

    Attributes
    ----------
    name : of the scene.
    pictures : float32 (S, 3, H, W) in 0..1.
    truth : where the cameras stood and what they saw, or None.
    """

    name: str
    pictures: Tensor
    truth: Reconstruction | None = None


class Walks:
    """What a geometry transformer is compared on: drawn rooms, or pictures of your own.

    Parameters
    ----------
    pictures : by name, Tensor (S, 3, H, W) in 0..1 of each scene; None draws rooms.
    frames : of the drawn walks; two lengths or more tell how time grows with them.
    rooms : that are drawn for each length.
    degrees : of the arc that the camera goes around the room's middle.
    size : height and width of drawn pictures; of the patch size a multiple.
    seed : of the rooms.

    Raises
    ------
    AccelplugError
        If pictures are not such tensors of two frames or more.
    """

    def __init__(
        self,
        pictures: Mapping[str, Tensor] | None = None,
        *,
        frames: Sequence[int] = (8, 24),
        rooms: int = 2,
        degrees: float = 90.0,
        size: tuple[int, int] = (84, 112),
        seed: int = 10_000,
    ) -> None:
        self.generated = pictures is None
        if pictures is None:
            for count in frames:
                arguments.require_whole(count, "Walks, frames", 2)
            arguments.require_whole(rooms, "Walks, rooms", 1)
            g = torch.Generator().manual_seed(seed)
            self.walks = [_walk_in(g, count, number, degrees, size) for count in frames for number in range(rooms)]
            return
        for name, one in pictures.items():
            if not isinstance(one, Tensor) or one.ndim != 4 or one.shape[1] != 3 or len(one) < 2:
                got = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
                raise AccelplugError(
                    f"Pictures of {name!r}: expected a tensor (S, 3, H, W) of two frames or more, got {got}."
                )
        self.walks = [Walk(name, one.float()) for name, one in pictures.items()]


def _walk_in(g: torch.Generator, frames: int, number: int, degrees: float, size: tuple[int, int]) -> Walk:
    poses = sample_path(g, frames, math.radians(degrees))
    pictures, depth = render(sample_room(g), poses, *size)
    points = depth[..., None] * rays(*size).view(*size, 3)
    return Walk(f"room {number}, {frames} frames", pictures, Reconstruction(poses, points))


def reconstruction_of(said: Any, known_rays: Tensor | None = None) -> Reconstruction:
    """Read what a model says of one scene.

    Parameters
    ----------
    said : VGGT's ``pose_enc`` (1, S, 9) and ``depth`` (1, S, H, W, 1), or pi3's ``camera_poses`` (1, S, 4, 4), from each camera's
        coordinates to the world's, and ``local_points`` (1, S, H, W, 3).
    known_rays : (H, W, 3), directions of pixels; None takes the fields of view that the model says.

    Raises
    ------
    UnsupportedError
        If it says something else.
    """
    keys = set(said) if isinstance(said, Mapping) else set()
    if {"camera_poses", "local_points"} <= keys:
        return Reconstruction(torch.linalg.inv(said["camera_poses"][0].float().cpu()), said["local_points"][0].float().cpu())
    if not {"pose_enc", "depth"} <= keys:
        raise UnsupportedError(
            "compare: expected a model that returns pose_enc and depth, as VGGT does, or camera_poses and local_points, as pi3, got "
            f"{', '.join(sorted(map(str, keys))) or type(said).__name__}. Pass the whole model, with its heads."
        )
    pose, depth = said["pose_enc"][0].float().cpu(), said["depth"][0].float().cpu()
    poses = torch.eye(4).repeat(len(pose), 1, 1)
    poses[:, :3, :3], poses[:, :3, 3] = rotation_of(pose[:, 3:7]), pose[:, :3]
    return Reconstruction(poses, depth * (_rays_of(pose[:, 7:], *depth.shape[1:3]) if known_rays is None else known_rays))


def _rays_of(fields: Tensor, height: int, width: int) -> Tensor:
    """Directions of pixels (S, H, W, 3) by the fields of view (S, 2), vertical and across, in radians."""
    high, wide = (fields / 2).tan().clamp(min=1e-3)[:, :, None, None].unbind(1)  # [S, 1, 1]
    y, x = torch.meshgrid(*(2 * (torch.arange(size) + 0.5) / size - 1 for size in (height, width)), indexing="ij")
    return torch.stack([x * wide, y * high, torch.ones_like(x).expand(len(fields), -1, -1)], -1)


# ---------------------------------------------------------------------------------------------------------------- results


@dataclass
class OnWalk(OnCase):
    """One row on one scene.

    Attributes
    ----------
    walk : its name.
    frames : of it.
    to_dense, to_truth : how far its reconstruction is from the dense one, and from the truth where that is known.
    """

    walk: str
    frames: int
    to_dense: Deviation
    to_truth: Deviation | None


@dataclass
class WalkRow(ForwardRow):
    """One line of the table: the dense model, or a recipe. Of its layers those of global attention count."""

    on: list[OnWalk] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """How much faster than dense on the longest walk, median over scenes."""
        longest = max(one.frames for one in self.on)
        return statistics.median(one.gain for one in self.on if one.frames == longest)

    @property
    def growth(self) -> float | None:
        """Exponent p of time that grows as frames^p, by least squares over all scenes; None where all have as many frames."""
        if len({one.frames for one in self.on}) < 2:
            return None
        frames, ms = ([math.log(value) for value in values] for values in zip(*self._points, strict=True))
        return statistics.linear_regression(frames, ms).slope

    @property
    def _points(self) -> list[tuple[float, float]]:
        return [(one.frames, statistics.median(one.ms)) for one in self.on]

    def mean(self, of: str, name: str) -> float:
        """Mean of a figure over scenes: `of` is ``to_dense`` or ``to_truth``; NaN where the truth is not known."""
        found = [getattr(one, of) for one in self.on]
        return math.nan if None in found else statistics.fmean(getattr(one, name) for one in found)


FIGURES = {"rotation_deg": "rotation °", "direction_deg": "direction °", "depth": "depth", "chamfer": "chamfer"}


@dataclass(repr=False)
class WalkComparison(OfForwards, Shown):
    """What `compare` found on a geometry transformer. Prints as a table; writes JSON or a page.

    Attributes
    ----------
    generated : whether the scenes are drawn rooms, whose truth is known.
    """

    rows: list[WalkRow]

    def said(self, row: WalkRow) -> str:
        """Say a recipe in a few words."""
        return f"{row.name}: {pace(row.gain)}, poses {row.mean('to_dense', 'rotation_deg'):.2f}° from dense"

    def table(self) -> Table:
        """Return the figures as a rich table."""
        frames = sorted({one.frames for one in self.rows[0].on})
        scenes = (
            f"{len(self.rows[0].on)} {'drawn rooms' if self.generated else 'scenes'} of {', '.join(map(str, frames))} frames"
        )
        of_truth = [f"{heading}, truth" for heading in FIGURES.values()]
        all_of_them = ("run", "ms", "speed-up", "growth", "density", *FIGURES.values(), *of_truth, "peak MiB")
        return self.table_of(all_of_them, _walk_cells, f"{scenes}. {WALKS_SAID}")

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        names = ("model", "generated", "environment")
        rows = [
            {**vars(row), "on": [vars(one) for one in row.on], "gain": row.gain, "growth": row.growth} for row in self.rows
        ]
        return jsonable({**{name: getattr(self, name) for name in names}, "rows": rows})


WALKS_SAID = (
    "ms and speed-up: on the longest. growth: p, where time grows as frames^p. rotation, direction of translation, relative depth and "
    "chamfer distance in mean depths: from the dense answer, and from the truth"
)


def _walk_cells(row: WalkRow) -> list[str]:
    """One line of the table, as text."""
    dense = row.dense
    longest = max(one.frames for one in row.on)
    ms = statistics.median(statistics.median(one.ms) for one in row.on if one.frames == longest)
    to_dense, to_truth = ([row.mean(of, name) for name in FIGURES] for of in ("to_dense", "to_truth"))
    return [
        row.name,
        f"{ms:.0f}",
        "" if dense else f"{row.gain:.2f}x",
        "" if row.growth is None else f"{row.growth:.2f}",
        "" if row.density is None else f"{row.density:.3f}",
        *("" if dense else f"{value:.3f}" for value in to_dense),
        *("" if math.isnan(value) else f"{value:.3f}" for value in to_truth),
        "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
    ]


def compare_walks(
    model: Any, recipes: Mapping[str, Recipe], walks: Walks, *, repeats: int = REPEATS, progress: bool = True
) -> WalkComparison:
    """Run a geometry transformer dense and with recipes on the same scenes, one at a time.

    Every recipe is forced (``gate="report"``): what `apply` would leave dense is told. Its forwards are timed between dense ones.

    Parameters
    ----------
    model : a whole geometry transformer, with its heads; it is left as it was.
    recipes : by the names of their rows.
    walks : the scenes.
    repeats : timed forwards of each scene with each recipe, 1 or more.
    """
    arguments.require_whole(repeats, "compare, repeats", 1)
    rows, device = WalkRow.of(recipes), next(model.parameters()).device
    done = 0
    with show.progress("comparing", len(walks.walks) * len(rows), progress) as tell:
        for walk in walks.walks:
            dense: Reconstruction | None = None
            before: list[float] = []
            for row, recipe in zip(rows, [None, *recipes.values()], strict=True):
                tell(done, f"{row.name} on {walk.name}")
                done += 1
                forward = partial(_told_by, model, walk)
                with row.applied(model, recipe) as noted:
                    said = noted(forward)
                    ms = row.timed(forward, device, repeats)
                known = None if walk.truth is None else rays(*walk.pictures.shape[-2:]).view(*walk.pictures.shape[-2:], 3)
                found = reconstruction_of(said, known)
                dense = dense or found
                after = ms if recipe is None else timed_runs(forward, device, repeats)[0]
                truth = None if walk.truth is None else deviation_of(found, walk.truth)
                row.on.append(OnWalk(ms, before + after, walk.name, len(walk.pictures), deviation_of(found, dense), truth))
                before = after
    return WalkComparison(type(model).__name__, walks.generated, environment(model), rows)


def _told_by(model: Any, walk: Walk) -> Any:
    one = next(model.parameters())
    with torch.no_grad():
        return model(walk.pictures[None].to(one.device, one.dtype))
