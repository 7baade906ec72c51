"""Paired differences: what is said of two arms, on how many prompts, and with what certainty."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest

from accelplug.comparison.evaluators.statistics import sign_flips
from accelplug.comparison.paired import SAME_DB, SPEED, difference, differences, percent, too_few
from accelplug.comparison.rows import DENSE_ROW, Row, Sample

CLIPS = (13.2, 25.9, 18.0, 21.5, 15.1, 24.0, 17.3, 20.2)
"""PSNR of one arm on eight prompts, dB: clips differ far more than arms."""


def arm(name: str, values: Sequence[Sequence[float]], ms: float = 50.0, figure: str = "psnr_db") -> Row:
    """A row with a figure by prompt and seed."""
    samples = [
        Sample(prompt, seed, ms * (1 + prompt / 10), ms, scores={figure: value})
        for prompt, by_seed in enumerate(values)
        for seed, value in enumerate(by_seed)
    ]
    return Row(name, "recipe", samples=samples)


def moved(by: Sequence[float]) -> list[list[float]]:
    return [[value + change] for value, change in zip(CLIPS, by, strict=False)]


def dense(prompts: int = len(CLIPS), seeds: int = 1) -> Row:
    pairs = itertools.product(range(prompts), range(seeds))
    return Row(DENSE_ROW, "dense", samples=[Sample(p, s, 100.0 * (1 + p / 10), 90.0) for p, s in pairs])


@pytest.mark.parametrize("given", [[1.0, 2.0, 0.5, 0.1, 3.0], [1.0, -2.0, 0.5], [0.0, 0.0], [-1.0, -1.0, 4.0, 0.0]])
def test_sign_flips_equal_the_test_stated_flip_by_flip(given: list[float]) -> None:
    sums = [
        abs(sum(s * x for s, x in zip(signs, given, strict=True))) for signs in itertools.product((1, -1), repeat=len(given))
    ]
    assert sign_flips(given) == sum(s >= abs(sum(given)) - 1e-12 for s in sums) / len(sums)


def test_many_differences_are_flipped_at_random_and_always_the_same() -> None:
    some = [math.sin(i) + 0.1 for i in range(40)]
    assert sign_flips(some) == sign_flips(some)
    assert 0.2 < sign_flips(some) < 0.9
    assert sign_flips([1.0] * 40) < 1e-4


def test_a_small_difference_on_every_clip_is_one_though_clips_differ_far_more() -> None:
    rows = [dense(), arm("a", moved([1.0, 0.8, 1.2, 0.9, 1.1, 1.0, 0.7, 1.3])), arm("b", moved([0.0] * 8))]
    (quality,) = (d for d in differences(rows, ["psnr_db"]) if d.figure == "psnr_db")
    assert quality.mean == pytest.approx(1.0)
    assert 0.7 < quality.low < 1.0 < quality.high < 1.3
    assert quality.certainty == 1 - 2 / 2**8
    assert quality.better == "a"
    assert "a is better, +1.0 (" in str(quality)
    assert "certainty 99.2 %" in str(quality)


def test_a_difference_of_means_that_comes_from_one_clip_is_none() -> None:
    rows = [dense(), arm("a", moved([9.0, -0.5, 0.4, -0.3, 0.2, -0.1, 0.3, -0.2])), arm("b", moved([0.0] * 8))]
    (quality,) = (d for d in differences(rows, ["psnr_db"]) if d.figure == "psnr_db")
    assert quality.mean > 1
    assert quality.better == ""
    assert "no difference that 8 prompts show" in str(quality)


def test_an_arm_beside_itself_is_no_difference_with_certainty() -> None:
    rows = [dense(), arm("a", moved([0.0] * 8)), arm("again", moved([0.0] * 8))]
    for told in differences(rows, ["psnr_db"]):
        if DENSE_ROW not in (told.first, told.second):
            assert (told.none, told.certainty, told.better) == (True, 1.0, "")
            assert "no difference, with certainty" in str(told)


def test_speed_is_a_factor_and_counts_against_dense_too() -> None:
    rows = [dense(), arm("a", moved([0.0] * 8), ms=50.0), arm("b", moved([0.0] * 8), ms=25.0)]
    speeds = {(d.first, d.second): d for d in differences(rows, []) if d.figure == SPEED}
    assert speeds["a", DENSE_ROW].mean == pytest.approx(2.0)
    assert speeds["b", DENSE_ROW].mean == pytest.approx(4.0)
    assert (speeds["a", "b"].mean, speeds["a", "b"].better) == (pytest.approx(0.5), "b")
    assert speeds["a", "b"].certainty == pytest.approx(1 - 3 * 2 / 2**8), "of three pairs, Holm"


def test_seeds_of_a_prompt_count_once() -> None:
    few = difference(arm("a", [[20.0]] * 3), arm("b", [[19.0]] * 3), "psnr_db")
    many = difference(arm("a", [[20.0, 21.0, 22.0]] * 3), arm("b", [[19.0, 20.0, 21.0]] * 3), "psnr_db")
    assert few is not None
    assert many is not None
    assert few.certainty == many.certainty == 0.75, "three prompts bear no more"


def test_one_or_two_prompts_say_nothing() -> None:
    for prompts in (1, 2):
        rows = [dense(prompts), arm("a", moved([0.0] * prompts)), arm("b", moved([5.0] * prompts))]
        assert differences(rows, ["psnr_db"]) == []
        assert "cannot be said" in too_few(rows)
    assert too_few([dense(3), arm("a", moved([0.0] * 3))]) == ""
    assert too_few([dense(1)]) == "", "dense alone has no rival"


def test_clips_that_are_the_same_count_as_finite_decibels() -> None:
    told = difference(arm("a", [[math.inf]] * 4), arm("b", [[40.0], [math.inf], [50.0], [60.0]]), "psnr_db")
    assert told is not None
    assert told.mean == pytest.approx(SAME_DB - (40 + SAME_DB + 50 + 60) / 4)


def test_where_less_is_better_the_smaller_one_is() -> None:
    low, high = (arm(name, [[x]] * 8, figure="flicker") for name, x in (("calm", 0.1), ("restless", 0.3)))
    (told,) = (d for d in differences([dense(), high, low], ["flicker"]) if d.figure == "flicker")
    assert told.better == "calm"


def test_short_of_certainty_is_never_written_as_certainty() -> None:
    assert [percent(x) for x in (1.0, 0.99999, 0.75, 0.0)] == ["100 %", "99.9 %", "75 %", "0 %"]
