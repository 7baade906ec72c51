"""Ideogram 4: one stream of padding, text and image, in a model for the prompt and one without a prompt (``unconditional_transformer``).

The mask is bool (B, 1, S, S): tokens read those of their own segment, and padding is a segment. The row of an image token is the
validity of keys; rows of padding then read other keys than in the stock model, but what they answer is read by nobody.
``indicator`` says which tokens are the image's, ``position_ids`` how they lie: read once for the steps of a run.
"""

from __future__ import annotations

from typing import Any

from accelplug.families.base import Family, Geometry, Grid, Inputs
from accelplug.families.rasters import once, rows_and_columns

_IMAGE = 2
"""What ``indicator`` says of a token of the image."""


def _last_image(ids: Any, roles: Any, segments: Any) -> tuple[Grid, int] | None:
    """Return the grid of one image at the end of every sample, and how many tokens stand ahead of it; None where it is otherwise."""
    image = roles.cpu() == _IMAGE
    first = image.shape[1] - int(image[0].sum())
    if first == image.shape[1] or bool(image[:, :first].any()) or not bool(image[:, first:].all()):
        return None
    if bool((segments[:, first:] != segments[:, -1:]).any()):
        return None
    grid = rows_and_columns(ids[:, first:])
    return None if grid is None else (grid, first)


def by_roles(config: Any, inputs: Inputs) -> Geometry | None:
    tensors = [inputs.get(name) for name in ("position_ids", "indicator", "segment_ids")]
    found = None if any(tensor is None for tensor in tensors) else once(_last_image, *tensors)
    if found is None:
        return None
    grid, first = found
    return Geometry(grid, (first, first), text_first=True)


IDEOGRAM4 = Family(
    name="ideogram4",
    classes=("Ideogram4Transformer2DModel",),
    sites=(("layers.*.attention", "joint"),),
    geometry=by_roles,
    outer_mask=True,
    timestep=("inverse",),
    status="verified",
)
