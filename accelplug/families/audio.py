"""Stable Audio: sound lies along one axis, behind a token of global conditions; there is no grid, so it runs dense."""

from accelplug.families.base import SELF_AND_CROSS, Family, unknown

STABLE_AUDIO = Family(
    name="stable_audio",
    classes=("StableAudioDiTModel",),
    sites=SELF_AND_CROSS,
    geometry=unknown,
    status="dense",
)
