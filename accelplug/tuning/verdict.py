"""The result of a search in a sentence, and what there was to gain at all."""

from __future__ import annotations

from collections.abc import Sequence

from accelplug.tuning.caches import FEW_STEPS
from accelplug.tuning.prediction import Predictor
from accelplug.tuning.result import Point
from accelplug.tuning.space import WORTH


def limit(predictor: Predictor) -> str:
    """Say what any patch can gain at most, by Amdahl's law."""
    steps = predictor.trajectory.steps
    if (share := predictor.trajectory.attention) is None:
        return "What a patch can gain at most is not known: attention could not be timed separately."
    shares = f"attention being {share:.0%} of a step and denoising {predictor.denoise_ms / predictor.dense_ms:.0%} of a run"
    if steps > FEW_STEPS:
        return f"With {shares}, no patch can gain more than {predictor.ceiling(0):.2f}x."
    return (
        f"With {steps} steps, one of them dense, {shares}, no patch can gain more than {predictor.ceiling(1):.2f}x; "
        f"with none dense {predictor.ceiling(0):.2f}x."
    )


def why(
    budget: str,
    points: Sequence[Point],
    proven: Point | None,
    predictor: Predictor | None,
    *,
    proposed: bool,
    interrupted: bool,
    time_budget_s: float,
    run_s: float,
) -> str:
    """Say what came of a search. In runs of few steps, also how little there was to gain.

    Parameters
    ----------
    budget : the bounds, in words.
    points : all that was run whole, the fastest first.
    proven : the point that the recipe is, None for dense.
    predictor : None if the search ended before one was made.
    proposed : whether there were candidates to run.
    interrupted : whether the user ended the search.
    time_budget_s, run_s : the time that the search had, and that a dense run takes.
    """
    if proven is not None:
        worst = ", ".join(f"{name} {value:.2f}" for name, value in proven.worst.items())
        said = f"{proven.name}: {proven.speedup:.2f}x within {budget}, worst of {proven.runs} runs {worst}"
    elif interrupted:
        held = [
            f"{p.name} kept {budget} at {p.speedup:.2f}x in {p.runs} runs of the search" for p in points if p.margin >= 0
        ]
        said = f"Stay dense: interrupted before anything was proven; {held[0] if held else 'nothing was seen to hold'}"
    elif predictor is None or not predictor.probes:
        said = (
            f"Stay dense: {time_budget_s:.0f} s were over before a patch could be probed, a dense run takes {run_s:.0f} s. "
            f"Give time_budget_s of at least {30 * run_s:.0f}"
        )
    elif not proposed and not points:
        said = "Stay dense: no patch was faster than dense attention at this shape on this device"
    else:
        said = _why_not(budget, points)
    few = predictor is not None and predictor.trajectory.steps <= FEW_STEPS
    return f"{said}. {limit(predictor)}" if few and predictor is not None else said


def _why_not(budget: str, points: Sequence[Point]) -> str:
    """Why nothing that was run is recommended."""
    if any(point.verdict == "overturned" for point in points):
        return f"Stay dense: what held {budget} in the search did not on unseen prompts and seeds"
    if held := [point for point in points if point.margin >= 0]:
        return f"Stay dense: what keeps {budget} gains less than {WORTH:.2f}x, at best {held[0].speedup:.2f}x"
    return f"Stay dense: none of {len(points)} candidates that were run keeps {budget}"
