"""The GPU benchmarks at toy sizes."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks import gpu_block_attention, gpu_steps
from tests.conftest import DEVICE


@pytest.mark.parametrize("name", gpu_steps.MODELS)
def test_every_model_runs_and_is_foretold(name: str) -> None:
    rows = gpu_steps.main(["--smoke", "--model", name])
    assert [row["recipe"] for row in rows] == [*gpu_steps.DENSE, "random, density 0.2", "random, density 0.3"]
    for row in rows[2:]:
        assert 0 < row["forecasts"][0]["attention_share"] < 1
        assert row["gain"] > 0


@pytest.mark.skipif(DEVICE != "cpu" or importlib.util.find_spec("triton") is None, reason="runs in Triton's interpreter")
def test_kernels_are_checked_then_timed_in_turns() -> None:
    names = ["triton pool", "triton whole", "triton int8, values int8", "triton in 8 bits, int8"]
    rows = gpu_block_attention.main(["--smoke", *(x for name in names for x in ("--only", name))])
    timed = [(row["kernel"], row["target"]) for row in rows if not row["kernel"].startswith("dense")]
    assert timed == [(names[0], 0.5), (names[1], 0.5), (names[2], 0.5), (names[3], 0.5), ("triton whole", 1.0)]
    assert all(row["ms"]["p50"] > 0 and row["over_dense"] > 0 and "failed" not in row for row in rows)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = gpu_block_attention.Kernel(lambda q, k, v, plan: lambda: torch.zeros_like(q))
    monkeypatch.setattr(gpu_block_attention, "kernels", lambda smoke, device: {"wrong": wrong})
    (row,) = gpu_block_attention.main(["--smoke"])
    assert "from the reference" in row["failed"]
