"""Every result shows itself in one way, and work tells how far it has come."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.table import Table

from accelplug.errors import AccelplugError
from accelplug.show import Shown, jsonable, progress


@dataclass(repr=False)
class Result(Shown):
    name: str = "a < b"
    figures: dict[str, Any] = field(default_factory=dict)

    def __rich__(self) -> Table:
        table = Table("name", title="result")
        table.add_row(self.name)
        return table


def test_a_result_prints_as_its_table_and_never_as_its_data() -> None:
    result = Result(figures={"picture": object()})
    assert "a < b" in str(result)
    assert str(result) == repr(result)
    assert "object at" not in str(result)
    assert "a &lt; b" in result._repr_html_()


def test_a_notebook_shows_a_result_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook rich displays what it prints, and colours are asked for by the environment."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    displayed: list[Any] = []
    monkeypatch.setattr("rich.jupyter.display", lambda *shown: displayed.append(shown))
    result = Result()
    assert "a < b" in str(result)
    assert "\x1b" not in str(result)
    assert "a &lt; b" in result._repr_html_()
    assert not displayed


def test_a_result_writes_json_and_a_page_and_says_where(tmp_path: Path) -> None:
    result = Result(figures={"psnr_db": math.inf, "mcc": math.nan, "heads": np.arange(3), "mass": torch.tensor([0.5])})
    assert result.to_json(tmp_path / "r.json") == tmp_path / "r.json"
    kept = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert kept == {"name": "a < b", "figures": {"psnr_db": "inf", "mcc": None, "heads": [0, 1, 2], "mass": [0.5]}}
    page = result.to_html(tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "a &lt; b" in page
    with pytest.raises(AccelplugError, match="no folder"):
        result.to_json(tmp_path / "missing" / "r.json")


def test_what_json_cannot_hold_is_text() -> None:
    assert jsonable({1: Path("x"), "s": {"b", "a"}, "t": (True, None, 2)}) == {
        "1": "x",
        "s": ["a", "b"],
        "t": [True, None, 2],
    }


def test_without_a_terminal_progress_is_one_line_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("comparing", 4) as tell:
        tell(0, "dense")
        tell(1, "dense")
        tell(2, "radial")
        tell(4, "done")
    assert capsys.readouterr().err.splitlines() == [
        "[  0%] comparing: dense",
        "[ 50%] comparing: radial",
        "[100%] comparing: done",
    ]


def test_progress_that_is_not_shown_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("comparing", 4, show=False) as tell:
        tell(1, "dense")
    out = capsys.readouterr()
    assert (out.out, out.err) == ("", "")


def test_what_lasts_is_told_again_with_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("accelplug.show.time.monotonic", lambda: clock[0])
    with progress("examining", 100) as tell:
        for seconds, done in ((0, 0), (10, 30), (16, 40), (30, 70)):
            clock[0] = seconds
            tell(done, "vhr", f"{done} of 100 answers")
    assert capsys.readouterr().err.splitlines() == [
        "[  0%] examining: vhr, 0 of 100 answers",
        "[ 40%] examining: vhr, 40 of 100 answers, 0:24 left",
    ]
