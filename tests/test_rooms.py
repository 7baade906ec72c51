"""The rooms of the geometry model, and the model that stands in for VGGT."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from accelplug.zoo.geometry import SPECIAL, VGGT
from accelplug.zoo.rooms import FIELD_OF_VIEW, quaternion_of, rays, render, rotation_of, sample_path, sample_room

HEIGHT, WIDTH = 42, 56


@pytest.fixture(scope="module")
def walk() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    poses = sample_path(g, 3, math.radians(30))
    return (*render(sample_room(g), poses, HEIGHT, WIDTH), poses)


def test_a_point_has_one_colour_and_one_depth_from_everywhere(walk: tuple[torch.Tensor, ...]) -> None:
    pictures, depth, poses = walk
    point = rays(HEIGHT, WIDTH) * depth[0].flatten()[:, None]
    move = poses[1] @ torch.linalg.inv(poses[0])
    point = point @ move[:3, :3].T + move[:3, 3]
    focal = WIDTH / 2 / math.tan(FIELD_OF_VIEW / 2)
    x = (point[:, 0] / point[:, 2] * focal + WIDTH / 2 - 0.5).round().long()
    y = (point[:, 1] / point[:, 2] * focal + HEIGHT / 2 - 0.5).round().long()
    seen = (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT) & (point[:, 2] > 0)
    x, y = x[seen], y[seen]
    off = depth[1][y, x] - point[seen, 2]
    same = off.abs() < 0.03
    assert 0.3 < same.float().mean() <= 1  # the others are hidden there, or lie between two pixels
    difference = (pictures[1][:, y, x] - pictures[0].flatten(1)[:, seen]).abs().mean(0)
    assert difference[same].median() < 0.02 < difference[~same].median()


def test_poses_turn_and_do_not_mirror(walk: tuple[torch.Tensor, ...]) -> None:
    rotation = walk[2][:, :3, :3]
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(3))
    torch.testing.assert_close(rotation_of(quaternion_of(rotation)), rotation)
    upside_down = torch.diag(torch.tensor([1.0, -1.0, -1.0]))  # w is 0
    torch.testing.assert_close(rotation_of(quaternion_of(upside_down)), upside_down)


def test_frames_behind_the_first_are_a_set(walk: tuple[torch.Tensor, ...]) -> None:
    torch.manual_seed(0)
    model = VGGT(embed_dim=16, depth=2, num_heads=2, layers=(0, 1)).eval()
    with torch.no_grad():
        there, back = model(walk[0]), model(walk[0][[0, 2, 1]])
        moved = model(walk[0][[1, 0, 2]])
    for name in ("pose_enc", "depth"):
        torch.testing.assert_close(there[name][:, [0, 2, 1]], back[name])
    assert not torch.allclose(there["depth"][:, [1, 0, 2]], moved["depth"])  # the first one is another
    assert there["depth"].shape == (1, 3, HEIGHT, WIDTH, 1)
    assert model.aggregator(walk[0][None])[0][0].shape == (1, 3, SPECIAL + 3 * 4, 32)


def test_what_is_written_is_read(tmp_path: Path, walk: tuple[torch.Tensor, ...]) -> None:
    model = VGGT(embed_dim=16, depth=1, num_heads=2, layers=(0,)).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = VGGT.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(loaded(walk[0])["depth"], model(walk[0])["depth"], atol=2e-3, rtol=2e-3)
