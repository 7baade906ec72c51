"""Examining vision-language models: exams, controls and statistics, on the bundled model and on made-up answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import accelplug
from accelplug.comparison.evaluators.evaluator import Question, Said
from accelplug.comparison.exam import POPE_SPLITS, Exam
from accelplug.comparison.outcome import Outcome, hold_against_stock
from accelplug.comparison.rows import STOCK_ROW, Variant
from accelplug.comparison.vlm import compare_vlm
from accelplug.errors import AccelplugError
from accelplug.zoo import path, scenes


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    folder = path("llava-scenes")
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_scenes_are_the_same_for_ever() -> None:
    scene = scenes.sample(20_000_000)
    assert scene.caption == (
        "The image shows a yellow tree at the bottom and a blue arrow at the bottom left. The yellow tree is right of the blue arrow."
    )
    picture, owner = scenes.render(scene)
    assert picture.shape == (scenes.SIDE, scenes.SIDE, 3)
    assert {0, 1} == set(owner[owner >= 0].tolist())
    assert not set(scenes.SPLITS["dev"]) & set(scenes.SPLITS["test"])


def test_questions_about_scenes_are_true() -> None:
    for number in range(50):
        scene = scenes.sample(number)
        assert len(scene.things) >= 2
        for kind in scenes.KINDS:
            assert scenes.existence(scene, kind).answer == (kind in scene.kinds)
        assert [thing.radius for thing in scene.things] == sorted((t.radius for t in scene.things), reverse=True)


def test_themes_make_the_adversarial_split_hard() -> None:
    exam = Exam.scenes(60)
    theme = {kind: name for name, kinds in scenes.THEMES.items() for kind in kinds}

    def usual(split: str) -> float:
        absent = [q for q in exam.questions if q.split == split and not q.answer]
        return sum(theme[q.thing] in {theme[kind] for kind in exam.truth[q.image]} for q in absent) / len(absent)

    assert usual("adversarial") > usual("random") + 0.1
    assert len(exam.questions) == 3 * 6 * 60
    assert {q.split for q in exam.questions} == set(POPE_SPLITS)
    assert all(not set(exam.likely[key]) & set(exam.truth[key]) for key in exam.pictures)


def test_neutral_changes_no_answer_and_the_model_is_left_as_it_was(bundled: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = bundled
    exam = Exam.scenes(6)
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    rows = [
        Variant("neutral", {"patch": "vhr", "with": {"gain": 1.0}}),
        Variant("loud", {"patch": "visual_bias", "with": {"image_weight": 50.0}}),
        Variant("blind", None, "control", lambda picture: Image.new("RGB", picture.size)),
    ]
    result = compare_vlm(model, rows, exam, processor, progress=False)
    assert [row.name for row in result.rows] == [STOCK_ROW, "neutral", "loud", "blind"]
    dense, neutral = result[STOCK_ROW], result["neutral"]
    assert neutral.said.replies == dense.said.replies
    assert neutral.said.descriptions == dense.said.descriptions
    assert neutral.figures["pope"].hallucination.value == 0
    assert neutral.p["questions"] == 1
    assert result["loud"].said.margins != dense.said.margins
    assert result["blind"].said.descriptions != dense.said.descriptions
    assert dense.figures["chair"].n_captions == 6
    assert set(dense.figures["mme"].tasks) == {"existence", "color", "count", "position"}
    assert dense.figures["mme"].tasks["existence"].n == 6
    assert 0 < dense.figures["mme"].hallucination <= 800
    assert neutral.figures["mme"] == dense.figures["mme"]
    assert result["blind"].figures["mme"] != dense.figures["mme"]
    assert {name: [k for k in vars(m) if not k.startswith("_output_capturing")] for name, m in model.named_modules()} == {
        name: [k for k in keys if not k.startswith("_output_capturing")] for name, keys in before.items()
    }
    result.to_json(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["exam"]["questions"] == len(exam.questions)
    existence = data["rows"][0]["mme"]["existence"]
    assert (existence["n"], existence["score"]) == (6, existence["acc"] + existence["acc_plus"])
    result.to_html(tmp_path / "a.html")
    assert "neutral" in (tmp_path / "a.html").read_text()
    with pytest.raises(AccelplugError):
        result["nobody"]


def test_compare_asks_for_what_it_needs(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    with pytest.raises(AccelplugError, match="processor"):
        accelplug.compare(model, "vhr")
    with pytest.raises(AccelplugError, match="Exam"):
        accelplug.compare(model, "vhr", {"prompt": "a"}, processor=processor)


def exam_of(questions: list[Question]) -> Exam:
    from accelplug.comparison.evaluators.vocabulary import Vocabulary

    return Exam("made up", {}, {}, tuple(questions), Vocabulary({}, None))


def test_a_shifted_threshold_says_yes_as_often() -> None:
    asked = [Question(i, "?", i < 2, "x", "adversarial") for i in range(4)]
    dense = Outcome(STOCK_ROW, STOCK_ROW, Said({"adversarial": ["no"] * 4}, {"adversarial": [-1.0, -3.0, -2.0, -4.0]}))
    row = Outcome("a", "recipe", Said({"adversarial": ["yes", "no", "no", "yes"]}, {"adversarial": [1.0, -1.0, -1.0, 1.0]}))
    for one in (dense, row):
        one.score(exam_of(asked))
    hold_against_stock([dense, row], exam_of(asked))
    matched = row.figures["pope"].matched
    assert matched is not None
    assert matched.yes_ratio == 0.5
    assert matched.accuracy == 0.5  # the two largest margins are of questions 0 and 2


def test_rows_are_held_against_dense() -> None:
    asked = [Question(i, "?", i % 2 == 0, "x", "adversarial") for i in range(20)]
    right = ["yes" if q.answer else "no" for q in asked]
    margins = {"adversarial": [0.0] * 20}
    dense = Outcome(STOCK_ROW, STOCK_ROW, Said({"adversarial": ["yes"] * 20}, margins))
    better = Outcome("better", "recipe", Said({"adversarial": right}, margins))
    same = Outcome("same", "recipe", Said({"adversarial": ["yes"] * 20}, margins))
    control = Outcome("control", "control", Said({"adversarial": ["no"] * 20}, margins))
    rows, exam = [dense, better, same, control], exam_of(asked)
    for row in rows:
        row.score(exam)
    hold_against_stock(rows, exam)
    assert dense.figures["pope"].splits["adversarial"].hallucination_rate == 1
    assert better.figures["pope"].hallucination.value == -1
    assert better.p["questions"] == pytest.approx(2 / 2**10)
    assert better.holm["questions"] == pytest.approx(2 * better.p["questions"])
    assert same.holm["questions"] == 1
    assert not control.holm  # controls are not tested
    assert not better.alarms
    assert control.alarms


def judged(replies: list[Any], asked: list[Any], **more: Any) -> list[Outcome]:
    """Rows of made-up replies to questions, the first one dense."""
    rows = [Outcome(STOCK_ROW if i == 0 else f"row {i}", "recipe", Said(said, {})) for i, said in enumerate(replies)]
    exam = replace(exam_of(asked), **more)
    for row in rows:
        row.score(exam)
    hold_against_stock(rows, exam)
    return rows


def test_the_stock_model_is_alarming_too() -> None:
    asked = [Question(i, "?", i % 2 == 0, "x", "adversarial") for i in range(20)]
    right = ["yes" if question.answer else "no" for question in asked]
    dense, better = judged([{"adversarial": ["Oui.", "", *right[2:]]}, {"adversarial": right}], asked)
    assert dense.alarms == ["10.0% of the answers are neither yes nor no."]
    assert not better.alarms


def test_a_question_that_several_splits_ask_counts_once() -> None:
    """Splits share the questions whose answer is yes; five answers that differ are five, not fifteen."""
    asked = [Question(i, "?", True, "x", split) for split in POPE_SPLITS for i in range(5)]
    wrong, right = ({split: [word] * 5 for split in POPE_SPLITS} for word in ("no", "yes"))
    _, row = judged([wrong, right], asked)
    assert row.p["questions"] == 2 / 2**5


def test_answers_are_read_as_the_exam_says() -> None:
    asked = [Question(0, "?", True, "x", "adversarial"), Question(1, "?", False, "x", "adversarial")]
    said = {"adversarial": ["There is a dog.", "NO"]}
    (strict,), (official,) = judged([said], asked), judged([said], asked, parse="official")
    before, after = (row.figures["pope"].splits["adversarial"] for row in (strict, official))
    assert (before.accuracy, before.unparsed) == (0.5, 1)
    assert (after.accuracy, after.unparsed) == (0.5, 0)
    assert (strict.figures["pope"].hallucination, after.hallucination_rate) == (None, 1.0)
    assert (strict.figures["pope"].interval[0], official.figures["pope"].interval[1]) == (0.0, 1.0)


def test_ambers_files_become_an_exam(bundled: tuple[Any, Any], tmp_path: Path) -> None:
    """Two pictures, a question of each dimension about either, its words and its score, stock and with a recipe."""
    data, dimensions = tmp_path / "data", ("state", "number", "action")
    (data / "query").mkdir(parents=True)
    (tmp_path / "image").mkdir()
    notes, queries = [], []
    kinds = [*(f"discriminative-attribute-{name}" for name in dimensions), "discriminative-hallucination", "relation"]
    for number in (1, 2):
        Image.fromarray(scenes.render(scenes.sample(number))[0]).save(tmp_path / "image" / f"AMBER_{number}.jpg")
        notes.append({"id": number, "type": "generative", "truth": ["star", "tree"], "hallu": ["boat"]})
        queries.append({"id": number, "image": f"AMBER_{number}.jpg", "query": "Please describe this image in detail."})
    for i, kind in enumerate(kinds * 2):
        notes.append({"id": 3 + i, "type": kind, "truth": "no" if i % 2 else "yes"})
        image = f"AMBER_{1 + i // 5}.jpg"
        queries.append({"id": 3 + i, "image": image, "query": f"Is there a {scenes.KINDS[i]} in the image?"})
    (data / "annotations.json").write_text(json.dumps(notes))
    (data / "query" / "query_all.json").write_text(json.dumps(queries))
    (data / "relation.json").write_text(json.dumps({kind: [] for kind in [*scenes.KINDS, "boat"]}))
    (data / "safe_words.txt").write_text("light")
    exam = replace(Exam.amber(tmp_path), max_new_tokens=12)
    assert exam.splits == [*dimensions, "existence", "relation"]
    assert len(exam.questions) == 10
    model, processor = bundled
    result = compare_vlm(model, {"vhr": {"patch": "vhr", "with": {"gain": 1.0}}}, exam, processor, progress=False)
    for row in result.rows:
        shares = row.figures["amber"].shares
        assert set(shares) == {"chair", "cover", "hal", "cog", "accuracy", "precision", "recall", "f1", "score"}
        assert shares["score"] == pytest.approx(50 * (1 - shares["chair"] + shares["f1"]), nan_ok=True)
        assert row.figures["amber"].dimensions["attribute"].n == 6
    assert result["vhr"].p["questions"] == 1.0
    assert [replace(exam, parse="official").read(said) for said in ("Yes", "No", "yes", "No.")] == [True, False, None, None]
    assert "AMBER" in [column.header for table in result.tables() for column in table.columns]
    result.to_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["amber_dimensions"]["existence"]["n"] == 2
    assert len(Exam.amber(tmp_path, 1).pictures) == 1
    with pytest.raises(AccelplugError, match="there are 2"):
        Exam.amber(tmp_path, 3)


def test_amber_scores_generated_scenes() -> None:
    """All answers right, all things named, and in one description a thing that is not there and that one would expect."""
    exam = Exam.scenes(4)
    right = {split: ["yes" if question.answer else "no" for question in exam.of(split)] for split in exam.splits}
    described = {key: " ".join(things) for key, things in exam.truth.items()}
    first = next(iter(described))
    described[first] += f" {min(exam.likely[first])}"
    margins = {split: [0.0] * len(said) for split, said in right.items()}
    row = Outcome(STOCK_ROW, STOCK_ROW, Said(right, margins, [("yes", "no")] * len(exam.pairs), described))
    row.score(exam)
    found, named = row.figures["amber"], 1 + sum(map(len, exam.truth.values()))
    likely = sum(map(len, exam.likely.values()))
    assert found.shares == {
        **dict.fromkeys(("accuracy", "precision", "recall", "f1", "cover"), 1.0),
        "chair": 1 / named,
        "hal": 1 / 4,
        "cog": 1 / likely,
        "score": pytest.approx(100 - 50 / named),
    }
    assert set(found.dimensions) == {"existence", "state", "number", "relation", "attribute"}
    assert found.dimensions["existence"].n == len({(question.image, question.text) for question in exam.questions})
    assert [cells["AMBER"] for cells in row.cells().values() if "AMBER" in cells] == [f"{found.shares['score']:.1f}"]


def test_a_coco_folder_becomes_an_exam(tmp_path: Path) -> None:
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


DATA = Path(__file__).parents[1].parent / "shared" / "data" / "images"
PHOTOGRAPHS = {
    785: ("coco_val2017_000000000785.jpg", ("person", "skis")),
    1: ("astronaut.png", ("person", "tie", "chair")),
    2: ("coffee.png", ("cup", "spoon", "dining table")),
    3: ("rocket.jpg", ("airplane", "truck", "person")),
}
"""What the test writes down for each; two things are too few to be asked for."""
IDS = {
    "person": 1,
    "airplane": 5,
    "truck": 8,
    "tie": 32,
    "skis": 35,
    "cup": 47,
    "spoon": 50,
    "chair": 62,
    "dining table": 67,
}


@pytest.mark.skipif(not DATA.is_dir(), reason="no photographs beside the project (shared/data/images)")
def test_photographs_in_a_coco_folder_are_examined_whole(bundled: tuple[Any, Any], tmp_path: Path) -> None:
    """Annotations in COCO's own form, with everything that its files carry, and pictures of many sizes."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    images, annotations, captions = [], [], []
    for number, (file, things) in PHOTOGRAPHS.items():
        name = f"{number:012d}.jpg"
        picture = Image.open(DATA / file).convert("RGB")
        picture.save(tmp_path / "val2017" / name)
        images.append(
            {
                "license": 4,
                "file_name": name,
                "coco_url": f"http://images.cocodataset.org/val2017/{name}",
                "height": picture.height,
                "width": picture.width,
                "date_captured": "2013-11-19 21:22:42",
                "id": number,
            }
        )
        for i, thing in enumerate((*things, things[0])):  # an instance more of the first, as a crowd
            box = [10.0, 20.0, 30.5, 40.25]
            crowd = int(i == len(things))
            outline = (
                {"counts": [272, 2, 4], "size": [picture.height, picture.width]} if crowd else [[10.0, 20.0, 40.5, 60.25]]
            )
            annotations.append(
                {
                    "segmentation": outline,
                    "area": 702.1,
                    "iscrowd": crowd,
                    "image_id": number,
                    "bbox": box,
                    "category_id": IDS[thing],
                    "id": 1000 * number + i,
                }
            )
        captions += [
            {"image_id": number, "id": 10 * number + i, "caption": f"A photo with a {things[0]} and two {things[1]}s."}
            for i in range(5)
        ]
    head = {"info": {"year": 2017}, "licenses": [{"id": 4, "name": "Attribution License"}], "images": images}
    categories = [{"supercategory": "thing", "id": number, "name": name} for name, number in IDS.items()]
    instances = {**head, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(instances))
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps({**head, "annotations": captions}))
    with pytest.raises(AccelplugError, match="there are 3"):
        Exam.coco(tmp_path, pictures=4)
    exam = Exam.coco(tmp_path, pictures=3)
    assert set(exam.pictures) == {1, 2, 3}
    assert exam.source == "instances+captions"
    assert {q.thing for q in exam.questions if q.answer and q.image == 2} == {"cup", "spoon", "dining table"}
    assert exam.picture(1).size == Image.open(DATA / "astronaut.png").size
    model, processor = bundled
    result = compare_vlm(model, {"vhr": {"patch": "vhr"}}, exam, processor, progress=False)
    for row in result.rows:
        assert row.figures["pope"].splits["adversarial"].n == 18
        assert row.figures["mme"].tasks["existence"].n == 3
        assert row.figures["chair"].n_captions == 3
        assert {"chair", "cover", "hal", "cog", "score"} <= set(row.figures["amber"].shares)


