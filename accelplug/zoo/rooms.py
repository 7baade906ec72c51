"""Rooms: textured boxes on a floor, seen by a camera that goes around them. Pictures, depth and poses are exact.

What the geometry model of the zoo was trained on, and what it is judged by. The world's z is up, lengths are in metres. A camera
looks along its own z, x to the right and y down; a pose is the matrix (4, 4) from the world's coordinates to the camera's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BOXES = 6
FIELD_OF_VIEW = math.radians(65)  # across
UNIT = 2.5
"""Metres that the geometry model calls one."""


@dataclass(frozen=True)
class Room:
    """A room and what stands in it. The last body is the room itself, seen from within.

    Attributes
    ----------
    centre, half : (K + 1, 3), centres and half sizes of the bodies, in metres.
    yaw : (K + 1,), how each is turned around the vertical, in radians.
    colour : (K + 1, 3), in 0..1.
    waves : (K + 1, 3, 3), wave vectors of each colour channel's pattern, in radians per metre, in the body's own coordinates.
    phase : (K + 1, 3), in radians.
    """

    centre: Tensor
    half: Tensor
    yaw: Tensor
    colour: Tensor
    waves: Tensor
    phase: Tensor


def sample_room(g: torch.Generator) -> Room:
    """A room of 6 to 8 by 6 to 8 by 2.6 to 3.4 metres, with `BOXES` boxes around its middle."""

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g)

    room = torch.cat([between(3.0, 4.0, 2), between(1.3, 1.7, 1)])
    half = torch.cat([between(0.15, 0.5, BOXES, 2), between(0.15, 0.6, BOXES, 1)], dim=1)
    angle, radius = (torch.arange(BOXES) + between(0.0, 0.7, BOXES)) * (2 * math.pi / BOXES), between(0.2, 1.1, BOXES)
    centre = torch.stack([radius * angle.cos(), radius * angle.sin(), half[:, 2]], dim=1)
    scale = torch.cat([between(2.0, 9.0, BOXES, 3, 1), between(1.0, 4.0, 1, 3, 1)])
    direction = torch.nn.functional.normalize(torch.randn(BOXES + 1, 3, 3, generator=g), dim=-1)
    return Room(
        centre=torch.cat([centre, torch.stack([torch.zeros(()), torch.zeros(()), room[2]])[None]]),
        half=torch.cat([half, room[None]]),
        yaw=torch.cat([between(0.0, math.pi, BOXES), torch.zeros(1)]),
        colour=between(0.15, 1.0, BOXES + 1, 3),
        waves=scale * direction,
        phase=between(0.0, 2 * math.pi, BOXES + 1, 3),
    )


def sample_path(g: torch.Generator, frames: int, arc: float) -> Tensor:
    """Poses (frames, 4, 4) of a camera that goes along an arc of so many radians around the middle, and looks about there."""
    share = torch.linspace(0, 1, frames)
    start, side, phase = (float(x) for x in torch.rand(3, generator=g))
    angle = 2 * math.pi * start + arc * share * (1 if side < 0.5 else -1)
    wave = torch.sin(2 * math.pi * (phase + 0.7 * share))
    radius, height = 2.3 + 0.3 * wave, 1.3 + 0.35 * torch.cos(2 * math.pi * (phase + share))
    eye = torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=1)
    target = 0.35 * torch.randn(1, 3, generator=g) + torch.stack(
        [0.2 * wave, -0.2 * wave, torch.full_like(wave, 0.6)], dim=1
    )
    forward = torch.nn.functional.normalize(target - eye, dim=1)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, torch.tensor([[0.0, 0.0, 1.0]])), dim=1)
    down = torch.linalg.cross(forward, right)
    pose = torch.eye(4).repeat(frames, 1, 1)
    pose[:, :3, :3] = torch.stack([right, down, forward], dim=1)
    pose[:, :3, 3] = -(pose[:, :3, :3] @ eye[..., None])[..., 0]
    return pose


def rays(height: int, width: int) -> Tensor:
    """Directions (H * W, 3) in the camera's coordinates, as long as they go one metre along z."""
    focal = width / 2 / math.tan(FIELD_OF_VIEW / 2)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([(x - width / 2) / focal, (y - height / 2) / focal, torch.ones_like(x)], dim=-1).flatten(0, 1)


