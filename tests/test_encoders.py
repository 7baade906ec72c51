"""Image encoders: every family that is known, alone and as a vision tower; packed and padded pictures; what is left alone, and said."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

import accelplug
from accelplug.call import Layout
from accelplug.cli import main
from accelplug.comparison import FeatureComparison
from accelplug.errors import AccelplugError, FallbackError, NoMatchError, RecipeError, UnsupportedError
from accelplug.families.encoders import KNOWN_ENCODERS, Encoder, raster_places, register_encoder
from accelplug.hosts.models import towers_of
from accelplug.inspection import EncoderInspection
from accelplug.testing import encoders
from accelplug.testing.encoders import TOWER_SIZES
from accelplug.testing.language_models import answer_of, build_language_model, llava, qwen2_5_vl
from accelplug.testing.laws import run_once, snapshot_of
from accelplug.testing.models import Built, build_denoiser, noise
from accelplug.testing.registered import registered
from tests.patch_rows import ROWS

WIDE = {**TOWER_SIZES, "intermediate_size": 64}
FEW: dict[str, Any] = {"block": 8, "density": 0.3, "rows": 2, "backend": "reference"}
ROW = {"patch": "rows", "with": FEW}
WHOLE = {"patch": "rows", "with": {"block": 8, "density": None, "top_p": 1 - 1e-9, "backend": "reference"}}
PIXELS = {"pixel_values": noise(2, 3, 48, 64)}
SQUARE = {"pixel_values": noise(2, 3, 48, 48)}


def packed(make: Callable[[], Any], *grids: tuple[int, int, int]) -> Built:
    """A tower of Qwen's, and noise on grids of so many frames, rows and columns."""
    grid = torch.tensor(grids)
    return make(), {"hidden_states": noise(int(grid.prod(-1).sum()), 3 * 2 * 8 * 8), "grid_thw": grid}


def qwen2_vision() -> Any:
    config = hf.Qwen2VLConfig(
        text_config={"hidden_size": 32},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2},
    ).vision_config
    return towers_class("Qwen2VisionTransformerPretrainedModel")(config)


def qwen2_5_vision() -> Any:
    """Windows of 2 x 2 merged tokens in the first layer and the third."""
    sizes = {"depth": 3, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "patch_size": 8, "intermediate_size": 64}
    windows = {"window_size": 32, "fullatt_block_indexes": [1], "spatial_merge_size": 2}
    return towers_class("Qwen2_5_VisionTransformerPretrainedModel")(
        hf.Qwen2_5_VLConfig(vision_config={**sizes, **windows}).vision_config
    )


