"""The documents are true: their code runs, what they list is what there is, and their links lead somewhere.

Every Python block of README.md and docs/ runs, a page's blocks one after the other as a reader would. Models of a
hub are stood in for by the bundled ones, and every run is a tiny one.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import transformers
import yaml
from diffusers import WanPipeline

import accelplug
from accelplug import families, registry, zoo
from accelplug.comparison import Exam
from accelplug.errors import RecipeError
from accelplug.families import encoders, vlm
from accelplug.kernels import flex
from accelplug.patches.base import NEEDS
from accelplug.patches.sparse.template import BlockConfig, RestKind
from accelplug.recipe import Measured, Positions, Rule, StepCache, Where
from accelplug.recipe.reading import Entry
from accelplug.recipe.settings import Ramp, TableRef
from accelplug.registry import PatchEntry, patch_class
from accelplug.testing.encoders import dinov2
from docs import pages

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 4, "guidance_scale": 1.0}


# ------------------------------------------------------------------------------------------------------------------ code


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub names load the bundled models, runs are tiny, nothing is compiled, and what a page registers is forgotten behind it."""

    def bundled(load: Callable[..., Any], name: str) -> Callable[..., Any]:
        return lambda source, **given: load(source if Path(source).exists() else zoo.path(name))

    tiny = WanPipeline.__call__
    monkeypatch.setattr(
        WanPipeline, "__call__", functools.wraps(tiny)(lambda *args, **given: tiny(*args, **{**given, **TINY}))
    )
    monkeypatch.setattr(WanPipeline, "from_pretrained", bundled(WanPipeline.from_pretrained, "wan-shapes"))
    for cls in (transformers.AutoModelForImageTextToText, transformers.AutoProcessor):
        monkeypatch.setattr(cls, "from_pretrained", bundled(cls.from_pretrained, "llava-scenes"))
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda source: dinov2()[0])
    exam = Exam.scenes(4)
    few = replace(exam, questions=exam.questions[::12], pairs=exam.pairs[:1], max_new_tokens=4)
    monkeypatch.setattr(Exam, "scenes", lambda pictures=200: few)
    monkeypatch.setattr(flex, "missing", lambda device: "these tests compile nothing")
    for module, name in (
        (registry, "PATCH_CATALOG"),
        (families, "FAMILY_CATALOG"),
        (vlm, "VLM_CATALOG"),
        (encoders, "ENCODER_CATALOG"),
    ):
        monkeypatch.setattr(module, name, copy.copy(getattr(module, name)))


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """The Python blocks of a page: the line of the first, what tests are told of it, the code."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```python(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        yield text[: found.start(2)].count("\n"), found[1], found[2]


def what_extending_tells(known: dict[str, Any]) -> None:
    """What the page registers is there, and its patch obeys the laws."""
    assert "strided" in [entry.name for entry in registry.list_patches()]
    assert "mine" in [family.name for family in families.list_families()]
    assert "mine" in [family.name for family in vlm.list_vlms()]
    for law in known["test_law"].pytestmark[0].args[1]:
        if law.model == "wan":
            known["test_law"](law)


CLAIMS = {"extending.md": what_extending_tells}
"""What must hold behind the code of a page, by its name."""


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path) -> None:
    known: dict[str, Any] = {"__name__": page.stem}
    for line, told, code in blocks(page):
        block = compile("\n" * line + code, str(page), "exec")  # an error then names the line of the page
        if "compile only" not in told:
            exec(block, known)
    CLAIMS.get(page.name, lambda known: None)(known)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_have_the_options_that_they_are_given(page: Path) -> None:
    known = pages.commands()
    for line in re.findall(r"^accelplug .*", page.read_text(encoding="utf-8"), re.MULTILINE):
        command, *words = line.removeprefix("accelplug ").split("#")[0].split()
        assert command in known, line
        text = pages.helped(command)
        for option in (word for word in words if re.match(r"--?[a-z]", word)):
            assert re.search(rf"{option}\b", text), line


# ------------------------------------------------------------------------------------------------------------ what is made


def cells(text: str) -> dict[str, list[str]]:
    """The rows of a Markdown table by their first cell, without code marks and links."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    return {re.sub(r"\[?`(\w+)`.*", r"\1", row[0].strip()): row[1:] for row in rows}


def test_every_mark_is_known_and_every_table_is_shown() -> None:
    marks = {
        mark for page in DOCUMENTS for mark in re.findall(r"<!-- made: ([\w -]+) -->", page.read_text(encoding="utf-8"))
    }
    assert marks <= pages.MADE.keys()
    assert not {name for name in pages.MADE if not name.startswith("run ")} - marks
    for name in marks:
        assert pages.MADE[name]().strip(), name


def test_the_navigation_has_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w-]+\.md", str(site["nav"])))
    made = {path for path in pages.generated() if "/" not in path}
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} | made


