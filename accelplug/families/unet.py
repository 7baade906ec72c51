"""UNets: Stable Diffusion 1.5 and XL, and AnimateDiff. Self-attention over the rows and columns of each resolution, no mask.

The grid is that of the input (B, C, H, W) of each ``Transformer2DModel``. AnimateDiff's motion modules attend over the frames
of one place, so they have no grid.
"""

from accelplug.families.base import Family, latents

UNET = Family(
    name="unet",
    classes=("UNet2DConditionModel", "UNetMotionModel"),
    sites=(
        ("*motion_modules.*.attn[12]", "temporal"),
        ("down_blocks.*.attn1", "self"),
        ("mid_block.*.attn1", "self"),
        ("up_blocks.*.attn1", "self"),
        ("*.attn2", "cross"),
    ),
    geometry=latents("bchw"),
    level=("Transformer2DModel",),
    status="verified",
)
