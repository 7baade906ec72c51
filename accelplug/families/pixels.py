"""A family's pixel tensors as pictures, and back: what a method that crops or masks the image works on.

A picture is what the model sees: resized, cropped and normalised by its processor, so that 0 is the mean pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accelplug.errors import ShapeError, UnsupportedError
from accelplug.families.vlm import Vlm


def pictures(family: Vlm, inputs: Mapping[str, Any], vision: Any = None) -> list[Tensor]:
    """Return the pictures in ``pixel_values``, in order, each (3, H, W) float32.

    Parameters
    ----------
    family : the model's family.
    inputs : arguments of the model, ``pixel_values`` among them, and ``image_grid_thw`` (N, 3) where the family has one.
    vision : the model's ``vision_config``, for families whose pixels lie in patches.

    Raises
    ------
    UnsupportedError
        If the family cuts pictures into tiles, or a picture has several frames.
    ShapeError
        If there are no pixels, or not as many as the grids say.
    """
    pixels = _pixels(family, inputs)
    if family.pixels == "images":
        return [picture.float() for picture in pixels]
    grids = _grids(inputs, pixels)
    parts = pixels.split([rows * columns for rows, columns in grids])
    return [frames(part, (1, *grid), vision)[0].float() for part, grid in zip(parts, grids, strict=True)]


def replace(family: Vlm, inputs: Mapping[str, Any], pictures: Sequence[Tensor], vision: Any = None) -> dict[str, Any]:
    """Return the inputs with other pictures of the same sizes; see `pictures` for parameters and errors.

    ``pixel_values`` keep shape, dtype and device. Of the frames that a still picture is repeated in, all are replaced.
    """
    pixels = _pixels(family, inputs)
    rows = [p.to(pixels) if family.pixels == "images" else _patches(p.to(pixels), vision) for p in pictures]
    new = torch.stack(rows) if family.pixels == "images" else torch.cat(rows)
    if new.shape != pixels.shape:
        raise ShapeError(
            f"The new pictures make pixel_values of shape {tuple(new.shape)}, expected {tuple(pixels.shape)}: give as many "
            "pictures as there were, each of the size that it had."
        )
    return {**inputs, "pixel_values": new}


def _pixels(family: Vlm, inputs: Mapping[str, Any]) -> Tensor:
    if family.pixels == "tiles":
        raise UnsupportedError(
            f"{family.name} cuts a picture into tiles of several scales, which do not come together again as one picture. Take "
            "a model that sees whole pictures: LLaVA-1.5, Qwen-VL, Gemma 3, InternVL with one tile."
        )
    pixels = inputs.get("pixel_values")
    expected = 4 if family.pixels == "images" else 2
    if not isinstance(pixels, Tensor) or pixels.ndim != expected:
        got = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ShapeError(f"pixel_values of {family.name} must be a tensor of {expected} dimensions, got {got}.")
    return pixels


def _grids(inputs: Mapping[str, Any], pixels: Tensor) -> list[tuple[int, int]]:
    """Patch rows and columns of each picture."""
    grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
    if any(frames != 1 for frames, _, _ in grids):
        raise UnsupportedError(f"Pictures of one frame are expected, image_grid_thw says {grids}. Pass videos as videos.")
    if sum(rows * columns for _, rows, columns in grids) != len(pixels):
        raise ShapeError(f"image_grid_thw {grids} and {len(pixels)} rows of pixel_values do not fit together.")
    return [(rows, columns) for _, rows, columns in grids]


def frames(patches: Tensor, grid_thw: Sequence[int], vision: Any) -> Tensor:
    """Put patches together: (T, C, H, W), of every T the first of the frames that its patches hold.

    Parameters
    ----------
    patches : (T * rows * columns, C * frames * P * P), those of a merged token side by side.
    grid_thw : T, and rows and columns of patches.
    vision : the model's ``vision_config``.
    """
    size, held, merge = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
    times, rows, columns = grid_thw
    x = patches.reshape(times, rows // merge, columns // merge, merge, merge, -1, held, size, size)[..., 0, :, :]
    x = x.permute(0, 5, 1, 3, 6, 2, 4, 7)  # [T, C, rows/m, m, P, columns/m, m, P]
    return x.reshape(times, x.shape[1], rows * size, columns * size)


def _patches(picture: Tensor, vision: Any) -> Tensor:
    """Undo `frames` of one, every frame the same."""
    size, frames, merge = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
    channels, height, width = picture.shape
    rows, columns = height // size, width // size
    x = picture.reshape(channels, rows // merge, merge, size, columns // merge, merge, size)
    x = x.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :].expand(*(-1,) * 5, frames, -1, -1)
    return x.reshape(rows * columns, channels * frames * size * size)
