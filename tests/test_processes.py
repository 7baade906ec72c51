"""Several processes share compare() and calibrate(), as accelerate launch starts them; all know all, one writes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import accelplug
from accelplug.comparison import ranks
from accelplug.comparison.ranks import Ranks, working
from accelplug.comparison.result import Comparison
from accelplug.errors import AccelplugError
from accelplug.recipe import Recipe
from accelplug.tuning import Bound
from tests import tiny_pipelines
from tests.test_tuning import pipeline, run, tell_times
from tests.two_ranks import together

SPARSE = {"rules": [{"patch": "radial", "with": {"block": 8, "decay": 0.2, "backend": "reference"}}]}
SEEDS = (0, 1, 2)


def small() -> tuple[Any, dict[str, Any]]:
    pipe, inputs = tiny_pipelines.decoding("wan")
    return pipe, {key: value for key, value in inputs.items() if key != "output_type"}


def compared(pipe: Any, inputs: dict[str, Any]) -> Comparison:
    return accelplug.compare(pipe, {"sparse": SPARSE}, inputs, SEEDS, progress=False)


def calibrated(pipe: Any, inputs: dict[str, Any], path: Path) -> Recipe:
    """In two parts, of three prompts each."""
    config = {"block": 8, "backend": "reference"}
    return accelplug.calibrate(pipe, "paro", [inputs] * 3, path=path, config=config, buckets=2, progress=False)


def work(rank: int, folder: str) -> dict:
    pipe, inputs = small()
    found = compared(pipe, inputs)
    found.to_json(f"{folder}/written by {rank}.json")
    recipe = calibrated(pipe, inputs, Path(folder, "shared.yaml"))
    given = {"figures": found.to_dict(), "clips": len(found.clips), "recipe": recipe.describe()}
    ranks.MEETING = timedelta(seconds=1)
    if rank == 0:  # last, for the other one goes home
        with pytest.raises(AccelplugError, match="did not come"), working(pipe):
            pass
    return given


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no distributed package")
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    first, second = together(work, tmp_path, meet=False)
    pipe, inputs = small()
    alone, recipe = compared(pipe, inputs), calibrated(pipe, inputs, tmp_path / "alone.yaml")
    assert first["figures"] == second["figures"]
    for shared, row in zip(first["figures"]["rows"], alone.to_dict()["rows"], strict=True):
        assert (shared["name"], shared["density"]) == (row["name"], row["density"])
        assert [(s["prompt"], s["seed"]) for s in shared["samples"]] == [(s["prompt"], s["seed"]) for s in row["samples"]]
        for ours, theirs in zip(shared["samples"], row["samples"], strict=True):
            assert ours["latent_distance"] == pytest.approx(theirs["latent_distance"], abs=1e-6)
            assert ours["latency_ms"] > 0
    assert first["figures"]["timed"].endswith("shared by 2 processes")
    assert (first["clips"], second["clips"]) == (len(alone.clips), 2)  # one pair's, dense and sparse
    assert first["recipe"] == second["recipe"] == recipe.describe().replace("alone", "shared")
    assert (tmp_path / "shared.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    left = {"written by 0.json", "shared.yaml", "shared.safetensors", "alone.yaml", "alone.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} - {"rank0.pt", "rank1.pt"} == left


def test_processes_that_hold_one_model_between_them_run_everything() -> None:
    assert Ranks(1, 2).share([0, 1, 2]) == [1]
    assert Ranks(1, 2, joined=True).share([0, 1, 2]) == [0, 1, 2]
    assert (Ranks(1, 2).parts, Ranks(1, 2, joined=True).parts) == (2, 1)


def test_a_process_alone_meets_nobody() -> None:
    with working(torch.nn.Linear(1, 1)) as alone:
        assert alone == Ranks()
        assert (alone.first, alone.share([1, 2]), alone.gather(3), alone.agreed(4)) == (True, [1, 2], [3], 4)


def tune(rank: int, folder: str) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        tell_times(patch)
        pipe, inputs = pipeline()
        found = run(pipe, inputs, "psnr>=1", seeds=4)
        said = "another process: ZeroDivisionError" if rank == 0 else "first process ended"
        with pytest.raises(AccelplugError, match=said):
            run(pipe, inputs, Bound("broken", 1.0, score=lambda *_: 1 / (1 - rank)), seeds=4)
    found.to_yaml(f"{folder}/written by {rank}.yaml")
    points = [(point.name, point.runs, point.speedup, point.verdict, point.worst) for point in found.points]
    ran = [(s.prompt, s.seed) for s in found.comparison.row(found.proven.name).samples]
    return {"points": points, "rules": found.proven.recipe, "ran": ran, "clips": len(found.comparison.clips)}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no distributed package")
def test_two_processes_share_the_runs_of_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = together(tune, tmp_path, meet=False)
    assert {**first, "clips": 0} == {**second, "clips": 0}
    assert (first["clips"] > 0, second["clips"]) == (True, 0)
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["written by 0.yaml"]
    name, runs, speedup, verdict, _ = first["points"][0]
    assert (name.split()[0], runs, speedup, verdict) == ("sol", 4, 2.0, "proven")
    assert sorted(first["ran"]) == [(0, 0), (0, 1), (0, 2), (0, 3)], (
        "two seeds searched and two proven, one of each in a process"
    )
    tell_times(monkeypatch)
    alone = run(*pipeline(), "psnr>=1", seeds=4)
    assert alone.proven.recipe == first["rules"]
    (shared,) = [worst for point, *_, worst in first["points"] if point == alone.proven.name]
    assert shared == pytest.approx(alone.proven.worst)
