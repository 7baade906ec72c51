"""Recipes: what the grammar means, what it refuses and how it says so, and that recording keeps a file as it was."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accelplug import recipe as recipes
from accelplug.call import Clock, Kind, Layout, Site
from accelplug.errors import AccelplugError, NoMatchError, RecipeError
from accelplug.patches.guidance.contrast import Contrast
from accelplug.patches.sparse.radial import Radial
from accelplug.recipe import (
    ModelFacts,
    Recipe,
    Span,
    at_depth,
    load,
    matching_files,
    read_file,
    reading,
    record_measurement,
    shipped_files,
)
from accelplug.registry import patch_class

FACTS = ModelFacts(("AnyTransformer",), {})
WAN_14B = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16}
FILE = """\
# A comment on top.
schema: 1
model: mine
match: {class: AnyTransformer}
default: a
recipes:
  a:
    cite: "arXiv 2506.19852"  # where from
    rules:
      - where: {layers: "1:"}
        patch: radial
        with: {decay: 0.5}  # a setting
    measured: []  # none yet

  # A comment between.
  b:
    rules: [{patch: dense}]
# The end.
"""
ROW = {
    "date": "2026-01-02",
    "device": 'a: "GPU", really',
    "versions": {"torch": "2.13.0"},
    "seeds": [0, 1],
    "dense_ms": {"p20": 9.0, "p50": 10.0, "p80": 11.0},
    "ms": {"p20": 4.0, "p50": 5.0, "p80": 6.5},
    "psnr_db": {"mean": 30.5, "worst": 28.0},
}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grammar alone, without the patches' own settings."""
    monkeypatch.setattr(recipes.Recipe, "check", lambda self: None)


def site(layer: int = 1, kind: Kind = "self", denoiser: str = "transformer") -> Site:
    return Site(f"blocks.{layer}.attn1", denoiser, kind, layer, 40)


def inline(**rule: Any) -> Recipe:
    return load({"rules": [{"patch": "radial", **rule}]}, FACTS)


def write(tmp_path: Path, text: str, name: str = "mine.yaml") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("path", shipped_files().values(), ids=lambda path: path.stem)
def test_shipped_files_load_and_their_settings_are_valid(path: Path) -> None:
    file = read_file(path)
    assert file.model == path.stem
    for recipe in file.recipes.values():
        assert recipe.cite.startswith(("arXiv ", "OpenReview "))
        recipe.check()


@pytest.mark.parametrize("path", shipped_files().values(), ids=lambda path: path.stem)
def test_recipes_and_patches_that_were_used_can_be_copied_and_sent_to_other_processes(path: Path) -> None:
    for recipe in read_file(path).recipes.values():
        before = recipe.decide(site(), Layout((4, 8, 8)), Clock(9, 10))
        patches = [patch_class(rule.patch)(at_depth(rule.settings, 40)) for rule in recipe.rules if rule.patch != "dense"]
        for twin, copies in (copy.deepcopy((recipe, patches)), pickle.loads(pickle.dumps((recipe, patches)))):
            assert twin.decide(site(), Layout((4, 8, 8)), Clock(9, 10)) == before
            assert [patch.config for patch in copies] == [patch.config for patch in patches]


def test_import_and_listing_bring_no_torch() -> None:
    code = "import sys, accelplug.recipe as r; assert r.list_recipes(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=recipes.SHIPPED.parents[1])


@pytest.mark.parametrize(
    ("text", "count", "inside"),
    [
        ("0:25%", 50, range(12)),  # round(12.5) is 12
        ("1:", 4, [1, 2, 3]),
        (":-1", 4, [0, 1, 2]),
        ("-2:", 4, [2, 3]),
        ("-1", 4, [3]),
        (3, 4, [3]),
        ("90:", 4, []),
        ("-9:2", 4, [0, 1]),
        ("-50%:", 4, [2, 3]),
    ],
)
def test_spans(text: int | str, count: int, inside: list[int] | range) -> None:
    assert [i for i in range(count) if Span.parse(text).holds(i, count)] == list(inside)


