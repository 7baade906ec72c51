"""Two captions for two boxes of one clip of the bundled video model: does each box show what its own caption says?

usage: python -m benchmarks.regions [--captions 8] [--seed 0]

A held-out caption names two shapes, "A, B", and the model was trained to draw A on the left. With `regions` the whole clip is told "A, B",
one box "A" and the other "B": left and right as it was trained, the other way round, and one above the other, which it never saw. Boxes
read their own caption beside the first one (`everywhere`), or alone. The control is "A, B" without a patch: it says what the same boxes
show by themselves. The detector looks at each box alone, and must find in it its own shape, and nothing besides; a shape across the
border is wrong in both. Quality alone: no times.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any

import numpy as np
import torch

import accelplug
from accelplug.comparison.environment import environment, revision
from accelplug.show import jsonable
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, parse
from benchmarks.common import RESULTS, write_json
from benchmarks.segments import found, shares
from benchmarks.whole_runs import GRIDS, Runner, clip_of

Box = tuple[float, float, float, float]
LEFT, RIGHT, TOP, BOTTOM = (0, 0, 1, 0.5), (0, 0.5, 1, 1), (0, 0, 0.5, 1), (0.5, 0, 1, 1)
BOXES: dict[str, tuple[Box, Box]] = {"as trained": (LEFT, RIGHT), "other way round": (RIGHT, LEFT), "above": (TOP, BOTTOM)}
"""The boxes of A and B: top, left, bottom, right in shares of the canvas."""
CONTROL = "one caption"
READING = {"own and all": True, "own alone": False}
"""By what is read in a box: `everywhere`."""
SETTINGS = GRIDS["small"]


def inside(clip: np.ndarray, box: Box) -> np.ndarray:
    """What a box of a clip (F, H, W, 3) shows."""
    height, width = clip.shape[1:3]
    top, left, bottom, right = (round(share * side) for share, side in zip(box, (height, width) * 2, strict=True))
    return clip[:, top:bottom, left:right]


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Shares of the clips whose boxes show what their captions say, in Markdown."""
    yield "| boxes | run | clips | first box | second box | both | both, but for the direction |"
    yield "|---|---|---|---|---|---|---|"
    for boxes, arm in product(BOXES, (CONTROL, *READING)):
        some = [row for row in rows if (row["boxes"], row["arm"]) == (boxes, arm)]
        yield f"| {boxes} | {arm} | {len(some)} | {shares(some)} |"


def measured_before(seed: int) -> list[dict[str, Any]]:
    """Clips of a run that was cut short."""
    path = RESULTS / "regions.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    return before["rows"] if (before.get("settings"), before.get("seed")) == (SETTINGS, seed) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pipe = Runner(torch.get_num_threads()).pipe
    facts, git = {**environment(pipe), "settings": SETTINGS, "seed": options.seed}, revision()
    rows = measured_before(options.seed)
    runs = [(CONTROL, tuple(BOXES)), *((arm, (boxes,)) for arm, boxes in product(READING, BOXES))]
    for caption, (arm, asked) in product(HELD_OUT_CAPTIONS[: options.captions], runs):
        if any((row["caption"], row["arm"], row["boxes"]) == (caption, arm, asked[0]) for row in rows):
            continue
        first, second = map(str, parse(caption))
        rule = {"patch": "regions", "with": {"boxes": BOXES[asked[0]], "everywhere": READING.get(arm)}}
        text = caption if arm == CONTROL else f"{caption} | {first} | {second}"
        with nullcontext() if arm == CONTROL else accelplug.apply(pipe, {"rules": [rule]}, strict=True):
            frames = pipe(text, generator=torch.Generator().manual_seed(options.seed), output_type="np", **SETTINGS).frames
        clip = np.rint(clip_of(frames) * 255).astype(np.uint8)
        for name in asked:
            seen = {
                of: found(inside(clip, box), of_box)
                for of, box, of_box in zip(("first", "second"), BOXES[name], (first, second), strict=True)
            }
            rows.append({"caption": caption, "arm": arm, "boxes": name, **seen, "git": git})
        write_json("regions", {**facts, "rows": jsonable(rows)})  # whatever ends the rest
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
