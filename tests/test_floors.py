"""Floors: what dense attention scores in another kernel, in another dtype, at another seed; and every figure between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import accelplug
from accelplug.comparison.floors import FLOORS, Floors, OtherDtype, between, floor_prompts, other_seed
from accelplug.comparison.result import Comparison
from accelplug.comparison.rows import Row, Sample
from accelplug.comparison.study import Study
from accelplug.errors import AccelplugError
from accelplug.recipe import Measured
from accelplug.testing.laws import snapshot_of
from accelplug.testing.models import noise
from tests.patch_rows import ROWS
from tests.test_report import Page
from tests.test_tuning import pipeline

RADIAL = ROWS["radial"].recipe()


def calls(number: int) -> tuple[Any, list[dict[str, Any]]]:
    """A fast pipeline, and arguments of so many calls, each with a prompt of its own."""
    pipe, inputs = pipeline()
    return pipe, [{**inputs, "prompt_embeds": noise(1, 16, 16, seed=i)} for i in range(number)]


@pytest.fixture(scope="module")
def compared() -> tuple[Comparison, int, bool]:
    pipe, inputs = calls(3)
    with torch.no_grad():
        pipe(**inputs[0])
    before, runs = snapshot_of(pipe.transformer), []
    with pytest.MonkeyPatch.context() as patch:
        run = Study.run
        patch.setattr(Study, "run", lambda self, *pair: runs.append(pair) or run(self, *pair))
        found = accelplug.compare(pipe, {"radial": RADIAL, "again": RADIAL}, inputs, [0, 1], floors="all", progress=False)
    return found, len(runs), snapshot_of(pipe.transformer) == before


def test_floors_are_run_once_a_prompt_and_leave_the_pipeline_alone(compared: tuple[Comparison, int, bool]) -> None:
    found, runs, same = compared
    assert {name: len(row.samples) for name, row in found.floors.items()} == {"kernel": 3, "dtype": 3, "seed": 3}
    assert runs == 3 + 3 * 3 * 2 + 2 * 3, (
        "three traces, three rows at six pairs, and two floors a prompt: at another seed dense ran anyway"
    )
    assert same


def test_floors_stand_in_order(compared: tuple[Comparison, int, bool]) -> None:
    found, _, _ = compared
    kernel, dtype, seed = (found.floors[name].mean("psnr_db") for name in ("kernel", "dtype", "seed"))
    assert kernel > dtype > seed
    assert found.floors["seed"].mean("psnr_db") < found.row("radial").mean("psnr_db")


def test_every_figure_stands_between_floors(compared: tuple[Comparison, int, bool]) -> None:
    found, _, _ = compared
    told = found.between(found.row("radial"))
    first = [s.scores["psnr_db"] for s in found.row("radial").samples if s.seed == 0]
    assert told.value == pytest.approx(sum(first) / 3), "on the runs that have floors"
    assert told.floor == found.floors["dtype"].mean("psnr_db")
    assert told.share == pytest.approx((told.value - told.seed) / (told.floor - told.seed))
    text = str(found)
    assert "between" in text
    assert f"{told.share:.0%}" in text
    assert "0 % is dense at another seed" in " ".join(text.split())
    row = found.to_dict()["rows"][1]
    assert row["between"]["psnr_db"]["share"] == pytest.approx(told.share)
    assert {"psnr_db", "ssim", "flicker", "latent_distance"} <= set(row["between"])
    page = Page(found.page()).data
    assert any(what == "between floors" and str(told) in said for what, said, _ in page["dots"][0]["facts"])
    assert {floor["name"] for floor in page["floors"]} == {floor.row for floor in FLOORS.values()}


def test_arms_are_compared_pair_by_pair(compared: tuple[Comparison, int, bool], tmp_path: Any) -> None:
    found, _, _ = compared
    (quality,) = (d for d in found.paired() if (d.first, d.second, d.figure) == ("radial", "again", "psnr_db"))
    assert quality.none
    assert "who beats whom" in str(found)
    assert any("no difference, with certainty" in note for note in Page(found.page()).data["notes"])
    assert {d["figure"] for d in found.to_dict()["paired"]} == {"speed", "psnr_db", "ssim", "flicker"}
    again = Comparison.from_json(found.to_json(tmp_path / "a.json"))
    assert [str(d) for d in again.paired()] == [str(d) for d in found.paired()]
    assert again.floors.keys() == found.floors.keys()


def test_a_measured_row_has_its_floors(compared: tuple[Comparison, int, bool]) -> None:
    found, _, _ = compared
    found.environment |= {"device": "here"}
    row = Measured.model_validate(found.measured(found.row("radial")))
    assert row.floors["dtype"]["psnr_db"].mean == pytest.approx(found.floors["dtype"].mean("psnr_db"))
    assert set(row.floors["seed"]) == {"psnr_db", "ssim", "flicker"}
    assert row.flicker is not None


@pytest.mark.parametrize(
    ("given", "prompts", "seeds", "runs", "found"),
    [
        (False, 15, 1, 32, 0),
        ("all", 15, 1, 32, 15),
        (True, 1, 1, 4, 1),  # always on one
        (True, 15, 1, 32, 5),  # three a prompt, 16 in all
        (True, 15, 2, 64, 15),  # two a prompt
    ],
)
def test_floors_take_half_as_many_runs_again_at_most(given: Any, prompts: int, seeds: int, runs: int, found: int) -> None:
    assert floor_prompts(given, prompts, seeds, runs) == found


def test_what_floors_may_be_is_said() -> None:
    pipe, inputs = calls(1)
    with pytest.raises(AccelplugError, match="expected True, False or 'all', got 'some'"):
        accelplug.compare(pipe, RADIAL, inputs, floors="some", progress=False)
    found = accelplug.compare(pipe, RADIAL, inputs, floors=False, progress=False)
    assert found.floors == {}
    assert found.between(found.row(found.rows[1].name)) is None
    assert "cannot be said of one prompt" in " ".join(str(found).split())


def test_another_dtype_is_attention_alone() -> None:
    pipe, (inputs,) = calls(1)
    given = {**inputs, "output_type": "latent"}

    def latents() -> torch.Tensor:
        with torch.no_grad():
            return pipe(**given, generator=torch.Generator().manual_seed(0)).frames

    dense = latents()
    with accelplug.apply(pipe, OtherDtype(), gate="off"):
        other = latents()
    assert other.dtype == dense.dtype
    assert 0 < float((other - dense).norm() / dense.norm()) < 0.05
    assert torch.equal(latents(), dense)


def test_another_seed_is_the_next_one() -> None:
    assert [other_seed([4, 9, 2], seed) for seed in (4, 9, 2)] == [9, 2, 4]
    assert other_seed([4], 4) == 5


def sample(prompt: int, **scores: float) -> Sample:
    return Sample(prompt, 0, 1.0, 1.0, scores=scores)


def test_figures_and_floors_are_of_the_same_runs() -> None:
    row = Row("a", "recipe", samples=[sample(0, psnr_db=20.0, flicker=0.2), sample(1, psnr_db=99.0, flicker=9.0)])
    floors = {
        "kernel": Row("k", "floor", samples=[sample(0, psnr_db=40.0, flicker=0.1)]),
        "dtype": Row("d", "floor", samples=[sample(0, psnr_db=30.0, flicker=0.05)]),
        "seed": Row("s", "floor", samples=[sample(0, psnr_db=10.0, flicker=1.1)]),
    }
    told = between(row, floors, "psnr_db")
    assert (told.value, told.seed, told.floor, told.share, str(told)) == (20.0, 10.0, 30.0, 0.5, "50%")
    assert between(row, floors, "flicker").floor == 0.1, "less is better: the worse one is the larger"
    assert between(row, floors, "ssim") is None
    assert between(row, {}, "psnr_db") is None


def test_a_floor_that_is_none_is_told() -> None:
    known = {("kernel", 0): sample(0, psnr_db=float("inf")), ("dtype", 0): sample(0, psnr_db=40.0)}
    floors = Floors(known)
    assert floors.value("psnr", "floor", 0, 0) == 40.0
    with pytest.raises(AccelplugError, match="relative to kernel, which here scores inf: the same as dense"):
        floors.value("psnr", "kernel", 0, 0)
