"""Strangers' files and slips of the hand: everything works or raises AccelplugError, soon, before the first run.

Mutated recipes, tables and journals come from a generator with a fixed seed. The suite runs a share of them;
``STRANGERS=1000 python -m pytest tests/test_strangers.py`` runs more, ``STRANGERS_SEED=7`` others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Never, cast

import pytest
import torch
import yaml
from diffusers import WanPipeline
from PIL import Image
from pydantic import TypeAdapter
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import accelplug
from accelplug import chat, files, zoo
from accelplug.cli import main
from accelplug.comparison import questions
from accelplug.comparison.journal import Journal
from accelplug.comparison.outcome import Outcome
from accelplug.comparison.vlm import VlmComparison
from accelplug.errors import AccelplugError
from accelplug.patches.sparse.radial import Radial
from accelplug.recipe import ModelFacts, describe, load, model_name, read_file, shipped_files
from accelplug.registry import patch_class, patch_entry
from accelplug.step_caches import CACHES
from accelplug.table import Origin
from accelplug.tuning.contest import Sheet
from accelplug.tuning.prediction import Probe
from accelplug.tuning.probing import with_weights
from accelplug.tuning.space import Arm
from tests import tiny_models
from tests.patch_rows import ROWS

NUMBER = int(os.environ.get("STRANGERS", "150"))
SEED = int(os.environ.get("STRANGERS_SEED", "0"))
SOON_S = 2.0
"""Seconds of this process's time in which a file must be read or refused."""

NASTY = [
    *(None, True, False, 0, 1, -1, 2, 7, 10**9, -(10**9), 2**31, 2**63, 10**30, 10**5000),
    *(0.5, -0.5, 1e-30, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 1.5),
    *(
        "",
        " ",
        "x",
        "1",
        "0:25%",
        ":",
        "::",
        "-",
        "5:3",
        "0:101%",
        "-9:",
        "9" * 5000,
        ">=\t8",
        ">= 8\n",
        "٣",
        ">=٣",
        "*x*x*",
        "0x0x0",
    ),
    *("on", "no", "1:30", "2001-01-01", "~", "auto", "full", "dense", "kmeans", "token", "condd", "\0", "\ud800", "é" * 300),
    *("(a+)+$", "[", "*" * 500, "a" * 300_000, "../x", "/etc/passwd", "!!python/object:os.system", "{{7*7}}"),
    *([], {}, [[]], [None], [1, 2, 3], [0.5, 2.0, 1.0], ["a", 1], [1] * 5000, ["0:5"] * 3000, {"a": {"b": {"c": 1}}}),
    *(
        {"from": 0, "to": 3, "over": "steps"},
        {"from": 0.0, "to": 1.0, "over": "layers"},
        {"from": 1e308, "to": -1e308, "over": "steps"},
    ),
    *(
        {"from": 1, "to": 2, "over": "hours"},
        {"table": {"file": "t.safetensors", "sha256": "0" * 64, "key": "x"}},
        {"table": 3},
    ),
]
RAMP = {"from": 0, "to": 3, "over": "steps"}
WORDS = [
    "schema",
    "rules",
    "where",
    "patch",
    "with",
    "cache",
    "kind",
    "steps",
    "layers",
    "tokens",
    "grid",
    "branch",
    "module",
    "match",
    "heads",
]


def nasty(rng: random.Random) -> Any:
    value = rng.choice(NASTY)
    if rng.random() < 0.02:
        for _ in range(rng.choice([40, 3000])):
            value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def places(data: Any, depth: int = 8) -> Iterator[tuple[Any, Any]]:
    """Every container of a recipe with one of its keys."""
    keys = data.keys() if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys if depth else ():
        yield data, key
        yield from places(data[key], depth - 1)


def mutated(rng: random.Random, data: Any) -> Any:
    """A recipe's data with one to three slips."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.randint(1, 3)):
        found = list(places(data))
        if not found:
            return data
        container, key = rng.choice(found)
        slip = rng.choice(["replace", "replace", "replace", "delete", "rename", "add", "wrap", "repeat"])
        if slip == "replace":
            container[key] = nasty(rng)
        elif slip == "delete":
            del container[key]
        elif slip == "wrap":
            container[key] = rng.choice([[container[key]], {"x": container[key]}])
        elif slip == "repeat":
            container[key] = [container[key]] * rng.choice([2, 300, 40_000])
        elif isinstance(container, dict):
            name = rng.choice([*WORDS, "x" * 400, "1", str(key)[:-1]])
            container[name] = container.pop(key) if slip == "rename" else nasty(rng)
        else:
            container.append(nasty(rng))
    return data


def rule_of(rng: random.Random) -> dict[str, Any]:
    """A rule with a patch's own settings, one or two of them nasty, and perhaps a cache."""
    entry = patch_entry(rng.choice(list(ROWS)))
    settings = dict(ROWS[entry.name].working)
    fields = list(patch_class(entry.name).Config.model_fields)
    settings |= {"block": 8, "backend": "reference"} if "block" in fields else {}
    for key in rng.sample(fields, min(len(fields), rng.randint(0, 2))):
        settings[key] = nasty(rng)
    where = {key: nasty(rng) for key in WORDS[7:13] if rng.random() < 0.1}
    recipe: dict[str, Any] = {"rules": [{"where": where, "patch": entry.name, "with": settings}]}
    if rng.random() < 0.2:
        kind = rng.choice(list(CACHES))
        recipe["cache"] = {
            "kind": kind,
            "with": {key: nasty(rng) for key in CACHES[kind].settings.model_fields if rng.random() < 0.5},
        }
    return recipe


