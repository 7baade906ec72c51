"""Ask the model for clips and let the detector read them: ``python -m benchmarks.zoo.evaluate``.

By default it makes the 50 held-out captions at the demo's grid and writes ``benchmarks/results/zoo_detector.json``;
``--grid small --output benchmarks/results/zoo_detector_small.json`` makes the other file there.
"""

import argparse
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image

from accelplug import zoo
from accelplug.comparison.environment import environment
from accelplug.zoo.shapes import HELD_OUT_CAPTIONS, SHAPES, caption, detect, parse, sample_caption

RESULT = Path(__file__).parents[1] / "results" / "zoo_detector.json"


def captions(kind: str, count: int) -> list[str]:
    """`count` captions: held-out pairs, pairs of the training set, or single shapes."""
    if kind == "held-out":
        return list(HELD_OUT_CAPTIONS[:count])
    if kind == "single":
        return [caption([shape]) for shape in itertools.islice(itertools.cycle(SHAPES[::7] + SHAPES[3::7]), count)]
    rng = np.random.default_rng(2)
    return [sample_caption(rng, singles=0.0) for _ in range(count)]


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights in the order of their names."""
    weights = (tensor for _, tensor in sorted(model.state_dict().items()))
    return hashlib.sha256(b"".join(tensor.cpu().contiguous().numpy().tobytes() for tensor in weights)).hexdigest()


def filmstrip(clips: list[np.ndarray], file: Path, columns: int = 5) -> None:
    """A picture with one clip a row, (frames, height, width, 3) uint8 each, at `columns` moments."""
    rows = [np.concatenate(clip[np.linspace(0, len(clip) - 1, columns).astype(int)], axis=1) for clip in clips]
    Image.fromarray(np.concatenate(rows)).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", choices=("demo", "small"), default="demo")
    parser.add_argument("--captions", choices=("held-out", "seen", "single"), default="held-out")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--steps", type=int, help="denoising steps, where not the grid's own")
    parser.add_argument("--guidance", type=float, help="guidance scale, where not the grid's own")
    parser.add_argument("--shift", type=float, help="shift of the noise levels, where not the scheduler's own")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; each one has its own")
    parser.add_argument("--checkpoint", action="store_true", help="use the training's last checkpoint, not the bundle")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path, help="also draw the clips")
    options = parser.parse_args()

    if options.checkpoint:
        from benchmarks.zoo.export import assemble  # needs the training's files

        pipeline = assemble()
    else:
        pipeline = WanPipeline.from_pretrained(zoo.path(), dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    pipeline.to(device)
    if options.shift is not None:
        pipeline.scheduler.set_shift(options.shift)
    settings = dict(zoo.DEMO if options.grid == "demo" else zoo.SMALL)
    if options.steps is not None:
        settings["num_inference_steps"] = options.steps
    if options.guidance is not None:
        settings["guidance_scale"] = options.guidance

    clips: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []
    for index, text in enumerate(captions(options.captions, options.count)):
        generator = torch.Generator().manual_seed(options.seed + index)
        frames = pipeline(prompt=text, generator=generator, output_type="np", **settings).frames[0]
        clips.append(np.rint(frames * 255).astype(np.uint8))
        found = detect(clips[-1])
        agrees = found == tuple(sorted(parse(text)))
        rows.append({"caption": text, "found": [str(shape) for shape in found], "agrees": agrees})
        print(f"{'ok ' if agrees else 'NO '} {text} -> {caption(found)}", flush=True)
    agreeing = sum(row["agrees"] for row in rows)
    print(f"{agreeing}/{len(rows)} agree")
    if options.picture:
        filmstrip(clips, options.picture)

    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps(
            {
                "agreeing": agreeing,
                "of": len(rows),
                "captions": options.captions,
                "grid": options.grid,
                **settings,
                "seed_of_first_clip": options.seed,
                "sha256_of_transformer_weights": digest(pipeline.transformer),
                "shift": pipeline.scheduler.shift,
                **environment(),
                "clips": rows,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
