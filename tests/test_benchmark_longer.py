"""benchmarks.longer: what it counts, and which earlier runs stand beside new ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.longer import ARMS, OF_SIZE, PLAIN, SIZES, arms_of, collected, drawn, fine, power


def made(arm: str = PLAIN, size: str = "2x", caption: int = 0, **others: Any) -> dict[str, Any]:
    row = {
        "size": size,
        "arm": arm,
        "recipe": ARMS[arm],
        "settings": SIZES[size],
        "caption": caption,
        "seed": 0,
        "git": "old",
    }
    return json.loads(json.dumps({**row, **others}))


def test_earlier_runs_are_kept_while_their_arm_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(made(git="new")))
    before = [
        made(),
        made(caption=1),
        made("lvsa"),
        made("lvsa", caption=1, recipe=None),
        made(size="canvas", settings={**SIZES["canvas"], "num_frames": 9}),
        made(caption=2) | {"arm": "gone"},
    ]
    found = [(row["arm"], row["caption"], row["git"]) for row in collected(tmp_path, before)]
    assert found == [("lvsa", 0, "old"), (PLAIN, 0, "new"), (PLAIN, 1, "old")]
    assert [row["git"] for row in collected(None, before)] == ["old"] * 3


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_arms_of_its_own(size: str) -> None:
    arms = arms_of(size)
    assert len(arms) == len({arm.name for arm in arms})
    assert {arm.name for arm in arms} >= {PLAIN}
    assert all(arm.settings == SIZES[size] for arm in arms)
    assert ("freeswim" in {arm.name for arm in arms}) == (size in OF_SIZE and len(arms) > 1)


def test_what_the_trained_canvas_cannot_hold_is_fine() -> None:
    rows, columns = SIZES["larger"]["height"], SIZES["larger"]["width"]
    y, _ = np.mgrid[:rows, :columns]
    waves = {n: 128 + 100 * np.cos(2 * np.pi * n * y / rows) for n in (63, 66)}  # of 64 that 128 rows can hold
    clips = {n: np.broadcast_to(wave[None, ..., None], (2, rows, columns, 3)) for n, wave in waves.items()}
    assert fine(clips[63]) == pytest.approx(0, abs=1e-6)
    assert fine(clips[66]) == pytest.approx(1000)
    assert fine(np.zeros((2, rows, columns, 3))) == 0
    assert drawn("larger", [0])["agreement"] == 1


def test_bands_hold_all_of_the_power_over_time() -> None:
    clip = np.random.default_rng(0).integers(0, 255, (9, 4, 4, 3))
    assert sum(power(clip, *band) for band in ((0, 1 / 8), (1 / 8, 1 / 4), (1 / 4, 1))) == pytest.approx(1)
