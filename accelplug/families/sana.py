"""Sana: its self-attention is linear, so there is no score matrix that a sparse method could thin out."""

from accelplug.families.base import Family, unknown

SANA = Family(
    name="sana",
    classes=("SanaTransformer2DModel", "SanaVideoTransformer3DModel"),
    sites=(("transformer_blocks.*.attn2", "cross"),),
    geometry=unknown,
    refuse="its self-attention is linear, its cost already grows with the number of tokens and not with its square.",
    status="dense",
)
