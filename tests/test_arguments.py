"""What is asked wrongly of compare, tune and calibrate is told in words, and before the first run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

import accelplug
from accelplug.comparison.exam import Exam
from accelplug.comparison.questions import items, require_pictures
from accelplug.comparison.result import Comparison
from accelplug.comparison.vlm import compare_vlm
from accelplug.errors import AccelplugError
from accelplug.recipe import Recipe
from accelplug.tuning import Bound
from tests import tiny_pipelines


@pytest.fixture(scope="module")
def waiting() -> tuple[Any, dict[str, Any]]:
    """A pipeline whose denoiser must not be called."""
    pipe, inputs = tiny_pipelines.decoding("wan")
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("something ran before all arguments were checked"))
    return pipe, {key: value for key, value in inputs.items() if key != "output_type"}


def calibrate(pipe: Any, inputs: Any = None, **more: Any) -> Recipe:
    return accelplug.calibrate(pipe, **{"patch": "sparse_vdit", "prompts": inputs, "progress": False, **more})


def compare(pipe: Any, inputs: Any = None, **more: Any) -> Comparison:
    return accelplug.compare(pipe, {"rules": [{"patch": "dense"}]}, inputs, **more)


COMMANDS = pytest.mark.parametrize("command", [compare, accelplug.tune, calibrate], ids=lambda command: command.__name__)
WRONG: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "no inputs": ("needs inputs", (), {"inputs": None}),
    "inputs that are text": ("a mapping of the pipeline's arguments", ("calibrate",), {"inputs": "a dog"}),
    "a list of numbers": ("a mapping of the pipeline's arguments, got 3", (), {"inputs": [3]}),
    "a number": ("list of such, got 3", (), {"inputs": 3}),
    "an argument that the pipeline has not": (
        "takes no argument 'num_inference_step'.*num_inference_steps",
        (),
        {"num_inference_step": 4},
    ),
    "a generator": ("hold a generator", (), {"generator": None}),
    "a size that the pipeline refuses": ("does not take these inputs: .*divisible", (), {"height": 63}),
    "a height in words": ("does not take these inputs", (), {"height": "tall"}),
    "no seeds": ("at least one seed", ("calibrate",), {"seeds": []}),
    "a seed twice": ("different seeds", ("calibrate",), {"seeds": [1, 1]}),
    "half a seed": ("whole number", ("calibrate",), {"seeds": [0, 0.5]}),
    "a negative seed": ("whole number", ("calibrate",), {"seeds": [-1, 0]}),
    "seeds that are text": ("at least one seed", ("calibrate",), {"seeds": "01"}),
}
ASKED = {"inputs", "seeds"}


@COMMANDS
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_inputs_are_told_by_all_commands_alike(
    waiting: tuple[Any, dict[str, Any]], command: Callable[..., object], wrong: str
) -> None:
    pipe, inputs = waiting
    says, not_of, change = WRONG[wrong]
    if command.__name__ in not_of:
        return
    asked = {"inputs": {**inputs, **{key: value for key, value in change.items() if key not in ASKED}}}
    asked |= {key: value for key, value in change.items() if key in ASKED}
    given = asked.pop("inputs")
    with pytest.raises(AccelplugError, match=says):
        command(pipe, inputs=given, progress=False, **asked)


@COMMANDS
@pytest.mark.parametrize("what", [lambda pipe: pipe.transformer, lambda pipe: object(), lambda pipe: None])
def test_what_is_no_pipeline_is_refused(
    waiting: tuple[Any, dict[str, Any]], command: Callable[..., object], what: Callable[[Any], object]
) -> None:
    pipe, inputs = waiting
    with pytest.raises(AccelplugError):
        command(what(pipe), inputs=inputs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"patches": ["soll"]}, "no settings to try for 'soll'"),
        ({"patches": "sol"}, "a list of names"),
        ({"budget": "fg_psnr>=26"}, "needs foreground="),
        ({"budget": ["psnr>=20", "agreement>=1"]}, "needs detect="),
        ({"budget": 26}, "A budget is text"),
        ({"budget": [26]}, "A budget is text"),
        ({"budget": Bound("mine", math.nan, score=lambda *_: 1.0)}, "expected a number, got nan"),
        ({"foreground": "bright"}, "foreground: expected a function"),
        ({"time_budget_s": math.nan}, "expected seconds"),
        ({"time_budget_s": -1}, "expected seconds"),
        ({"time_budget_s": "60"}, "expected seconds"),
        ({"objective": "accuracy"}, "a language model's"),
    ],
)
def test_tune_is_asked_wrongly(waiting: tuple[Any, dict[str, Any]], change: dict[str, Any], says: str) -> None:
    pipe, inputs = waiting
    with pytest.raises(AccelplugError, match=says):
        accelplug.tune(pipe, inputs, progress=False, **change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dense_steps": "0:a"}, "0:a"),
        ({"dense_steps": 3.5}, "3.5"),
        ({"buckets": 0}, "whole number"),
        ({"buckets": 2.5}, "whole number"),
        ({"buckets": True}, "whole number"),
        ({"seed": "1"}, "whole number"),
        ({"options": {"nothing": 1}}, "nothing"),
        ({"config": {"block": "a"}}, "block"),
        ({"patch": "radial"}, "nothing to calibrate"),
    ],
)
def test_calibrate_is_asked_wrongly(waiting: tuple[Any, dict[str, Any]], change: dict[str, Any], says: str) -> None:
    pipe, inputs = waiting
    with pytest.raises(AccelplugError, match=says):
        calibrate(pipe, inputs, **change)


def test_pictures_that_are_not_there_are_told_ahead(tmp_path: Path) -> None:
    there = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(there)
    entries = [{"text": "?", "answer": "yes", "image": str(path)} for path in (there, tmp_path / "b.png")]
    with pytest.raises(AccelplugError, match=r"b\.png is not a file, one of 1 pictures of 2"):
        require_pictures(items(entries))
    for wrong in (
        {"text": "?", "answer": "yes", "image": 3},
        {"text": 3, "answer": "yes"},
        {"text": "?", "answer": " "},
        {"text": "?", "answer": ["yes", "no"]},
        {"text": " ", "answer": "yes"},
        {"text": "?", "answer": "yes", "image": np.zeros((8, 8, 3), np.uint8)},
        "?",
    ):
        with pytest.raises(AccelplugError, match=r"A question is|image: expected"):
            items(cast(Any, [wrong]))
    exam = Exam.scenes(6)
    absent = Exam("x", dict.fromkeys(exam.pictures, tmp_path / "b.png"), exam.truth, exam.questions, exam.vocabulary)
    without = Exam("x", {}, exam.truth, exam.questions, exam.vocabulary)
    for asked, batch, says in ((absent, 1, "not a file"), (without, 1, "that it has not"), (exam, 0, "prompts at a time")):
        with pytest.raises(AccelplugError, match=says):
            compare_vlm(None, {}, asked, None, batch=batch)
    for pictures in (0, -1, 2.5):
        with pytest.raises(AccelplugError, match="whole number"):
            Exam.scenes(cast(Any, pictures))
    with pytest.raises(AccelplugError, match="expected a split"):
        Exam.scenes(1, "all")
