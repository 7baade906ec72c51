"""Methods for videos longer than trained: which frames are read, and what frequencies come from where."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.patches.sparse.freelong import FreeLong
from accelplug.patches.sparse.lvsa import Lvsa

SITE = Site("blocks.0.attn1", "transformer", "self", 0, 1)


def frames_read(method: Lvsa, layout: Layout, step: int) -> torch.Tensor:
    """Which frames those of each frame read, by the plan of a step; every token of a frame reads the same ones, whole."""
    params = method.prepare(SITE, layout, Clock(step, 50), {})
    slot = params.tiles.slot_of_token()
    mask = params.plan.dense_mask()[0, 0][slot][:, slot]
    visual = slice(layout.text_before, layout.text_before + layout.visual)
    text = torch.ones(layout.length, dtype=torch.bool)
    text[visual] = False
    assert mask[text].all()
    assert mask[:, text].all()
    frames = layout.grid_thw[0]
    by_frame = mask[visual, visual].unflatten(0, (frames, -1)).unflatten(2, (frames, -1)).transpose(1, 2).flatten(2)
    assert (by_frame.all(-1) == by_frame.any(-1)).all()
    return by_frame.all(-1)


@pytest.mark.parametrize(
    ("frames", "native", "first", "window"), [(45, 21, 1, 4), (33, 17, 1, 2), (19, 9, 0, 1), (22, 21, 2, 3)]
)
def test_lvsa_reads_a_window_and_anchors_that_move_on(frames: int, native: int, first: int, window: int) -> None:
    layout = Layout((frames, 3, 5), text_after=7)
    method = Lvsa({"native": native, "first": first, "window": window, "block": 8})
    period = method.period(frames)
    seen = torch.zeros(frames, dtype=torch.bool)
    for step in range(period):
        read = frames_read(method, layout, step)
        anchors = {(step + i * period) % frames for i in range(math.ceil(frames / period))} | set(range(first))
        assert read[:, sorted(anchors)].all()
        seen[sorted(anchors)] = True
        # As many for every frame: the anchors, and 2 W + 1 others around it without a gap but for anchors.
        assert (read.sum(-1) == len(anchors) + min(2 * window + 1, frames - len(anchors))).all()
        for frame in range(frames):
            near = [t for t in range(frames) if read[frame, t] and t not in anchors]
            assert all(t in anchors or read[frame, t] for t in range(min(near), max(near) + 1))
            assert min(near) <= frame <= max(near) or frame in anchors
    assert seen.all()
    assert torch.equal(frames_read(method, layout, period), frames_read(method, layout, 0))


# gglorian/LVSA, docs/tuning.md: share of frames that are not read, W 4, one leading frame, Wan and HunyuanVideo.
@pytest.mark.parametrize(
    ("frames", "native", "sparse"),
    [
        *((33, 21, 0.21), (41, 21, 0.44), (49, 21, 0.55), (65, 21, 0.66), (81, 21, 0.74), (121, 21, 0.82)),
        *((49, 33, 0.31), (81, 33, 0.56), (121, 33, 0.72)),
    ],
)
def test_lvsa_reads_as_much_as_the_release(frames: int, native: int, sparse: float) -> None:
    read = Lvsa({"native": native}).reads(frames)
    assert float(1 - read.float().mean()) == pytest.approx(sparse, abs=0.006)


def test_lvsa_reads_the_trained_length_whole() -> None:
    method = Lvsa({"native": 5})
    assert method.prepare(SITE, Layout((5, 3, 4)), Clock(), {}) is None
    still = Lvsa({"native": 5, "window": 1, "rotate": False, "block": 8})
    assert torch.equal(frames_read(still, Layout((11, 3, 4)), 0), frames_read(still, Layout((11, 3, 4)), 3))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(("frames", "scales"), [(9, (1, 2)), (6, (1,)), (17, (1, 2, 4))])
def test_freelong_takes_each_frequency_from_the_window_that_can_tell_it(
    frames: int, scales: tuple[int, ...], every: int
) -> None:
    native, layout = 4, Layout((frames, 2, 3), text_before=2, text_after=3)
    q, k, v = (torch.randn(2, 2, layout.length, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))

    def dense(mask: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)

    method = FreeLong({"native": native, "every": every, "block": 8, "backend": "reference"})
    assert method.scales(frames) == scales
    out = method.attend(AttentionCall(q, k, v, None, 0.3, dense), method.prepare(SITE, layout, Clock(), {}).to("cpu"))

    frame = torch.full((layout.length,), -1)
    frame[2 : 2 + layout.visual] = torch.arange(frames).repeat_interleave(6)
    text = frame < 0
    always = text[:, None] | text
    near = [((frame[:, None] - frame).abs() < scale * native // 2) for scale in scales] + [frame % every == 0]
    at_scale = [dense(always | mask)[..., ~text, :].unflatten(-2, (frames, -1)) for mask in near]
    spectra = [torch.fft.fft(x.double(), dim=2) for x in at_scale]
    angle = 2 * math.pi * torch.fft.fftfreq(frames, dtype=torch.float64).abs()
    edges = [math.inf, *(math.pi / (2 * scale) + 1e-9 for scale in (*scales[1:], frames / native)), -1]
    bands = [((angle > low) & (angle <= high))[:, None, None] for high, low in pairwise(edges)]
    fused = torch.stack([x * band for x, band in zip(spectra, bands, strict=True)]).sum(0)
    torch.testing.assert_close(out[..., ~text, :], torch.fft.ifft(fused, dim=2).real.float().flatten(2, 3))
    torch.testing.assert_close(out[..., text, :], dense()[..., text, :])


@pytest.mark.parametrize("config", [{"native": 9}, {"native": 20}])
def test_freelong_leaves_the_trained_length_dense(config: dict[str, Any]) -> None:
    assert FreeLong(config).prepare(SITE, Layout((9, 2, 3)), Clock(), {}) is None
