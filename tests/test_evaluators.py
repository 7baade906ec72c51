"""Evaluators of vision-language answers: figures worked out by hand, the known traps, and the published question files."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from accelplug.comparison.evaluators import amber, chair, coco, mme, pope, pope_files, vocabulary
from accelplug.comparison.evaluators.coco import Coco
from accelplug.comparison.evaluators.coco_words import COCO_WORDS
from accelplug.comparison.evaluators.evaluator import Question
from accelplug.comparison.evaluators.mme import TwoAnswers
from accelplug.comparison.evaluators.statistics import Health, collapsed, holm, mcc, mcnemar, paired_bootstrap, wilson
from accelplug.comparison.evaluators.vocabulary import Vocabulary
from accelplug.errors import AccelplugError

SPLITS = ("random", "popular", "adversarial")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""MME's groups of tasks."""
DATA = Path(__file__).parents[2] / "shared" / "data" / "pope"


def real(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not here")
    return DATA / name


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    pytest.importorskip("inflect", reason="plurals are undone by inflect")
    return Vocabulary.coco()


def objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects one after the other, with blanks between them."""
    decoder, at, end = json.JSONDecoder(), 0, len(text.rstrip())
    while at < end:
        entry, at = decoder.raw_decode(text, text.index("{", at))
        yield entry


# --- POPE ---


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes.", True),
        ("yes, there is a dog", True),
        ("**Yes**", True),
        ("__'Yes'__", True),
        ("No", False),
        ("NO", False),
        (" \n no!", False),
        ("No, there is not.", False),
        ("No. Yes, a cat is there.", False),
        ("There is no dog in the image.", False),
        ("There is not a dog.", False),
        ("The answer is yes.", True),
        ("Nope", None),
        ("Nothing is there.", None),
        ("Yesterday", None),
        ("There isn't a dog.", None),
        ("There isn\u2019t, not.", False),
        ("I am unsure, yes/no", None),
        ("There is a dog. Yes.", None),
        ("The answer is yes and no.", None),
        ("A knot of cables.", None),
        ("", None),
        ("...", None),
    ],
)
def test_pope_parses_strictly(answer: str, expected: bool | None) -> None:
    assert pope.read_yes_no(answer) is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("No, there is not.", False),
        ("There is no dog. Yes.", False),
        ("Yes. There is no cat.", True),
        ("There is not, a dog", False),
        ("NO", True),
        ("Nope", True),
        ("no!", True),
        ("There isn't a dog.", True),
        ("a knot", True),
        ("", True),
        ("Ja", True),
    ],
)
def test_pope_parses_as_its_release(answer: str, expected: bool) -> None:
    assert pope.read_yes_no(answer, "official") is expected
    assert pope.read_yes_no(answer, parse="official") is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Yes,", True), ("NO.", False), ("yes it is", True), ("yes\n", True), ("Yes\uff0cthere is", True)]
    + [(answer, None) for answer in ("Oui.", "Nein", "S\u00ed", "\u662f\u3002", "\u3044\u3044\u3048", " ", "Y", "n/a")],
)
def test_answers_in_other_forms_are_read_or_counted_as_neither(answer: str, expected: bool | None) -> None:
    assert pope.read_yes_no(answer) is expected


def test_unknown_parsers_are_refused() -> None:
    with pytest.raises(AccelplugError, match="strict, official, got 'loose'"):
        pope.read_yes_no("yes", cast(Any, "loose"))


def test_pope_articles_go_by_sound() -> None:
    for thing in ("apple", "oven", "umbrella", "elephant", "orange", "hour glass"):
        assert pope.a_or_an(thing) == "an", thing
    for thing in ("dog", "traffic light", "unicycle", "ewe", "one-way sign", "hot dog"):
        assert pope.a_or_an(thing) == "a", thing


SCENES = {
    **{i: ["person", "dog", "apple"] for i in range(4)},
    4: ["person", "dog", "oven", "oven"],
    5: ["cup", "oven", "fork"],
    6: ["cup", "fork"],
}


def test_pope_builds_by_hand() -> None:
    questions = pope.build(SCENES, "popular", images=6)
    assert {question.image for question in questions} == set(range(6))
    of = defaultdict(list)
    for question in questions:
        of[question.image].append((question.thing, question.answer))
    # Counts over the six: person 5, dog 5, apple 4, oven 2, cup 1, fork 1.
    assert of[0] == [("person", True), ("oven", False), ("dog", True), ("cup", False), ("apple", True), ("fork", False)]
    assert of[4] == [("person", True), ("apple", False), ("dog", True), ("cup", False), ("oven", True), ("fork", False)]
    assert of[5] == [("cup", True), ("dog", False), ("oven", True), ("person", False), ("fork", True), ("apple", False)]
    assert "Is there an apple in the image?" in {question.text for question in questions}
    assert not any("imange" in question.text for question in questions)


def test_pope_adversarial_follows_the_thing_just_asked_and_falls_back_to_random() -> None:
    of = defaultdict(list)
    for question in pope.build(SCENES, "adversarial", images=6, seed=3):
        of[question.image].append(question.thing)
    # With oven occur, beside cup and fork that are there, dog and person once each; with cup and fork nothing that is absent.
    assert of[5][3] == "dog"
    assert {of[5][1], of[5][5]} <= {"person", "apple", "dog"}
    # With person occurs oven (once), then with dog nothing more, nor with apple.
    assert of[0][1] == "oven"
    assert {of[0][3], of[0][5]} == {"cup", "fork"}
    assert of[4][1] == "apple"
    draws = {pope.build(SCENES, "adversarial", images=6, seed=seed)[0].image for seed in range(9)}
    assert len(draws) > 1


@pytest.mark.parametrize("split", SPLITS)
def test_pope_structure(split: pope.Split) -> None:
    things = ["person", "dog", "cat", "car", "bus", "cup", "fork", "apple", "oven", "kite", "boat", "bird"]
    scenes = {f"{i}.jpg": [things[(i * k + k * k) % 12] for k in range(1, 2 + i % 6)] for i in range(60)}
    questions = pope.build(scenes, split, images=20, seed=1)
    assert questions == pope.build(scenes, split, images=20, seed=1)
    assert [question.answer for question in questions] == [True, False] * 60
    first = pope.build(scenes, "random", images=20, seed=1)
    assert [q.thing for q in first[::2]] == [q.thing for q in questions[::2]], (
        "a seed samples the same images for all splits"
    )
    for start in range(0, 120, 6):
        group = questions[start : start + 6]
        (image,) = {str(question.image) for question in group}
        distinct = list(dict.fromkeys(scenes[image]))
        assert len(distinct) >= 3
        assert [question.thing for question in group[::2]] == distinct[:3]
        absent = [question.thing for question in group[1::2]]
        assert len(set(absent)) == 3
        assert not set(absent) & set(distinct)
        assert all(question.split == split for question in group)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"split": "hard"}, "hard"),
        ({"images": 7}, "images=6"),
        ({"images": 1, "per_image": 4}, "min_things"),
    ],
)
def test_pope_refuses(change: dict[str, Any], match: str) -> None:
    with pytest.raises(AccelplugError, match=match):
        pope.build(SCENES, **{"split": "random", "images": 6, **change})


def test_pope_says_when_nothing_is_absent() -> None:
    with pytest.raises(AccelplugError, match="has, or was asked for, all"):
        pope.build({1: ["a", "b", "c"]}, "random", images=1)


def test_pope_digest_depends_on_all() -> None:
    question = Question("a.jpg", "Is there a dog in the image?", True, "dog", "random")
    other = Question("a.jpg", "Is there a dog in the imange?", True, "dog", "random")
    assert pope.questions_sha256([question]) == pope.questions_sha256([question])
    assert len({pope.questions_sha256(q) for q in ([question], [other], [question, other], [other, question], [])}) == 5


def test_pope_reads_misspelt_copies_and_refuses_others(tmp_path: Path) -> None:
    path = tmp_path / "coco_pope_adversarial.json"
    line: dict[str, Any] = {"question_id": 1, "image": "a.jpg", "text": "Is there an apple in the imange?", "label": "no"}
    path.write_text(json.dumps(line) + "\n\n")
    assert pope_files.read_pope(path) == [Question("a.jpg", line["text"], False, "apple", "adversarial")]
    for bad in ({**line, "label": "maybe"}, {**line, "text": "What is it?"}, {"image": "a.jpg"}, [1]):
        path.write_text(json.dumps(line) + "\n" + json.dumps(bad))
        with pytest.raises(AccelplugError, match="line 2"):
            pope_files.read_pope(path)
    with pytest.raises(AccelplugError, match="is none"):
        pope_files.read_pope(tmp_path / "absent.json")


def test_yes_no_by_hand() -> None:
    # Truth yes: 3 yes, 1 no, 1 unparsed. Truth no: 1 yes, 3 no, 1 unparsed.
    truth = [True] * 5 + [False] * 5
    answers = [True, True, True, False, None, True, False, False, False, None]
    figures = pope.score(truth, answers)
    assert (figures.n, figures.unparsed) == (10, 2)
    assert figures.accuracy == pytest.approx(6 / 10)
    assert figures.precision == pytest.approx(3 / 4)
    assert figures.recall == pytest.approx(3 / 5)
    assert figures.f1 == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))
    assert figures.yes_ratio == pytest.approx(4 / 8)
    assert figures.hallucination_rate == pytest.approx(1 / 5)
    assert figures.mcc == pytest.approx((3 * 3 - 2 * 2) / 25)


def test_yes_ratio_is_of_predictions() -> None:
    assert pope.score([True, False], [True, True]).yes_ratio == 1


def test_yes_no_is_nan_where_undefined() -> None:
    always_no = pope.score([True, False], [False, False])
    assert math.isnan(always_no.precision)
    assert math.isnan(always_no.mcc)
    assert always_no.recall == always_no.f1 == always_no.hallucination_rate == 0
    assert math.isnan(pope.score([True], [True]).hallucination_rate)
    assert math.isnan(pope.score([True], [None]).yes_ratio)
    assert math.isnan(pope.score([], []).accuracy)
    with pytest.raises(AccelplugError, match="got 1 and 2"):
        pope.score([True], [True, False])


# --- MME ---


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Yes.", True), (" yes", True), ("NO", False), ("None", False), ("A no", False), ("It is yes", None), ("", None)],
)
def test_mme_parses_four_characters(answer: str, expected: bool | None) -> None:
    assert mme.read_start(answer) is expected


def test_mme_by_hand() -> None:
    pairs = [
        TwoAnswers("existence", 1, "Yes", "No"),
        TwoAnswers("existence", 2, "Yes", "Yes"),
        TwoAnswers("existence", 3, "I think so", "No, none"),
        TwoAnswers("existence", 4, "No", "Yes"),
        TwoAnswers("count", 1, "Yes", "No"),
    ]
    result = mme.score(pairs)
    existence = result.tasks["existence"]
    assert (existence.n, existence.unparsed) == (4, 1)
    assert (existence.acc, existence.acc_plus, existence.score) == (50.0, 25.0, 75.0)
    assert result.tasks["count"].score == 200
    assert result.total(["existence", "count"]) == 275
    assert math.isnan(result.total(PERCEPTION))
    assert math.isnan(result.hallucination)
    full = mme.score([TwoAnswers(task, 0, "yes", "no") for task in PERCEPTION + COGNITION])
    assert (full.total(PERCEPTION), full.total(COGNITION), full.hallucination) == (2000, 800, 800)
    assert math.isnan(mme.TaskScore.of([]).score)


# --- CHAIR ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two dogs and a puppy.", ["dog", "dog"]),
        ("He eats a hot dog.", ["hot dog"]),
        ("It is hot, dog days.", ["dog"]),
        ("Teddy bears and a bear", ["teddy bear", "bear"]),
        ("a teddy-bear", ["teddy bear"]),
        ("Wine glasses on the tables", ["wine glass", "dining table"]),
        ("Three men, women and children", ["person", "person", "person"]),
        ("Buses, a bus and mice", ["bus", "bus", "mouse"]),
        ("knives, skis, scissors, sheep", ["knife", "skis", "scissors", "sheep"]),
        ("a baby elephant and a baby", ["elephant", "person"]),
        ("an adult zebra", ["zebra"]),
        ("a baby animal", []),
        ("passenger trains", ["train"]),
        ("a man by the train tracks", ["person"]),
        ("a man in a bow tie", ["person", "tie"]),
        ("the toilet seat", ["toilet"]),
        ("The toilet has its seat up.", ["toilet"]),
        ("a seat", ["chair"]),
        ("the dog's bowl", ["dog", "bowl"]),
        ("the dogs\u2019 bowls and the men's ties", ["dog", "bowl", "person", "tie"]),
        ("It's five o'clock, or six o\u2019clock by the clock", ["clock"]),
        ("a dog-shaped kite", ["kite"]),
        ("a horse-drawn carriage, a bus-stop and a cat\u2011like grin", []),
        ("teddy-bears and a hot-dog", ["teddy bear", "hot dog"]),
        ("a man-made lake with dog/cat food", ["dog", "cat"]),
        ("a stove top oven", ["oven", "oven"]),
        ("They're at the bench; she'd a cup, he isn't a person", ["bench", "cup", "person"]),
        ("A quiet evening.", []),
        ("", []),
    ],
)
def test_mentions(words: Vocabulary, text: str, expected: list[str]) -> None:
    assert words.mentions(text) == expected


def test_the_published_list_has_terms_of_two_words_at_most(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("oven, stovetop, stove, stove top oven\ndining table, table\n")
    read = Vocabulary.read(path)
    assert read.mentions("a stove top oven on the dining table") == ["oven", "oven", "dining table"]


def test_compounds_are_chairs_own() -> None:
    """AMBER's words stand by themselves; in CHAIR a baby elephant is no baby, and a toilet's seat is no chair."""
    pytest.importorskip("inflect", reason="plurals are undone by inflect")
    synonyms = dict.fromkeys(("baby", "elephant", "seat", "toilet", "tie", "bow", "track", "train", "passenger"), ())
    text = "a baby elephant, the seat of a toilet, a bow tie, a train track and a passenger train"
    assert amber.vocabulary(synonyms).mentions(text) == (
        ["baby", "elephant", "seat", "toilet", "bow", "tie", "train", "track", "passenger", "train"]
    )
    assert Vocabulary(synonyms, None, vocabulary.COCO_COMPOUNDS).mentions(text) == [
        "elephant",
        "toilet",
        "tie",
        "track",
        "train",
    ]


def test_vocabulary_without_a_singulariser() -> None:
    shapes = Vocabulary({"circle": ["circles", "red circle"], "square": []}, None)
    assert shapes.singulariser == "none"
    assert shapes.mentions("a red circle, circles and squares") == ["circle", "circle"]
    own = Vocabulary({"square": []}, lambda word: word.rstrip("s"))
    assert own.mentions("Squares!") == ["square"]
    assert own.singulariser == "<lambda>"
    assert Vocabulary({}, None).mentions("nothing at all") == []


def test_vocabulary_is_read(tmp_path: Path, words: Vocabulary) -> None:
    path = tmp_path / "words.txt"
    path.write_text("cat, kitten,\n\ndog , hound\n")
    read = Vocabulary.read(path)
    assert read.classes == ("cat", "dog")
    assert read.singulariser == words.singulariser == "inflect"
    assert read.mentions("hounds and kittens") == ["dog", "cat"]
    path.write_text("cat, pet\ndog, pet\n")
    with pytest.raises(AccelplugError, match="'pet' stands for 'cat' and 'dog'"):
        Vocabulary.read(path)
    path.write_text("cat, pet\ncat, kitten\n")
    with pytest.raises(AccelplugError, match="2 lines of 1"):
        Vocabulary.read(path)
    with pytest.raises(AccelplugError, match="needs no file"):
        Vocabulary.read(tmp_path / "absent.txt")


def test_a_missing_singulariser_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inflect", None)
    vocabulary._engine.cache_clear()
    with pytest.raises(AccelplugError, match="pip install inflect"):
        Vocabulary.coco().mentions("houses")
    vocabulary._engine.cache_clear()


CAPTIONS = {1: "a dog, a dog and a cat", 2: "a cup", 3: "quiet evening sky"}
TRUTH = {1: {"dog", "fork"}, 2: {"cup"}, 3: {"kite"}, 4: {"dog"}}
CLOSED = Vocabulary(dict.fromkeys(("dog", "cat", "cup", "fork", "kite"), ()), None)


def test_chair_by_hand() -> None:
    result = chair.score(CAPTIONS, TRUTH, CLOSED)
    assert result.chair_s == pytest.approx(1 / 3)
    assert result.chair_i == pytest.approx(1 / 4)
    assert result.recall == pytest.approx(2 / 4)
    assert result.precision == pytest.approx(2 / 3)
    assert result.f1 == pytest.approx(4 / 7)
    assert result.mean_words == pytest.approx((7 + 2 + 3) / 3)
    assert (result.n_mentions, result.n_captions, result.singulariser) == (4, 3, "none")
    assert result.rows[0].mentions == ("dog", "dog", "cat")
    assert result.rows[0].hallucinated == ("cat",)
    assert chair.Chair.of(result.rows[1:], "none").chair_s == 0


def test_chair_without_mentions_is_nan() -> None:
    result = chair.score({3: "quiet"}, TRUTH, CLOSED)
    assert math.isnan(result.chair_i)
    assert math.isnan(result.precision)
    assert result.chair_s == result.recall == result.f1 == 0
    assert math.isnan(chair.score({}, {}, CLOSED).chair_s)


def test_chair_refuses_a_truth_that_does_not_fit() -> None:
    with pytest.raises(AccelplugError, match="none for 1, such as 9"):
        chair.score({9: "a dog"}, TRUTH, CLOSED)
    with pytest.raises(AccelplugError, match="unicorn"):
        chair.score({1: "a dog"}, {1: {"unicorn"}}, CLOSED)


def test_chair_rows_make_a_paired_bootstrap() -> None:
    before = chair.score(dict.fromkeys(range(20), "a dog and a cat"), {i: {"dog"} for i in range(20)}, CLOSED)
    after = chair.score(dict.fromkeys(range(20), "a dog"), {i: {"dog"} for i in range(20)}, CLOSED)

    def change(pairs: Sequence[tuple[Any, Any]]) -> float:
        first, second = zip(*pairs, strict=True)
        return chair.Chair.of(second, "none").chair_i - chair.Chair.of(first, "none").chair_i

    assert paired_bootstrap(change, list(zip(before.rows, after.rows, strict=True)), samples=50) == (-0.5, -0.5, -0.5)


# --- AMBER ---


def test_amber_by_hand() -> None:
    nouns = Vocabulary(dict.fromkeys(("person", "man", "sea", "water", "beach", "kite", "boat", "sky", "dog"), ()), None)
    result = amber.score(
        {1: "a man by the water, water and a boat with a kite under the sky", 2: "a dog", 3: "nothing"},
        {1: ["person", "sea", "beach"], 2: ["dog"], 3: ["kite"]},
        nouns,
        likely={1: ["boat", "umbrella"], 2: ["dog"]},
        associations={"person": ["man"], "sea": ["water"]},
        safe=["sky"],
    )
    # Nouns: man, water, water, boat, kite, sky | dog | none. The boat and the kite are hallucinated; a dog that is there is not.
    assert result.chair == pytest.approx(2 / 7)
    assert result.cover == pytest.approx((2 + 1 + 0) / 5)
    assert result.hal == pytest.approx(1 / 3)
    assert result.cog == pytest.approx(1 / 3)
    assert (result.n_nouns, result.n_responses) == (7, 3)
    assert result.rows[0].hallucinated == ("boat", "kite")


def test_amber_credits_words_as_the_release_does() -> None:
    """Grass may be called ground. Where both are there, "ground" is credited to the grass; a thing named twice counts twice."""
    nouns = Vocabulary(dict.fromkeys(("grass", "ground", "ship", "boat", "cloud", "sky"), ()), None)
    associations = {"grass": ["ground"], "ship": ["boat"], "cloud": ["sky"], "sky": []}

    def of(text: str, *there: str, likely: tuple[str, ...] = ()) -> amber.Amber:
        return amber.score({1: text}, {1: there}, nouns, likely={1: likely}, associations=associations)

    assert of("the ground", "ground", "grass").cover == 1 / 2
    assert of("the ground and grass", "ground", "grass").cover == 1 / 2, "both words are the grass"
    assert of("the grass", "ground", "grass").cover == 1 / 2
    assert of("a ship and a boat", "ship", "ship").cover == 1 / 2, "the second ship is never credited"
    assert of("a sky", likely=("sky", "cloud")).cog == 1 / 2, "a sky stands for the cloud"
    assert of("a sky and a cloud", likely=("sky", "cloud")).cog == 1 / 2
    assert amber.score({1: "ground"}, {1: {"grass", "ground"}}, nouns, associations=associations).cover == 1 / 2


def amber_question(truth: bool, split: str) -> Question:
    return Question("AMBER_1.jpg", "?", truth, "", split)


def test_amber_questions_by_hand() -> None:
    asked = [amber_question(truth, split) for truth, split in AMBER]
    said = ["Yes", "No", "No.", "Yes", "no", "No", "Maybe"]
    strict = amber.discriminate(asked, said)
    # Truth no: existence 3, of which no, no, yes; state 1, no. Truth yes: state, said yes; number, said no; relation, unparsed.
    assert strict.all == amber.NoClass(n=7, unparsed=1, accuracy=4 / 7, precision=3 / 4, recall=3 / 4, f1=3 / 4)
    assert strict.dimensions["existence"] == amber.NoClass(3, 0, 2 / 3, 1, 2 / 3, 4 / 5)
    assert strict.dimensions["attribute"] == amber.NoClass(3, 0, 2 / 3, 1 / 2, 1, 2 / 3)
    assert list(strict.dimensions) == ["state", "existence", "number", "relation", "attribute"]
    official = amber.discriminate(asked, said, "official")
    assert official.all == amber.NoClass(n=7, unparsed=3, accuracy=2 / 7, precision=1 / 2, recall=1 / 4, f1=1 / 3)
    assert amber.amber_score(chair=0.078, f1=0.747) == pytest.approx((100 - 7.8 + 74.7) / 2)
    with pytest.raises(AccelplugError, match="got 7 and 1"):
        amber.discriminate(asked, ["Yes"])
    assert math.isnan(amber.discriminate(asked[:1], ["Yes"]).all.f1)


AMBER = [
    (True, "state"),
    (False, "existence"),
    (False, "existence"),
    (False, "existence"),
    (False, "state"),
    (True, "number"),
    (True, "relation"),
]


@pytest.fixture
def benchmark_files(tmp_path: Path) -> Path:
    """AMBER's folder data in its own form: a picture, a description and six questions."""
    kinds = [
        ("generative", ["grass", "person", "ground"]),
        ("discriminative-attribute-state", "yes"),
        ("discriminative-attribute-number", "no"),
        ("discriminative-attribute-action", "yes"),
        ("discriminative-hallucination", "no"),
        ("discriminative-relation", "yes"),
        ("relation", "no"),
    ]
    notes = [{"id": i, "type": kind, "truth": truth} for i, (kind, truth) in enumerate(kinds, 1)]
    notes[0]["hallu"] = ["sky"]
    queries = [
        {"id": i, "image": "AMBER_1.jpg", "query": "Describe this image." if i == 1 else f"Is it {i}?"} for i in range(1, 8)
    ]
    (tmp_path / "query").mkdir()
    (tmp_path / "annotations.json").write_text(json.dumps(notes))
    (tmp_path / "query" / "query_all.json").write_text(json.dumps(queries))
    (tmp_path / "relation.json").write_text(
        json.dumps({"grass": ["ground"], "person": ["man"], "sky": [], "ground": ["floor"]})
    )
    (tmp_path / "safe_words.txt").write_text("orange\nlight")
    return tmp_path


def test_amber_reads_its_files(benchmark_files: Path) -> None:
    held = amber.read_folder(benchmark_files)
    assert held.truth == {"AMBER_1.jpg": ["grass", "person", "ground"]}
    assert held.likely == {"AMBER_1.jpg": ["sky"]}
    assert held.associations["grass"] == ["ground"]
    assert (held.safe, held.describe) == ({"orange", "light"}, "Describe this image.")
    assert [question.answer for question in held.questions] == [True, False, True, False, True, False]
    assert [question.split for question in held.questions] == [
        "state",
        "number",
        "action",
        "existence",
        "relation",
        "relation",
    ]
    assert held.questions[0].text == "Is it 2?"


@pytest.mark.parametrize("file", ["annotations.json", "relation.json", "safe_words.txt", "query/query_all.json"])
@pytest.mark.parametrize("bad", [None, b"\xff", b"[{}]"])
def test_amber_says_which_file_is_wrong(benchmark_files: Path, file: str, bad: bytes | None) -> None:
    path = benchmark_files / file
    path.unlink() if bad is None else path.write_bytes(bad)
    if file == "safe_words.txt" and bad == b"[{}]":
        assert amber.read_folder(benchmark_files).safe == {"[{}]"}, "any text is a list of words"
        return
    with pytest.raises(AccelplugError, match=path.name):
        amber.read_folder(benchmark_files)


def test_amber_is_nan_where_undefined() -> None:
    result = amber.score({1: "quiet"}, {1: []}, CLOSED)
    assert all(math.isnan(value) for value in (result.chair, result.cover, result.cog))
    assert result.hal == 0
    with pytest.raises(AccelplugError, match="none for 1"):
        amber.score({9: "a dog"}, {1: []}, CLOSED)


def test_amber_reads_associations(tmp_path: Path) -> None:
    relation = amber.read_associations(real("amber_relation.json"))
    assert "man" in relation["person"]
    pytest.importorskip("inflect", reason="plurals are undone by inflect")
    nouns = amber.vocabulary(relation)
    assert set(relation) <= set(nouns.classes)
    covered = amber.score({1: "Two men in the street"}, {1: ["person", "road"]}, nouns, associations=relation)
    assert (covered.cover, covered.chair) == (1, 0)
    (tmp_path / "relation.json").write_text("[1]")
    for bad in ("relation.json", "absent.json"):
        with pytest.raises(AccelplugError, match="relation"):
            amber.read_associations(tmp_path / bad)


# --- COCO ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "annotations").mkdir()
    instances = {
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012}.jpg"} for i in (9, 3, 5)],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [{"image_id": i, "category_id": c} for i, c in ((9, 18), (3, 1), (9, 1), (9, 18))],
    }
    (tmp_path / "annotations" / "instances_val2014.json").write_text(json.dumps(instances))
    return tmp_path


