"""Small models that come with the package, trained from scratch on what `shapes` and `scenes` draw."""

from pathlib import Path
from typing import Any

from accelplug.errors import NoMatchError, nearest

BUNDLED = ("wan-shapes", "llava-scenes")

# What the model was trained for, as arguments of its pipeline. DEMO is 17 x 16 x 24 = 6,528 visual tokens,
# SMALL 5 x 8 x 10 = 400.
DEMO = {"num_frames": 33, "height": 128, "width": 192, "num_inference_steps": 16, "guidance_scale": 3.0}
SMALL = {"num_frames": 9, "height": 64, "width": 80, "num_inference_steps": 12, "guidance_scale": 3.0}


def path(name: Any = "wan-shapes") -> Path:
    """Return the folder of a bundled model, for `from_pretrained`: ``wan-shapes``, a pipeline, or ``llava-scenes``.

    Raises
    ------
    NoMatchError
        If there is no such model.
    """
    if name not in BUNDLED:
        raise NoMatchError(f"There is no bundled model {name!r}{nearest(str(name), BUNDLED)}. Known: {', '.join(BUNDLED)}.")
    return Path(__file__).parent / name
