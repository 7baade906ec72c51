"""Z-Image: one stream, [image, its padding, caption, its padding]; image and caption are each padded to a multiple of 32 tokens.

The padding tokens are learned and valid, so they count as text. Captions of different length give a bool mask
(B, 1, 1, S), invalid at the end. Images of different size, and the omni mode (lists of images), are dense. The refiners are left alone.
"""

from typing import Any

from accelplug.families.base import Family, Geometry, Inputs, two_by_two

_MULTIPLE = 32


def _padding(tokens: int) -> int:
    return -tokens % _MULTIPLE


def _stream(config: Any, inputs: Inputs) -> Geometry | None:
    images, captions = inputs.get("x"), inputs.get("cap_feats")
    if not images or not captions or any(isinstance(item, list) for item in (*images, *captions)):
        return None
    shapes = {tuple(int(n) for n in image.shape) for image in images}
    if len(shapes) != 1:
        return None
    _, frames, rows, columns = shapes.pop()
    patch, patch_t = inputs.get("patch_size", 2), inputs.get("f_patch_size", 1)
    grid = frames // patch_t, rows // patch, columns // patch
    visual = grid[0] * grid[1] * grid[2]
    text = _padding(visual) + max(len(caption) + _padding(len(caption)) for caption in captions)
    return Geometry(grid, (text, text))


Z_IMAGE = Family(
    name="z_image",
    classes=("ZImageTransformer2DModel",),
    sites=(("layers.*.attention", "joint"),),
    geometry=_stream,
    patch=two_by_two,
    timestep=("inverse",),
    conditional="first",
    status="verified",
)