def test_patches_have_a_page_and_a_row_each() -> None:
    names = {entry.name for entry in pages.OWN}
    assert {Path(path).stem for path in pages.generated() if "/" in path} == names
    shown = [name for group in pages.GROUPS for name in cells(pages.patches_of(group)) if name in names]
    assert sorted(shown) == sorted(names)


@pytest.mark.parametrize("entry", pages.OWN, ids=lambda entry: entry.name)
def test_the_page_of_a_patch_has_all_that_is_its_own(entry: PatchEntry) -> None:
    page, config = pages.patch_page(entry), patch_class(entry.name).Config
    shared = set(BlockConfig.model_fields) if issubclass(config, BlockConfig) else set()
    rows = cells(page)
    assert set(config.model_fields) - shared <= set(rows)
    for name in set(config.model_fields) & set(rows):
        assert config.model_fields[name].description in page


def test_a_cell_of_the_matrices_says_what_the_patch_takes() -> None:
    rests, orders = cells(pages.rest_matrix()), cells(pages.order_matrix())
    for entry, cls in pages.block_sparse():
        for kind, cell in zip(get_args(RestKind), rests[entry.name], strict=True):
            if cell == "**default**":
                assert cls({}).config.rest == kind
            elif cell == "yes":
                assert cls({"rest": kind}).config.rest == kind
            else:
                with pytest.raises(RecipeError):
                    cls({"rest": kind})
        if "order" not in cls.Config.model_fields:
            assert orders[entry.name][0] == "its own order"
            continue
        for kinds, cell in zip(pages.ORDERS.values(), orders[entry.name], strict=True):
            off = dict.fromkeys(re.findall(r"`(\w+)`", cell), False)
            for kind in kinds:
                assert pages.accepts(cls.Config, order=kind, **off) == (cell != "")
                assert pages.accepts(cls.Config, order=kind) == (cell != "" and not off)


def test_models_are_all_there() -> None:
    text = pages.denoisers() + pages.vlms()
    denoisers = [name for family in families.FAMILIES for name in family.classes]
    for name in (*denoisers, *(name for family in vlm.KNOWN_VLMS for name in family.classes)):
        assert f"`{name}`" in text


def test_the_grammar_names_every_key() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for model in (Entry, Rule, Where, StepCache, Positions, Measured, Ramp, TableRef):
        for name, field in model.model_fields.items():
            assert re.search(rf"[`{{ ]{field.alias or name}[`:]", text), f"{model.__name__}.{name}"


def test_the_interface_is_all_there() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: accelplug\.(\w+)$", text, re.MULTILINE)) >= set(accelplug.__all__) - {"__version__"}


def test_the_picture_of_the_house_has_every_room() -> None:
    rooms = {path.stem for path in (ROOT / "accelplug").iterdir() if path.suffix == ".py" or path.is_dir()}
    shown = set(re.findall(r'font-weight="700">(\w+)<', pages.house()))
    assert {room for room in rooms if not room.startswith("_")} - {"recipes", "version"} == shown


def test_every_need_is_said_in_words() -> None:
    assert pages.NEEDED.keys() == NEEDS


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_to_files_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", text):
        assert (ROOT / link).exists(), link
