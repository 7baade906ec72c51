"""Tiny vision-language models of the classes of today with random weights: a row each, and inputs by the way that its images lie."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any
from unittest.mock import patch

import torch
import transformers as hf
from torch import Tensor

from accelplug.testing.language_models import (
    CLOSE,
    IMAGE,
    MROPE,
    OPEN,
    QWEN_IDS,
    TEXT_CONFIG,
    TOWER_CONFIG,
    VIDEO,
    TokenRows,
    image_tokens,
    padded_rows,
)
from tests.tiny_language_models import FRAMES, GRIDS, TWO_ROWS

Shown = tuple[list[list[int]], dict[str, Tensor]]
"""Ids of each image or video, and what their pixels are given as."""


@dataclass(frozen=True)
class Tiny:
    """A class, what its config is made of, and how it is given images.

    Attributes
    ----------
    text, vision : settings of the language model and of the vision tower.
    more : settings beside them.
    images : makes so many images, in rows of so many each, by a generator.
    videos : the same of videos, where the class takes them.
    flat : whether the language model's settings are the model's own.
    knobs : settings of a patch that are not those of other models, by its name: where weights are such that it would do nothing.
    kinds : name of the argument that says which tokens are images (1) and videos (2), where there is one.
    """

    cls: str
    text: Mapping[str, Any]
    vision: Any
    images: Callable[[list[int], torch.Generator], Shown]
    more: Mapping[str, Any] = field(default_factory=dict)
    videos: Callable[[list[int], torch.Generator], Shown] | None = None
    kinds: str | None = None
    flat: bool = False
    knobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def build(self) -> Any:
        """The model, always with the same weights."""
        torch.manual_seed(0)
        made = getattr(hf, self.cls)
        text = {**TEXT_CONFIG, **self.text}
        text = text if self.flat else {"text_config": text}
        config = made.config_class(**copy.deepcopy({**text, "vision_config": self.vision, **self.more}))
        with patch.object(hf.AutoModel, "from_config", _without_timm):
            model = made(config)
        if self.cls.startswith("Llama4"):  # whose forward asks its language model for images in transformers 5.24
            model.language_model.register_forward_hook(lambda module, args, out: setattr(out, "image_outputs", None))
        model.set_experts_implementation("eager")  # the grouped one knows no float64
        return model.eval().requires_grad_(False)

    def inputs(self, rows: TokenRows = TWO_ROWS) -> dict[str, Tensor]:
        """Left-padded inputs: text, images and videos as `rows` has them."""
        generator = torch.Generator().manual_seed(3)
        shown: dict[str, Any] = {"I": repeat([]), "V": repeat([])}
        extra: dict[str, Tensor] = {}
        for letter, make in (("I", self.images), ("V", self.videos)):
            counts = [sum(part == letter for part in row) for row in rows]
            if make is not None and any(counts):
                ids, pixels = make(counts, generator)
                shown[letter], extra = iter(ids), extra | pixels
        given = padded_rows(rows, shown, generator)
        if self.kinds is not None:
            images, videos = (given["input_ids"] == IMAGE).int(), (given["input_ids"] == VIDEO).int()
            alone = "pixel_values_videos" in extra and not videos.any()  # GLM's videos are runs of images, never beside one
            extra[self.kinds] = 2 * images if alone else images + 2 * videos
        return {**given, **extra}


_FROM_CONFIG = hf.AutoModel.from_config


def _without_timm(config: Any, **more: Any) -> Any:
    """Another tower where one would be timm's, which need not be installed."""
    return (
        hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIGLIP))
        if config.model_type == "gemma3n_vision"
        else _FROM_CONFIG(config)
    )


# ------------------------------------------------------------------------------------------------------------------- images


