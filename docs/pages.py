"""What the documentation takes from the code when it is built: a hook of MkDocs (see mkdocs.yml).

A mark ``<!-- made: NAME -->`` in a page is replaced by what `MADE` has for that name. `generated` are whole pages: README as the first one,
one for each patch, the command line, and the changelog. Nothing that is made here is committed, so that it cannot disagree with the code.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin
from unittest import mock

from pydantic import BaseModel, ValidationError

from accelplug import families
from accelplug.cli import main
from accelplug.compat import versions
from accelplug.families.unsupported import UNSUPPORTED, UNSUPPORTED_VLMS
from accelplug.families.vlms import KNOWN_VLMS
from accelplug.kernels.attention import FLEX_MIN_SLOTS
from accelplug.patches.sparse import template
from accelplug.patches.sparse.template import BlockConfig, BlockSparse
from accelplug.recipe import RecipeFile, read_file, shipped_files
from accelplug.registry import PatchEntry, list_patches, patch_class
from accelplug.step_caches import CACHES
from accelplug.table import Table

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OWN = tuple(entry for entry in list_patches() if entry.module.startswith("accelplug."))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


# ---------------------------------------------------------------------------------------------------------- docstrings


def papers(text: str) -> str:
    """Return Markdown in which papers on arXiv and on OpenReview are links."""
    text = re.sub(r"(?<=OpenReview )(\w{10})\b", r"[\1](https://openreview.net/forum?id=\1)", text)
    return re.sub(r"(?<![\d.\[/])(\d{4}\.\d{5})(?!\d)", r"[\1](https://arxiv.org/abs/\1)", text)


def markdown(docstring: str) -> str:
    """Return a docstring as Markdown: what is indented is a formula, and papers are links."""

    def formula(found: re.Match[str]) -> str:
        return f"```text\n{inspect.cleandoc(found[0]).replace('``', '')}\n```\n"

    return papers(re.sub(r"(?:^ {4}.*\n?)+", formula, docstring, flags=re.MULTILINE))


def said_of(module: str) -> tuple[str, str]:
    """The first line of a module's docstring, and the rest as Markdown."""
    first, _, rest = (inspect.getdoc(import_module(module)) or "").partition("\n")
    return first, markdown(rest.strip("\n"))


# ------------------------------------------------------------------------------------------------------------- patches


PIPELINES = (
    "By the token grid alone",
    "By queries and keys",
    "By tables from dense runs, head by head",
    "Other",
    "Guidance",
)
"""Groups of the methods for pipelines."""
LANGUAGE = {
    "prefill": "For language models",
    "decode": "For language models",
    "memory": "For language models",
    "geometry": "For geometry transformers",
    "heads": "For vision-language models",
    "generation": "For vision-language models",
}
"""Groups of the other methods, by their family."""
GROUPS = tuple(dict.fromkeys((*PIPELINES, *LANGUAGE.values())))


def group_of(entry: PatchEntry) -> str:
    """The group of a method."""
    cls: type[Any] = patch_class(entry.name)
    if entry.family in LANGUAGE:
        return LANGUAGE[entry.family] if cls.about_images else LANGUAGE["prefill"]
    grid, scores, tables, other, guidance = PIPELINES
    if entry.family == "guidance":
        return guidance
    if entry.family != "sparse":
        return other
    if cls.Calibration is not None:
        return tables
    return scores if getattr(cls, "select", None) is BlockSparse.select else grid


def patch_rows(entries: Iterable[PatchEntry]) -> str:
    rows = [(f"[`{entry.name}`](patches/{entry.name}.md)", entry.summary, papers(entry.cite)) for entry in entries]
    return table(("patch", "what it does", "paper"), rows)


def patches_of(group: str) -> str:
    """The methods of a group."""
    return patch_rows(entry for entry in OWN if group_of(entry) == group)