def render(room: Room, poses: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pictures (S, 3, H, W) in 0..1, and depth (S, H, W) along the camera's z in metres.

    Parameters
    ----------
    poses : (S, 4, 4).
    """
    rotation = poses[:, :3, :3]
    eye = -(rotation.mT @ poses[:, :3, 3, None])[..., 0]  # [S, 3]
    direction = rays(height, width) @ rotation  # [S, P, 3]

    turn = torch.zeros(len(room.yaw), 3, 3)
    turn[:, 0, 0] = turn[:, 1, 1] = room.yaw.cos()
    turn[:, 0, 1], turn[:, 1, 0], turn[:, 2, 2] = room.yaw.sin(), -room.yaw.sin(), 1.0
    start = torch.einsum("kij,skj->ski", turn, eye[:, None] - room.centre)[:, :, None]  # [S, K + 1, 1, 3]
    along = torch.einsum("kij,spj->skpi", turn, direction)  # [S, K + 1, P, 3]
    along = torch.where(along.abs() < 1e-6, 1e-6, along)
    half = room.half[:, None]
    one, other = (-half - start) / along, (half - start) / along
    near, far = torch.minimum(one, other).amax(-1), torch.maximum(one, other).amin(-1)  # [S, K + 1, P]
    depth = torch.where((near < far) & (near > 0.05), near, torch.inf)
    depth[:, -1] = far[:, -1]  # the room, from within
    depth, body = depth.min(dim=1)  # [S, P]

    index = body[:, None, :, None].expand(-1, 1, -1, 3)
    point = (start + depth[:, None, :, None] * along).gather(1, index)[:, 0]  # [S, P, 3], in the body's own coordinates
    side = (point.abs() / room.half[body]).argmax(-1)  # which pair of faces
    shade = torch.tensor([0.7, 0.85, 1.0])[side] * (1 - 0.15 * (point.gather(-1, side[..., None])[..., 0] < 0))
    pattern = torch.einsum("spci,spi->spc", room.waves[body], point) + room.phase[body]
    picture = room.colour[body] * (0.65 + 0.35 * pattern.sin()) * shade[..., None]
    return picture.mT.unflatten(2, (height, width)).contiguous(), depth.unflatten(1, (height, width))


def quaternion_of(rotation: Tensor) -> Tensor:
    """Unit quaternions (..., 4) as x, y, z, w, with w >= 0, of rotations (..., 3, 3)."""
    m = rotation.flatten(-2)
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = m.unbind(-1)
    squares = torch.stack([1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22, 1 + m00 + m11 + m22], dim=-1)
    size = squares.clamp(min=1e-12).sqrt()
    # A row for each component that may be divided by; the largest is the safest.
    rows = torch.stack(
        [
            torch.stack([squares[..., 0], m10 + m01, m02 + m20, m21 - m12], dim=-1),
            torch.stack([m10 + m01, squares[..., 1], m12 + m21, m02 - m20], dim=-1),
            torch.stack([m20 + m02, m21 + m12, squares[..., 2], m10 - m01], dim=-1),
            torch.stack([m21 - m12, m02 - m20, m10 - m01, squares[..., 3]], dim=-1),
        ],
        dim=-2,
    ) / (2 * size[..., None])
    best = squares.argmax(-1)[..., None, None].expand(*rotation.shape[:-2], 1, 4)
    found = rows.gather(-2, best)[..., 0, :]
    return torch.where(found[..., 3:] < 0, -found, found)


def rotation_of(quaternion: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of unit quaternions (..., 4), x, y, z, w."""
    x, y, z, w = quaternion.unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
