"""Small models that come with the package, trained from scratch on what `shapes` and `scenes` draw."""

from pathlib import Path

# What the model was trained for, as arguments of its pipeline. DEMO is 17 x 16 x 24 = 6,528 visual tokens,
# SMALL 5 x 8 x 10 = 400.
DEMO = {"num_frames": 33, "height": 128, "width": 192, "num_inference_steps": 16, "guidance_scale": 3.0}
SMALL = {"num_frames": 9, "height": 64, "width": 80, "num_inference_steps": 12, "guidance_scale": 3.0}


def path(name: str = "wan-shapes") -> Path:
    """The folder of a bundled model, for `from_pretrained`: ``wan-shapes``, a pipeline, or ``llava-scenes``."""
    folder = Path(__file__).parent / name
    if not (folder / "README.md").is_file():
        raise ValueError(f"no bundled model {name!r}; there are 'wan-shapes' and 'llava-scenes'")
    return folder
