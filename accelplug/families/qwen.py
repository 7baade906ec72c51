"""Qwen-Image: joint attention, the padded text ahead of the image.

Padded text gives a bool mask (B, 1, 1, S), whose invalid keys are inside the sequence, at the end of the text; without padding
there is none. ``img_shapes`` names the grid. Editing and layers bring more images: dense.
"""

from typing import Any

from accelplug.families.base import Family, Geometry, Inputs, shape_of


def by_shapes(config: Any, inputs: Inputs) -> Geometry | None:
    image, text = (shape_of(inputs, name, 3) for name in ("hidden_states", "encoder_hidden_states"))
    samples = [shapes if isinstance(shapes, list) else [shapes] for shapes in inputs.get("img_shapes") or []]
    if image is None or text is None or not samples or any(shapes != samples[0] for shapes in samples):
        return None
    if len(samples[0]) != 1:
        return None
    frames, rows, columns = samples[0][0]
    if image[1] != frames * rows * columns:
        return None
    return Geometry((frames, rows, columns), (text[1], text[1]), text_first=True)


QWEN_IMAGE = Family(
    name="qwen_image",
    classes=("QwenImageTransformer2DModel",),
    sites=(("transformer_blocks.*.attn", "joint"),),
    geometry=by_shapes,
    split_apart=True,
)
