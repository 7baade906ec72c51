"""Qwen-Image and Qwen-Image 2.1: joint attention, the text ahead of the image; ``img_shapes`` names the grids.

Padded text gives a bool mask (B, 1, 1, S), whose invalid keys are inside the sequence, at the end of the text; without padding
there is none. Editing puts reference images behind the image. Layers are as many images of one size, which lie as frames do.

In 2.1 reference images come first, among the text that speaks of them, and the image last. What stands ahead of it is read
causally, run by run, in calls of its own, and the image asks alone: of all keys, with a mask (B, 1, 1, S) where text is padded. From
the second step on the keys ahead of it are cached, and it is all that is asked. With ``QwenImage21FlexAttnProcessor`` the first step
passes a flex ``BlockMask`` and is dense.
"""

import math
from typing import Any

from accelplug.families.base import Family, Geometry, Grid, Inputs, shape_of

_TOKENS_A_SLOT = 4
"""Latent tokens of 2.1 that stand for one place of a picture in the text."""


def images(inputs: Inputs) -> list[Grid] | None:
    """Return the grids that ``img_shapes`` names for a sample, or None where they are not all there are, the same for all samples."""
    image = shape_of(inputs, "hidden_states", 3)
    samples = [shapes if isinstance(shapes, list) else [shapes] for shapes in inputs.get("img_shapes") or []]
    if image is None or not samples or any(shapes != samples[0] for shapes in samples):
        return None
    return samples[0] if image[1] == sum(map(math.prod, samples[0])) else None


def by_shapes(config: Any, inputs: Inputs) -> Geometry | None:
    text, shapes = shape_of(inputs, "encoder_hidden_states", 3), images(inputs)
    if text is None or shapes is None:
        return None
    grid, *others = shapes
    if getattr(config, "use_layer3d_rope", False):
        *layers, last = shapes
        if not layers or any(layer != grid for layer in layers):
            return None
        grid, others = (len(layers) * grid[0], *grid[1:]), [last]
    return Geometry(grid, (text[1], text[1]), text_first=True, behind=sum(map(math.prod, others)))


def behind_its_text(config: Any, inputs: Inputs) -> Geometry | None:
    text, shapes = shape_of(inputs, "encoder_hidden_states", 3), images(inputs)
    if text is None or shapes is None:
        return None
    *references, grid = shapes
    before = sum(map(math.prod, references))
    words = text[1] - before // _TOKENS_A_SLOT
    return Geometry(grid, (words, words), text_first=True, ahead=before, unasked=(before + words, 0))


QWEN_IMAGE = Family(
    name="qwen_image",
    classes=("QwenImageTransformer2DModel",),
    sites=(("transformer_blocks.*.attn", "joint"),),
    geometry=by_shapes,
    split_apart=True,
    conditional="apart",
    chained=True,
    status="verified",
)
QWEN_IMAGE_21 = Family(
    name="qwen_image_21",
    classes=("QwenImage21Transformer2DModel",),
    sites=QWEN_IMAGE.sites,
    geometry=behind_its_text,
    text_apart=True,
    timestep=("unit",),
    status="verified",
)