def captions(folder: Path, *pairs: tuple[int, str]) -> None:
    rows = [{"image_id": image, "caption": text} for image, text in pairs]
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps({"annotations": rows}))


def test_coco_instances(folder: Path) -> None:
    data = coco.read_annotations(folder)
    assert data.things == {9: ["dog", "person"], 3: ["person"], 5: []}
    assert data.files[9] == "COCO_val2014_000000000009.jpg"
    assert data.source == "instances"
    assert data.truth(CLOSED) == {9: {"dog", "person"}, 3: {"person"}, 5: set()}
    with pytest.raises(AccelplugError, match="got 7"):
        data.truth(CLOSED, [7])


def test_coco_captions_count_only_if_all_images_have_one(folder: Path) -> None:
    captions(folder, (9, "a cup"), (9, "a fork"), (3, "a dog"))
    assert coco.read_annotations(folder).source == "instances"
    assert coco.read_annotations(folder).truth(CLOSED, [9]) == {9: {"dog", "person"}}
    captions(folder, (9, "a cup"), (9, "a fork"), (3, "a dog"), (5, "sky"))
    data = coco.read_annotations(folder, "val2014")
    assert data.source == "instances+captions"
    assert data.truth(CLOSED) == {9: {"dog", "person", "cup", "fork"}, 3: {"person", "dog"}, 5: set()}


