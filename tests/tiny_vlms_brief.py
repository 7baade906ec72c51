"""Further tiny vision-language models, a row each: classes that one head patch is tried on, since the others read the same call."""

from __future__ import annotations

import torch

from accelplug.testing.language_models import CLOSE, IMAGE, OPEN, QWEN_IDS, VIDEO, image_tokens
from tests.tiny_vlms import (
    _SMALL,
    EXPERTS,
    FEW_SINKS,
    ID,
    INDEX,
    LINEAR,
    PINPOINTS,
    QWEN,
    SIGLIP,
    Shown,
    Tiny,
    by_row,
    clips,
    flat_patches,
    grids,
    places,
    squares,
    tiles,
)


def two_sizes(counts: list[int], generator: torch.Generator) -> Shown:
    """Images in two sizes, of 16 tokens each."""
    ids, given = squares(16)(counts, generator)
    return ids, {**given, "high_res_pixel_values": torch.randn(sum(counts), 3, 64, 64, generator=generator)}


def whole_patches(counts: list[int], generator: torch.Generator) -> Shown:
    """Images as patches, filled up to the same number, each with its column and row; every patch makes a token."""
    _, given = places(counts, generator)
    return [image_tokens(int((at >= 0).all(-1).sum())) for at in given["image_position_ids"]], given


def told_tiles(counts: list[int], generator: torch.Generator) -> Shown:
    """Tiles (B, most of a row, 3, 32, 32) of four tokens each, and which of them are there."""
    ids, given = by_row(4)(counts, generator)
    return ids, {**given, "pixel_attention_mask": torch.tensor([[i < n for i in range(max(counts))] for n in counts])}


