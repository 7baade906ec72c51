"""JoyImage Edit and Edit Plus: joint attention, the picture first, then its reference images, then the text.

Edit takes items of one size, (B, N, C, T, H, W), of which the last is the picture; the model puts it in front. It passes no mask.
Edit Plus takes patches of pictures of any sizes, filled up at the end, and ``shape_list``; its bool mask (B, 1, 1, S) is key validity.
"""

import math
from typing import Any

from accelplug.families.base import Family, Geometry, Inputs, latent_grid, shape_of


def by_items(config: Any, inputs: Inputs) -> Geometry | None:
    items, text = shape_of(inputs, "hidden_states", 6), shape_of(inputs, "encoder_hidden_states", 3)
    grid = latent_grid(config, inputs, "bcthw" if items is None else "bncthw")
    if grid is None or text is None:
        return None
    references = 0 if items is None else items[1] - 1
    return Geometry(grid, (text[1], text[1]), behind=references * math.prod(grid))


def by_shape_list(config: Any, inputs: Inputs) -> Geometry | None:
    patches, text = shape_of(inputs, "hidden_states", 6), shape_of(inputs, "encoder_hidden_states", 3)
    grids = {tuple(shapes[0]) for shapes in inputs.get("shape_list") or []}
    if patches is None or text is None or len(grids) != 1:
        return None
    frames, rows, columns = grids.pop()
    return Geometry((frames, rows, columns), (text[1], text[1]), behind=patches[1] - frames * rows * columns)


JOYIMAGE = Family(
    name="joyimage",
    classes=("JoyImageEditTransformer3DModel",),
    sites=(("double_blocks.*.attn", "joint"),),
    geometry=by_items,
)
JOYIMAGE_PLUS = Family(
    name="joyimage_plus",
    classes=("JoyImageEditPlusTransformer3DModel",),
    sites=JOYIMAGE.sites,
    geometry=by_shape_list,
)