def pipeline_patches() -> str:
    """The methods for pipelines, a table for each group."""
    return "\n\n".join(f"### {group}\n\n{patches_of(group)}" for group in PIPELINES)


def block_sparse() -> list[tuple[PatchEntry, type[Any]]]:
    found = [(entry, patch_class(entry.name)) for entry in OWN if entry.family == "sparse"]
    return [(entry, cls) for entry, cls in found if issubclass(cls.Config, BlockConfig)]


def accepts(config: type[BaseModel], **settings: Any) -> bool:
    """Whether settings are valid: tried, not looked up."""
    try:
        config.model_validate(settings)
    except ValidationError:
        return False
    return True


def in_the_way(config: type[BaseModel], **settings: Any) -> list[str] | None:
    """The switches that must be off for settings to be valid, most often none; None where they never are."""
    switches = [name for name, field in config.model_fields.items() if field.default is True]
    if not accepts(config, **settings, **dict.fromkeys(switches, False)):
        return None
    for name in tuple(switches):
        rest = [other for other in switches if other != name]
        switches = rest if accepts(config, **settings, **dict.fromkeys(rest, False)) else switches
    return switches


def cell(config: type[BaseModel], key: str, options: Sequence[Any]) -> str:
    """What a matrix says of some values of a setting."""
    if key not in config.model_fields:
        return ""
    if config.model_fields[key].default in options:
        return "**default**"
    off = in_the_way(config, **{key: options[0]})
    return "" if off is None else "yes" + (", without " + ", ".join(f"`{name}`" for name in off) if off else "")


def choices_matrix(key: str, values: Mapping[str, Sequence[Any]], otherwise: str) -> str:
    """Which method takes which values of a setting, `values` by the heading of their column."""
    rows = []
    for entry, cls in block_sparse():
        cells = [cell(cls.Config, key, options) for options in values.values()]
        rows.append((f"[`{entry.name}`](patches/{entry.name}.md)", *(cells if any(cells) else [otherwise, *cells[1:]])))
    return table(("patch", *values), rows)


def rest_matrix() -> str:
    return choices_matrix("rest", {f"`{name}`": (name,) for name in get_args(template.RestKind)}, "its own")


ORDERS = {
    "`raster`": ("raster",),
    "`thw`, `twh`, ...": ("thw", "twh", "hwt", "htw", "wht", "wth"),
    "`tile`": ("tile",),
    "`morton`, `hilbert`, `gilbert`": ("morton", "hilbert", "gilbert"),
    "`kmeans`": ("kmeans",),
}


def order_matrix() -> str:
    return choices_matrix("order", ORDERS, "its own order")


def shared_settings() -> str:
    return settings(BlockConfig, BlockConfig.model_fields)


def settings(config: type[BaseModel], names: Iterable[str]) -> str:
    """A table of settings: values, default, meaning."""
    rows = []
    for name in names:
        field = config.model_fields[name]
        default = "required" if field.is_required() else f"`{plain(field.default)}`"
        rows.append((f"`{name}`", values(field.annotation, field.metadata), default, field.description or ""))
    return table(("setting", "values", "default", "what it is"), rows)


def plain(value: Any) -> str:
    """A default as a recipe has it."""
    written = {None: "null", True: "true", False: "false"}
    if isinstance(value, tuple | list):
        return f"[{', '.join(plain(item) for item in value)}]"
    return written.get(value, str(value)) if isinstance(value, bool | NoneType) else str(value)