def bytes_of(rng: random.Random, text: str) -> bytes:
    """A file's bytes with a few of them wrong."""
    raw = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        raw[at:at] = rng.choice(
            [
                b"\0",
                b"\xff",
                b"\xef\xbb\xbf",
                b"\t",
                b"*a ",
                b"&a ",
                b"!!x ",
                b"[" * 2000,
                b"{",
                b"}",
                b": ",
                b"- ",
                b"\r",
                b"'",
                b"#",
            ]
        )
        if rng.random() < 0.3:
            del raw[at : at + rng.randrange(1, 200)]
        if rng.random() < 0.1:
            raw = raw * rng.choice([2, 50])
    return bytes(raw)


def facts_of(data: Any) -> ModelFacts:
    """A model that the file is for, as far as the file says one."""
    match = data.get("match") if isinstance(data, dict) else None
    match = {key: value for key, value in match.items() if isinstance(key, str)} if isinstance(match, dict) else {}
    name = match.pop("class", None)
    return ModelFacts((name if isinstance(name, str) else "WanTransformer3DModel",), match)


@pytest.fixture(scope="module")
def wan() -> tuple[Any, dict[str, Any]]:
    return tiny_models.build("wan")


@pytest.fixture(scope="module")
def shipped() -> list[tuple[str, Any]]:
    return [(path.read_text(), yaml.safe_load(path.read_text())) for path in shipped_files().values()]


def soon(do: Callable[[], Any]) -> Any:
    """Do it; AccelplugError is an answer, another error is none, nor is a long wait."""
    start, said = time.process_time(), None
    try:
        return do()
    except AccelplugError as error:
        said = str(error)
        return None
    finally:
        assert time.process_time() - start < SOON_S
        assert said is None or 0 < len(said.strip()) < 20_000


@pytest.mark.parametrize("number", range(NUMBER))
def test_a_strangers_recipe_works_or_is_refused(
    number: int, wan: tuple[Any, dict[str, Any]], shipped: list[tuple[str, Any]], tmp_path: Path
) -> None:
    rng = random.Random(f"{SEED} {number}")
    text, data = rng.choice(shipped)
    form = number % 4
    if form == 0:
        (tmp_path / "r.yaml").write_bytes(bytes_of(rng, text))
        soon(lambda: load(tmp_path / "r.yaml", facts_of(data)))
        soon(lambda: describe(tmp_path / "r.yaml"))
    elif form == 1:
        data = mutated(rng, data)
        try:
            written = yaml.safe_dump(data, allow_unicode=rng.random() < 0.5)
        except (RecursionError, ValueError):  # too deep for the writer, or too many digits
            written = "a: " + "[" * 3000
        (tmp_path / "r.yml").write_text(written, encoding="utf-8", errors="replace")
        soon(lambda: load(tmp_path / "r.yml", facts_of(data)))
    elif form == 2:
        data = mutated(rng, data)
        soon(lambda: load(data, facts_of(data)))
    else:
        recipe = rule_of(rng)
        model, inputs = wan
        with soon(lambda: accelplug.apply(model, recipe, gate="off")) or _Nothing() as plug, torch.no_grad():
            if plug is not None:
                soon(lambda: model(**inputs))
                assert str(plug.report())
        assert not any(
            "accelplug" in type(hook).__module__ for part in model.modules() for hook in part._forward_pre_hooks.values()
        )


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


# ---------------------------------------------------------------------------------------------------------------- tables

TABLED = dict.fromkeys(("radial", "sol"), "rest_weight") | {"sta": "choice", "paro": "order", "sparse_vdit": "modes"}


def table_file(folder: Path, values: torch.Tensor, key: str = "x", header: dict[str, str] | None = None) -> dict[str, Any]:
    raw = save({key: values}, Origin(axes={key: ("layers", "heads")}).to_header() if header is None else header)
    (folder / "t.safetensors").write_bytes(raw)
    return {"table": {"file": str(folder / "t.safetensors"), "sha256": hashlib.sha256(raw).hexdigest(), "key": key}}


