"""Quality budgets in the user's terms: ``fg_psnr>=26``, ``ssim>=.9, agreement>=1``, or a function of two clips."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelplug.errors import AccelplugError, nearest

if TYPE_CHECKING:
    import numpy as np

    from accelplug.comparison.result import Sample

METRICS = {
    "psnr": ("psnr_db", ">="),
    "fg_psnr": ("fg_psnr_db", ">="),
    "ssim": ("ssim", ">="),
    "agreement": ("agreement", ">="),
    "latent_distance": ("latent_distance", "<="),
}
"""Name in a budget -> attribute of a `Sample`, and the side on which it is good."""


@dataclass(frozen=True)
class Bound:
    """One bound of a budget, on every prompt and seed: the worst one counts.

    Attributes
    ----------
    name : a metric of `METRICS`, or any name where `score` is given.
    limit : the worst value that is still good.
    higher_is_better : which side of the limit is good.
    score : ``(dense, candidate) -> float`` on clips, uint8 (F, H, W, 3); None for a metric of `METRICS`.
    """

    name: str
    limit: float
    higher_is_better: bool = True
    score: Callable[[np.ndarray, np.ndarray], float] | None = None

    def value(self, sample: Sample, dense: np.ndarray, candidate: np.ndarray) -> float:
        """Return what a run scores.

        Raises
        ------
        AccelplugError
            If the metric was not measured, as ``fg_psnr`` without a ``foreground``.
        """
        if self.score is not None:
            return float(self.score(dense, candidate))
        found = getattr(sample, METRICS[self.name][0])
        if found is None:
            needs = {"fg_psnr": "foreground=", "agreement": "detect="}.get(self.name, "latents of the pipeline")
            raise AccelplugError(f"The budget bounds {self.name}, which needs {needs}. Pass it to tune, or bound psnr.")
        return found

    def margin(self, value: float) -> float:
        """How far a value lies on the good side; negative if it does not. NaN is bad."""
        if math.isnan(value):
            return -math.inf
        return value - self.limit if self.higher_is_better else self.limit - value

    def __str__(self) -> str:
        return f"{self.name}{'>=' if self.higher_is_better else '<='}{self.limit:g}"


def parse(budget: str | Bound | Sequence[str | Bound]) -> tuple[Bound, ...]:
    """Read a budget: bounds split by commas, `Bound` objects, or a list of either.

    Raises
    ------
    AccelplugError
        If a bound cannot be read or names no metric.
    """
    items = budget.split(",") if isinstance(budget, str) else [budget] if isinstance(budget, Bound) else list(budget)
    bounds = tuple(item if isinstance(item, Bound) else _bound(item) for item in items)
    if not bounds:
        raise AccelplugError("The budget is empty; give at least one bound, such as 'psnr>=26'.")
    return bounds


def _bound(text: str) -> Bound:
    found = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*(-?\d*\.?\d+)\s*", text)
    if found is None:
        raise AccelplugError(f"A bound is a metric, >= or <=, and a number, such as 'psnr>=26', got {text!r}.")
    name, side, limit = found.groups()
    if name == "lpips":
        return Bound(name, float(limit), side == ">=", _lpips())
    if name not in METRICS:
        raise AccelplugError(
            f"There is no metric {name!r}{nearest(name, METRICS)}. Known: {', '.join(METRICS)}, lpips; for one of your own "
            "pass Bound(name, limit, score=(dense, candidate) -> float)."
        )
    if side != METRICS[name][1]:
        raise AccelplugError(f"{name} is good on the other side: write {name}{METRICS[name][1]}{limit}.")
    return Bound(name, float(limit), side == ">=")


def _lpips() -> Callable[[np.ndarray, np.ndarray], float]:
    """LPIPS over frames, where torchvision and the weights of AlexNet are on disk: nothing is ever downloaded."""
    from pathlib import Path

    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(folder.glob("alexnet-*.pth")):
        raise AccelplugError(
            f"lpips needs torchvision and AlexNet's weights in {folder}, and they are not there; bound psnr or ssim instead."
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)

    def score(dense: np.ndarray, candidate: np.ndarray) -> float:
        frames = [torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 255 for clip in (dense, candidate)]
        return float(metric(*frames))

    return score
