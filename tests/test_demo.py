"""The demo, as a user runs it, at a tiny size: what it prints without a terminal, and the page and picture that it leaves."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accelplug import demo, zoo
from accelplug.cli import main

LINE = re.compile(r"^\[ *\d+%\] |, \d+:\d\d left$")
"""What stands around a line of progress."""
TINY = {"num_frames": 5, "height": 32, "width": 48, "num_inference_steps": 4, "guidance_scale": 3.0}


def test_the_video_model_before_and_after(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in ("MEDIUM", "SMALL"):
        monkeypatch.setattr(zoo, size, TINY)
    assert main(["demo", "--report", str(tmp_path / "demo.html")]) == 0
    out, told = capfd.readouterr()
    for name in demo.RECIPES:
        (line,) = (line.split() for line in out.splitlines() if line.split()[:1] == [name])
        assert line[-1] == "yes", "bit for bit the same once it is removed"
        assert line[2].endswith("x")
    runs = ["dense", *demo.RECIPES]
    assert [LINE.sub("", line) for line in told.splitlines()] == [
        *(f"comparing: tracing {name}" for name in runs),
        *(f"comparing: timing {name}, seed 0" for name in runs),
        *(f"removing: {name}" for name in demo.RECIPES),
    ], "a line for each run, and nothing of anybody else"
    assert Image.open(tmp_path / "demo.png").height > 4 * 32
    assert "sparse-cache" in (tmp_path / "demo.html").read_text(encoding="utf-8")


def test_the_vision_language_model_before_and_after(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "llava-scenes", "--report", str(tmp_path / "demo.html")]) == 0
    out, told = capfd.readouterr()
    for who in ("truth", "stock", *demo.PATCHES):
        assert f" {who} " in out
    assert "image" in out
    steps = ["where it looks", "stock", *demo.PATCHES]
    assert [LINE.sub("", line) for line in told.splitlines()] == [f"asking: {step}" for step in steps]
    assert Image.open(tmp_path / "demo.png").width > 1000
    assert (tmp_path / "demo.html").read_text(encoding="utf-8").count("<img") == 7


def test_a_filmstrip_has_a_row_a_clip_and_its_first_and_last_frame() -> None:
    first, second = (np.zeros((7, 4, 6, 3), np.uint8) for _ in range(2))
    first[0], first[-1], second[:] = 60, 120, 200
    made = demo.filmstrip({"a": first, "b": second}, moments=3, scale=1, label=10)
    pixels = np.asarray(Image.open(io.BytesIO(made)))
    assert pixels.shape == (2 * (4 + 2), 10 + 3 * (6 + 2), 3)
    assert [int(pixels[2, 10 + place * 8 + 3, 0]) for place in range(3)] == [60, 0, 120]
    assert (pixels[6 + 2, [13, 21, 29]] == 200).all()
