"""Stable Diffusion 3 and 3.5: joint attention, the image ahead of the text, no mask.

Blocks with dual attention (3.5 medium) have a second one, ``attn2``, over the image alone.
"""

from accelplug.families.base import Family, latents

SD3 = Family(
    name="sd3",
    classes=("SD3Transformer2DModel",),
    sites=(("transformer_blocks.*.attn", "joint"), ("transformer_blocks.*.attn2", "self")),
    geometry=latents("bchw", text=("encoder_hidden_states",)),
    chained=True,
    status="verified",
)
