"""UNets: Stable Diffusion 1.5 and XL, DreamLite, Kandinsky 3; without text DDPM; over frames AnimateDiff, ModelScope, I2VGen-XL, SVD.

Self-attention over the rows and columns of each resolution, frame by frame, no mask. The grid is that of the input (B, C, H, W) of each
transformer, of each block of attention in Kandinsky 3, and of each block of one resolution in UNets without text (DDPM, consistency
models). What attends over the frames of one place (motion modules, temporal transformers) has no grid.
"""

from accelplug.families.base import Family, latents

UNET = Family(
    name="unet",
    classes=(
        "UNet2DConditionModel",
        "UNetMotionModel",
        "DreamLiteUNetModel",
        "UNet3DConditionModel",
        "I2VGenXLUNet",
        "UNetSpatioTemporalConditionModel",
    ),
    sites=(
        ("*motion_modules.*.attn[12]", "temporal"),
        ("*temp_attentions.*.attn[12]", "temporal"),
        ("transformer_in.*.attn[12]", "temporal"),
        ("*temporal_transformer_blocks.*.attn1", "temporal"),
        ("down_blocks.*.attn1", "self"),
        ("mid_block.*.attn1", "self"),
        ("up_blocks.*.attn1", "self"),
        ("*.attn2", "cross"),
    ),
    geometry=latents("bchw", read="encoder_hidden_states"),
    level=("Transformer2DModel", "DreamLiteTransformer2DModel", "TransformerSpatioTemporalModel"),
    status="verified",
)

KANDINSKY3 = Family(
    name="kandinsky3",
    classes=("Kandinsky3UNet",),
    sites=(
        ("down_blocks.*.attentions.0.attention", "self"),
        ("up_blocks.*.attentions.0.attention", "self"),
        ("*.attentions.*.attention", "cross"),
    ),
    geometry=latents("bchw", name="x"),
    level=("Kandinsky3AttentionBlock",),
)

UNET2D = Family(
    name="unet2d",
    classes=("UNet2DModel",),
    sites=(
        ("down_blocks.*.attentions.*", "self"),
        ("mid_block.attentions.*", "self"),
        ("up_blocks.*.attentions.*", "self"),
    ),
    geometry=latents("bchw"),
    level=("AttnDownBlock2D", "UNetMidBlock2D", "AttnUpBlock2D"),
    latents="sample",
    status="verified",
)
