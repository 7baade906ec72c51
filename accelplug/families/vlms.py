"""The families of vision-language models, a row each: how their pixels and their image tokens lie. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Pixels = Literal["images", "tiles", "patches", "filled", "other"]
TokenGrid = Literal["square", "thw", "tiles", "anyres", "own", "none"]


@dataclass(frozen=True)
class Vlm:
    """Data about one family.

    Attributes
    ----------
    name : short name.
    classes : names of the model classes.
    pixels : how ``pixel_values`` lie: ``images`` (N, 3, H, W), one a picture; ``tiles`` (N, T, 3, H, W) or several a picture;
        ``patches`` (sum of T*H*W, C * T_p * P * P) with ``image_grid_thw``; ``filled`` (N, most, P * P * C), with ``spatial_shapes``
        or ``image_position_ids``; ``other``, in no form that comes together as a picture here.
    grid : how an image's tokens lie: ``square``, row by row; ``thw``, by ``image_grid_thw`` over the merge size; ``tiles``, square
        tiles one after the other; ``anyres``, a square base, then rows of tiles with a newline each; ``own``, row by row on a grid of
        the picture's own shape; ``none``, on no grid.
    by_image : whether the image encoder returns features image by image; where it does not, each run of image tokens is one.
    turns : the tokens that open a turn of the released models, by who speaks: 1 the user, -1 the model, 0 the system.
    mean : what a mean pixel has in ``pixel_values``.
    note : what patches do otherwise here, or do not do, as a sentence.
    """

    name: str
    classes: tuple[str, ...]
    pixels: Pixels = "images"
    grid: TokenGrid = "square"
    by_image: bool = True
    turns: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    mean: float = 0.0
    note: str = ""


SOME_LAYERS = (
    "Linear layers look at nothing: rules reach the layers with attention, and GIFT must read its gaze in one of them."
)
FRAMES = "Frames of a video are images each: its tokens are those of images."

VICUNA = {1: (3148, 1001, 29901), -1: (319, 1799, 9047, 13566, 29901)}
"""``USER:`` and ``ASSISTANT:`` of Llama's tokenizer."""
CHATML = {1: (151644, 872), -1: (151644, 77091), 0: (151644, 8948)}
"""``<|im_start|>user`` and so on of Qwen's tokenizer, up to Qwen3."""
GEMMA = {1: (105, 2364), -1: (105, 4368)}
"""``<start_of_turn>user`` and ``model`` of Gemma 3's tokenizer."""
GLM = {1: (151336,), -1: (151337,), 0: (151335,)}
"""``<|user|>``, ``<|assistant|>`` and ``<|system|>`` of GLM-4's tokenizer."""


def _of(*classes: str) -> tuple[str, ...]:
    return tuple(f"{cls}ForConditionalGeneration" for cls in classes)


