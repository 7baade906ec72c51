"""Quality of a clip against a reference clip. Pure functions on float arrays (F, H, W, 3) in [0, 1]; a still has F = 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

Clip = NDArray[np.float32]
Mask = NDArray[np.bool_]


def psnr_db(clip: Clip, reference: Clip, mask: Mask | None = None) -> float:
    """Peak signal-to-noise ratio in dB, over the pixels of `mask` (F, H, W) if given; infinite for equal clips.

    NaN where the mask is empty.
    """
    error = np.square(clip.astype(np.float64) - reference)
    if mask is not None:
        if not mask.any():
            return math.nan
        error = error[mask]
    mse = float(error.mean())
    return math.inf if mse == 0 else -10 * math.log10(mse)


def ssim(clip: Clip, reference: Clip) -> float:
    """Structural similarity, mean over frames (torchmetrics, Gaussian window of 11 pixels)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() for x in (clip, reference))
    return float(structural_similarity_index_measure(a, b, data_range=1.0))


def foreground_psnr_db(clip: Clip, reference: Clip, foreground: Callable[[NDArray[np.uint8]], Mask]) -> float:
    """PSNR in dB over the union of both clips' objects: on a flat background a missing object would hardly count."""
    mask = foreground(to_uint8(clip)) | foreground(to_uint8(reference))
    return psnr_db(clip, reference, mask)


def relative_distance(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """L2 distance of latents over the norm of the reference."""
    a, b = latents.double(), reference.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def to_uint8(clip: Clip) -> NDArray[np.uint8]:
    """Float in [0, 1] to bytes."""
    return np.rint(np.clip(clip, 0, 1) * 255).astype(np.uint8)


METRICS = {
    "psnr": ("psnr_db", ">="),
    "fg_psnr": ("fg_psnr_db", ">="),
    "ssim": ("ssim", ">="),
    "agreement": ("agreement", ">="),
    "latent_distance": ("latent_distance", "<="),
}
"""Name in a budget -> attribute of a `Sample`, and the side on which it is good."""


TASK_METRICS = {
    "accuracy": ("accuracy", ">="),
    "mcc": ("mcc", ">="),
    "recall": ("recall", ">="),
    "hallucination": ("hallucination", "<="),
    "nll": ("nll", "<="),
    "speed": ("speed", ">="),
}
"""The same for language models: figures of `accelplug.comparison.questions.figures`, and stock seconds over a patch's."""
