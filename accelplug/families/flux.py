"""Flux.1, Flux.2, Flux.3 and Chroma: joint attention, the text ahead of the image, in double and then single blocks.

Latents arrive packed, and only ``img_ids`` say where a token lies. They are read: tokens are on a grid where the ids are one full
raster of rows and columns. Reference images (Kontext, Flux.2) stand behind, with ids of their own. Flux passes no mask.
Chroma's pipeline passes float (B, 1, S, S), the product of its padding mask with itself, which is added to the scores: dense.

Flux.3 has self-attention over each kind of tokens, the image's, the references' and the text's, ahead of joint attention over
[text | image | references]. References have an argument of their own, and are read and answered densely.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from accelplug.families.base import DOUBLE_AND_SINGLE, Family, Geometry, Inputs, shape_of, two_by_two
from accelplug.families.rasters import image_and_others, once


def by_ids(config: Any, inputs: Inputs) -> Geometry | None:
    image, text = (shape_of(inputs, name, 3) for name in ("hidden_states", "encoder_hidden_states"))
    ids = inputs.get("img_ids")
    if image is None or text is None or ids is None or image[1] != ids.shape[-2]:
        return None
    if (found := once(image_and_others, ids)) is None:
        return None
    grid, others = found
    return Geometry(grid, (text[1], text[1]), text_first=True, behind=others)


def _without_references(config: Any, inputs: Inputs) -> Geometry | None:
    """Flux.2 with a cache of reference tokens: these are keys that no id of this forward speaks of."""
    return by_ids(config, inputs) if inputs.get("kv_cache_mode") is None else None


def _with_references(config: Any, inputs: Inputs) -> Geometry | None:
    """Flux.3: reference images stand behind the image."""
    image, references = by_ids(config, inputs), shape_of(inputs, "image_cond_hidden_states", 3)
    return image if image is None or references is None else replace(image, behind=image.behind + references[1])


FLUX = Family(
    name="flux",
    classes=("FluxTransformer2DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=by_ids,
    patch=two_by_two,
    split_apart=True,
    conditional="apart",
    chained=True,
    status="verified",
)
FLUX2 = Family(
    name="flux2",
    classes=("Flux2Transformer2DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=_without_references,
    patch=two_by_two,
    split_apart=True,
    conditional="apart",
    chained=True,
    status="verified",
)
FLUX3 = Family(
    name="flux3",
    classes=("Flux3Transformer2DModel",),
    sites=(("mode_blocks.image.*.attn", "self"), ("single_transformer_blocks.*.attn", "joint")),
    geometry=_with_references,
    patch=two_by_two,
    timestep=("unit",),
    status="verified",
)
CHROMA = Family(
    name="chroma",
    classes=("ChromaTransformer2DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=by_ids,
    patch=two_by_two,
    conditional="apart",
    chained=True,
    status="dense",
)
