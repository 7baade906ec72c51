"""PixArt, DiT and Latte: self-attention over an image or a frame without a mask, cross-attention to the text where there is any."""

from typing import Any

from accelplug.families.base import SELF_AND_CROSS, Family, Geometry, Inputs, latent_grid, latents, unsaid

PIXART = Family(
    name="pixart",
    classes=("PixArtTransformer2DModel", "DiTTransformer2DModel"),
    sites=SELF_AND_CROSS,
    geometry=latents("bchw"),
    status="verified",
)


def _one_frame(config: Any, inputs: Inputs) -> Geometry | None:
    """Latte folds the frames into the batch for its spatial blocks."""
    grid = latent_grid(config, inputs, "bcthw")
    return Geometry((1, *grid[1:])) if grid else None


LATTE = Family(
    name="latte",
    classes=("LatteTransformer3DModel",),
    sites=(*SELF_AND_CROSS, ("temporal_transformer_blocks.*.attn1", "temporal")),
    geometry=_one_frame,
    patch=unsaid,
    status="verified",
)
