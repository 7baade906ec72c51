"""Tables in recipes: which file, which row, and what they refuse to be used for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from accelplug import table as tables
from accelplug.call import Clock, Layout, Site
from accelplug.errors import AccelplugError, RecipeError
from accelplug.hosts.gate import settings
from accelplug.patches.base import Config
from accelplug.recipe import ModelFacts, load, read_file
from accelplug.registry import patch_class
from accelplug.table import Origin, Table, bucket

FACTS = ModelFacts(("AnyTransformer", "Base"), {"num_layers": 2, "patch_size": (1, 2, 2)})
GRID = (3, 4, 6)
ORIGIN = Origin(
    model={"class": "AnyTransformer", "num_layers": 2, "patch_size": [1, 2, 2]},
    grid_thw=GRID,
    axes={"steps": ("steps", "layers", "heads"), "weight": ("layers", "heads")},
)


class Weighted(Config):
    weight: float | Table = 1.0


def site(layer: int | None = 1, layers: int = 2) -> Site:
    return Site("blocks.1.attn1", "transformer", "self", layer, layers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(
        {"weight": torch.tensor([[0.25, 0.5], [0.75, 1.0]]), "steps": torch.arange(12).view(3, 2, 2)},
        tmp_path / "t.safetensors",
        ORIGIN.to_header(),
    )
    return tmp_path


def ref(folder: Path, **changes: Any) -> dict[str, Any]:
    sha256 = hashlib.sha256((folder / "t.safetensors").read_bytes()).hexdigest()
    return {"table": {"file": "t.safetensors", "sha256": sha256, "key": "weight", **changes}}


def recipe_file(folder: Path, **changes: Any) -> Path:
    values = ref(folder, **changes)["table"]
    text = f"""\
schema: 1
model: mine
match: {{class: AnyTransformer}}
default: a
recipes:
  a:
    rules:
      - patch: radial
        with:
          rest: pool
          rest_weight: {{table: {{file: "{values["file"]}", sha256: "{values["sha256"]}", key: {values["key"]}}}}}
"""
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


def test_a_recipe_reads_the_table_beside_it(folder: Path) -> None:
    recipe = load(recipe_file(folder), FACTS)
    config = recipe.decide(site(), Layout(GRID), Clock(0, 4)).config
    table = config["rest_weight"]
    assert isinstance(table, Table)
    assert table.origin.grid_thw == GRID
    assert torch.equal(table.at(site(1), Clock(0, 4)), torch.tensor([0.75, 1.0]))
    assert "table weight of t.safetensors" in read_file(folder / "mine.yaml").describe()
    assert "Table(weight, layers heads, 2x2" in recipe.describe()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"file": "u.safetensors"}, r"line 11.*rest_weight.*no such file"),
        ({"file": "../t.safetensors"}, r"line 11.*name without folders"),
        ({"sha256": "0" * 64}, r"line 11.*sha256 is .* another file"),
        ({"key": "wieght"}, r"line 11.*no table 'wieght' \(nearest: weight"),
        ({"sha256": "abc"}, r"line 8.*a table \{table"),
    ],
)
def test_what_is_not_that_table_is_refused_with_the_line(folder: Path, changes: dict[str, str], says: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){says}"):
        load(recipe_file(folder, **changes), FACTS)


def test_files_that_are_no_tables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"nonsense" * 10)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(RecipeError, match="not a file of tables"):
        Table.read(path, digest, "a")
    save_file({"a": torch.zeros(1)}, path, {"accelplug": '{"grid": [1, 2, 3]}'})
    with pytest.raises(RecipeError, match="unknown entries"):
        Table.read(path, hashlib.sha256(path.read_bytes()).hexdigest(), "a")
    monkeypatch.setattr(tables, "MAX_BYTES", 10)
    with pytest.raises(RecipeError, match="at most 10 bytes"):
        Table.read(path, digest, "a")


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (ModelFacts(("Other",), FACTS.config), "class 'Other' where the table has 'AnyTransformer'"),
        (ModelFacts(FACTS.class_names, {**FACTS.config, "num_layers": 3}), "num_layers 3 where the table has 2"),
        (ModelFacts(FACTS.class_names, {"num_layers": 2}), "patch_size '<none>'"),
    ],
)
def test_another_model_is_refused(folder: Path, facts: ModelFacts, says: str) -> None:
    inline = {"patch": "radial", "with": {"rest": "pool", "rest_weight": ref(folder, file=str(folder / "t.safetensors"))}}
    load(inline, FACTS)
    with pytest.raises(RecipeError, match=f"made for another model.*{says}"):
        load(inline, facts)


def test_another_grid_and_other_layers_are_refused(folder: Path) -> None:
    recipe = load(recipe_file(folder), FACTS)
    with pytest.raises(RecipeError, match=r"made for 3x4x6 tokens.*this run has 3x6x4"):
        recipe.decide(site(), Layout((3, 6, 4)), Clock(0, 4))
    with pytest.raises(RecipeError, match="rows for 2 layers, transformer has 3"):
        recipe.decide(site(layers=3), Layout(GRID), Clock(0, 4))
    anywhere = load({"patch": "radial", "with": {"rest": "pool", "rest_weight": Table(torch.ones(2, 2))}}, FACTS)
    assert anywhere.decide(site(), Layout((1, 2, 3)), Clock()).patch == "radial"


def test_rows_that_cannot_be_known_are_dense_with_a_reason() -> None:
    recipe = load(
        {"patch": "radial", "with": {"rest_weight": Table(torch.ones(4, 2, 2), ("steps", "layers", "heads"))}}, FACTS
    )
    assert "plug.step" in recipe.decide(site(), Layout(GRID), Clock()).reason
    assert "stands in none" in recipe.decide(site(None), Layout(GRID), Clock(0, 4)).reason
    assert recipe.decide(site(), Layout(GRID), Clock(0, 4)).patch == "radial"


def test_rows_by_step() -> None:
    table = Table(torch.arange(12).view(3, 2, 2), ("steps", "layers", "heads"))
    assert [table.at(site(1), Clock(step, 6)).tolist() for step in (0, 1, 2, 5)] == [[2, 3], [2, 3], [6, 7], [10, 11]]
    assert [bucket(Clock(step, 4), 4) for step in range(4)] == [0, 1, 2, 3]
    assert [bucket(Clock(step, 2), 4) for step in range(2)] == [0, 2]
    assert table.rows(2, 0).tolist() == [8, 9]


def test_tables_are_values() -> None:
    one, same, other = Table(torch.ones(2, 2)), Table(torch.ones(2, 2)), Table(torch.zeros(2, 2))
    assert one == same
    assert hash(one) == hash(same)
    assert repr(one) == repr(same) != repr(other)
    assert one != other
    assert Table(torch.ones(2, 2, dtype=torch.bfloat16)) != one
    assert Weighted(weight=one).weight is one
    with pytest.raises(ValueError, match="table"):
        Weighted(weight=cast(Any, "t.safetensors"))
    with pytest.raises(RecipeError, match="in this order"):
        Table(torch.ones(2, 2), ("heads", "layers"))
    with pytest.raises(AccelplugError, match="no more than the tensor has"):
        Table(torch.ones(2))


def test_settings_with_a_table_are_plain_data_by_its_name() -> None:
    """The gate keeps its verdicts by them."""
    table = Table(torch.ones(2, 2), key="weights")
    kept = settings(patch_class("radial")({"rest": "pool", "rest_weight": table}))
    assert kept["rest_weight"] == {"table": {"sha256": table.sha256, "key": "weights"}}
    assert json.loads(json.dumps(kept)) == kept
