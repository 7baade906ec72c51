"""What the training scripts share: where they keep their state, the clips, and a learning rate tied to the clock."""

import os
import time
from pathlib import Path

import numpy as np
import torch

from accelplug.zoo.shapes import render, sample_scene

RUNS = Path(__file__).parent / "runs"


def save(state: dict, name: str) -> None:
    """Write a checkpoint so that a kill half way leaves the one before it."""
    RUNS.mkdir(exist_ok=True)
    torch.save(state, RUNS / f"{name}.tmp")
    os.replace(RUNS / f"{name}.tmp", RUNS / name)


def load(name: str) -> dict | None:
    """The checkpoint of that name, if there is one."""
    file = RUNS / name
    return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None


def sample_clips(
    rng: np.random.Generator, batch: int, frames: int, height: int, width: int, size: tuple[float, float]
) -> tuple[torch.Tensor, list[str]]:
    """Random training clips, uint8 of shape (batch, frames, height, width, 3), and their captions."""
    scenes = [sample_scene(rng, size=size) for _ in range(batch)]
    clips = np.stack([render(scene, frames, height, width) for scene in scenes])
    return torch.from_numpy(clips), [scene.caption for scene in scenes]


def to_model(clips: torch.Tensor) -> torch.Tensor:
    """uint8 (batch, frames, height, width, 3) to float in -1..1, (batch, 3, frames, height, width)."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_uint8(clips: torch.Tensor) -> np.ndarray:
    """The way back of `to_model`."""
    return ((clips.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()


class Clock:
    """Training time, kept over restarts: `spent` seconds of `budget`."""

    def __init__(self, budget: float, spent: float = 0.0) -> None:
        self.budget, self.before, self.start = budget, spent, time.monotonic()

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self.start

    @property
    def done(self) -> float:
        """Share of the budget that is used up, 0..1."""
        return min(1.0, self.spent / self.budget)

    def rate(self, step: int, warmup: int = 100) -> float:
        """Factor on the learning rate: a linear warm-up in steps, then flat, then a linear way down in time."""
        return min(1.0, (step + 1) / warmup, (1 - self.done) / 0.4)
