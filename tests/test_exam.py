"""Examining vision-language models: exams, controls and statistics, on the bundled model and on made-up answers."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import accelplug
from accelplug.comparison.evaluators.pope import Question
from accelplug.comparison.exam import SPLITS, Exam
from accelplug.comparison.vlm import DENSE, Examiner, Outcome, Variant, _judge, compare_vlm, matched_offset
from accelplug.errors import AccelplugError
from accelplug.zoo import path, scenes


@pytest.fixture(scope="module")
def bundled():
    folder = path("llava-scenes")
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_scenes_are_the_same_for_ever():
    scene = scenes.sample(20_000_000)
    assert scene.caption == (
        "The image shows a yellow tree at the bottom and a blue arrow at the bottom left. The yellow tree is right of the blue arrow."
    )
    picture, owner = scenes.render(scene)
    assert picture.shape == (scenes.SIDE, scenes.SIDE, 3)
    assert {0, 1} == set(owner[owner >= 0].tolist())
    assert not set(scenes.SPLITS["dev"]) & set(scenes.SPLITS["test"])


def test_questions_about_scenes_are_true():
    for number in range(50):
        scene = scenes.sample(number)
        assert len(scene.things) >= 2
        for kind in scenes.KINDS:
            assert scenes.existence(scene, kind).answer == (kind in scene.kinds)
        assert [thing.radius for thing in scene.things] == sorted((t.radius for t in scene.things), reverse=True)


def test_themes_make_the_adversarial_split_hard():
    exam = Exam.scenes(60)
    theme = {kind: name for name, kinds in scenes.THEMES.items() for kind in kinds}

    def usual(split: str) -> float:
        absent = [q for q in exam.questions if q.split == split and not q.answer]
        return sum(theme[q.thing] in {theme[kind] for kind in exam.truth[q.image]} for q in absent) / len(absent)

    assert usual("adversarial") > usual("random") + 0.1
    assert len(exam.questions) == 3 * 6 * 60
    assert {q.split for q in exam.questions} == set(SPLITS)
    assert all(not exam.likely[key] & exam.truth[key] for key in exam.pictures)


def test_neutral_changes_no_answer_and_the_model_is_left_as_it_was(bundled, tmp_path):
    model, processor = bundled
    exam = Exam.scenes(6)
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    rows = [
        Variant("neutral", {"patch": "vhr", "with": {"gain": 1.0}}),
        Variant("loud", {"patch": "visual_bias", "with": {"image_weight": 50.0}}),
        Variant("blind", None, "control", lambda picture: Image.new("RGB", picture.size)),
    ]
    result = compare_vlm(model, rows, exam, processor, progress=False)
    assert [row.name for row in result.rows] == [DENSE, "neutral", "loud", "blind"]
    dense, neutral = result[DENSE], result["neutral"]
    assert neutral.replies == dense.replies
    assert neutral.descriptions == dense.descriptions
    assert neutral.hallucination.value == 0
    assert neutral.p == 1
    assert result["loud"].margins != dense.margins
    assert result["blind"].descriptions != dense.descriptions
    assert dense.chair.n_captions == 6
    assert set(dense.mme.tasks) == {"existence", "color", "count", "position"}
    assert dense.mme.tasks["existence"].n == 6
    assert 0 < dense.mme.hallucination <= 800
    assert neutral.mme == dense.mme
    assert result["blind"].mme != dense.mme
    assert {name: [k for k in vars(m) if not k.startswith("_output_capturing")] for name, m in model.named_modules()} == {
        name: [k for k in keys if not k.startswith("_output_capturing")] for name, keys in before.items()
    }
    result.to_json(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["exam"]["questions"] == len(exam.questions)
    assert data["rows"][0]["mme"]["existence"]["n"] == 6
    result.to_html(tmp_path / "a.html")
    assert "neutral" in (tmp_path / "a.html").read_text()
    with pytest.raises(AccelplugError):
        result["nobody"]


def test_compare_asks_for_what_it_needs(bundled):
    model, processor = bundled
    with pytest.raises(AccelplugError, match="processor"):
        accelplug.compare(model, "vhr")
    with pytest.raises(AccelplugError, match="Exam"):
        accelplug.compare(model, "vhr", {"prompt": "a"}, processor=processor)


def exam_of(questions: list[Question]) -> Exam:
    from accelplug.comparison.evaluators.chair import Vocabulary

    return Exam("made up", {}, {}, tuple(questions), Vocabulary({}, None))


def test_a_shifted_threshold_says_yes_as_often():
    asked = [Question(i, "?", i < 2, "x", "adversarial") for i in range(4)]
    dense = Outcome(DENSE, "dense", {"adversarial": ["no"] * 4}, {"adversarial": [-1.0, -3.0, -2.0, -4.0]})
    row = Outcome("a", "recipe", {"adversarial": ["yes", "no", "no", "yes"]}, {"adversarial": [1.0, -1.0, -1.0, 1.0]})
    matched = matched_offset(dense, row, exam_of(asked))
    assert matched.yes_ratio == 0.5
    assert matched.accuracy == 0.5  # the two largest margins are of questions 0 and 2


def test_rows_are_held_against_dense():
    asked = [Question(i, "?", i % 2 == 0, "x", "adversarial") for i in range(20)]
    right = ["yes" if q.answer else "no" for q in asked]
    margins = {"adversarial": [0.0] * 20}
    dense = Outcome(DENSE, "dense", {"adversarial": ["yes"] * 20}, margins)
    better = Outcome("better", "recipe", {"adversarial": right}, margins)
    same = Outcome("same", "recipe", {"adversarial": ["yes"] * 20}, margins)
    control = Outcome("control", "control", {"adversarial": ["no"] * 20}, margins)
    rows, exam = [dense, better, same, control], exam_of(asked)
    examiner = Examiner(None, None, exam, 1)
    for row in rows:
        examiner._score(row)
    _judge(rows, exam)
    assert dense.pope["adversarial"].hallucination_rate == 1
    assert better.hallucination.value == -1
    assert better.p == pytest.approx(2 / 2**10)
    assert better.holm == pytest.approx(2 * better.p)
    assert same.holm == 1
    assert control.holm != control.holm  # controls are not tested
    assert not better.alarms
    assert control.alarms


def test_a_coco_folder_becomes_an_exam(tmp_path):
    names = ("person", "dog", "cat", "car", "chair", "cup")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").mkdir()
    images, annotations = [], []
    for i in range(8):
        images.append({"id": i, "file_name": f"{i}.jpg"})
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / f"{i}.jpg")
        annotations += [{"image_id": i, "category_id": (i + j) % 6, "id": 10 * i + j} for j in range(3)]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(data))
    exam = Exam.coco(tmp_path, pictures=8)
    assert len(exam.pictures) == 8
    assert exam.picture(next(iter(exam.pictures))).size == (8, 8)
    assert len(exam.questions) == 3 * 8 * 6
    assert exam.source == "instances"