def values(kind: Any, bounds: Sequence[Any] = ()) -> str:
    """What a setting may be, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return values(inner[0], [*bounds, *inner[1:]])
    if origin in (Union, UnionType):
        return " or ".join(values(each, bounds) for each in inner)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in inner)
    if origin in (tuple, list):
        if inner[-1] is Ellipsis or origin is list:
            return f"list of: {values(inner[0])}"
        same = len(set(map(str, inner))) == 1
        return f"{len(inner)} of: {values(inner[0])}" if same else f"[{', '.join(values(each) for each in inner)}]"
    names = {bool: "true, false", int: "whole number", float: "number", str: "text", NoneType: "null", Table: "a table"}
    return names.get(kind, "mapping") + ("".join(bounded(bounds)) if kind in (int, float) else "")


def bounded(bounds: Iterable[Any]) -> Iterator[str]:
    """Bounds in words."""
    words = {"ge": "from", "gt": "above", "le": "to", "lt": "below", "multiple_of": "in steps of"}
    for bound in bounds:
        for name in ("ge", "gt", "le", "lt", "multiple_of"):
            if getattr(bound, name, None) is not None:
                yield f" {words[name]} {getattr(bound, name)}"
        if hasattr(bound, "metadata"):  # a Field inside of Annotated
            yield from bounded(bound.metadata)


def own_settings(config: type[BaseModel]) -> list[str]:
    """The settings of a method that others do not share, or that differ from what is shared."""
    shared = BlockConfig.model_fields if issubclass(config, BlockConfig) else {}

    def differs(name: str) -> bool:
        return (
            name not in shared
            or config.model_fields[name].default != shared[name].default
            or (values(config.model_fields[name].annotation) != values(shared[name].annotation))
        )

    return [name for name in config.model_fields if differs(name)]


@cache
def recipe_files() -> tuple[RecipeFile, ...]:
    """The recipe files that come with the package."""
    return tuple(read_file(path) for path in shipped_files().values())


def recipes_with(patch: str) -> list[str]:
    """Full names of the shipped recipes that use a patch, each from the file that it stands in."""
    return [
        recipe.name
        for file in recipe_files()
        for recipe in file.recipes.values()
        if recipe.path == file.path and patch in (entry.name for entry in recipe.patches())
    ]


NEEDED = {
    "hidden_states": "what enters the layer",
    "blind": "a second reading of the prompt, without its image tokens",
    "ahead": "a plain forward over the prompt before the one that answers",
    "vision_attention": "attention maps of the vision tower",
    "turns": "where the turn of the system ends and the turn of the user begins",
    "whole_prompt": "the prompt in one forward, not in pieces",
    "answers": "which row answers, when it is read",
    "scores": "scores that no soft cap changes before the softmax",
    "probabilities": "scores that nothing is added to: no sink logits, no soft cap, no position bias",
    "first_forward": "the first prompt of a sequence in one forward: `generate` without prefill_chunk_size",
    "logits": "what came of every step: no beams, no drafts, no compiled steps",
    "rehearsal": "`generate`, which it stands around too",
    "cache": "a dynamic cache, whose keys and values it keeps: none that is static, quantised or offloaded",
}
"""`accelplug.patches.base.NEEDS`, for readers."""


def patch_page(entry: PatchEntry) -> str:
    """The page of a method, from its module's docstring, its settings and the recipes that use it."""
    cls = patch_class(entry.name)
    first, rest = said_of(entry.module)
    parts = [f"# {entry.name}", f"**{first}**", rest]
    if cls.needs:
        parts += ["## What it needs of a model", "\n".join(f"* {NEEDED[need]}" for need in sorted(cls.needs))]
    parts += ["## Settings", settings(cls.Config, own_settings(cls.Config))]
    if issubclass(cls.Config, BlockConfig):
        parts += [
            "The other settings are [the same for all block-sparse patches](../patches.md#settings-that-block-sparse-patches-share)."
        ]
    if cls.Calibration is not None:
        parts += [
            "## Calibration",
            f"```sh\naccelplug calibrate MODEL_DIR --patch {entry.name} --prompts prompts.txt -o my.yaml\n```",
        ]
        knobs = cls.Calibration.Config
        parts += ["Its knobs, as `--set KEY=VALUE`:", settings(knobs, knobs.model_fields)]
    if recipes := recipes_with(entry.name):
        parts += ["## Shipped recipes", "\n".join(f"* `{name}`" for name in recipes)]
    parts += ["## Source", papers(notices()[entry.name])]
    return "\n\n".join(parts) + "\n"


