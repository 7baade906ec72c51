"""Classes of diffusers among its denoisers that no patch is for, each with the reason."""

from __future__ import annotations

PART = "it is a part of other denoisers, and goes on with those: apply to the pipeline, or to the whole denoiser."
LINEAR = "its self-attention is linear, its cost already grows with the number of tokens and not with its square."
SHORT = "it attends over a thousand tokens at most, where reading fewer keys saves nothing."

UNSUPPORTED: dict[str, str] = {
    "DreamLiteTransformer2DModel": PART,
    "DualTransformer2DModel": PART,
    "Kandinsky6SRTransformer3DModel": (
        "its attention is sparse by itself: in every call it picks blocks of 64 tokens, and its weights were trained for that."
    ),
    "MiniMaxMusic3RVQDepthDecoder": "it writes the few codes of one sound frame one by one, and does not denoise.",
    "MotionAdapter": "it only holds weights that a UNetMotionModel takes over: apply to that.",
    "PriorTransformer": SHORT,
    "RFD4ProteinaTransformer": (
        "it denoises proteins: residues lie on no grid, and every call adds what is known of each pair of them to its scores."
    ),
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": (
        "it is given one run of tokens, and nothing that says how many rows and columns a frame has."
    ),
    "SanaWMTransformer3DModel": (
        "most of its blocks have linear attention, and the others attend in modules without a processor, by which patches come in."
    ),
    "StableCascadeUNet": SHORT,
    "T5FilmDecoder": SHORT,
    "Transformer2DModel": PART,
    "TransformerTemporalModel": PART,
    "UNet1DModel": "its attention has no processor, by which patches come in.",
    "UVit2DModel": SHORT,
}
"""Class -> why its attention cannot be patched, as the end of a sentence that begins with its name."""
