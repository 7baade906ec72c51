"""Nucleus-Image: the image asks alone, of its own keys and then the text's; bool (B, S) where text is padded, key validity."""

import math
from typing import Any

from accelplug.families.base import Family, Geometry, Inputs, shape_of, two_by_two


def beside_its_text(config: Any, inputs: Inputs) -> Geometry | None:
    image, text = (shape_of(inputs, name, 3) for name in ("hidden_states", "encoder_hidden_states"))
    shapes = inputs.get("img_shapes") or []
    grids = set(shapes if isinstance(shapes, list) else [shapes])
    if image is None or text is None or len(grids) != 1:
        return None
    frames, rows, columns = grids.pop()
    if image[1] != math.prod((frames, rows, columns)):
        return None
    return Geometry((frames, rows, columns), (text[1], text[1]), unasked=(0, text[1]))


NUCLEUS_IMAGE = Family(
    name="nucleus_image",
    classes=("NucleusMoEImageTransformer2DModel",),
    sites=(("transformer_blocks.*.attn", "joint"),),
    geometry=beside_its_text,
    patch=two_by_two,
    timestep=("unit",),
)