def test_coco_says_what_it_looked_for(folder: Path) -> None:
    with pytest.raises(AccelplugError, match=r"instances_val2017\.json, got \['instances_val2014\.json'\]"):
        coco.read_annotations(folder, "val2017")
    with pytest.raises(AccelplugError, match="no such folder"):
        coco.read_annotations(folder / "absent")
    for bad in ("{", "[]", json.dumps({"images": []})):
        (folder / "annotations" / "instances_val2014.json").write_text(bad)
        with pytest.raises(AccelplugError, match="expected COCO's JSON"):
            coco.read_annotations(folder)
    dangling = {"images": [], "categories": [], "annotations": [{"image_id": 1, "category_id": 1}]}
    (folder / "annotations" / "instances_val2014.json").write_text(json.dumps(dangling))
    with pytest.raises(AccelplugError, match="image 1"):
        coco.read_annotations(folder)
    assert Coco({}, {}, {}).source == "instances"


# --- Statistics ---


def test_mcc_by_hand() -> None:
    assert mcc(5, 0, 0, 5) == 1
    assert mcc(0, 5, 5, 0) == -1
    assert mcc(6, 2, 1, 3) == pytest.approx((18 - 2) / math.sqrt(8 * 7 * 5 * 4))
    assert math.isnan(mcc(5, 5, 0, 0))


