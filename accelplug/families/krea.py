"""Krea 2: joint attention in one stream, the text ahead of the image.

Latents arrive packed; ``position_ids`` (S, 3) say where a token lies, those of the text first. Padded text gives a bool mask
(B, 1, 1, S), whose invalid keys are inside the sequence, at the end of the text. The text fusion (``text_fusion``) is left alone.
"""

from typing import Any

from accelplug.families.base import Family, Geometry, Inputs, shape_of, two_by_two
from accelplug.families.rasters import once, rows_and_columns


def _behind_text(config: Any, inputs: Inputs) -> Geometry | None:
    image, text, ids = (
        shape_of(inputs, *of) for of in (("hidden_states", 3), ("encoder_hidden_states", 4), ("position_ids", 2))
    )
    if image is None or text is None or ids is None or ids[0] != text[1] + image[1]:
        return None
    grid = once(rows_and_columns, inputs["position_ids"], ahead=text[1])
    return Geometry(grid, (text[1], text[1]), text_first=True) if grid else None


KREA2 = Family(
    name="krea2",
    classes=("Krea2Transformer2DModel",),
    sites=(("transformer_blocks.*.attn", "joint"),),
    geometry=_behind_text,
    patch=two_by_two,
    timestep=("unit",),
    status="verified",
)
