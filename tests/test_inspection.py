"""inspect() of language and vision-language models, against eager attention and forwards made by hand."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any, Never

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import accelplug
from accelplug.cli import main
from accelplug.errors import AccelplugError, AlreadyAppliedError, NoMatchError, ShapeError, UnsupportedError
from accelplug.families import vlm
from accelplug.hosts.transformers import LanguageHost
from accelplug.inspection.drawing import colours, over_depth
from accelplug.inspection.language import LanguageInspection
from accelplug.inspection.reading import sink_dimensions
from accelplug.testing.language_models import IMAGE, TEXT_CONFIG, TokenRows
from tests.tiny_language_models import build, looked
from tests.tiny_language_models import inputs as inputs_of


def llava(**text: Any) -> Any:
    return _louder(build("llava", **text))


def qwen() -> Any:
    return _louder(build("qwen2_5_vl"))


def _louder(model: Any) -> Any:
    """Weights large enough that heads differ."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "language_model" in name:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def prompt(kind: str, rows: TokenRows) -> dict[str, torch.Tensor]:
    return inputs_of("qwen2_5_vl" if kind == "qwen" else kind, rows)


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch whose rows have an image each, without its padding."""
    kept = inputs["attention_mask"][row].bool()
    out = {key: inputs[key][row : row + 1, kept] for key in inputs if inputs[key].shape == inputs["input_ids"].shape}
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:
        ends = [0, *inputs["image_grid_thw"].prod(-1).cumsum(0).tolist()]
        grid = inputs["image_grid_thw"][row : row + 1]
        return {**out, "image_grid_thw": grid, "pixel_values": pixels[ends[row] : ends[row + 1]]}
    return {**out, "pixel_values": pixels[row : row + 1]}


KINDS = {"llava": llava, "qwen": qwen}
BATCH: TokenRows = [[3, "I", 5], [6, "I", 7]]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str) -> Any:
    return KINDS[kind]()


# ------------------------------------------------------------------------------------------------------ against by-hand forwards


def eager(model: Any, inputs: dict[str, Any]) -> np.ndarray:
    """Attention (L, H, S, S) of eager attention, float64."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        out = twin(**inputs, output_attentions=True, use_cache=False)
    return torch.stack([a[0] for a in out.attentions]).double().numpy()


