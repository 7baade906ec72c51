"""Train the geometry model: ``python -m benchmarks.zoo.train_geometry --steps 6000``.

It sees frames of rooms that `accelplug.zoo.rooms` draws, in any order, and tells each camera's pose in the first one's coordinates, and
depth. ``--export`` writes it into the package, and tells how far it is off on rooms that it never saw, with and without global attention.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from accelplug.zoo.geometry import SPECIAL, VGGT
from accelplug.zoo.rooms import FIELD_OF_VIEW, UNIT, quaternion_of, rays, render, rotation_of, sample_path, sample_room
from benchmarks.zoo.common import load, save

CHECKPOINT, TARGET = "geometry.pt", Path(__file__).parents[2] / "accelplug" / "zoo" / "vggt-boxes"
CARD = Path(__file__).parent / "MODEL_CARD_GEOMETRY.md"
SIZE, PATCH = (84, 112), 14
SETS = ((2, 12), (4, 6), (8, 3), (12, 2), (24, 1))  # frames, scenes
WIDEST = 150.0  # degrees
WEIGHTS = (10.0, 1.0, 2.0, 0.2)  # of the losses of poses, depth, points and matches


def scenes(
    g: torch.Generator, count: int, frames: int, arc: float | None = None, widest: float = WIDEST
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, S, 3, H, W), depth (B, S, H, W) and poses (B, S, 4, 4) in the first frame's coordinates, in units of `UNIT` metres.

    Parameters
    ----------
    arc : degrees that the camera goes; None for any up to `widest`, and frames in any order.
    """
    found = []
    for _ in range(count):
        degrees = widest * float(torch.rand(1, generator=g)) ** 1.5 if arc is None else arc
        poses = sample_path(g, frames, math.radians(degrees))
        poses = poses[torch.randperm(frames, generator=g)] if arc is None else poses
        picture, depth = render(sample_room(g), poses, *SIZE)
        poses = poses @ torch.linalg.inv(poses[:1])
        poses[:, :3, 3] /= UNIT
        found.append((picture, depth / UNIT, poses))
    pictures, depths, poses = (torch.stack(part) for part in zip(*found, strict=True))
    return pictures, depths, poses


