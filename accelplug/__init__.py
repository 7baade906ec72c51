"""accelplug: swap the attention of a loaded Hugging Face model for a cheaper or better aimed one, and take it off again.

>>> plug = accelplug.apply(pipe)              # the model's default recipe
>>> accelplug.compare(pipe, "radial", {"prompt": "..."}, seeds=[0, 1])
>>> accelplug.calibrate(pipe, "sparse_vdit", prompts, path="my.yaml")
>>> plug.remove()                             # the very same model, bit for bit
>>> accelplug.apply(vlm, "llava-1.5-7b/vhr")  # a vision-language model that looks at the image
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelplug.errors import AccelplugError
from accelplug.files import without_links
from accelplug.version import __version__

if (_BROKEN := without_links()) is not None:
    # A command ends with the sentence alone.
    raise SystemExit(f"accelplug: {_BROKEN}") if Path(sys.argv[0]).stem in ("accelplug", "-m") else ImportError(_BROKEN)

if TYPE_CHECKING:
    from accelplug.calibration import calibrate
    from accelplug.comparison import Comparison, Exam, Pictures, TextExam, compare
    from accelplug.families import register_family
    from accelplug.families.vlm import register_vlm
    from accelplug.hosts.outputs import heads_outputs_alone
    from accelplug.inspection import inspect
    from accelplug.plug import Plug, apply, remove
    from accelplug.recipe import Recipe, list_recipes
    from accelplug.registry import list_patches, register_patch
    from accelplug.tuning import Bound, Tuned, tune, verify
    from accelplug.upscaling import upscale
    from accelplug.weights import fetch

__all__ = [
    "AccelplugError",
    "Bound",
    "Comparison",
    "Exam",
    "Pictures",
    "Plug",
    "Recipe",
    "TextExam",
    "Tuned",
    "__version__",
    "apply",
    "calibrate",
    "compare",
    "fetch",
    "heads_outputs_alone",
    "inspect",
    "list_patches",
    "list_recipes",
    "register_family",
    "register_patch",
    "register_vlm",
    "remove",
    "tune",
    "upscale",
    "verify",
]

logging.getLogger("accelplug").addHandler(logging.NullHandler())

_HOMES = {
    "Bound": "tuning",
    "Tuned": "tuning",
    "tune": "tuning",
    "verify": "tuning",
    "upscale": "upscaling",
    "Comparison": "comparison",
    "Exam": "comparison",
    "Pictures": "comparison",
    "TextExam": "comparison",
    "Plug": "plug",
    "Recipe": "recipe",
    "apply": "plug",
    "calibrate": "calibration",
    "compare": "comparison",
    "fetch": "weights",
    "heads_outputs_alone": "hosts.outputs",
    "inspect": "inspection",
    "list_patches": "registry",
    "list_recipes": "recipe",
    "register_family": "families",
    "register_patch": "registry",
    "register_vlm": "families.vlm",
    "remove": "plug",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that ``import accelplug`` stays free."""
    if name not in _HOMES:
        raise AttributeError(f"module 'accelplug' has no attribute {name!r}")
    return getattr(import_module(f"accelplug.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
