"""Flux.1, Flux.2 and Chroma: joint attention, the text ahead of the image, in double and then single blocks.

Latents arrive packed, and only ``img_ids`` say where a token lies. They are read: tokens are on a grid where the ids are one full
raster of rows and columns. Reference images (Kontext, Flux.2) add ids of their own: dense. Flux passes no mask. Chroma's pipeline passes
float (B, 1, S, S), the product of its padding mask with itself, which is added to the scores: dense.
"""

from __future__ import annotations

from typing import Any

from accelplug import compat
from accelplug.families.base import DOUBLE_AND_SINGLE, Family, Geometry, Grid, Inputs, shape_of, two_by_two


def raster_grid(ids: Any) -> Grid | None:
    """Return (1, rows, columns) where `ids` (S, A), or (B, S, A) with equal samples, are a raster over axes 1 and 2.

    Every other axis must be constant. Reading costs one copy to the host.
    """
    import torch

    if compat.torch.is_fake(ids) or ids.ndim not in (2, 3) or ids.shape[-2] == 0:
        return None  # shapes alone, as under tracing, do not tell
    ids = ids.detach().cpu()
    if ids.ndim == 3:
        if not torch.equal(ids, ids[:1].expand_as(ids)):
            return None
        ids = ids[0]
    rows, columns = (int(n) + 1 for n in ids[-1, 1:3] - ids[0, 1:3])
    if rows < 1 or columns < 1 or rows * columns != len(ids):
        return None
    raster = ids[:1].repeat(len(ids), 1)
    raster[:, 1] += torch.arange(rows).repeat_interleave(columns).to(ids.dtype)
    raster[:, 2] += torch.arange(columns).repeat(rows).to(ids.dtype)
    return (1, rows, columns) if torch.equal(ids, raster) else None


def by_ids(config: Any, inputs: Inputs) -> Geometry | None:
    image, text = (shape_of(inputs, name, 3) for name in ("hidden_states", "encoder_hidden_states"))
    ids = inputs.get("img_ids")
    if image is None or text is None or ids is None or image[1] != ids.shape[-2]:
        return None
    grid = raster_grid(ids)
    return Geometry(grid, (text[1], text[1]), text_first=True) if grid else None


def _without_references(config: Any, inputs: Inputs) -> Geometry | None:
    """Flux.2 with a cache of reference tokens: these are keys that no id of this forward speaks of."""
    return by_ids(config, inputs) if inputs.get("kv_cache_mode") is None else None


FLUX = Family(
    name="flux",
    classes=("FluxTransformer2DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=by_ids,
    patch=two_by_two,
    split_apart=True,
    status="verified",
)
FLUX2 = Family(
    name="flux2",
    classes=("Flux2Transformer2DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=_without_references,
    patch=two_by_two,
    split_apart=True,
)
CHROMA = Family(
    name="chroma",
    classes=("ChromaTransformer2DModel",),
    sites=DOUBLE_AND_SINGLE,
    geometry=by_ids,
    patch=two_by_two,
    status="dense",
)