@pytest.mark.parametrize("patch", TABLED)
@pytest.mark.parametrize("bad", [float("nan"), -50.0, 1e30, float("inf"), -1, 99])
def test_entries_of_tables_have_the_range_of_the_value_they_replace(
    patch: str, bad: float, wan: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    values = torch.zeros(3, 2)
    values[2, 1] = bad
    if patch in ("sta", "paro", "sparse_vdit"):
        values = values.nan_to_num(nan=-7).clamp(-1000, 1000).to(torch.int64)
    setting = {TABLED[patch]: table_file(tmp_path, values)}
    recipe = {"patch": patch, "with": {"block": 8, "backend": "reference", "rest": "pool", **setting}}
    with pytest.raises(AccelplugError, match=rf"with\.{TABLED[patch]}.*table 'x'.*\[2, 1\]|choice 99|choice 1000"):
        accelplug.apply(wan[0], recipe, gate="off")


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(3, 2, 2),
        torch.zeros(3, 0),
        torch.zeros(3, 2, dtype=torch.bool),
        torch.zeros(3, 2, dtype=torch.complex64),
        torch.zeros(2),
        torch.zeros(4, 2),
        torch.zeros(3, 2).to(torch.float8_e4m3fn),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype}",
)
def test_tables_have_the_axes_and_types_that_they_say(
    values: torch.Tensor, wan: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    rest = {"rest": "pool", "rest_weight": table_file(tmp_path, values)}
    with pytest.raises(AccelplugError):
        accelplug.apply(wan[0], {"patch": "radial", "with": {"block": 8, **rest}}, gate="off")


@pytest.mark.parametrize("patch", TABLED)
@pytest.mark.parametrize("axes", [("layers", "heads"), ("heads",)])
@pytest.mark.parametrize("heads", [1, 3])
def test_tables_for_other_heads_are_refused_at_apply(
    patch: str, axes: tuple[str, ...], heads: int, wan: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    values = torch.zeros([3, heads][-len(axes) :], dtype=torch.uint8)
    header = Origin(axes={"x": axes}).to_header()
    setting = {TABLED[patch]: table_file(tmp_path, values, header=header)}
    with pytest.raises(AccelplugError, match=f"{heads} heads, blocks.0.attn1 has 2"):
        accelplug.apply(wan[0], {"patch": patch, "with": {"block": 8, "rest": "pool", **setting}}, gate="off")


HEADERS = [
    *(
        "[]",
        "3",
        "nonsense",
        '{"axes": 3}',
        '{"axes": {"x": "layers"}}',
        '{"axes": {"x": ["heads", "layers"]}}',
        '{"axes": {"x": [1]}}',
    ),
    *(
        '{"grid_thw": [1, 2]}',
        '{"grid_thw": "abc"}',
        '{"grid_thw": [1e999, 2, 3]}',
        '{"steps": "x"}',
        '{"model": [1]}',
        '{"notes": 7}',
    ),
    *(
        '{"unknown": 1}',
        "[" * 100_000,
        '{"steps": ' + "9" * 5000 + "}",
        '{"axes": {"x": ["layers", "heads", "heads"]}}',
        '{"patch": null}',
    ),
]


@pytest.mark.parametrize("header", HEADERS, ids=lambda text: text[:30])
def test_headers_of_tables(header: str, wan: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    setting = table_file(tmp_path, torch.ones(3, 2), header={"accelplug": header})
    recipe = {"patch": "radial", "with": {"block": 8, "rest": "pool", "rest_weight": setting}}
    with pytest.raises(AccelplugError):
        accelplug.apply(wan[0], recipe, gate="off")


@pytest.mark.parametrize("number", range(NUMBER // 5))
def test_a_strangers_table_works_or_is_refused(number: int, wan: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} table {number}")
    values = torch.full(rng.choice([(3, 2), (2, 3), (3,), (3, 2, 1), (1, 3, 2)]), rng.choice([0.5, 1.0, 0.0, 2.0]))
    setting = table_file(tmp_path, values.to(rng.choice([torch.float32, torch.float16, torch.int32, torch.uint8])))
    path = tmp_path / "t.safetensors"
    if rng.random() < 0.7:
        raw = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        raw = raw[: rng.randrange(len(raw))] if rng.random() < 0.2 else raw
        path.write_bytes(raw)
        setting["table"]["sha256"] = hashlib.sha256(raw).hexdigest()
    model, inputs = wan
    recipe = {"patch": "radial", "with": {"block": 8, "backend": "reference", "rest": "pool", "rest_weight": setting}}
    with soon(lambda: accelplug.apply(model, recipe, gate="off")) or _Nothing() as plug, torch.no_grad():
        if plug is not None:
            soon(lambda: model(**inputs))


# -------------------------------------------------------------------------------------------------------------- journals


@pytest.mark.parametrize("number", range(NUMBER // 5))
def test_a_strangers_journal_works_or_is_refused(number: int, tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} journal {number}")
    path = tmp_path / "j.jsonl"
    journal = Journal(path, "f")
    for key in "abc":
        journal.get(key, lambda: [1.0, {"x": 2}])
    path.write_bytes(bytes_of(rng, path.read_text()))
    again = soon(lambda: Journal(path, "f"))
    if again is not None:
        assert again.get("d", lambda: 7) == 7
        assert Journal(path, "f").entries["d"] == 7


def test_journals_in_wrong_places(tmp_path: Path) -> None:
    places: tuple[Any, ...] = (tmp_path, tmp_path / "missing" / "j", "", "\0", 3)
    for bad in places:
        with pytest.raises(AccelplugError):
            Journal(bad, "f")
    (tmp_path / "j").write_text(json.dumps({"fingerprint": "other"}) + "\n")
    with pytest.raises(AccelplugError, match="another model"):
        Journal(tmp_path / "j", "f")


@pytest.mark.parametrize(
    "bad", [None, 3, "x", [], {}, {"errors": 3}, {"errors": {"a": 1}, "ratio": 1}, {"values": [["x"]]}, [["x"]]]
)
def test_values_of_a_journal_are_measurements(bad: object, tmp_path: Path) -> None:
    readers = [
        TypeAdapter(Probe).validate_python,
        lambda found: with_weights(Arm("sol", ()), found),
        TypeAdapter(Sheet).validate_python,
    ]
    for read in readers:
        (tmp_path / "j").write_text('{"fingerprint": "f"}\n' + json.dumps({"key": "a", "value": bad}) + "\n")
        with pytest.raises(AccelplugError, match="no measurement under 'a'"):
            Journal(tmp_path / "j", "f").get("a", pytest.fail, cast(Any, read))


@pytest.mark.parametrize("spoiled", ["", "x", "[]", "{}", '{"settings": 3}', '{"settings": "", "turns": -1}'])
def test_partial_calibrations_of_strangers(spoiled: str, video: WanPipeline, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "c.partial.safetensors", {"partial": spoiled})
    for raw in (None, b"", b"x" * 100):
        if raw is not None:
            (tmp_path / "c.partial.safetensors").write_bytes(raw)
        with pytest.raises(AccelplugError, match="Delete it to start anew"):
            accelplug.calibrate(video, "sta", "x", inputs=RUN, path=tmp_path / "c.yaml", progress=False)
    assert [one.name for one in tmp_path.iterdir()] == ["c.partial.safetensors"]


def test_a_comparison_that_is_none(tmp_path: Path) -> None:
    for bad in ("", "{", "3", "[]", "{}", '{"verdict": 1, "rows": [3]}', "[" * 100_000):
        (tmp_path / "c.json").write_text(bad)
        with pytest.raises(AccelplugError):
            accelplug.Comparison.from_json(tmp_path / "c.json")
    places: tuple[Any, ...] = (tmp_path, tmp_path / "none.json", "", 3)
    for place in places:
        with pytest.raises(AccelplugError):
            accelplug.Comparison.from_json(place)


@pytest.mark.parametrize("read", [accelplug.Exam.coco, accelplug.Exam.amber, questions.read_questions])
def test_exams_and_questions_in_wrong_places(read: Callable[..., object], tmp_path: Path) -> None:
    places: tuple[Any, ...] = (3, None, "", b"x", "\0", [], tmp_path, tmp_path / "none", "x" * 5000)
    for place in places:
        with pytest.raises(AccelplugError):
            read(place)


def test_steps_that_are_none(wan: tuple[Any, dict[str, Any]]) -> None:
    with accelplug.apply(wan[0], {"patch": "radial", "with": {"block": 8}}, gate="off") as plug:
        for step in ((-1, 4), (4, 4), (0, 0), (1.5, 4), (True, 4), ("1", 4), (1, "4")):
            with pytest.raises(AccelplugError):
                plug.step(*step)


def test_every_file_of_the_package_is_read_soon() -> None:
    for path in shipped_files().values():
        soon(partial(read_file, path))


# ------------------------------------------------------------------------------------------------------- the command line

WAN, LLAVA = str(zoo.path()), str(zoo.path("llava-scenes"))
ASKED = {
    "compare": ["compare", WAN, "--prompt", "x", "--steps", "1"],
    "tune": ["tune", WAN, "--prompts", "{prompts}", "-o", "{out}/t.yaml"],
    "calibrate": ["calibrate", WAN, "--patch", "sta", "--prompts", "{prompts}", "-o", "{out}/c.yaml"],
    "inspect": ["inspect", LLAVA, "--image", "{picture}"],
    "verify": ["verify", "{recipe}", WAN],
    "demo": ["demo"],
    "examine": ["compare", LLAVA],
}
"""Commands that would work, but for what is added to them."""

REPORTS = ["{out}/missing/r.html", "{out}", "{out}/r.docx", "{out}/r", "", "{out}/" + "x" * 300 + ".html"]
BAD_ARGUMENTS = [
    *((name, ["--report", report]) for name in ("compare", "tune", "inspect", "demo", "examine") for report in REPORTS),
    *(
        (name, ["--output", bad])
        for name in ("tune", "calibrate")
        for bad in ("{out}/missing/t.yaml", "{out}", "{out}/t.json", "")
    ),
    *(
        (name, ["--device", bad])
        for name in ("compare", "tune", "calibrate", "examine")
        for bad in ("cuda:99", "gpu", "meta", "")
    ),
    *(
        (name, ["--prompts", bad])
        for name in ("tune", "calibrate")
        for bad in ("{out}/none.txt", "{out}", "{latin}", "{empty}", "")
    ),
    *(
        (name, ["--steps", bad])
        for name in ("compare", "tune", "calibrate")
        for bad in ("0", "-1", "1.5", "x", "9" * 5000, "٣")
    ),
    *((name, ["--guidance", bad]) for name in ("compare", "tune", "calibrate") for bad in ("nan", "inf", "x", "1e999")),
    *(
        ("tune", more)
        for more in (
            ["--time", "nan"],
            ["--time", "x"],
            ["--seeds", "0"],
            ["--resume", "{out}"],
            ["--resume", "{latin}"],
            ["-o", "{out}/weights.yaml"],
        )
    ),
    *(
        ("tune", more)
        for more in (["--budget", "psnr>26x"], ["--budget", "beauty>=1"], ["--patch", "no"], ["--objective", "nll"])
    ),
    *(
        ("compare", more)
        for more in (
            ["--seed", "-1"],
            ["--recipe", "no"],
            ["--recipe", "{latin}.yaml"],
            ["--pictures", "0"],
            ["--coco", "{out}"],
        )
    ),
    *(
        ("calibrate", more)
        for more in (
            ["--patch", "sol"],
            ["--patch", "no"],
            ["--set", "x=1"],
            ["--set", "rows"],
            ["--set", "rows=[", "--set", "rows=0"],
        )
    ),
    *(
        ("calibrate", more)
        for more in (["--buckets", "0"], ["--dense-steps", "9:1"], ["--seed", "x"], ["--recipe", "no", "--patch", "rest"])
    ),
    *(("inspect", ["--image", bad]) for bad in ("{out}/none.png", "{out}", "{latin}", "")),
    *(("examine", more) for more in (["--record"], ["--coco", "{out}"], ["--recipe", "no"], ["--pictures", "-3"])),
    *(("verify", more) for more in (["--dtype", "int8"], ["--nonsense"], ["more"])),
    *((name, ["--dtype", "float8"]) for name in ("compare", "tune", "calibrate")),
]
BAD_FOLDERS = ["{out}", "{out}/none", "{latin}", "", "x" * 5000, "{broken}"]


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files that a command may be pointed to."""
    out = tmp_path_factory.mktemp("out")
    (out / "prompts.txt").write_text("a red square moves left\na blue disc\n")
    (out / "latin.txt").write_bytes("é".encode("latin-1"))
    (out / "empty.txt").write_text("\n \n")
    Image.new("RGB", (8, 8)).save(out / "p.png")
    save_file({"w": torch.zeros(1)}, out / "weights.safetensors")
    (out / "broken").mkdir()
    for name in ("model_index.json", "config.json"):
        (out / "broken" / name).write_text("{")
    recipe = out / "r.yaml"
    recipe.write_text("schema: 1\nmodel: m\nmatch: {class: X}\ndefault: a\nrecipes: {a: {rules: [{patch: dense}]}}\n")
    names = {
        "prompts": "prompts.txt",
        "latin": "latin.txt",
        "empty": "empty.txt",
        "picture": "p.png",
        "broken": "broken",
        "recipe": "r.yaml",
    }
    return {"out": str(out)} | {name: str(out / file) for name, file in names.items()}


def refused(arguments: list[str], around: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command that asks wrongly; it says so in one line."""
    before = sorted(os.listdir(around["out"]))
    status: object
    try:
        status = main([text.format(**around) for text in arguments])
    except SystemExit as stop:
        status = stop.code
    told = capsys.readouterr().err
    assert status == 2, told
    assert told.count("\n") == 1, told
    assert len(told) < 2_000
    assert sorted(os.listdir(around["out"])) == before, "nothing was written"


@pytest.mark.parametrize(("command", "more"), BAD_ARGUMENTS, ids=lambda x: x if isinstance(x, str) else " ".join(x)[:40])
def test_a_command_that_asks_wrongly_says_so_in_a_line(
    command: str,
    more: list[str],
    around: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(around["out"])
    refused([*ASKED[command], *more], around, capsys)


@pytest.mark.parametrize("folder", BAD_FOLDERS, ids=lambda text: text[:20])
@pytest.mark.parametrize("command", ["compare", "tune", "calibrate", "inspect", "verify"])
def test_folders_that_hold_no_model(
    command: str, folder: str, around: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    refused([folder if text in (WAN, LLAVA) else text for text in ASKED[command]], around, capsys)


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["show"], ["show", "../x"], ["show", "no/no"], ["show", "{latin}.yaml"], ["show", "{out}"]],
)
def test_commands_that_are_none(arguments: list[str], around: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(arguments, around, capsys)


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: object) -> Never:
        raise KeyboardInterrupt

    monkeypatch.setattr("accelplug.cli._list", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "accelplug: interrupted\n"


@pytest.mark.parametrize("spoiled", ["weights", "no weights", "a weight", "config", "tokenizer"])
@pytest.mark.parametrize("model", ["wan-shapes", "llava-scenes"])
def test_models_with_spoiled_files(
    model: str, spoiled: str, around: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(zoo.path(model), folder)
    part = folder / "transformer" if model == "wan-shapes" else folder
    (weights,) = part.glob("*.safetensors")
    if spoiled == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif spoiled == "no weights":
        weights.unlink()
    elif spoiled == "a weight":
        tensors = load_file(weights)
        tensors.pop(next(name for name in tensors if name.endswith(("to_q.weight", "q_proj.weight"))))
        save_file(tensors, weights, {"format": "pt"})
    elif spoiled == "config":
        (part / "config.json").write_text('{"_class_name": 3, "model_type": 7}')
    else:
        (next(folder.glob("**/tokenizer.json"))).write_bytes(b"\xff{")
    refused(["compare", str(folder), "--prompt", "x", "--steps", "1", "--device", "cpu"], around, capsys)


# ---------------------------------------------------------------------------------------------------- the public functions

RUN = {"prompt": "x", "num_inference_steps": 1, "num_frames": 5, "height": 32, "width": 32}
NOTHING = [3, "", "x", b"x", object(), [], {}, float("nan"), (), True, torch.zeros(2), Path("none"), Path("/")]
"""What is no model, no recipe, no list of inputs and no path of a file."""
NO_RECIPE = [
    *NOTHING[:6],
    {"x": 1},
    {1: 2},
    *NOTHING[7:8],
    Path("none.yaml"),
    "none.yaml",
    "/",
    {"patch": None},
    {"rules": None},
    Radial,
    {"patch": Radial},
    {"patch": Radial(), "with": {"decay": 0.2}},
    {"rules": [{"patch": [Radial()]}]},
    torch.zeros(2),
]
SLIPS: dict[str, dict[str, list[Any]]] = {
    "apply": {
        "model": [None, *NOTHING],
        "recipe": NO_RECIPE,
        "gate": [None, 3, "on", True],
        "backend": [None, 3, "tritn", []],
        "choices": [3, "x", [], {}, {"recipe": 1}, dict.fromkeys(("recipe", "gate", "backend", "verdicts", "kernels"), 3)],
        "strict": [None, "no", 1],
        "deterministic": [None, "no", 1],
    },
    "remove": {"model": [None, *NOTHING]},
    "inspect": {"model": [None, *NOTHING], "inputs": [3, "x", [], {"x": 1}]},
    "compare": {
        "pipe": [None, *NOTHING, torch.nn.Linear(2, 2)],
        "recipe": [*NO_RECIPE[:5], [3], ["no"], {"a": 3}],
        "inputs": [None, *NOTHING, {"promt": "x"}, [3], {"prompt": 3}, {"prompt": "x", "generator": 3}],
        "seeds": [None, 3, "x", [], [-1], [1.5], ["x"], [0, 0], float("nan")],
    },
    "tune": {
        "pipe": [None, *NOTHING, torch.nn.Linear(2, 2)],
        "inputs": [None, *NOTHING, {"promt": "x"}],
        "budget": [3, "", "x", [], "psnr>26x", "psnr<=3", "fg_psnr>=3", "psnr>=nan", [3]],
        "time_budget_s": [None, "x", float("nan"), -1, [], float("inf")],
        "seeds": [None, "x", 0, 1, -3, 2.5, [], [1], [0, 0], float("nan")],
        "patches": [3, "radial", ["no"], [3], ["vhr"]],
        "resume": [3, "", Path("/"), Path("/none/j")],
        "objective": ["nll", 3],
    },
    "calibrate": {
        "pipe": [None, *NOTHING, torch.nn.Linear(2, 2)],
        "patch": [*NOTHING, None, "no", "sol"],
        "prompts": [None, 3, [], object(), [3], torch.zeros(2), {"promt": "x"}],
        "config": [3, "x", [1], {"x": 1}, {"windows": 3}],
        "options": [3, "x", [1], {"x": 1}, {"rows": 0}, {"rows": float("nan")}],
        "inputs": [3, "x", [1], {"x": 1}],
        "seed": [None, "x", -1, 1.5, float("nan"), 2**70],
        "buckets": [None, 0, -1, "x", 1.5],
        "dense_steps": [3.5, "x", "9:1", []],
        "path": [3, "", Path("/"), Path("/none/b.yaml"), "b.txt", b"x"],
    },
    "verify": {"pipe": [None, *NOTHING], "recipe": [None, *NOTHING, "none.yaml", Path("/none.yaml"), Radial()]},
}


@pytest.fixture(scope="module")
def video() -> WanPipeline:
    return WanPipeline.from_pretrained(zoo.path())


@pytest.mark.parametrize(("function", "argument"), [(name, slip) for name, slips in SLIPS.items() for slip in slips])
def test_a_wrong_argument_is_refused_before_anything_runs(
    function: str,
    argument: str,
    wan: tuple[Any, dict[str, Any]],
    video: WanPipeline,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(video.transformer), "forward", lambda *_, **__: pytest.fail("something ran"))
    model = wan[0]
    good = {
        "apply": {"model": model, "recipe": {"patch": "radial"}},
        "remove": {},
        "inspect": {"model": model},
        "compare": {"pipe": video, "recipe": "radial", "inputs": RUN, "progress": False},
        "tune": {"pipe": video, "inputs": RUN, "progress": False},
        "calibrate": {"pipe": video, "patch": "sta", "prompts": "x", "inputs": RUN, "progress": False},
        "verify": {"pipe": video, "recipe": "none.yaml"},
    }[function]
    for bad in SLIPS[function][argument]:
        with pytest.raises(AccelplugError) as caught:
            getattr(accelplug, function)(**{**good, argument: bad})
        assert str(caught.value).strip()
    assert not list(tmp_path.iterdir())


LANGUAGE_SLIPS: dict[str, dict[str, list[Any]]] = {
    "compare": {"inputs": [3, "x", {}, [], object()], "processor": [None, 3, "x", object()], "recipe": [3, "no", ["no"]]},
    "tune": {
        "inputs": [3, "x", [], {}, [3], [{"text": "a"}], [{"text": 3, "answer": 4, "x": 5}]],
        "processor": [None, 3, "x", object()],
        "objective": ["x", 3],
        "budget": ["psnr>=3", 3],
        "patches": [["sol"], "vhr"],
    },
    "inspect": {"inputs": [3, "x", [], {"x": 1}, {"input_ids": 3}, {"input_ids": torch.zeros(3)}, {"input_ids": "x"}]},
}


@pytest.mark.parametrize(
    ("function", "argument"), [(name, slip) for name, slips in LANGUAGE_SLIPS.items() for slip in slips]
)
def test_a_wrong_argument_beside_a_language_model(
    function: str, argument: str, seeing: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = seeing
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("something ran"))
    good = {"inputs": accelplug.Exam.scenes(8), "processor": processor, "progress": False}
    for bad in LANGUAGE_SLIPS[function][argument]:
        with pytest.raises(AccelplugError):
            getattr(accelplug, function)(model, **({} if function == "inspect" else good) | {argument: bad})


@pytest.fixture(scope="module")
def seeing() -> tuple[Any, Any]:
    folder = zoo.path("llava-scenes")
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("number", range(NUMBER // 10))
def test_a_strangers_recipe_for_a_language_model_works_or_is_refused(number: int, seeing: tuple[Any, Any]) -> None:
    model, processor = seeing
    rng = random.Random(f"{SEED} language {number}")
    entry = rng.choice([entry for entry in map(patch_entry, ROWS) if entry.family in ("heads", "generation")])
    fields = list(patch_class(entry.name).Config.model_fields)
    values = [*NASTY[:25], 99, [99], [0, 99], [-1], [0.0, 1.0], [3, 2], 0.25, 2.0, RAMP]
    settings = {field: rng.choice(values) for field in rng.sample(fields, 1)}
    recipe = {
        "where": {"layers": rng.choice(["0:", "2:5", "-3:", 0])} if entry.family == "heads" else {},
        "patch": entry.name,
    }
    inputs = asked(processor)
    with soon(lambda: accelplug.apply(model, recipe | {"with": settings}, processor=processor)) or _Nothing() as plug:
        if plug is not None:
            told = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            with contextlib.suppress(AccelplugError):
                assert not any(logits.isnan().any() for logits in model.generate(**inputs, **told).logits)


def asked(processor: Any) -> Any:
    """A question about a grey picture."""
    text = chat.prompt(processor, "Is there a cat?", picture=True)
    return chat.tokenized(processor, [text], [Image.new("RGB", (96, 96), "grey")])


# ------------------------------------------------------------------------------------------------------- one by one, printed

REFUSED = [
    {"patch": "radial", "with": {"sink": RAMP}},
    {"patch": "radial", "with": {"block": RAMP}},
    {"patch": "sol", "with": {"band": RAMP}},
    {"patch": "sol", "with": {"band": 10**30}},
    {"patch": "sol", "with": {"order": "kmeans", "query_clusters": 10**12}},
    {"patch": "bias", "with": {"strength": 1e308}},
    {"patch": "tome", "with": {"ratio": {"from": 0, "to": 0.99999999, "over": "steps"}}},
    {"patch": "carve", "with": {"keep_area": {"from": 0.2, "to": 0.5, "over": "layers"}}},
    {"patch": "radial", "where": {"tokens": ">=٣"}},
    {"patch": "radial", "where": {"grid": "0x4x4"}},
    {"rules": [{"patch": "radial"}], "summary": "\x1b]0;renamed\x07"},
    {"rules": [{"patch": "radial"}], "cite": "\u202egnp.exe"},
    {"rules": [{"patch": "radial"}], "\x9b2J": 1},
    {"patch": "radial", "where": {"layers": list(range(100_000))}},
    {"patch": "radial", "where": {"layers": "9" * 5000}},
    {"rules": [{"patch": "radial"}] * 40_000},
    *(
        {"rules": [{"patch": "dense"}], "cache": {"kind": kind, "with": settings}}
        for kind, settings in (
            ("first_block", {"threshold": "high"}),
            ("first_block", {"threshold": -1}),
            ("first_block", {"treshold": 0.1}),
            ("mag", {"threshold": 0.1}),
            ("mag", {"mag_ratios": []}),
            ("mag", {"mag_ratios": [1.0], "num_inference_steps": 10**9}),
            ("mag", {"mag_ratios": [1.0] * 20_000}),
            ("taylorseer", {"cache_interval": 0}),
            ("taylorseer", {"cache_identifiers": ["(a+)+$"]}),
            ("taylorseer", {"cache_identifiers": ["["]}),
            ("taylorseer", {"cache_identifiers": [".*.*.*.*x"]}),
            ("taylorseer", {"cache_identifiers": "blocks"}),
            ("taylorseer", {"max_order": 10**6}),
        )
    ),
]


@pytest.mark.parametrize("recipe", REFUSED, ids=lambda recipe: str(recipe)[:70])
def test_recipes_that_mean_nothing_are_refused_at_apply(recipe: dict[str, Any], wan: tuple[Any, dict[str, Any]]) -> None:
    start = time.process_time()
    with pytest.raises(AccelplugError):
        accelplug.apply(wan[0], recipe, gate="off")
    assert time.process_time() - start < SOON_S


@pytest.mark.parametrize("patch", [name for name in ROWS if patch_entry(name).family in ("sparse", "tokens", "bias")])
def test_what_may_ramp_ramps(patch: str, wan: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = wan
    fields = patch_class(patch).Config.model_fields
    common = dict(ROWS[patch].working)
    common |= {"block": 8, "backend": "reference"} if "block" in fields else {}
    for field in fields:
        setting = {field: {"from": 0.25, "to": 0.75, "over": "steps"}}
        with (
            soon(partial(accelplug.apply, model, {"patch": patch, "with": {**common, **setting}}, gate="off"))
            or (_Nothing()) as plug,
            torch.no_grad(),
        ):
            if plug is not None:
                plug.step(1, 3)
                assert model(**inputs)[0].isfinite().all()


def test_bounds_on_tokens_may_have_space(wan: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = wan
    with accelplug.apply(
        model, {"patch": "radial", "with": {"block": 8}, "where": {"tokens": " >=\t8 "}}, gate="off"
    ) as plug:
        with torch.no_grad():
            model(**inputs)
        assert plug.report().served


def test_results_print_what_they_show(seeing: tuple[Any, Any]) -> None:
    found = accelplug.inspect(seeing[0])
    assert "can be entered" in str(found)
    assert str(found) == repr(found)
    compared = VlmComparison("A", accelplug.Exam.scenes(4), [Outcome("stock", "stock")], {})
    assert len(str(compared)) < 1000
    assert repr(compared) == str(compared) == "A on scenes, test split"  # nothing was asked: no table


# ------------------------------------------------------------------------------------------------------------------ files


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write(path, "one")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    files.write(tmp_path / "link", "two")
    assert (path.read_text(), path.stat().st_mode & 0o777, (tmp_path / "link").is_symlink()) == ("two", 0o640, True)
    with pytest.raises(AccelplugError, match="No space left"):
        files.write("/dev/full", "x" * 100)
    with pytest.raises(AccelplugError, match="No space left"):
        files.append(Path("/dev/full"), "x" * 100)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    for place in (path, tmp_path / "new.txt"):
        with pytest.raises(AccelplugError, match="No space left"):
            files.write(place, "three")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.txt", "link"]
    assert path.read_text() == "two"


@pytest.mark.parametrize("name", ["tuned (1)", "Ärger", "...", "a b_c.d", "-x", "ÄÖ"])
def test_every_file_name_makes_a_recipe_name(name: str, tmp_path: Path) -> None:
    text = f"schema: 1\nmodel: {model_name(tmp_path / f'{name}.yaml')}\nmatch: {{class: X}}\ndefault: a\n"
    (tmp_path / f"{name}.yaml").write_text(text + "recipes: {a: {rules: [{patch: dense}]}}\n")
    assert read_file(tmp_path / f"{name}.yaml").recipe()
