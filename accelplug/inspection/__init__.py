"""inspect(): what a model's attention looks like to accelplug, before anything is applied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelplug.families.vlm import vlm_of
from accelplug.hosts.host import require_ability
from accelplug.hosts.models import model_in
from accelplug.inspection.denoiser import Inspection, inspect_denoiser
from accelplug.inspection.encoder import EncoderInspection, inspect_encoder
from accelplug.inspection.heads import HeadsInspection, inspect_heads
from accelplug.inspection.language import LanguageInspection, inspect_language
from accelplug.inspection.looking import VlmInspection
from accelplug.inspection.reading import inspect_vlm
from accelplug.inspection.text import TextInspection, inspect_text

__all__ = [
    "EncoderInspection",
    "HeadsInspection",
    "Inspection",
    "LanguageInspection",
    "TextInspection",
    "VlmInspection",
    "inspect",
]


def inspect(
    model: Any, inputs: Mapping[str, Any] | None = None, processor: Any = None, *, heads: Mapping[str, Any] | None = None
) -> Inspection | HeadsInspection | LanguageInspection | VlmInspection | TextInspection | EncoderInspection:
    """Say what accelplug sees in a model: attention sites, recipes that match and what they touch, and what there is to gain.

    Parameters
    ----------
    model : a diffusers pipeline or a bare denoiser, a transformers language or vision-language
        model, or an image encoder; it is not changed.
    inputs : vision-language models: what the processor makes of text and images. They are read once, with the images and without,
        and `VlmInspection` says where the model looks, layer by layer. Text models: what the tokenizer makes of a text; `TextInspection`
        says what draws attention in it, and how far heads look. Pipelines: num_frames, height, width, num_inference_steps of the call, if
        not its own.
    processor : with inputs: the model's, so that the question and the answer, or the tokens, are told as text.
    heads : pipelines: settings of `headhunter` (scale, u); layers, whose heads are tried; seed. A picture is made of `inputs`,
        arguments of the call with the prompt, and one guided away from each head alone: as many runs as there are heads.

    Raises
    ------
    NoMatchError
        If it has no denoiser; with inputs, if it is not a known vision-language model or they show no image.
    UnsupportedError
        If models of this kind are not inspected.
    AccelplugError
        If inputs are none of a pipeline's call.
    """
    gives, model = require_ability(model, "inspect").gives, model_in(model)
    if heads is not None:
        return inspect_heads(model, inputs or {}, heads)
    if gives == "answers":
        if inputs is None:
            return inspect_language(model)
        return (inspect_vlm if _shows(model, inputs) else inspect_text)(model, inputs, processor)
    if gives == "features":
        return inspect_encoder(model)
    return inspect_denoiser(model, inputs)


def _shows(model: Any, inputs: Any) -> bool:
    """Whether a model looks at images, or is given some."""
    return vlm_of(model) is not None or hasattr(model.base_model.config, "vision_config") or "pixel_values" in inputs
