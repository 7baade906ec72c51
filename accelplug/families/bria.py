"""Bria 3.2, FIBO, FIBO 2, LongCat-Image and Ovis-Image: joint attention, the text ahead of the image.

All but FIBO 2 lie as Flux does, references behind the image too. FIBO passes a bool mask (B, 1, 1, S), key validity, where text is
padded.

FIBO 2 has Z-Image's blocks: gist tokens, as many as the length of the text says, then the image, then the images to edit. Where a
batch pads its gist, that stands at the end, with a bool mask (B, 1, 1, S). The noise refiner and the perceiver are left alone.
"""

from __future__ import annotations

import math
from typing import Any

from accelplug.families.base import DOUBLE_AND_SINGLE, Family, Geometry, Inputs, latent_grid, shape_of, two_by_two, unsaid
from accelplug.families.flux import by_ids
from accelplug.families.rasters import once

BRIA = Family(name="bria", classes=("BriaTransformer2DModel",), sites=DOUBLE_AND_SINGLE, geometry=by_ids, patch=two_by_two)
FIBO = Family(
    name="fibo",
    classes=("BriaFiboTransformer2DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=by_ids,
    patch=unsaid,  # as the call says
)
LONGCAT_IMAGE = Family(
    name="longcat_image",
    classes=("LongCatImageTransformer2DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=by_ids,
    patch=two_by_two,
    timestep=("unit",),
)
OVIS_IMAGE = Family(
    name="ovis_image",
    classes=("OvisImageTransformer2DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=by_ids,
    patch=two_by_two,
    timestep=("unit",),
)


def _lengths(mask: Any) -> tuple[int, ...]:
    return tuple(mask.sum(1).tolist())


def _gist(config: Any, length: int) -> int:
    """Return how many gist tokens a text of `length` tokens has."""
    share = (length - config.gist_min_text_len) / (config.gist_max_text_len - config.gist_min_text_len)
    fewest, most = config.min_num_gist_tokens, config.max_num_gist_tokens
    number = fewest + min(max(share, 0.0), 1.0) * (most - fewest)
    return max(fewest, min(most, math.ceil(number / config.gist_step) * config.gist_step))


def by_gist(config: Any, inputs: Inputs) -> Geometry | None:
    grid, text = latent_grid(config, inputs, "bchw"), shape_of(inputs, "encoder_hidden_states", 4)
    if grid is None or text is None:
        return None
    mask, edited = inputs.get("encoder_attention_mask"), inputs.get("context_latents") or []
    lengths = (text[2],) if mask is None else once(_lengths, mask)
    if lengths is None:
        return None
    counts = {_gist(config, length) for length in lengths}
    behind = sum(math.prod(n // config.patch_size for n in latents.shape[-2:]) for latents in edited)
    return Geometry(grid, (max(counts), max(counts)), text_first=len(counts) == 1, behind=behind)


FIBO2 = Family(
    name="fibo2",
    classes=("BriaFibo2Transformer2DModel",),
    sites=(("layers.*.attention", "joint"), ("layers.*.cross_attention", "cross")),
    geometry=by_gist,
    timestep=("unit",),
)
