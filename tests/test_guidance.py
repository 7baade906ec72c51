"""Patches around generate: their maths by hand, their neutral settings, their second branches, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from torch.nn.functional import pad

import accelplug
from accelplug.errors import AccelplugError, RecipeError, ShapeError, UnsupportedError
from accelplug.families import pixels
from accelplug.families.vlm import vlm_of
from accelplug.patches.generation import GenerationPatch, Tools
from accelplug.patches.guidance import agla, branch, carve, contrast, gaze
from accelplug.testing.language_models import AN_IMAGE_EACH, IMAGE, TokenRows, forward, generate, word_processor
from tests import tiny_language_models as tiny
from tests.patch_rows import ROWS

WITHOUT: TokenRows = ((3, "I", 6), (5,))
MODELS = ("llava", "qwen2_5_vl")
WHOLE = ("llava", "gemma3", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def processor() -> Any:
    return word_processor()


def inputs(name: str, rows: TokenRows = AN_IMAGE_EACH) -> dict[str, torch.Tensor]:
    """Inputs whose still pictures are the same in both frames, as a processor makes them."""
    given = tiny.inputs(name, rows)
    if "image_grid_thw" in given:
        frames = given["pixel_values"].reshape(-1, 3, 2, 8, 8)
        given["pixel_values"] = frames[:, :, :1].expand_as(frames).reshape(len(frames), -1)
    return given


def rules(*patches: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"rules": [{"patch": name, "with": settings} for name, settings in patches]}


CARVE, AGLA, CONTRAST = ((name, dict(ROWS[name].working)) for name in ("carve", "agla", "contrast"))


# --------------------------------------------------------------------------------------------------------------- maths


def test_contrast_weighs_later_steps_more() -> None:
    asked = torch.tensor([[[2.0, 1.0], [3.0, 4.0], [9.0, 9.0]]])  # [1, 3, 2]
    described = torch.tensor([[[1.0, 1.0], [1.0, 2.0]]])
    assert torch.equal(gaze.contrast(asked, described, 0.0), torch.tensor([(2 + 2 * 3) / 3, (1 + 2 * 2) / 3]))
    assert torch.equal(gaze.contrast(asked, described, 1.0, "first"), torch.tensor([1.0, 0.5]))
    assert torch.equal(gaze.contrast(asked, described, 0.0, "last"), torch.tensor([9.0, 4.5]))


def test_highest_keeps_a_share_and_all_that_tie() -> None:
    values = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    assert gaze.highest(values, 0.5).tolist() == [[True, False], [True, False]]
    assert gaze.highest(values, 1e-9).sum() == 1
    assert gaze.highest(values, 1.0).all()
    assert gaze.highest(torch.ones(3, 3), 0.2).all()


def test_components_by_hand() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1]]).bool()
    expected = [[1, 0, 2, 2], [1, 0, 0, 2], [0, 2, 0, 2], [2, 2, 2, 2]]  # a corner does not connect, the way round does
    assert carve.components(mask).tolist() == expected
    assert carve.components(torch.zeros(2, 3).bool()).tolist() == [[0] * 3] * 2


def test_components_against_flooding() -> None:
    mask = torch.rand(17, 23) < 0.55
    labels = carve.components(mask)
    flooded = torch.arange(1.0, mask.numel() + 1).reshape(mask.shape) * mask
    for _ in range(mask.numel()):
        padded = torch.nn.functional.pad(flooded, (1, 1, 1, 1))
        sides = torch.stack([padded[1:-1, 2:], padded[1:-1, :-2], padded[2:, 1:-1], padded[:-2, 1:-1], flooded])
        flooded = sides.amax(0) * mask
    assert torch.equal(labels > 0, mask)
    pairs = set(zip(labels[mask].tolist(), flooded[mask].tolist(), strict=True))
    assert len(pairs) == labels.max() == len(flooded[mask].unique())


def test_heaviest_regions_and_their_box() -> None:
    labels = torch.tensor([[1, 1, 0, 2], [0, 0, 0, 0], [3, 0, 0, 0]])
    values = torch.tensor([[1.0, 1.0, 9.0, 5.0], [0.0] * 4, [3.0, 0.0, 0.0, 0.0]])
    kept = carve.heaviest(values, labels, 2)
    assert kept.nonzero().tolist() == [[0, 3], [2, 0]]
    assert carve.bounding_box(kept) == (0, 3, 0, 4)
    assert carve.bounding_box(carve.heaviest(values, labels, 1)) == (0, 1, 3, 4)
    assert carve.heaviest(values, labels, 9).sum() == 4


def test_refined_enlarges_what_is_looked_at() -> None:
    picture = torch.randn(3, 8, 8)
    values = torch.zeros(8, 8)
    values[2:4, 4:8] = 1
    new = carve.refined(picture, values, 8 / 64, 1, 0.0)
    expected = torch.nn.functional.interpolate(picture[None, :, 2:4, 4:8], (4, 8), mode="bicubic", antialias=True)[0]
    assert torch.equal(new[:, 2:6], expected)  # twice as high, twice as wide, and in the middle
    assert new[:, :2].count_nonzero() == new[:, 6:].count_nonzero() == 0
    assert torch.equal(carve.refined(picture, torch.ones(8, 8), 0.2, 1, 0.0), picture)  # nothing stands out


@pytest.mark.parametrize(("height", "width", "inner"), [(15, 15, (336, 336)), (90, 23, (336, 86)), (1, 300, (1, 336))])
def test_a_cut_keeps_its_ratio_of_sides(height: int, width: int, inner: tuple[int, int]) -> None:
    filled = carve.enlarged(torch.ones(1, height, width), (336, 336))[0] > 0.5
    assert filled.shape == (336, 336)
    top, bottom, left, right = carve.bounding_box(filled)
    assert (bottom - top, right - left) == inner
    assert max(abs(top - (336 - bottom)), abs(left - (336 - right))) <= 1


def test_a_share_of_many_regions_is_kept() -> None:
    values = torch.zeros(9, 20)
    values[::2, ::2] = torch.arange(1.0, 51).reshape(5, 10)  # 50 regions of one pixel
    picture, area = torch.ones(1, 9, 20), 50 / 180
    assert carve.refined(picture, values, area, 3, 0.0).count_nonzero() >= 3
    for regions, share, kept in ((3, 0.2, 10), (3, 0.0, 3), (20, 0.2, 20)):
        labels = carve.components(gaze.highest(values, area))
        chosen = carve.heaviest(values, labels, kept)
        expected = carve.enlarged((picture * chosen)[:, *box(chosen)], (9, 20))
        assert torch.equal(carve.refined(picture, values, area, regions, share), expected)


def box(mask: torch.Tensor) -> tuple[slice, slice]:
    top, bottom, left, right = carve.bounding_box(mask)
    return slice(top, bottom), slice(left, right)


def test_layers_are_numbers_or_shares() -> None:
    assert [*gaze.numbers(None, 28)] == [*gaze.numbers(None, 64)] == [*range(20, 26)]  # as released, in every model
    assert [*gaze.numbers(None, 8)] == [5]
    assert [*gaze.numbers((0.5, 1.0), 4)] == [2, 3]
    assert [*gaze.numbers(carve.Carve({"layers": [1, 4]}).config.layers, 4)] == [1, 2, 3]
    assert [*gaze.numbers(carve.Carve({"layers": [0.5, 1]}).config.layers, 4)] == [2, 3]
    with pytest.raises(UnsupportedError, match="has 4"):
        gaze.numbers((1, 5), 4)


def test_agla_by_hand() -> None:
    z, other = torch.tensor([[2.0, 1.5, 0.0]]), torch.tensor([[0.0, 1.0, 5.0]])
    assert agla.mixed(z, other, 2.0, 0.5).tolist() == [[2.0, 3.5, -math.inf]]
    assert agla.mixed(z, other, 2.0, 0.0).tolist() == [[2.0, 3.5, 10.0]]
    assert agla.mixed(z, None, 0.0, 1.0).tolist() == [[2.0, -math.inf, -math.inf]]
    assert agla.kept_pixels(torch.arange(8.0).reshape(2, 4), 1.0).tolist() == [[False] * 4, [True] * 4]
    assert agla.concentration(torch.ones(7)) == pytest.approx(0)
    assert agla.concentration(torch.tensor([0.0, 3.0])) == 1
    assert agla.concentration(torch.tensor([1.0])) == agla.concentration(torch.zeros(3)) == 0


# -------------------------------------------------------------------------------------------------------------- pixels


def test_qwen_patches_are_the_picture_that_its_processor_saw() -> None:
    image = Image.effect_noise((64, 48), 40).convert("RGB")
    made = hf.Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 256, "longest_edge": 9999})
    given = made(image, return_tensors="pt")
    model = tiny.build("qwen2_5_vl")
    (picture,) = pixels.pictures(vlm_of(model), given, model.config.vision_config)
    colours = torch.tensor(list(image.tobytes())).reshape(48, 64, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (made.image_mean, made.image_std))
    assert torch.allclose(picture, (colours - mean) / std, atol=1e-5)
    back = pixels.replace(vlm_of(model), given, [picture], model.config.vision_config)
    assert torch.equal(back["pixel_values"], given["pixel_values"])


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_there_and_back(name: str, dtype: torch.dtype) -> None:
    model, given = tiny.build(name), inputs(name, tiny.TWO_ROWS)
    given["pixel_values"] = given["pixel_values"].to(dtype)
    shown = pixels.pictures(vlm_of(model), given, model.config.vision_config)
    back = pixels.replace(vlm_of(model), given, shown, model.config.vision_config)["pixel_values"]
    assert len(shown) == 3
    assert all(picture.ndim == 3 and len(picture) == 3 and picture.dtype == torch.float32 for picture in shown)
    assert torch.equal(back, given["pixel_values"])
    assert back.dtype == dtype


def test_pixels_refuse() -> None:
    model, given = tiny.build("qwen2_vl"), inputs("qwen2_vl")
    family, vision = vlm_of(model), model.config.vision_config
    shown = pixels.pictures(family, given, vision)
    with pytest.raises(ShapeError, match="new pictures"):
        pixels.replace(family, given, shown[:1], vision)
    with pytest.raises(ShapeError, match="do not fit"):
        pixels.pictures(family, {**given, "pixel_values": given["pixel_values"][:-1]}, vision)
    with pytest.raises(UnsupportedError, match="one frame"):
        pixels.pictures(family, {**given, "image_grid_thw": torch.tensor([[2, 4, 6]])}, vision)
    with pytest.raises(UnsupportedError, match="tiles"):
        pixels.pictures(vlm_of(tiny.build("llava_next")), tiny.inputs("llava_next", AN_IMAGE_EACH))
    with pytest.raises(ShapeError, match="pixel_values"):
        pixels.pictures(vlm_of(tiny.build("llava")), {})


# ------------------------------------------------------------------------------------------------------------- prompts


@contextmanager
def lent(
    model: Any, given: dict[str, torch.Tensor], processor: Any, patch: tuple[str, dict[str, Any]] = CARVE
) -> Iterator[Tools]:
    """What a patch around ``generate`` is lent, while it is on."""
    found: list[Tools] = []

    def keep(self: GenerationPatch, model: Any, call: Callable[..., Any], inputs: dict[str, Any], tools: Tools) -> Any:
        found.append(tools)
        return call(**inputs)

    with accelplug.apply(model, rules(patch), processor=processor):
        with pytest.MonkeyPatch.context() as instead:
            instead.setattr(carve.Carve, "generate", keep)
            generate(model, given, 1)
        yield found[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_like_another(name: str, processor: Any) -> None:
    model, given = tiny.build(name), inputs(name, WITHOUT)
    with lent(model, given, processor) as tools:
        new = tools.prompt_like(given, "w9 w8")
        token = model.config.image_token_id
        pictures = [IMAGE] * int((given["input_ids"][0] == token).sum())
        whole = processor.tokenizer("w1 <image> w9 w8 w2")["input_ids"]
        assert new["input_ids"][0].tolist() == [whole[0], *pictures, *whole[2:]]
        assert new["input_ids"][1].tolist() == [0] * (len(pictures)) + whole[:1] + whole[2:]
        assert torch.equal(new["attention_mask"], (new["input_ids"] != 0).int().to(new["attention_mask"]))
        assert ("mm_token_type_ids" in new) == (name == "qwen2_5_vl")
        assert new["pixel_values"] is given["pixel_values"]
        assert tools.questions(new) == ["w9 w8", "w1 w9 w8"]


def test_prompts_of_processors_with_marks_around_a_picture(processor: Any) -> None:
    shared = {"tokenizer": processor.tokenizer, "apply_chat_template": processor.apply_chat_template}
    gemma = SimpleNamespace(**shared, boi_token="<image>", full_image_sequence="w3" + " <image>" * 4 + " w4")
    intern = SimpleNamespace(**shared, image_token="<image>", start_image_token="w3 ", end_image_token=" w4")
    for name, theirs, size in (("gemma3", gemma, 4), ("internvl", intern, 16)):
        model, given = tiny.build(name), inputs(name)
        with lent(model, given, theirs) as tools:
            new = tools.prompt_like(given, "w9")
            before, behind = (
                [processor.tokenizer.convert_tokens_to_ids(w) for w in x] for x in (("w1", "w3"), ("w4", "w9"))
            )
            expected = [*before, *[IMAGE] * size, *behind, processor.tokenizer.convert_tokens_to_ids("w2")]
            assert new["input_ids"].tolist() == [expected] * 2
            assert generate(model, given).shape[0] == 2
    wrong = SimpleNamespace(**shared, image_token="<picture>")
    with accelplug.apply(model, rules(CARVE), processor=wrong), pytest.raises(AccelplugError, match="belongs to the model"):
        generate(model, given)


def test_gaze_reads_what_eager_attention_reads(processor: Any) -> None:
    model, given = tiny.build("llava"), inputs("llava")
    model.set_attn_implementation("eager")
    out = generate(model, given, 3, return_dict_in_generate=True, output_attentions=True)
    with lent(model, given, processor, ("carve", {"keep_area": 1})) as tools:
        maps = gaze.look(model, tools, given, (0.5, 1.0), 3)
    for row, seen in enumerate(maps):
        visual = given["input_ids"][row] == IMAGE
        for step, layers in enumerate(out.attentions[: seen.shape[1]]):
            expected = torch.stack([layer[row, :, -1, : len(visual)].mean(0)[visual] for layer in layers[2:]])
            assert torch.allclose(seen[:, step], expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ the laws


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("patch", ["carve", "agla", "contrast"])
def test_neutral_is_the_plain_generate(name: str, patch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny.build(name), inputs(name, tiny.TWO_ROWS)
    plain = generate(model, given, return_dict_in_generate=True, output_scores=True)
    monkeypatch.setattr(gaze, "look", lambda *_: pytest.fail("a neutral patch has no pass of its own"))
    with accelplug.apply(model, ROWS[patch].recipe(ROWS[patch].neutral)):
        out = generate(model, given, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.scores, plain.scores, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("patch", [CARVE, AGLA, CONTRAST])
def test_rows_without_a_picture_are_answered_as_ever(name: str, patch: tuple[str, dict], processor: Any) -> None:
    model, given = tiny.build(name), inputs(name, WITHOUT)
    text = {k: v for k, v in tiny.inputs(name, ((5,), (3,))).items() if k not in ("pixel_values", "image_grid_thw")}
    ask = {"return_dict_in_generate": True, "output_scores": True}
    plain, plain_text = generate(model, given, **ask), generate(model, text, **ask)
    with accelplug.apply(model, rules(patch), processor=processor):
        out = generate(model, given, **ask)
        out_text = generate(model, text, **ask)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain.scores, out.scores, strict=True))
    assert not torch.equal(plain.scores[0][0], out.scores[0][0])
    assert all(torch.equal(a, b) for a, b in zip(plain_text.scores, out_text.scores, strict=True))


@pytest.mark.parametrize("steps", ["first", "last", "all"])
def test_carve_answers_on_the_refined_picture(steps: str, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny.build("llava"), inputs("llava")
    seen: list[torch.Tensor] = []
    real = carve.refined
    monkeypatch.setattr(carve, "refined", lambda *args: seen.append(real(*args)) or seen[-1])
    with accelplug.apply(model, rules((CARVE[0], {**CARVE[1], "steps": steps})), processor=processor):
        out = generate(model, given, num_beams=2)
    plain = generate(model, {**given, "pixel_values": torch.stack(seen)}, num_beams=2)
    assert torch.equal(out, plain)


# --------------------------------------------------------------------------------------------------------- two branches


def by_hand(model: Any, given: dict[str, Any], masked: torch.Tensor, tokens: int) -> torch.Tensor:
    """Mix both branches greedily, reading the whole sequence anew for every token."""
    given = dict(given)
    for _ in range(tokens):
        mask = given["attention_mask"]
        positions = {} if "image_grid_thw" in given else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        z = forward(model, {**given, **positions})[:, -1]
        other = forward(model, {**given, **positions, "pixel_values": masked})[:, -1]
        new = agla.mixed(z, other, 2.0, 0.5).argmax(-1, keepdim=True)
        given["input_ids"] = torch.cat([given["input_ids"], new], 1)
        given["attention_mask"] = torch.nn.functional.pad(mask, (0, 1), value=1)
        for kinds in {"token_type_ids", "mm_token_type_ids"} & given.keys():
            given[kinds] = torch.nn.functional.pad(given[kinds], (0, 1))
    return given["input_ids"]


@pytest.fixture
def branches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The second branches that are made."""
    made: list[Any] = []

    class Noted(branch.Branch):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(agla, "Branch", Noted)
    monkeypatch.setattr(contrast, "Branch", Noted)
    return made


