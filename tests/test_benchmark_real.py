"""benchmarks.real: a dry run writes what verify reads, and goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from accelplug.comparison.result import Comparison
from accelplug.comparison.study import Study
from accelplug.recipe import read_file
from benchmarks import real
from tests.test_arms import radial


def test_a_dry_run_goes_all_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, made = Study.run, []
    monkeypatch.setattr(Study, "run", lambda self, *pair: made.append(pair) or run(self, *pair))
    asked = [str(tmp_path), "--model", "wan2.2", "--recipe", "sparse", "--prompts", "3", "--dry-run"]
    assert real.main(asked) == 0
    found = Comparison.from_json(tmp_path / "wan2.2.json")
    assert [row.name for row in found.rows][:2] == ["dense", "sparse"]
    assert set(found.floors) == {"kernel", "dtype", "seed"}
    assert "who beats whom" in capsys.readouterr().out
    (row,) = (row for row in read_file(tmp_path / "wan2.2.yaml").recipe("sparse").measured if len(row.prompts) == 3)
    assert row.floors["kernel"]["psnr_db"].mean > row.psnr_db.mean
    assert (tmp_path / "wan2.2.html").exists()
    made.clear()
    assert real.main(asked) == 0
    assert made == [], "what is finished is not run again"
    assert len([row for row in read_file(tmp_path / "wan2.2.yaml").recipe("sparse").measured if len(row.prompts) == 3]) == 1


def test_functions_go_by_module_and_name() -> None:
    assert real.function("tests.test_arms:radial") is radial


def test_a_model_that_cannot_be_loaded_leaves_the_next_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(real, "loaded", lambda model, offload: tried.append(model.repository) or 1 / 0)
    assert real.main([str(tmp_path)]) == len(real.MODELS) == len(tried)
