"""A family's pixel tensors as pictures, and back: what a method that crops or masks the image works on.

A picture is what the model sees: resized, cropped and normalised by its processor, so that 0 is the mean pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelplug.errors import ShapeError, UnsupportedError
from accelplug.families.vlm import Vlm


def pictures(family: Vlm, inputs: Mapping[str, Any], vision: Any = None) -> list[Tensor]:
    """Return the pictures in ``pixel_values``, in order, each (3, H, W) float32.

    Parameters
    ----------
    family : the model's family.
    inputs : arguments of the model, ``pixel_values`` among them, and what says how many patches a picture has (`patch_grids`).
    vision : the model's ``vision_config``, for families whose pixels lie in patches.

    Raises
    ------
    UnsupportedError
        If the family cuts pictures into tiles or has them in a form of its own, or a picture has several frames.
    ShapeError
        If there are no pixels, or not as many as the grids say.
    """
    pixels = _pixels(family, inputs)
    if family.pixels == "images":
        return [picture[:, :h, :w].float() for picture, (h, w) in zip(pixels, _sizes(family, inputs, pixels), strict=True)]
    grids = _grids(family, inputs, pixels, vision)
    if family.pixels == "filled":
        return [_row_by_row(each, grid).float() - family.mean for each, grid in zip(pixels, grids, strict=True)]
    parts = pixels.split([rows * columns for rows, columns in grids])
    return [frames(part, (1, *grid), vision)[0].float() for part, grid in zip(parts, grids, strict=True)]


def replace(family: Vlm, inputs: Mapping[str, Any], shown: Sequence[Tensor], vision: Any = None) -> dict[str, Any]:
    """Return the inputs with other pictures of the same sizes; see `pictures` for parameters and errors.

    ``pixel_values`` keep shape, dtype and device. Of the frames that a still picture is repeated in, all are replaced.
    """
    pixels = _pixels(family, inputs)
    got, expected = ([tuple(p.shape) for p in each] for each in (shown, pictures(family, inputs, vision)))
    if got != expected:
        raise ShapeError(
            f"The new pictures are of shapes {got}, expected {expected}: give as many pictures as there were, each of the size that it had."
        )
    if family.pixels == "images":
        height, width = pixels.shape[2:]
        new = torch.stack([pad(p.to(pixels), (0, width - p.shape[2], 0, height - p.shape[1])) for p in shown])
    elif family.pixels == "filled":
        new = torch.stack([_filled_up((p + family.mean).to(pixels), pixels) for p in shown])
    else:
        new = torch.cat([_patches(p.to(pixels), vision) for p in shown])
    return {**inputs, "pixel_values": new}


def _sizes(family: Vlm, inputs: Mapping[str, Any], pixels: Tensor) -> list[tuple[int, int]]:
    """Rows and columns of pixels of each of ``images``, which may be filled up to those of the largest."""
    if family.grid == "own" and (told := inputs.get("image_sizes")) is not None:
        return [(int(height), int(width)) for height, width in told]
    return [(pixels.shape[2], pixels.shape[3])] * len(pixels)


def _pixels(family: Vlm, inputs: Mapping[str, Any]) -> Tensor:
    if family.pixels == "tiles":
        raise UnsupportedError(
            f"{family.name} cuts a picture into tiles of several scales, which do not come together again as one picture. Take "
            "a model that sees whole pictures: LLaVA-1.5, Qwen-VL, Gemma 3, InternVL with one tile."
        )
    if family.pixels == "other":
        raise UnsupportedError(
            f"{family.name} is given its pixels in a form that does not come together as one picture here. Take a model that sees "
            "whole pictures: LLaVA-1.5, Qwen-VL, Gemma 3 and 4, LFM2-VL."
        )
    pixels = inputs.get("pixel_values")
    expected = {"images": 4, "patches": 2, "filled": 3}[family.pixels]
    if not isinstance(pixels, Tensor) or pixels.ndim != expected:
        got = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ShapeError(f"pixel_values of {family.name} must be a tensor of {expected} dimensions, got {got}.")
    return pixels


def patch_grids(inputs: Mapping[str, Any], vision: Any = None) -> list[tuple[int, int, int]] | None:
    """Return frames, and rows and columns of patches, of each picture, as a model's arguments have them; None where they do not.

    Parameters
    ----------
    inputs : arguments of the model: ``image_grid_thw`` (N, 3), ``spatial_shapes`` or ``target_sizes`` (N, 2), ``image_position_ids``
        (N, most, 2) of columns and rows from 0, or ``image_sizes`` (N, 2) in pixels.
    vision : the model's ``vision_config``, for sizes in pixels.
    """
    if (grids := inputs.get("image_grid_thw")) is not None:
        return [(frames, rows, columns) for frames, rows, columns in grids.tolist()]
    if (places := inputs.get("image_position_ids")) is not None:
        return [(1, rows + 1, columns + 1) for columns, rows in places.amax(1).tolist()]
    shapes = next((x for name in ("spatial_shapes", "target_sizes") if (x := inputs.get(name)) is not None), None)
    if shapes is None and inputs.get("image_sizes") is not None and isinstance(getattr(vision, "patch_size", None), int):
        shapes = torch.as_tensor(inputs["image_sizes"]) // vision.patch_size
    return None if shapes is None else [(1, rows, columns) for rows, columns in shapes.tolist()]


def _grids(family: Vlm, inputs: Mapping[str, Any], pixels: Tensor, vision: Any) -> list[tuple[int, int]]:
    """Patch rows and columns of each picture."""
    grids = patch_grids(inputs, vision)
    if grids is None:
        raise ShapeError(
            f"Nothing in the arguments of {family.name} says how many rows and columns of patches a picture has."
        )
    if any(frames != 1 for frames, _, _ in grids):
        raise UnsupportedError(f"Pictures of one frame are expected, image_grid_thw says {grids}. Pass videos as videos.")
    patches = [rows * columns for _, rows, columns in grids]
    whole = len(grids) == len(pixels) and max(patches) <= pixels.shape[1] if family.pixels == "filled" else None
    if not (sum(patches) == len(pixels) if whole is None else whole):
        raise ShapeError(f"Pictures of {grids} patches and pixel_values of shape {tuple(pixels.shape)} do not fit together.")
    return [(rows, columns) for _, rows, columns in grids]


def _row_by_row(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put a picture's patches (most, P * P * 3), row by row, together: (3, H, W)."""
    rows, columns = grid
    size = isqrt(patches.shape[-1] // 3)
    x = patches[: rows * columns].reshape(rows, columns, size, size, 3).permute(4, 0, 2, 1, 3)
    return x.reshape(3, rows * size, columns * size)


def _filled_up(picture: Tensor, like: Tensor) -> Tensor:
    """Undo `_row_by_row`, filled up with zeros to as many patches as in `like` (N, most, P * P * 3)."""
    size = isqrt(like.shape[-1] // 3)
    rows, columns = picture.shape[1] // size, picture.shape[2] // size
    x = picture.reshape(3, rows, size, columns, size).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
    return pad(x, (0, 0, 0, like.shape[1] - rows * columns))


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