def towers_class(name: str) -> Any:
    """A class that transformers has below its models."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    return getattr(modeling_qwen2_vl, name, None) or getattr(modeling_qwen2_5_vl, name)


def depth_anything() -> Built:
    backbone = hf.Dinov2Config(**TOWER_SIZES, mlp_ratio=2, out_features=["stage1", "stage2"], reshape_hidden_states=False)
    config = hf.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=8,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8],
        reassemble_factors=[2, 1],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    return hf.DepthAnythingForDepthEstimation(config), PIXELS


def clip() -> Built:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    config = hf.CLIPConfig(vision_config=WIDE, text_config={**text, "bos_token_id": 1, "eos_token_id": 2})
    return hf.CLIPModel(config), {**SQUARE, "input_ids": torch.tensor([[1, 7, 8, 2]])}


MODELS: dict[str, tuple[Callable[[], Built], int, int]] = {
    "dinov2": (encoders.dinov2, 48, 1),
    "dinov2 classifier": (
        lambda: (hf.Dinov2ForImageClassification(hf.Dinov2Config(**TOWER_SIZES, mlp_ratio=2)), PIXELS),
        48,
        1,
    ),
    "dinov2 registers": (
        lambda: (hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**TOWER_SIZES, mlp_ratio=2)), PIXELS),
        48,
        5,
    ),
    "dinov3": (encoders.dinov3, 63, 5),
    "vit": (lambda: (hf.ViTModel(hf.ViTConfig(**WIDE)), SQUARE), 36, 1),
    "deit": (lambda: (hf.DeiTModel(hf.DeiTConfig(**WIDE)), SQUARE), 36, 2),
    "ijepa": (lambda: (hf.IJepaModel(hf.IJepaConfig(**WIDE)), SQUARE), 36, 0),
    "clip": (lambda: (hf.CLIPVisionModel(hf.CLIPVisionConfig(**WIDE)), SQUARE), 36, 1),
    "clip beside its text": (clip, 36, 1),
    "siglip": (lambda: (hf.SiglipVisionModel(hf.SiglipVisionConfig(**WIDE, vision_use_head=False)), SQUARE), 36, 0),
    "siglip2": (encoders.siglip2, 65, 0),
    "internvl": (
        lambda: (
            hf.InternVLVisionModel(hf.InternVLVisionConfig(**{**WIDE, "patch_size": [8, 8], "image_size": [48, 48]})),
            SQUARE,
        ),
        36,
        1,
    ),
    "depth anything": (depth_anything, 48, 1),
    "qwen2-vl": (lambda: packed(qwen2_vision, (1, 6, 8)), 48, 0),
    "qwen2.5-vl": (lambda: packed(qwen2_5_vision, (1, 6, 8)), 48, 0),
}
"""A model of each family, its patches, and the tokens ahead of them."""


def built(name: str) -> Built:
    return build_denoiser(MODELS[name][0])


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_served_and_left_as_it_was(name: str) -> None:
    model, inputs = built(name)
    patches, ahead = MODELS[name][1:]
    dense, before = output(model, inputs), snapshot_of(model)
    with accelplug.apply(model, WHOLE, gate="off", strict=True) as plug:
        torch.testing.assert_close(output(model, inputs), dense, rtol=1e-3, atol=1e-4)
        layouts = {row.layout for row in plug.where() if row.params is not None and isinstance(row.layout, Layout)}
        assert not plug.report().unrouted
        assert [(layout.visual, layout.text_before, layout.text_after) for layout in layouts] == [(patches, ahead, 0)]
    with accelplug.apply(model, ROW, gate="off", strict=True):
        assert not torch.equal(output(model, inputs), dense)
    assert snapshot_of(model) == before
    assert torch.equal(output(model, inputs), dense)


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What a model gives: features, but for those of padding, depth or logits."""
    with torch.no_grad():
        out = model(**inputs)
    found = next(
        x
        for x in (out.get(name) for name in ("last_hidden_state", "predicted_depth", "logits", "logits_per_image"))
        if x is not None
    )
    valid = inputs.get("pixel_attention_mask")
    return found if valid is None else found[valid.bool()]


def test_every_family_is_tried() -> None:
    seen = {type(tower).__name__ for name in MODELS for tower, _ in towers_of(built(name)[0]).values()}
    untried = [family.name for family in KNOWN_ENCODERS if not seen & set(family.classes)]
    assert untried == ["smolvlm"]  # a tower, which is tried with its model


# ----------------------------------------------------------------------------------------------- padded and packed pictures


def test_rows_of_a_padded_batch_have_plans_of_their_own() -> None:
    shapes = (5, 13), (8, 6)
    model, both = build_denoiser(lambda: encoders.siglip2(*shapes))
    with accelplug.apply(model, ROW, gate="off", strict=True) as plug, plug.trace() as events:
        together = run_once(model, both)
        for row, (height, width) in enumerate(shapes):
            tokens = height * width
            alone = {
                name: x[row : row + 1, :tokens] if x.ndim > 1 and x.shape[1] > 2 else x[row : row + 1]
                for name, x in both.items()
            }
            torch.testing.assert_close(together[row, :tokens], run_once(model, alone)[0], rtol=1e-4, atol=1e-5)
        assert [event.tokens for event in events[:4]] == [65, 48, 65, 48]


@pytest.mark.parametrize("make", [qwen2_vision, qwen2_5_vision])
def test_packed_pictures_have_plans_of_their_own(make: Callable[[], Any]) -> None:
    grids = (1, 6, 8), (2, 8, 6), (1, 4, 4)
    model, inputs = build_denoiser(lambda: packed(make, *grids))
    dense = run_once(model, inputs)
    with accelplug.apply(model, WHOLE, gate="off", strict=True):
        torch.testing.assert_close(run_once(model, inputs), dense, rtol=1e-3, atol=1e-4)
    with accelplug.apply(model, ROW, gate="off", strict=True) as plug:
        together = run_once(model, inputs)
        assert not torch.equal(together, dense)
        assert plug.report().served["rows"] == 4 * len(plug.sites)
        apart, start = [], 0
        for grid in grids:
            tokens = math.prod(grid)
            alone = {"hidden_states": inputs["hidden_states"][start : start + tokens], "grid_thw": torch.tensor([grid])}
            apart.append(run_once(model, alone))
            start += tokens
        torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "window"), [(6, 8, 0), (6, 8, 2), (8, 4, 2), (10, 14, 4), (2, 2, 4)])
