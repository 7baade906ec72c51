"""Wan 2.1 and 2.2, and what was built on it: self-attention over the video, cross-attention to the text.

Wan and SkyReels-V2 pass no mask to self-attention, but for SkyReels-V2 with ``num_frame_per_block > 1``: a block-causal
(1, 1, S, S), which is more than key padding and so runs dense. Image-to-video conditions come as channels, and Wan-Animate's
reference image as one more latent frame; neither adds tokens beside the grid. Timesteps per token (Wan 2.2 5B) change
modulation only. ChronoEdit edits an image as a video from the old to the new one, of two latent frames in its last steps. AnyFlow has two
timesteps, that it is at and that it goes to, and frames ahead of channels.

Wan-Animate-2 reads a driving video once, by self-attention over it, and keeps its keys. The steps then attend to these and to
themselves through a flex ``BlockMask`` of the model's own: dense. What a rule names is the reading.

AnyFlow FAR makes a video chunk by chunk: a chunk reads the keys that are kept of those before it, few of each early frame and all of later
ones. These ask nothing. What its chunk is padded with is read, as the model has it. Filling the cache goes under a flex ``BlockMask``:
dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from accelplug.families.base import AnyOrder, Family, Geometry, Inputs, Rotary, latents, patch_thw, shape_of, unsaid

WAN_TIME = Rotary(
    channels=lambda config: config.attention_head_dim - 4 * (config.attention_head_dim // 6), base=lambda config: 10_000.0
)
"""Rows and columns have two thirds of a head's channels, in whole pairs."""


def _geometry(axes: str) -> Callable[[Any, Inputs], Geometry | None]:
    """Cross-attention reads the text alone, but where a picture is read too, in a call of its own beside that of the last 512 tokens."""
    grid, with_text = latents(axes), latents(axes, read="encoder_hidden_states")

    def geometry(config: Any, inputs: Inputs) -> Geometry | None:
        return (with_text if inputs.get("encoder_hidden_states_image") is None else grid)(config, inputs)

    return geometry


WAN = Family(
    name="wan",
    classes=("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel"),
    sites=(
        ("blocks.*.attn1", "self"),
        ("blocks.*.attn2", "cross"),
    ),  # the blocks of VACE's control branch, vace_blocks, are left alone
    geometry=_geometry("bcthw"),
    # Not VACE and Animate, which add hints and faces to the tokens between blocks; nor SkyReels-V2, which may pass a mask.
    any_order=AnyOrder(
        denoiser="WanTransformer3DModel",
        blocks="blocks",
        block="WanTransformerBlock",
        processor="WanAttnProcessor",
        # Cosines and sines (1, S, 1, D); modulation is (B, 6, C), or (B, S, 6, C) with a timestep per token.
        arguments=(("hidden_states", 3), ("rotary_emb", 4), ("temb", 4)),
    ),
    rotary=WAN_TIME,
    conditional="apart",
    chained=True,
    status="verified",
)

SKYREELS = Family(
    name="skyreels",
    classes=("SkyReelsV2Transformer3DModel",),
    sites=WAN.sites,
    geometry=_geometry("bcthw"),
    rotary=WAN_TIME,
    chained=True,
    status="verified",
)
CHRONOEDIT = Family(
    name="chronoedit",
    classes=("ChronoEditTransformer3DModel",),
    sites=WAN.sites,
    geometry=_geometry("bcthw"),
    patch=unsaid,  # two frames, whatever number is asked for, where it does not reason
    status="verified",
)
ANYFLOW = Family(
    name="anyflow",
    classes=("AnyFlowTransformer3DModel",),
    sites=WAN.sites,
    geometry=_geometry("btchw"),
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


def _one_chunk(config: Any, inputs: Inputs) -> Geometry | None:
    """A chunk of frames, asked behind the keys that are kept of those before it, and padded to whole blocks of 128 tokens."""
    shape, frames, flag = shape_of(inputs, "hidden_states", 5), inputs.get("chunk_partition"), inputs.get("kv_cache_flag")
    if shape is None or not frames or not flag or flag.get("is_cache_step") or inputs.get("kv_cache") is None:
        return None
    near, far = (
        (shape[3] // rows) * (shape[4] // columns) for _, rows, columns in (config.patch_size, config.compressed_patch_size)
    )
    kept = flag["num_cached_chunks"]
    coarse = max(kept + 1 - config.full_chunk_limit, 0)
    ahead = sum(frames[:coarse]) * far + sum(frames[coarse:kept]) * near
    _, rows, columns = config.patch_size
    grid = shape[1], shape[3] // rows, shape[4] // columns
    return Geometry(grid, ahead=ahead, behind=-math.prod(grid) % 128, unasked=(ahead, 0))


ANYFLOW_FAR = Family(
    name="anyflow_far",
    classes=("AnyFlowFARTransformer3DModel",),
    sites=(("blocks.*.attn1", "joint"), ("blocks.*.attn2", "cross")),
    geometry=_one_chunk,
    patch=unsaid,  # pipelines are asked for more than a chunk
    status="verified",
)
