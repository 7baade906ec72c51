"""Kandinsky 5 and 6: self-attention over the video, cross-attention to the text; latents are (B, T, H, W, C), no mask.

With ``sparse_params`` Kandinsky 5 orders its own tokens in 8 x 8 patches and passes a flex ``BlockMask``: dense. Kandinsky 6 denoises sound
beside the video, in attentions of its own, and may have a frame of reference behind the others that takes the place of the first: such
frames are exact, as text is elsewhere. Text blocks, sound, and what goes between sound and video are left alone.
"""

from __future__ import annotations

from typing import Any

from accelplug import compat
from accelplug.families.base import Family, Geometry, Inputs, latents

_raster = latents("bthwc")


def _visual(config: Any, inputs: Inputs) -> Geometry | None:
    return _raster(config, inputs) if inputs.get("sparse_params") is None else None


KANDINSKY5 = Family(
    name="kandinsky5",
    classes=("Kandinsky5Transformer3DModel",),
    sites=(("visual_transformer_blocks.*.self_attention", "self"), ("visual_transformer_blocks.*.cross_attention", "cross")),
    geometry=_visual,
    status="verified",
)


def _with_a_reference(config: Any, inputs: Inputs) -> Geometry | None:
    geometry, places = _raster(config, inputs), inputs.get("visual_rope_pos")
    if geometry is None or places is None:
        return geometry
    if any(compat.torch.is_fake(axis) for axis in places):
        return None  # shapes alone, as under tracing, do not tell
    frames, rows, columns = geometry.grid_thw
    time, *space = (axis.tolist() for axis in places)
    if space != [list(range(rows)), list(range(columns))]:
        return None
    in_order = next((frame for frame, place in enumerate(time) if place != frame), frames)
    return Geometry((in_order, rows, columns), behind=(frames - in_order) * rows * columns)


KANDINSKY6 = Family(
    name="kandinsky6",
    classes=("Kandinsky6Transformer3DModel",),
    sites=(
        ("visual_transformer_blocks.*.video_dec_block.self_attention", "joint"),
        ("visual_transformer_blocks.*.video_dec_block.cross_attention", "cross"),
    ),
    geometry=_with_a_reference,
    status="verified",
)
