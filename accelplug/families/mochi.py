"""Mochi: joint attention, the video ahead of the text; one attention call per sample with the valid text only, no mask."""

from accelplug.families.base import Family, latents

MOCHI = Family(
    name="mochi",
    classes=("MochiTransformer3DModel",),
    sites=(("transformer_blocks.*.attn1", "joint"),),
    geometry=latents("bcthw", text=("encoder_hidden_states",), text_drops=True),
    chained=True,
    status="verified",
)