@cache
def notices() -> dict[str, str]:
    """What NOTICE says of each method."""
    text = (ROOT / "NOTICE").read_text(encoding="utf-8")
    return {name: " ".join(said.split()) for name, said in re.findall(r"^(\w+) {2,}(.*(?:\n {2,}.*)*)", text, re.MULTILINE)}


# -------------------------------------------------------------------------------------------------------------- models

STATUS = {"verified": "verified", "layout": "layout-tested", "dense": "dense"}


def denoisers() -> str:
    """All families of denoisers."""
    rows = []
    for family in families.FAMILIES:
        kinds = ", ".join(dict.fromkeys(kind for _, kind in family.sites))
        classes = ", ".join(f"`{name}`" for name in family.classes)
        rows.append((family.name, classes, "" if family.status == "dense" else kinds, STATUS[family.status]))
    return table(("family", "classes", "kinds of attention", "status"), rows)


def refused_denoisers() -> str:
    """The classes of diffusers that no patch is for, and why."""
    rows = [(f"`{name}`", f"{why[:1].upper()}{why[1:]}") for name, why in UNSUPPORTED.items()]
    return table(("class", "why"), rows)


def denoiser_notes() -> str:
    """What each family's module says of it."""
    notes = []
    for file in families.FILES:
        first, rest = said_of(f"accelplug.families.{file}")
        title, _, what = first.partition(": ")
        notes.append(f"**{title}.** {what[:1].upper()}{what[1:]}" + (f"\n\n{rest}" if rest else ""))
    return "\n\n".join(notes)


def vlms() -> str:
    """All families of vision-language models."""
    lie = {
        "square": "one square",
        "thw": "by frames, rows and columns",
        "tiles": "square tiles",
        "anyres": "a square and rows of tiles",
        "own": "rows and columns of its own",
        "none": "no grid",
    }
    rows = [
        (
            family.name,
            ", ".join(f"`{name}`" for name in family.classes),
            lie[family.grid],
            "refused" if family.pixels in ("tiles", "other") else "with one tile" if family.grid == "tiles" else "yes",
            family.note,
        )
        for family in KNOWN_VLMS
    ]
    refused: dict[str, list[str]] = {}
    for name, why in UNSUPPORTED_VLMS.items():
        refused.setdefault(why, []).append(f"`{name}`")
    reasons = [(", ".join(names), f"{why[:1].upper()}{why[1:]}") for why, names in refused.items()]
    known = table(("family", "classes", "image tokens", "`carve`, `agla`", ""), rows)
    said = "On these classes patches that look at images are refused. Patches that read fewer keys go on where there is attention."
    return f"{known}\n\n{said}\n\n{table(('classes', 'why'), reasons)}"


# ------------------------------------------------------------------------------------------------------------- recipes


def shipped_recipes() -> str:
    """All recipe files that come with the package."""
    rows = []
    for file in recipe_files():
        names = ", ".join(f"**{name}**" if name == file.default else name for name in file.recipes)
        measured = sum(len(recipe.measured) for recipe in file.recipes.values())
        rows.append((f"`{file.model}`", file.summary, names, str(measured or "")))
    return table(("file", "model", "recipes (default in bold)", "measured rows"), rows)


def step_caches() -> str:
    """Step caches, with their settings."""
    parts = []
    for kind in CACHES.values():
        fields = kind.settings.model_fields
        rows = [
            (
                f"`{name}`",
                values(field.annotation, field.metadata),
                "required" if field.is_required() else f"`{plain(field.default)}`",
            )
            for name, field in fields.items()
        ]
        cite = f" ({papers(kind.cite)})" if kind.cite else ""
        parts.append(
            f"**`{kind.name}`**: `diffusers.{kind.config}`{cite}\n\n{table(('setting', 'values', 'default'), rows)}"
        )
    return "\n\n".join(parts)


