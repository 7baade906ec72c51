"""Language models on long texts: contexts made from a seed, figures that are right and paired, what plans keep, pages, and the search."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

import accelplug
from accelplug import zoo
from accelplug.cli import main
from accelplug.comparison import TextExam
from accelplug.comparison.journal import Journal
from accelplug.comparison.questions import Reply
from accelplug.comparison.texts.exam import TASKS
from accelplug.comparison.texts.reader import ContextReader, Glance, kv_bytes
from accelplug.comparison.texts.scores import TEXT_METRICS, text_figures
from accelplug.errors import AccelplugError
from accelplug.hosts.host import model_facts
from accelplug.recipe import Measured, ModelFacts, load, read_file
from accelplug.registry import list_patches
from accelplug.testing.language_models import TEXT_CONFIG
from accelplug.tuning import contest, verification
from accelplug.tuning.aims import Aim, aims
from accelplug.tuning.budget import parse_budget
from accelplug.tuning.language import tuned
from accelplug.tuning.prefills import GENERIC, both, one_of_each, prefill_ladders, reads_prompts
from accelplug.tuning.texts import TEXT_BUDGET, ReadingContest, of_contexts, told_of
from tests.patch_rows import ROWS

FIRST = 3


class Letters:
    """A tokenizer whose tokens are bytes."""

    pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [byte + FIRST for byte in text.encode()])

    def decode(self, ids: list[int]) -> str:
        return bytes(token - FIRST for token in ids if FIRST <= token < 256 + FIRST).decode(errors="replace")


LETTERS = Letters()
WINDOW = {"min_tokens": 0, "local": 128, "backend": "blocked"}
SMALL = TextExam(tokens=(1600,), depths=(0.2, 0.8), suffix=32)


def llama() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**TEXT_CONFIG, "max_position_embeddings": 4096})
    return hf.LlamaForCausalLM(config).eval().requires_grad_(False)


class Oracle(nn.Module):
    """Says what `answer` gives for the text so far; its cache remembers the text."""

    config = hf.LlamaConfig(**TEXT_CONFIG)
    generation_config = SimpleNamespace(eos_token_id=2)
    device = torch.device("cpu")

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, ids: Any, past_key_values: Any = None, logits_to_keep: int = 0, use_cache: bool = True) -> Any:
        past_key_values.text = getattr(past_key_values, "text", "") + LETTERS.decode(ids[0].tolist())
        logits = torch.zeros(1, 1, 300)
        logits[0, 0, LETTERS(self.answer(past_key_values.text)[:1] or "\n").input_ids[-1]] = 20.0
        return SimpleNamespace(logits=logits)


def knowing(exam: TextExam) -> Callable[[str], str]:
    """What comes next in the answers of an exam, whose questions end with the references that they have."""
    known = [
        (asked.items[0].text, " " + ", ".join(item.answer for item in asked.items))
        for context in exam.contexts(LETTERS)
        for asked in context.asked
        if asked.room
    ]
    recalled = [
        (item.text, item.answer)
        for context in exam.contexts(LETTERS)
        for asked in context.asked
        for item in asked.items
        if item.task == "associative"
    ]

    def answer(text: str) -> str:
        for question, said in (*known, *recalled):
            place = text.rfind(question)
            if place >= 0 and said.startswith(behind := text[place + len(question) :]):
                return said[len(behind) :]
        return ""

    return answer


# ---------------------------------------------------------------------------------------------------------------- contexts


def test_a_seed_makes_the_same_contexts_whatever_else_is_asked() -> None:
    alone = SMALL.contexts(LETTERS)
    among = TextExam(tokens=(2400, 1600), depths=(0.2, 0.8), suffix=32, trials=2).contexts(LETTERS)
    assert alone == SMALL.contexts(LETTERS)
    assert alone == [context for context in among if context.tokens == 1600 and ".0," in context.key]
    assert alone[0].ids != TextExam(tokens=(1600,), depths=(0.2, 0.8), suffix=32, seed=1).contexts(LETTERS)[0].ids


def test_contexts_have_their_length_and_hold_what_is_asked() -> None:
    for context in TextExam(tokens=(1600, 2600), depths=(0.0, 0.5, 1.0)).contexts(LETTERS):
        assert len(context.ids) == context.tokens
        text = LETTERS.decode(list(context.ids))
        for item in context.items:
            if item.task != "suffix":
                assert item.answer.strip() in text
            if item.task == "needle":
                assert text.find(item.answer) / len(text) == pytest.approx(item.depth, abs=0.15)
    assert {item.task for context in SMALL.contexts(LETTERS) for item in context.items} == {*TASKS, "suffix"} - {"nll"}


def test_questions_find_room_below_the_models_bound() -> None:
    for context in SMALL.contexts(LETTERS, longest=1600):
        assert len(context.ids) + max(len(asked.ids) + asked.room for asked in context.asked) <= 1600


def test_a_file_of_text_is_the_haystack_and_what_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"This is sentence {i} of a book. " for i in range(3000)))
    (context,) = TextExam(tokens=(1600,), text=path, tasks=("needle", "nll"), suffix=32).contexts(LETTERS)
    text, suffix = LETTERS.decode(list(context.ids)), LETTERS.decode(list(context.asked[-1].ids))
    assert text.count("of a book. ") > 20
    assert suffix in path.read_text()
    assert all(f"{item.answer}." in text for item in context.items if item.task == "needle")
    path.write_text("short.")
    with pytest.raises(AccelplugError, match=r"book\.txt: .* Give a longer text"):
        TextExam(tokens=(1600,), text=path).contexts(LETTERS)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tokens": (100,)}, "tokens of a prompt"),
        ({"depths": (2,)}, "numbers from 0 to 1"),
        ({"tasks": ("needel",)}, "needle"),
        ({"trials": 0}, "trials"),
    ],
)
def test_what_cannot_be_asked_is_said(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(AccelplugError, match=said):
        TextExam(**asked)


# ----------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("anew", [False, True])
def test_a_model_that_knows_has_full_marks_and_one_that_does_not_has_none(anew: bool) -> None:
    contexts = SMALL.contexts(LETTERS)
    for answer, mark in ((knowing(SMALL), 1.0), (lambda text: "", 0.0)):
        reader = ContextReader(Oracle(answer), LETTERS, contexts, anew)
        items = [item for context in contexts for item in context.items]
        found = text_figures(items, reader.ask(items))
        assert {name: found[name] for name in ("needle", "ruler", "associative")} == dict.fromkeys(
            ("needle", "ruler", "associative"), mark
        )


def test_a_first_look_costs_what_a_plain_forward_does() -> None:
    model = llama()
    context = TextExam((512,), depths=(0.5,), tasks=("needle", "nll"), suffix=32).contexts(LETTERS)[0]
    found = ContextReader(model, LETTERS, [context]).glance(context)
    suffix = next(asked.ids for asked in context.asked if asked.items[0].task == "suffix")
    ids = torch.tensor([*context.ids, *suffix[:16]])
    expected = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, -273:-1], ids[-272:], reduction="none")
    torch.testing.assert_close(torch.tensor(found.costs), expected, rtol=1e-4, atol=1e-4)


def test_what_is_weighed_is_the_models_own_likelihood() -> None:
    model, (context, _) = llama(), SMALL.contexts(LETTERS)
    reading = ContextReader(model, LETTERS, [context]).read(context)
    suffix = context.asked[-1].ids
    logits = model(torch.tensor([[*context.ids, *suffix]])).logits[0, len(context.ids) - 1 : -1]
    expected = nn.functional.cross_entropy(logits, torch.tensor(suffix), reduction="sum")
    weighed = [r for item, r in zip(context.items, reading.replies, strict=True) if item.task == "suffix"]
    assert sum(reply.nll for reply in weighed) == pytest.approx(float(expected), rel=1e-4)
    assert sum(reply.tokens for reply in weighed) == len(suffix)


def test_bytes_of_a_cache_are_those_of_its_storages() -> None:
    model = llama()
    cache, _ = ContextReader(model, LETTERS, []).first(list(range(3, 103)))
    config = model.config
    size = (
        2 * config.num_hidden_layers * config.num_key_value_heads * 100 * (config.hidden_size // config.num_attention_heads)
    )
    assert kv_bytes(cache) == 4 * size
    for layer in cache.layers:
        layer.keys = layer.keys[:, :, :10]  # a view frees nothing
    assert kv_bytes(cache) == 4 * size


@pytest.fixture(scope="module")
def compared() -> Any:
    recipes = {
        "same": {"rules": [{"patch": "dense"}]},
        "stream": {"rules": [{"where": {"layers": "1:"}, "patch": "stream", "with": WINDOW}]},
    }
    model = llama()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = accelplug.compare(model, recipes, SMALL, processor=LETTERS, progress=False)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    return found


def test_stock_against_stock_differs_in_nothing(compared: Any) -> None:
    stock, same = compared["stock"], compared["same"]
    assert [(r.said, r.right, r.tokens) for r in stock.replies] == [(r.said, r.right, r.tokens) for r in same.replies]
    for name in ("needle", "ruler", "associative", "nll"):
        delta = same.figures[name].delta
        assert (delta.value, delta.low, delta.high) == (0.0, 0.0, 0.0)
    assert same.figures["kv 1600"].value == stock.figures["kv 1600"].value


def test_what_a_recipe_reads_and_keeps_is_told_by_layer(compared: Any) -> None:
    layers = compared["stream"].layers[1600]
    assert layers.density[0] == 1.0
    assert layers.kept[0] is None
    assert all(share < 0.5 for share in layers.density[1:])
    assert all(0 < share < 1 for share in layers.kept[1:])
    assert compared["stream"].figures["nll"].delta.value != 0.0


def test_it_is_a_page_a_table_and_json(compared: Any, tmp_path: Path) -> None:
    page = compared.page()
    assert "<script" not in page
    assert page.count('<table class="heat">') == 3
    assert "layer 1: " in page
    assert "attention kept at 1,600" in str(compared)
    data = json.loads(compared.to_json(tmp_path / "texts.json").read_text())
    assert data["rows"][2]["figures"]["nll"]["delta"]["low"] <= data["rows"][2]["figures"]["nll"]["delta"]["high"]
    assert set(data["rows"][0]["needle"]) == {"depth 0.2, 1600", "depth 0.8, 1600"}
    with pytest.raises(AccelplugError, match="there are stock, same, stream"):
        compared["other"]


def test_the_length_is_one_at_which_recipes_are_at_work() -> None:
    recipe = load({"rules": [{"patch": "stream", "with": {"min_tokens": 5000}}]}, model_facts(llama()))
    assert TextExam().at_work([recipe]).tokens == (5000,)
    assert TextExam().at_work([]).tokens == (2048,)
    assert SMALL.at_work([recipe]) is SMALL


# ------------------------------------------------------------------------------------------------------------------ search


class Scripted:
    """Readings as a script says: by recipe, seconds, the share of needles in the search and on the proof, and nats lost at a glance."""

    processor, likelihoods = None, True

    def __init__(self, contexts: list[Any], script: Mapping[str, tuple[float, ...]], held: set[str]) -> None:
        self.contexts, self.script, self.held, self.on = {c.key: c for c in contexts}, script, held, "stock"
        self.model = llama()

    @contextmanager
    def apply(self, model: Any, recipe: dict[str, Any], **_: object) -> Iterator[None]:
        self.on = recipe["rules"][0]["patch"]
        yield
        self.on = "stock"

    def warm(self, ids: Any) -> None:
        """Nothing."""

    def glance(self, context: Any) -> Glance:
        seconds, *_, loss = self.script[self.on]
        return Glance(seconds, [1.0 + loss + 0.1 * loss * (i % 3) for i in range(30)], 0.0)

    def timed(self, page: list[Any]) -> tuple[list[Reply], float]:
        seconds, *shares, _ = self.script[self.on]
        needles = [item for item in page if item.task == "needle"]
        found = needles[: round(shares[page[0].context in self.held] * len(needles))]
        return [Reply("", None, item in found, math.nan, 16.0, 16) for item in page], seconds


def test_the_fastest_that_keeps_the_budget_on_contexts_held_out_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exams = [TextExam((1600,), depths=(0.2, 0.8), tasks=("needle", "nll"), seed=seed, trials=3) for seed in (0, 1)]
    halves = [exam.contexts(LETTERS) for exam in exams]
    script = {
        "stock": (1.0, 1.0, 1.0, 0.0),
        "stream": (0.5, 1.0, 1.0, 0.01),
        "triangle": (0.4, 1.0, 0.5, 0.0),  # not on the proof
        "xattention": (0.2, 0.5, 0.5, 0.0),
        "flashprefill": (1.2, 1.0, 1.0, 0.0),  # slower
        "power": (0.1, 1.0, 1.0, 0.05),  # predicts worse
        "pages": (0.9, 1.0, 1.0, 0.0),
    }
    asker: Any = Scripted([c for half in halves for c in half], script, {c.key for c in halves[1]})
    monkeypatch.setattr(contest, "apply", asker.apply)
    seen, unseen = (of_contexts(half) for half in halves)
    found = ReadingContest(asker, seen, unseen, "speed", parse_budget(TEXT_BUDGET, TEXT_METRICS), 1e9, Journal(None, ""))
    found.candidates = [Aim(name, {"rules": [{"patch": name}]}) for name in script if name != "stock"]
    found.explore()
    found.prove()
    assert found.winner.name == "stream"
    assert {aim.name for aim in found.finalists} == {"stream", "triangle", "pages"}
    looked_at = {point.name: point for point in found.looked_at()}
    assert set(looked_at) == {"flashprefill", "power"}, "nothing was asked of them"
    assert looked_at["power"].worst["nll change"] == pytest.approx(0.055)
    assert [aim.name for aim in found.tried][-1] == "xattention with pages", "the fastest of each stage, together"
    assert found.untouched == 0
    assert found.interval(found.winner) == (1.0, 1.0, 1.0)
    told = told_of(exams[1], halves[1])
    made = tuned(found, 0, "why", (), found.looked_at(), **told)
    assert made.proven is not None
    assert made.proven.name == "stream"
    assert made.measured[0].objective == "speed"
    assert made.measured[0].gain == 2.0
    assert made.measured[0].task["needle"].value == 1.0
    assert read_file(made.to_yaml(tmp_path / "tuned.yaml")).recipes["tuned"].rules[0].name == "stream"
    again = accelplug.verify(llama(), tmp_path / "tuned.yaml", processor=LETTERS)[0]
    assert again.outcome == "drifted", "the model that was really asked is no faster"
    assert "recorded 2.00x" in again.why
    with pytest.raises(AccelplugError, match="Give no text"):
        accelplug.verify(llama(), made, TextExam(text="a book.txt"), processor=LETTERS)
    for lacking, said in (("contexts_sha256", "does not say which contexts"), ("seed", "on other contexts")):
        row = made.measured[0]
        row = row.model_copy(
            update={"seeds": [7]} if lacking == "seed" else {"inputs": {k: v for k, v in row.inputs.items() if k != lacking}}
        )
        with pytest.raises(AccelplugError, match=said):
            accelplug.verify(llama(), replace(made, measured=(row,)), processor=LETTERS)


@pytest.mark.parametrize(
    ("needle", "nll", "speed", "outcome"),
    [
        (0.8, 2.01, 1.5, "confirmed"),
        (0.7, 2.01, 1.5, "drifted"),
        (0.6, 2.01, 1.5, "broken"),
        (0.8, 2.04, 1.5, "drifted"),
        (0.8, 2.20, 1.5, "broken"),
        (0.8, 2.01, 1.1, "drifted"),
    ],
)
def test_a_row_of_long_texts_is_judged_by_what_is_lost(needle: float, nll: float, speed: float, outcome: str) -> None:
    spread, gained = {"p20": 5.0, "p50": 5.0, "p80": 5.0}, {"p20": 1.5, "p50": 1.5, "p80": 1.5}
    row = {"date": "2026-01-01", "device": "here", "versions": {}, "seeds": [0], "dense_ms": spread, "ms": spread}
    task = {"needle": {"dense": 0.8, "value": 0.8}, "nll": {"dense": 2.0, "value": 2.01}}
    read = Measured.model_validate({**row, "objective": "speed", "speedup": gained, "task": task})
    found = {"needle": needle, "nll": nll}
    assert verification.judge_reading(read, {"needle": 0.8, "nll": 2.0}, found, speed, True)[0] == outcome


def test_the_likeliest_come_first_and_each_patch_before_the_second_of_any() -> None:
    facts = ModelFacts(("LlamaForCausalLM",), {"num_hidden_layers": 30, "hidden_size": 576}, llm=True)
    found = one_of_each(aims(facts, 30, None, prefill_ladders(), GENERIC, min_tokens=4096))
    names, patches = [aim.name for aim in found], [frozenset(aim.patches) for aim in found]
    assert names[:2] == ["smollm2-135m/long", "llm/long"]
    assert len(set(patches)) == len(set(patches[: len(set(patches))])), "one of each first"
    assert len(names) == len(set(names))
    joined = both(found[0], next(aim for aim in found if aim.patches == {"pages"}))
    assert load(joined.recipe, facts).rules[-1].name == "pages"
    assert [reads_prompts(aim) for aim in (found[0], joined)] == [True, False]


def test_too_little_time_says_how_much_is_enough() -> None:
    found = accelplug.tune(
        llama(), TextExam((1600,), depths=(0.5,), suffix=16), processor=LETTERS, time_budget_s=0.01, progress=False
    )
    assert any("s are enough" in note for note in found.notes)
    assert found.proven is None


def test_tune_gives_a_recipe_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = llama()
    exam = TextExam(tokens=(1600,), depths=(0.5,), suffix=16)
    found = accelplug.tune(
        model, exam, "needle>=stock", processor=LETTERS, time_budget_s=4, patches=["stream"], progress=False
    )
    assert "stock" in found.why or "stream" in found.why
    assert "speed better than stock, needle>=stock" in str(found.budget)
    assert "<script" not in found.page()
    assert next(point.name for point in found.points) == "stock"
    with pytest.raises(AccelplugError, match="There is no metric"):
        accelplug.tune(model, exam, "psnr>=3", processor=LETTERS, progress=False)


def test_smollm2_finds_a_needle_and_reads_less(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        folder = zoo.path("smollm2-135m")
    except AccelplugError as error:
        pytest.skip(str(error))
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    exam = TextExam(tokens=(768,), depths=(0.5,), tasks=("needle", "nll"), suffix=16)
    recipe = {"rules": [{"where": {"layers": "8:"}, "patch": "prefill_rows", "with": {"min_tokens": 0}}]}
    found = accelplug.compare(model, {"rows": recipe}, exam, processor=tokenizer, progress=True)
    assert found["stock"].figures["needle"].value == found["rows"].figures["needle"].value == 1.0
    assert abs(found["rows"].figures["nll"].delta.value) < 0.2
    assert 0.9 < found["rows"].layers[768].mean_kept < 1
    assert "rows: text of 768 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("patch", [e.name for e in list_patches() if e.family in ("prefill", "decode", "memory")])
def test_a_patch_that_reads_everything_is_worth_what_stock_is(patch: str) -> None:
    """Its kernel runs on copies of a cache, in pieces, token by token: and differs from stock by rounding."""
    row, exam = ROWS[patch], TextExam(tokens=(512,), depths=(0.5,), tasks=("needle", "nll"), suffix=16)
    recipes = {"faint": {"rules": [{"patch": patch, "with": dict(row.faint or row.neutral)}]}}
    recipes["working"] = {"rules": [{"patch": patch, "with": dict(row.working)}]}
    found = accelplug.compare(llama(), recipes, exam, processor=LETTERS, progress=False)
    assert abs(found["faint"].figures["nll"].delta.value) < 1e-4
    assert found["working"].figures["nll"].delta.value != 0.0, "its kernel ran"
    assert not any("no call was answered" in note for note in found["working"].notes)
    entry = next(entry for entry in list_patches() if entry.name == patch)
    step = found["working"].steps_read[512]
    assert (step.mean_density < 1) == (step.mean_kept < 1) == (entry.family == "decode")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny model on disk, with a tokenizer whose tokens are bytes."""
    folder, letters = tmp_path / "model", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {"<end>": 0, **{letter: i for i, letter in enumerate(sorted(letters.alphabet()), FIRST)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = letters, decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    llama().save_pretrained(folder)
    return folder


def test_the_command_line_compares_and_tunes(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, page, found = (tmp_path / name for name in ("stream.yaml", "page.html", "tuned.yaml"))
    recipe.write_text(
        "schema: 1\nmodel: tiny\nmatch: {class: LlamaForCausalLM}\ndefault: stream\nrecipes:\n  stream:\n    summary: a window\n"
        "    rules:\n      - {patch: stream, with: {min_tokens: 0, local: 128, backend: blocked}}\n"
    )
    texts = ["--tokens", "1600"]
    assert main(["compare", str(saved), "--recipe", str(recipe), *texts, "--report", str(page)]) == 0
    assert "first token at 1,600" in capsys.readouterr().out
    assert 'class="heat"' in page.read_text()
    assert main(["tune", str(saved), *texts, "--patch", "stream", "--time", "2", "-o", str(found)]) == 0
    assert "tuned" in read_file(found).recipes
    assert main(["compare", str(saved), "--recipe", str(recipe), *texts, "--coco", str(tmp_path)]) == 2
    assert "expected no other one beside it" in capsys.readouterr().err