def gemma_3() -> tuple[Any, Any]:
    """A tiny Gemma 3 with its own processor, around words of one's own: its image text is not LLaVA's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import Gemma3ImageProcessorPil, Gemma3Processor, PreTrainedTokenizerFast

    from tests.tiny_language_models import build

    special = ("<pad>", "<s>", "</s>", "<unk>", "<img>", "<boi>", "<eoi>")
    places = dict(zip(special, (0, 1, 2, 3, 500, 502, 503), strict=True))
    words = ("is", "there", "a", "an", "in", "the", "image", "yes", "no", "user", "model", "star", "tree", "?", ".", ":")
    vocabulary = {**{f"w{i}": i for i in range(4, 512) if i not in places.values()}, **places}
    for i, word in enumerate(words, 10):
        del vocabulary[f"w{i}"]
        vocabulary[word] = i
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=names,
    )
    template = (
        "{% for m in messages %}{{ m.role + ' : ' }}{% for p in m.content %}"
        "{{ '<boi>' if p.type == 'image' else ' ' + p.text }}{% endfor %}{% endfor %}{{ ' model : ' if add_generation_prompt else '' }}"
    )
    pictures = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return build("gemma3"), Gemma3Processor(pictures, tokenizer, chat_template=template, image_seq_length=4)


def test_another_familys_processor() -> None:
    model, processor = gemma_3()
    exam = Exam.scenes(4)
    result = compare_vlm(
        model, {"loud": {"patch": "visual_bias", "with": {"image_weight": 50.0}}}, exam, processor, progress=False
    )
    assert result[STOCK_ROW].said.margins != result["loud"].said.margins
    assert all(len(row.said.descriptions) == 4 for row in result.rows)
    assert not result["loud"].notes