def test_mcnemar_by_hand() -> None:
    assert mcnemar([True] * 5, [True] * 5) == 1
    assert mcnemar([True] * 6, [False] * 6) == pytest.approx(2 / 64)
    # Eight differ, one against seven: 2 (1 + 8) / 2^8.
    assert mcnemar([True] * 7 + [False, True], [False] * 7 + [True, True]) == pytest.approx(18 / 256)
    assert mcnemar([True, False], [False, True]) == 1
    assert 0 < mcnemar([True] * 1100 + [False] * 900, [False] * 1100 + [True] * 900) < 1e-4
    with pytest.raises(AccelplugError, match="got 1 and 2"):
        mcnemar([True], [True, False])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(AccelplugError, match="got nan"):
        holm([0.1, math.nan])


def test_wilson_by_hand() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(10, 10)[1] == 1
    assert wilson(8, 10, 0.5)[0] > wilson(8, 10)[0]
    assert all(map(math.isnan, wilson(0, 0)))
    with pytest.raises(AccelplugError, match="got 3 of 2"):
        wilson(3, 2)
    with pytest.raises(AccelplugError, match=r"95 % is 0\.95"):
        wilson(1, 2, 95)


def test_bootstrap() -> None:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    value, low, high = paired_bootstrap(mean, [0.0, 1.0] * 50)
    # The mean of 100 such has a standard deviation of 0.05.
    assert value == 0.5
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.02)
    assert paired_bootstrap(mean, [0.0, 1.0] * 50) == (value, low, high)
    uneven = [math.sqrt(i) for i in range(30)]
    assert paired_bootstrap(mean, uneven, 50, seed=1)[1:] != paired_bootstrap(mean, uneven, 50)[1:]
    assert all(map(math.isnan, paired_bootstrap(mean, [])))
    assert all(map(math.isnan, paired_bootstrap(lambda _: math.nan, [1], samples=5)))
    half_defined = paired_bootstrap(lambda items: 1.0 if 1 in items else math.nan, [0, 1], samples=50)
    assert half_defined == (1, 1, 1)
    with pytest.raises(AccelplugError, match="at least one sample"):
        paired_bootstrap(mean, [1.0], samples=0)


