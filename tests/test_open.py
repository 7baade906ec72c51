"""Patches of other packages: what registering one asks of it, by which names it is found, and what a broken package does."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pydantic import Field

import accelplug
from accelplug import catalog, families, registry
from accelplug.call import AttentionCall, Layout
from accelplug.cli import main
from accelplug.errors import AccelplugError, NoMatchError, RecipeError
from accelplug.families.base import SELF_AND_CROSS, Family, latents
from accelplug.families.vlm import Vlm, list_vlms
from accelplug.kernels.orders import Tiles
from accelplug.kernels.plan import BlockPlan
from accelplug.patches.base import Patch
from accelplug.patches.generation import GenerationPatch
from accelplug.patches.sparse.radial import Radial
from accelplug.patches.sparse.template import BlockConfig, BlockSparse, Scored
from accelplug.registry import PATCH_FAMILIES, entry_of, list_patches, patch_class, patch_entry, register_patch
from accelplug.testing.laws import laws, run_once
from accelplug.testing.models import build_denoiser, wan
from accelplug.testing.registered import registered
from accelplug.tuning import space


class Diagonal(BlockSparse):
    """Every block reads itself and those up to `reach` blocks away."""

    class Config(BlockConfig):
        reach: int = Field(0, ge=0, description="Blocks to both sides.")

    name, cite, summary = "diagonal", "unpublished", "Every block reads those around it."
    config: Config

    def neutral(self, layout: Layout) -> bool:
        return self.config.reach >= 1000

    def select(self, tiles: Tiles, **where: Any) -> BlockPlan:
        blocks = torch.arange(tiles.slots // self.config.unit)
        return self.plan((blocks[:, None] - blocks).abs() <= self.config.reach, tiles)


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> catalog.Catalog[Any]:
    """A catalog of our own patches that tests may fill, with entry points not read yet."""
    fresh = catalog.Catalog(
        "patch", {entry.name: entry for entry in registry._OWN}, catalog.EntryPoints("accelplug.patches", register_patch)
    )
    monkeypatch.setattr(registry, "PATCH_CATALOG", fresh)
    return fresh


def test_our_own_keep_what_is_asked_of_others() -> None:
    for entry in list_patches():
        cls = patch_class(entry.name)
        assert not list(registry._unfinished(cls, entry.family)), entry.name
        assert entry.family in PATCH_FAMILIES
        assert cls.family in ("", entry.family)
        assert all(field.description for field in cls.Config.model_fields.values()), entry.name


@pytest.mark.usefixtures("shelf")
def test_a_registered_patch_is_found_by_its_name() -> None:
    before = list_patches()
    assert register_patch(Diagonal) is Diagonal
    assert register_patch(Diagonal) is Diagonal
    assert [entry.name for entry in list_patches()] == [*(entry.name for entry in before), "diagonal"]
    assert patch_entry("diagonal").family == "sparse"
    assert patch_class("diagonal") is Diagonal
    assert entry_of("diagonal") == entry_of(Diagonal) == entry_of(Diagonal({"reach": 1})) == patch_entry("diagonal")


@pytest.mark.usefixtures("shelf")
def test_the_cell_of_a_notebook_may_run_again() -> None:
    def cell(summary: str) -> type[Patch]:
        class Mine(Diagonal):
            name = "mine"

        Mine.summary = summary
        return register_patch(Mine)

    cell("Once.")
    latest = cell("Twice.")
    assert patch_class("mine") is latest
    assert patch_entry("mine").summary == "Twice."


@pytest.mark.usefixtures("shelf")
def test_an_instance_needs_no_registration() -> None:
    class TwoHalves(Diagonal):
        name = ""

    assert entry_of(TwoHalves({"reach": 2})).name == "two_halves"
    assert entry_of(Radial()) == patch_entry("radial")
    with pytest.raises(NoMatchError, match="two_halves"):
        patch_entry("two_halves")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"raech": 1}, r"Settings of Diagonal: there is no key 'raech' \(nearest: reach\); known: block, .*, reach"),
        ({"reach": -1, "block": 12}, "block: input should be a multiple of 8, got '12'; reach: input should be greater"),
        ({"block": 24, "block_k": 16}, "one of block 24 and block_k 16 must divide the other"),
        ([1], "valid dictionary or instance of Config"),
    ],
)
def test_settings_of_an_instance_are_told_in_our_words(settings: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Diagonal(settings)


@pytest.mark.usefixtures("shelf")
def test_one_of_ours_is_registered_already() -> None:
    before = list_patches()
    assert register_patch(Radial) is Radial
    assert list_patches() == before


def bare(**attributes: Any) -> type:
    return type("Bare", (Diagonal,), attributes)


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (object, "derives from accelplug.patches.base.Patch"),
        (Diagonal({}), "derives from accelplug.patches.base.Patch"),
        (bare(name="Mine"), "small letters"),
        (bare(name="dense"), "small letters"),
        (bare(name="sol"), "cannot be registered: expected a name that is free"),
        (bare(cite=" "), "'unpublished'"),
        (bare(summary="one\ntwo"), "one line"),
        (bare(family="sparce"), "nearest: sparse"),
        (bare(needs={"hidden"}), "`needs` names hidden"),
        (bare(Config=dict), "`Config` must derive"),
        (bare(Config=type("Config", (BlockConfig,), {"__annotations__": {"k": int}, "k": 1})), "k has none"),
        (type("Half", (Patch,), {"family": "heads"}), r"define prepare\(\).*define attend\(\)"),
        (type("Half", (BlockSparse,), {}), r"define select\(\), as each BlockSparse"),
        (type("Half", (Scored,), {}), r"define route\(\), as each Scored"),
        (type("Half", (GenerationPatch,), {}), r"define generate\(\)"),
    ],
)
def test_what_is_lacking_is_named(cls: Any, said: str) -> None:
    before = list_patches()
    with pytest.raises(AccelplugError, match=said):
        register_patch(cls)
    assert list_patches() == before


@pytest.mark.usefixtures("shelf")
def test_all_that_is_lacking_is_named_at_once() -> None:
    with pytest.raises(AccelplugError) as caught:
        register_patch(type("Half", (Scored,), {}))
    assert all(word in str(caught.value) for word in ("route()", "`name`", "`cite`", "`summary`"))


@pytest.mark.usefixtures("shelf")
def test_an_instance_that_cannot_run_or_be_told_apart_is_refused() -> None:
    with pytest.raises(AccelplugError, match=r"define select\(\)"):
        entry_of(type("Half", (BlockSparse,), {})())
    with pytest.raises(AccelplugError, match="give it a `name` of its own"):
        entry_of(bare(name="sol")())
    with pytest.raises(AccelplugError, match="Expected a patch"):
        entry_of(3)  # type: ignore[arg-type]


@pytest.mark.usefixtures("shelf")
def test_entry_points_are_read_when_a_name_is_missing_and_broken_ones_break_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "accelplug.patches"
    offered = [
        EntryPoint("gone", "no_such_package_of_theirs:Gone", group),
        EntryPoint("diagonal", f"{__name__}:Diagonal", group),
        EntryPoint("sol", f"{__name__}:NOT_A_PATCH", group),
    ]
    asked: list[str] = []

    def points(*, group: str) -> list[EntryPoint]:
        asked.append(group)
        return offered

    monkeypatch.setattr(catalog, "entry_points", points)
    assert patch_entry("radial").name == "radial"
    assert not asked, "a name of ours asks no package"
    with pytest.warns(RuntimeWarning) as warned:
        assert patch_class("diagonal") is Diagonal
    assert len(warned) == 2
    assert "no_such_package_of_theirs" in str(warned[0].message)
    with pytest.raises(NoMatchError, match=r"offers it, and fails: ModuleNotFoundError"):
        patch_entry("gone")
    assert len(list_patches()) == len(registry._OWN) + 1
    assert asked == [group]


NOT_A_PATCH = "a string"


@pytest.mark.usefixtures("shelf")
def test_the_decorator_is_public() -> None:
    assert accelplug.register_patch is register_patch


@pytest.mark.usefixtures("shelf")
def test_it_is_listed_and_goes_on_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = build_denoiser(wan)
    recipe = {"rules": [{"where": {"layers": "1:"}, "patch": "diagonal", "with": {"block": 8, "backend": "reference"}}]}
    with registered(Diagonal):
        assert main(["list", "patches"]) == 0
        assert "Every block reads those around it." in capsys.readouterr().out
        with accelplug.apply(model, recipe, gate="off") as plug:
            run_once(model, inputs)
            assert [row.name for row in plug.where()] == ["dense", "diagonal", "diagonal"]
            assert plug.report().served["diagonal"] == 2
        with pytest.raises(RecipeError, match="reach"):
            accelplug.apply(model, {"patch": "diagonal", "with": {"raech": 1}})
    with pytest.raises(RecipeError, match="there is no patch 'diagonal'"):
        accelplug.apply(model, recipe)


@pytest.mark.usefixtures("shelf")
def test_tune_tries_the_ladder_of_a_patch_that_it_is_told() -> None:
    layout = Layout((3, 16, 16))
    with registered(Diagonal), pytest.raises(AccelplugError, match="no settings to try for 'diagonal'"):
        space.arms(layout, ["diagonal"])
    with registered(type("Diagonal", (Diagonal,), {"ladder": ({"reach": 2}, {"reach": 4}), "__module__": "theirs"})):
        found = space.arms(layout, ["diagonal"])
        assert {arm.patch for arm in space.arms(layout)} == set(space.LADDERS), "what others bring is tried by name alone"
    assert [str(arm) for arm in found] == [
        "diagonal reach=2 rest=drop",
        "diagonal reach=2 rest=pool",
        "diagonal reach=4 rest=drop",
        "diagonal reach=4 rest=pool",
    ]


# -------------------------------------------------------------------------------------------------------------------- the laws


def leaks(self: Diagonal, call: AttentionCall, params: Any) -> torch.Tensor:
    out = Diagonal.attend(self, call, params)
    return out + 0.01 * out.mean(0, keepdim=True)


def breaks(self: Diagonal, call: AttentionCall, params: Any) -> torch.Tensor:
    return Diagonal.attend(self, call, params) / 0.0


def does_nothing(self: Diagonal, call: AttentionCall, params: Any) -> torch.Tensor:
    return call.dense()


CALLS: list[int] = []


def remembers(self: Diagonal, call: AttentionCall, params: Any) -> torch.Tensor:
    CALLS.append(1)
    return Diagonal.attend(self, call, params) * (1 + 0.01 * (len(CALLS) % 7))


def forgets_text(self: Diagonal, members: torch.Tensor, tiles: Tiles) -> BlockPlan:
    lengths = tiles.lengths(self.config.block)
    return BlockPlan.from_members(members, lengths, lengths, self.config.block, self.config.block)


def never_neutral(self: Diagonal, layout: Layout) -> bool:
    return False


@pytest.mark.parametrize(
    ("flaw", "law", "model"),
    [
        ({"neutral": never_neutral, "attend": leaks}, "neutral_is_exact", "wan"),
        ({"attend": breaks}, "it_does_something_and_undoes_it", "wan"),
        ({"attend": does_nothing}, "it_does_something_and_undoes_it", "flux"),
        ({"attend": leaks}, "the_kernel_at_density_one_is_dense", "wan, one slot filled"),
        ({"attend": leaks}, "batch_two_is_two_batches_of_one", "wan"),
        ({"plan": forgets_text}, "text_stays_dense", "cogvideox"),
        ({"plan": forgets_text}, "text_stays_dense", "flux"),
        ({"attend": does_nothing}, "other_instances_and_threads_notice_nothing", "wan"),
        ({"attend": breaks}, "low_precision_stays_finite", "wan"),
        ({"attend": remembers}, "nothing_is_left_of_a_run", "wan pipeline"),
    ],
)
@pytest.mark.usefixtures("shelf")
def test_a_law_finds_the_patch_that_breaks_it(flaw: dict[str, Any], law: str, model: str) -> None:
    broken = type("Broken", (Diagonal,), {"name": "broken", **flaw})
    every = laws(broken, {"reach": 0}, neutral={"reach": 1000}, everything={"reach": 999})
    (found,) = [found for found in every if found.check.__name__ == law and found.model == model]
    with pytest.raises(AssertionError, match=f"broken on {model}, {law.replace('_', ' ')}: "):
        found()
    assert "broken" not in [entry.name for entry in list_patches()]


def test_the_laws_need_no_pytest() -> None:
    for path in (Path(accelplug.__file__).parent / "testing").glob("*.py"):
        assert not re.search(r"^\s*(?:import|from) pytest", path.read_text(encoding="utf-8"), re.MULTILINE), path


@pytest.mark.usefixtures("shelf", "own_families")
def test_what_is_registered_for_a_while_is_gone_behind_it() -> None:
    theirs = Vlm("theirs", ("TheirForConditionalGeneration",))
    for thing, known in ((Diagonal, list_patches), (OWN, families.list_families), (theirs, list_vlms)):
        before = known()
        with registered(thing):
            assert len(known()) == len(before) + 1
            with registered(thing):
                assert len(known()) == len(before) + 1
            assert len(known()) == len(before) + 1, "what was registered before stays"
        assert known() == before


# ------------------------------------------------------------------------------------------------------------------ families

OWN = Family("own", ("OwnTransformer", "OwnerTransformer"), SELF_AND_CROSS, latents("bcthw"))


@pytest.fixture
def own_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that tests may add to, with entry points not read yet."""
    known = {cls: family for family in families.FAMILIES for cls in family.classes}
    points = catalog.EntryPoints("accelplug.families", families.register_family)
    monkeypatch.setattr(families, "FAMILY_CATALOG", catalog.Catalog("denoiser class", known, points))


