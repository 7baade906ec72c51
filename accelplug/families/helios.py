"""Helios: a long video, chunk by chunk. Self-attention over [far history, nearer history, last frames, chunk], cross-attention to the text.

The history stands ahead of the chunk at three resolutions and is exact, as text is elsewhere: its tokens read all, and all read it. No
mask. A new chunk is a new run.
"""

from __future__ import annotations

from typing import Any

from accelplug.families.base import Family, Geometry, Inputs, history_tokens, latent_grid, patch_thw, unsaid


def _behind_its_history(config: Any, inputs: Inputs) -> Geometry | None:
    grid, (frames, rows, columns) = latent_grid(config, inputs, "bcthw"), patch_thw(config)
    patches = {
        f"latents_history_{name}": (by * frames, by * rows, by * columns)
        for name, by in (("short", 1), ("mid", 2), ("long", 4))
    }
    history = history_tokens(inputs, patches)
    return None if grid is None or history is None else Geometry(grid, ahead=history)


HELIOS = Family(
    name="helios",
    classes=("HeliosTransformer3DModel",),
    sites=(("blocks.*.attn1", "joint"), ("blocks.*.attn2", "cross")),
    geometry=_behind_its_history,
    patch=unsaid,  # pipelines are asked for more than a chunk
    status="verified",
)