@pytest.mark.parametrize(
    ("name", "with_processor"), [*((name, False) for name in WHOLE), *((name, True) for name in MODELS)]
)
def test_agla_is_two_branches(
    name: str, with_processor: bool, processor: Any, branches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = tiny.build(name), inputs(name)
    monkeypatch.setattr(agla, "concentration", lambda values: 0.8)  # random weights look everywhere alike
    with accelplug.apply(model, rules(AGLA), processor=processor if with_processor else None):
        out = generate(model, given)
    (branch,) = branches
    masked = branch._inputs["pixel_values"]
    assert float((masked == 0).float().mean()) == pytest.approx(0.4, abs=0.02)
    assert torch.equal(masked[masked != 0], given["pixel_values"][masked != 0])
    assert torch.equal(out, by_hand(model, given, masked, 6))


def test_agla_samples_several_answers(processor: Any, branches: list[Any]) -> None:
    model, given = tiny.build("llava"), inputs("llava")
    ask = {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    with accelplug.apply(model, rules(AGLA), processor=processor):
        out = generate(model, given, **ask)
        assert len(branches) == 2
        for copy in range(2):  # each answer's scores are those of a greedy run that is made to say the same
            said = out.sequences[copy::2]
            done = {**given, "input_ids": said[:, :-1]}
            more = said.shape[1] - 1 - given["input_ids"].shape[1]
            done["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, more), value=1)
            position_ids = (done["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            z = forward(model, {**done, "position_ids": position_ids})[:, -1]
            masked = {**done, "position_ids": position_ids, "pixel_values": branches[copy]._inputs["pixel_values"]}
            expected = agla.mixed(z, forward(model, masked)[:, -1], 2.0, 0.5)
            kept = out.scores[-1][copy::2] > -math.inf  # generate has taken the top 50
            assert torch.allclose(out.scores[-1][copy::2][kept], expected[kept], atol=1e-4)


def test_agla_without_second_branch_only_cuts(branches: list[Any]) -> None:
    model, given = tiny.build("llava"), inputs("llava")
    ask = {"return_dict_in_generate": True, "output_scores": True}
    plain = generate(model, given, **ask)
    with accelplug.apply(model, rules(("agla", {"alpha": 0, "beta": 0.5}))):
        out = generate(model, given, **ask)
    assert not branches
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.equal(out.scores[0], agla.mixed(plain.scores[0], None, 0.0, 0.5))


def test_the_users_logits_processors_come_first(processor: Any) -> None:
    model, given = tiny.build("llava"), inputs("llava")
    calls: list[int] = []

    def forbid(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(ids.shape[1])
        return scores.index_fill(1, torch.arange(256), -math.inf)

    with accelplug.apply(model, rules(AGLA), processor=processor):
        out = generate(model, given, logits_processor=[forbid])
    assert int(out[:, given["input_ids"].shape[1] :].min()) >= 256
    assert len(calls) == 6


@pytest.mark.parametrize("patch", [CARVE, AGLA, CONTRAST])
def test_under_autocast_as_without_but_for_what_the_model_loses(
    patch: tuple[str, dict], processor: Any, monkeypatch: Any
) -> None:
    """Contrast is mixed, and gaze read, in float32; where that picture is cut hangs on the model's own rounding."""
    model, given = tiny.build("llava"), inputs("llava")
    monkeypatch.setattr(agla, "kept_pixels", lambda values, score: values > 2)  # no pixel: the same in both
    monkeypatch.setattr(carve, "highest", lambda values, share: torch.arange(values.numel()).reshape(values.shape) > 500)
    ask = {"return_dict_in_generate": True, "output_scores": True}
    found = []
    for patched, cast in ((False, False), (False, True), (True, False), (True, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            if not patched:
                found.append(generate(model, given, 1, **ask).scores[0].float())
                continue
            with accelplug.apply(model, rules(patch), processor=processor):
                found.append(generate(model, given, 1, **ask).scores[0].float())
    plain, plain_cast, moved, moved_cast = (x.clamp(min=-20) for x in found)
    common = (found[2] > -math.inf) & (found[3] > -math.inf)
    assert (moved_cast - moved)[common].abs().max() < 8 * (plain_cast - plain).abs().max()
    assert not torch.equal(moved, plain)


@pytest.mark.parametrize("name", MODELS)
def test_together_with_attention_patches(name: str, processor: Any) -> None:
    model, given = tiny.build(name), inputs(name)
    plain = generate(model, given)
    bias = ("visual_bias", {"image_weight": 3.0})
    outs = []
    for recipe in (rules(CARVE, AGLA, bias), rules(CARVE, AGLA)):
        with accelplug.apply(model, recipe, processor=processor) as plug:
            ask = {"return_dict_in_generate": True, "output_scores": True}
            outs.append(generate(model, given, **ask).scores[0])
            served = plug.report().served
            assert served["carve"] == served["agla"] == 1
    assert not torch.equal(*outs)
    assert torch.equal(generate(model, given), plain)


def test_contrast_by_hand() -> None:
    z, text = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.2, 0.2, 0.6]]).log()
    out = contrast.contrasted(z + 5, text - 2, 2.0, 0.25)  # what is added to all logits of a branch is no matter
    assert out.exp().tolist() == [[pytest.approx(0.7**2 / 0.2), pytest.approx(0.2**2 / 0.2), 0.0]]
    assert torch.allclose(contrast.contrasted(z, text, 1.0, 0.0), z)
    ids, mask = torch.tensor([[0, 0, 7, 500, 500, 8], [5, 500, 500, 500, 6, 9]]), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    new = contrast.without_pictures({"input_ids": ids, "attention_mask": mask, "pixel_values": ids}, ids == 500)
    assert {name: x.tolist() for name, x in new.items()} == {
        "input_ids": [[0, 7, 8], [5, 6, 9]],
        "attention_mask": [[0, 1, 1], [1, 1, 1]],
    }


@pytest.mark.parametrize("name", tiny.VLM)
def test_contrast_is_with_the_stock_model_on_the_text_alone(name: str) -> None:
    """Beside a patch that changes the first branch; both branches read anew for every token."""
    model, stock, given = tiny.build(name), tiny.build(name), inputs(name)
    with accelplug.apply(
        model, rules(("contrast", {"gamma": 2.5, "cutoff": 0.01}), ("visual_bias", {"image_weight": 8.0}))
    ) as plug:
        out = generate(model, given, return_dict_in_generate=True, output_scores=True, output_logits=True)
        assert plug.report().served["contrast"] == 1
        assert not plug.report().fallbacks
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        for row in range(2):
            ids = out.sequences[row, : given["input_ids"].shape[1] + step]
            text = ids[(ids != IMAGE) & (torch.arange(len(ids)) >= (given["attention_mask"][row] == 0).sum())][None]
            alone = forward(stock, {"input_ids": text, "attention_mask": torch.ones_like(text)})[:, -1]
            expected = contrast.contrasted(logits[row : row + 1], alone, 2.5, 0.01)
            torch.testing.assert_close(scores[row : row + 1], expected, atol=2e-5, rtol=1e-4)


def test_contrast_samples_several_answers(branches: list[Any]) -> None:
    model, given = tiny.build("qwen2_5_vl"), inputs("qwen2_5_vl")
    ask = {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    with accelplug.apply(model, rules(CONTRAST)):
        out = generate(model, given, **ask, output_logits=True)
    assert len(branches) == 2
    visual = given["input_ids"] == IMAGE
    for copy in range(2):
        said = out.sequences[copy::2, :-1]
        new = pad(visual, (0, said.shape[1] - visual.shape[1]))
        mask = pad(given["attention_mask"], (0, said.shape[1] - visual.shape[1]), value=1)
        text = contrast.without_pictures({"input_ids": said, "attention_mask": mask}, new)
        alone = forward(tiny.build("qwen2_5_vl"), text)[:, -1]
        expected = contrast.contrasted(out.logits[-1][copy::2], alone, 3.0, 0.1)
        kept = out.scores[-1][copy::2] > -math.inf  # generate has taken the top 50
        assert torch.allclose(out.scores[-1][copy::2][kept], expected[kept], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- BLIP


def blip() -> Any:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = hf.BlipConfig(
        vision_config={**size, "image_size": 32, "patch_size": 8},
        text_config={**size, "vocab_size": 600, "encoder_hidden_size": 16, "bos_token_id": 1, "eos_token_id": 2},
        image_text_hidden_size=16,
    )
    return hf.BlipForImageTextRetrieval(config).eval()


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_grad_cam_leaves_the_matcher_alone(trainable: bool, mode: Any) -> None:
    matcher = blip().requires_grad_(trainable)
    with mode():
        pixels, ids = torch.randn(1, 3, 32, 32), torch.tensor([[1, 7, 8, 9, 2]])
        cam, score = agla.grad_cam(matcher, pixels, ids, 1)
    with torch.no_grad():
        cosine = matcher(input_ids=ids, pixel_values=pixels, use_itm_head=False).itm_score
    assert cam.shape == (4, 4)
    assert bool(cam.isfinite().all())
    assert float(cam.max()) > 0
    assert score == pytest.approx(float(cosine), abs=1e-6)  # not how likely a match is
    assert not cam.requires_grad
    assert all(p.requires_grad == trainable and p.grad is None for p in matcher.parameters())
    assert not any(module._forward_hooks for module in matcher.modules())


def test_agla_with_a_matcher_from_a_folder(tmp_path: Any, processor: Any, branches: list[Any]) -> None:
    blip().save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    model, given = tiny.build("llava"), inputs("llava")
    state = torch.get_rng_state()
    recipe = rules(("agla", {"matcher": "blip", "blip_dir": str(tmp_path), "blip_layer": 1}))
    with accelplug.apply(model, recipe, processor=processor):
        out = generate(model, given)
    assert torch.equal(torch.get_rng_state(), state)
    masked = branches[0]._inputs["pixel_values"]
    assert 0 < float((masked == 0).float().mean()) < 0.5
    assert torch.equal(out, by_hand(model, given, masked, 6))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("patch", [CONTRAST, ("vhr", {})])
def test_a_prompt_that_is_all_picture_is_not_read_without_it(patch: tuple[str, dict]) -> None:
    model, given = tiny.build("llava"), inputs("llava", ((3, "I", 2), ("I",)))
    for name in ("input_ids", "attention_mask"):  # without the marks around it
        given[name] = given[name].masked_fill((torch.arange(2) == 1)[:, None] & (given["input_ids"] != IMAGE), 0)
    with accelplug.apply(model, rules(patch)), pytest.raises(UnsupportedError, match="Add text"):
        generate(model, given)


@pytest.mark.parametrize("patch", [CARVE, AGLA])
def test_several_pictures_in_a_row_are_refused(patch: tuple[str, dict], processor: Any) -> None:
    model = tiny.build("llava")
    with (
        accelplug.apply(model, rules(patch), processor=processor),
        pytest.raises(UnsupportedError, match="row 1 has 2"),
    ):
        generate(model, inputs("llava", tiny.TWO_ROWS))


def test_tiles_are_refused(processor: Any) -> None:
    model = tiny.build("llava_next")
    with accelplug.apply(model, rules(CARVE), processor=processor), pytest.raises(UnsupportedError, match="tiles"):
        generate(model, tiny.inputs("llava_next", AN_IMAGE_EACH))


def test_missing_pixels_and_missing_starts_are_refused(processor: Any) -> None:
    model, given = tiny.build("llava"), inputs("llava")
    with accelplug.apply(model, rules(CARVE), processor=processor):
        with pytest.raises(UnsupportedError, match="pixel_values"):
            generate(model, {k: v for k, v in given.items() if k != "pixel_values"})
        with pytest.raises(UnsupportedError, match="whole prompt"):
            generate(model, given, **tiny.held(hf.DynamicCache()))


def test_carve_asks_for_a_processor(processor: Any) -> None:
    model, given = tiny.build("llava"), inputs("llava")
    with accelplug.apply(model, rules(CARVE)), pytest.raises(AccelplugError, match="processor=processor"):
        generate(model, given)
    blipped = rules(("agla", {"matcher": "blip", "blip_dir": "/nowhere"}))
    with accelplug.apply(model, blipped), pytest.raises(AccelplugError, match="processor=processor"):
        generate(model, given)
    with accelplug.apply(model, blipped, processor=processor), pytest.raises(AccelplugError, match="blip_dir"):
        generate(model, given)


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": "another"}])
@pytest.mark.parametrize("patch", [AGLA, CONTRAST])
def test_what_a_branch_cannot_follow_is_refused(more: dict[str, Any], patch: tuple[str, dict]) -> None:
    model, given = tiny.build("llava"), inputs("llava")
    with accelplug.apply(model, rules(patch)):
        with pytest.raises(UnsupportedError, match="second branch"):
            generate(model, given, **more)
        if "num_beams" in more:
            config = hf.GenerationConfig(num_beams=2, max_new_tokens=2)
            with pytest.raises(UnsupportedError, match="second branch"):
                model.generate(**given, generation_config=config)


@pytest.mark.parametrize(
    "wrong",
    [
        ("agla", {"matcher": "blip"}),
        ("carve", {"layers": (0.5, 0.5)}),
        ("carve", {"layers": (0.5, 2.5)}),
        ("agla", {"layers": (-1, 2)}),
        ("carve", {"keep_area": 0}),
    ],
)
def test_wrong_settings_are_refused(wrong: tuple[str, dict]) -> None:
    with pytest.raises(RecipeError):
        accelplug.apply(tiny.build("llava"), rules(wrong))
