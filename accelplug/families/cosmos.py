"""Cosmos 1, Predict2 and 2.5: self-attention over the video without a mask, cross-attention to the text.

Condition and padding masks come as channels, not as tokens.
"""

from accelplug.families.base import SELF_AND_CROSS, Family, latents

COSMOS = Family(
    name="cosmos",
    classes=("CosmosTransformer3DModel",),
    sites=SELF_AND_CROSS,
    geometry=latents("bcthw"),
    timestep=("timestep", "sigma_share", "sigma"),  # Cosmos 1, Predict2, 2.5
)
