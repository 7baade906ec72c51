"""Published protocols: the exams that they make of a benchmark's folder, what stands beside, and what every figure is counted from."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from accelplug import cli
from accelplug.comparison.evaluators.evaluator import Question, Said
from accelplug.comparison.evaluators.vocabulary import COCO_COMPOUNDS, Vocabulary
from accelplug.comparison.exam import POPE_SPLITS, Exam
from accelplug.comparison.outcome import Outcome
from accelplug.comparison.protocols import PROTOCOLS, protocol
from accelplug.comparison.rows import STOCK_ROW
from accelplug.comparison.said import records
from accelplug.comparison.vlm import VlmComparison, compare_vlm
from accelplug.errors import AccelplugError
from accelplug.zoo import path

WORDS = Vocabulary(
    {"dog": ["puppy", "puppies"], "toilet": ["toilet"], "chair": ["seat"], "train": [], "sink": []}, None, COCO_COMPOUNDS
)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Five pictures with their annotations and captions; a dog in each, in the first a fork that people tell of."""
    (tmp_path / "annotations").mkdir()
    kinds = ["dog", "cup", "fork", "car", "bus", "kite", "bed"]
    things = {1: (0, 1), 2: (0, 1, 2), 3: (0, 1, 3), 4: (0, 1, 4), 5: (0, 5, 6)}
    instances = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in things],
        "categories": [{"id": i, "name": kind} for i, kind in enumerate(kinds)],
        "annotations": [{"image_id": i, "category_id": kind} for i, held in things.items() for kind in held],
    }
    (tmp_path / "annotations" / "instances_val2014.json").write_text(json.dumps(instances))
    captions = [{"image_id": i, "caption": "a dog with a fork" if i == 1 else "a dog"} for i in things]
    (tmp_path / "annotations" / "captions_val2014.json").write_text(json.dumps({"annotations": captions}))
    for i in things:
        Image.new("RGB", (32, 32), (40 * i, 90, 120)).save(tmp_path / f"{i}.png")
    return tmp_path


def published(folder: Path) -> None:
    """Question files of POPE on the pictures of `coco`."""
    (folder / "pope").mkdir()
    for split in POPE_SPLITS:
        asked = [("dog", "yes"), ("car" if split == "random" else "bus", "no")]
        rows = [
            {"image": f"{i}.png", "text": f"Is there a {thing} in the image?", "label": label}
            for i in (1, 2)
            for thing, label in asked
        ]
        (folder / "pope" / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))


def test_chair_describes_and_asks_nothing(coco: Path) -> None:
    exam = protocol("chair").exam(coco, pictures=3, seed=1)
    assert (exam.describe, exam.max_new_tokens, len(exam.pictures)) == ("Please describe this image in detail.", 512, 3)
    assert not exam.prompts
    everything = protocol("chair").exam(coco, pictures=5)
    assert everything.truth[1] == {"dog", "cup", "fork"}
    assert everything.annotated[1] == {"dog", "cup"}
    assert "CHAIR-like" in everything.source
    with pytest.raises(AccelplugError, match="500 pictures were asked for, 5 are annotated"):
        protocol("chair").exam(coco)


def test_chair_takes_the_words_of_a_release(coco: Path) -> None:
    listed = coco / "synonyms.txt"
    listed.write_text("dog, hound\ncup, mug\nfork\ncar\n")
    exam = protocol("chair").exam(coco, pictures=2, words=listed)
    assert exam.vocabulary.mentions("a hound and a mug") == ["dog", "cup"]
    assert "words of synonyms.txt" in exam.source


def test_pope_asks_the_published_questions_and_else_builds_them(coco: Path) -> None:
    built = protocol("pope").exam(coco, pictures=4)
    assert "built after the release's rules" in built.source
    assert built.parse == "official"
    assert len(built.questions) == 3 * 6 * 4
    published(coco)
    exam = protocol("pope").exam(coco)
    assert exam.splits == list(POPE_SPLITS)
    assert [q.thing for q in exam.of("adversarial")] == ["dog", "bus", "dog", "bus"]
    assert not exam.described
    exam.require_pictures()
    assert len(protocol("pope").exam(coco, pictures=1).questions) == 6


def test_mme_reads_both_layouts_of_its_release(tmp_path: Path) -> None:
    for task in ("existence", "count", "position", "color"):
        at = tmp_path / task if task != "color" else tmp_path / task / "questions_answers_YN"
        pictures = tmp_path / task if task != "color" else tmp_path / task / "images"
        at.mkdir(parents=True)
        pictures.mkdir(exist_ok=True)
        (at / "7.txt").write_text("Is it a dog? Please answer yes or no.\tYes\nIs it a cat? Please answer yes or no.\tNo\n")
        Image.new("RGB", (8, 8)).save(pictures / "7.png")
    exam = protocol("mme").exam(tmp_path)
    assert exam.pairs[3] == (
        "color",
        "color/7",
        "Is it a dog? Please answer yes or no.",
        "Is it a cat? Please answer yes or no.",
    )
    exam.require_pictures()
    (tmp_path / "count" / "7.txt").write_text("Is it a dog?\tYes\n")
    with pytest.raises(AccelplugError, match="expected two questions"):
        protocol("mme").exam(tmp_path)
    (tmp_path / "count" / "7.txt").unlink()
    with pytest.raises(AccelplugError, match="expected MME's questions"):
        protocol("mme").exam(tmp_path)


