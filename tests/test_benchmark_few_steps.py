"""benchmarks.few_steps: what it counts, and that its variants are recipes."""

from __future__ import annotations

from typing import Any

import pytest

from accelplug.recipe import ModelFacts, load
from benchmarks.few_steps import DENSE, VARIANTS, spread, table, variant

FOUND = [(0, 0, 0.5, 30.0), (0, 1, 0.7, 20.0), (1, 0, 0.6, 40.0)]
"""Caption, seed, share of the dense run's time, foreground PSNR."""


def rows(recipe: str) -> list[dict[str, Any]]:
    return [
        {
            "steps": 4,
            "caption": c,
            "seed": s,
            "recipe": recipe,
            "of_dense": t,
            "fg_psnr_db": db,
            "ssim": 0.9,
            "agreement": 1.0,
        }
        for c, s, t, db in FOUND
    ]


def test_a_row_is_over_all_captions_and_seeds() -> None:
    _, _, line = table([*rows(DENSE), *rows("fast")])
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    assert cells[:3] == ["4", "fast", "3"]
    assert cells[3].startswith("0.60 (")
    assert cells[4:] == ["30.0 (25.0 to 40.0)", "20.0", "0.900", "1.00 (1.00)"]
    assert spread(rows("fast"), "fg_psnr_db", 1) == cells[4]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_a_recipe_that_reads_what_it_says(name: str) -> None:
    early, late, dense = VARIANTS[name]
    run = load(variant(name, 32), ModelFacts(("Any",), {}, denoiser=True)).expected(8)
    assert run is not None
    assert run.dense_steps == sum(place.endswith("step") for place in dense)
    if not dense:
        assert run.density == pytest.approx((early + late) / 2)
