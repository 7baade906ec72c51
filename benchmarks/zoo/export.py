"""Write what was trained as a pipeline: ``python -m benchmarks.zoo.export``."""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from benchmarks.zoo.common import load
from benchmarks.zoo.text import make_tokenizer, trained_encoder
from benchmarks.zoo.train_denoiser import CHECKPOINT, CONFIG
from benchmarks.zoo.train_vae import trained

TARGET = Path(__file__).parents[2] / "accelplug" / "zoo" / "wan-shapes"


def assemble() -> WanPipeline:
    """The pipeline of the last checkpoints, with the denoiser's averaged weights."""
    transformer = WanTransformer3DModel(**CONFIG)
    transformer.load_state_dict(load(CHECKPOINT)["average"])
    return WanPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=trained_encoder(),
        vae=trained(),
        transformer=transformer.eval().requires_grad_(False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=TARGET)
    target = parser.parse_args().target

    # Written beside the target and swapped in, so that nobody loads half a pipeline.
    fresh = target.with_name(f".{target.name}.new")
    assemble().to(torch.float32).save_pretrained(fresh, safe_serialization=True)
    shutil.copy(Path(__file__).parent / "MODEL_CARD.md", fresh / "README.md")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    for file in sorted(target.rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size:>10,} {file.relative_to(target)}")


if __name__ == "__main__":
    main()