KNOWN_VLMS = (
    Vlm("llava", _of("Llava"), turns=VICUNA),
    Vlm("llava-next", _of("LlavaNext"), "tiles", "anyres", turns=VICUNA),
    Vlm("llava-next-video", _of("LlavaNextVideo"), "tiles", "anyres", turns=VICUNA),
    Vlm("granite4-vision", _of("Granite4Vision"), "tiles", "anyres"),
    Vlm("llava-onevision", _of("LlavaOnevision"), "tiles", "anyres", turns=CHATML),
    Vlm("video-llava", _of("VideoLlava"), "other", turns=VICUNA),
    Vlm("vipllava", _of("VipLlava")),
    Vlm("fastvlm", _of("FastVlm"), turns=CHATML),
    Vlm("aria", _of("Aria"), "other", "none"),
    Vlm("qwen2-vl", _of("Qwen2VL"), "patches", "thw", turns=CHATML),
    Vlm("qwen2.5-vl", _of("Qwen2_5_VL"), "patches", "thw", turns=CHATML),
    Vlm("qwen2.5-omni", _of("Qwen2_5OmniThinker"), "patches", "thw", turns=CHATML),
    Vlm("qwen3-vl", _of("Qwen3VL", "Qwen3VLMoe"), "patches", "thw", turns=CHATML),
    Vlm("qwen3-omni", _of("Qwen3OmniMoeThinker"), "patches", "thw", turns=CHATML),
    Vlm("cosmos3", _of("Cosmos3Omni"), "patches", "thw"),
    Vlm("cosmos3-edge", _of("Cosmos3Edge"), "other", "thw"),
    Vlm("exaone4.5", _of("Exaone4_5_"), "patches", "thw"),
    Vlm("videollama3", _of("VideoLlama3"), "other", "thw"),
    Vlm("paddleocr-vl", _of("PaddleOCRVL"), "other", "thw"),
    Vlm("qwen3.5", _of("Qwen3_5", "Qwen3_5Moe"), "patches", "thw", note=SOME_LAYERS),
    Vlm("qwen4", _of("Qwen4Exp"), "patches", "thw", note=SOME_LAYERS),
    Vlm("hyperclovax", _of("HyperCLOVAXVisionV2"), "patches", "thw"),
    Vlm("cohere-compass", _of("CohereCompass"), "other", "thw"),
    Vlm("ernie4.5-vl", _of("Ernie4_5_VLMoe"), "other", "thw"),
    Vlm("muse", _of("MuseGlimmer", "MuseSpark"), "other", "thw"),
    Vlm("hunyuan-vl", _of("HunYuanVL"), "other", "none"),
    Vlm("glm4v", _of("Glm4v", "Glm4vMoe", "Glm46V"), "patches", "thw", turns=GLM, note=FRAMES),
    Vlm("glm-ocr", _of("GlmOcr"), "patches", "thw", note=FRAMES),
    Vlm("internvl", _of("InternVL"), "images", "tiles", turns=CHATML),
    Vlm("qianfan-ocr", _of("QianfanOCR"), "images", "tiles"),
    Vlm("ovis2", _of("Ovis2"), "images", "tiles", turns=CHATML),
    Vlm("aya-vision", _of("AyaVision", "Cohere2Vision"), "images", "tiles"),
    Vlm("gemma3", _of("Gemma3"), turns=GEMMA),
    Vlm("gemma3n", _of("Gemma3n"), turns=GEMMA),
    Vlm(
        "gemma4",
        _of("Gemma4"),
        "filled",
        "own",
        mean=0.5,
        note="`generate` gives layers that read the keys of others a prompt's last token alone: `var` and `vhr` run dense there, counted.",
    ),
    Vlm("gemma4-unified", _of("Gemma4Unified"), "other", "own"),
    Vlm("paligemma", _of("PaliGemma")),
    Vlm("smolvlm", _of("SmolVLM", "Idefics3"), "tiles", "tiles", by_image=False),
    Vlm("granite-docling", _of("GraniteDocling"), "other", "tiles", by_image=False),
    Vlm("idefics2", _of("Idefics2"), "tiles", "none", by_image=False),
    Vlm("mistral3", _of("Mistral3"), "images", "own"),
    Vlm("lighton-ocr", _of("LightOnOcr"), "images", "own"),
    Vlm("got-ocr2", _of("GotOcr2"), "images", "tiles"),
    Vlm("janus", _of("Janus")),
    Vlm("chameleon", _of("Chameleon")),
    Vlm("emu3", _of("Emu3"), "other", "none"),
    Vlm("apertus1.5", _of("Apertus1p5"), "other", "none"),
    Vlm("step3.7", _of("Step3p7"), "other", "none"),
    Vlm("deepseek-vl", _of("DeepseekVL")),
    Vlm("deepseek-vl-hybrid", _of("DeepseekVLHybrid"), "other"),
    Vlm("deepseek-ocr2", _of("DeepseekOcr2", "UnlimitedOcr"), "other", "none"),
    Vlm("lfm2-vl", _of("Lfm2Vl"), "filled", "own", note=SOME_LAYERS.replace("Linear layers", "Convolutions")),
    Vlm("lfm3-vl", _of("Lfm3Vl"), "patches", "thw", note=SOME_LAYERS.replace("Linear layers", "Convolutions")),
    Vlm("perception-lm", _of("PerceptionLM"), "tiles", "tiles"),
    Vlm(
        "llama4", _of("Llama4"), "images", "tiles", by_image=False, note="Its forward fails by itself in transformers 5.24."
    ),
    Vlm("kimi", _of("Kimi_K25"), "other", "thw"),
    Vlm("molmo2", _of("Molmo2"), "other", "none", by_image=False, note=FRAMES),
    Vlm("minicpm-v", _of("MiniCPMV4_6", "MiniCPMV4_7", "MiniCPMOcr"), "other", "own", note=SOME_LAYERS),
    Vlm("phi4-multimodal", ("Phi4MultimodalForCausalLM",), "other", "none", by_image=False),
)
