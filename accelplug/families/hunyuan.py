"""HunyuanVideo, HunyuanImage 2.1 and HunyuanDiT: joint attention, the grid ahead of the text; the text is padded at its end.

Masks that reach attention: 1.0 passes bool (B, 1, 1, S), key validity. 1.5 re-orders the text, valid tokens first, and its
processor builds bool (B, 1, S, S), the outer product of one validity; a visual token is always valid, so the first row is that
validity. Rows of invalid text then have no key at all in the stock model, and some keys with us: what they answer is
read by nobody, because they are invalid keys of every later layer and only visual tokens leave the model.

HunyuanImage lies as 1.0 does, with bool (B, 1, 1, S) too; glyphs are a second text, sorted in with the first. HunyuanDiT has
self-attention over the image without a mask, and cross-attention to the text.

Framepack makes a video section by section. A history at three resolutions stands ahead of the section and is exact, an image's tokens ahead
of the text. One sample has its valid text alone; several have a mask bool (B, 1, 1, S).

The text refiners (``context_embedder``) have attention of the same classes over the text alone and are left alone.

diffusers has no plan of context parallelism for either. With one that splits text and grid of 1.0 ahead of the first block
(`examples/hunyuan_two_gpus.py`) the mask stays as it was made, over the grid and the text behind it, and is held against tokens that lie
rank by rank: that is the same where the padding is within the last rank's share of the text.
"""

from __future__ import annotations

from typing import Any

from accelplug.families.base import (
    DOUBLE_AND_SINGLE,
    Family,
    Geometry,
    Inputs,
    Rotary,
    history_tokens,
    latent_grid,
    latents,
    shape_of,
    unsaid,
)

HUNYUAN_TIME = Rotary(channels=lambda config: config.rope_axes_dim[0], base=lambda config: config.rope_theta)

HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    classes=("HunyuanVideoTransformer3DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=latents("bcthw", text=("encoder_hidden_states",)),
    rotary=HUNYUAN_TIME,
    split_apart=True,
    conditional="apart",
    chained=True,
    status="verified",
)

HUNYUAN_VIDEO_15 = Family(
    name="hunyuan_video_15",
    classes=("HunyuanVideo15Transformer3DModel",),
    sites=DOUBLE_AND_SINGLE[:1],
    geometry=latents("bcthw", text=("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")),
    rotary=HUNYUAN_TIME,
    outer_mask=True,
    conditional="apart",
    chained=True,
    status="verified",
)


def _framepack(config: Any, inputs: Inputs) -> Geometry | None:
    grid, image, text = (
        latent_grid(config, inputs, "bcthw"),
        *(shape_of(inputs, n, 3) for n in ("image_embeds", "encoder_hidden_states")),
    )
    history = history_tokens(
        inputs, {"latents_clean": (1, 2, 2), "latents_history_2x": (2, 4, 4), "latents_history_4x": (4, 8, 8)}
    )
    if grid is None or image is None or text is None or history is None:
        return None
    return Geometry(grid, (image[1], image[1] + text[1]), ahead=history)


FRAMEPACK = Family(
    name="framepack",
    classes=("HunyuanVideoFramepackTransformer3DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=_framepack,
    patch=unsaid,  # pipelines are asked for more than a section
)


def _image(config: Any, inputs: Inputs) -> Geometry | None:
    """Pictures, or their refiner's, which have a frame; the glyphs are left out where the model has no use for them."""
    axes = "bcthw" if shape_of(inputs, "hidden_states", 5) else "bchw"
    glyphs = getattr(config, "text_embed_2_dim", None) and inputs.get("encoder_hidden_states_2") is not None
    text = ("encoder_hidden_states", "encoder_hidden_states_2") if glyphs else ("encoder_hidden_states",)
    return latents(axes, text=text)(config, inputs)


HUNYUAN_IMAGE = Family(
    name="hunyuan_image",
    classes=("HunyuanImageTransformer2DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=_image,
    chained=True,
    status="verified",
)

HUNYUAN_DIT = Family(
    name="hunyuan_dit",
    classes=("HunyuanDiT2DModel",),
    sites=(("blocks.*.attn1", "self"), ("blocks.*.attn2", "cross")),
    geometry=latents("bchw"),
)
