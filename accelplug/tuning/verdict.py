"""The result of a search in a sentence, and what there was to gain at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelplug.tuning.caches import FEW_STEPS

if TYPE_CHECKING:
    from accelplug.tuning.forecast import Forecast
    from accelplug.tuning.result import Point
    from accelplug.tuning.search import Search

WORTH = 1.03
"""A gain below this is not worth a recipe."""


def limit(forecast: Forecast) -> str:
    """Say what any patch can gain at most, by Amdahl's law."""
    steps = forecast.trajectory.steps
    if (share := forecast.trajectory.attention) is None:
        return "What a patch can gain at most is not known: attention could not be timed by itself."
    shares = f"attention being {share:.0%} of a step and denoising {forecast.denoise_ms / forecast.dense_ms:.0%} of a run"
    if steps > FEW_STEPS:
        return f"With {shares}, no patch can gain more than {forecast.ceiling(0):.2f}x."
    return (
        f"With {steps} steps, one of them dense, {shares}, no patch can gain more than {forecast.ceiling(1):.2f}x; "
        f"with none dense {forecast.ceiling(0):.2f}x."
    )


def why(search: Search, proven: Point | None) -> str:
    """Say what came of a search. In runs of few steps, also how little there was to gain."""
    said = _outcome(search, proven)
    few = search.forecast is not None and search.forecast.trajectory.steps <= FEW_STEPS
    return f"{said}. {limit(search.forecast)}" if few and search.forecast is not None else said


def _outcome(search: Search, proven: Point | None) -> str:
    budget = search.budget
    if proven is not None:
        worst = ", ".join(f"{name} {value:.2f}" for name, value in proven.worst.items())
        return f"{proven.name}: {proven.speedup:.2f}x within {budget}, worst of {proven.runs} runs {worst}"
    points = sorted(search.points.values(), key=lambda point: -point.speedup)
    held = [point for point in points if point.margin >= 0]
    if search.interrupted:
        best = [f"{p.name} kept {budget} at {p.speedup:.2f}x in {p.runs} runs of the search" for p in held[:1]]
        return f"Stay dense: interrupted before anything was proven; {best[0] if best else 'nothing was seen to hold'}"
    if search.forecast is None or not search.forecast.probes:
        return (
            f"Stay dense: {search.time_budget_s:.0f} s were over before a patch could be probed, a dense run takes "
            f"{search.run_s:.0f} s. Give time_budget_s of at least {30 * search.run_s:.0f}"
        )
    if not search.candidates and not points:
        return "Stay dense: no patch was faster than dense attention at this shape on this device"
    if any(point.verdict == "overturned" for point in points):
        return f"Stay dense: what held {budget} in the search did not on unseen prompts and seeds"
    if held:
        return f"Stay dense: what keeps {budget} gains less than {WORTH:.2f}x, at best {held[0].speedup:.2f}x"
    return f"Stay dense: none of {len(points)} candidates that were run keeps {budget}"