def loss_of(out: dict[str, Tensor], depth: Tensor, poses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the poses, of the depth, and of the points."""
    truth = torch.cat([poses[..., :3, 3], quaternion_of(poses[..., :3, :3])], dim=-1)
    pose = smooth_l1_loss(out["pose_enc"][..., :7], truth, beta=0.05)
    points = smooth_l1_loss(out["world_points"], points_of(depth, poses), beta=0.05)
    return pose, smooth_l1_loss(out["depth"][..., 0].log(), depth.log(), beta=0.1), points


class Matches:
    """What two heads of two early global blocks are told while they learn: where in the first frame each patch's point is seen.

    Poses begin to form far earlier so.
    """

    BLOCKS, HEADS = (1, 2), 2

    def __init__(self, model: VGGT) -> None:
        self.blocks: list[Any] = [model.aggregator.global_blocks[number].get_submodule("attn") for number in self.BLOCKS]
        self.seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for attn in self.blocks:
            attn.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, attn: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self.seen[attn] = args[0], kwargs["pos"]

    def loss(self, depth: Tensor, poses: Tensor) -> Tensor:
        """Cross-entropy of these heads' attention, over all tokens, where a patch's point is in sight of the first frame."""
        patch, visible = first_seen(depth, poses)  # [B, S, P] each
        where = (patch + SPECIAL)[:, None, ..., None].expand(-1, self.HEADS, -1, -1, 1)
        losses = []
        for attn in self.blocks:
            x, pos = self.seen.pop(attn)
            q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
            q, k = (
                attn.rope(norm(part), pos)[:, : self.HEADS].float() for norm, part in ((attn.q_norm, q), (attn.k_norm, k))
            )
            q = q.unflatten(2, (depth.shape[1], -1))[..., SPECIAL:, :]  # [B, heads, S, P, D]
            likely = torch.einsum("bhspd,bhkd->bhspk", q, k * attn.scale).log_softmax(-1).gather(-1, where)[..., 0]
            losses.append(-(likely.mean(1) * visible).sum() / visible.sum().clamp(min=1))
        return torch.stack(losses).mean()


def first_seen(depth: Tensor, poses: Tensor) -> tuple[Tensor, Tensor]:
    """For the middle of each patch: the patch of the first frame where its point would lie, and whether it is seen there; (B, S, P)."""
    height, width = SIZE
    middle, columns = slice(PATCH // 2, None, PATCH), width // PATCH
    x, y, z = points_of(depth, poses)[:, :, middle, middle].flatten(2, 3).unbind(-1)
    focal = width / 2 / math.tan(FIELD_OF_VIEW / 2)
    column, row = x / z.clamp(min=1e-3) * focal + width / 2, y / z.clamp(min=1e-3) * focal + height / 2
    visible = (z > 0.05) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = column.clamp(0, width - 1).long(), row.clamp(0, height - 1).long()
    there = depth[:, 0].flatten(1).gather(1, (row * width + column).flatten(1)).view_as(z)
    visible &= (there - z).abs() < 0.1 * z  # else something stands before it
    visible[:, 0] = False
    return row // PATCH * columns + column // PATCH, visible


def points_of(depth: Tensor, poses: Tensor) -> Tensor:
    """Points (B, S, H, W, 3) of depth (B, S, H, W), in the coordinates that poses (B, S, 4, 4) lead from."""
    seen = rays(*SIZE).view(*SIZE, 3) * depth[..., None]
    return torch.einsum("bsij,bshwi->bshwj", poses[..., :3, :3], seen - poses[..., None, None, :3, 3])


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


@torch.no_grad()
def match_likes(model: VGGT) -> None:
    """Begin with keys that are made as queries are, so that tokens look at tokens like them (after arXiv 2305.09828)."""
    for block in (*model.aggregator.frame_blocks, *model.aggregator.global_blocks):
        q, k, _ = block.get_parameter("attn.qkv.weight").chunk(3)
        k.copy_(q)


def optimizers_of(model: VGGT) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the blocks' matrices, with which poses begin to form earlier than with AdamW alone; AdamW for the rest."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and "_blocks." in name else rest).append(weight)
    return torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01), torch.optim.AdamW(
        rest, betas=(0.9, 0.98), weight_decay=0.02
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument(
        "--rate", type=float, default=0.02, help="peak learning rate of the blocks' matrices, a twentieth for the rest"
    )
    parser.add_argument("--export", action="store_true", help="write the averaged weights into the package, and judge them")
    options = parser.parse_args()

    state = load(CHECKPOINT) or {"step": 0}
    torch.manual_seed(state["step"])
    g = torch.Generator().manual_seed(state["step"])
    model = VGGT()
    match_likes(model)
    average: Any = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    optimizers, matches = optimizers_of(model), Matches(model)
    if "model" in state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
    if options.export:
        average.module.save_pretrained(TARGET)
        shutil.copy(CARD, TARGET / "README.md")
        trained = VGGT.from_pretrained(TARGET)
        for frames, arc in ((2, 20.0), (8, 60.0), (24, 120.0), (100, 120.0)):
            for name, one in (("whole", trained), ("no global attention", without_global(trained))):
                print(f"{frames} frames, {arc:.0f} degrees, {name}: {judge(one, frames, arc)}", flush=True)
        return

    start, told = time.monotonic(), [0.0] * len(WEIGHTS)
    for step in range(state["step"], options.steps):
        frames, count = SETS[int(torch.randint(len(SETS), (), generator=g))]
        widest = WIDEST * min(1.0, 0.25 + step / (0.4 * options.steps))  # what lies near is learned first
        pictures, depth, poses = scenes(g, count, frames, widest=widest)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(pictures)
        losses = (*loss_of({name: value.float() for name, value in out.items()}, depth, poses), matches.loss(depth, poses))
        rate = min(1.0, (step + 1) / 300, (options.steps - step) / (0.5 * options.steps))
        for optimizer, peak in zip(optimizers, (options.rate, options.rate / 20), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.zero_grad()
        (torch.stack(losses) @ torch.tensor(WEIGHTS)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(model)
        told = [0.98 * old + 0.02 * float(new.detach()) for old, new in zip(told, losses, strict=True)]
        if (step + 1) % 250 == 0 or step + 1 == options.steps:
            save(
                {
                    "step": step + 1,
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                },
                CHECKPOINT,
            )
            errors = judge(average.module.eval(), 8, 60.0)
            names = ("pose", "depth", "points", "matches")
            losses_so_far = " ".join(f"{name} {value:.4f}" for name, value in zip(names, told, strict=True))
            print(f"{step + 1:6d} {time.monotonic() - start:6.0f} s  {losses_so_far} {errors}", flush=True)


if __name__ == "__main__":
    main()
