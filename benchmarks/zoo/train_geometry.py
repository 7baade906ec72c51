"""Train the geometry model: ``python -m benchmarks.zoo.train_geometry --steps 12000``.

It sees frames of rooms that `accelplug.zoo.rooms` draws, in any order, and tells each camera's pose in the first one's coordinates, and
depth. ``--export`` writes it into the package, and tells how far it is off on rooms that it never saw, with and without global attention.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from accelplug.zoo.geometry import SPECIAL, VGGT
from accelplug.zoo.rooms import UNIT, quaternion_of, render, rotation_of, sample_path, sample_room
from benchmarks.zoo.common import load, save

CHECKPOINT, TARGET = "geometry.pt", Path(__file__).parents[2] / "accelplug" / "zoo" / "vggt-boxes"
SIZE = (84, 112)
SETS = ((2, 12), (4, 6), (8, 3), (12, 2), (24, 1))  # frames, scenes
WIDEST = 150  # degrees


def scenes(g: torch.Generator, count: int, frames: int, arc: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, S, 3, H, W), depth (B, S, H, W) and poses (B, S, 4, 4) in the first frame's coordinates, in units of `UNIT` metres.

    Parameters
    ----------
    arc : degrees that the camera goes; None for any, and frames in any order.
    """
    found = []
    for _ in range(count):
        degrees = WIDEST * float(torch.rand(1, generator=g)) ** 1.5 if arc is None else arc
        poses = sample_path(g, frames, math.radians(degrees))
        poses = poses[torch.randperm(frames, generator=g)] if arc is None else poses
        picture, depth = render(sample_room(g), poses, *SIZE)
        poses = poses @ torch.linalg.inv(poses[:1])
        poses[:, :3, 3] /= UNIT
        found.append((picture, depth / UNIT, poses))
    pictures, depths, poses = (torch.stack(part) for part in zip(*found, strict=True))
    return pictures, depths, poses


def loss_of(out: dict[str, Tensor], depth: Tensor, poses: Tensor) -> tuple[Tensor, Tensor]:
    """Of the poses, and of the depth."""
    truth = torch.cat([poses[..., :3, 3], quaternion_of(poses[..., :3, :3])], dim=-1)
    pose = smooth_l1_loss(out["pose_enc"][..., :7], truth, beta=0.05)
    return pose, smooth_l1_loss(out["depth"][..., 0].log(), depth.log(), beta=0.1)


@torch.no_grad()
def judge(model: VGGT, frames: int, arc: float, rooms: int = 12) -> dict[str, float]:
    """Mean errors on unseen rooms: rotation and direction of translation in degrees, depth relative to the truth."""
    pictures, depth, poses = scenes(torch.Generator().manual_seed(10_000), rooms, frames, arc)
    out = model(pictures)
    turn = rotation_of(out["pose_enc"][..., 3:7]).mT @ poses[..., :3, :3]
    angle = ((turn.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1).arccos()[:, 1:]
    direction = torch.cosine_similarity(out["pose_enc"][..., :3], poses[..., :3, 3], dim=-1).clamp(-1, 1).arccos()[:, 1:]
    return {
        "rotation_deg": round(math.degrees(float(angle.mean())), 2),
        "direction_deg": round(math.degrees(float(direction.mean())), 2),
        "depth_error": round(float(((out["depth"][..., 0] - depth).abs() / depth).mean()), 4),
    }


def without_global(model: VGGT) -> VGGT:
    """The same weights, but global blocks see one frame at a time, as frame blocks do."""
    blind, patch = copy.deepcopy(model), model.aggregator.patch_size
    tokens = SPECIAL + SIZE[0] // patch * (SIZE[1] // patch)
    for block in blind.aggregator.global_blocks:
        attn: Any = block.attn
        attn.forward = partial(alone, attn.forward, tokens)
    return blind


def alone(attend: Callable[..., Tensor], tokens: int, x: Tensor, pos: Tensor | None = None) -> Tensor:
    """Attention over each frame of (B, S P, C) by itself."""
    pos = None if pos is None else pos.reshape(-1, tokens, 2)
    return attend(x.reshape(-1, tokens, x.shape[-1]), pos=pos).view(x.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--rate", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument("--export", action="store_true", help="write the averaged weights into the package, and judge them")
    options = parser.parse_args()

    state = load(CHECKPOINT) or {"step": 0}
    torch.manual_seed(state["step"])
    g = torch.Generator().manual_seed(state["step"])
    model = VGGT()
    average: Any = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.02)
    if "model" in state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    if options.export:
        average.module.save_pretrained(TARGET)
        trained = VGGT.from_pretrained(TARGET)
        for frames, arc in ((2, 20.0), (8, 60.0), (24, 120.0), (100, 120.0)):
            for name, one in (("whole", trained), ("no global attention", without_global(trained))):
                print(f"{frames} frames, {arc:.0f} degrees, {name}: {judge(one, frames, arc)}", flush=True)
        return

    start, told = time.monotonic(), [0.0, 0.0]
    for step in range(state["step"], options.steps):
        frames, count = SETS[int(torch.randint(len(SETS), (), generator=g))]
        pictures, depth, poses = scenes(g, count, frames)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(pictures)
        pose_loss, depth_loss = loss_of({name: value.float() for name, value in out.items()}, depth, poses)
        rate = min(1.0, (step + 1) / 300, (options.steps - step) / (0.5 * options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * rate
        optimizer.zero_grad()
        (10 * pose_loss + depth_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        told = [0.98 * old + 0.02 * float(new.detach()) for old, new in zip(told, (pose_loss, depth_loss), strict=True)]
        if (step + 1) % 250 == 0 or step + 1 == options.steps:
            save(
                {
                    "step": step + 1,
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                CHECKPOINT,
            )
            errors = judge(average.module.eval(), 8, 60.0)
            print(
                f"{step + 1:6d} {time.monotonic() - start:6.0f} s  pose {told[0]:.4f} depth {told[1]:.4f} {errors}",
                flush=True,
            )


if __name__ == "__main__":
    main()
