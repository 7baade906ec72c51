"""Classes of diffusers among its denoisers that no patch is for, and of transformers that do not look at images as a prompt's tokens."""

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


CROSS = "its images are read by cross-attention, and are not tokens of the prompt."
ENCODED = "an encoder reads the image, and its decoder reads what that makes of it by cross-attention."
OLDER = "its attention does not say how heads share keys, by which patches come in."
PAST = "generate calls its language model past it, with images and text mixed already, so that which tokens are images is not known."
INDEXED = "it chooses which keys are read, and hides the others under transformers' own attention functions alone."
STREAMS = "its layers pass on several streams, and what of them enters attention is not told."
BIASED = "it adds a bias by relative position to its scores, which head patches do not know of."

UNSUPPORTED_VLMS: dict[str, str] = {
    "BlipForConditionalGeneration": CROSS,
    "Blip2ForConditionalGeneration": OLDER,
    "DiffusionGemmaForBlockDiffusion": "it writes blocks of tokens by diffusion, and reads none of them as an answer that goes on.",
    "Dots3NoteForConditionalGeneration": INDEXED,
    "EvollaForProteinText2Text": "it reads proteins, by cross-attention, and no images.",
    "Florence2ForConditionalGeneration": ENCODED,
    "FuyuForCausalLM": OLDER,
    "GitForCausalLM": OLDER,
    "Glm5NextForConditionalGeneration": STREAMS,
    "HYV4VLForConditionalGeneration": INDEXED,
    "IdeficsForVisionText2Text": CROSS,
    "Inkling2ForConditionalGeneration": BIASED,
    "Inkling2LoopForConditionalGeneration": BIASED,
    "InklingForConditionalGeneration": BIASED,
    "InstructBlipForConditionalGeneration": PAST,
    "InstructBlipVideoForConditionalGeneration": PAST,
    "Kosmos2ForConditionalGeneration": OLDER,
    "Kosmos2_5ForConditionalGeneration": OLDER,
    "MiniMaxM3SparseForConditionalGeneration": INDEXED,
    "Mistral4ForCausalLM": "it reads text alone.",
    "MistralLarge4ForConditionalGeneration": INDEXED,
    "MllamaForConditionalGeneration": CROSS,
    "NemotronH_Omni_Reasoning_V3": "its attention does not ask transformers for its function.",
    "PI0ForConditionalGeneration": "it says how a robot moves, and writes no text.",
    "PPFormulaNetForConditionalGeneration": ENCODED,
    "Pix2StructForConditionalGeneration": ENCODED,
    "T5Gemma2ForConditionalGeneration": ENCODED,
    "UdopForConditionalGeneration": ENCODED,
    "VisionEncoderDecoderModel": ENCODED,
}
"""Class -> why patches that look at images cannot go on, as the end of a sentence that begins with its name."""