@pytest.mark.parametrize("text", ["a", "5:3", "2:2", "50%", "0:120%", "1:2:3", "", True, 1.5])
def test_spans_that_mean_nothing_are_refused(text: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Span.parse(text)


def test_first_match_wins_and_the_rest_is_dense(unchecked: None) -> None:
    rules = [
        {"where": {"steps": "0:25%"}, "patch": "dense"},
        {"where": {"layers": [1, "-1:"], "kind": "self"}, "patch": "radial"},
        {"where": {"tokens": ">=100", "grid": "*x5x*"}, "patch": "sol"},
    ]
    recipe = load({"rules": rules}, FACTS)
    late, big = Clock(20, 50), Layout((4, 5, 5))
    assert recipe.decide(site(), None, Clock(3, 50)).patch is None
    assert recipe.decide(site(), None, late).patch == "radial"
    assert recipe.decide(site(39), None, late).patch == "radial"
    assert recipe.decide(site(2), big, late).patch == "sol"
    assert recipe.decide(site(2), Layout((4, 4, 9)), late) == recipes.DENSE
    assert "grid" in recipe.decide(site(2), None, late).reason


def test_what_cannot_be_known_is_dense_with_a_reason_where_it_matters(unchecked: None) -> None:
    recipe = load(
        {"rules": [{"where": {"steps": "0:25%"}, "patch": "dense"}, {"where": {"layers": "1:"}, "patch": "radial"}]}, FACTS
    )
    assert "step" in recipe.decide(site(1), None, Clock()).reason
    assert "number" in recipe.decide(site(1), None, Clock(3)).reason
    assert recipe.decide(site(0), None, Clock()) == recipes.DENSE
    assert not recipe.may_touch(site(0))
    assert recipe.may_touch(site(1))
    assert "branch" in inline(where={"branch": "cond"}).decide(site(), None, Clock(1, 2)).reason
    assert inline(where={"steps": "1:3"}).decide(site(), None, Clock(2)).patch == "radial"


def test_ramps(unchecked: None) -> None:
    ramp = inline(**{"with": {"tau": {"from": 1.3, "to": 0.8, "over": "steps"}}})
    assert [ramp.decide(site(), None, Clock(i, 3)).config["tau"] for i in range(3)] == [1.3, 1.05, 0.8]
    assert "step" in ramp.decide(site(), None, Clock()).reason
    layers = inline(**{"with": {"tau": {"from": 0, "to": 39, "over": "layers"}}})
    assert layers.decide(site(7), None, Clock()).config["tau"] == 7


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("layers:", "layer:", r"line 10.*no key 'layer' \(nearest: layers\)"),
        ("patch: radial", "patch: radail", r"line 11.*nearest: radial"),
        ("decay: 0.5", "decay: .nan", "line 12.*finite"),
        ("schema: 1", "schema: 2", "upgrade"),
        ("default: a", "default: c", "line 5: default: 'c' is not a recipe"),
        ("default: a", "default: a\ndefault: b", "line 6.*twice, first in line 5"),
        ("decay: 0.5", "decay: !!python/name:os.system x", "tags"),
        ("layers:", "heads:", "line 10.*heads is not built"),
        ("patch: radial", "patch: [radial, sol]", "line 11.*takes one patch, got 2"),
        ("[]  #", "[{device: x}]  #", "line 13.*'date' is missing"),
        ("{decay: 0.5}", "&x {decay: 0.5, y: *x}", "line 12.*alias"),
        ("default: a", "[" * 5000, "nested|valid YAML"),
        ("match: {class: AnyTransformer}", "match: {num_layers: 3}", "line 4.*key class"),
    ],
)
def test_errors_say_what_and_where(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){says}"):
        read_file(write(tmp_path, FILE.replace(old, new, 1)))


