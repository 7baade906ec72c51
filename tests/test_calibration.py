"""calibrate(): tables that a recipe uses, the same after a run that was cut off, refused elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import accelplug
from accelplug.errors import AccelplugError, NoMatchError, RecipeError
from accelplug.patches.sparse.radial import Radial
from accelplug.recipe import Recipe
from tests import tiny_pipelines

CONFIG = {"block": 8, "backend": "reference"}


def run(pipe: Any, path: Path, inputs: dict[str, Any], patch: str = "sparse_vdit", **more: Any) -> Recipe:
    inputs = {key: value for key, value in inputs.items() if key != "output_type"}
    given = {"config": CONFIG, "buckets": 2, "dense_steps": None, "progress": False, **more}
    return accelplug.calibrate(pipe, patch, [inputs, inputs], path=path, **given)


@pytest.mark.parametrize("patch", ["sparse_vdit", "paro", "sta"])
def test_a_calibrated_recipe_runs(patch: str, tmp_path: Path) -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    before = torch.get_rng_state()
    config = {**CONFIG, **({"windows": "maximal"} if patch == "sta" else {})}
    options = {"eps": 10.0} if patch == "sparse_vdit" else {}
    recipe = run(pipe, tmp_path / "my.yaml", inputs, patch, config=config, options=options)
    assert torch.equal(torch.get_rng_state(), before)
    assert not pipe.transformer._forward_pre_hooks
    assert {path.name for path in tmp_path.iterdir()} == {"my.yaml", "my.safetensors"}
    with accelplug.apply(pipe, recipe, gate="off", strict=True) as plug:
        pipe(**inputs)
        assert plug.report().served[patch] > 0
    with accelplug.apply(pipe, tmp_path / "my.yaml", gate="off"), pytest.raises(RecipeError, match="made for 3x4x6 tokens"):
        pipe(**{**inputs, "height": 96})


def test_cut_off_and_taken_up_again_gives_the_same_bytes(tmp_path: Path) -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    run(pipe, tmp_path / "whole.yaml", inputs)
    forwards = []

    def cut(*_: object) -> None:
        forwards.append(1)
        if len(forwards) > 12:  # in the second run, of four steps and two branches
            raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(cut)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, tmp_path / "cut.yaml", inputs)
    handle.remove()
    assert (tmp_path / "cut.partial.safetensors").exists()
    assert not (tmp_path / "cut.yaml").exists()
    with pytest.raises(AccelplugError, match="other prompts, knobs"):
        run(pipe, tmp_path / "cut.yaml", inputs, seed=1)
    run(pipe, tmp_path / "cut.yaml", inputs)
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("rest", ["pool", "linear"])
def test_weights_of_a_recipes_pooled_blocks(rest: str) -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    base = {"patch": "radial", "with": {"block": 8, "rest": rest}}
    recipe = run(pipe, None, inputs, "rest", recipe=base, config={})
    weights = recipe.rules[0].settings["rest_weight"]
    assert weights.values.shape == (2, 2)
    with accelplug.apply(pipe, recipe, gate="off") as plug:
        pipe(**inputs)
        assert plug.report().served["radial"] > 0


def test_what_cannot_be_calibrated(tmp_path: Path) -> None:
    pipe, inputs = tiny_pipelines.decoding("wan")
    with pytest.raises(NoMatchError, match="nothing to calibrate"):
        run(pipe, None, inputs, "radial")
    with pytest.raises(AccelplugError, match="epsilon"):
        run(pipe, None, inputs, options={"epsilon": 1})
    (tmp_path / "my.yaml").write_text("")
    with pytest.raises(AccelplugError, match="there already"):
        run(pipe, tmp_path / "my.yaml", inputs)
    with pytest.raises(RecipeError, match=r"holds an instance, Radial\(rest=pool\), which no file can hold"):
        run(pipe, None, inputs, "rest", recipe=Radial({"rest": "pool"}), config={})
