"""compare(): the metrics, the runs, what is written, and that the pipeline is left as it was."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import accelplug
from accelplug.comparison import lpips, metrics
from accelplug.comparison.report import sprite
from accelplug.comparison.result import Comparison
from accelplug.comparison.rows import Quantiles, Row, Sample
from accelplug.comparison.study import Study
from accelplug.errors import AccelplugError
from accelplug.recipe import Measured, read_file
from accelplug.show import as_text
from accelplug.testing.laws import snapshot_of
from tests import tiny_pipelines
from tests.patch_rows import ROWS
from tests.test_report import Page


@pytest.fixture
def clips() -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(0)
    return g.random((5, 24, 36, 3), np.float32), g.random((5, 24, 36, 3), np.float32)


def test_psnr_by_hand(clips: tuple[np.ndarray, np.ndarray]) -> None:
    a, _ = clips
    assert metrics.psnr_db(a, a) == math.inf
    assert metrics.psnr_db(np.full_like(a, 0.5), np.full_like(a, 0.6)) == pytest.approx(20.0, abs=1e-4)


def test_psnr_agrees_with_torchmetrics(clips: tuple[np.ndarray, np.ndarray]) -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = clips
    expected = peak_signal_noise_ratio(torch.tensor(a), torch.tensor(b), data_range=1.0)
    assert metrics.psnr_db(a, b) == pytest.approx(float(expected), abs=1e-4)


def test_foreground_counts_what_is_missing() -> None:
    dense, patched = (np.zeros((2, 40, 40, 3), np.float32) for _ in range(2))
    dense[:, 5:15, 5:15] = 1.0  # the object is gone in the patched clip

    def bright(clip: np.ndarray) -> np.ndarray:
        return clip.max(-1) > 127

    assert metrics.foreground_psnr_db(patched, dense, bright) == pytest.approx(0.0)
    assert metrics.psnr_db(patched, dense) > 12
    assert math.isnan(metrics.foreground_psnr_db(patched, patched, bright))


def test_ssim_and_latent_distance(clips: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = clips
    assert metrics.ssim(a, a) == pytest.approx(1.0)
    assert metrics.ssim(a, b) < 0.2
    x = torch.randn(3, 4)
    assert metrics.relative_distance(x, x) == 0
    assert metrics.relative_distance(2 * x, x) == pytest.approx(1.0)


def test_flicker_counts_changes_and_not_offsets(clips: tuple[np.ndarray, np.ndarray]) -> None:
    a, _ = clips
    blinking = a + np.array([0.0, 1.0, 0.0, 1.0, 0.0], np.float32)[:, None, None, None]
    assert metrics.flicker(a + np.float32(0.5), a) == pytest.approx(0.0, abs=1e-6)
    assert metrics.flicker(np.repeat(a[:1], 5, 0), a) == pytest.approx(1.0)
    assert metrics.flicker(blinking, a) == pytest.approx(1 / np.sqrt(np.square(np.diff(a, axis=0)).mean()), rel=1e-4)
    assert metrics.flicker(a[:1], a[:1]) is None


def test_quantiles() -> None:
    assert Quantiles.of([3.0]) == Quantiles(3.0, 3.0, 3.0)
    assert Quantiles.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == Quantiles(2.0, 3.5, 5.0)


def small() -> tuple[Any, dict[str, Any]]:
    pipe, inputs = tiny_pipelines.decoding("wan")
    inputs = {key: value for key, value in inputs.items() if key != "output_type"}
    return pipe, {**inputs, "height": 64, "width": 96}


@pytest.fixture(scope="module")
def compared() -> tuple[Comparison, dict[str, Any], dict[str, Any]]:
    pipe, inputs = small()
    before = snapshot_of(pipe.transformer)
    recipes = {"same": {"rules": [{"patch": "dense"}]}, "radial": ROWS["radial"].recipe()}
    result = accelplug.compare(
        pipe, recipes, inputs, seeds=[0, 1], caches=True, foreground=lambda c: c.max(-1) > 90, progress=False
    )
    after = snapshot_of(pipe.transformer)
    return result, before, after


def test_rows_and_quality(compared: tuple[Comparison, dict[str, Any], dict[str, Any]]) -> None:
    result, _, _ = compared
    names = ["dense", "same", "radial", "FirstBlockCache", "FirstBlockCache + same", "FirstBlockCache + radial"]
    assert [row.name for row in result.rows] == [
        *names,
        "dense, another kernel",
        "dense, another dtype",
        "dense, another seed",
    ]
    assert result.row("same").mean("psnr_db") == math.inf
    assert result.row("same").mean("latent_distance") == 0
    assert math.isfinite(result.row("radial").worst("psnr_db"))
    assert len(result.row("radial").samples) == 2
    assert result.row("dense, another seed").mean("psnr_db") < result.row("radial").mean("psnr_db")
    assert all(sample.latency_ms > sample.denoise_ms > 0 for sample in result.dense.samples)
    assert all(len(sample.step_ms) == result.settings["num_inference_steps"] for sample in result.dense.samples)


def test_density_and_plans(compared: tuple[Comparison, dict[str, Any], dict[str, Any]]) -> None:
    result, _, _ = compared
    radial = result.row("radial")
    assert len(radial.density) == 2
    assert all(0 < value < 1 for layer in radial.density for value in layer)
    assert result.dense.mean_density == 1
    plan = radial.plans[0]
    assert {len(line) for line in plan["blocks"]} == {len(plan["blocks"])}
    assert set("".join(plan["blocks"])) == {"0", "1"}
    assert radial.attention_ms > 0
    assert radial.forward_predicted > 0
    assert result.row("same").forward_predicted is None
    assert result.row("same").denoising_predicted == pytest.approx(1.0)


def test_the_pipe_is_left_as_it_was(compared: tuple[Comparison, dict[str, Any], dict[str, Any]]) -> None:
    _, before, after = compared
    assert after["processors"] == before["processors"]
    assert after["hooks"] == before["hooks"]
    assert after["registry"] == before["registry"]
    leftovers = {name for path in after["vars"] for name in after["vars"][path] - before["vars"][path]}
    assert leftovers <= {"_diffusers_hook"}  # that of the root comes with any run of a stock pipeline


def test_json_round_trip(compared: tuple[Comparison, dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    result, _, _ = compared
    path = result.to_json(tmp_path / "r.json")
    again = Comparison.from_json(path)
    assert again.rows == result.rows
    assert again.verdict == result.verdict
    assert "Infinity" not in path.read_text()


def test_the_page_is_self_contained(compared: tuple[Comparison, dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    result, _, _ = compared
    text = result.to_html(tmp_path / "r.html").read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert result.verdict in text
    page = Page(text)
    assert page.links == []
    data = page.data
    radial = next(dot for dot in data["dots"] if dot["name"] == "radial")
    assert "radial" in radial["rules"]
    assert any(what == "density" and float(measured) < 1 for what, measured, _ in radial["facts"])
    assert {clip["name"] for clip in data["clips"]} >= {"dense", "radial"}
    assert data["clips"][0]["frames"] == 9


def test_the_table_prints(compared: tuple[Comparison, dict[str, Any], dict[str, Any]]) -> None:
    text = str(compared[0])
    assert "radial" in text
    assert "same" in text
    assert "another seed" in text


def test_estimated_errors_are_told_by_layer_and_step(tmp_path: Path) -> None:
    pipe, inputs = small()
    mended = {**ROWS["sol"].working, "tau": 1.5, "repair": "output_query", "probes": 30}
    rules = [{"where": {"steps": 0}, "patch": "dense"}, {"where": {"layers": 1}, "patch": "sol", "with": mended}]
    recipes = {"mended": {"rules": rules}, "radial": ROWS["radial"].recipe()}
    result = accelplug.compare(pipe, recipes, inputs, seeds=[0, 1], floors=False, progress=False)
    found = result.row("mended")
    steps = result.settings["num_inference_steps"]
    assert found.errors[0] == [None] * steps, "dense makes no estimate"
    assert found.errors[1][0] is None
    assert all(0 < error < 2 for error in found.errors[1][1:])
    assert (found.error.worst, found.error.layer) == (max(found.errors[1][1:]), 1)
    assert found.errors[1][found.error.step] == found.error.worst
    assert result.row("radial").error is None
    assert result.cells(found)[result.headings().index("estimated error (worst)")].startswith(f"{found.error.median:.3f} (")
    text = result.to_json(tmp_path / "r.json").read_text()
    assert json.loads(text)["rows"][1]["error"]["worst"] == found.error.worst
    assert Comparison.from_json(tmp_path / "r.json").rows == result.rows
    page = Page(result.page()).data
    assert page["rows"][1]["errors"] == found.errors
    facts = {what: measured for what, measured, _ in page["dots"][0]["facts"]}
    assert facts["estimated error"] == str(found.error)
    assert "estimated error" not in {what for what, _, _ in page["dots"][1]["facts"]}
    assert f"worst {found.error.worst:.3f} in step {found.error.step}" in as_text(result.errors_by_layer())


def test_of_several_runs_the_largest_estimate_counts() -> None:
    row = Row("", "recipe")
    for errors in ([[None, 0.1], [0.3, 0.2]], [], [[0.2, None, 0.4], [0.1, 0.3, None], [None, 0.5, None]]):
        row.add_errors(errors)
    assert row.errors == [[0.2, 0.1, 0.4], [0.3, 0.3, None], [None, 0.5, None]]
    assert (row.error.median, row.error.worst, row.error.layer, row.error.step) == (0.3, 0.5, 2, 1)


def test_recording_adds_a_row_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "schema: 1\nmodel: tiny\nmatch: {class: WanTransformer3DModel}\ndefault: radial\n"
        'recipes:\n  radial:\n    cite: "arXiv 2506.19852"\n    rules:\n'
        "      - patch: radial  # a comment that stays\n        with: {block: 8, decay: 0.2, backend: reference}\n    measured: []\n"
    )
    pipe, inputs = small()
    result = accelplug.compare(pipe, path, inputs, seeds=[0], floors=False, progress=False)
    assert result.record() == [path]
    (row,) = read_file(path).recipes["radial"].measured
    assert row.seeds == [0]
    assert row.psnr_db.mean == pytest.approx(result.row("radial").mean("psnr_db"))
    assert "# a comment that stays" in path.read_text()


def test_an_exception_in_a_run_leaves_the_pipe_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, inputs = small()
    before = snapshot_of(pipe.transformer)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.vae), "decode", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            accelplug.compare(pipe, ROWS["radial"].recipe(), inputs, progress=False)
    assert snapshot_of(pipe.transformer)["processors"] == before["processors"]
    assert snapshot_of(pipe.transformer)["hooks"] == before["hooks"]


@pytest.mark.parametrize("name", ["dense", "dense, another kernel", "FirstBlockCache + radial"])
def test_a_recipe_cannot_take_the_place_of_another_row(name: str) -> None:
    pipe, inputs = small()
    with pytest.raises(AccelplugError, match="as a row of the comparison is"):
        accelplug.compare(pipe, {name: {"rules": [{"patch": "dense"}]}}, inputs)


def test_nothing_to_run_is_an_error() -> None:
    pipe, _ = small()
    with pytest.raises(AccelplugError, match="needs inputs"):
        accelplug.compare(pipe, {"rules": [{"patch": "dense"}]})


def test_speedup_is_paired_by_prompt_and_seed() -> None:
    dense = Row("dense", "dense", samples=[Sample(0, 0, 100.0, 90.0), Sample(0, 1, 400.0, 390.0)])
    fast = Row("fast", "recipe", samples=[Sample(0, 0, 50.0, 40.0), Sample(0, 1, 200.0, 190.0)])
    result = Comparison("", [""], [0, 1], {}, "", {}, [dense, fast])
    assert result.speedup(fast) == Quantiles(2.0, 2.0, 2.0)


def test_gains_are_measured_in_the_steps_that_were_foretold() -> None:
    dense = Row("dense", "dense", samples=[Sample(0, 0, 100.0, 60.0, [10.0, 20.0, 30.0])])
    half = Row(
        "half", "recipe", samples=[Sample(0, 0, 80.0, 40.0, [10.0, 10.0, 20.0])], density=[[1.0, 0.3, 0.3], [1.0, 1.0, 0.5]]
    )
    result = Comparison("", [""], [0], {}, "", {}, [dense, half])
    assert result.step_gain(half) == Quantiles(50 / 30, 50 / 30, 50 / 30)
    assert result.step_gain(dense) is None


def test_a_recipe_that_ran_dense_is_no_headline() -> None:
    dense = Row("dense", "dense", samples=[Sample(0, 0, 100.0, 90.0)])
    idle = Row("idle", "recipe", samples=[Sample(0, 0, 80.0, 70.0, scores={"psnr_db": math.inf})], density=[[1.0]])
    busy = Row("busy", "recipe", samples=[Sample(0, 0, 90.0, 80.0, scores={"psnr_db": 30.0})], density=[[0.5]])
    assert "ran dense" in Comparison("", [""], [0], {}, "", {}, [replace(dense, density=[[1.0]]), idle]).verdict
    assert Comparison("", [""], [0], {}, "", {}, [dense, idle, busy]).verdict.startswith("busy: 1.11x")


@pytest.mark.parametrize(
    ("row", "gain"),
    [
        (
            Row(
                "skipped nothing",
                "cache",
                samples=[Sample(0, 0, 80.0, 70.0, scores={"psnr_db": math.inf, "latent_distance": 0.0})],
            ),
            1.0,
        ),
        (Row("answered nothing", "recipe", samples=[Sample(0, 0, 80.0, 70.0, scores={"psnr_db": 60.0})], answered=0), 1.0),
        (
            Row(
                "at one seed only",
                "cache",
                samples=[Sample(0, s, 80.0, 1.0, scores={"psnr_db": db}) for s, db in ((0, math.inf), (1, 30.0))],
            ),
            1.25,
        ),
        (
            Row(
                "clipped", "recipe", samples=[Sample(0, 0, 80.0, 70.0, scores={"psnr_db": math.inf, "latent_distance": 0.1})]
            ),
            1.25,
        ),
        (Row("undefined", "recipe", samples=[Sample(0, 0, 80.0, 70.0, scores={"psnr_db": math.nan})], answered=3), 1.25),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_what_is_dense_to_the_last_bit_gained_nothing(row: Row, gain: float) -> None:
    dense = Row("dense", "dense", samples=[Sample(0, seed, 100.0, 90.0) for seed in (0, 1)], density=[[1.0]])
    result = Comparison("", [""], [0, 1], {}, "", {}, [dense, row])
    assert result.speedup(row).p50 == gain
    assert (result.best is None) == (gain == 1.0 or row.kind == "cache")
    (dot,) = Page(result.page()).data["dots"] or [None] if row.mean("psnr_db") is not None else [None]
    if dot is not None:
        assert (dot["speedup"], dot["front"]) == (gain, gain > 1)


def test_no_steps_are_no_gain() -> None:
    pipe, inputs = small()
    inputs |= {"num_inference_steps": 0}
    result = accelplug.compare(pipe, {"radial": ROWS["radial"].recipe()}, inputs, floors=False, caches=True, progress=False)
    assert [result.speedup(row).p50 for row in result.rows] == [1.0] * 4
    assert result.verdict == "radial: no attention call was answered, so nothing was gained or lost."


def test_a_row_is_recorded_with_the_gain_that_was_told() -> None:
    """Two dense runs at one seed, of which one was held up, and a third where the recipe never ran."""
    times = [(0, 0, 900.0), (0, 0, 200.0), (0, 1, 600.0), (1, 0, 50.0)]
    dense = Row("dense", "dense", samples=[Sample(p, s, ms, ms) for p, s, ms in times])
    fast = Row(
        "fast",
        "recipe",
        samples=[
            Sample(0, 0, 100.0, 90.0, scores={"psnr_db": 30.0}),
            Sample(0, 1, 200.0, 90.0, scores={"psnr_db": math.inf}),
        ],
    )
    environment = {"date": "2026-01-01", "device": "here", "versions": {}}
    result = Comparison("", ["a", "b"], [0, 1], {}, "", environment, [dense, fast])
    row = Measured.model_validate(result.measured(fast))
    assert row.gain == result.speedup(fast).p50 == 2.5  # twice at one seed, three times at the other
    assert (row.dense_ms.p50, row.ms.p50) == (400.0, 150.0)
    assert (row.prompts, row.seeds) == (["a"], [0, 1])
    assert (row.psnr_db.mean, row.psnr_db.worst) == (30.0, 30.0)
    assert row.model_copy(update={"speedup": None}).gain == pytest.approx(400 / 150), "older rows have times alone"


def test_any_text_is_a_prompt(tmp_path: Path) -> None:
    result = Comparison("", ["inf", "nan"], [0], {}, "", {}, [Row("dense", "dense", samples=[Sample(0, 0, 1.0, 1.0)])])
    assert Comparison.from_json(result.to_json(tmp_path / "r.json")).prompts == ["inf", "nan"]


def test_inputs_may_hold_a_callback_and_an_output_type() -> None:
    pipe, inputs = small()
    seen = []

    def callback(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    inputs = {**inputs, "callback_on_step_end": callback, "output_type": "pil"}
    accelplug.compare(pipe, {"rules": [{"patch": "dense"}]}, inputs, floors=False, progress=False)
    assert seen == [0, 1, 2, 3] * 4  # dense and recipe, traced and timed
    with pytest.raises(AccelplugError, match="generator"):
        accelplug.compare(pipe, None, {**inputs, "generator": torch.Generator()}, progress=False)


def test_what_is_timed_is_the_device_that_runs() -> None:
    """Of a pipeline that is offloaded, weights wait on the CPU."""
    pipe, inputs = tiny_pipelines.decoding("wan")
    assert Study(pipe, [inputs], [0], None, None).device == torch.device("cpu")
    for part in (pipe.transformer, pipe.vae):
        part._hf_hook = SimpleNamespace(execution_device="meta")  # as accelerate leaves it
    assert Study(pipe, [inputs], [0], None, None).device == torch.device("meta")


def test_a_compiled_denoiser_is_timed_from_outside_its_graph() -> None:
    pipe, inputs = small()
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    result = accelplug.compare(pipe, ROWS["radial"].recipe(), inputs, floors=False, progress=False)
    assert all(sample.denoise_ms > 0 for sample in result.dense.samples)


@pytest.mark.parametrize("shape_fhw", [(1, 40, 60), (7, 24, 36), (5, 800, 300)])
def test_a_sprite_sheet_holds_every_frame(shape_fhw: tuple[int, int, int]) -> None:
    frames, height, width = shape_fhw
    ramp = np.linspace(0, 255, frames * height * width).reshape(frames, height, width, 1)
    clip = np.repeat(ramp, 3, -1).astype(np.uint8)
    cut = sprite(clip)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(cut["source"].split(",")[1]))).convert("RGB"))
    assert max(cut["height"], cut["width"]) <= 384
    for index, frame in enumerate(clip):
        y, x = index // cut["columns"] * cut["height"], index % cut["columns"] * cut["width"]
        found = sheet[y : y + cut["height"], x : x + cut["width"]]
        assert found.mean() == pytest.approx(frame.mean(), abs=1.0)
        if shape_fhw[1] <= 384:
            assert np.array_equal(found, frame)


def test_lpips_is_never_downloaded_and_says_where_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert lpips.lpips(np.zeros((1, 64, 64, 3), np.float32), np.ones((1, 64, 64, 3), np.float32)) is None
    assert str(tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth") in lpips.no_lpips()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(alexnet(), lpips.weights_file())
    assert lpips.no_lpips() is None
    clip = np.random.default_rng(0).random((9, 40, 56, 3), np.float32)
    assert lpips.lpips(clip, clip) == 0.0
    near, far = (
        lpips.lpips(np.clip(clip + by * np.sin(np.arange(56))[:, None], 0, 1).astype(np.float32), clip) for by in (0.05, 0.3)
    )
    assert 0 < near < far
    assert lpips.lpips(clip[:, :30], clip[:, :30]) is None, "nothing is left of such frames"


def test_lpips_is_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its network put together by hand, since torchvision may not be here."""
    from torchmetrics.functional.image import lpips as theirs

    weights = alexnet()
    ours = lpips.Lpips(weights, linear := torch.load(lpips.linear_file(), map_location="cpu", weights_only=True))
    assert len(linear) == 5
    layers: list[torch.nn.Module] = []
    for place, (channels, out, size, stride, padding) in lpips.CONVOLUTIONS.items():
        layers += [torch.nn.MaxPool2d(3, 2)] if place in lpips.POOLED else []
        layers += [torch.nn.Conv2d(channels, out, size, stride, padding), torch.nn.ReLU()]
    features = torch.nn.Sequential(*layers)
    features.load_state_dict({name.removeprefix("features."): x for name, x in weights.items()})
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_, **__: features)
    a, b = torch.rand(3, 3, 64, 80), torch.rand(3, 3, 64, 80)
    expected = theirs._LPIPS(pretrained=True, net="alex")(a, b, normalize=True).flatten()
    torch.testing.assert_close(ours(a, b), expected, rtol=1e-4, atol=1e-6)


def alexnet() -> dict[str, torch.Tensor]:
    """Weights as torchvision names them, drawn at random."""
    found: dict[str, torch.Tensor] = {}
    for place, (channels, out, size, *_) in lpips.CONVOLUTIONS.items():
        layer = torch.nn.Conv2d(channels, out, size)
        found |= {f"features.{place}.weight": layer.weight.data, f"features.{place}.bias": layer.bias.data}
    return found