def test_health_by_hand() -> None:
    health = Health.of(["a dog and a cat", "A a a a", ""])
    assert health.mean_words == pytest.approx(9 / 3)
    assert health.distinct_1 == pytest.approx((4 / 5 + 1 / 4) / 2)
    assert math.isnan(health.unparsed)
    health = Health.of(["Yes", "no", "maybe"], pope.score([True, False, False], [True, False, None]))
    assert (health.yes_ratio, health.unparsed, health.mean_words) == pytest.approx((1 / 2, 1 / 3, 1))


@pytest.mark.parametrize(
    ("after", "sign"),
    [
        ({}, None),
        ({"yes_ratio": 0.44}, "share of yes moved by -0.060"),
        ({"yes_ratio": 0.56, "mcc": math.nan}, "share of yes moved by +0.060"),
        ({"yes_ratio": 0.56, "mcc": 0.61}, None),
        ({"yes_ratio": 0.54, "mcc": 0.1}, None),
        ({"mean_words": 69}, "69%"),
        ({"mean_words": 71}, None),
        ({"mean_words": 151}, "151%"),
        ({"distinct_1": 0.54}, "distinct-1 fell from 0.70 to 0.54"),
        ({"distinct_1": 0.56}, None),
        ({"unparsed": 0.051}, "5.1% of the answers"),
        ({"unparsed": 0.05}, None),
    ],
)
def test_collapse_is_told(after: dict[str, Any], sign: str | None) -> None:
    before = {"yes_ratio": 0.5, "mcc": 0.6, "mean_words": 100, "distinct_1": 0.7, "unparsed": 0.0}
    signs = collapsed(Health(**before), Health(**{**before, **after}))
    assert len(signs) == (sign is not None)
    assert sign is None or sign in signs[0]


