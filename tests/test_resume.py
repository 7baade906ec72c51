"""A comparison that was killed goes on where it was, ends as it would have, and notices what is not as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import accelplug
from accelplug.comparison.result import Comparison
from accelplug.comparison.study import Study
from accelplug.errors import AccelplugError
from tests.patch_rows import ROWS
from tests.test_arms import radial
from tests.test_floors import calls

ARMS = {"recipe": ROWS["radial"].recipe(), "function": radial}
TIMES = {
    "latency_ms",
    "denoise_ms",
    "step_ms",
    "peak_mib",
    "attention_ms",
    "predicted",
    "denoising_predicted",
    "forward_predicted",
    "ideal",
}


def compare(folder: Path | None, **more: Any) -> Comparison:
    pipe, inputs = calls(2)
    more = {"recipe": ARMS, "inputs": inputs, "seeds": [0], "floors": "all", "progress": False, **more}
    return accelplug.compare(pipe, resume=folder, **more)


def timeless(value: Any) -> Any:
    """What a comparison found, without what a clock said."""
    if isinstance(value, dict):
        return {
            key: timeless(item)
            for key, item in value.items()
            if key not in TIMES | {"choices", "paired", "verdict", "timed", "forced"}
        }
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole() -> Comparison:
    return compare(None)


class Killed(BaseException):
    """As a machine that is switched off."""


@pytest.mark.parametrize("after", [1, 4, 8, 10, 13])
def test_resumed_equals_uninterrupted(whole: Comparison, after: int, tmp_path: Path) -> None:
    run = Study.run
    made: list[tuple[int, ...]] = []

    def killed(self: Study, *pair: int) -> Any:
        if len(made) == after:
            raise Killed
        made.append(pair)
        return run(self, *pair)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "run", killed)
        with pytest.raises(Killed):
            compare(tmp_path)
    resumed = compare(tmp_path)
    assert ("in 2 sittings" in resumed.timed) == (after > 6), "traces alone are no sitting"
    assert timeless(resumed.to_dict()) == timeless(whole.to_dict())
    assert resumed.clips.keys() == whole.clips.keys()
    assert all(np.array_equal(resumed.clips[key], clip) for key, clip in whole.clips.items())


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    compare(tmp_path, recipe=ARMS["recipe"], floors=False)
    return tmp_path


def counted(folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[Comparison, int]:
    run, made = Study.run, []
    monkeypatch.setattr(Study, "run", lambda self, *pair: made.append(pair) or run(self, *pair))
    found = compare(folder, recipe=ARMS["recipe"], floors=False, **more)
    return found, len(made)


def test_what_is_finished_is_not_run_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, runs = counted(finished, monkeypatch)
    assert runs == 0
    assert [len(row.samples) for row in found.rows] == [2, 2]


def test_seeds_may_be_added(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, runs = counted(finished, monkeypatch, seeds=[0, 1])
    assert runs == 2 + 2 * 2, "both warm up once"
    assert [len(row.samples) for row in found.rows] == [4, 4]


def test_a_clip_that_is_gone_is_made_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for clip in sorted((finished / "clips").iterdir())[:1]:
        clip.write_bytes(b"half a clip")
    found, runs = counted(finished, monkeypatch)
    assert 1 <= runs <= 3, "a warm-up, the run, and the dense one beside it"
    assert len(found.clips) == 4


def test_a_line_that_is_half_written_is_run_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (rows,) = finished.glob("rows-*.jsonl")
    rows.write_bytes(rows.read_bytes()[:-20])
    _, runs = counted(finished, monkeypatch)
    assert 1 <= runs <= 3


def test_changed_settings_are_noticed(finished: Path) -> None:
    pipe, inputs = calls(2)
    with pytest.raises(AccelplugError, match=r"differs in settings, .*steps': 2.* there and .*steps': 3.* here"):
        compare(finished, inputs=[{**call, "num_inference_steps": 3} for call in inputs])
    with pytest.raises(AccelplugError, match="differs in judges"):
        compare(finished, foreground=lambda clip: clip.max(-1) > 90)
    pipe.transformer.proj_out.weight.data.mul_(1.01)
    with pytest.raises(AccelplugError, match="differs in model"):
        accelplug.compare(pipe, ARMS["recipe"], inputs, resume=finished, progress=False)


def test_another_arm_of_the_same_name_is_noticed(finished: Path) -> None:
    (name,) = {row.name for row in compare(finished, recipe=ARMS["recipe"], floors=False).rows} - {"dense"}
    with pytest.raises(AccelplugError, match=f"holds another arm '{name}'"):
        compare(finished, recipe={name: radial})


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AccelplugError, match="expected a folder"):
        compare(tmp_path / "file")