def test_packed_patches_lie_as_transformers_lays_them(rows: int, columns: int, window: int) -> None:
    grid = torch.tensor([[1, rows, columns]])
    places = get_vision_position_ids(grid, 2)
    if window:
        index, _ = get_vision_window_index(grid, 2, window * 2 * 8, 8)
        places = places.unflatten(0, (-1, 4))[index].flatten(0, 1)
    assert raster_places(rows, columns, 2, window) == tuple((places[:, 0] * columns + places[:, 1]).tolist())


def test_layers_that_read_windows_are_left_alone_and_said() -> None:
    model, _ = built("qwen2.5-vl")
    with accelplug.apply(model, ROW, gate="off") as plug:
        assert [site.layer for site in plug.sites] == [1]
        assert plug.report().skipped == {
            f"vision.blocks.{n}.attn": "it reads windows by the model's own design" for n in (0, 2)
        }
        assert "1 of 1" in plug.summary()


# -------------------------------------------------------------------------------------------------------- vision towers


@pytest.mark.parametrize("make", [llava, qwen2_5_vl])
def test_a_vision_tower_is_patched_beside_the_heads_of_its_decoder(make: Callable[[], Built]) -> None:
    model, inputs = build_language_model(make)
    stock, before = answer_of(model, inputs), snapshot_of(model)
    seen, heads = (
        {**ROW, "where": {"denoiser": "vision", "tokens": ">=4"}},
        {"patch": "visual_bias", "with": {"image_weight": 6.0}},
    )
    answers = []
    for rules in ([seen], [heads], [seen, heads]):
        plug = accelplug.apply(model, {"rules": rules}, gate="off", strict=True)
        answers.append(answer_of(model, inputs))
        served = plug.report().served
        assert ("rows" in served) == (seen in rules)
        assert ("visual_bias" in served) == (heads in rules)
        plug.mark(None)
        plug.remove()
        assert snapshot_of(model) == before
    assert torch.equal(answer_of(model, inputs), stock)
    assert not any(torch.equal(one, other) for one in answers for other in (*answers, stock) if one is not other)


def test_a_vision_tower_takes_the_recipes_of_encoders_by_name() -> None:
    model, _ = build_language_model(llava)
    with accelplug.apply(model, "encoder/balanced") as plug:
        assert "3 of 7" in plug.summary()
    text = hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(RecipeError, match="encoder/balanced is for encoder: True"):
        accelplug.apply(text, "encoder/balanced")


def test_a_rule_for_a_tower_that_is_not_there_is_refused() -> None:
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UnsupportedError, match="uses rows, a patch of the family sparse"):
        accelplug.apply(model, {**ROW, "where": {"denoiser": "vision"}})


def test_the_tower_is_not_patched_where_a_head_patch_reads_it() -> None:
    model, _ = build_language_model(llava)
    imbalance = {"patch": "imbalance", "with": {"local_alpha": 4.0}}
    before = snapshot_of(model)
    with pytest.raises(UnsupportedError, match="Take one of them"):
        accelplug.apply(model, {"rules": [{**ROW, "where": {"denoiser": "vision"}}, imbalance]})
    assert snapshot_of(model) == before


