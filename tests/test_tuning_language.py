"""tune() of language models: halving and proof on made-up answers, likelihoods, and whole searches on the bundled model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import accelplug
from accelplug.cli import _parser, main
from accelplug.comparison.exam import Exam
from accelplug.comparison.journal import Journal
from accelplug.comparison.metrics import ANSWER_METRICS, figures
from accelplug.comparison.questions import Asker, Item, Reply, is_right, items, read_questions
from accelplug.errors import AccelplugError
from accelplug.hosts.host import model_facts
from accelplug.recipe import Measured, load, read_file
from accelplug.tuning import aims, contest, language, verification
from accelplug.tuning.aims import Aim
from accelplug.tuning.budget import parse_budget
from accelplug.tuning.contest import STOCK, Contest, rungs
from accelplug.tuning.language import OBJECTIVES, Answered
from accelplug.zoo import path, scenes
from tests.tiny_language_models import build


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    folder = path("llava-scenes")
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def weights(model: Any) -> list[list[str]]:
    return [sorted(k for k in vars(m) if not k.startswith("_output_capturing")) for m in model.modules()]


# ----------------------------------------------------------------------------------------------------------- the contest


@pytest.mark.parametrize(
    ("candidates", "pages", "left"),
    [
        (23, 40, [(23, 5), (12, 10), (6, 20), (4, 40)]),
        (4, 9, [(4, 9)]),
        (1, 3, [(1, 3)]),
        (23, 2, [(23, 1), (12, 2)]),
    ],
)
def test_half_of_the_candidates_go_on_to_twice_the_pages(candidates: int, pages: int, left: list[tuple[int, int]]) -> None:
    assert rungs(candidates, pages) == left


class Scripted:
    """Answers as a script says: by recipe, the share of questions that it gets right; some only on pictures of the search."""

    says, likelihoods, processor = True, False, None

    def __init__(self, script: dict[str, tuple[float, float, float]], seen: Iterable[int] = ()) -> None:
        self.script, self.seen, self.on = script, set(seen), "stock"
        self.model = SimpleNamespace(device=torch.device("cpu"))
        self.clock = 0.0

    @contextmanager
    def apply(self, model: Any, recipe: dict[str, Any], **_: object) -> Iterator[None]:
        if recipe["rules"][0]["patch"] == "refused":
            raise AccelplugError("not here")
        self.on = recipe["rules"][0]["patch"]
        yield
        self.on = "stock"

    def ask(self, asked: list[Item]) -> list[Reply]:
        share, elsewhere, seconds = self.script[self.on]
        self.clock += seconds
        replies = []
        for item in asked:
            luck = np.random.default_rng(int(item.text)).random()  # the same question is hard for all
            right = luck < (share if item.group in self.seen else elsewhere)
            said = item.answer if right else {"yes": "no", "no": "yes"}[item.answer]
            replies.append(Reply(said, said == "yes", right, 0.0, math.nan, 0))
        return replies


def held(
    script: dict[str, tuple[float, float, float]], monkeypatch: pytest.MonkeyPatch, budget: str = "", seconds: float = 1e9
) -> Contest:
    asked = [Item(i // 4, str(i), "yes" if i % 2 else "no", "a.png") for i in range(640)]
    seen, unseen = language.split(asked, 0)
    asker: Any = Scripted({"stock": (0.7, 0.7, 1.0), **script}, [item.group for item in seen])
    monkeypatch.setattr(contest, "apply", asker.apply)
    monkeypatch.setattr(contest.time, "perf_counter", lambda: asker.clock)
    monkeypatch.setattr(contest.time, "monotonic", lambda: asker.clock)
    found = Contest(
        asker, seen, unseen, "accuracy", parse_budget(budget, ANSWER_METRICS) if budget else (), seconds, Journal(None, "")
    )
    found.candidates = [Aim(name, {"rules": [{"patch": name}]}) for name in [*script, "refused"]]
    found.explore()
    found.prove()
    return found


def test_the_fastest_of_those_that_do_equally_well_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    script = {"slow": (0.92, 0.92, 3.0), "fast": (0.91, 0.91, 1.5), "bad": (0.5, 0.5, 1.0), "same": (0.7, 0.7, 1.0)}
    found = held(script, monkeypatch)
    assert found.winner.name == "fast"
    assert {aim.name for aim in found.finalists} == {"slow", "fast"}
    assert max(found.holm.values()) < 0.001
    assert found.refused == {"refused": "not here"}
    assert not {item.group for item in found.seen} & {item.group for item in found.held}
    assert held(script, monkeypatch, "speed>=0.9").winner is None, "neither is fast enough"
    value, low, high = found.interval(found.winner)
    assert value == found.standing(found.winner, found.proof).gain
    assert 0.1 < low < value < high < 0.35
    found.objective = "mcc"
    assert found.interval(found.winner)[0] == found.standing(found.winner, found.proof).gain


def test_luck_in_the_search_is_overturned_on_pictures_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = held({"lucky": (0.9, 0.71, 1.0)}, monkeypatch)
    assert [aim.name for aim in found.finalists] == ["lucky"]
    assert found.winner is None
    assert found.holm["lucky"] > 0.05


def test_few_questions_are_put_to_most(monkeypatch: pytest.MonkeyPatch) -> None:
    found = held({f"c{i}": (0.5 + 0.02 * i, 0.5 + 0.02 * i, 1.0) for i in range(16)}, monkeypatch)
    pages = {name: len([page for page in sheets if page < found.first_held]) for name, sheets in found.sheets.items()}
    assert sorted(pages.values()) == [1] * 7 + [2] * 4 + [5] + [10] * 5
    assert pages["c15"] == pages["stock"] == 10
    assert found.winner.name == "c15"
    timed = held({f"c{i}": (0.5 + 0.02 * i, 0.5 + 0.02 * i, 1.0) for i in range(16)}, monkeypatch, seconds=100.0)
    assert timed.spent_s < 105
    pages = {name: len([page for page in sheets if page < timed.first_held]) for name, sheets in timed.sheets.items()}
    assert pages["c0"] == 1 < pages["stock"] < 10, "rungs share the time"
    hurried = held({f"c{i}": (0.9, 0.9, 1.0) for i in range(16)}, monkeypatch, seconds=10.0)
    assert 2 <= len(hurried.tried) < 8, "as many as there is time for"


# -------------------------------------------------------------------------------------------------------------- questions


def tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}, "<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


def test_likelihoods_are_those_of_a_plain_forward() -> None:
    model, words = build("llama"), tokenizer(["what", "is", "a", "dog", "it", "barks", "at", "cats"])
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.eos_token_id = [2, words("it").input_ids[0]]  # what begins an answer may end another
    asked = items([{"text": "what is a dog", "answer": "it barks"}, {"text": "what", "answer": "cats"}])
    replies = Asker(model, words, says=True, likelihoods=True).ask(asked)
    for item, reply in zip(asked, replies, strict=True):
        prompt, answer = words(item.text).input_ids, words(item.answer).input_ids
        with torch.no_grad():
            logs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        want = -sum(float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        assert reply.nll == pytest.approx(want, abs=1e-4)
        assert reply.tokens == len(answer)
    assert figures(asked, replies)["nll"] == pytest.approx(sum(r.nll for r in replies) / 3)


def test_a_tokenizer_that_pads_on_the_right_makes_no_difference(
    bundled: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = bundled
    monkeypatch.setattr(processor.tokenizer, "padding_side", "right")
    picture = Image.new("RGB", (96, 96), (200, 30, 30))
    asked = items(
        [{"text": text, "answer": "yes", "image": picture} for text in ("Is there a tree in the image?", "Is there?")]
    )
    asker = Asker(model, processor, likelihoods=True)
    for reply, alone in zip(asker.ask(asked), [asker.ask([item])[0] for item in asked], strict=True):
        assert reply.nll == pytest.approx(alone.nll, abs=1e-4)
        assert reply.said == alone.said


def test_answers_are_read_as_meant() -> None:
    assert is_right(Item(0, "?", "Yes."), "yes, there is")
    assert not is_right(Item(0, "?", "no"), "yes")
    assert is_right(Item(0, "?", "a red square"), "A red square, at the top")
    assert not is_right(Item(0, "?", "no entry"), "no")
    assert [is_right(Item(0, "?", "+"), said) for said in ("+", "minus", "")] == [True, False, False], (
        "no words to begin with"
    )
    assert [is_right(Item(0, "?", "-5"), said) for said in ("-5 degrees", "\u22125", "5")] == [True, True, False]
    assert [item.answer for item in items([{"text": "?", "answer": x} for x in (True, False, 2)])] == ["yes", "no", "2"]


def test_a_question_that_is_asked_twice_counts_once() -> None:
    asked = items(Exam.scenes(6))
    assert len(asked) == len({(item.group, item.text) for item in asked}) < len(Exam.scenes(6).questions)
    twice = [{"text": "?", "answer": "yes"}, {"text": "?", "answer": "yes"}, {"text": "?", "answer": "no"}]
    assert [item.answer for item in items(twice)] == ["yes", "no"]


def test_the_command_line_knows_every_objective() -> None:
    for objective in OBJECTIVES:
        assert _parser().parse_args(["tune", "folder", "--objective", objective, "-o", "mine.yaml"]).objective == objective


def test_text_alone_has_nothing_to_gain() -> None:
    found = accelplug.tune(
        build("llama"),
        [{"text": "what is a dog", "answer": "it barks"}, {"text": "what", "answer": "cats"}],
        processor=tokenizer(["what", "is", "a", "dog", "it", "barks", "at", "cats"]),
        progress=False,
    )
    assert "these questions show none" in found.why
    assert found.points[0].worst["nll"] > 0
    assert [rule.patch for rule in found.rules] == ["dense"]


def test_unusable_requests_say_what_to_do(bundled: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = bundled
    picture = Image.new("RGB", (96, 96))
    plain = [{"text": "What?", "answer": "a tree", "image": picture}, {"text": "What?", "answer": "a cup", "image": "b.png"}]
    for says, arguments in {
        "pass processor=": {"inputs": plain},
        "one of accuracy, mcc, nll": {"inputs": plain, "processor": processor, "objective": "speed"},
        "mcc: expected questions of yes and no": {"inputs": plain, "processor": processor, "objective": "mcc"},
        "There is no metric 'psnr'": {"inputs": plain, "processor": processor, "budget": "psnr>=3"},
        "got a mixture": {"inputs": [*plain, {"text": "?", "answer": "a"}], "processor": processor},
        "two pictures": {"inputs": plain[:1], "processor": processor},
        "keys text": {"inputs": [{"text": "?"}], "processor": processor},
        "an Exam or a list": {"inputs": "a.jsonl", "processor": processor},
        "no settings to try for 'sol'": {"inputs": plain, "processor": processor, "patches": ["sol"]},
    }.items():
        with pytest.raises(AccelplugError, match=says):
            accelplug.tune(model, **arguments, progress=False)
    assert [str(bound) for bound in parse_budget("nll<= stock - .5, accuracy>=0.8", ANSWER_METRICS)] == [
        "nll<=stock-0.5",
        "accuracy>=0.8",
    ]
    with pytest.raises(AccelplugError, match="JSON lines"):
        read_questions(tmp_path / "none.jsonl")


# --------------------------------------------------------------------------------------------------------- whole searches


@pytest.fixture(scope="module")
def described(bundled: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Questions whose references are what a loud patch says: under that patch they are likelier than stock."""
    model, processor = bundled
    drawn = [Image.fromarray(scenes.render(scenes.sample(number))[0]) for number in scenes.SPLITS["dev"][:16]]
    asked = [{"text": "Please describe this image in detail.", "answer": "a" * 8, "image": picture} for picture in drawn]
    with accelplug.apply(model, LOUD, gate="off"):
        said = [
            reply.said for reply in Asker(model, processor).ask(items([{**q, "answer": "the image shows a"} for q in asked]))
        ]
    return [{**question, "answer": answer} for question, answer in zip(asked, said, strict=True)]


