"""Lumina-Next and Lumina 2: self-attention over the image, and one stream of text and image.

Next: self-attention over the image, cross-attention to the text; its mask, (B, heads, S, S), is key validity that was expanded.
2: one stream of the valid text and the image behind it. Captions of several lengths put the images of a batch at several places: dense.
The refiners are left alone. Both are given 1 - t.
"""

from __future__ import annotations

from typing import Any

from accelplug.families.base import Family, Geometry, Inputs, latent_grid, latents
from accelplug.families.rasters import once


def _common(mask: Any) -> int | None:
    """Return how many tokens of each row are valid, or None where rows differ."""
    lengths = set(mask.sum(1).tolist())
    return int(lengths.pop()) if len(lengths) == 1 else None


def behind_valid_text(config: Any, inputs: Inputs) -> Geometry | None:
    grid, mask = latent_grid(config, inputs, "bchw"), inputs.get("encoder_attention_mask")
    text = None if mask is None else once(_common, mask)
    return None if grid is None or text is None else Geometry(grid, (text, text), text_first=True)


LUMINA_NEXT = Family(
    name="lumina_next",
    classes=("LuminaNextDiT2DModel",),
    sites=(("layers.*.attn1", "self"), ("layers.*.attn2", "cross")),
    geometry=latents("bchw"),
    timestep=("inverse",),
    conditional="first",
)
LUMINA2 = Family(
    name="lumina2",
    classes=("Lumina2Transformer2DModel",),
    sites=(("layers.*.attn", "joint"),),
    geometry=behind_valid_text,
    timestep=("inverse",),
    status="verified",
)
