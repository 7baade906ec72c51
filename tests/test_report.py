"""The page: it holds every point's details as data, parses, escapes what it is told, and asks the network for nothing."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accelplug.comparison.result import Comparison
from accelplug.comparison.rows import DENSE_ROW, Row, Sample
from accelplug.errors import AccelplugError
from accelplug.hosts.gate import Verdict
from accelplug.recipe import Recipe, load
from accelplug.tuning.budget import parse_budget
from accelplug.tuning.result import Point, Tuned
from tests import tiny_pipelines

EVIL = "</script><!--<script>alert(\"1\")</script> & 'b' <!--DATA-->"
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """What a browser would read: the nesting of tags, the cells of the table, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.scripts: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "script"):
            (self.cells if tag == "td" else self.scripts).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "script"):
            (self.cells if self.open[-1] == "td" else self.scripts)[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        assert len(self.scripts) == 2, "the data and the script, and no other"
        return json.loads(self.scripts[0])


def comparison(*rows: Row) -> Comparison:
    clip = np.zeros((3, 8, 12, 3), np.uint8)
    runs = [(0, 0), (0, 1)]
    dense = Row(DENSE_ROW, "dense", samples=[Sample(*run, 1000.0, 900.0) for run in runs])
    found = Comparison("Pipe " + EVIL, ["prompt " + EVIL], [0, 1], {}, "end to end", {"device": "a CPU"}, [dense, *rows])
    found.clips = {(row.name, s.prompt, s.seed): clip for row in found.rows for s in row.samples}
    return found


def row(name: str, seconds: float, *quality: float, kind: str = "recipe") -> Row:
    samples = [
        Sample(0, seed, 1e3 * seconds, 1e3 * seconds, scores={"psnr_db": value}) for seed, value in enumerate(quality)
    ]
    return Row(name, kind, "file/" + name, "everywhere: " + name, samples, predicted=1.5)


def test_a_comparison_tells_all_of_every_run(tmp_path: Path) -> None:
    found = comparison(
        row("slow " + EVIL, 0.8, 30.0, 28.0), row("beaten", 0.9, 20.0, 21.0), row("same", 1.0, math.inf, math.inf)
    )
    page = Page(found.to_html(tmp_path / "page.html").read_text())
    slow, beaten, same = page.data["dots"]
    assert page.links == []
    assert slow["name"] == "slow " + EVIL
    assert slow["name"] in page.cells
    assert page.data["prompts"] == ["prompt " + EVIL]
    assert (slow["worst"], slow["mean"], slow["speedup"]) == (28.0, 29.0, 1.25)
    facts = {what: (measured, foretold) for what, measured, foretold in slow["facts"]}
    assert facts["speed-up"] == ("1.25x", "1.50x")
    assert facts["PSNR, dB"] == ("28.0 worst, 29.0 mean", "")
    assert facts["runs"] == ("2", "")
    assert facts["worst run"] == ("seed 1, prompt " + EVIL, "")
    assert slow["rules"] == "everywhere: slow " + EVIL
    assert [dot["verdict"] for dot in (slow, beaten, same)] == ["front", "tried", "tried"], (
        "dense is as fast as the last one"
    )
    assert same["worst"] == "inf"
    assert page.data["chosen"] == slow["name"]
    assert page.data["axis"] == {"name": "PSNR, dB", "limit": None, "higher_is_better": True}


@pytest.fixture
def tuned() -> Tuned:
    pipe, _ = tiny_pipelines.decoding("wan")
    from accelplug.hosts.host import model_facts

    base = load({"rules": [{"patch": "dense"}]}, model_facts(pipe))
    rows = [row("proven", 0.5, 27.0, 26.5), row("beaten", 0.8, 26.2), row("overturned", 0.4, 30.0, 20.0)]
    points = []
    for line, verdict in zip(rows, ("proven", "tried", "overturned"), strict=True):
        told = {"speedup": 1.9, "margin": 2.0, "density": 0.25}
        point = Point(line.name, {"rules": [{"patch": "sol"}]}, 0, 0.0, {}, math.inf, verdict, predicted=told)
        for sample in line.samples:
            point.add((sample.prompt, sample.seed), {"psnr": sample.scores["psnr_db"]}, parse_budget("psnr>=26"))
        point.speedup = 1e3 / line.samples[0].latency_ms
        points.append(point)
    assert isinstance(base, Recipe)
    return Tuned(
        "tuned", "tuned", base.rules, why="why " + EVIL, bounds=parse_budget("psnr>=26"), points=tuple(points),
        comparison=comparison(*rows), seconds={"all": 9.0},
    )  # fmt: skip


def test_a_search_shows_all_points_and_the_clips_of_the_front(tuned: Tuned, tmp_path: Path) -> None:
    page = Page(tuned.to_html(tmp_path / "page.html").read_text())
    dots = {dot["name"]: dot for dot in page.data["dots"]}
    assert set(dots) == {"proven", "beaten", "overturned"}
    assert {clip["name"] for clip in page.data["clips"]} == {DENSE_ROW, "proven", "overturned"}
    assert page.data["axis"] == {"name": "PSNR, dB", "limit": 26.0, "higher_is_better": True}
    assert page.data["chosen"] == "proven"
    facts = {what: (measured, foretold) for what, measured, foretold in dots["overturned"]["facts"]}
    assert facts["speed-up"] == ("2.50x", "1.90x")
    assert facts["margin"] == ("-6.00", "+2.00")
    assert facts["density"] == ("", "0.250")
    assert facts["worst run"][0].startswith("seed 1")
    assert [dots[name]["holds"] for name in ("proven", "beaten", "overturned")] == [True, True, False]
    assert {"proven", "beaten", "overturned", "1.25x"} <= set(page.cells), "without scripts there is the table"


def test_a_recipe_file_is_for_a_model(tuned: Tuned, tmp_path: Path) -> None:
    with pytest.raises(AccelplugError, match="not made by tune"):
        tuned.to_yaml(tmp_path / "mine.yaml")


def test_several_bounds_are_plotted_by_their_margin(tuned: Tuned, tmp_path: Path) -> None:
    object.__setattr__(tuned, "bounds", parse_budget("psnr>=26, ssim>=.5"))
    for point in tuned.points:
        point.worst["ssim"] = 0.75
    page = Page(tuned.to_html(tmp_path / "page.html").read_text())
    assert page.data["axis"]["limit"] == 0.0
    assert [dot["worst"] for dot in page.data["dots"]] == [0.5, pytest.approx(0.2), -6.0]


def test_what_apply_would_leave_dense_is_said_to_be_forced(tmp_path: Path) -> None:
    slow = row("slow", 1.4, 30.0, 28.0)
    slow.choices = {"verdicts": [Verdict("sol", (1, 2, 400, 64), "float32", "cpu", 1.0, 1.5).to_dict()]}
    found = comparison(slow, row("fast", 0.5, 30.0, 28.0))
    for said in (str(found), found.page()):
        assert "slow (forced)" in said
        assert "fast (forced)" not in said
        assert "dense 1.0 ms, sparse 1.5 ms a call" in " ".join(said.split())
    found.to_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["rows"][1]["forced"] == slow.forced
    assert Comparison.from_json(tmp_path / "a.json").row("slow").forced == slow.forced
