"""lmms-eval: each of its models of transformers once more, as ``accelplug_NAME``, with a recipe on.

Once both packages are installed, lmms-eval finds them by itself (the entry point group ``lmms_eval.models``, since its registry V2)::

    python -m lmms_eval --model accelplug_qwen2_5_vl --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,recipe=vhr --tasks pope,mme

The class is lmms-eval's own, with its arguments; the recipe is applied to the model that it loads. Without ``accelplug_`` the same command
is the baseline. Written after lmms-eval at 75571cf.
"""

from __future__ import annotations

import importlib
from typing import Any

from transformers import AutoProcessor

from accelplug.errors import AccelplugError
from accelplug.plug import apply

WRAPPED = ("llava_hf", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl_hf", "gemma3", "huggingface")
"""Models of lmms-eval that hold a model of transformers as ``model``; those that its release lacks are left out."""
PREFIX = "accelplug_"


def manifests() -> list[Any]:
    """Return a manifest for every wrapped model that this release of lmms-eval has: what the entry point gives."""
    from lmms_eval import models
    from lmms_eval.models.registry_v2 import ModelManifest

    kinds = {"simple": models.AVAILABLE_SIMPLE_MODELS, "chat": models.AVAILABLE_CHAT_TEMPLATE_MODELS}
    found = {name: [kind for kind, held in kinds.items() if name in held] for name in WRAPPED}
    return [
        ModelManifest(f"{PREFIX}{name}", **{f"{kind}_class_path": f"{__name__}.{kind}_{name}" for kind in there})
        for name, there in found.items()
        if there
    ]


def __getattr__(name: str) -> Any:
    """Make the class that a manifest names, ``simple_llava_hf`` or ``chat_llava_hf``, when lmms-eval asks for it."""
    kind, _, model = name.partition("_")
    if kind not in ("simple", "chat") or model not in WRAPPED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.models import get_model_manifest

    module, _, cls = getattr(get_model_manifest(model), f"{kind}_class_path").rpartition(".")
    return with_recipe(getattr(importlib.import_module(module), cls), name)


def with_recipe(base: type, name: str) -> type:
    """Return a class of lmms-eval's that takes ``recipe`` besides, a name or the path of a file, and applies it to its model.

    Its ``plug`` says what was done (``plug.report()``); it is never gated, since a harness measures quality.
    """

    def __init__(self: Any, *args: Any, recipe: str = "", **more: Any) -> None:
        if not recipe:
            raise AccelplugError(
                f"{PREFIX}{name.partition('_')[2]} is a model with a recipe: expected recipe=NAME in --model_args."
            )
        base.__init__(self, *args, **more)  # type: ignore[misc]
        processor = getattr(self, "processor", None)
        if processor is None:  # a class that keeps it under a name of its own
            processor = AutoProcessor.from_pretrained(self.model.name_or_path)
        self.plug = apply(self.model, recipe, gate="off", processor=processor)

    return type(name, (base,), {"__init__": __init__, "__module__": __name__, "__doc__": base.__doc__})
