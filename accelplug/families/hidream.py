"""HiDream-I1: joint attention in double and then single blocks, the image ahead of the text, no mask.

Pictures that are not square are filled up to as many tokens as the largest resolution has: these stand behind the image, with keys
of zero, and count as text. Each block reads the last Llama layer and its own beside T5. Pictures that come packed, with masks of
their own, are dense.
"""

import math
from typing import Any

from accelplug.families.base import Family, Geometry, Inputs, latent_grid, patch_thw, shape_of


def filled_up(config: Any, inputs: Inputs) -> Geometry | None:
    grid = latent_grid(config, inputs, "bchw")
    t5, llama = shape_of(inputs, "encoder_hidden_states_t5", 3), shape_of(inputs, "encoder_hidden_states_llama3", 4)
    if grid is None or t5 is None or llama is None or inputs.get("hidden_states_masks") is not None:
        return None
    most = math.prod(config.max_resolution) // math.prod(patch_thw(config))
    text = t5[1] + 2 * llama[2]
    return Geometry(grid, (text, text), behind=0 if grid[1] == grid[2] else most - math.prod(grid))


HIDREAM = Family(
    name="hidream",
    classes=("HiDreamImageTransformer2DModel",),
    sites=(("double_stream_blocks.*.attn1", "joint"), ("single_stream_blocks.*.attn1", "joint")),
    geometry=filled_up,
)
