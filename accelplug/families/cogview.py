"""CogView 3+, CogView 4 and GLM-Image: joint attention, the text ahead of the image.

Their pipelines pass no mask. One of text that is given to the model becomes float (B, 1, S, S), added to the scores: dense.

GLM-Image edits by keys of reference images that a first forward has cached: these stand ahead of the text, and ask nothing. That forward
itself (``write``) is dense.
"""

from dataclasses import replace
from typing import Any

from accelplug.families.base import Family, Geometry, Inputs, latents

_text_then_image = latents("bchw", text=("encoder_hidden_states",), text_first=True)

COGVIEW = Family(
    name="cogview",
    classes=("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
    sites=(("transformer_blocks.*.attn1", "joint"),),
    geometry=_text_then_image,
    status="verified",
)


def behind_cached(config: Any, inputs: Inputs) -> Geometry | None:
    caches, geometry = inputs.get("kv_caches"), _text_then_image(config, inputs)
    if geometry is None or caches is None or caches[0].mode not in ("read", "write"):
        return geometry
    lengths = {keys.shape[1] for keys in caches[0].k_caches}
    if caches[0].mode == "write" or len(lengths) > 1:
        return None
    cached = sum(lengths)
    return replace(geometry, ahead=cached, unasked=(cached, 0))


GLM_IMAGE = Family(name="glm_image", classes=("GlmImageTransformer2DModel",), sites=COGVIEW.sites, geometry=behind_cached)
