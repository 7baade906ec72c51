"""Write the trained vision-language model with its processor: ``python -m benchmarks.zoo.export_vlm``."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.zoo.common import load
from benchmarks.zoo.train_vlm import CHECKPOINT
from benchmarks.zoo.vlm import make_model, make_processor

TARGET = Path(__file__).parents[2] / "accelplug" / "zoo" / "llava-scenes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=TARGET)
    target = parser.parse_args().target

    # Written beside the target and swapped in, so that nobody loads half a model.
    fresh = target.with_name(f".{target.name}.new")
    processor = make_processor()
    model = make_model(processor.tokenizer.get_vocab())
    model.load_state_dict(load(CHECKPOINT)["model"])
    model.eval().save_pretrained(fresh)
    processor.save_pretrained(fresh)
    # Stored at half the size; config.json says float32, which is what it is loaded and run in.
    weights = fresh / "model.safetensors"
    save_file({name: x.to(torch.float16) for name, x in load_file(weights).items()}, weights, metadata={"format": "pt"})
    config = json.loads((fresh / "config.json").read_text())
    config["dtype"] = "float32"
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(Path(__file__).parent / "MODEL_CARD_VLM.md", fresh / "README.md")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    for file in sorted(target.rglob("*")):
        print(f"{file.stat().st_size:>10,} {file.relative_to(target)}")


if __name__ == "__main__":
    main()
