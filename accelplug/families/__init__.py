"""The families of denoisers: for each model class, where it attends and how its tokens lie. Imports no torch."""

from __future__ import annotations

from typing import Any

from accelplug.families.allegro import ALLEGRO
from accelplug.families.audio import STABLE_AUDIO
from accelplug.families.base import Family
from accelplug.families.cogvideox import COGVIDEOX
from accelplug.families.cosmos import COSMOS
from accelplug.families.flux import CHROMA, FLUX, FLUX2
from accelplug.families.hunyuan import FRAMEPACK, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from accelplug.families.kandinsky import KANDINSKY5
from accelplug.families.ltx import LTX, LTX2
from accelplug.families.mochi import MOCHI
from accelplug.families.pixart import LATTE, PIXART
from accelplug.families.qwen import QWEN_IMAGE
from accelplug.families.sana import SANA
from accelplug.families.sd3 import SD3
from accelplug.families.unet import UNET
from accelplug.families.wan import SKYREELS, WAN
from accelplug.families.zimage import Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    WAN,
    SKYREELS,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    FRAMEPACK,
    COGVIDEOX,
    MOCHI,
    LTX,
    LTX2,
    COSMOS,
    ALLEGRO,
    KANDINSKY5,
    FLUX,
    FLUX2,
    CHROMA,
    SD3,
    QWEN_IMAGE,
    Z_IMAGE,
    PIXART,
    LATTE,
    UNET,
    SANA,
    STABLE_AUDIO,
)

_BY_CLASS = {name: family for family in FAMILIES for name in family.classes}


def find(model: Any) -> Family | None:
    """Return the family of a denoiser by the names of its class and the classes that it derives from, or None."""
    return next((_BY_CLASS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _BY_CLASS), None)