def spans(inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, system and question tokens of a row without padding."""
    image = (inputs["input_ids"][0] == IMAGE).numpy()
    seen = image.cumsum()
    return image, seen == 0, (seen > 0) & ~image


def test_masses_vas_and_maps_are_those_of_eager_attention(kind: str, model: Any) -> None:
    inputs = prompt(kind, [[4, "I", 6]])
    found = looked(model, inputs)
    p = eager(model, inputs)
    image, system, question = spans(inputs)
    for mass, span in ((found.visual_mass, image), (found.system_mass, system), (found.question_mass, question)):
        assert mass.dtype == np.float32
        np.testing.assert_allclose(mass, p[:, :, -1, span].sum(-1), atol=1e-5)
    on_image, on_system, on_question = (p[:, :, question][..., span].sum(-1) for span in (image, system, question))
    np.testing.assert_allclose(found.vas, (on_image / (on_image + on_system)).mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(found.vas_ratio, (on_image / on_system).mean((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found.visual_share, (on_image / (on_image + on_question)).mean((1, 2)), atol=1e-5)
    assert found.vas_mean == pytest.approx(found.vas.mean())
    [[maps]] = found.image_attention
    np.testing.assert_allclose(maps, p[:, :, -1][..., image].mean(1), atol=1e-5)
    assert found.tokens == {"image": image.sum(), "system": system.sum(), "question": question.sum()}


@pytest.mark.parametrize("bias", [-60.0, -400.0])
def test_a_head_that_does_not_read_the_system_text_has_a_bounded_score(bias: float, tmp_path: Path) -> None:
    """exp(-60) is a mass of 1e-26, exp(-400) underflows: the ratio as published is of no use then, the share is."""
    inputs = prompt("llava", [[4, "I", 6]])
    _, system, _ = spans(inputs)
    model = llava()
    mask = torch.full((1, 1, len(system), len(system)), -torch.inf).triu(1)
    mask[..., torch.from_numpy(system)] += bias
    mask[..., :4, :4] = torch.full((4, 4), -torch.inf).triu(1)  # the system text itself must read something
    found = looked(model, {**inputs, "attention_mask": mask})
    assert (found.vas_ratio > 1e20).all()
    assert (found.vas > 0.999).all()
    assert (found.vas <= 1).all()
    assert found.vas_mean == pytest.approx(1)
    found.to_json(tmp_path / "a.json")
    assert "Infinity" not in (tmp_path / "a.json").read_text()
    assert found.table().row_count == 4


def head_outputs(model: Any, **inputs: Any) -> np.ndarray:
    """What enters the output projections at the last token: (L, H, D)."""
    taken, handles = [], []
    for layer in model.get_decoder().layers:
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: taken.append(args[0][0, -1])))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(taken).unflatten(-1, (4, -1)).numpy()


def test_vision_aware_head_divergence_is_that_of_two_forwards(kind: str, model: Any) -> None:
    inputs = prompt(kind, [[4, "I", 6]])
    found = looked(model, inputs)
    text = inputs["input_ids"][:, inputs["input_ids"][0] != IMAGE]
    seeing = head_outputs(copy.deepcopy(model), **inputs)
    blind = head_outputs(copy.deepcopy(model), input_ids=text, attention_mask=torch.ones_like(text))
    vhd, ta = np.linalg.norm(seeing - blind, axis=-1), (blind**2).sum(-1)
    np.testing.assert_allclose(found.vhd, vhd, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.ta, ta, rtol=1e-4, atol=1e-6)
    outliers = np.logical_and(*(x > x.mean(1, keepdims=True) + x.std(1, keepdims=True) for x in (vhd, ta)))
    assert (found.outliers == outliers).all()
    for layer in range(4):
        counted = np.where(outliers[layer], 0, vhd[layer])
        assert set(np.flatnonzero(found.vision_heads[layer])) == set(np.argsort(counted)[2:])


def test_a_padded_batch_is_its_rows_one_by_one(kind: str, model: Any) -> None:
    inputs = prompt(kind, BATCH)
    both = looked(model, inputs)
    first, second = (looked(model, row_of(inputs, row)) for row in (0, 1))
    for name in ("visual_mass", "system_mass", "question_mass", "vas", "vas_ratio", "visual_share", "vhd", "ta"):
        mean = (getattr(first, name) + getattr(second, name)) / 2
        np.testing.assert_allclose(getattr(both, name), mean, rtol=2e-4, atol=1e-5, err_msg=name)
    for row, alone in enumerate((first, second)):
        np.testing.assert_allclose(both.image_attention[row][0], alone.image_attention[0][0], atol=1e-5)
    np.testing.assert_allclose(both.phi, first.phi, atol=1e-4)
    assert both.tokens == first.tokens
    assert both.grids == first.grids


def test_every_image_of_a_row_is_told_apart(kind: str, model: Any) -> None:
    inputs = prompt(kind, [[3, "I", 2, "I", 5]])
    found = looked(model, inputs)
    sizes = [6, 8] if kind == "qwen" else [16, 16]
    assert [maps.shape for maps in found.image_attention[0]] == [(4, size) for size in sizes]
    total = sum(maps.sum(-1) for maps in found.image_attention[0])
    np.testing.assert_allclose(total, found.visual_mass.mean(1), rtol=1e-5)
    assert found.grids == ([(2, 3), (4, 2)] if kind == "qwen" else [(4, 4), (4, 4)])
    assert [p.shape for p in found.pictures] == ([(32, 48, 3), (64, 32, 3)] if kind == "qwen" else [(32, 32, 3)] * 2)


# ----------------------------------------------------------------------------------------------------------------------- sinks


def test_a_planted_sink_is_discovered() -> None:
    model = llava(hidden_size=512)
    inputs = prompt("llava", [[4, "I", 6]])
    inputs["input_ids"][0, 0] = 1
    clean = looked(model, inputs)
    assert clean.sink_dims == ()
    assert not clean.phi.any()
    assert any("no dimension" in note for note in clean.notes)
    assert all(len(found) == 0 for found in clean.visual_sinks)

    for name, weight in model.get_decoder().layers.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(0.01)  # what layers add leaves the residual stream massive
    model.get_input_embeddings().weight[1, 77] += 50
    found = looked(model, inputs)
    assert found.sink_dims == (77,)
    assert (found.phi[:, 0] >= 20).all()
    assert (found.phi[:, 1:] < 20).all()

    # an image token that the projector makes like the first one is a sink of the image, by either rule
    def plant(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        output[0, 5, 77] += 80
        return output

    handle = model.model.multi_modal_projector.register_forward_hook(plant)
    found = looked(model, inputs)
    handle.remove()
    assert all(list(sinks) == [5] for sinks in (*found.visual_sinks, *found.cosine_sinks))


def test_sink_dimensions_are_massive_in_most_middle_layers() -> None:
    first = torch.full((8, 1, 1000), 0.1)
    first[2:7, 0, 10] = -30
    first[2:4, 0, 20] = 40  # two of five layers are too few
    first[:, 0, 30] = 15  # below the threshold
    first[3:7, 0, 40] = 25
    assert sink_dimensions(first) == (10, 40)


def test_a_narrow_model_says_why_it_has_no_sinks() -> None:
    found = looked(llava(), prompt("llava", [[4, "I", 6]]))
    assert any("none can reach 20" in note for note in found.notes)


# ------------------------------------------------------------------------------------------------------- the model as it was


def state(model: Any) -> dict[str, tuple[object, ...]]:
    """Everything that a host could have left behind."""
    return {
        name: (
            id(vars(module).get("config")),
            vars(module).keys(),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


def test_the_model_is_as_before(kind: str, model: Any) -> None:
    inputs = prompt(kind, BATCH)
    with torch.no_grad():
        want = model(**inputs).logits
    before, config = state(model), copy.deepcopy(model.config.to_dict())
    kept = vars(model.model).get("rope_deltas")
    looked(model, inputs)
    assert state(model) == before
    assert model.config.to_dict() == config
    assert vars(model.model).get("rope_deltas") is kept
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)


def test_the_model_is_as_before_also_when_it_raises(kind: str, model: Any) -> None:
    inputs = prompt(kind, BATCH)
    with torch.no_grad():
        want = model(**inputs).logits
    last = model.get_decoder().layers[-1].mlp

    def fail(*args: Any) -> Never:
        raise RuntimeError("out of luck")

    handle = last.register_forward_pre_hook(fail)
    before = state(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        looked(model, inputs)
    assert state(model) == before
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)
    assert looked(model, inputs).visual_mass.shape == (4, 4)


# ---------------------------------------------------------------------------------------------------------------------- output


def test_pages_and_pictures_are_written(kind: str, model: Any, tmp_path: Path) -> None:
    found = looked(model, prompt(kind, [[3, "I", 2, "I", 5], [4, "I", 3]]))
    found.to_png(tmp_path / "a.png")
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape[1] == 1600
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 200
    found.to_html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count("data:image/png;base64,") == 10  # two pictures, and four layers on each
    assert page.count("<tr>") == 5
    assert page.count('class="layer"') == 8
    assert "http:" not in page
    assert "https:" not in page
    assert "<!--" not in page
    found.to_json(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    np.testing.assert_allclose(data["visual_mass"], found.visual_mass)
    assert data["vas_mean"] == pytest.approx(found.vas_mean)
    printed = io.StringIO()
    Console(width=120, file=printed).print(found)
    assert "Visual Attention Score" in printed.getvalue()
    assert "data:image/png" in found._repr_html_()


def test_patches_are_put_back_together() -> None:
    """The picture shown is the one whose patches the processor laid side by side."""
    model, inputs = qwen(), prompt("qwen", [[3, "I", 5]])
    picture = torch.rand(3, 32, 48)
    tiles = picture.reshape(3, 2, 2, 8, 3, 2, 8).permute(1, 4, 2, 5, 0, 3, 6)  # [h/2, w/2, 2, 2, C, P, P]
    inputs["pixel_values"] = tiles[..., None, :, :].expand(*tiles.shape[:5], 2, 8, 8).reshape(24, -1)
    [shown] = looked(model, inputs).pictures
    low, high = picture.aminmax()
    np.testing.assert_allclose(shown, 255 * ((picture - low) / (high - low)).permute(1, 2, 0), atol=1)


def test_without_system_text_there_is_no_vas(tmp_path: Path) -> None:
    inputs = prompt("llava", [["I", 5]])
    inputs = {key: x[:, 1:] if x.ndim == 2 else x for key, x in inputs.items()}
    found = looked(llava(), inputs)
    assert np.isnan(found.vas_mean)
    assert any("picture : system" in note for note in found.notes)
    found.to_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["vas"] == [None] * 4
    found.to_png(tmp_path / "a.png")


def test_colours_go_from_dark_to_light_and_layers_over_all_depth() -> None:
    light = colours(np.linspace(0, 1, 50)).astype(float) @ [0.3, 0.59, 0.11]
    assert (np.diff(light) > 0).all()
    assert over_depth(32) == [0, 6, 12, 19, 25, 31]
    assert over_depth(4) == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------------------------- summary and errors


def test_without_inputs_it_is_a_summary(kind: str, model: Any) -> None:
    found = accelplug.inspect(model)
    assert isinstance(found, LanguageInspection)
    assert (found.layers, found.heads, found.kv_heads, found.attention) == (4, 4, 2, "sdpa")
    assert found.family in ("llava", "qwen2.5-vl")
    assert len(found.modules) == 4
    assert not any(found.modules.values())
    printed = io.StringIO()
    Console(width=120, file=printed).print(found)
    assert "4 of 4 attention modules" in printed.getvalue()
    assert found.family in found._repr_html_()


def test_a_model_of_another_package_is_known_once_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnModel:
        pass

    monkeypatch.setattr(vlm, "VLM_CATALOG", copy.copy(vlm.VLM_CATALOG))
    family = vlm.Vlm("own", ("OwnModel",), "patches", "thw")
    assert vlm.vlm_of(OwnModel()) is None
    assert accelplug.register_vlm(family) is accelplug.register_vlm(family)
    assert vlm.vlm_of(OwnModel()) is family
    assert family in vlm.list_vlms()
    with pytest.raises(AccelplugError, match="LlavaForConditionalGeneration"):
        accelplug.register_vlm(vlm.Vlm("own", ("LlavaForConditionalGeneration",)))
    with pytest.raises(AccelplugError, match="names model classes"):
        accelplug.register_vlm(vlm.Vlm("own", ()))


def test_a_host_without_the_ability_is_refused_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {what: whose for what, whose in LanguageHost.abilities.items() if what != "inspect"}
    monkeypatch.setattr(LanguageHost, "abilities", others)
    with pytest.raises(UnsupportedError, match=r"inspect: expected .*, got LlavaForConditionalGeneration, a language model"):
        accelplug.inspect(llava())


def test_what_cannot_be_inspected_says_so() -> None:
    model, inputs = llava(), prompt("llava", [[4, "I", 6]])
    text = LlamaForCausalLM(LlamaConfig(**TEXT_CONFIG)).eval()
    summary = accelplug.inspect(text)
    assert isinstance(summary, LanguageInspection)
    assert summary.family is None
    with pytest.raises(NoMatchError, match="not a known vision-language model"):
        accelplug.inspect(text, inputs)
    with pytest.raises(NoMatchError, match="show no image"):
        looked(model, {"input_ids": torch.randint(3, 400, (1, 9))})
    right = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    right["attention_mask"][:, -2:] = 0
    with pytest.raises(ShapeError, match="padded on the right"):
        looked(model, right)
    with pytest.raises(AccelplugError, match="arguments of the call"):
        accelplug.inspect(torch.nn.Linear(2, 2), inputs)
    with accelplug.apply(model, {"patch": "var"}), pytest.raises(AlreadyAppliedError):
        looked(model, inputs)
    model.config.text_config.attention_dropout = 0.1
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    with pytest.raises(UnsupportedError, match="eval"):
        looked(model, inputs)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from accelplug.zoo import scenes
    from benchmarks.zoo.vlm import make_model, make_processor

    processor = make_processor()
    folder = tmp_path / "model"
    make_model(processor.tokenizer.get_vocab()).save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.fromarray(scenes.render(scenes.sample(5))[0]).save(tmp_path / "scene.png")
    assert main(["inspect", str(folder)]) == 0
    assert "8 of 8 attention modules" in capsys.readouterr().out
    asked = ["inspect", str(folder), "--image", str(tmp_path / "scene.png"), "--prompt", "Is there a star?"]
    for name in ("a.html", "a.png", "a.json"):
        assert main([*asked, "--report", str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 10_000
    assert "vision-aware heads" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--report", str(tmp_path / "b.html")]) == 0
    assert main(["inspect", str(folder), "--report", str(tmp_path / "b.png")]) == 2
    assert "ends in .html or .json" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--image", str(folder / "config.json")]) == 2
    assert "cannot be read as a picture" in capsys.readouterr().err
