"""Cosmos 1, Predict2 and 2.5: self-attention over the video without a mask, cross-attention to the text.

Condition and padding masks come as channels, not as tokens.
"""

from accelplug.families.base import Family, latents

COSMOS = Family(
    name="cosmos",
    classes=("CosmosTransformer3DModel",),
    sites=(("transformer_blocks.*.attn1", "self"), ("transformer_blocks.*.attn2", "cross")),
    geometry=latents("bcthw"),
    timestep=("timestep", "sigma_share", "sigma"),  # Cosmos 1, Predict2, 2.5
)
