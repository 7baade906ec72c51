"""benchmarks.hallucinating_heads and vlm_patches: what is told of a head is what leaving it out does, and rows are recipes."""

from __future__ import annotations

import torch

from accelplug.comparison.exam import Exam
from accelplug.testing.language_models import forward
from benchmarks.hallucinating_heads import influence, mentions, weighed
from benchmarks.vlm_patches import variants
from tests.tiny_language_models import build, inputs


def test_influence_is_the_derivative_of_what_is_said() -> None:
    model, given = build("llava").double(), inputs("llava")
    given["pixel_values"] = given["pixel_values"].double()
    marks = torch.zeros(2, *given["input_ids"].shape, dtype=torch.bool)
    marks[0, 0, -2], marks[1, 1, -1] = True, True
    found = influence(model, given, (marks[0], marks[1]))

    def said(gain: float) -> list[float]:
        gains = torch.ones(4, 4, dtype=torch.float64)
        gains[2, 1] = gain
        with weighed(model, gains):
            logs = forward(model, given)[:, :-1].log_softmax(-1)
        words = logs.gather(-1, given["input_ids"][:, 1:, None])[..., 0]
        return [float(words[mark[:, 1:]].sum()) for mark in marks]

    more, less = said(1.01), said(0.99)
    for k in (0, 1):
        assert abs(float(found[k][2, 1]) - (more[k] - less[k]) / 0.02) < 1e-5


class _Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_a_mention_is_told_at_the_token_that_its_word_begins_with() -> None:
    exam = Exam.scenes(8, "dev")
    key, *_ = exam.pictures
    there = min(exam.truth[key])
    absent = min(set(exam.vocabulary.classes) - set(exam.truth[key]))
    text = f"a {there} and {absent}"
    found = list(mentions(_Letters(), list(map(ord, text)), exam, key))
    assert found == [(2, True), (len(text) - len(absent), False)]


def test_every_row_of_the_table_is_a_recipe_that_its_file_has() -> None:
    for file, more in (("vlm", set()), ("llava-scenes", {"imbalance"})):
        rows = {row.name for row in variants(file, {"var": "no image token is a sink"}, [[0, 1]])}
        assert rows >= {"adhh", "ilvad", "farsight", *more}
        assert "var" not in rows
