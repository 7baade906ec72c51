"""What a pipeline makes, as a clip: of a classic pipeline or a modular one, a picture being a clip of one frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from accelplug import compat
from accelplug.errors import UnsupportedError

DECODED = ("videos", "images")
"""What modular pipelines call what they decode."""


def clip_of(pipe: Any, given: Mapping[str, Any]) -> tuple[np.ndarray, Tensor | None]:
    """Call a pipeline for the first clip that it decodes, float32 (F, H, W, 3), and a modular one for its latents, where it leaves them.

    Raises
    ------
    UnsupportedError
        If a modular pipeline decodes nothing.
    """
    latents = None
    if not compat.diffusers.blocks_of(pipe):
        out = pipe(**given, output_type="np")
        all_frames = out if isinstance(out, np.ndarray) else np.asarray(out[0])
    else:
        name = decoded(pipe)
        state = pipe(**given, output_type="np")
        all_frames, latents = np.asarray(state.get(name)), state.get("latents")
    frames = all_frames[0]
    clip = frames if frames.ndim == 4 else frames[None]
    return clip.astype(np.float32), latents if isinstance(latents, Tensor) else None


def decoded(pipe: Any) -> str:
    """Return what a modular pipeline calls the frames that it decodes."""
    left = compat.diffusers.outputs_of(pipe)
    name = next((name for name in DECODED if name in left), None)
    if name is None:
        raise UnsupportedError(
            f"The blocks of {type(pipe).__name__} leave {', '.join(sorted(left)) or 'nothing'}; expected {' or '.join(DECODED)}. "
            "Use a pipeline whose last block decodes."
        )
    return name