@pytest.mark.usefixtures("own_families")
def test_a_denoiser_of_another_package_is_patched_once_its_family_is_registered() -> None:
    model, inputs = build_denoiser(wan)
    model.__class__ = type("TheirTransformer", (type(model),), {})
    recipe = {"rules": [{"patch": "radial", "with": {"block": 8, "backend": "reference"}}]}
    assert families.family_of(model) is families.FAMILIES[0], "a class that derives from Wan is taken for Wan"
    left_alone = Family("theirs", ("TheirTransformer",), (("blocks.0.attn1", "self"),), latents("bcthw"))
    assert accelplug.register_family(left_alone) is accelplug.register_family(left_alone)
    assert families.family_of(model) is left_alone, "the more derived class decides"
    assert families.list_families()[-1] is left_alone
    with accelplug.apply(model, recipe, gate="off") as plug:
        run_once(model, inputs)
        assert [(row.site.module, row.name) for row in plug.where() if row.site] == [("blocks.0.attn1", "radial")]


@pytest.mark.usefixtures("own_families")
@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("wan", "expected an accelplug.families.base.Family"),
        (replace(OWN, classes=()), "`classes` must be a tuple"),
        (replace(OWN, classes=cast(Any, "OwnTransformer")), "`classes` must be a tuple"),
        (replace(OWN, sites=()), "`sites` names no attention module"),
        (replace(OWN, sites=(("blocks.*", cast(Any, "sideways")),)), "got 'sideways'"),
        (replace(OWN, geometry=None), "`geometry` must be a function"),
        (replace(OWN, name="wan"), "another family of that name"),
        (replace(OWN, classes=("FluxTransformer2DModel",)), "expected a name that is free"),
    ],
)
def test_what_a_family_lacks_is_named(family: Any, said: str) -> None:
    with pytest.raises(AccelplugError, match=said):
        accelplug.register_family(family)
    assert families.list_families() == families.FAMILIES