def test_alias_bombs_and_huge_files_are_refused_before_they_cost(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(RecipeError, match="alias"):
        read_file(write(tmp_path, bomb))
    huge = tmp_path / "huge.yaml"
    with huge.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(RecipeError, match="at most"):
        read_file(huge)


@pytest.mark.parametrize("name", ["../x", "..", "/etc/passwd", "a\\b", "wan2.1-t2v-14b/../x", "a/b/c", "C:x", "a\0b", ""])
def test_names_reach_no_path(name: str) -> None:
    with pytest.raises(RecipeError, match="not a recipe name"):
        load(name, FACTS)


@pytest.mark.parametrize("bad", [{"x": 1}, {}, 7, {"rules": []}, {"patch": "dense", "with": {"a": 1}}, "no-such/file"])
def test_every_error_is_ours(bad: Any) -> None:
    with pytest.raises(AccelplugError):
        load(bad, FACTS)


def test_yaml_11_surprises_are_off(tmp_path: Path, unchecked: None) -> None:
    text = FILE.replace('layers: "1:"', "layers: 1:30, branch: no")
    where = read_file(write(tmp_path, text)).recipes["a"].rules[0].where
    assert where.layers[0].text == "1:30"
    assert where.branch == ("no",)


def test_settings_are_checked_against_the_patch(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"line 12.*'decy' \(nearest: decay"):
        load(write(tmp_path, FILE.replace("decay", "decy")), FACTS)
    ramp = {"decay": {"from": 0.5, "to": 7, "over": "steps"}}
    with pytest.raises(RecipeError, match="less than or equal to 1"):
        load({"patch": "radial", "with": ramp}, FACTS)


def test_models_find_their_files(tmp_path: Path, unchecked: None) -> None:
    both = ("WanTransformer3DModel", "ModelMixin")
    wan21 = ModelFacts(both, WAN_14B, frozenset({"transformer", "vae"}))
    wan22 = ModelFacts(both, WAN_14B, frozenset({"transformer", "transformer_2"}))
    assert [file.model for file in matching_files(wan21)] == ["wan2.1-t2v-14b"]
    assert load(None, wan22).name == "wan2.2-t2v-a14b/sol"
    assert load("radial", wan21).name == "wan2.1-t2v-14b/radial"
    bare = ModelFacts(both, WAN_14B)
    with pytest.raises(RecipeError, match=r"several.*wan2.1-t2v-14b/radial or wan2.2-t2v-a14b/radial"):
        load("radial", bare)
    assert load("wan2.2-t2v-a14b/radial", bare).model == "wan2.2-t2v-a14b"
    with pytest.raises(RecipeError, match=r"is for class: Flux.*this model has class: Wan"):
        load("flux.1-dev/sol", wan21)
    with pytest.raises(NoMatchError, match="nearest: radial"):
        load("radail", wan21)
    with pytest.raises(NoMatchError, match="No shipped recipe file"):
        load(None, FACTS)
    assert load(write(tmp_path, FILE), FACTS).name == "mine/a"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("recipe", ["a", "b"])
def test_recording_adds_lines_and_changes_no_other(tmp_path: Path, recipe: str, newline: str) -> None:
    path = write(tmp_path, FILE.replace("\n", newline))
    record_measurement(path, recipe, ROW)
    once = path.read_bytes().decode()
    record_measurement(path, recipe, ROW)
    twice = path.read_bytes().decode()
    (added,) = {line for line in once.split(newline) if "date:" in line}
    assert twice == once.replace(added, added + newline + added)
    kept = once.replace(added + newline, "")
    stock = FILE.replace("\n", newline)
    assert kept in (
        stock.replace("measured: []  #", "measured:  #"),
        stock.replace("# The end", f"    measured:{newline}# The end"),
    )
    rows = read_file(path).recipes[recipe].measured
    assert [row.device for row in rows] == [ROW["device"]] * 2


def test_a_row_that_is_wrong_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, FILE)
    for row in ({**ROW, "psnr": 1}, {**ROW, "seeds": []}, {**ROW, "psnr_db": {"mean": float("inf"), "worst": 1}}):
        with pytest.raises(RecipeError):
            record_measurement(path, "a", row)
    with pytest.raises(NoMatchError):
        record_measurement(path, "c", ROW)
    assert path.read_text() == FILE


