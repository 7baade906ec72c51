"""Questions to a model: how its pictures are opened, its prompts written, and its answers decoded."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from accelplug.chat import Chat, greedy, open_picture, prompt, tokenized, yes_no_margins
from accelplug.comparison.exam import Exam
from accelplug.comparison.questions import Asker, items
from accelplug.comparison.vlm import Examiner
from accelplug.errors import AccelplugError
from accelplug.zoo import path
from tests.test_exam import gemma_3


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    folder = path("llava-scenes")
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


# --- pictures ---

UPRIGHT = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
"""Two rows of four pixels, all different."""
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: UPRIGHT.transpose(1, 0, 2)[::-1],
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
    8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],
}
"""By EXIF orientation, how a camera stores the picture: 6 is a quarter turn clockwise away from upright."""


@pytest.mark.parametrize("orientation", STORED)
def test_pictures_stand_upright_wherever_they_are_opened(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "a.png"
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(file, exif=exif)
    exam = Exam("", {1: file, 2: str(file)}, {}, (), None)
    (item,) = items([{"text": "?", "answer": "yes", "image": str(file)}])
    for opened in (open_picture(file), open_picture(Image.open(file)), exam.picture(1), exam.picture(2), item.shown()):
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), UPRIGHT)
    assert np.array_equal(np.asarray(open_picture(open_picture(file))), UPRIGHT), "turned once"


def test_what_a_processor_or_pil_refuses_is_told() -> None:
    processor = AutoProcessor.from_pretrained(path("llava-scenes"))
    text = prompt(processor, f"what is {processor.image_token} here?", picture=True)
    with pytest.raises(AccelplugError, match="no text that holds its image token"):
        tokenized(processor, [text], [Image.new("RGB", (8, 8))])
    with pytest.raises(AccelplugError, match="got ndarray"):
        open_picture(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("mode", "value", "seen"),
    [
        ("L", 128, (128, 128, 128)),
        ("1", 1, (255, 255, 255)),
        ("LA", (90, 255), (90, 90, 90)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("I", 32768, (127, 127, 127)),
        ("I;16", 257 * 77, (77, 77, 77)),
    ],
)
def test_every_mode_is_seen_as_people_see_it(mode: str, value: int | tuple[int, ...], seen: tuple[int, int, int]) -> None:
    assert open_picture(Image.new(mode, (2, 2), value)).getpixel((0, 0)) == seen


def test_a_palette_is_looked_up() -> None:
    picture = Image.new("RGB", (2, 2), (200, 30, 40)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert open_picture(picture).getpixel((1, 1)) == (200, 30, 40)


def test_what_is_no_picture_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "PNG")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[:900])
    for bad in (tmp_path / "a.jpg", tmp_path / "half.png", tmp_path / "none.png", tmp_path, Image.new("F", (2, 2))):
        with pytest.raises(AccelplugError, match="cannot be read as a picture"):
            open_picture(bad)


# --- prompts ---


def test_a_sequence_begins_once() -> None:
    """A template that writes the first token itself, in front of a tokenizer that would put it there once more."""
    from tokenizers.processors import TemplateProcessing

    _, processor = gemma_3()
    inner = processor.tokenizer.backend_tokenizer
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    plain = processor.chat_template
    picture = Image.new("RGB", (32, 32))
    for template in (plain, "<s>" + plain):
        processor.chat_template = template
        made = tokenized(processor, [prompt(processor, "is there a star ?", picture=True)], [picture])
        assert (made["input_ids"][0] == 1).sum() == 1
        assert made["input_ids"][0, 0] == 1


def test_a_processor_without_a_template_shows_the_picture_too(
    bundled: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = bundled
    monkeypatch.setattr(processor, "chat_template", None)
    text = prompt(processor, "Is there a tree?", picture=True)
    assert text == f"{processor.image_token}\nIs there a tree?"


def test_margins_are_of_whole_words() -> None:
    class Words:
        """As a tokenizer that puts a blank of its own, 9, ahead of a word that begins with one."""

        ids = {"yes": [1], "Yes": [2], "YES": [3, 4], "no": [5], "No": [6], "NO": [7, 8]}  # noqa: RUF012

        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            found = self.ids[text.strip()]
            return type("Found", (), {"input_ids": [9, *found] if text[0] == " " else found})

    logits = torch.tensor([[0.0, 1, 2, 50, 0, 4, 3, 60, 0, 99]])
    assert yes_no_margins(Words(), logits) == [2.0 - 4.0]


# --- decoding ---

DECODING = [
    {"num_beams": 3, "length_penalty": -4.0, "early_stopping": True},
    {"num_beams": 2, "num_return_sequences": 2},
    {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
    {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.5},
    {"forced_eos_token_id": 1, "min_new_tokens": 30, "max_new_tokens": 1},
    {"suppress_tokens": list(range(4, 40)), "begin_suppress_tokens": list(range(4, 60)), "bad_words_ids": [[7], [8]]},
    {"exponential_decay_length_penalty": (1, 9.0), "guidance_scale": 4.0},
    {"return_dict_in_generate": True, "output_scores": True, "use_cache": False, "max_time": 1e-9},
    {"prompt_lookup_num_tokens": 2},
]
"""What a checkpoint's generation config may ask for."""


@pytest.fixture(scope="module")
def plainly(bundled: tuple[Any, Any]) -> tuple[Any, ...]:
    model, processor = bundled
    exam = replace(Exam.scenes(2), max_new_tokens=5)
    asked = items(exam)[:2]
    return (
        exam,
        asked,
        Asker(model, processor, likelihoods=True).ask(asked),
        Examiner(model, processor, exam, 2).describe()[0],
    )


@pytest.mark.parametrize("asks_for", DECODING, ids=lambda asks_for: "+".join(asks_for))
def test_the_checkpoints_decoding_changes_no_answer(
    bundled: tuple[Any, Any], plainly: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, asks_for: dict[str, Any]
) -> None:
    model, processor = bundled
    exam, asked, replies, descriptions = plainly
    own = model.generation_config
    asked_for = type(own)(**{**own.to_dict(), **asks_for})
    monkeypatch.setattr(model, "generation_config", asked_for)
    found = Asker(model, processor, likelihoods=True).ask(asked)
    assert [reply.said for reply in found] == [reply.said for reply in replies]
    assert [reply.nll for reply in found] == pytest.approx([reply.nll for reply in replies], abs=1e-5)
    assert [reply.margin for reply in found] == pytest.approx([reply.margin for reply in replies], abs=1e-5)
    assert Examiner(model, processor, exam, 2).describe()[0] == descriptions
    assert model.generation_config is asked_for


def test_the_generation_config_comes_back_after_an_error(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    own = model.generation_config
    with greedy(model):
        assert model.generation_config is not own
        assert model.generation_config.eos_token_id == own.eos_token_id
    with pytest.raises(TypeError):
        Chat(model, processor).generate({}, tokens=cast(Any, "one"))
    assert model.generation_config is own
