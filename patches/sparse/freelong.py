"""FreeLong++: slow change from attention over the whole video, quick change from windows, put together by frequency over time.

FreeLong++'s multi-band spectral fusion (arXiv 2507.00162, after arXiv 2407.19918), for videos longer than a model was trained on, without
training. With T_0 latent frames trained and T asked for, attention is computed once for each scale a = 1, 2, 4, ... below T / T_0, and
once over all frames:

    ``Z_a = attention of i to the frames j with |i - j| < floor(a T_0 / 2)``

What a window of a T_0 frames can tell apart is taken from it, in bands of the frequency over time f, pi being the highest:

    ``Z = IFFT(sum_a P_a FFT(Z_a)),   P_a = 1 where pi / (2 b) < f <= pi / (2 a), else 0``

with b the next scale (T / T_0 for the whole video) and no upper end for a = 1. At 4 times the length the whole video has [0, pi / 8],
windows of twice the length (pi / 8, pi / 4], and those of the trained length the rest. The paper transforms frames, rows and columns; its
bands are said of time alone, where the transforms of rows and columns cancel. So the sum is one of real T x T matrices along frames, which
together are the identity: ``M_a = IFFT diag(P_a) FFT``. Where all frames are read, one in `every` may stand for them (the paper's sparse
variant: 2). Its noise, SpecMix, is not here: a pipeline takes latents.

It costs more than dense attention: at twice the length 1.4 times, at 4 times 1.6. No official code was released.

Experimental: slow change is that of dense attention, and where this fails so does the whole. On the bundled model at twice the length
plain extrapolation shows what its caption says in none of 6 runs, and this in none of 5; `lvsa`, which costs less than dense, in 5 of 5. So
do interpolated positions, alone in 5 of 5, and beside this in 3 of 3 (benchmarks/longer.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from accelplug.call import Clock, Layout, Site
from accelplug.kernels.attention import Backend
from accelplug.patches.base import Config, Patch, Positive
from accelplug.patches.sparse.frames import FrameSparse
from accelplug.patches.sparse.template import BlockParams

if TYPE_CHECKING:
    from accelplug.call import AttentionCall


class _Windows(FrameSparse):
    """Frames less than `reach` apart, of which every `every`-th is read."""

    def reads(self, frames: int, reach: int = 1, every: int = 1) -> Tensor:
        frame = torch.arange(frames)
        return ((frame[:, None] - frame).abs() < reach) & (frame % every == 0)


@dataclass(frozen=True, eq=False)
class Scales:
    """What `FreeLong.attend` needs.

    Attributes
    ----------
    windows : params of each scale, the smallest first; None where all is read, by dense attention.
    bands : float32 (scales, T, T), how much of a frame's output at each scale every frame's comes to.
    layout : of the call.
    """

    windows: tuple[BlockParams | None, ...]
    bands: Tensor
    layout: Layout

    def to(self, device: torch.device | str) -> Self:
        """Return the params with their tensors on `device`."""
        windows = tuple(window and window.to(device) for window in self.windows)
        return replace(self, windows=windows, bands=self.bands.to(device))


class FreeLong(Patch):
    """Windows of several lengths and the whole video, each for its band of frequencies over time."""

    class Config(Config):
        native: Positive = Field(
            21,
            description="Latent frames that the model was trained on. Wan 21 (81 in pixels), HunyuanVideo 33, CogVideoX 13.",
        )
        every: int = Field(
            1, ge=1, le=8, description="Of how many frames one is read over the whole video. Paper: 1, sparse 2."
        )
        block: int = Field(128, ge=8, le=1024, multiple_of=8, description="Slots per block of queries and of keys.")
        backend: Backend = Field("auto", description="Kernel that runs windows; as for other block-sparse patches.")

    speed: ClassVar[bool] = False
    config: Config

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._windows = _Windows({"block": self.config.block, "backend": self.config.backend})

    def scales(self, frames: int) -> tuple[int, ...]:
        """Return the scales of windows that are shorter than a video of `frames`, as multiples of the trained length."""
        native = self.config.native
        return tuple(1 << n for n in range(frames.bit_length()) if native << n < frames)

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> Scales | None:
        frames, config = layout.grid_thw[0], self.config
        if not (scales := self.scales(frames)):
            return None
        windows = [self._windows.params(layout, reach=max(scale * config.native // 2, 1)) for scale in scales]
        whole = None if config.every == 1 else self._windows.params(layout, reach=frames, every=config.every)
        return Scales((*windows, whole), _bands(frames, config.native, scales), layout)

    def attend(self, call: AttentionCall, params: Scales) -> Tensor:
        frames, first = params.layout.grid_thw[0], params.layout.text_before
        visual = slice(first, first + params.layout.visual)
        fused = call.v.new_zeros((), dtype=torch.float32)
        for window, band in zip(params.windows, params.bands, strict=True):
            out = call.dense() if window is None else self._windows.attend(call, window)
            fused = fused + band @ out[..., visual, :].float().unflatten(-2, (frames, -1)).flatten(-2)
        # Text is answered where all frames are read: the last scale.
        fused = fused.unflatten(-1, (-1, out.shape[-1])).flatten(-3, -2).to(out.dtype)
        return torch.cat([out[..., :first, :], fused, out[..., visual.stop :, :]], -2)

    def choose_backend(self, call: AttentionCall, params: Scales) -> None:
        for window in params.windows:
            if window is not None:
                self._windows.choose_backend(call, window)

    def inspect(self, call: AttentionCall, params: Scales) -> tuple[float, None]:
        return sum(1.0 if window is None else self._windows.inspect(call, window)[0] for window in params.windows), None


@lru_cache(maxsize=64)
def _bands(frames: int, native: int, scales: tuple[int, ...]) -> Tensor:
    """M_a of every scale and of the whole video, float32 (scales + 1, T, T)."""
    place = torch.arange(frames)
    waves = torch.minimum(place, frames - place)  # f in whole waves: f = 2 pi waves / T
    ends = [math.inf, *(frames / (4 * scale) for scale in scales[1:]), native / 4, -1.0]
    bands = torch.stack([(waves > low) & (waves <= high) for high, low in pairwise(ends)])
    impulses = torch.fft.ifft(bands.double()).real  # what a lone frame comes to: M_a[t, u] goes by t - u
    return impulses[:, (place[:, None] - place) % frames].float()
