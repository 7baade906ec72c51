"""PRX: the image asks alone, of the text's keys and then its own; a bool mask (B, 1, 1, S) is key validity."""

from typing import Any

from accelplug.families.base import Family, Geometry, Inputs, latent_grid, shape_of


def behind_text_keys(config: Any, inputs: Inputs) -> Geometry | None:
    grid, text = latent_grid(config, inputs, "bchw"), shape_of(inputs, "encoder_hidden_states", 3)
    if grid is None or text is None:
        return None
    return Geometry(grid, (text[1], text[1]), text_first=True, unasked=(text[1], 0))


PRX = Family(
    name="prx",
    classes=("PRXTransformer2DModel",),
    sites=(("blocks.*.attention", "joint"),),
    geometry=behind_text_keys,
    timestep=("unit",),
)
