"""AuraFlow: joint attention in double and then single blocks, no mask; eight register tokens, then the text, then the image."""

from accelplug.families.base import Family, latents

AURAFLOW = Family(
    name="auraflow",
    classes=("AuraFlowTransformer2DModel",),
    sites=(("joint_transformer_blocks.*.attn", "joint"), ("single_transformer_blocks.*.attn", "joint")),
    geometry=latents("bchw", text=("encoder_hidden_states",), text_first=True, ahead=8),
    timestep=("unit",),
    chained=True,
    status="verified",
)
