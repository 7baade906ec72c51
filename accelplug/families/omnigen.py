"""OmniGen: one stream of text with reference images, a token of the time and the image.

Text is read causally. The mask says so by numbers to add, (B, 1, S, S), for which no key validity can stand: dense.
"""

from accelplug.families.base import Family, unknown

OMNIGEN = Family(
    name="omnigen",
    classes=("OmniGenTransformer2DModel",),
    sites=(("layers.*.self_attn", "joint"),),
    geometry=unknown,
    status="dense",
)
