"""The command line, as a user types it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

import accelplug
from accelplug import listing, zoo
from accelplug.cli import main
from accelplug.comparison import Comparison
from accelplug.inspection.denoiser import STEPS, Inspection
from accelplug.kernels.attention import UNTRIED


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 40  # a screen
    cells = zip(*(column.cells for column in listing.models().columns), strict=True)
    rows = {model: re.sub("[+°]", "", str(names)) for models, names in cells for model in re.split(r",\s", str(models))}
    kinds = {f"all of {kind}": rows[kind] for kind in ("vlm", "llm")}  # what the first stands for names the second
    recipes = accelplug.list_recipes()
    for info in recipes:
        assert info.model in out
        names = rows[info.model]
        for kind, those in kinds.items():
            names = names.replace(kind, those)
        assert info.name in names.split(", ")
        assert names.startswith(info.name + ",") or names == info.name or not info.default
        assert len(names.split(", ")) == sum(other.model == info.model for other in recipes)
    assert main(["show", "wan2.1-t2v-14b/radial"]) == 0
    assert "2506.19852" in capsys.readouterr().out


def test_list_has_every_patch_once_and_all_about_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "patches"]) == 0
    out = capsys.readouterr().out
    for patch in accelplug.list_patches():
        assert out.count(f"│ {patch.name} ") == 1
    assert main(["list", "rows"]) == 0
    out = capsys.readouterr().out
    assert "arXiv 2406.15486" in out
    assert "density" in out
    assert main(["list", "wan2.2"]) == 0
    assert "wan2.2-t2v-a14b/sol *" in capsys.readouterr().out
    assert main(["list", "wan-shape5"]) == 2
    assert "nearest: wan-shapes" in capsys.readouterr().err


def test_a_bundled_model_goes_by_its_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["inspect", "wan-shapes"]) == 0
    assert "6 self" in capsys.readouterr().out
    monkeypatch.setenv("ACCELPLUG_CACHE", "/nowhere")
    assert main(["inspect", "dinov2-small"]) == 2
    assert "accelplug fetch dinov2-small" in capsys.readouterr().err


def test_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "wan2.1-t2v-14b/radail"]) == 2
    assert "radial" in capsys.readouterr().err


def test_inspect_tells_sites_recipes_and_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(zoo.path())]) == 0
    out = capsys.readouterr().out
    assert "6 self" in out
    assert "wan-shapes/sol" in out
    assert "at most" in out


def test_the_ceiling_of_a_recipe_counts_its_dense_steps() -> None:
    pipe = WanPipeline.from_pretrained(zoo.path())
    found = accelplug.inspect(pipe)
    assert isinstance(found, Inspection)
    (part,) = found.denoisers
    share = part.attention_share(part.lengths[0])
    steps = sum(step >= round(0.25 * STEPS) for step in range(STEPS)) / STEPS
    assert found.ceilings["wan-shapes/radial"][0] == pytest.approx(1 / (1 - share * steps))
    assert part.ceiling(part.lengths[0]) > found.ceilings["wan-shapes/radial"][0] > 1


def test_doctor_finds_all_contracts_holding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "kernel blocked" in out
    assert out.count("untried on GPUs; ") == len(UNTRIED)
    assert "broken" not in out


def test_compare_writes_a_page_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["compare", str(zoo.path()), "--prompt", "a red square moves left", "--steps", "2", "--device", "cpu"]
    size = ["--frames", "9", "--height", "64", "--width", "80", "--dtype", "float32"]
    assert main([*common, *size, "--recipe", "sol", "--report", str(tmp_path / "r.html")]) == 0
    assert "sol" in capsys.readouterr().out
    assert "<canvas" in (tmp_path / "r.html").read_text()
    assert main([*common, *size, "--recipe", "radial", "--by-layer", "--report", str(tmp_path / "r.json")]) == 0
    assert "No row estimates its error" in capsys.readouterr().out
    assert Comparison.from_json(tmp_path / "r.json").row("radial").samples


def test_show_says_what_is_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    text = "schema: 1\nmodel: mine\nmatch: {class: A}\ndefault: a\nrecipes:\n  a:\n    cite: us\n    measured: []\n"
    text += "    rules: [{patch: radial, with: {repair: REPAIR}}]\n"
    for repair, said in (("output_query", True), ("none", False)):
        path.write_text(text.replace("REPAIR", repair))
        assert main(["show", str(path)]) == 0
        assert ("its error is repaired" in capsys.readouterr().out) == said


def test_no_pipeline_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "neither a saved pipeline nor a saved language model" in capsys.readouterr().err


def test_a_closed_output_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["list"]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_is_full_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["list"]) == 2
    assert "No space left" in capsys.readouterr().err


def test_missing_arguments_exit_with_two() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare"])
    assert stop.value.code == 2


def test_the_bundled_model_fits_its_recipe_file() -> None:
    import accelplug

    pipe = WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32)
    with accelplug.apply(pipe) as plug:
        assert plug.recipe.name.startswith("wan-shapes/")
        assert "wan-shapes" in repr(plug)
        assert "attention" in plug._repr_html_() or plug.summary()
