"""Tokens of several frames, each with special tokens of its own ahead of its grid: from frame by frame to special ones first, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def specials_first(x: Tensor, frames: int, special: int) -> Tensor:
    """Put the special tokens of all frames ahead of all patches: (B, H, frames * (special + patches), D), both frame by frame."""
    by_frame = x.unflatten(2, (frames, -1))
    return torch.cat([by_frame[:, :, :, :special].flatten(2, 3), by_frame[:, :, :, special:].flatten(2, 3)], 2)


def frame_by_frame(x: Tensor, frames: int, special: int) -> Tensor:
    """Undo `specials_first`."""
    ahead, patches = x.split([frames * special, x.shape[2] - frames * special], 2)
    return torch.cat([ahead.unflatten(2, (frames, special)), patches.unflatten(2, (frames, -1))], 3).flatten(2, 3)


def frames_as_batch(x: Tensor, frames: int, special: int) -> Tensor:
    """Take what `specials_first` gives apart into (B * frames, H, special + patches, D)."""
    return frame_by_frame(x, frames, special).unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)


def batch_as_frames(x: Tensor, frames: int, special: int) -> Tensor:
    """Undo `frames_as_batch`."""
    return specials_first(x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2, 3), frames, special)
