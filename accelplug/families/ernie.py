"""ERNIE-Image: one stream, the image ahead of the padded text; a bool mask (B, 1, 1, S), key validity, in every call."""

from accelplug.families.base import Family, latents

ERNIE_IMAGE = Family(
    name="ernie_image",
    classes=("ErnieImageTransformer2DModel",),
    sites=(("layers.*.self_attention", "joint"),),
    geometry=latents("bchw", text=("text_bth",)),
)
