"""Tiny image encoders with random weights, in the real classes of transformers, and pictures of noise for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from accelplug.testing.models import Built, noise

TOWER_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 48}


def dinov2(**config: Any) -> Built:
    """A class token ahead of 6 x 8 patches."""
    return hf.Dinov2Model(hf.Dinov2Config(**{**TOWER_SIZES, "mlp_ratio": 2, **config})), {
        "pixel_values": noise(1, 3, 48, 64)
    }


def dinov3() -> Built:
    """A class token and four registers ahead of 7 x 9 patches, with rotary embedding: a block lacks one patch."""
    config = hf.DINOv3ViTConfig(**TOWER_SIZES, intermediate_size=64, num_register_tokens=4)
    return hf.DINOv3ViTModel(config), {"pixel_values": noise(1, 3, 56, 72)}


def siglip2(*shapes: tuple[int, int]) -> Built:
    """Patches alone, 5 x 13 where nothing is said, one more than whole blocks, and padding behind them."""
    shapes = shapes or ((5, 13),)
    sizes = {**TOWER_SIZES, "intermediate_size": 64, "num_patches": 36}
    del sizes["image_size"]
    tokens = torch.tensor([height * width for height, width in shapes])
    longest = int(tokens.max()) + 3
    valid = (torch.arange(longest) < tokens[:, None]).int()
    inputs = {
        "pixel_values": noise(len(shapes), longest, 3 * 8 * 8),
        "pixel_attention_mask": valid,
        "spatial_shapes": torch.tensor(shapes),
    }
    return hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**sizes, vision_use_head=False)), inputs


ENCODERS_TRIED: dict[str, Callable[[], Built]] = {"dinov2": dinov2, "dinov3": dinov3, "siglip2": siglip2}
"""An image encoder of each sort: other tokens ahead of the patches, one or several, or none, and padding behind them."""
