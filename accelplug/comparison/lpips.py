"""LPIPS (arXiv 1801.03924; AlexNet, version 0.1): how different two pictures look, by the features of a network that classifies them.

    d(x, y) = sum over layers l of the mean over pixels of  w_l . (f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)|)^2

f_l are AlexNet's five activations, w_l one weight a channel, fitted to what people said. Nothing is ever downloaded: AlexNet's weights
are read where torch keeps what torchvision brings, the w_l come with torchmetrics.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torchmetrics
from numpy.typing import NDArray
from torch import Tensor, nn

ALEXNET = "alexnet-owt-7be5be79.pth"
"""As torchvision names it, with the beginning of its sha256."""
CONVOLUTIONS = {
    0: (3, 64, 11, 4, 2),
    3: (64, 192, 5, 1, 2),
    6: (192, 384, 3, 1, 1),
    8: (384, 256, 3, 1, 1),
    10: (256, 256, 3, 1, 1),
}
"""By their place among the features of torchvision's AlexNet: channels in and out, size, stride, padding."""
POOLED = (3, 6)
"""Ahead of these the maximum of 3 x 3 is taken, at every second pixel."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of red, green and blue in [-1, 1]."""
SMALLEST = 31
"""Pixels below which nothing is left behind the last pooling."""
AT_ONCE = 8
"""Frames that go through the network together."""


def weights_file() -> Path:
    """Return where AlexNet's weights are looked for."""
    return Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET


def linear_file() -> Path:
    """Return where torchmetrics has the weights of the channels."""
    return Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"


def no_lpips() -> str | None:
    """Return why LPIPS cannot be measured on this machine; None where it can."""
    if weights_file().is_file():
        return None
    return (
        f"lpips needs AlexNet's weights in {weights_file()}, and they are not there; nothing is downloaded. "
        "Put torchvision's file there, or bound psnr or ssim instead."
    )


def lpips(clip: NDArray[np.float32], reference: NDArray[np.float32]) -> float | None:
    """Return LPIPS of two clips (F, H, W, 3) in [0, 1], mean over frames; None without weights, or of tiny frames."""
    if no_lpips() is not None or min(clip.shape[1:3]) < SMALLEST:
        return None
    network, found = _network(weights_file()), []
    with torch.no_grad():
        for start in range(0, len(clip), AT_ONCE):
            pair = [
                torch.from_numpy(np.ascontiguousarray(x[start : start + AT_ONCE])).permute(0, 3, 1, 2).float()
                for x in (clip, reference)
            ]
            found.append(network(*pair))
    return float(torch.cat(found).mean())


@cache
def _network(file: Path) -> Lpips:
    return Lpips(*(torch.load(path, map_location="cpu", weights_only=True) for path in (file, linear_file())))


class Lpips(nn.Module):
    """The network, from the weights of AlexNet, ``features.0.weight`` ..., and of LPIPS, ``lin0.model.1.weight`` ..."""

    def __init__(self, alexnet: dict[str, Tensor], linear: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for place, (channels, out, size, stride, padding) in CONVOLUTIONS.items():
            self.layers[str(place)] = layer = nn.Conv2d(channels, out, size, stride, padding)
            layer.load_state_dict({name: alexnet[f"features.{place}.{name}"] for name in ("weight", "bias")})
        self.weights = [linear[f"lin{i}.model.1.weight"].flatten()[:, None, None] for i in range(len(CONVOLUTIONS))]
        self.requires_grad_(False)

    def features(self, frames: Tensor) -> list[Tensor]:
        """Return the activations of frames (F, 3, H, W) in [0, 1], each of length 1 over its channels."""
        shift, scale = (torch.tensor(x)[:, None, None] for x in (SHIFT, SCALE))
        x, found = (2 * frames - 1 - shift) / scale, []
        for place, layer in self.layers.items():
            x = nn.functional.max_pool2d(x, 3, 2) if int(place) in POOLED else x
            x = layer(x).relu()
            found.append(x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt())
        return found

    def forward(self, frames: Tensor, reference: Tensor) -> Tensor:
        """Return LPIPS of each frame, (F,)."""
        parts = zip(self.features(frames), self.features(reference), self.weights, strict=True)
        return torch.stack([((a - b).square() * w).sum(1).mean((1, 2)) for a, b, w in parts]).sum(0)
