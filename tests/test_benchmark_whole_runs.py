"""benchmarks.whole_runs: what it counts."""

from __future__ import annotations

import pytest

from benchmarks.whole_runs import CAPTIONS, CHOSEN_ON, GRIDS, Arm, Shown, arms, common, spread, within

ARM = Arm("sol", "tau 1.0", 0.0, True, None, {})


@pytest.mark.parametrize(("limit", "quality"), [(0.4, None), (0.6, 15.0), (0.7, 20.0), (0.8, 20.0), (2.0, 20.0)])
def test_quality_within_a_time_never_falls(limit: float, quality: float | None) -> None:
    found = within([(0.5, 10.0), (0.7, 20.0), (0.9, 12.0)], limit)
    assert found is None if quality is None else found == pytest.approx(quality)
    assert within([], limit) is None


def test_a_gain_is_paired_and_its_interval_is_over_captions() -> None:
    plain = Shown(ARM, {(caption, seed): {"fg_psnr_db": 10.0 * caption} for caption in (0, 1) for seed in (0, 1)}, None)
    better = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 12.0, (1, 1): 16.0, (2, 0): 99.0}  # plain did not run the last one
    mended = Shown(ARM, {pair: {"fg_psnr_db": value} for pair, value in better.items()}, None)
    assert spread(mended, common([plain, mended], "chosen on"), plain) == "+3.0 (+2.0 to +4.0)"
    assert spread(mended, common([plain, mended])) == "8.0 (2.0 to 14.0)"
    assert spread(mended, common([plain, mended], "held out"), plain) == ""


@pytest.mark.parametrize("grid", GRIDS)
def test_arms_have_names_and_files_of_their_own(grid: str) -> None:
    found = list(arms(grid))
    assert found[0].name == "dense"
    assert len({arm.name for arm in found}) == len({arm.key(0, 0) for arm in found}) == len(found)
    assert len({found[0].key(caption, seed) for caption in CAPTIONS for seed in (0, 1)}) == 2 * len(CAPTIONS)
    assert set(CHOSEN_ON) < set(CAPTIONS)
    assert 2 * len(CHOSEN_ON) == len(CAPTIONS)
