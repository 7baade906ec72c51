"""Who gives how much of a recipe of the bundled video model: its patch, its step cache, both, and compilation, paired by caption and seed.

usage: python -m benchmarks.stack_parts [--recipe sparse-cache] [--captions 5] [--seeds 0 1] [--compiled] [--small]

Every part is run alone and beside the others, by turns with dense runs; see `accelplug.comparison.parts` for what the figures are.
3,264 tokens, 12 steps; four runs a caption and seed, about 25 s on two idle cores, so five captions and two seeds take five minutes. With
`--compiled` blocks go through torch.compile, and each part is run compiled and not: eight runs. `--small` (400 tokens) is to try it out.
"""

from __future__ import annotations

import argparse

from accelplug import zoo
from accelplug.comparison import compare
from accelplug.loading import pipeline
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, agreement, foreground
from benchmarks.common import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="sparse-cache", help="of the bundled model, or a file")
    parser.add_argument("--captions", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--compiled", action="store_true", help="have torch.compile be a part")
    parser.add_argument("--small", action="store_true", help="400 tokens")
    options = parser.parse_args()
    pipe, settings = pipeline(zoo.path()), zoo.SMALL if options.small else zoo.MEDIUM
    if options.compiled:
        pipe.transformer.compile_repeated_blocks()
    inputs = [{"prompt": caption, **settings} for caption in HELD_OUT_CAPTIONS[: options.captions]]
    found = compare(pipe, options.recipe, inputs, options.seeds, parts=True, foreground=foreground, detect=agreement)
    print(found)
    write_json("stack_parts_compiled" if options.compiled else "stack_parts", found.to_dict())


if __name__ == "__main__":
    main()
