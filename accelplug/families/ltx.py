"""LTX and LTX-2: self-attention over the video, cross-attention to the text; latents arrive packed, (B, T * H * W, C).

LTX passes no mask to self-attention. LTX-2 passes an additive (B, S, S) where conditions are weighed, which runs dense.
Condition tokens that stand beside the frames make the count differ from T * H * W: dense. A pipeline that gives
coordinates (``video_coords``) without ``num_frames, height, width`` is not understood: dense.
"""

from typing import Any

from accelplug.families.base import SELF_AND_CROSS, Family, Geometry, Inputs, shape_of


def by_sizes(config: Any, inputs: Inputs) -> Geometry | None:
    frames, rows, columns = (inputs.get(name) for name in ("num_frames", "height", "width"))
    shape = shape_of(inputs, "hidden_states", 3)
    if shape is None or not (frames and rows and columns) or shape[1] != frames * rows * columns:
        return None
    return Geometry((frames, rows, columns))


LTX = Family(
    name="ltx",
    classes=("LTXVideoTransformer3DModel",),
    sites=SELF_AND_CROSS,
    geometry=by_sizes,
    chained=True,
    status="verified",
)

LTX2 = Family(
    name="ltx2",
    classes=("LTX2VideoTransformer3DModel",),
    # The four other attentions of a block have the sound as queries or keys, and are left alone.
    sites=SELF_AND_CROSS,
    geometry=by_sizes,
    status="verified",
)