def test_words_are_found_where_they_stand() -> None:
    text = "Two PUPPIES, a toilet seat and a seat by the train track."
    found = [(text.lower()[m.begin : m.end], m.term, m.name) for m in WORDS.found(text)]
    assert found == [
        ("puppies", "puppies", "dog"),
        ("toilet seat", "toilet seat", "toilet"),
        ("seat", "seat", "chair"),
        ("train track", "train track", None),
    ]
    assert WORDS.mentions(text) == ["dog", "toilet", "chair"]
    beside = WORDS.found("a toilet and its seat")
    assert [(m.said, m.name) for m in beside] == [("toilet", "toilet"), ("seat", None)]


def test_every_word_and_answer_is_accounted_for() -> None:
    asked = [
        Question(1, "Is there a dog in the image?", True, "dog", "random"),
        Question(1, "Is there a sink?", False, "sink", "random"),
    ]
    exam = Exam(
        "made up",
        {1: "1.png"},
        {1: frozenset({"dog", "sink"})},
        tuple(asked),
        WORDS,
        pairs=(("count", 1, "One?", "Two?"),),
        annotated={1: {"dog"}},
        protocol="chair",
    )
    said = Said(
        {"random": ["Yes, a dog.", "maybe"]}, {"random": [1.0, -0.5]}, [("yes", "yes")], {1: "A puppy, a sink and a train."}
    )
    told = list(records("M", exam, [Outcome(STOCK_ROW, STOCK_ROW, said)]))
    assert [record["record"] for record in told] == ["exam", "description", "answer", "answer", "pair"]
    assert told[0]["pictures"] == [{"picture": 1, "file": "1.png"}]
    counted = {m["name"]: m["counted"] for m in told[1]["mentions"]}
    assert counted == {"dog": "in the picture: annotated", "sink": "in the picture: people said so", "train": "hallucinated"}
    assert told[1]["missed"] == []
    assert [(r["read"], r["right"]) for r in told[2:4]] == [("yes", True), ("neither", False)]
    assert told[4]["right"] == [True, False]


def test_amber_accounts_for_nouns_as_it_scores_them() -> None:
    associations = {"person": ["man", "woman"], "road": ["street"]}
    nouns = Vocabulary(dict.fromkeys(["man", "street", "person", "road", "woman", "tree", "sky"], ()), None)
    exam = Exam(
        "made up",
        {1: "1.png"},
        {1: ["person"]},
        (),
        nouns,
        likely={1: ["road"]},
        associations=associations,
        safe=frozenset({"sky"}),
    )
    row = Outcome(STOCK_ROW, STOCK_ROW, Said(descriptions={1: "a man in the street, a tree, the sky"}))
    row.score(exam)
    counted = {m["said"]: m["counted"] for m in list(records("M", exam, [row]))[1]["mentions"]}
    assert counted == {
        "man": "in the picture: covers person",
        "street": "hallucinated, and foreseen: road",
        "tree": "hallucinated",
        "sky": "safe: a noun, never hallucinated, and covers nothing",
    }


@pytest.mark.parametrize("name", PROTOCOLS)
def test_citations_fill_their_columns(name: str) -> None:
    found = protocol(name)
    assert found.published
    for row in found.published:
        assert len(row.figures) == len(found.columns)
        assert not all(map(math.isnan, row.figures))
        assert row.source


def test_the_bundled_model_follows_a_protocol(coco: Path, tmp_path: Path) -> None:
    folder = path("llava-scenes")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    published(coco)
    exam = protocol("pope").exam(coco)
    result = compare_vlm(
        model, {"bias": {"patch": "visual_bias", "with": {"image_weight": 4.0}}}, exam, processor, progress=False
    )
    assert not result[STOCK_ROW].said.descriptions
    data = result.to_dict()["protocol"]
    assert set(data["measured"]) == {STOCK_ROW, "bias"}
    assert 0 <= data["measured"]["bias"]["accuracy"] <= 100
    shown = str(result)
    assert "measured here" in shown
    assert "arXiv 2412.13949" in shown
    lines = [json.loads(line) for line in result.to_jsonl(tmp_path / "said.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 2 * 12


def test_descriptions_alone_are_scored(coco: Path) -> None:
    exam = protocol("chair").exam(coco, pictures=5)
    row = Outcome(STOCK_ROW, STOCK_ROW, Said(descriptions=dict.fromkeys(exam.pictures, "A dog and a car.")))
    row.score(exam)
    result = VlmComparison("M", exam, [row], {})
    found = result.to_dict()["protocol"]["measured"][STOCK_ROW]
    assert (found["CHAIR_S"], found["CHAIR_I"], found["words"]) == (80, 40, 5)
    assert "measured here" in result.page()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--protocol", "chair"], "about --coco FOLDER.*got none"),
        (["--protocol", "amber", "--coco", "."], "about --amber FOLDER.*got --coco"),
        (["--mme", "."], "of --protocol mme"),
        (["--protocol", "pope", "--coco", ".", "--words", "a.txt"], "--words is for --protocol chair"),
        (["--protocol", "pope", "--coco", ".", "--seed", "0", "--seed", "1"], "expected one --seed"),
        (["--answers", "a.txt"], "ends in .jsonl"),
        (["--seed", "1"], "--seed is not for a language model"),
    ],
)
def test_the_command_refuses_what_does_not_fit(more: list[str], match: str, capsys: Any) -> None:
    assert cli.main(["compare", "llava-scenes", *more]) == 2
    assert re.search(match, capsys.readouterr().err)
