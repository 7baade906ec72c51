"""Sound: self-attention along time, cross-attention to the text. It lies on a grid of one row and one column.

Orders, tiles and windows are then along time alone. What stands ahead of the sound is exact: a token of global conditions (Stable Audio),
of the time (MiniMax Music 3), learned ones (Stable Audio 3). Every other layer of ACE-Step attends in a sliding window, by an additive
mask: dense. Stable Audio 3 subtracts one attention from another: two calls at each module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelplug.families.base import Family, Geometry, Inputs, shape_of, unsaid


def _along_time(axes: str, ahead: Callable[[Any, Inputs], int] = lambda config, inputs: 0) -> Callable[..., Geometry | None]:
    """Return the geometry of latents with the dimensions `axes`, with as many tokens ahead of them as `ahead` says."""

    def geometry(config: Any, inputs: Inputs) -> Geometry | None:
        shape = shape_of(inputs, "hidden_states", 3)
        if shape is None:
            return None
        frames = -(-shape[axes.index("t")] // (getattr(config, "patch_size", None) or 1))
        tokens = ahead(config, inputs)
        return Geometry((frames, 1, 1), (tokens, tokens), text_first=True)

    return geometry


def _global_tokens(config: Any, inputs: Inputs) -> int:
    shape = shape_of(inputs, "global_hidden_states", 3)
    return shape[1] if shape else 0


STABLE_AUDIO = Family(
    name="stable_audio",
    classes=("StableAudioDiTModel",),
    sites=(("transformer_blocks.*.attn1", "joint"), ("transformer_blocks.*.attn2", "cross")),
    geometry=_along_time("bct", _global_tokens),
    patch=unsaid,
)
STABLE_AUDIO_3 = Family(
    name="stable_audio_3",
    classes=("StableAudio3DiTModel",),
    sites=(("transformer_blocks.*.self_attn", "joint"), ("transformer_blocks.*.cross_attn", "cross")),
    geometry=_along_time("bct", lambda config, inputs: config.num_memory_tokens),
    patch=unsaid,
)
MINIMAX_MUSIC_3 = Family(
    name="minimax_music_3",
    classes=("MiniMaxMusic3Transformer1DModel",),
    sites=(("transformer_blocks.*.attn", "joint"),),
    geometry=_along_time("bct", lambda config, inputs: 1),
    patch=unsaid,
)
ACE_STEP = Family(
    name="ace_step",
    classes=("AceStepTransformer1DModel",),
    sites=(("layers.*.self_attn", "self"), ("layers.*.cross_attn", "cross")),
    geometry=_along_time("btc"),
    patch=unsaid,
)
LONGCAT_AUDIO = Family(
    name="longcat_audio",
    classes=("LongCatAudioDiTTransformer",),
    sites=(("blocks.*.self_attn", "self"), ("blocks.*.cross_attn", "cross")),
    geometry=_along_time("btc"),
    patch=unsaid,
)
