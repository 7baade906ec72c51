"""Cosmos 1, Predict2 and 2.5: self-attention over the video without a mask, cross-attention to the text. Cosmos 3: one packed sequence.

Condition and padding masks of the former come as channels, not as tokens.

Cosmos 3 packs [text, videos, sound, actions], one sample a forward. Text asks in a causal call of its own, which is left alone; the others
ask in a second call of all keys, the text's too: there text is exact and asks nothing. The grid is that of the one video that is
denoised; others (controls), sound and actions are exact, as text is. Keys and values have fewer heads than queries.
"""

from __future__ import annotations

import math
from typing import Any

from accelplug import compat
from accelplug.families.base import SELF_AND_CROSS, Family, Geometry, Inputs, latents

COSMOS = Family(
    name="cosmos",
    classes=("CosmosTransformer3DModel",),
    sites=SELF_AND_CROSS,
    geometry=latents("bcthw"),
    timestep=("timestep", "sigma_share", "sigma"),  # Cosmos 1, Predict2, 2.5
    status="verified",
)


def _omni(config: Any, inputs: Inputs) -> Geometry | None:
    shapes, noisy = inputs.get("vision_token_shapes") or (), inputs.get("vision_noisy_frame_indexes") or ()
    text, length = inputs.get("und_len"), inputs.get("sequence_length")
    denoised = [number for number, frames in enumerate(noisy) if len(frames)]
    if len(denoised) != 1 or len(noisy) != len(shapes) or text is None or length is None:
        return None
    tokens = [math.prod(shape) for shape in shapes]
    if not _is_run(inputs.get("vision_sequence_indexes"), text, sum(tokens)):
        return None
    ahead, visual = sum(tokens[: denoised[0]]), tokens[denoised[0]]
    frames, rows, columns = shapes[denoised[0]]
    behind = length - text - ahead - visual
    return Geometry((frames, rows, columns), (text, text), text_first=True, ahead=ahead, behind=behind, unasked=(text, 0))


def _is_run(indexes: Any, first: int, number: int) -> bool:
    """Whether these are `number` places in order from `first` on. Reading them costs one copy to the host."""
    import torch

    if indexes is None or compat.torch.is_fake(indexes) or indexes.shape != (number,):
        return False  # shapes alone, as under tracing, do not tell
    return torch.equal(indexes.cpu(), torch.arange(first, first + number))


COSMOS3 = Family(
    name="cosmos3",
    classes=("Cosmos3OmniTransformer",),
    sites=(("layers.*.self_attn", "joint"),),
    geometry=_omni,
    text_apart=True,
    latents="vision_tokens",
    status="verified",
    patch=lambda config: (1, config.latent_patch_size, config.latent_patch_size),
)
