"""A published method is one page: its module says what it is, its class is short, and its citation stands once, in the registry.

What NOTICE, docs/patches.md, the modules and the recipes cite follows from that. README has no row for each patch.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from accelplug.patches.base import Patch
from accelplug.recipe import SHIPPED, positions, read_file, shipped_files
from accelplug.registry import PatchEntry, list_patches, patch_class
from accelplug.step_caches import CACHES
from docs import pages

ROOT = Path(SHIPPED).resolve().parent

OTHER_WORKS = {
    "1801.03924": "LPIPS, how different pictures look",
    "1809.02156": "CHAIR, an evaluator",
    "1904.10509": "Sparse Transformers, the example of a patch in a package of its own",
    "2103.12731": "HaloNet, which neighborhood has by settings",
    "2103.14030": "Swin, likewise",
    "2106.09685": "LoRA, in whose form the adapter of the zoo is kept",
    "2108.12409": "ALiBi, whose slopes bias offers",
    "2204.01697": "MaxViT, which neighborhood has by settings",
    "2302.08113": "MultiDiffusion, crops whose latents are averaged, in upscale",
    "2305.10355": "POPE, an evaluator",
    "2306.13394": "MME, an evaluator",
    "2306.15595": "position interpolation, the key positions",
    "2309.14509": "DeepSpeed-Ulysses, context parallelism",
    "2311.07397": "AMBER, an evaluator",
    "2311.16973": "DemoFusion, how the structure prior of upscale fades",
    "2312.04927": "Zoology, associative recall, an evaluator",
    "2404.06654": "RULER, evaluators",
    "2404.15574": "retrieval heads, a score of calibrate",
    "2410.02367": "SageAttention, the setting precision",
    "2502.15894": "RIFLEx, the key positions",
    "2503.11651": "VGGT, whose modules the zoo's geometry model has",
    "2510.13554": "windowed attention distance and future attention influence, likewise",
    "2512.04939": "LiteVGGT, whose layers share a match, which fastvggt has by a setting",
    "2512.22213": "secondary attention sinks, which inspect tells",
    "2602.01077": "PISA, the setting rest",
    "2604.07394": "Flux Attention, in whose place calibrate chooses layers",
    "2608.18484": "SparsePR, the setting repair",
}
"""Works that are cited and are not a patch."""

OWN = [entry for entry in list_patches() if entry.module.startswith("accelplug.")]


def works(text: str) -> list[str]:
    """Numbers of the papers on arXiv, or on OpenReview, that a text cites, in order."""
    return re.findall(r"(?<![\d.])\d{4}\.\d{5}(?!\d)|(?:(?<=OpenReview )|(?<=OpenReview \[))\w{10}\b", text)


CITED = [*(entry.cite for entry in OWN), *(cache.cite for cache in CACHES.values())]
KNOWN = {work for cite in CITED for work in works(cite)} | OTHER_WORKS.keys()


def notice() -> dict[str, str]:
    """What NOTICE says, by the word that a paragraph of it begins with."""
    paragraphs: dict[str, str] = {}
    for line in (ROOT / "NOTICE").read_text(encoding="utf-8").splitlines():
        name = line.split(maxsplit=1)[0] if line[:1].strip() else (list(paragraphs) or [""])[-1]
        paragraphs[name] = f"{paragraphs.get(name, '')}\n{line}"
    return paragraphs


@cache
def documents() -> dict[str, str]:
    """README and the pages of the documentation as they are shown, by name."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {path.name: pages.rendered(path.read_text(encoding="utf-8")) for path in paths} | pages.generated()


def rows(name: str, page: str) -> list[str]:
    """Lines of a page's tables that are about a patch."""
    return re.findall(rf"^\| *\[?`{name}`[^|]*\|.*$", documents()[page], re.MULTILINE)


@pytest.mark.parametrize("entry", OWN, ids=lambda entry: entry.name)
def test_a_patch_is_cited_alike_by_the_registry_its_module_notice_and_documents(entry: PatchEntry) -> None:
    cited = works(entry.cite)
    assert re.fullmatch(r"arXiv \d{4}\.\d{5}(, \d{4}\.\d{5})*|OpenReview \w{10}", entry.cite)
    assert works(inspect.getdoc(import_module(entry.module)) or "")[0] == cited[0], "the module names its own paper first"
    paragraph = notice()[entry.name]
    assert not set(cited) - set(works(paragraph)), f"NOTICE: {entry.name} lacks some of {entry.cite}"
    assert set(works(paragraph)) <= set(cited), f"NOTICE: {entry.name} has works that the registry has not"
    assert [set(works(row)) for row in rows(entry.name, "patches.md") if works(row)] == [set(cited)]
    for page in documents():
        for numbers in map(works, rows(entry.name, page)):
            assert not numbers or (cited[0] in numbers and set(numbers) <= set(cited)), page


@pytest.mark.parametrize("entry", OWN, ids=lambda entry: entry.name)
def test_the_method_stands_on_the_module_and_config_in_the_class(entry: PatchEntry) -> None:
    cls = patch_class(entry.name)
    assert len((cls.__doc__ or "").splitlines()) == 1, "one line; the module says what the method is"
    assert not works(cls.__doc__ or ""), "the paper is cited on the module"
    assert cls.Config.__qualname__ == f"{cls.__name__}.Config"
    assert cls.Config.__module__ == cls.__module__
    assert cls.cite == Patch.cite, "the registry has the citation"


@pytest.mark.parametrize("folder", ["patches", "kernels", "recipes", "accelplug", "examples"])
def test_the_code_cites_nothing_that_is_not_known(folder: str) -> None:
    unknown = {
        str(path.relative_to(ROOT)): found
        for path in sorted((ROOT / folder).rglob("*.*"))
        if path.suffix in (".py", ".yaml") and (found := set(works(path.read_text(encoding="utf-8"))) - KNOWN)
    }
    assert not unknown


def test_the_documents_cite_nothing_that_is_not_known_and_notice_all_that_is() -> None:
    for name, text in documents().items():
        assert not set(works(text)) - KNOWN, name
    assert set(works(" ".join(notice().values()))) == KNOWN


def test_nothing_is_on_the_list_of_other_works_that_a_patch_cites_or_nobody_does() -> None:
    assert not {work for entry in OWN for work in works(entry.cite)} & OTHER_WORKS.keys()
    code = "".join(
        path.read_text(encoding="utf-8")
        for name in ("patches", "kernels", "accelplug", "examples")
        for path in (ROOT / name).rglob("*.py")
    )
    assert not OTHER_WORKS.keys() - set(works(code))


@pytest.mark.parametrize("path", shipped_files().values(), ids=lambda path: path.stem)
def test_a_recipe_cites_works_of_its_patches_cache_and_positions(path: Path) -> None:
    cites = {entry.name: set(works(entry.cite)) for entry in OWN}
    for name, recipe in read_file(path).recipes.items():
        theirs = set().union(*(cites[rule.patch] for rule in recipe.rules if rule.patch != "dense"))
        theirs |= set(works(CACHES[recipe.cache.kind].cite)) if recipe.cache else set()
        theirs |= set(works(inspect.getdoc(positions) or "")) if recipe.positions else set()
        assert works(recipe.cite), name
        assert set(works(recipe.cite)) <= theirs, f"{path.stem}/{name} cites {recipe.cite}, it uses {sorted(theirs)}"
