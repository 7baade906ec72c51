"""The families of image encoders: how the patches of pictures lie in what they attend to. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from accelplug.catalog import Catalog, EntryPoints
from accelplug.errors import AccelplugError


@dataclass(frozen=True)
class Encoder:
    """Data about one family.

    Attributes
    ----------
    name : short name.
    classes : names of the classes whose forward is given pixels: whole models, backbones, vision towers.
    pixels : how they come. ``images``: ``pixel_values`` (B, C, H, W), cut into squares of the config's ``patch_size``, row by row.
        ``padded``: (B, N, C * P * P), patches row by row, then padding, with ``spatial_shapes`` (B, 2), rows and columns of each.
        ``packed``: (sum of T * H * W, ...), pictures one behind the other, with ``grid_thw`` (N, 3); every frame attends to itself
        alone, and the patches that are merged into a token later lie together.
    special : tokens ahead of the patches, the class token among them. They are read by all, and read all.
    registers : key of the config that says how many more there are; none if empty.
    """

    name: str
    classes: tuple[str, ...]
    pixels: Literal["images", "padded", "packed"] = "images"
    special: int = 0
    registers: str = ""

    def ahead(self, config: Any) -> int:
        """Return how many tokens stand ahead of the patches."""
        return self.special + (getattr(config, self.registers) if self.registers else 0)


KNOWN_ENCODERS = (
    Encoder("dinov2", ("Dinov2Model", "Dinov2Backbone"), special=1),
    Encoder(
        "dinov2-registers",
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        special=1,
        registers="num_register_tokens",
    ),
    Encoder("dinov3", ("DINOv3ViTModel", "DINOv3ViTBackbone"), special=1, registers="num_register_tokens"),
    Encoder("vit", ("ViTModel", "ViTMSNModel"), special=1),
    Encoder("deit", ("DeiTModel",), special=2),
    Encoder("ijepa", ("IJepaModel",)),
    Encoder("clip", ("CLIPVisionModel", "CLIPVisionTransformer", "MetaClip2VisionModel", "MLCDVisionModel"), special=1),
    Encoder("siglip", ("SiglipVisionModel", "SiglipVisionTransformer")),
    Encoder("siglip2", ("Siglip2VisionModel", "Siglip2VisionTransformer"), "padded"),
    Encoder("internvl", ("InternVLVisionModel",), special=1),
    Encoder("smolvlm", ("SmolVLMVisionTransformer", "Idefics3VisionTransformer")),
    Encoder(
        "qwen-vl",
        (
            "Qwen2VisionTransformerPretrainedModel",
            "Qwen2_5_VisionTransformerPretrainedModel",
            "Qwen3VLVisionModel",
            "Qwen3VLMoeVisionModel",
            "Qwen3_5VisionModel",
        ),
        "packed",
    ),
)


def encoder_of(module: Any) -> Encoder | None:
    """Return the family of a module by the names of its class and the classes that it derives from, or None."""
    return ENCODER_CATALOG.of(module)


def list_encoders() -> tuple[Encoder, ...]:
    """Return all known families: ours, then those of others."""
    return ENCODER_CATALOG.all()


def register_encoder(family: Encoder) -> Encoder:
    """Have a family's classes known as image encoders: patches of denoisers go on, and the recipes of ``encoder`` fit.

    Parameters
    ----------
    family : its classes, and how its patches lie. What is registered already may come again.

    Raises
    ------
    AccelplugError
        If it is not an `Encoder`, names no class, or another family has one of its classes.
    """
    if not isinstance(family, Encoder) or not family.classes or isinstance(family.classes, str):
        raise AccelplugError(
            f"register_encoder: expected an Encoder that names model classes, got {family!r}. Give it classes=(...)."
        )
    ENCODER_CATALOG.add(family.classes, family)
    return family


ENCODER_CATALOG: Catalog[Encoder] = Catalog(
    "image encoder",
    {cls: family for family in KNOWN_ENCODERS for cls in family.classes},
    EntryPoints("accelplug.encoders", register_encoder),
)


def patch_hw(config: Any) -> tuple[int, int]:
    """Return rows and columns of pixels of a patch."""
    size = config.patch_size
    height, width = size if isinstance(size, Iterable) else (size, size)
    return height, width


def windowed_layers(config: Any, layers: int) -> frozenset[int]:
    """Return which of so many layers read windows by the model's own design, as Qwen2.5-VL's tower has them."""
    whole = getattr(config, "fullatt_block_indexes", None)
    return frozenset() if whole is None else frozenset(range(layers)) - frozenset(whole)


def window_units(config: Any) -> int:
    """Return how many merged tokens a side of the model's own windows has, by which its tokens lie in order; 0 without windows."""
    if getattr(config, "fullatt_block_indexes", None) is None:
        return 0
    return config.window_size // config.spatial_merge_size // config.patch_size


@lru_cache(maxsize=64)
def raster_places(rows: int, columns: int, merge: int = 1, window: int = 0) -> tuple[int, ...]:
    """Return where each patch of a packed picture lies in its raster, in the order in which they come.

    Parameters
    ----------
    rows, columns : of patches.
    merge : patches a side that are merged into a token later: they come one after the other.
    window : merged tokens a side of a window: those of a window come one after the other; 0 for no windows.
    """
    down, right = rows // merge, columns // merge
    side = window or max(down, right)
    units = [
        (row, column)
        for top in range(0, down, side)
        for left in range(0, right, side)
        for row in range(top, min(top + side, down))
        for column in range(left, min(left + side, right))
    ]
    inside = [(y, x) for y in range(merge) for x in range(merge)]
    return tuple((row * merge + y) * columns + column * merge + x for row, column in units for y, x in inside)