def tested_versions() -> str:
    rows = [(package, versions.tested_versions(package)) for package in versions.OLDEST]
    return table(("library", "versions that the tests run on"), rows)


def stack() -> str:
    """What goes together with a sparse recipe, by the tests' own table."""
    from tests.stack import compatibility

    return table(*compatibility())


# ------------------------------------------------------------------------------------------------------------- figures


def results(name: str) -> dict[str, Any]:
    """A file of ``benchmarks/results``."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def run_of(name: str) -> str:
    """When, where and on what a result was measured, in a line."""
    file = results(name)
    where = file.get("environment", file)
    commits = file.get("git") or where["git"]
    commit = ", ".join(dict.fromkeys(commits.values())) if isinstance(commits, dict) else commits
    return f"*Measured on {where['date']}: {where['device']}, torch {where['versions']['torch']}, commit {commit}.*"


def density(name: str, shown: dict[str, str]) -> str:
    """All rows of a curve of quality over density."""
    from benchmarks.density_curve import table as curves

    return curves(results(name)["rows"], shown)


def vlm_patches(name: str) -> str:
    """What patches made of a vision-language model's answers, beside the stock one and controls."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    def moved(delta: Mapping[str, float] | None) -> str:
        value, low, high = (f"{round(100 * delta[key], 1) + 0:+.1f}" if delta else "" for key in ("value", "low", "high"))
        return f"{value} ({low} to {high})" if delta else ""

    def plain(figure: float | None, digits: str) -> str:
        return "" if figure is None else f"{figure:{digits}}".replace("0.", ".")

    lines = []
    for row in results(name)["rows"]:
        asked, told, p = row["pope"]["adversarial"], row["chair"], row["holm_p"]
        lines.append(
            (
                f"*{row['name']}*" if row["kind"] == "control" else row["name"].replace("dense", "stock"),
                percent(asked["hallucination_rate"]),
                moved(row["hallucination_delta"]),
                "<.001" if p is not None and p < 0.001 else plain(p, ".2g"),
                plain(asked["mcc"], ".3f"),
                plain((row["matched_offset"] or {}).get("mcc"), ".3f"),
                plain(asked["yes_ratio"], ".2f"),
                percent(told["chair_i"]),
                moved(row["chair_i_delta"]),
                plain(told["recall"], ".2f"),
                f"{told['mean_words']:.0f}",
            )
        )
    answers = ("hallucinates, %", "to stock, points (95 %)", "p", "MCC", "shifted threshold", "yes")
    return table(("", *answers, "CHAIR_I, %", "to stock, points (95 %)", "recall", "words"), lines)


def cpu_kernels() -> str:
    """Speed of block attention on a CPU, by the backend that `auto` takes: a row for each size, type and block."""
    cases: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in results("block_attention_cpu")["rows"]:
        compiled = row["dtype"] == "float32" and row["rest"] == "drop" and row["tokens"] >= FLEX_MIN_SLOTS
        if row["backend"] == ("flex" if compiled else "blocked") and row["density"] <= 0.3:
            cells = cases.setdefault((f"{row['tokens']:,}", row["dtype"], str(row["block"])), {})
            faster = row["dense_ms"]["p50"] / row["ms"]["p50"]
            cells[f"{row['rest']}, {row['density']:g}"] = f"{faster:.1f}x, {row['achieved_over_ideal']:.2f}"
    columns = sorted({column for cells in cases.values() for column in cells})
    rows = ((*case, *(cells.get(column, "") for column in columns)) for case, cells in cases.items())
    return table(("tokens", "type", "block", *columns), rows)


def repair_costs() -> str:
    """What repair and sampled rows cost, of dense attention: a row for each, a column for each size."""
    cases: dict[str, dict[str, str]] = {}
    for row in results("repair_overhead")["rows"]:
        size = f"{row['tokens']:,} tokens, heads of {row['head_dim']}"
        cases.setdefault(row["what"], {})[size] = f"{100 * row['share']['p50']:.1f} %"
    columns = list(dict.fromkeys(column for cells in cases.values() for column in cells))
    return table(("", *columns), ((what, *(cells[column] for column in columns)) for what, cells in cases.items()))