def test_what_holds_an_instance_is_told_by_class_and_settings_and_cannot_be_written() -> None:
    recipe = load({"rules": [{"where": {"layers": "1:"}, "patch": Radial({"decay": 0.5})}]}, FACTS)
    decision = recipe.decide(site(2), Layout((4, 4, 9)), Clock())
    assert (decision.patch, decision.config, decision.instance) == ("radial", {"decay": 0.5}, recipe.rules[0].patch)
    assert recipe.describe().splitlines()[1] == "  layers 1:: Radial(decay=0.5)"
    assert recipe.named(0) == "Rule 1 of custom (radial where layers 1:)"
    with pytest.raises(RecipeError, match=r"holds an instance, Radial\(decay=0.5\), which no file can hold"):
        recipe.to_mapping()


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (Radial, r"got the class Radial; call it: Radial\(\)"),
        ({"patch": Radial}, "got the class Radial"),
        (
            {"patch": Radial(), "with": {"decay": 0.5}},
            r"an instance, Radial\(\), and has its settings; remove with: {decay}",
        ),
        ({"patch": [Radial()]}, "expected a name or a list of names"),
        (object(), "a class that derives from"),
        (5, "A recipe is a name, .* or an instance of a patch, got 5"),
        ({"where": {"layers": 1}, "patch": Contrast()}, "contrast stands around generate"),
    ],
)
def test_what_is_no_instance_of_a_patch_is_refused(recipe: Any, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        load(recipe, FACTS)


def test_a_recipe_as_a_mapping_reads_back() -> None:
    for path in shipped_files().values():
        for recipe in read_file(path).recipes.values():
            again = load(recipe.to_mapping(), FACTS)
            assert again.rules == recipe.rules
            assert again.cache == recipe.cache


@pytest.mark.parametrize(
    ("layers", "saliency", "enhance"), [(32, 11, (12, 23)), (28, 10, (11, 20)), (40, 14, (15, 29)), (2, 1, (1, 2))]
)
def test_layers_that_a_setting_names_scale_with_the_depth(layers: int, saliency: int, enhance: tuple[int, int]) -> None:
    recipe = load({"patch": "gift", "with": {"saliency_layer": "34%", "enhance": ["38%", "72%"]}}, FACTS)
    decision = recipe.decide(Site("layers.1.self_attn", "language_model", "self", 1, layers), None, Clock())
    config = patch_class("gift")(decision.config).config.model_dump()
    assert (config["saliency_layer"], config["enhance"]) == (saliency, enhance)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"patch": "gift", "with": {"alpha": "50%"}},
            "alpha: only layers are told in percent of the depth, and alpha of gift",
        ),
        ({"patch": "radial", "with": {"block": "50%"}}, "block of radial is not one; write a number"),
        ({"patch": "gift", "with": {"enhance": ["72%", "38%"]}}, "enhance: expected layers from and up to"),
        ({"patch": "gift", "with": {"enhance": ["38%", "200%"]}}, "enhance"),
        ({"patch": "gift", "with": {"enhance": [["38%", "72%"], 30]}}, "enhance"),
    ],
)
def test_percents_elsewhere_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        load(settings, FACTS)


def test_a_file_for_every_vision_language_model_serves_where_none_is_for_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    general = FILE.replace("mine", "vlm").replace("class: AnyTransformer", "vlm: true")
    monkeypatch.setattr(reading, "SHIPPED", tmp_path)
    write(tmp_path, FILE)
    write(tmp_path, general, "vlm.yaml")
    known, other = ModelFacts(FACTS.class_names, {}, vlm=True), ModelFacts(("Other",), {}, vlm=True)
    assert [file.model for file in matching_files(known)] == ["mine"]
    assert [file.model for file in matching_files(other)] == ["vlm"]
    assert matching_files(ModelFacts(("Other",), {})) == []
    with pytest.raises(RecipeError, match="is for vlm: True; this model has vlm: False"):
        load("vlm/a", FACTS)
    with pytest.raises(RecipeError, match="expected the key class, the model's class name, or vlm: true"):
        read_file(write(tmp_path, FILE.replace("class: AnyTransformer", "vlm: false"), "no.yaml"))
