"""Two captions for one clip of the bundled video model, which was not trained for that: does the detector find the change?

usage: python -m benchmarks.segments [--pairs 3] [--seed 0]

A pair of captions differs in the colour, the kind or the direction of its one shape, or in all three. Each pair is run with `segments`,
and, as controls, with its first caption alone, its second alone, and both as one caption. The detector then looks at the frames of each
span alone, and must find in it what its caption says, and nothing besides. Half a clip shows half of the way, so the controls also say
how often a span can be right at all. Quality alone: no times.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

import accelplug
from accelplug.comparison.environment import environment
from accelplug.show import jsonable
from accelplug.zoo.shapes import COLOURS, DIRECTIONS, KINDS, Shape, detect, parse
from benchmarks.common import RESULTS, write_json
from benchmarks.whole_runs import GRIDS, Runner, clip_of

CHANGES = {"colour": (1, 0, 0), "kind": (0, 1, 0), "direction": (0, 0, 1), "all": (1, 1, 1)}
"""What differs, and by how many places in the lists of words."""
ARMS = ("segments", "first alone", "second alone", "one caption")
SETTINGS = GRIDS["small"]
SPAN = 7
"""Frames of the first span: of 9 latent frames 4, the first of which is one frame, the others two each."""


def pairs(number: int) -> Iterator[tuple[str, str, str]]:
    """What changes, the caption of the first span and that of the second, `number` of each sort."""
    words = tuple(COLOURS), KINDS, tuple(DIRECTIONS)
    for change, moves in CHANGES.items():
        for n in range(number):
            at = n, n + n // 3, 2 * n + n // 4
            first, second = (
                Shape(
                    *(names[(place + move * far) % len(names)] for names, place, far in zip(words, at, moves, strict=True))
                )
                for move in (0, 1)
            )
            yield change, str(first), str(second)


def prompt_of(arm: str, first: str, second: str) -> str:
    """What the pipeline is asked."""
    return {
        "segments": f"{first} | {second}",
        "first alone": first,
        "second alone": second,
        "one caption": f"{first}, {second}",
    }[arm]


def found(frames: np.ndarray, caption: str) -> dict[str, Any]:
    """What the detector sees in a span, and whether that is what its caption says: all of it, or but for the direction."""
    seen, asked = detect(frames), parse(caption)
    return {
        "seen": [str(shape) for shape in seen],
        "right": seen == asked,
        "shape": [(shape.colour, shape.kind) for shape in seen] == [(shape.colour, shape.kind) for shape in asked],
    }


def shares(rows: Sequence[dict[str, Any]]) -> str:
    """Cells of a table: how often the first, the second and both show their caption, and both but for the direction."""
    halves = [(row["first"], row["second"]) for row in rows]
    right = [(first["right"], second["right"], first["right"] and second["right"]) for first, second in halves]
    shape = [first["shape"] and second["shape"] for first, second in halves]
    return " | ".join(f"{share:.2f}" for share in (*np.mean(right, 0), np.mean(shape)))


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Shares of the clips whose spans show what their captions say, in Markdown."""
    yield "| change | run | first span | second span | both | both, but for the direction |"
    yield "|---|---|---|---|---|---|"
    for change in (*CHANGES, "any"):
        for arm in ARMS:
            some = [row for row in rows if row["arm"] == arm and change in (row["change"], "any")]
            yield f"| {change} | {arm} | {shares(some)} |"


def measured_before(settings: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Clips of a run that was cut short."""
    path = RESULTS / "segments.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if (before.get("settings"), before.get("seed")) != (settings, seed):
        return []
    return [{"git": before["git"], **row} for row in before["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="of each change")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pipe = Runner(torch.get_num_threads()).pipe
    facts = {**environment(pipe), "settings": SETTINGS, "seed": options.seed}
    rows = measured_before(facts["settings"], options.seed)
    for change, first, second in pairs(options.pairs):
        for arm in ARMS:
            if any((row["captions"], row["arm"]) == ([first, second], arm) for row in rows):
                continue
            with (
                accelplug.apply(pipe, {"rules": [{"patch": "segments"}]}, strict=True)
                if arm == "segments"
                else nullcontext()
            ):
                generator = torch.Generator().manual_seed(options.seed)
                frames = pipe(prompt_of(arm, first, second), generator=generator, output_type="np", **SETTINGS).frames
            clip = np.rint(clip_of(frames) * 255).astype(np.uint8)
            spans = {"first": found(clip[:SPAN], first), "second": found(clip[SPAN:], second)}
            rows.append({"git": facts["git"], "change": change, "captions": [first, second], "arm": arm, **spans})
            write_json("segments", {**facts, "rows": jsonable(rows)})  # whatever ends the rest
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
