"""Stable Audio: sound lies along one axis, behind a token of global conditions; there is no grid, so it runs dense."""

from accelplug.families.base import Family, unknown

STABLE_AUDIO = Family(
    name="stable_audio",
    classes=("StableAudioDiTModel",),
    sites=(("transformer_blocks.*.attn1", "self"), ("transformer_blocks.*.attn2", "cross")),
    geometry=unknown,
    status="dense",
)