def guidance() -> str:
    """What guidance by heads comes to on the bundled video model: each arm, and what it differs by from the same guidance without it."""
    rows = []
    for arm in results("guidance")["arms"]:
        gain = next((value for key, value in arm.items() if key.startswith("agreement beside")), None)
        beside = "" if gain is None else f"{gain['mean']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})"
        rows.append((arm["arm"], str(arm["runs"]), f"{arm['agreement']:.2f}", beside, f"{arm['sharpness']:.4f}"))
    return table(("arm", "runs", "agreement", "beside the same guidance alone", "sharpness"), rows)


# --------------------------------------------------------------------------------------------------------------- house

ROOMS = {
    "cli": "the command line",
    "testing": "laws and tiny models",
    "demo": "before and after, in two minutes",
    "tuning": "searches for a recipe, and proves it",
    "calibration": "tables",
    "loading": "from disk",
    "weights": "real ones",
    "upscaling": "crop by crop",
    "comparison": "before and after, evaluators, reports",
    "inspection": "where a model attends",
    "plug": "apply, remove",
    "hosts": "in and out of diffusers and transformers",
    "recipe": "which patch, where, when",
    "families": "what tokens mean",
    "registry": "which patches there are",
    "patches": "one file, one method",
    "table": "what was calibrated",
    "kernels": "plans, orders, block attention",
    "chat": "prompts",
    "compat": "private names",
    "show": "print",
    "zoo": "small models",
    "call": "what a patch sees",
    "errors": "what users are told",
}
"""What is said of a room of the house, where there is room for it."""
ROW, WIDTH = 44, 660
"""Of the picture: pixels from one floor to the next, and of a floor."""