def test_collapse_needs_figures() -> None:
    assert collapsed(Health(), Health()) == []
    assert collapsed(Health(yes_ratio=1.0), Health(yes_ratio=0.5, mcc=0.4)) == [], "it learned to say no"


# --- Published files ---


@pytest.mark.parametrize("split", SPLITS)
def test_published_questions_follow_the_rules(split: str) -> None:
    questions = pope_files.read_pope(real(f"coco_pope_{split}.json"))
    assert len(questions) == 3000
    assert [question.answer for question in questions] == [True, False] * 1500
    assert {question.split for question in questions} == {split}
    assert {question.thing for question in questions} <= set(COCO_WORDS)
    of = defaultdict(list)
    for question in questions:
        of[question.image].append(question.thing)
    assert len(of) == 500
    assert all(len(set(things)) == 6 for things in of.values())
    ours = [f"Is there {pope.a_or_an(q.thing)} {q.thing} in the image?" for q in questions]
    assert sum(q.text != text for q, text in zip(questions, ours, strict=True)) == (split == "random"), (
        "one 'an traffic light'"
    )


def test_published_splits_ask_for_the_same_things() -> None:
    random, popular, adversarial = (pope_files.read_pope(real(f"coco_pope_{split}.json"))[::2] for split in SPLITS)
    keys = [[(q.image, q.thing) for q in split] for split in (random, popular, adversarial)]
    assert keys[0] == keys[1] == keys[2]


