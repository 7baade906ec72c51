"""Wan 2.1 and 2.2, and what was built on it: self-attention over the video, cross-attention to the text.

Wan and SkyReels-V2 pass no mask to self-attention, but for SkyReels-V2 with ``num_frame_per_block > 1``: a block-causal
(1, 1, S, S), which is more than key padding and so runs dense. Image-to-video conditions come as channels, and Wan-Animate's
reference image as one more latent frame; neither adds tokens beside the grid. Timesteps per token (Wan 2.2 5B) change
modulation only. ChronoEdit edits an image as a video from the old to the new one, of two latent frames in its last steps. AnyFlow has two
timesteps, that it is at and that it goes to, and frames ahead of channels.

Wan-Animate-2 reads a driving video once, by self-attention over it, and keeps its keys. The steps then attend to these and to
themselves through a flex ``BlockMask`` of the model's own: dense. What a rule names is the reading.
"""

from __future__ import annotations

from typing import Any

from accelplug.families.base import AnyOrder, Family, Geometry, Inputs, latents, patch_thw, unsaid

WAN = Family(
    name="wan",
    classes=("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel"),
    sites=(
        ("blocks.*.attn1", "self"),
        ("blocks.*.attn2", "cross"),
    ),  # the blocks of VACE's control branch, vace_blocks, are left alone
    geometry=latents("bcthw"),
    # Not VACE and Animate, which add hints and faces to the tokens between blocks; nor SkyReels-V2, which may pass a mask.
    any_order=AnyOrder(
        denoiser="WanTransformer3DModel",
        blocks="blocks",
        block="WanTransformerBlock",
        processor="WanAttnProcessor",
        # Cosines and sines (1, S, 1, D); modulation is (B, 6, C), or (B, S, 6, C) with a timestep per token.
        arguments=(("hidden_states", 3), ("rotary_emb", 4), ("temb", 4)),
    ),
    status="verified",
)

SKYREELS = Family(name="skyreels", classes=("SkyReelsV2Transformer3DModel",), sites=WAN.sites, geometry=latents("bcthw"))
CHRONOEDIT = Family(
    name="chronoedit",
    classes=("ChronoEditTransformer3DModel",),
    sites=WAN.sites,
    geometry=latents("bcthw"),
    patch=unsaid,  # two frames, whatever number is asked for, where it does not reason
    status="verified",
)
ANYFLOW = Family(
    name="anyflow",
    classes=("AnyFlowTransformer3DModel",),
    sites=WAN.sites,
    geometry=latents("btchw"),
    status="verified",
)


def _driving_video(config: Any, inputs: Inputs) -> Geometry | None:
    shapes = {tuple(int(n) for n in x.shape) for x in inputs.get("hidden_states") or ()}
    if inputs.get("kv_cache_mode") != "extract" or len(shapes) != 1:
        return None
    _, frames, rows, columns = shapes.pop()
    patch = patch_thw(config)
    return Geometry((frames // patch[0], rows // patch[1], columns // patch[2]))


WAN_ANIMATE_2 = Family(
    name="wan_animate_2",
    classes=("WanAnimate2Transformer3DModel",),
    sites=(("blocks.*.self_attn", "self"), ("blocks.*.cross_attn", "cross")),
    geometry=_driving_video,
    timestep=("timestep",),
)