def squares(tokens: int, name: str = "pixel_values", **more: list[int]) -> Callable[[list[int], torch.Generator], Shown]:
    """Images (N, 3, 32, 32) of so many tokens each; `more` is said of each."""

    def make(counts: list[int], generator: torch.Generator) -> Shown:
        number = sum(counts)
        said = {name: torch.tensor([value] * number) for name, value in more.items()}
        return [image_tokens(tokens)] * number, {name: torch.randn(number, 3, 32, 32, generator=generator), **said}

    return make


def by_row(tokens: int) -> Callable[[list[int], torch.Generator], Shown]:
    """Images (B, most of a row, 3, 32, 32); rows with fewer are filled up with zeros, which the model leaves out."""

    def make(counts: list[int], generator: torch.Generator) -> Shown:
        pixels = torch.randn(len(counts), max(counts), 3, 32, 32, generator=generator)
        for row, count in zip(pixels, counts, strict=True):
            row[count:] = 0
        return [image_tokens(tokens)] * sum(counts), {"pixel_values": pixels}

    return make


def grids(counts: list[int], generator: torch.Generator) -> Shown:
    """Images as patches, with their rows and columns; four patches make a token."""
    chosen = [GRIDS[i % len(GRIDS)] for i in range(sum(counts))]
    patches = sum(t * h * w for t, h, w in chosen)
    pixels = torch.randn(patches, 3 * 2 * 8 * 8, generator=generator)
    ids = [image_tokens(t * h * w // 4) for t, h, w in chosen]
    return ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor(chosen)}


def shapes(counts: list[int], generator: torch.Generator) -> Shown:
    """Images as patches, filled up to the same number, with their rows and columns; four patches make a token."""
    chosen, number = [GRIDS[i % len(GRIDS)][1:] for i in range(sum(counts))], max(h * w for _, h, w in GRIDS)
    pixels = torch.zeros(len(chosen), number, 3 * 8 * 8)
    mask = torch.zeros(len(chosen), number, dtype=torch.long)
    for i, (h, w) in enumerate(chosen):
        pixels[i, : h * w], mask[i, : h * w] = torch.randn(h * w, 3 * 8 * 8, generator=generator), 1
    ids = [image_tokens(h * w // 4) for h, w in chosen]
    return ids, {"pixel_values": pixels, "spatial_shapes": torch.tensor(chosen), "pixel_attention_mask": mask}


def places(counts: list[int], generator: torch.Generator) -> Shown:
    """Images as patches, filled up to the same number, each with its column and row; four patches make a token."""
    chosen, number = [GRIDS[i % len(GRIDS)][1:] for i in range(sum(counts))], max(h * w for _, h, w in GRIDS)
    pixels = torch.zeros(len(chosen), number, 3 * 8 * 8)
    at = torch.full((len(chosen), number, 2), -1)
    for i, (h, w) in enumerate(chosen):
        pixels[i, : h * w] = torch.rand(h * w, 3 * 8 * 8, generator=generator)
        at[i, : h * w] = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"), -1).reshape(-1, 2)
    return [image_tokens(h * w // 4) for h, w in chosen], {"pixel_values": pixels, "image_position_ids": at}


def stills(counts: list[int], generator: torch.Generator) -> Shown:
    """Images as patches (N, 3, P, P), with their rows and columns; four patches make a token."""
    chosen = [GRIDS[i % len(GRIDS)] for i in range(sum(counts))]
    pixels = torch.randn(sum(h * w for _, h, w in chosen), 3, 8, 8, generator=generator)
    ids = [image_tokens(h * w // 4) for _, h, w in chosen]
    return ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor(chosen)}


def merged_patches(counts: list[int], generator: torch.Generator) -> Shown:
    """The same, flat, with how many patches a side make a token."""
    ids, given = stills(counts, generator)
    merge = torch.full((sum(counts),), 2)
    return ids, {**given, "pixel_values": given["pixel_values"].flatten(1), "image_merge_sizes": merge}


def flat_patches(counts: list[int], generator: torch.Generator) -> Shown:
    """The same, flat."""
    ids, given = stills(counts, generator)
    return ids, {**given, "pixel_values": given["pixel_values"].flatten(1)}


def strips(counts: list[int], generator: torch.Generator) -> Shown:
    """Images as patches in one strip (1, 3, P, N P), with their rows and columns; sixteen patches make a token."""
    chosen = [((8, 8), (4, 8), (8, 4))[i % 3] for i in range(sum(counts))]
    pixels = torch.randn(1, 3, 8, 8 * sum(h * w for h, w in chosen), generator=generator)
    ids = [image_tokens(h * w // 16) for h, w in chosen]
    return ids, {"pixel_values": pixels, "target_sizes": torch.tensor(chosen)}


def tiles(tokens: int) -> Callable[[list[int], torch.Generator], Shown]:
    """Images of 32 times 64 pixels in three tiles (N, 3, 3, 32, 32), of so many tokens each."""

    def make(counts: list[int], generator: torch.Generator) -> Shown:
        number = sum(counts)
        pixels = torch.randn(number, 3, 3, 32, 32, generator=generator)
        return [image_tokens(tokens)] * number, {
            "pixel_values": pixels,
            "image_sizes": torch.tensor([[32, 64]] * number),
        }

    return make


def as_tiles(tokens: int) -> Callable[[list[int], torch.Generator], Shown]:
    """Images of one tile (N, 1, 3, 32, 32), of so many tokens each."""

    def make(counts: list[int], generator: torch.Generator) -> Shown:
        number = sum(counts)
        return [image_tokens(tokens)] * number, {"pixel_values": torch.randn(number, 1, 3, 32, 32, generator=generator)}

    return make


def crops(counts: list[int], generator: torch.Generator) -> Shown:
    """Images in a whole and a crop (N, 2, 3, 32, 32), 4 tokens each, with a mark behind every row of two and one between."""
    number = sum(counts)
    pixels, mask = torch.randn(number, 2, 3, 32, 32, generator=generator), torch.ones(number, 2, 4, 4)
    sizes = torch.tensor([[32, 32]] * number)
    given = {"image_pixel_values": pixels, "image_sizes": sizes, "image_attention_mask": mask}
    return [image_tokens(13)] * number, given


def pooled(counts: list[int], generator: torch.Generator) -> Shown:
    """Images as patches (N, 16, 3 P P), four of which are pooled in a token."""
    number = sum(counts)
    pixels = torch.randn(number, 16, 3 * 8 * 8, generator=generator)
    patches = torch.arange(16).reshape(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
    pooling = torch.cat([patches + 16 * i for i in range(number)])
    grids = torch.tensor([[2, 2, 0, 0]] * number)
    more = {"image_grids": grids, "image_num_crops": torch.ones(number, dtype=torch.long)}
    return [image_tokens(4)] * number, {"pixel_values": pixels, "image_token_pooling": pooling, **more}


def films(tokens: int) -> Callable[[list[int], torch.Generator], Shown]:
    """Videos of frames (N, frames, 3, 32, 32), so many tokens a frame."""

    def make(counts: list[int], generator: torch.Generator) -> Shown:
        number, frames = sum(counts), FRAMES[0]
        pixels = torch.randn(number, frames, 3, 32, 32, generator=generator)
        return [[OPEN, *[VIDEO] * (frames * tokens), CLOSE]] * number, {"pixel_values_videos": pixels}

    return make


def clips(opening: bool = False, token: int = VIDEO, seconds: bool = False) -> Callable[[list[int], torch.Generator], Shown]:
    """Videos as patches, with their frames, rows and columns; whether every frame has a time stamp and marks of its own, or seconds."""

    def make(counts: list[int], generator: torch.Generator) -> Shown:
        number, (frames, h, w) = sum(counts), FRAMES
        pixels = torch.randn(number * frames * h * w, 3 * 2 * 8 * 8, generator=generator)
        each = [token] * (h * w // 4)
        ids = (
            [x for at in range(frames) for x in (20 + at, OPEN, *each, CLOSE)] if opening else [OPEN, *each * frames, CLOSE]
        )
        more = {"video_second_per_grid": torch.ones(number)} if seconds else {}
        return [ids] * number, {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([FRAMES] * number), **more}

    return make


# --------------------------------------------------------------------------------------------------------------------- rows

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP = {**_SMALL, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "vision_use_head": False}
CLIP = {**TOWER_CONFIG, "model_type": "clip_vision_model", "projection_dim": 32}
QWEN = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 8, "intermediate_size": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWS = {"sliding_window": 8, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
INTERLEAVED = {"rope_parameters": {**MROPE, "mrope_interleaved": True}}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
MLA_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
}
GLM_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": OPEN, "image_end_token_id": CLOSE}
POOLED = {"patch_size": 8, "pooling_kernel_size": 2, "default_output_length": 8, "position_embedding_size": 64}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
FEW_SINKS = {"var": {"sink_threshold": 0.7, "min_nonsink_ratio": 0.1}}
INDEX, ID = {"image_token_index": IMAGE}, {"image_token_id": IMAGE}

PIXTRAL = {**_SMALL, "model_type": "pixtral", "image_size": 32, "patch_size": 8, "head_dim": 16}
AUDIO = {
    "audio_config": {
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "d_model": 16,
        "num_mel_bins": 8,
        "output_dim": 64,
        "n_window": 2,
        "max_source_positions": 8,
        "downsample_hidden_size": 8,
    }
}

TINY: dict[str, Tiny] = {
    "paligemma": Tiny(
        "PaliGemmaForConditionalGeneration",
        {"model_type": "gemma", "head_dim": 16},
        SIGLIP,
        squares(16),
        {**INDEX, "projection_dim": 64, "hidden_size": 64},
    ),
    "mistral3": Tiny(
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        PIXTRAL,
        squares(4, image_sizes=[32, 32]),
        INDEX,
    ),
    "aya_vision": Tiny(
        "AyaVisionForConditionalGeneration",
        {"model_type": "cohere2", **WINDOWS},
        SIGLIP,
        squares(4),
        {**INDEX, "downsample_factor": 2, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    "cohere2_vision": Tiny(
        "Cohere2VisionForConditionalGeneration",
        {"model_type": "cohere2", **WINDOWS},
        SIGLIP,
        squares(4),
        {**ID, "downsample_factor": 2, "alignment_intermediate_size": 64},
    ),
    "vipllava": Tiny(
        "VipLlavaForConditionalGeneration",
        {"model_type": "llama"},
        CLIP,
        squares(16),
        {**INDEX, "vision_feature_layer": [-2, -1], "image_seq_length": 16},
    ),
    "deepseek_vl": Tiny("DeepseekVLForConditionalGeneration", {"model_type": "llama"}, SIGLIP, squares(16), ID),
    "ovis2": Tiny(
        "Ovis2ForConditionalGeneration",
        {"model_type": "qwen2"},
        {
            **_SMALL,
            "image_size": 32,
            "patch_size": 8,
            "vocab_size": 37,
            "hidden_stride": 2,
            "num_visual_indicator_tokens": 5,
        },
        squares(4),
        {**ID, "visual_indicator_token_ids": [504, 505, 506, 507, 508], "hidden_size": 64, "vocab_size": 512},
    ),
    "idefics2": Tiny(
        "Idefics2ForConditionalGeneration",
        {"model_type": "mistral", "sliding_window": None},
        {**_SMALL, "image_size": 32, "patch_size": 8},
        by_row(4),
        {
            **ID,
            "perceiver_config": {
                "hidden_size": 64,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 1,
            },
        },
    ),
    "lfm2_vl": Tiny(
        "Lfm2VlForConditionalGeneration",
        {"model_type": "lfm2", "full_attn_idxs": [1, 3]},
        {**_SMALL, "model_type": "siglip2_vision_model", "patch_size": 8, "num_patches": 16, "vision_use_head": False},
        shapes,
        {**ID, "projector_hidden_size": 64, "downsample_factor": 2},
    ),
    "glm4v": Tiny(
        "Glm4vForConditionalGeneration",
        {"rope_parameters": MROPE},
        {**QWEN, "image_size": 32},
        grids,
        GLM_IDS,
        clips(opening=True, token=IMAGE),
        "mm_token_type_ids",
    ),
    "qwen3_vl_moe": Tiny(
        "Qwen3VLMoeForConditionalGeneration",
        {"head_dim": 16, **INTERLEAVED, **EXPERTS},
        {**QWEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        grids,
        QWEN_IDS,
        clips(opening=True),
        "mm_token_type_ids",
    ),
    "qwen2_5_omni": Tiny(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {"rope_parameters": MROPE},
        {**QWEN, "window_size": 32, "fullatt_block_indexes": [1]},
        grids,
        {
            **INDEX,
            "video_token_index": VIDEO,
            "audio_token_index": 509,
            "vision_start_token_id": OPEN,
            "vision_end_token_id": CLOSE,
            "audio_config": {
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "d_model": 16,
                "num_mel_bins": 8,
                "output_dim": 64,
                "n_window": 2,
                "max_source_positions": 8,
            },
        },
        clips(seconds=True),
    ),
    "glm46v": Tiny(
        "Glm46VForConditionalGeneration",
        {"model_type": "glm4v_text", "rope_parameters": MROPE},
        {**QWEN, "model_type": "glm4v_vision", "image_size": 32},
        grids,
        GLM_IDS,
        clips(opening=True, token=IMAGE),
        "mm_token_type_ids",
    ),
    "glm4v_moe": Tiny(
        "Glm4vMoeForConditionalGeneration",
        {**MLA_EXPERTS, "head_dim": 16, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
        {**QWEN, "image_size": 32},
        grids,
        GLM_IDS,
        clips(opening=True, token=IMAGE),
        "mm_token_type_ids",
        knobs=FEW_SINKS,
    ),
    "glm_ocr": Tiny(
        "GlmOcrForConditionalGeneration",
        {"rope_parameters": MROPE, "head_dim": 16},
        {**QWEN, "image_size": 32},
        grids,
        GLM_IDS,
        clips(opening=True, token=IMAGE),
        "mm_token_type_ids",
    ),
    "qwen3_5": Tiny(
        "Qwen3_5ForConditionalGeneration",
        {"head_dim": 16, **INTERLEAVED, **LINEAR},
        {**QWEN, "num_position_embeddings": 64},
        grids,
        QWEN_IDS,
        clips(opening=True),
        "mm_token_type_ids",
    ),
    "qwen3_5_moe": Tiny(
        "Qwen3_5MoeForConditionalGeneration",
        {"head_dim": 16, **INTERLEAVED, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
        {**QWEN, "num_position_embeddings": 64},
        grids,
        QWEN_IDS,
        clips(opening=True),
        "mm_token_type_ids",
    ),
    "gemma4": Tiny(
        "Gemma4ForConditionalGeneration",
        {
            **WINDOWS,
            "global_head_dim": 16,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 512,
        },
        {**_SMALL, "num_key_value_heads": 2, "head_dim": 16, **POOLED},
        places,
        {**ID, "video_token_id": VIDEO, "audio_config": None, "boi_token_id": OPEN, "eoi_token_id": CLOSE},
        kinds="mm_token_type_ids",
    ),
    "gemma3n": Tiny(
        "Gemma3nForConditionalGeneration",
        {
            **WINDOWS,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 512,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
        },
        {"hidden_size": 32, "vocab_size": 4, "vocab_offset": 504},
        squares(16),
        {
            **ID,
            "vision_soft_tokens_per_image": 16,
            "boi_token_id": OPEN,
            "eoi_token_id": CLOSE,
            "audio_config": {
                "vocab_size": 4,
                "vocab_offset": 508,
                "hidden_size": 32,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 1,
                "input_feat_size": 16,
                "sscp_conv_channel_size": [4, 4],
            },
        },
    ),
    "perception_lm": Tiny(
        "PerceptionLMForConditionalGeneration",
        {"model_type": "llama"},
        {**CLIP, "model_args": {"embed_dim": 32}},
        as_tiles(4),
        {**ID, "video_token_id": VIDEO, "projector_pooling_ratio": 2},
        films(4),
    ),
    "llava_next_video": Tiny(
        "LlavaNextVideoForConditionalGeneration",
        {"model_type": "llama"},
        CLIP,
        tiles(52),
        {**INDEX, "video_token_index": VIDEO, "vision_feature_layer": -2, "image_grid_pinpoints": PINPOINTS},
        films(4),
    ),
    "video_llava": Tiny(
        "VideoLlavaForConditionalGeneration",
        {"model_type": "llama"},
        CLIP,
        squares(16, name="pixel_values_images"),
        {**INDEX, "video_token_index": VIDEO, "vision_feature_layer": -2, "image_seq_length": 16, "video_seq_length": 34},
        films(17),
    ),
    "idefics3": Tiny(
        "Idefics3ForConditionalGeneration",
        {"model_type": "llama"},
        {**_SMALL, "image_size": 32, "patch_size": 8},
        by_row(4),
        {**ID, "scale_factor": 2, "pad_token_id": 0},
    ),
    "kimi_k25": Tiny(
        "Kimi_K25ForConditionalGeneration",
        {
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            **MLA_EXPERTS,
        },
        {**_SMALL, "patch_size": 8, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2},
        stills,
        {**QWEN_IDS, "projection_hidden_size": 32},
    ),
    "molmo2": Tiny(
        "Molmo2ForConditionalGeneration",
        {"head_dim": 16, "additional_vocab_size": 0},
        {**_SMALL, "num_key_value_heads": 2, "head_dim": 16, "image_size": [32, 32], "patch_size": 8},
        pooled,
        {
            "image_patch_id": IMAGE,
            "adapter_config": {
                "vision_feature_layer": [1, 0],
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "intermediate_size": 64,
                "text_hidden_size": 64,
            },
        },
        kinds="mm_token_type_ids",
        knobs=FEW_SINKS,
    ),
    "minicpmv4_6": Tiny(
        "MiniCPMV4_6ForConditionalGeneration",
        {"model_type": "qwen3_5_text", "head_dim": 16, **LINEAR},
        {**_SMALL, "image_size": 64, "patch_size": 8},
        strips,
        {**ID, "video_token_id": VIDEO, "insert_layer_id": 0},
        knobs=FEW_SINKS,
    ),
    "phi4_multimodal": Tiny(
        "Phi4MultimodalForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {**_SMALL, "image_size": 32, "patch_size": 8, "crop_size": 32, "image_token_id": IMAGE},
        crops,
        {
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "nemo_conv_channels": 8,
                "depthwise_separable_out_channel": 32,
                "ext_pw_out_channel": 32,
                "audio_token_id": 509,
                "input_size": 16,
            },
        },
        flat=True,
    ),
    "llama4": Tiny(
        "Llama4ForConditionalGeneration",
        {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "num_experts_per_tok": 1},
        {
            **_SMALL,
            "intermediate_size": 128,
            "image_size": 32,
            "patch_size": 8,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
        },
        squares(4),
        {"image_token_index": IMAGE},
    ),
    "lighton_ocr": Tiny(
        "LightOnOcrForConditionalGeneration",
        {"model_type": "qwen3", "head_dim": 16},
        PIXTRAL,
        squares(4, image_sizes=[32, 32]),
        ID,
    ),
    "exaone4_5": Tiny(
        "Exaone4_5_ForConditionalGeneration",
        {"model_type": "exaone4", **WINDOWS, "sliding_window_pattern": 2},
        {**QWEN, "window_size": 32, "fullatt_block_indexes": [1], "num_key_value_heads": 2},
        grids,
        {"image_token_id": IMAGE, "video_token_id": VIDEO},
    ),
    "cosmos3_omni": Tiny(
        "Cosmos3OmniForConditionalGeneration",
        {"model_type": "qwen3_vl_text", "head_dim": 16, **INTERLEAVED},
        {**QWEN, "model_type": "qwen3_vl_vision", "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        grids,
        QWEN_IDS,
        None,
        "mm_token_type_ids",
    ),
    "qianfan_ocr": Tiny(
        "QianfanOCRForConditionalGeneration",
        {"model_type": "qwen3", "head_dim": 16},
        {**_SMALL, "image_size": [32, 32], "patch_size": [8, 8]},
        squares(4),
        {**ID, "image_seq_length": 4},
    ),
    "video_llama_3": Tiny(
        "VideoLlama3ForConditionalGeneration",
        {"model_type": "qwen2"},
        {**_SMALL, "patch_size": 8},
        merged_patches,
        {"image_token_id": IMAGE, "video_token_id": VIDEO},
    ),
    "minicpmv4_7": Tiny(
        "MiniCPMV4_7ForConditionalGeneration",
        {"model_type": "qwen3_5_text", "head_dim": 16, **LINEAR},
        {**_SMALL, "image_size": 64, "patch_size": 8},
        strips,
        {**ID, "video_token_id": VIDEO, "insert_layer_id": 0},
        kinds="mm_token_type_ids",
    ),
    "minicpm_ocr": Tiny(
        "MiniCPMOcrForConditionalGeneration",
        {"model_type": "qwen3_5_text", "head_dim": 16, **LINEAR},
        {**_SMALL, "image_size": 64, "patch_size": 8},
        strips,
        {**ID, "video_token_id": VIDEO, "insert_layer_id": 0, "downsample_mode": "16x"},
    ),
    "janus": Tiny(
        "JanusForConditionalGeneration",
        {"model_type": "llama"},
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "mlp_ratio": 2.0,
            "projection_dim": 64,
            "num_image_tokens": 16,
        },
        squares(16),
        {
            **ID,
            "vq_config": {
                "embed_dim": 4,
                "num_embeddings": 16,
                "latent_channels": 32,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_patches": 4,
                "projection_dim": 64,
                "image_token_embed_dim": 64,
            },
        },
    ),
    "qwen3_omni": Tiny(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {"head_dim": 16, **INTERLEAVED, **EXPERTS},
        {**QWEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        grids,
        {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": 509,
            "vision_start_token_id": OPEN,
            "vision_end_token_id": CLOSE,
            "audio_start_token_id": 508,
            **AUDIO,
        },
        None,
    ),
    "paddleocr_vl": Tiny(
        "PaddleOCRVLForConditionalGeneration",
        {"rope_parameters": MROPE, "head_dim": 16},
        {**_SMALL, "image_size": 32, "patch_size": 8},
        stills,
        QWEN_IDS,
        None,
        "mm_token_type_ids",
    ),
    "got_ocr2": Tiny(
        "GotOcr2ForConditionalGeneration",
        {"model_type": "qwen2"},
        {
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 64,
        },
        squares(16),
        {**INDEX, "image_seq_length": 16},
    ),
    "cosmos3_edge": Tiny(
        "Cosmos3EdgeForConditionalGeneration",
        {"head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        {**_SMALL, "patch_size": 8, "num_patches": 16},
        flat_patches,
        {**QWEN_IDS, "projector_hidden_size": 64},
        None,
        "mm_token_type_ids",
    ),
}
