"""Motif-Video: joint attention, the video ahead of an image's tokens and the padded text, in double and then single blocks.

Padded text gives a bool mask (B, 1, 1, S), key validity. The last single blocks may decode: there a second copy of the video stands where
the text was, which the forward's arguments do not tell: dense.
"""

from accelplug.families.base import DOUBLE_AND_SINGLE, Family, latents

MOTIF_VIDEO = Family(
    name="motif_video",
    classes=("MotifVideoTransformer3DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=latents("bcthw", text=("encoder_hidden_states",), more_text=("image_embeds",)),
    status="verified",
)