def test_smolvlm_masks_padding_patches() -> None:
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

    config = hf.SmolVLMConfig(vision_config=WIDE).vision_config
    shown = torch.ones(2, 6, 6, dtype=torch.bool)
    shown[1, :, 4:] = False
    make = lambda: (SmolVLMVisionTransformer(config), {**SQUARE, "patch_attention_mask": shown})  # noqa: E731
    model, inputs = build_denoiser(make)
    dense = run_once(model, inputs)
    with accelplug.apply(model, WHOLE, gate="off", strict=True):
        torch.testing.assert_close(run_once(model, inputs)[shown.flatten(1)], dense[shown.flatten(1)], rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------- what is dense, and why


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_of_padding_is_read_and_another_runs_dense(attention: str) -> None:
    model, inputs = built("dinov2")
    model.set_attn_implementation(attention)
    padding = torch.ones(1, 49)
    padding[:, 40:] = 0
    own = torch.ones(1, 1, 49, 49, dtype=torch.bool).tril()
    own = own if attention == "sdpa" else torch.where(own, 0.0, torch.finfo(torch.float32).min)
    dense = {id(mask): output(model, {**inputs, "attention_mask": mask}) for mask in (padding, own)}
    with accelplug.apply(model, WHOLE, gate="off") as plug:
        found = output(model, {**inputs, "attention_mask": padding})
        torch.testing.assert_close(found[:, :40], dense[id(padding)][:, :40], rtol=1e-3, atol=1e-4)
        assert not plug.report().fallbacks
        assert torch.equal(output(model, {**inputs, "attention_mask": own}), dense[id(own)])
        assert any("more than key padding" in reason for reason in plug.report().fallbacks)


def test_attention_that_is_asked_for_is_the_models_own() -> None:
    model, inputs = built("dinov2")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        dense = model(**inputs, output_attentions=True).attentions
        with accelplug.apply(model, ROW, gate="off") as plug:
            found = model(**inputs, output_attentions=True).attentions
            assert any("attention maps are asked for" in reason for reason in plug.report().fallbacks)
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


def test_a_part_that_is_called_past_its_tower_is_dense_and_counted() -> None:
    model, inputs = built("dinov2")
    hidden = model.embeddings(**inputs)
    dense = model.encoder(hidden).last_hidden_state
    with accelplug.apply(model, ROW, gate="off") as plug:
        assert torch.equal(model.encoder(hidden).last_hidden_state, dense)
        assert any("was not called in this thread" in reason for reason in plug.report().fallbacks)
    with accelplug.apply(model, ROW, gate="off", strict=True), pytest.raises(FallbackError, match="was not called"):
        model.encoder(hidden)


def test_training_with_gradients_is_refused() -> None:
    model, inputs = built("dinov2")
    model.train().requires_grad_(True)
    with accelplug.apply(model, ROW, gate="off"), pytest.raises(UnsupportedError, match="training mode"):
        model(**inputs)


def test_what_has_no_way_in_is_refused_in_words() -> None:
    timm = type("VisionTransformer", (nn.Module,), {"__module__": "timm.models.vision_transformer"})
    with pytest.raises(UnsupportedError, match="is a model of timm"):
        accelplug.apply(timm(), ROW)
    beit = hf.BeitModel(hf.BeitConfig(**WIDE))
    with pytest.raises(
        UnsupportedError, match="BeitModel is an image encoder of a family that is not known: expected dinov2"
    ):
        accelplug.apply(beit, ROW)
    with pytest.raises(AccelplugError, match="names model classes"):
        register_encoder(Encoder("mine", ()))


def test_rules_of_steps_are_refused_and_of_sizes_hold() -> None:
    model, inputs = built("dinov2")
    with pytest.raises(
        RecipeError, match=r"where\.steps, and an image encoder has neither diffusion steps nor guidance branches"
    ):
        accelplug.apply(model, {**ROW, "where": {"steps": "1:"}})
    with pytest.raises(NoMatchError, match="2 of kind self in 2 layers"):
        accelplug.apply(model, {**ROW, "where": {"layers": "7:"}})
    dense = output(model, inputs)
    with accelplug.apply(model, {**ROW, "where": {"tokens": ">=49"}}, gate="off") as plug:
        assert torch.equal(output(model, inputs), dense)
        assert not plug.report().fallbacks
    with (
        accelplug.apply(model, {**ROW, "where": {"tokens": ">=49"}}, gate="off", strict=True),
        pytest.raises(FallbackError, match="never holds"),
    ):
        output(model, inputs)


def test_a_family_that_is_registered_is_served() -> None:
    class Mine(hf.BeitModel):
        """A class of somebody's."""

    assert not towers_of(Mine(hf.BeitConfig(**WIDE)))
    with registered(Encoder("mine", ("Mine",), special=1)):
        assert list(towers_of(Mine(hf.BeitConfig(**WIDE)))) == ["vision"]


# ----------------------------------------------------------------------------------------------------- compiled, and timed


def test_an_encoder_compiles_whole() -> None:
    torch._dynamo.reset()
    model, inputs = built("dinov3")
    other = {"pixel_values": noise(1, 3, 48, 64)}
    dense = output(model, inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(output(compiled, inputs), dense)
    with accelplug.apply(compiled, ROWS["rows"].recipe(), gate="off") as plug:
        for given in (inputs, other, inputs):
            eager = output(model, given)
            torch.testing.assert_close(output(compiled, given), eager, rtol=1e-4, atol=1e-5)
        assert not torch.equal(output(compiled, inputs), dense)
        assert not plug.report().fallbacks
        assert plug.report().compiled == ["rows at 2 modules of vision"]
    assert torch.equal(output(compiled, inputs), dense)
    torch._dynamo.reset()


def test_the_gate_times_calls_and_predicts_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelplug.hosts import gate

    ms = iter([2.0, 1.0] * 10)
    monkeypatch.setattr(gate, "median_ms", lambda run, device: next(ms))
    model, inputs = built("dinov2")
    with accelplug.apply(model, ROW) as plug:
        output(model, inputs)
        assert plug.report().gains["rows"] == 2.0
        (forecast,) = plug.forecasts
        assert forecast.forward_gain is not None
        assert "steps" not in str(forecast)


# ---------------------------------------------------------------------------------------------------- compare, inspect, CLI


@pytest.mark.parametrize("name", ["dinov2", "siglip2", "qwen2.5-vl"])
def test_compare_holds_features_against_dense_ones(name: str, tmp_path: Path) -> None:
    model, _ = built(name)
    before = snapshot_of(model)
    some = {"patch": "rows", "with": {**FEW, "density": 0.1, "rest": "drop"}}
    found = accelplug.compare(model, {"all": WHOLE, "few": some}, accelplug.Pictures(size=64), progress=False)
    assert isinstance(found, FeatureComparison)
    assert snapshot_of(model) == before
    dense, everything, few = found.rows
    assert dense.cosine == pytest.approx(1, abs=1e-6)
    assert everything.cosine == pytest.approx(1, abs=1e-5)
    assert few.worst_patch <= few.worst_picture <= few.cosine < 1
    assert few.density < everything.density
    assert 0 <= dense.matched <= 1
    assert math.isnan(few.special) == (name != "dinov2")
    assert "drawn scenes" in str(found)
    assert "few" in found.to_html(tmp_path / "page.html").read_text()
    data = json.loads(found.to_json(tmp_path / "data.json").read_text())
    assert [row["name"] for row in data["rows"]] == ["dense", "all", "few"]
    assert len(list(found.maps())) == 4


def test_the_command_line_takes_image_encoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    model, _ = built("dinov2")
    model.save_pretrained(tmp_path / "model")
    Image.new("RGB", (70, 50), (200, 30, 90)).save(tmp_path / "photo.png")
    folder, recipe = str(tmp_path / "model"), tmp_path / "mine.yaml"
    recipe.write_text(
        "schema: 1\nmodel: mine\nmatch: {encoder: true}\ndefault: a\n"
        "recipes: {a: {rules: [{patch: rows, with: {block: 8, backend: reference}}]}}\n"
    )
    report = tmp_path / "report.html"
    told = ["--recipe", str(recipe), "--images", str(tmp_path / "photo.png"), "--size", "48", "--report", str(report)]
    assert main(["compare", folder, *told]) == 0
    out = capsys.readouterr().out
    assert "matched" in out
    assert "photo.png" in report.read_text()
    assert main(["inspect", folder]) == 0
    assert "2 of 2 layers" in capsys.readouterr().out
    for command in (["tune", folder, "-o", str(tmp_path / "t.yaml")], ["compare", folder, "--prompt", "a"]):
        assert main(command) == 2
        assert "image encoder" in capsys.readouterr().err


def test_inspect_tells_what_there_is_to_gain() -> None:
    found = accelplug.inspect(built("dinov2")[0])
    assert isinstance(found, EncoderInspection)
    assert found.shares[1512][1] > found.shares[518][1]
    assert "class" not in found.family
    assert "at most" in str(found)


@pytest.mark.parametrize("patch", ["rows", "tome", "neighborhood"])
def test_low_precision_stays_its_own(patch: str) -> None:
    model, inputs = built("dinov3")
    model.to(torch.bfloat16)
    inputs = {name: x.bfloat16() for name, x in inputs.items()}
    dense = output(model, inputs)
    with accelplug.apply(model, ROWS[patch].recipe(), gate="off", strict=True):
        found = output(model, inputs)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    assert not torch.equal(found, dense)