LOUD = {"patch": "visual_bias", "with": {"image_weight": 50.0}}


def test_a_patch_that_helps_is_proven_written_and_verified(
    bundled: tuple[Any, Any], described: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = bundled
    monkeypatch.setattr(aims, "AIM_LADDERS", {"visual_bias": [((0.0, 1.0), LOUD["with"])]})
    before = weights(model)
    found = accelplug.tune(
        model, described, "nll<=stock-0.001", processor=processor, seeds=[3], resume=tmp_path / "journal", progress=False
    )
    assert isinstance(found, Answered)
    assert found.objective == "nll"
    assert found.proven.name == "visual_bias image_weight=50, layers 0:8"
    assert found.proven.runs == 8, "half of the pictures are held out"
    assert found.proven.holm < 0.05
    assert found.proven.gain[0] > 0
    assert weights(model) == before
    file = read_file(found.to_yaml(tmp_path / "mine.yaml"))
    row = file.recipe().measured[0]
    assert row.task["nll"].value < row.task["nll"].dense
    assert load(tmp_path / "mine.yaml", model_facts(model)).rules == found.rules
    (verdict,) = accelplug.verify(model, tmp_path / "mine.yaml", described, processor=processor)
    assert f"gain +{found.proven.gain[0]:.3f}" in verdict.why
    assert verdict.outcome != "broken"
    with pytest.raises(AccelplugError, match="other questions"):
        accelplug.verify(model, tmp_path / "mine.yaml", described[:10], processor=processor)
    monkeypatch.setattr(model.config, "_name_or_path", "elsewhere")
    monkeypatch.setattr(Asker, "ask", lambda *_: pytest.fail("asked again"))
    again = accelplug.tune(
        model, described, "nll<=stock-0.001", processor=processor, seeds=[3], resume=tmp_path / "journal", progress=False
    )
    assert again.why == found.why


def test_no_patch_helps_the_bundled_model_on_a_few_scenes(
    bundled: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = bundled
    monkeypatch.setattr(aims, "AIM_LADDERS", {"pai": [((0.0, 0.5), {"alpha": 0.5})]})
    found = accelplug.tune(model, Exam.scenes(4), "speed>=0.01", processor=processor, patches=["pai"], progress=False)
    assert found.proven is None
    assert found.why.startswith("Stay stock")
    assert {point.verdict for point in found.points} <= {"stock", "tried", "overturned"}
    assert json.loads(found.to_json(tmp_path / "a.json").read_text())["points"][0]["name"] == STOCK.name
    assert "pai" in found.to_html(tmp_path / "a.html").read_text()
    assert "Stay stock" in str(found)


def test_what_only_is_written_otherwise_is_tried_once() -> None:
    def gift(layers: str, saliency: int | str, enhance: list[int] | list[str]) -> Aim:
        settings = {"saliency_layer": saliency, "enhance": enhance}
        return Aim(layers, {"rules": [{"where": {"layers": layers}, "patch": "gift", "with": settings}]})

    two = [gift("34%:72%", "34%", ["38%", "72%"]), gift("11:23", 11, [12, 23])]
    assert [aim.name for aim in aims._distinct(two, 32)] == ["34%:72%"]
    assert [aim.name for aim in aims._distinct(two, 40)] == ["34%:72%", "11:23"]


def test_an_interrupt_keeps_what_is_known(
    bundled: tuple[Any, Any], described: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = bundled
    monkeypatch.setattr(
        aims, "AIM_LADDERS", {"visual_bias": [((0.0, 1.0), LOUD["with"])], "pai": [((0.0, 1.0), {"alpha": 0.2})]}
    )
    real = Contest._answer

    def interrupted(self: Contest, aim: Aim, page: Any) -> None:
        if aim.name.startswith("pai"):
            raise KeyboardInterrupt
        real(self, aim, page)

    monkeypatch.setattr(Contest, "_answer", interrupted)
    monkeypatch.setattr(aims, "matching_files", lambda _: [])
    found = accelplug.tune(model, described, processor=processor, progress=False)
    assert found.proven.name.startswith("visual_bias")
    assert len(found.points) == 2


@pytest.mark.parametrize(
    ("dense", "value", "speed", "outcome"),
    [(0.8, 0.84, 1.0, "confirmed"), (0.8, 0.815, 1.0, "drifted"), (0.8, 0.84, 0.5, "drifted"), (0.8, 0.79, 1.0, "broken")],
)
def test_a_row_is_judged_by_what_is_still_gained(dense: float, value: float, speed: float, outcome: str) -> None:
    spread = {"p20": 5.0, "p50": 5.0, "p80": 5.0}
    row = {"date": "2026-01-01", "device": "here", "versions": {}, "seeds": [0], "dense_ms": spread, "ms": spread}
    row |= {"objective": "accuracy", "task": {"accuracy": {"dense": 0.8, "value": 0.84}}}
    found = verification.judge_task(Measured.model_validate(row), {"accuracy": dense}, {"accuracy": value}, speed, True)
    assert found[0] == outcome


def test_the_command_line_takes_questions(
    bundled: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for i in range(4):
        scene = scenes.sample(scenes.SPLITS["dev"][i])
        Image.fromarray(scenes.render(scene)[0]).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"text": scenes.existence(scene, "star").text, "answer": "yes", "image": f"{i}.png"}))
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    made = ["--questions", str(tmp_path / "q.jsonl"), "--patch", "visual_bias", "--budget", "accuracy>=0.5"]
    out = tmp_path / "mine.yaml"
    assert main(["tune", str(path("llava-scenes")), *made, "-o", str(out), "--report", str(tmp_path / "r.json")]) == 0
    assert "wrote" in capsys.readouterr().out
    assert read_file(out).recipe().rules[0].patch == "dense"
    assert main(["verify", str(out), str(path("llava-scenes")), *made[:2]]) == 2, "nothing was measured"
