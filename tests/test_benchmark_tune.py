"""benchmarks.tune: what it counts."""

from __future__ import annotations

import pytest

from benchmarks.tune import overturned, splits, summary


def runs(gain: float, *margins: float) -> list[dict[str, float]]:
    return [{"gain": gain, "margin": margin, "psnr": 26 + margin} for margin in margins]


def test_a_split_is_proven_by_the_fastest_that_holds_on_both_sides() -> None:
    found = {"fast": runs(2.0, 1, 1, 1, -1), "slow": runs(1.5, 1, 1, 1, 1), "useless": runs(1.0, 9, 9, 9, 9)}
    assert overturned(found, [0, 1], [2]) == "proven after 0 overturned"
    assert overturned(found, [0, 1], [3]) == "proven after 1 overturned"
    assert overturned(found, [0, 3], [1]) == "proven after 0 overturned", "the fast one was not chosen"
    assert overturned({"fast": found["fast"]}, [0, 1], [3]) == "all 1 overturned"
    assert overturned({"fast": found["fast"], "useless": found["useless"]}, [3], [0]) == "nothing held in the search"


def test_all_splits_are_counted() -> None:
    found = {"fast": runs(2.0, 1, 1, 1, -1), "slow": runs(1.5, 1, 1, 1, 1)}
    # Of the 6 ways to split 4 runs in halves, the fast one fails alone where the fourth run is on the proof's side.
    assert splits(found) == {"proven after 0 overturned": 3, "proven after 1 overturned": 3}
    assert splits({"fast": runs(2.0, 1, 1, 1)}) == {}, "three runs have no two sides of two"
    assert splits({}) == {}


def test_the_worst_run_counts() -> None:
    from accelplug.tuning.budget import parse_budget

    found = summary([*runs(2.0, 1.0), *runs(1.0, -0.5), *runs(1.5, 2.0)], parse_budget("psnr>=26"))
    assert (found["gain"], found["gain_from"], found["psnr"]) == (1.5, 1.0, pytest.approx(25.5))
    assert not found["holds"]
