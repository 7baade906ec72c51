"""Which values are massive, and which heads see the image: what is told from hidden states and from heads' outputs.

Massive values make sinks (VAR, arXiv 2503.03321); vision-aware head divergence tells heads apart (VHR, arXiv 2412.13949). The patches
of those papers act on both, an inspection shows both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MASSIVE = 100
"""How many times the median of its own vector a value must be, to be one of the massive ones."""
UNMOVED = 1e-3
"""A head whose output moves by less than this share of its size has not seen that the image is gone: it is rounding that tells
the readings apart, as where a window holds no image, in a layer ahead of all that do."""


def normalised(hidden: Tensor) -> Tensor:
    """Hidden states (..., C) over their root mean square, float32: RMSNorm without its weight."""
    x = hidden.float()
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def massive(x: Tensor, threshold: float) -> Tensor:
    """Values of normalised vectors (..., C) that are massive: of at least `threshold`, and `MASSIVE` times their vector's median."""
    size = x.abs()
    return size >= (MASSIVE * size.median(-1, keepdim=True).values).clamp(min=threshold)


def divergence(seeing: Tensor, blind: Tensor) -> tuple[Tensor, Tensor]:
    """VHD and TA of heads, (B, H) float32 each, from their outputs (B, H, D_v) with and without the image."""
    seeing, blind = seeing.float(), blind.float()
    return (seeing - blind).norm(dim=-1), blind.square().sum(-1)


def vision_aware(vhd: Tensor, ta: Tensor, drop_outliers: bool = True, unmoved: float = UNMOVED) -> Tensor:
    """The upper half of heads by VHD, bool (B, H); outliers in VHD and TA count as 0, and so do heads that are `unmoved`."""
    idle = vhd <= unmoved * ta.sqrt()
    if drop_outliers:
        idle = idle | outliers(vhd, ta)
    vhd = vhd.masked_fill(idle, 0.0)
    return vhd > vhd.median(-1, keepdim=True).values


def outliers(vhd: Tensor, ta: Tensor) -> Tensor:
    """Heads, bool (B, H), whose VHD and TA are both over the mean + standard deviation: they fire because the image is gone."""
    high = [x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True, correction=0) for x in (vhd, ta)]
    return high[0] & high[1]
