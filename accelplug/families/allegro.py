"""Allegro: self-attention over the video, cross-attention to the text.

An ``attention_mask`` over the video becomes an additive (B, heads, 1, S), which does not say by key what may be read: dense.
"""

from accelplug.families.base import SELF_AND_CROSS, Family, latents, unsaid

ALLEGRO = Family(
    name="allegro",
    classes=("AllegroTransformer3DModel",),
    sites=SELF_AND_CROSS,
    geometry=latents("bcthw"),
    patch=unsaid,  # pipelines round frames as no other does
    status="verified",
)