def house() -> str:
    """A picture of the layers of the package, from their contract in pyproject.toml, as HTML in the theme's colours."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    shapes = []
    for floor, layer in enumerate(layers):
        rooms = [room for room in layer.split(" | ") if room not in ("__main__", "version")]
        wide = (WIDTH - 10 * (len(rooms) - 1)) / len(rooms)
        for place, room in enumerate(rooms):
            x, y = 10 + place * (wide + 10), 10 + floor * ROW
            says = ROOMS.get(room, "")
            words = f'<tspan font-weight="700">{room}</tspan> {says if 8 * len(room + says) < wide else ""}'
            bold = ' stroke-width="2.5"' if room in ("patches", "kernels") else ""
            shapes.append(
                f'<rect x="{x:.0f}" y="{y}" width="{wide:.0f}" height="34" rx="6" fill="none" stroke="currentColor"{bold}/>'
            )
            shapes.append(f'<text x="{x + 10:.0f}" y="{y + 22}">{words}</text>')
    tall = len(layers) * ROW
    arrow = f'<path d="M695 12V{tall - 8}m-5-8 5 8 5-8" fill="none" stroke="currentColor" stroke-width="2"/>'
    along = f'<text transform="translate(714 {tall / 2 - 70:.0f}) rotate(90)">imports run down only</text>'
    head = f'<svg role="img" aria-label="The layers of the package" viewBox="0 0 730 {tall + 10}" font-size="14" fill="currentColor">'
    return f"<figure>{head}{''.join(shapes)}{arrow}{along}</svg></figure>"


# -------------------------------------------------------------------------------------------------------- command line


def helped(*arguments: str) -> str:
    """What ``accelplug ... --help`` prints, in 88 columns."""
    out = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "88", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        main([*arguments, "--help"])
    return out.getvalue().strip()


def commands() -> list[str]:
    """The commands, in the order of the help."""
    _, _, listed = helped().partition("commands:")
    return re.findall(r"^    (\w+) ", listed, re.MULTILINE)


def start() -> str:
    """README as the first page: its links lead to pages, and files that are not one are named only."""
    text = (
        (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](").replace("](CHANGELOG.md", "](changelog.md")
    )
    return re.sub(r"\[([^\]]+)\]\((?:[A-Z]\w+(?:\.md)?|examples/[^)]*)\)", r"\1", text)


def command_line() -> str:
    """The page of the command line."""
    parts = [
        "# Command line",
        "Every command ends with 0 if all is well, 1 if it found something wrong, 2 if it was asked wrongly.",
    ]
    for command in commands():
        parts.append(f"## accelplug {command}\n\n```text\n{helped(command)}\n```")
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------------ the site


MADE: Mapping[str, Callable[[], str]] = {
    "pipeline patches": pipeline_patches,
    "vision-language patches": partial(patches_of, "For vision-language models"),
    "geometry patches": partial(patches_of, "For geometry transformers"),
    "language patches": partial(patches_of, "For language models"),
    "rest matrix": rest_matrix,
    "order matrix": order_matrix,
    "shared settings": shared_settings,
    "denoisers": denoisers,
    "refused denoisers": refused_denoisers,
    "denoiser notes": denoiser_notes,
    "vlms": vlms,
    "shipped recipes": shipped_recipes,
    "step caches": step_caches,
    "tested versions": tested_versions,
    "stack": stack,
    "house": house,
    "cpu kernels": cpu_kernels,
    "repair costs": repair_costs,
    "guidance": guidance,
    **{
        f"rows {path.stem}": partial(vlm_patches, path.stem)
        for path in (ROOT / "benchmarks" / "results").glob("vlm_patches*.json")
    },
    "density layers": partial(density, "density_layers", {"error": "error"}),
    "density runs": partial(
        density, "density_runs", {"fg_psnr_db": "foreground dB", "psnr_db": "PSNR dB", "agreement": "agreement"}
    ),
    **{f"run {path.stem}": partial(run_of, path.stem) for path in (ROOT / "benchmarks" / "results").glob("*.json")},
}
"""What a mark in a page stands for."""


def generated() -> dict[str, str]:
    """Whole pages, by their path in the documentation."""
    own = {f"patches/{entry.name}.md": patch_page(entry) for entry in OWN}
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return {**own, "index.md": start(), "cli.md": command_line(), "changelog.md": papers(changelog)}


def rendered(text: str) -> str:
    """Return a page with its marks replaced, its drawings in place, and its code blocks without what tests are told of them."""
    text = re.sub(r"<!-- made: ([\w -]+) -->", lambda found: MADE[found[1]](), text)
    text = re.sub(r"!\[([^\]]*)\]\((\w+\.svg)\)", lambda found: drawing(found[2], found[1]), text)
    return re.sub(r"^```python \{.*\}$", "```python", text, flags=re.MULTILINE)


def drawing(name: str, says: str) -> str:
    """Return a drawing as HTML, so that it has the colours of the theme."""
    svg = (ROOT / "docs" / name).read_text(encoding="utf-8")
    svg = re.sub(r"\n\s*\n", "\n", svg.strip()).replace("<svg ", f'<svg role="img" aria-label="{says}" ', 1)
    return f"<figure>{svg}</figure>"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have the page of every patch in the navigation."""
    section = next(section["Patches"] for section in config.nav or [] if "Patches" in section)
    for group in GROUPS:
        section.append({group: [{entry.name: f"patches/{entry.name}.md"} for entry in OWN if group_of(entry) == group]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made whole."""
    from mkdocs.structure.files import File

    for path, content in generated().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace a page's marks."""
    return rendered(text)


def on_post_page(html: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that loads anything from elsewhere."""
    from mkdocs.exceptions import PluginError

    if found := re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>", html):
        raise PluginError(f"{page.file.src_uri} loads from the network: {found[0]}")
    return html
