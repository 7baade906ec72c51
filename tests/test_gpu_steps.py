"""The GPU benchmark of whole denoisers, at toy sizes."""

from __future__ import annotations

import pytest

from benchmarks import gpu_steps


@pytest.mark.parametrize("name", gpu_steps.MODELS)
def test_every_model_runs_and_is_foretold(name):
    rows = gpu_steps.main(["--smoke", "--model", name])
    assert [row["recipe"] for row in rows] == ["dense", "random, density 0.2", "random, density 0.3"]
    for row in rows[1:]:
        assert 0 < row["forecasts"][0]["attention_share"] < 1
        assert row["gain"] > 0
