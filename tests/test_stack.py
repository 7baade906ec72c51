"""A sparse recipe beside what else users put on a pipeline: each cell of the table is right, or refused in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import accelplug
from accelplug.errors import AccelplugError, UnsupportedError
from docs import pages
from tests import stack
from tests.stack import Cell

SPARSE = {"patch": "neighborhood", "with": {"block": 8, "window": [1, 3, 3], "backend": "reference"}}
NEUTRAL = {"patch": "neighborhood", "with": {"block": 8, "window": ["full", "full", "full"], "backend": "reference"}}
OFF = {"patch": "dense"}


@pytest.fixture(autouse=True)
def taken_off() -> Iterator[ExitStack]:
    """What takes layers off again whose traces other tests would notice."""
    torch._dynamo.reset()
    with ExitStack() as undo:
        yield undo
    torch._dynamo.reset()


def recipe(cell: Cell, rule: dict[str, Any]) -> dict[str, Any]:
    """The rule on all but the first block, from which step caches tell the others, with the cell's step cache."""
    caches = [layer.cache for layer in cell.layers if layer.cache is not None]
    rules = [rule if rule is OFF else {**rule, "where": {"layers": "1:"}}]
    return {"rules": rules, **({"cache": caches[0]} if caches else {})}


class Stacked:
    """A tiny pipeline with all layers of a cell on."""

    def __init__(self, cell: Cell, undo: ExitStack) -> None:
        self.cell = cell
        self.pipe, self.inputs = stack.pipeline()
        for layer in cell.layers:
            if layer.put is not None and (take_off := layer.put(self.pipe)) is not None:
                undo.callback(take_off)

    def run(self) -> Tensor:
        """What it gives as it is."""
        return self.pipe(**self.inputs, generator=torch.Generator().manual_seed(0))[0]

    def on(self, rule: dict[str, Any]) -> tuple[Tensor, Any]:
        """What it gives with a rule, and what the plug reports."""
        with accelplug.apply(self.pipe, recipe(self.cell, rule), gate="off") as plug:
            return self.run(), plug.report()


@dataclass(frozen=True)
class Results:
    """What a stack gives as it is, with a dense rule beside the cell's step cache, and with sparse ones."""

    stock: Tensor
    off: Tensor
    neutral: Tensor
    sparse: Tensor


@cache
def results(*names: str) -> Results:
    """Of layers that do not leave results as they are, every run held against the others."""
    with ExitStack() as undo:
        stacked = Stacked(Cell(tuple(stack.BY_NAME[name] for name in names)), undo)
        stock = stacked.run()
        (off, _), (neutral, _), (sparse, report) = (stacked.on(rule) for rule in (OFF, NEUTRAL, SPARSE))
        assert torch.equal(neutral, off), "a window that holds all is not dense"
        others = [name for name in names if stack.BY_NAME[name].kind != "cache"]
        assert len(others) == len(names) or not torch.equal(off, results(*others).off), "the step cache skips nothing"
        assert not torch.allclose(sparse, off, rtol=1e-4, atol=1e-5)
        assert report.served["neighborhood"]
        assert not report.fallbacks
        assert torch.equal(stacked.run(), stock), "something is left of the recipe"
    return Results(stock, off, neutral, sparse)


@pytest.mark.parametrize("cell", stack.cells(), ids=str)
def test_every_cell(cell: Cell, taken_off: ExitStack) -> None:
    if cell.absent is not None:
        pytest.skip(f"{cell.absent}: {cell} is not tried")
    if cell.outcome == "apart":
        with pytest.raises(Exception, match=cell.says):
            Stacked(cell, taken_off).run()
        return
    if cell.outcome == "refused":
        with pytest.raises(AccelplugError, match=cell.says):
            Stacked(cell, taken_off).on(SPARSE)
        return
    expected = results(*(layer.name for layer in cell.layers if not layer.transparent))
    if not any(layer.transparent for layer in cell.layers):
        return
    stacked = Stacked(cell, taken_off)
    sparse, report = stacked.on(SPARSE)
    assert report.served.get("neighborhood") or any("neighborhood" in said for said in report.compiled)
    assert not report.fallbacks
    torch.testing.assert_close(sparse, expected.sparse, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stacked.run(), expected.stock, rtol=1e-4, atol=1e-5)


def test_a_step_cache_beside_one_of_cache_dit_is_refused() -> None:
    pipe, _ = stack.pipeline()
    pipe.transformer._is_cached = True  # as cache-dit marks what it wraps
    cached = {"rules": [OFF], "cache": {"kind": "first_block"}}
    with pytest.raises(UnsupportedError, match="cache-dit has a step cache on transformer already"):
        accelplug.apply(pipe, cached)
    with accelplug.apply(pipe, {"rules": [SPARSE]}):
        pass


def test_the_documentation_has_the_table() -> None:
    heading, lines = stack.compatibility()
    page = pages.rendered((pages.ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8"))
    assert pages.table(heading, lines) in page
    assert {cell for line in lines for cell in line[1:]} <= {"works", "refused", "apart", ""}
