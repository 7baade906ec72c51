"""EasyAnimate 5: joint attention, all of the text ahead of the video, no mask; later blocks may share weights between the two.

Inpainting and control latents come as channels. A second text, by T5, stands behind the first.
"""

from accelplug.families.base import Family, latents

EASYANIMATE = Family(
    name="easyanimate",
    classes=("EasyAnimateTransformer3DModel",),
    sites=(("transformer_blocks.*.attn1", "joint"),),
    geometry=latents("bcthw", text=("encoder_hidden_states",), more_text=("encoder_hidden_states_t5",), text_first=True),
    status="verified",
)
