"""MiniMax-H3: one packed sequence, [text | conditions | audio | video], without a mask.

The target video comes last, t-major. Key frames and references stand ahead of it, each with its sound, and so does the target's own
sound: all of these are read and answered densely. ``video_indices`` names the rows of all that is seen, ``position_ids`` (S, 3) where
they lie, at distances of their own: frames are 5/3 * (1, 4, 4, 4, 4) apart, rows and columns 32 by the picture's side. The last run of
indices is the target. Both are read once a run.

The text refiner (``token_refiner``) attends over the text alone and is left alone. A forward has a timestep for each kind of rows, the
target's the smallest: 0 is noise. Context parallelism cuts the packed sequence, wherever that falls: dense.
"""

from __future__ import annotations

from typing import Any

from accelplug.families.base import Family, Geometry, Inputs
from accelplug.families.rasters import full_raster, once


def _target(position_ids: Any, video_indices: Any) -> Geometry | None:
    places = video_indices.detach().cpu()
    breaks = (places.diff() != 1).nonzero().flatten().tolist()
    ahead = int(places[breaks[-1] + 1 if breaks else 0])
    if int(places[-1]) + 1 != len(position_ids):
        return None
    grid = full_raster(position_ids[ahead:].detach().cpu(), (0, 1, 2))
    return Geometry(grid, (ahead, ahead), text_first=True) if grid else None


def _packed_target(config: Any, inputs: Inputs) -> Geometry | None:
    ids, places = inputs.get("position_ids"), inputs.get("video_indices")
    return once(_target, ids, places) if ids is not None and places is not None and len(places) else None


MINIMAX_H3 = Family(
    name="minimax_h3",
    classes=("MiniMaxH3Transformer3DModel",),
    sites=(("transformer_blocks.*.attn", "joint"),),
    geometry=_packed_target,
    timestep=("timestep",),
    status="verified",
)