def test_published_popular_absents_follow_one_order() -> None:
    absent = [question.thing for question in pope_files.read_pope(real("coco_pope_popular.json"))[1::2]]
    before: Counter[Any] = Counter()
    for first, second, third in zip(absent[::3], absent[1::3], absent[2::3], strict=True):
        before.update([(first, second), (first, third), (second, third)])
    assert not [pair for pair in before if before[pair[::-1]]]


def test_published_answers_score() -> None:
    questions = pope_files.read_pope(real("coco_pope_random.json"))
    truth = [question.answer for question in questions]
    figures = pope.score(truth, [pope.read_yes_no("Yes, there is." if true else "No, there is not.") for true in truth])
    assert (figures.accuracy, figures.f1, figures.mcc, figures.yes_ratio, figures.unparsed) == (1, 1, 1, 0.5, 0)


def test_our_words_beside_the_published_list(words: Vocabulary) -> None:
    published = Vocabulary.read(real("coco_synonyms.txt"))
    assert words.classes == published.classes
    assert len(words.classes) == 80
    texts = [entry["text"] for entry in objects(real("captions_Instruction1_llava.json").read_text())]
    assert len(texts) == 2000
    some = texts[::10]
    assert all(set(words.mentions(caption)) <= set(words.classes) for caption in some)
    same = sum(set(words.mentions(caption)) == set(published.mentions(caption)) for caption in some)
    assert same >= 0.85 * len(some)
    assert set(words.mentions(texts[0])) == {"person", "surfboard"}
