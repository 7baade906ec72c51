"""Kandinsky 5: self-attention over the video, cross-attention to the text; latents are (B, T, H, W, C).

With ``sparse_params`` the model orders its own tokens in 8 x 8 patches and passes a flex ``BlockMask``: dense. Otherwise there is
no mask. The text blocks are left alone.
"""

from typing import Any

from accelplug.families.base import Family, Geometry, Inputs, latents

_raster = latents("bthwc")


def _visual(config: Any, inputs: Inputs) -> Geometry | None:
    return _raster(config, inputs) if inputs.get("sparse_params") is None else None


KANDINSKY5 = Family(
    name="kandinsky5",
    classes=("Kandinsky5Transformer3DModel",),
    sites=(("visual_transformer_blocks.*.self_attention", "self"), ("visual_transformer_blocks.*.cross_attention", "cross")),
    geometry=_visual,
)
