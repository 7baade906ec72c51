"""Pictures on which image encoders are compared: opened, cut to whole patches, and laid out as a family's forward takes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelplug.chat import open_picture
from accelplug.errors import AccelplugError
from accelplug.families.encoders import Encoder, patch_hw, raster_places, window_units
from accelplug.zoo import scenes

GENERATED = 2
"""Pictures that are drawn where nobody gives any."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue in [0, 1], where no image processor says others: those of ImageNet."""


@dataclass(frozen=True)
class Pictures:
    """What an image encoder is compared on.

    Attributes
    ----------
    images : paths or PIL images, one or several; or a mapping name -> such. None: scenes that are drawn, and named so.
    size : pixels of the shorter side, which is cut to whole patches; None: the model's own ``image_size``.
    """

    images: Any = None
    size: int | None = None
    opened: Mapping[str, Any] = field(init=False, repr=False, compare=False)
    """Name -> RGB image of PIL's."""

    def __post_init__(self) -> None:
        if self.size is not None and (isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1):
            raise AccelplugError(
                f"size: expected pixels of the shorter side, a whole number of 1 or more, got {self.size!r}."
            )
        object.__setattr__(self, "opened", dict(self._named()))
        if not self.opened:
            raise AccelplugError(
                "There is no picture: expected one or several paths or PIL images, or None for drawn scenes."
            )

    @property
    def generated(self) -> bool:
        """Whether they are drawn scenes, not photographs."""
        return self.images is None

    def _named(self) -> Iterator[tuple[str, Any]]:
        if self.images is None:
            from PIL import Image

            for number in range(GENERATED):
                yield f"generated scene {number}", Image.fromarray(scenes.render(scenes.sample(number))[0])
        elif isinstance(self.images, Mapping):
            yield from ((str(name), open_picture(held)) for name, held in self.images.items())
        else:
            held = self.images if isinstance(self.images, list | tuple) else [self.images]
            for number, one in enumerate(held):
                yield Path(one).name if isinstance(one, str | Path) else f"picture {number}", open_picture(one)


@dataclass(frozen=True)
class Laid:
    """One picture as the forward of a tower takes it.

    Attributes
    ----------
    inputs : arguments of the forward, a batch of one.
    grid : rows and columns of patches.
    ahead : tokens ahead of them.
    places : int64 (S,), which token of the sequence shows each patch, row by row.
    shown : uint8 (H, W, 3), what it shows.
    """

    inputs: dict[str, Any]
    grid: tuple[int, int]
    ahead: int
    places: Tensor
    shown: np.ndarray


def laid_out(
    tower: Any, family: Encoder, picture: Any, size: int | None, processor: Any = None, altered: bool = False
) -> Laid:
    """Lay a picture out for a tower.

    Parameters
    ----------
    tower, family : the encoder.
    picture : an RGB image of PIL's.
    size : pixels of the shorter side; None: as the config says.
    processor : an image processor, for mean and deviation of the colours; None: `MEAN`, `DEVIATION`.
    altered : mirrored, left to right, and a fifth darker.
    """
    from PIL import Image, ImageOps

    config, merge = tower.config, getattr(tower.config, "spatial_merge_size", 1)
    steps = tuple(side * merge for side in patch_hw(config))
    side = size or _own_size(config)
    scale = side / min(picture.size)
    height, width = (
        max(step, round(scale * length) // step * step) for length, step in zip(picture.size[::-1], steps, strict=True)
    )
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    shown = np.asarray(fitted.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if altered else fitted)
    values = torch.from_numpy(shown.astype(np.float32) * ((0.8 if altered else 1.0) / 255)).permute(2, 0, 1)
    mean, deviation = (_colours(processor, name, of) for name, of in (("image_mean", MEAN), ("image_std", DEVIATION)))
    weight = next(tower.parameters())
    pixels = ((values - mean) / deviation).to(weight.device, weight.dtype)
    grid = height // patch_hw(config)[0], width // patch_hw(config)[1]
    order = torch.arange(grid[0] * grid[1])
    if family.pixels == "packed":
        order = torch.tensor(raster_places(*grid, merge, window_units(config)))
    inputs = {"images": _as_image, "padded": _as_padded, "packed": _as_packed}[family.pixels](tower, pixels[None], grid)
    ahead = family.ahead(config)
    return Laid(inputs, grid, ahead, ahead + order.argsort(), shown)


def _own_size(config: Any) -> int:
    size = getattr(config, "image_size", None) or 448
    return size if isinstance(size, int) else min(size)


def _colours(processor: Any, name: str, default: tuple[float, ...]) -> Tensor:
    processor = getattr(processor, "image_processor", processor)
    return torch.tensor(getattr(processor, name, None) or default)[:, None, None]


def _as_image(tower: Any, pixels: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
    more = "interpolate_pos_encoding" in inspect.signature(type(tower).forward).parameters
    return {"pixel_values": pixels, **({"interpolate_pos_encoding": True} if more else {})}


def _patches_of(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches row by row, (N, C, P, P)."""
    side = pixels.shape[-2] // grid[0], pixels.shape[-1] // grid[1]
    cut = pixels[0].unflatten(-1, (grid[1], side[1])).unflatten(-3, (grid[0], side[0]))  # [C, R, P, K, P]
    return cut.permute(1, 3, 0, 2, 4).flatten(0, 1)


def _as_padded(tower: Any, pixels: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
    patches = _patches_of(pixels, grid).permute(0, 2, 3, 1).flatten(1)[None]  # colours fastest
    whole = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
    return {"pixel_values": patches, "pixel_attention_mask": whole, "spatial_shapes": torch.tensor([grid])}


def _as_packed(tower: Any, pixels: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
    config = tower.config
    order = torch.tensor(raster_places(*grid, config.spatial_merge_size), device=pixels.device)
    frames = _patches_of(pixels, grid)[order, :, None].expand(-1, -1, config.temporal_patch_size, -1, -1)
    return {"hidden_states": frames.flatten(1), "grid_thw": torch.tensor([[1, *grid]], device=pixels.device)}