def framed(counts: list[int], generator: torch.Generator) -> Shown:
    """Images as patches, four to a token, with a token behind every row of them, one ahead and one behind all."""
    _, given = flat_patches(counts, generator)
    shown = given["image_grid_thw"].tolist()
    return [image_tokens(h // 2 * (w // 2 + 1) + 2) for _, h, w in shown], given


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
FEW_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OCR = {**FEW_EXPERTS, "n_shared_experts": 1, "head_dim": 16, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}
WINDOWS = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
SAM = {
    **_SMALL,
    "output_channels": 8,
    "image_size": 64,
    "patch_size": 8,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 64,
}
CODES = {
    "embed_dim": 32,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "resolution": 32,
}
DEEP = {**QWEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
MUSE_TOWER = {**_SMALL, "patch_size": 8, "pos_emb_height": 4, "pos_emb_width": 4}
MUSE = {**ID, "video_token_id": VIDEO, "out_hidden_size": 128, "projector_hidden_size": 64}
GEMMA4_IDS = {**ID, "video_token_id": VIDEO, "audio_token_id": 509, "boi_token_id": OPEN, "eoi_token_id": CLOSE}

BRIEF: dict[str, Tiny] = {
    "deepseek_vl_hybrid": Tiny(
        "DeepseekVLHybridForConditionalGeneration",
        {"model_type": "llama"},
        SIGLIP,
        two_sizes,
        {**ID, "high_res_vision_config": SAM},
    ),
    "fast_vlm": Tiny(
        "FastVlmForConditionalGeneration",
        {"model_type": "qwen2"},
        {  # in the place of timm's, which need not be installed
            "model_type": "resnet",
            "hidden_sizes": [32],
            "depths": [1],
            "embedding_size": 16,
            "hidden_size": 32,
            "layer_type": "basic",
        },
        squares(64),
        {**INDEX, "image_seq_length": 64},
    ),
    "hyperclovax": Tiny(
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        {"model_type": "hyperclovax", "attention_multiplier": 0.25},
        {**QWEN, "model_type": "qwen2_5_vl_vision", "window_size": 32, "fullatt_block_indexes": [1]},
        grids,
        {**ID, "video_token_id": VIDEO},
        clips(),
    ),
    "aria": Tiny(
        "AriaForConditionalGeneration",
        {"moe_num_experts": 4, "moe_topk": 2},
        {**_SMALL, "model_type": "idefics3_vision", "image_size": 32, "patch_size": 8},
        squares(4),
        {**INDEX, "projector_patch_to_query_dict": {16: 4}},
        knobs=FEW_SINKS,
    ),
    "lfm3_vl": Tiny(
        "Lfm3VlForConditionalGeneration",
        {"model_type": "lfm3", "layer_types": ["conv", "full_attention"] * 2},
        {**_SMALL, "patch_size": 8, "num_hidden_layers": 3, "num_key_value_heads": 1},
        grids,
        {
            **ID,
            "video_token_id": VIDEO,
            "vision_start_token_id": OPEN,
            "vision_end_token_id": CLOSE,
            "projector_hidden_size": 64,
        },
        clips(),
        knobs=FEW_SINKS,
    ),
    "cohere_compass": Tiny(
        "CohereCompassForConditionalGeneration",
        {"rope_parameters": {"full_attention": MROPE}},
        DEEP,
        grids,
        QWEN_IDS,
        kinds="mm_token_type_ids",
    ),
    "ernie4_5_vl": Tiny(
        "Ernie4_5_VLMoeForConditionalGeneration",
        {"moe_intermediate_size": [32, 32], "moe_k": 2, "moe_num_experts": 4, "rope_parameters": MROPE},
        {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "intermediate_size": 64},
        flat_patches,
        {**ID, "video_token_id": VIDEO, "image_start_token_id": OPEN, "image_end_token_id": CLOSE},
        kinds="mm_token_type_ids",
    ),
    "gemma4_unified": Tiny(
        "Gemma4UnifiedForConditionalGeneration",
        {**WINDOWS, "global_head_dim": 16},
        {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 16},
        whole_patches,
        GEMMA4_IDS,
        kinds="mm_token_type_ids",
    ),
    "qwen4_exp": Tiny(
        "Qwen4ExpForConditionalGeneration",
        {
            **LINEAR,
            **EXPERTS,
            "head_dim": 16,
            "shared_expert_intermediate_size": 32,
            "hc_count": 2,
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
        {**QWEN, "num_position_embeddings": 64},
        grids,
        QWEN_IDS,
        kinds="mm_token_type_ids",
    ),
    "muse_glimmer": Tiny("MuseGlimmerForConditionalGeneration", WINDOWS, MUSE_TOWER, grids, MUSE),
    "muse_spark": Tiny(
        "MuseSparkForConditionalGeneration",
        {**WINDOWS, "moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_hidden_size": 32},
        MUSE_TOWER,
        grids,
        {
            **MUSE,
            "audio_token_id": 509,
            "audio_config": {
                "hidden_sizes": [8, 8],
                "depths": [1, 1],
                "patch_sizes": [4, 4],
                "num_hidden_layers": 2,
                "out_hidden_size": 64,
            },
        },
    ),
    "step3p7": Tiny(
        "Step3p7ForConditionalGeneration",
        {**WINDOWS, **FEW_EXPERTS, "moe_top_k": 2, "share_expert_dim": 32},
        {**_SMALL, "image_size": 32, "patch_size": 4, "max_position_embeddings": 64},
        squares(4),
        ID,
    ),
    "granite4_vision": Tiny(
        "Granite4VisionForConditionalGeneration",
        {"attention_multiplier": 0.25},
        {**SIGLIP, "hidden_size": 64, "num_attention_heads": 1},
        tiles(14),
        {
            **INDEX,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": PINPOINTS,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 1]],
            "spatial_target_layers": [0, 1, 2, 3],
            "image_seq_length": 4,
        },
    ),
    "granite_docling": Tiny(
        "GraniteDoclingForConditionalGeneration",
        {"attention_multiplier": 0.25},
        {
            **_SMALL,
            "image_size": 32,
            "patch_size": 8,
            "out_hidden_size": 64,
            "scale_factor": 2,
            "deepstack_visual_indexes": [0],
            "use_fine_route": False,
        },
        told_tiles,
        ID,
    ),
    "hunyuan_vl": Tiny(
        "HunYuanVLForConditionalGeneration",
        {"head_dim": 16, "rope_parameters": MROPE},
        {
            **_SMALL,
            "patch_size": 8,
            "out_hidden_size": 64,
            "text_hidden_size": 64,
            "max_image_size": 64,
            "min_image_size": 16,
        },
        framed,
        {**ID, "im_start_id": OPEN, "im_end_id": CLOSE, "im_newline_id": 508},
        kinds="mm_token_type_ids",
    ),
    "deepseek_ocr2": Tiny(
        "DeepseekOcr2ForConditionalGeneration",
        OCR,
        {
            "sam_config": {**SAM, "downsample_channels": [16, 32]},
            "encoder_config": {**_SMALL, "vocab_size": 8, "num_key_value_heads": 2},
        },
        squares(145),
        ID,
    ),
    "unlimited_ocr": Tiny(
        "UnlimitedOcrForConditionalGeneration",
        OCR,
        {
            "sam_config": {**SAM, "downsample_channels": [16, 32]},
            "encoder_config": {**_SMALL, "image_size": 32, "patch_size": 8},
        },
        squares(3),
        ID,
    ),
    "emu3": Tiny(
        "Emu3ForConditionalGeneration",
        {},
        None,
        squares(20, image_sizes=[32, 32]),
        {
            "vq_config": {
                **CODES,
                "codebook_size": 16,
                "embed_dim": 4,
                "latent_channels": 4,
                "hidden_size": 32,
                "attn_resolutions": [4],
            },
            "vocabulary_map": {
                "<image>": IMAGE,
                "<|extra_200|>": 9,
                **{f"<|visual token {i:06d}|>": 10 + i for i in range(16)},
            },
        },
    ),
    "apertus1_5": Tiny(
        "Apertus1p5ForConditionalGeneration",
        {},
        {**CODES, "codebook_size": 16, "attn_resolutions": [4]},
        squares(16, image_sizes=[32, 32]),
        {
            **ID,
            "audio_token_id": 509,
            "image_token_offset": 10,
            "audio_token_offset": 26,
            "audio_config": {
                "model_type": "wavtokenizer_encoder",
                "codebook_size": 16,
                "codebook_dim": 32,
                "hidden_size": 32,
                "num_filters": 2,
            },
        },
    ),
    "chameleon": Tiny(
        "ChameleonForConditionalGeneration",
        {},
        None,
        squares(16),
        {
            **ID,
            "vq_config": {**CODES, "num_embeddings": 16},
            "vocabulary_map": {
                "<image>": IMAGE,
                **{f"IMGIMG{''.join(chr(65 + int(digit)) for digit in str(i))}Z": 10 + i for i in range(16)},
            },
        },
        flat=True,
    ),
}
