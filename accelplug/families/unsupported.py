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
UNTRIED = "it has not been compared with plain attention. register_vlm(Vlm(...)) takes it on your word."

UNSUPPORTED_VLMS: dict[str, str] = {
    "Apertus1p5ForConditionalGeneration": UNTRIED,
    "AriaForConditionalGeneration": UNTRIED,
    "BlipForConditionalGeneration": CROSS,
    "Blip2ForConditionalGeneration": PAST,
    "ChameleonForConditionalGeneration": UNTRIED,
    "CohereCompassForConditionalGeneration": UNTRIED,
    "Cosmos3EdgeForConditionalGeneration": UNTRIED,
    "Cosmos3OmniForConditionalGeneration": UNTRIED,
    "DeepseekOcr2ForConditionalGeneration": UNTRIED,
    "DeepseekVLHybridForConditionalGeneration": UNTRIED,
    "DiffusionGemmaForBlockDiffusion": "it writes blocks of tokens by diffusion, and reads none of them as an answer that goes on.",
    "Dots3NoteForConditionalGeneration": UNTRIED,
    "Emu3ForConditionalGeneration": UNTRIED,
    "Ernie4_5_VLMoeForConditionalGeneration": UNTRIED,
    "EvollaForProteinText2Text": "it reads proteins, by cross-attention, and no images.",
    "Exaone4_5_ForConditionalGeneration": UNTRIED,
    "FastVlmForConditionalGeneration": UNTRIED,
    "Florence2ForConditionalGeneration": ENCODED,
    "FuyuForCausalLM": OLDER,
    "Gemma4UnifiedForConditionalGeneration": UNTRIED,
    "GitForCausalLM": OLDER,
    "Glm5NextForConditionalGeneration": UNTRIED,
    "GotOcr2ForConditionalGeneration": UNTRIED,
    "Granite4VisionForConditionalGeneration": UNTRIED,
    "GraniteDoclingForConditionalGeneration": UNTRIED,
    "HunYuanVLForConditionalGeneration": UNTRIED,
    "HYV4VLForConditionalGeneration": UNTRIED,
    "HyperCLOVAXVisionV2ForConditionalGeneration": UNTRIED,
    "IdeficsForVisionText2Text": CROSS,
    "Inkling2ForConditionalGeneration": UNTRIED,
    "Inkling2LoopForConditionalGeneration": UNTRIED,
    "InklingForConditionalGeneration": UNTRIED,
    "InstructBlipForConditionalGeneration": PAST,
    "InstructBlipVideoForConditionalGeneration": PAST,
    "JanusForConditionalGeneration": UNTRIED,
    "Kosmos2ForConditionalGeneration": OLDER,
    "Kosmos2_5ForConditionalGeneration": OLDER,
    "Lfm3VlForConditionalGeneration": UNTRIED,
    "LightOnOcrForConditionalGeneration": UNTRIED,
    "MiniCPMOcrForConditionalGeneration": UNTRIED,
    "MiniCPMV4_7ForConditionalGeneration": UNTRIED,
    "MiniMaxM3SparseForConditionalGeneration": UNTRIED,
    "Mistral4ForCausalLM": "it reads text alone.",
    "MistralLarge4ForConditionalGeneration": UNTRIED,
    "MllamaForConditionalGeneration": CROSS,
    "MuseGlimmerForConditionalGeneration": UNTRIED,
    "MuseSparkForConditionalGeneration": UNTRIED,
    "NemotronH_Omni_Reasoning_V3": "its attention does not ask transformers for its function.",
    "PI0ForConditionalGeneration": "it says how a robot moves, and writes no text.",
    "PPFormulaNetForConditionalGeneration": ENCODED,
    "PaddleOCRVLForConditionalGeneration": UNTRIED,
    "Pix2StructForConditionalGeneration": ENCODED,
    "QianfanOCRForConditionalGeneration": UNTRIED,
    "Qwen3OmniMoeThinkerForConditionalGeneration": UNTRIED,
    "Qwen4ExpForConditionalGeneration": UNTRIED,
    "Step3p7ForConditionalGeneration": UNTRIED,
    "T5Gemma2ForConditionalGeneration": ENCODED,
    "UdopForConditionalGeneration": ENCODED,
    "UnlimitedOcrForConditionalGeneration": UNTRIED,
    "VideoLlama3ForConditionalGeneration": UNTRIED,
    "VisionEncoderDecoderModel": ENCODED,
}
"""Class -> why patches that look at images cannot go on, as the end of a sentence that begins with its name."""
